//! One attack beside one filesystem: starts the attacker, measures the victims, and leaves nothing running.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::attackers;
use crate::common::{Cgroup, signal};
use crate::lines::Talker;
use crate::report::Beside;
use crate::victim::{Measured, Victim};

/// How long the attacker may take to start all its processes.
const TO_START: Duration = Duration::from_secs(10);
/// How long it may take to count what it has done.
const TO_COUNT: Duration = Duration::from_secs(1);
/// A process that has not ended this long after SIGKILL waits in the kernel for an answer.
const TO_DIE: Duration = Duration::from_secs(5);

/// The result of an attack beside one filesystem.
#[derive(Clone, Debug)]
pub struct Trial {
    pub claims: Measured,
    pub reads: Measured,
    /// Whether the attacker said that it has begun.
    pub is_ready: bool,
    /// How many operations of the attacker were successful and refused, if it could still say it.
    pub attacker: Option<(u64, u64)>,
    /// How many processes of the attacker did not end when they were killed.
    pub hung: usize,
}

impl Trial {
    /// The faults beyond slow answers.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for (what, victim) in [("claim", &self.claims), ("read", &self.reads)] {
            if let Some(&errno) = victim.errors.first() {
                let count = victim.errors.len();
                faults.push(format!(
                    "{count} x {what} of the victim failed, first: {}",
                    Errno::from_raw(errno)
                ));
            }
        }
        if !self.is_ready {
            faults.push(format!("the attacker did not begin within {TO_START:?}"));
        }
        if self.hung > 0 {
            faults.push(format!("{} processes of the attacker did not end when they were killed", self.hung));
        }
        faults
    }
}

impl Trial {
    /// The first slow answers.
    pub fn slow(&self) -> String {
        let slow = |what: &str, victim: &Measured| format!("{what}: {}", victim.slow.join(", "));
        format!("slow {}; slow {}", slow("claims", &self.claims), slow("reads", &self.reads))
    }
}

impl From<Trial> for Beside {
    fn from(trial: Trial) -> Self {
        Self { claims: trial.claims.samples, reads: trial.reads.samples, attacker: trial.attacker }
    }
}

pub fn run(name: &str, root: &Path) -> Trial {
    let cgroup = Cgroup::new();
    let mut attacker = Talker::start(&[attackers::FLAG, name, root.to_str().expect("UTF-8")]);
    cgroup.add(attacker.pid());
    attacker.say("begin");
    let is_ready = attacker.hear(Instant::now() + TO_START).is_ok_and(|(_, line)| line == "ready");
    let started = Instant::now();
    let victims = ["claim", "read"].map(|kind| Victim::start(kind, root));
    let [claims, reads] = victims.map(|victim| victim.collect(started));
    attacker.say("count");
    let counts = attacker.hear(Instant::now() + TO_COUNT).map_or_else(|_| String::new(), |(_, line)| line);
    let number = |text: &str| text.parse::<u64>().ok();
    let counts = counts.split_once(' ').and_then(|(done, refused)| Some((number(done)?, number(refused)?)));
    attacker.end();
    Trial { claims, reads, is_ready, attacker: counts, hung: kill_all(&cgroup) }
}

/// Kills all processes of a cgroup; returns how many do not end.
fn kill_all(cgroup: &Cgroup) -> usize {
    let deadline = Instant::now() + TO_DIE;
    loop {
        let processes = fs::read_to_string(cgroup.path.join("cgroup.procs")).unwrap_or_default();
        let pids: Vec<u32> = processes.lines().filter_map(|pid| pid.parse().ok()).collect();
        if pids.is_empty() || Instant::now() > deadline {
            return pids.len();
        }
        pids.iter().for_each(|&pid| signal(pid, Signal::SIGKILL));
        std::thread::sleep(Duration::from_millis(5));
    }
}
