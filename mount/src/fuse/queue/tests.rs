//! Tests of the queue without threads: bounds, order, and that nobody waits for somebody else's requests.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    places: 5,
    share: |uid| if uid == 0 { 4 } else { 2 },
    waiting: 8,
    bytes: 100,
    total: 12,
    total_bytes: 150,
    reserved: 2,
    users: 3,
};

/// A queue on a clock of its own. Its jobs are numbered in the order in which they arrive.
struct Bed {
    queue: Queue<u32>,
    now: Instant,
    next: u32,
    running: Vec<(u32, u32)>,
    refused: Vec<u32>,
}

impl Bed {
    fn new() -> Self {
        Self { queue: Queue::new(LIMITS), now: Instant::now(), next: 0, running: vec![], refused: vec![] }
    }

    /// A request of this user arrives.
    fn arrive(&mut self, uid: u32, bytes: usize, patience: u64) -> Arrival {
        self.next += 1;
        let now = self.now;
        let arrival = self.queue.arrive(uid, bytes, false, || now);
        let wait = |bytes, has_data| Waiting {
            job: self.next,
            bytes,
            deadline: now + Duration::from_millis(patience),
            has_data,
        };
        let turn = match arrival {
            Arrival::Run => {
                self.running.push((uid, self.next));
                None
            }
            Arrival::Wait => self.queue.wait(uid, wait(bytes, true)),
            Arrival::WaitWithoutData => self.queue.wait(uid, wait(0, false)),
            Arrival::Full | Arrival::Stuck => None,
        };
        assert!(turn.is_none(), "no place becomes free in between");
        arrival
    }

    /// The request at this position of those that run has finished. Returns the one that follows it.
    fn finish(&mut self, at: usize) -> Option<u32> {
        let now = self.now;
        let (uid, _) = self.running.remove(at);
        let turn = self.queue.finish(uid, || now)?;
        self.running.push((turn.uid, turn.job));
        if turn.is_refused {
            self.refused.push(turn.job);
        }
        Some(turn.job)
    }

    fn runs(&self, uid: u32) -> usize {
        self.running.iter().filter(|(running, _)| *running == uid).count()
    }
}

#[test]
fn a_request_is_carried_out_at_once_when_it_is_calm() {
    let mut bed = Bed::new();
    for uid in [0, 1, 2, 0, 0] {
        assert_eq!(bed.arrive(uid, 65_536, 0), Arrival::Run, "whatever its size");
    }
    while !bed.running.is_empty() {
        assert_eq!(bed.finish(0), None);
    }
}

#[test]
fn a_user_has_its_share_and_root_not_all() {
    let mut bed = Bed::new();
    let arrivals: Vec<Arrival> = (0..5).map(|_| bed.arrive(0, 0, 1000)).collect();
    assert_eq!(arrivals[..4], [Arrival::Run; 4]);
    assert_eq!(arrivals[4], Arrival::Wait);
    assert_eq!(bed.arrive(7, 0, 1000), Arrival::Run, "one place is left to others");
    assert_eq!(bed.arrive(8, 0, 1000), Arrival::Wait, "and one thread reads");
}

#[test]
fn a_cheap_request_does_not_wait_behind_others_of_its_user() {
    let mut bed = Bed::new();
    for _ in 0..5 {
        bed.arrive(1, 0, 1000);
    }
    let now = bed.now;
    assert_eq!(bed.queue.arrive(1, 0, true, || now), Arrival::Run);
    assert_eq!(bed.queue.arrive(1, 0, true, || now), Arrival::Wait, "but it has one place only");
    assert_eq!(bed.queue.finish(1, || now), None);
    assert_eq!(bed.finish(0), Some(3), "the others go on in their order");
}

#[test]
fn queues_take_turns() {
    let mut bed = Bed::new();
    // Six of uid 1, then two of uid 2 and two of uid 3.
    for uid in [1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3] {
        bed.arrive(uid, 0, 1000);
    }
    // 1, 2 run for uid 1; 7, 8 for uid 2; 10 for uid 3.
    assert_eq!(bed.running, [(1, 1), (1, 2), (2, 7), (2, 8), (3, 10)]);
    // Whichever request finishes, uid 1 has no more than its share, and nobody gets two turns before another one
    // gets his.
    assert_eq!(bed.finish(0), Some(3), "uid 1 comes first");
    assert_eq!(bed.finish(1), Some(9), "then uid 2");
    assert_eq!(bed.finish(1), Some(11), "uid 3 is next, and has a place left");
}

#[test]
fn a_place_that_becomes_free_meanwhile_is_taken() {
    let mut bed = Bed::new();
    (0..2).for_each(|_| assert_eq!(bed.arrive(1, 0, 0), Arrival::Run));
    let now = bed.now;
    assert_eq!(bed.queue.arrive(1, 0, false, || now), Arrival::Wait);
    assert_eq!(bed.queue.finish(1, || now), None);
    let waiting = Waiting { job: 9, bytes: 0, deadline: now, has_data: true };
    assert_eq!(bed.queue.wait(1, waiting), Some(Turn { uid: 1, job: 9, is_refused: false }));
}

#[test]
fn data_beyond_the_bound_is_dropped_and_its_request_refused_in_its_turn() {
    let mut bed = Bed::new();
    let arrivals: Vec<Arrival> = (0..5).map(|_| bed.arrive(1, 40, 1000)).collect();
    assert_eq!(arrivals[2..], [Arrival::Wait, Arrival::Wait, Arrival::WaitWithoutData]);
    assert_eq!((bed.queue.bytes, bed.queue.waiting), (80, 3));
    for expected in [Some(3), Some(4), Some(5), None, None] {
        assert_eq!(bed.finish(0), expected);
    }
    assert_eq!(bed.refused, [5]);
    assert_eq!(bed.queue.bytes, 0);
}

#[test]
fn only_the_noisy_user_is_refused() {
    let mut bed = Bed::new();
    for _ in 0..10 {
        bed.arrive(1, 0, 1000);
    }
    assert_eq!(bed.arrive(1, 0, 1000), Arrival::Full);
    (0..2).for_each(|_| assert_eq!(bed.arrive(2, 0, 1000), Arrival::Run));
    (0..4).for_each(|_| assert_eq!(bed.arrive(2, 0, 1000), Arrival::Wait));
    // The total is used up: uid 2 has had more than what is reserved for it, uid 3 has not.
    assert_eq!(bed.arrive(2, 0, 1000), Arrival::Full);
    assert_eq!(bed.arrive(3, 0, 1000), Arrival::Run);
    (0..2).for_each(|_| assert_eq!(bed.arrive(3, 0, 1000), Arrival::Wait));
    assert_eq!(bed.arrive(3, 0, 1000), Arrival::Full);
    assert_eq!(bed.arrive(4, 0, 1000), Arrival::Full, "the number of users is bounded");
}

#[test]
fn a_request_that_has_waited_too_long_is_refused() {
    let mut bed = Bed::new();
    for patience in [0, 0, 1000, 25, 1000] {
        bed.arrive(1, 0, patience);
    }
    assert_eq!(bed.queue.next_deadline(), Some(bed.now + Duration::from_millis(25)));
    assert!(bed.queue.take_late(bed.now).is_empty());
    bed.now += Duration::from_millis(25);
    assert_eq!(bed.queue.take_late(bed.now), [4], "also if its turn does not come");
    bed.now += Duration::from_millis(975);
    assert_eq!(bed.finish(0), Some(3));
    assert_eq!(bed.refused, [3]);
    assert_eq!(bed.queue.take_late(bed.now), [5]);
    assert!(bed.queue.users.is_empty() && bed.queue.turns.is_empty());
}

#[test]
fn a_worker_in_which_nothing_finishes_is_stuck() {
    let mut bed = Bed::new();
    for uid in [0, 0, 0, 0, 1] {
        assert_eq!(bed.arrive(uid, 0, 1000), Arrival::Run);
    }
    assert_eq!(bed.arrive(2, 0, 1000), Arrival::Wait);
    bed.now += STUCK_TIME;
    assert_eq!(bed.arrive(2, 0, 1000), Arrival::Wait);
    bed.now += Duration::from_millis(1);
    assert_eq!(bed.arrive(2, 0, 1000), Arrival::Stuck);
    bed.finish(0);
    assert_eq!(bed.arrive(2, 0, 1000), Arrival::Wait, "it goes on");
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Arrive { uid: u32, bytes: usize, patience: u64 },
    Finish { at: usize },
    Pass { ms: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..5_u32, 0..60_usize, 1..40_u64)
            .prop_map(|(uid, bytes, patience)| Step::Arrive { uid, bytes, patience }),
        3 => (0..5_usize).prop_map(|at| Step::Finish { at }),
        1 => (0..20_u64).prop_map(|ms| Step::Pass { ms }),
    ]
}

proptest! {
    #[test]
    fn bounds_order_and_turns_hold_in_every_history(steps in prop::collection::vec(step(), 0..200)) {
        let mut bed = Bed::new();
        let mut last: BTreeMap<u32, u32> = BTreeMap::new();
        let mut owner: BTreeMap<u32, u32> = BTreeMap::new();
        let (mut accepted, mut ended, mut late) = (0, 0, 0);
        for step in steps {
            match step {
                Step::Arrive { uid, bytes, patience } => {
                    let arrival = bed.arrive(uid, bytes, patience);
                    owner.insert(bed.next, uid);
                    if arrival == Arrival::Run {
                        prop_assert!(last.insert(uid, bed.next) < Some(bed.next));
                    }
                    accepted += usize::from(!matches!(arrival, Arrival::Full | Arrival::Stuck));
                }
                Step::Finish { at } if at < bed.running.len() => {
                    ended += 1;
                    if let Some(job) = bed.finish(at) {
                        // The requests of a user are carried out in the order in which they came.
                        prop_assert!(last.insert(owner[&job], job) < Some(job));
                    }
                }
                Step::Finish { .. } => {}
                Step::Pass { ms } => {
                    bed.now += Duration::from_millis(ms);
                    late += bed.queue.take_late(bed.now).len();
                    prop_assert!(bed.queue.next_deadline() > Some(bed.now) || bed.queue.waiting == 0);
                }
            }
            let queue = &bed.queue;
            // One thread reads, and nobody has more than its share.
            prop_assert!(bed.running.len() <= LIMITS.places);
            for uid in 0..5 {
                prop_assert!(bed.runs(uid) <= (LIMITS.share)(uid));
                // No place stays free for which somebody waits.
                let waits = queue.users.contains_key(&uid);
                prop_assert!(!waits || !queue.may_run(uid));
            }
            // Memory is bounded, and counted right.
            let sizes = || queue.users.values().flat_map(|user| &user.waiting);
            prop_assert_eq!(queue.waiting, sizes().count());
            prop_assert_eq!(queue.bytes, sizes().map(|one| one.bytes).sum::<usize>());
            prop_assert!(queue.bytes <= LIMITS.total_bytes);
            prop_assert!(queue.waiting <= LIMITS.total + LIMITS.reserved * LIMITS.users);
            prop_assert!(queue.users.values().all(|user| user.waiting.len() <= LIMITS.waiting));
            prop_assert!(queue.users.len() <= LIMITS.users && queue.turns.len() == queue.users.len());
            // Nothing is lost.
            prop_assert_eq!(accepted, ended + late + bed.running.len() + queue.waiting);
        }
    }

    /// However many requests a user has, another one's is carried out after at most one request of each user.
    #[test]
    fn nobody_starves(noise in 1..8_u32, finishes in prop::collection::vec(0..5_usize, 40)) {
        let mut bed = Bed::new();
        for uid in [1, 2] {
            for _ in 0..2 + noise {
                bed.arrive(uid, 0, 1_000_000);
            }
        }
        bed.arrive(3, 0, 1_000_000);
        bed.arrive(3, 0, 1_000_000);
        let victim = bed.next;
        if bed.running.iter().any(|(_, job)| *job == victim) {
            return Ok(());
        }
        let mut others = 0;
        for at in finishes {
            let at = at % bed.running.len();
            match bed.finish(at) {
                Some(job) if job == victim => break,
                Some(_) => others += 1,
                None => break,
            }
        }
        prop_assert!(others <= 2, "{others} requests came first");
    }
}
