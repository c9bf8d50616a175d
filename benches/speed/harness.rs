//! The harness in which contenders are measured in turn, round by round, in one run.
//!
//! Owns warm-up, rounds and their order, and how two contenders become a row. Does not know what they do.

use crate::client::{Client, Job, Op};
use crate::common::{pin, threads};
use crate::stats::{Rounds, Samples};
use crate::table::{Row, Target};

/// The number of rounds, and of repetitions per round.
#[derive(Clone, Copy)]
pub struct Effort {
    pub rounds: usize,
    pub times: u64,
}

/// For most rows.
pub const USUAL: Effort = Effort { rounds: 15, times: 200 };
/// For work that takes milliseconds.
pub const FEW: Effort = Effort { rounds: 7, times: 12 };

/// Measures the jobs, each with its own client.
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

/// Pins servers to CPU 0. If one client is measured, it is pinned there, too, so that neither waits for another CPU
/// to wake up. That takes longer than the work, and it would be chance which contender has to wait.
pub fn together(servers: impl IntoIterator<Item = u32>) {
    servers.into_iter().for_each(|server| pin_server(server, 0));
}

/// Pins a server to this CPU.
pub fn pin_server(server: u32, cpu: usize) {
    threads(server).into_iter().for_each(|tid| pin(tid, &[cpu]));
}

/// Returns the job for a client on CPU 0.
pub fn pinned(job: Job) -> Job {
    pinned_to(0, job)
}

/// Returns the job for a client on this CPU.
pub fn pinned_to(cpu: usize, mut job: Job) -> Job {
    job.before.insert(0, Op::Pin { cpu });
    job
}

/// Measures every contender in every round. Each round starts with another contender.
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

/// Makes a row about durations in microseconds. The caller sets the other fields.
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
