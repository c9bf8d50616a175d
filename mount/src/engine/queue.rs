//! Waiting in turn: the `queue` file of a pool.
//!
//! Owns who is entered, when a turn ends, and that a waiter is woken. Does not know the order: [`Queues`] does.
//!
//! A program writes a PID to `queue`, and polls that open file: it becomes ready at the turn of the task, which then claims
//! as ever. While tasks wait, others are refused unless there are more free lists than tasks that wait before them.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::ports::{Clock as _, Journal as _, Masks as _, Ports, Process as _, Processes as _};
use super::requester::Allowance;
use super::resolve::single_pid;
use super::{Caller, Engine, Refused};
use crate::clock;
use crate::journal::Record;
use crate::model::command::{Request, Target};
use crate::model::pool::PoolId;
use crate::model::queue::{Entry, Full, Place, Queues, Waiter};
use crate::model::refusal::Refusal;
use crate::model::rights::User;
use crate::model::task::{TaskId, Token, Write};

/// How long it is the turn of a task that does not claim while others wait behind it: more than a program needs on a busy
/// machine, and less than people notice.
const TURN: Duration = Duration::from_secs(2);
/// While tasks wait, turns are given at least this often, so that lists count whose CPUs come online.
const INTERVAL: Duration = Duration::from_secs(1);

/// The queues, and whether there is anybody in them.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    queues: Mutex<Queues>,
    any: AtomicBool,
}

impl Waiting {
    fn note(&self, queues: &Queues) {
        self.any.store(!queues.is_empty(), Ordering::Release);
    }

    fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }
}

impl<P: Ports> Engine<P> {
    /// Carries out one write to the `queue` file of a pool through the open file `fh`.
    ///
    /// # Errors
    /// The data does not name one living process; the users may not claim for it; or too many tasks wait.
    pub(crate) fn enter_queue(
        &self,
        caller: Caller,
        opener: User,
        pool: PoolId,
        data: &[u8],
        fh: u64,
    ) -> Result<(), Refused> {
        let time = self.allowance(caller, opener);
        self.counted(time, || self.try_enter_queue(caller, opener, time, pool, data, fh))
    }

    fn try_enter_queue(
        &self,
        caller: Caller,
        opener: User,
        time: Allowance,
        pool: PoolId,
        data: &[u8],
        fh: u64,
    ) -> Result<(), Refused> {
        let tokens = match Write::parse(data, false).map_err(|_| Refusal::NotOnePid)? {
            Write::Command(tokens) if tokens.is_empty() => return Ok(()),
            Write::Command(tokens) if matches!(tokens.as_slice(), [Token::Claim(_)]) => tokens,
            _ => return Err(Refusal::NotOnePid.into()),
        };
        let refused = |refusal| Refused { refusal, pid: single_pid(&tokens) };
        let writer = self.process_of(caller).ok_or(Refusal::NoSuchProcess)?;
        let requester = self.requester(caller, opener, writer.id(), time);
        let (named, _) = self.resolve(&writer, &tokens, &requester).map_err(refused)?;
        let found = named.first().ok_or(Refusal::NoSuchProcess)?;
        let program = self.processes.comm(&found.process).unwrap_or_default();
        let waiter = Waiter { fh, pool, task: found.info.task, uid: opener.uid, since: self.clock.wall_ms() };
        {
            // The pool may be removed meanwhile.
            let claims = self.configuration();
            claims.pool(pool).ok_or(Refusal::Removed)?;
            let mut queues = self.waiting.queues.lock();
            queues.add(waiter, program).map_err(|Full| refused(Refusal::QueueFull))?;
            self.waiting.note(&queues);
        }
        // Without its record the task loses its place with the worker.
        self.append_if_possible(&Record::Queued(waiter));
        self.queue_changed(pool);
        Ok(())
    }

    /// Enters the tasks that waited when the worker before ended.
    pub(super) fn recover_queues(&self, waiters: Vec<Waiter>) {
        for waiter in waiters {
            let Some(process) = self.reopen(waiter.task) else { continue };
            let program = self.processes.comm(&process).unwrap_or_default();
            let claims = self.configuration();
            let list = claims.claim(&waiter.task).and_then(|claim| claims.list(claim.list));
            let has_got_one = list.is_some_and(|list| list.pool() == waiter.pool);
            if !has_got_one && claims.pool(waiter.pool).is_some() {
                let _ = self.waiting.queues.lock().add(waiter, program);
            }
        }
        self.waiting.note(&self.waiting.queues.lock());
    }

    /// An open file is closed. Returns whether the journal has a record of its entry.
    pub(crate) fn leave_queue(&self, fh: u64) -> bool {
        if !self.waiting.any() {
            return false;
        }
        let mut queues = self.waiting.queues.lock();
        let pool = queues.remove(fh);
        self.waiting.note(&queues);
        drop(queues);
        pool.inspect(|pool| self.queue_changed(*pool)).is_some()
    }

    /// Ends the places in the queue of a pool that is removed.
    pub(super) fn remove_queue(&self, pool: PoolId) {
        let mut queues = self.waiting.queues.lock();
        let files = queues.remove_pool(pool);
        self.waiting.note(&queues);
        drop(queues);
        files.into_iter().for_each(|fh| self.changes.wake(fh));
    }

    /// Returns whether it is the turn of the task that was entered through an open file; `None` if none was, or if it has
    /// got a list since.
    pub(crate) fn is_turn(&self, fh: u64) -> Option<bool> {
        if !self.waiting.any() {
            return None;
        }
        self.waiting.queues.lock().entry(fh).map(|entry| entry.turn.is_some())
    }

    /// Returns the `queue` file of a pool for a reader of the open file `fh`: a line for each task, in their order.
    pub(crate) fn show_queue(&self, pool: PoolId, fh: u64) -> String {
        let mut text = String::new();
        for (_, Entry { waiter, program, turn }) in self.waiting.queues.lock().of(pool) {
            let state = if turn.is_some() { "turn" } else { "waiting" };
            let own = if waiter.fh == fh { " self" } else { "" };
            let (pid, since) = (waiter.task.pid, clock::rfc3339(waiter.since));
            let _ = writeln!(text, "{pid} {} {since} {state}{own} {program}", waiter.uid);
        }
        text
    }

    /// Takes the tasks of a request out of the queue, because they are getting lists.
    pub(super) fn take_from_queue(&self, pool: PoolId, request: &Request) -> Vec<(Place, Entry)> {
        if !self.waiting.any() {
            return Vec::new();
        }
        let tasks = tasks_of(request);
        self.waiting.queues.lock().take(pool, |task| tasks.contains(&task))
    }

    /// Puts tasks back that got no list.
    pub(super) fn put_back_in_queue(&self, taken: Vec<(Place, Entry)>) {
        if !taken.is_empty() {
            let mut queues = self.waiting.queues.lock();
            queues.put_back(taken);
            self.waiting.note(&queues);
            drop(queues);
            self.wake_queues();
        }
    }

    /// Returns how many tasks wait before those of a request.
    pub(super) fn waiting_before(&self, pool: PoolId, request: &Request) -> usize {
        if !self.waiting.any() {
            return 0;
        }
        let tasks = tasks_of(request);
        self.waiting.queues.lock().before(pool, |task| tasks.contains(&task))
    }

    fn queue_changed(&self, pool: PoolId) {
        self.changes.changed([pool.queue_node()]);
        self.wake_queues();
    }

    /// Lists may have come free, so somebody's turn may have come.
    pub(super) fn wake_queues(&self) {
        if self.waiting.any() {
            self.changes.ring();
        }
    }

    /// Gives turns, and wakes the programs whose turn has begun. Returns after which time that is due again; `None` if
    /// nobody waits. The thread that notifies pollers calls it.
    pub(super) fn give_turns(&self) -> Option<Duration> {
        if !self.waiting.any() {
            return None;
        }
        let offline = self.processes.offline();
        let now = self.clock.since_boot();
        // Deaths have been noticed. A list whose heirs are looked for is not free.
        let claims = self.configuration();
        let mut queues = self.waiting.queues.lock();
        let turn = TURN.as_nanos() as u64;
        let moved = queues.expire(now.saturating_sub(turn));
        let (mut begun, mut changed) = (Vec::new(), Vec::new());
        for pool in queues.pools() {
            let room = claims.room(pool, &offline);
            let woken = loop {
                let woken = queues.give_turns(pool, room, now);
                let is_dead = |fh: &&u64| {
                    queues.entry(**fh).is_none_or(|entry| self.reopen(entry.waiter.task).is_none())
                };
                let dead: Vec<u64> = woken.iter().filter(is_dead).copied().collect();
                begun.extend(&woken);
                if dead.is_empty() {
                    break woken;
                }
                for fh in dead {
                    queues.remove(fh);
                }
            };
            if !woken.is_empty() || moved.iter().any(|waiter| waiter.pool == pool) {
                changed.push(pool.queue_node());
            }
        }
        let oldest = queues.oldest_turn();
        self.waiting.note(&queues);
        drop(queues);
        drop(claims);
        moved.into_iter().for_each(|waiter| self.journal.defer(Record::Queued(waiter)));
        begun.into_iter().for_each(|fh| self.changes.wake(fh));
        self.changes.changed(changed);
        let left = oldest.map(|began| Duration::from_nanos((began + turn).saturating_sub(now)));
        Some(left.map_or(INTERVAL, |left| left.min(INTERVAL)))
    }
}

/// Returns the tasks that a request claims for.
fn tasks_of(request: &Request) -> HashSet<TaskId> {
    request.claim.iter().map(|info| info.task).collect()
}

impl Target {
    /// Returns the pool of the file.
    pub(super) fn pool(self, claims: &crate::model::claims::Claims) -> Option<PoolId> {
        match self {
            Self::Pool(pool) => Some(pool),
            Self::List(list) => claims.list(list).map(|list| list.pool()),
        }
    }
}
