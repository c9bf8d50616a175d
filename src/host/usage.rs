//! The CPU time that CPUs and threads have used.
//!
//! Owns the format of `/proc/stat` (proc(5)). Does not know pools, or how times become shares.
//!
//! `/proc/schedstat` counts the time of a thread on its CPU only when it stops running, so that a program that never sleeps
//! would not be seen. `/proc/stat` counts at each clock tick.

use std::collections::BTreeMap;
use std::fs;

use nix::unistd::{SysconfVar, sysconf};

use super::Host;

/// The length of a clock tick if the system does not tell it.
const USUAL_TICK: u64 = 10_000_000;

impl Host {
    /// Returns how long each online CPU has been busy since boot, in nanoseconds, by the number of the CPU. Interrupts
    /// count; time that the CPU waited, or that a hypervisor took, does not. Empty if that cannot be read.
    pub(crate) fn busy(&self) -> BTreeMap<u32, u64> {
        let text = fs::read_to_string(self.proc.join("stat")).unwrap_or_default();
        text.lines().filter_map(busy_ticks).map(|(cpu, ticks)| (cpu, ticks.saturating_mul(tick()))).collect()
    }

    /// Returns the PIDs of all processes, threads of the kernel included, ascending.
    pub(crate) fn all_processes(&self) -> Vec<u32> {
        let mut pids = Vec::new();
        if let Some(processes) = &self.processes {
            let _ = processes.each_pid(|pid| pids.push(pid));
        }
        pids.sort_unstable();
        pids
    }

    /// Returns the threads of a process; empty if it has gone.
    pub(crate) fn threads(&self, pid: u32) -> Vec<u32> {
        self.processes.as_ref().and_then(|processes| processes.threads(pid).ok()).unwrap_or_default()
    }

    /// Returns the CPU time that a thread has used, in nanoseconds; `None` if it has gone.
    pub(crate) fn used(&self, pid: u32, tid: u32) -> Option<u64> {
        let processes = self.processes.as_ref()?;
        if let Some(nanoseconds) = processes.thread_nanoseconds(pid, tid).ok().flatten() {
            return Some(nanoseconds);
        }
        // A kernel without schedstat counts in ticks.
        let stat = processes.thread_stat(pid, tid).ok().flatten()?;
        Some(stat.used.saturating_mul(tick()))
    }

    /// Returns the CPU on which a thread runs or ran last; `None` if it has gone.
    pub(crate) fn last_cpu(&self, pid: u32, tid: u32) -> Option<u32> {
        Some(self.processes.as_ref()?.thread_stat(pid, tid).ok().flatten()?.cpu)
    }
}

/// The length of a clock tick in nanoseconds.
fn tick() -> u64 {
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().and_then(|ticks| u64::try_from(ticks).ok());
    per_second.and_then(|ticks| 1_000_000_000_u64.checked_div(ticks)).unwrap_or(USUAL_TICK)
}

/// Parses a line `cpu<n> <user> <nice> <system> <idle> <iowait> <irq> <softirq> ...`; `None` for other lines.
fn busy_ticks(line: &str) -> Option<(u32, u64)> {
    let mut words = line.strip_prefix("cpu")?.split_ascii_whitespace();
    let cpu = words.next().filter(|_| !line.starts_with("cpu "))?.parse().ok()?;
    let times: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
    let busy = [0, 1, 2, 5, 6].iter().filter_map(|&field: &usize| times.get(field));
    Some((cpu, busy.sum()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_and_stolen_time_is_not_busy() {
        assert_eq!(busy_ticks("cpu3 1 10 100 9 9 1000 10000 9 9 9"), Some((3, 11_111)));
        assert_eq!(busy_ticks("cpu 1 10 100 9 9 1000 10000 9 9 9"), None);
        for line in ["intr 5", "cpux 1", "cpu"] {
            assert_eq!(busy_ticks(line), None, "{line}");
        }
    }

    #[test]
    fn a_thread_that_works_uses_time_on_a_cpu() {
        let host = Host::at("/proc".into(), None);
        let pid = std::process::id();
        let tid = nix::unistd::gettid().as_raw().unsigned_abs();
        assert!(host.threads(pid).contains(&tid) && host.all_processes().contains(&pid));
        let before = host.used(pid, tid).unwrap();
        while host.used(pid, tid).unwrap() == before {}
        assert!(host.busy().contains_key(&host.last_cpu(pid, tid).unwrap()));
        assert_eq!((host.used(u32::MAX, u32::MAX), host.last_cpu(u32::MAX, u32::MAX)), (None, None));
    }
}
