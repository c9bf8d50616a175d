//! Cgroups of version 1.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::signal;

/// A cgroup of version 1 that is removed when dropped.
pub struct Cgroup(pub PathBuf);

impl Cgroup {
    pub fn new(controller: &str) -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("kcm-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = Path::new(controller).join(name);
        fs::create_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self(path)
    }

    pub fn add(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).expect("cgroup.procs");
    }

    pub fn write(&self, file: &str, text: &str) {
        fs::write(self.0.join(file), text).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Whoever has just been killed is in it for a moment.
        for _ in 0..1000 {
            let procs = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
            procs.lines().filter_map(|pid| pid.parse().ok()).for_each(|pid| signal(pid, Signal::SIGKILL));
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
