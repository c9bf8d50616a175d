//! A `kcm reconcile --interval` that runs during a test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{Sleeper, pids_in};

/// A running `kcm reconcile --interval`; its output and messages go to files.
pub struct ReconcileLoop {
    process: Sleeper,
    out: PathBuf,
    err: PathBuf,
}

impl ReconcileLoop {
    pub fn start(home: &Path, mut command: Command) -> Self {
        let (out, err) = (home.join("reports"), home.join("messages"));
        command
            .stdout(fs::File::create(&out).expect("a file"))
            .stderr(fs::File::create(&err).expect("a file"));
        Self { process: Sleeper::spawn(&mut command), out, err }
    }

    /// The lines that it has printed.
    pub fn lines(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.out).expect("reports");
        // The last line may be incomplete.
        text.lines().map_while(|line| serde_json::from_str(line).ok()).collect()
    }

    pub fn reports(&self) -> Vec<Value> {
        self.lines().into_iter().map(|mut line| line["report"].take()).collect()
    }

    /// The PIDs whose claims were reclaimed, according to its reports.
    pub fn reclaimed(&self) -> Vec<u64> {
        self.reports().iter().flat_map(|report| pids_in(report, "reclaimedCpuLists")).collect()
    }

    /// Its messages on standard error.
    pub fn messages(&self) -> String {
        fs::read_to_string(&self.err).expect("messages")
    }

    /// Ends it by a signal; returns its reports and messages.
    pub fn end(mut self, signal: Signal) -> (Vec<Value>, String) {
        kill(Pid::from_raw(self.process.pid() as i32), signal).expect("a process");
        let status = self.process.child().wait().expect("a status");
        assert_eq!(status.code(), Some(0), "{signal}: {status}");
        let text = fs::read_to_string(&self.out).expect("reports");
        assert!(text.is_empty() || text.ends_with("}\n"), "its output ends with a complete report");
        (self.reports(), self.messages())
    }
}
