//! The queue of requests, shared by the threads that read them.
//!
//! Owns its lock, its bounds, and the thread that refuses what has waited too long. Does not know what a request is.
//!
//! It is calm nearly always: then a request takes the lock for a moment before and after it is carried out, on the
//! thread that has read it, and nothing is copied.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::queue::{Arrival, Limits, Queue, Turn, Waiting};

/// The number of threads that read requests and carry them out. One of them is always free to read.
pub(super) const THREADS: usize = 6;

/// The kernel hands out requests in the order in which they came, so they are all read at once and sorted here.
const LIMITS: Limits = Limits {
    places: THREADS - 1,
    // Root of every container has the uid 0.
    share: |uid| if uid == 0 { 4 } else { 2 },
    // More than the 10,000 threads that systemd and container runtimes commonly allow a user: each thread waits for one
    // request, and then sends no other. A waiting request takes about 250 bytes.
    waiting: 16_384,
    bytes: 1 << 20,
    total: 65_536,
    total_bytes: 16 << 20,
    reserved: 64,
    users: 1024,
};

/// If more requests of one user wait, there is a pause after each. Each answer wakes a thread of the client: if a thousand
/// threads are answered as fast as possible, they all want to run, and everybody else waits for a CPU behind them.
const CROWD: usize = 200;
/// The pause. The request keeps its place meanwhile; the other places are for other users.
const PACE: Duration = Duration::from_micros(100);

/// How often requests are looked over that have waited too long, at most.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);
/// How often a thread checks whether a worker that is stuck works again.
const STUCK_INTERVAL: Duration = Duration::from_millis(50);

/// How a request is answered in its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Serve,
    /// It has waited too long, or too many others of its user wait.
    Refuse,
}

/// The place of a request: what to do with it now.
pub(super) enum Place {
    /// Carry it out now, and call [`Turns::finish`] after it.
    Now,
    /// Call [`Turns::wait`], with its data or without.
    Later { with_data: bool },
    /// Refuse it.
    Nowhere,
}

/// The shared queue.
#[derive(Debug)]
pub(super) struct Turns<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    queue: Queue<T>,
    /// When requests that have waited too long are looked for next.
    next_check: Option<Instant>,
    has_ended: bool,
}

impl<T> Turns<T> {
    pub(super) fn new() -> Self {
        let state = State { queue: Queue::new(LIMITS), next_check: None, has_ended: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Decides what to do with a request of this user that has data of this size. Does not return while the worker is
    /// stuck, so that nothing more is read, which the watchdog sees.
    pub(super) fn arrive(&self, uid: u32, bytes: usize, is_cheap: bool) -> Place {
        loop {
            match self.state.lock().queue.arrive(uid, bytes, is_cheap, Instant::now) {
                Arrival::Run => return Place::Now,
                Arrival::Wait => return Place::Later { with_data: true },
                Arrival::WaitWithoutData => return Place::Later { with_data: false },
                Arrival::Full => return Place::Nowhere,
                Arrival::Stuck => {}
            }
            std::thread::sleep(STUCK_INTERVAL);
        }
    }

    /// Lets a request wait, for as long as its `patience` at most. If its turn has come meanwhile, it is returned.
    pub(super) fn wait(&self, uid: u32, job: T, data: Option<usize>, patience: Duration) -> Option<Turn<T>> {
        let deadline = Instant::now() + patience;
        let waiting = Waiting { job, bytes: data.unwrap_or(0), deadline, has_data: data.is_some() };
        let mut state = self.state.lock();
        let turn = state.queue.wait(uid, waiting);
        if turn.is_none() && state.next_check.is_none_or(|check| deadline < check) {
            state.next_check = Some(deadline);
            self.changed.notify_one();
        }
        turn
    }

    /// A request of this user has been carried out. Returns the next one: carry it out, and call this again after it. Waits
    /// for a moment if very many of this user wait.
    pub(super) fn finish(&self, uid: u32) -> Option<Turn<T>> {
        let mut state = self.state.lock();
        if state.queue.waiting_of(uid) > CROWD {
            MutexGuard::unlocked(&mut state, || std::thread::sleep(PACE));
        }
        state.queue.finish(uid, Instant::now)
    }

    /// Calls `late` with each request that has waited too long, until the end; for a thread of its own. Sleeps while
    /// nothing waits.
    pub(super) fn refuse_late_ones(&self, late: impl Fn(T)) {
        let mut state = self.state.lock();
        while !state.has_ended {
            let now = Instant::now();
            match state.next_check {
                None => self.changed.wait(&mut state),
                Some(check) if check > now => drop(self.changed.wait_until(&mut state, check)),
                Some(_) => {
                    let jobs = state.queue.take_late(now);
                    MutexGuard::unlocked(&mut state, || jobs.into_iter().for_each(&late));
                    state.next_check = state.queue.next_deadline().map(|next| next.max(now + CHECK_INTERVAL));
                }
            }
        }
    }

    /// Ends [`Turns::refuse_late_ones`].
    pub(super) fn end(&self) {
        self.state.lock().has_ended = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc;

    /// Takes a place for a user, which must be free.
    fn run(turns: &Turns<u32>, uid: u32) {
        assert!(matches!(turns.arrive(uid, 0, false), Place::Now));
    }

    #[test]
    fn a_request_that_waits_is_handed_to_the_thread_that_finishes() {
        let turns = Turns::new();
        (0..2).for_each(|_| run(&turns, 1000));
        assert!(matches!(turns.arrive(1000, 5, false), Place::Later { with_data: true }));
        assert_eq!(turns.wait(1000, 7, Some(5), Duration::from_secs(9)), None);
        assert_eq!(turns.finish(1000), Some(Turn { uid: 1000, job: 7, is_refused: false }));
        assert_eq!(turns.finish(1000), None);
    }

    #[test]
    fn a_crowd_of_one_user_is_served_with_pauses() {
        let turns = Turns::new();
        (0..2).for_each(|_| run(&turns, 1000));
        run(&turns, 2000);
        let requests = CROWD as u32 + 50;
        for one in 0..requests {
            assert_eq!(turns.wait(1000, one, Some(0), Duration::from_secs(60)), None);
        }
        assert_eq!(turns.state.lock().queue.waiting_of(2000), 0);
        let begin = Instant::now();
        for one in 0..requests {
            assert_eq!(turns.finish(1000).map(|turn| turn.job), Some(one));
        }
        assert!(begin.elapsed() >= PACE * 50);
    }

    #[test]
    fn what_has_waited_too_long_is_refused_though_no_place_becomes_free() {
        let turns = Arc::new(Turns::new());
        let (late, refused) = mpsc::channel();
        let thread = {
            let turns = Arc::clone(&turns);
            std::thread::spawn(move || turns.refuse_late_ones(|job| late.send(job).unwrap()))
        };
        (0..2).for_each(|_| run(&turns, 1000));
        let begin = Instant::now();
        assert_eq!(turns.wait(1000, 1, Some(0), Duration::from_secs(60)), None);
        assert_eq!(turns.wait(1000, 2, Some(0), Duration::from_millis(20)), None);
        assert_eq!(refused.recv(), Ok(2));
        assert!(begin.elapsed() >= Duration::from_millis(20));
        assert_eq!(turns.finish(1000).map(|turn| turn.job), Some(1));
        turns.end();
        thread.join().unwrap();
    }

    #[test]
    fn threads_carry_out_each_request_once_and_nobody_exceeds_his_share() {
        use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
        let turns: Turns<u32> = Turns::new();
        let (done, running) = (AtomicUsize::new(0), [const { AtomicUsize::new(0) }; 3]);
        let work = |uid: u32| {
            let running = &running[uid as usize];
            assert!(running.fetch_add(1, Relaxed) < if uid == 0 { 4 } else { 2 });
            std::hint::spin_loop();
            running.fetch_sub(1, Relaxed);
            done.fetch_add(1, Relaxed);
        };
        let serve = |mut turn: Option<Turn<u32>>| {
            while let Some(Turn { uid, .. }) = turn {
                work(uid);
                turn = turns.finish(uid);
            }
        };
        std::thread::scope(|scope| {
            for thread in 0..THREADS as u32 {
                let (turns, work, serve) = (&turns, &work, &serve);
                scope.spawn(move || {
                    for one in 0..3000 {
                        let uid = (thread + one) % 3;
                        match turns.arrive(uid, 0, false) {
                            Place::Now => {
                                work(uid);
                                serve(turns.finish(uid));
                            }
                            _ => serve(turns.wait(uid, one, Some(0), Duration::from_secs(60))),
                        }
                    }
                });
            }
        });
        assert_eq!(done.into_inner(), THREADS * 3000);
        let state = turns.state.into_inner();
        assert_eq!(state.queue.next_deadline(), None);
    }
}
