//! The clocks: time since boot, which is never set back, for decisions; wall time for people; CPU time for work.
//!
//! Owns their units. Does not know what a time is used for.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

/// Returns the nanoseconds since boot (`CLOCK_BOOTTIME`).
pub(crate) fn since_boot() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |now| {
        (now.tv_sec() as u64).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec() as u64)
    })
}

/// Returns the CPU time of this thread in nanoseconds.
pub(crate) fn of_this_thread() -> u64 {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(0, |now| {
        (now.tv_sec() as u64).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec() as u64)
    })
}

/// Returns the length in nanoseconds of a clock tick, the unit of start times in `/proc/PID/stat`.
pub(crate) fn tick() -> u64 {
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    1_000_000_000 / per_second.max(1) as u64
}

/// Returns the wall time in milliseconds since 1970.
pub(crate) fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Formats a wall time in milliseconds as RFC 3339 in UTC: `2026-11-24T10:15:02.250Z`.
pub(crate) fn rfc3339(wall_ms: u64) -> String {
    let time = UNIX_EPOCH + std::time::Duration::from_millis(wall_ms);
    humantime::format_rfc3339_millis(time).to_string()
}

/// Returns the kernel's id of this boot.
pub(crate) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}
