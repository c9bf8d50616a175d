//! A description of the machine, because figures depend on it.
//!
//! Owns reading it from /proc. Does not know what is measured.

use std::fs;

fn field(file: &str, name: &str) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
    line.unwrap_or(" unknown").trim().to_owned()
}

/// Returns one line: processor, CPUs, memory, kernel, filesystem.
pub fn kind() -> String {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let kib: f64 = field("/proc/meminfo", "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0.0);
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release: String = release.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    let virtual_machine = field("/proc/cpuinfo", "flags").split(' ').any(|flag| flag == "hypervisor");
    format!(
        "{}, {cpus} CPUs{}, {:.0} GiB, Linux {}, {} below {}",
        field("/proc/cpuinfo", "model name"),
        if virtual_machine { " of a virtual machine" } else { "" },
        kib / f64::from(1 << 20),
        release.trim_end_matches('.'),
        filesystem(),
        std::env::temp_dir().display(),
    )
}

/// Returns the average number of processes that wanted a CPU in the last minute.
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(f64::NAN)
}

/// Returns the type of the filesystem that holds temporary files.
fn filesystem() -> String {
    let dir = std::env::temp_dir().canonicalize().unwrap_or_default();
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let above = fields.filter(|fields| dir.starts_with(fields[1]));
    above.max_by_key(|fields| fields[1].len()).map_or_else(String::new, |fields| fields[2].to_owned())
}
