//! The bed on which contenders are measured: one after the other, round by round, in one run.
//!
//! Owns: warm-up, rounds and their order, and how two contenders become a row.

use crate::client::{Client, Job, Op};
use crate::common::{pin, threads};
use crate::stats::{Rounds, Samples};
use crate::table::{Row, Target};

/// How long and how often is measured.
#[derive(Clone, Copy)]
pub struct Effort {
    pub rounds: usize,
    pub times: u64,
}

/// Most rows.
pub const USUAL: Effort = Effort { rounds: 15, times: 200 };
/// Work of milliseconds.
pub const FEW: Effort = Effort { rounds: 7, times: 12 };

/// Measures the jobs, each with a client of its own.
pub fn race(jobs: &[Job], effort: Effort) -> Vec<Rounds> {
    let mut clients: Vec<Client> = jobs.iter().map(Client::start).collect();
    for client in &mut clients {
        client.order("times", effort.times / 4 + 2);
        client.result();
    }
    interleave(clients.len(), effort.rounds, |n| {
        clients[n].order("times", effort.times);
        clients[n].result().1
    })
}

/// Puts servers on CPU 0. Where one client asks, both are there, so that neither has to wait until another CPU has
/// woken up: that takes longer than the work, and chance would decide whom it meets.
pub fn together(servers: impl IntoIterator<Item = u32>) {
    for server in servers {
        threads(server).into_iter().for_each(|tid| pin(tid, &[0]));
    }
}

/// The same job by a client that is on CPU 0.
pub fn pinned(job: Job) -> Job {
    pinned_to(0, job)
}

/// The same job by a client that is on this CPU.
pub fn pinned_to(cpu: usize, mut job: Job) -> Job {
    job.before.insert(0, Op::Pin { cpu });
    job
}

/// Has every contender measured in every round; another one begins each time.
pub fn interleave(
    contenders: usize,
    rounds: usize,
    mut measure: impl FnMut(usize) -> Samples,
) -> Vec<Rounds> {
    let mut all = vec![Rounds::default(); contenders];
    for round in 0..rounds {
        for n in 0..contenders {
            let contender = (round + n) % contenders;
            all[contender].push(measure(contender));
        }
    }
    all
}

/// A row about the time that something takes, in microseconds. The rest is for the caller to say.
pub fn row(name: &str, work: &str, kcm: &Rounds, beside: &str, theirs: &Rounds, target: Target) -> Row {
    let (ours, other) = (kcm.all(), theirs.all());
    Row {
        name: name.into(),
        work: work.into(),
        kcm: ours.median(),
        kcm_p99: Some(ours.p99()),
        beside: beside.into(),
        theirs: other.median(),
        theirs_p99: Some(other.p99()),
        unit: "µs",
        ratio: kcm.ratio(theirs, Samples::median),
        target,
        note: String::new(),
    }
}
