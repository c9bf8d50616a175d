//! A `kcm reconcile --interval` that goes on beside whatever a test does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{Sleeper, told_of};

/// A `kcm reconcile --interval` whose output and messages go to files.
pub struct Looking {
    process: Sleeper,
    out: PathBuf,
    err: PathBuf,
}

impl Looking {
    pub fn start(home: &Path, mut command: Command) -> Self {
        let (out, err) = (home.join("reports"), home.join("messages"));
        command
            .stdout(fs::File::create(&out).expect("a file"))
            .stderr(fs::File::create(&err).expect("a file"));
        Self { process: Sleeper::spawn(&mut command), out, err }
    }

    pub fn reports(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.out).expect("reports");
        let reports = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        // The last one may be half written.
        reports.map_while(Result::ok).collect()
    }

    /// Whose claims were taken back, by its reports.
    pub fn told(&self) -> Vec<u64> {
        self.reports().iter().flat_map(|report| told_of(report, "reclaimedCpuLists")).collect()
    }

    /// What it has said to people.
    pub fn messages(&self) -> String {
        fs::read_to_string(&self.err).expect("messages")
    }

    /// Has it end by a signal; gives its reports and messages.
    pub fn end(mut self, signal: Signal) -> (Vec<Value>, String) {
        kill(Pid::from_raw(self.process.pid() as i32), signal).expect("a process");
        let status = self.process.child().wait().expect("a status");
        assert_eq!(status.code(), Some(0), "{signal}: {status}");
        let text = fs::read_to_string(&self.out).expect("reports");
        assert!(text.is_empty() || text.ends_with("}\n"), "it ends with a whole report");
        (self.reports(), self.messages())
    }
}
