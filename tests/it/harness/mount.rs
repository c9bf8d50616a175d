//! A daemon and its mount in a temporary directory: start it, read it, kill it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::own_cgroup::OwnCgroup;
use super::processes::reset_signals;
use super::{
    KCM, Machine, NOBODY, Shell, dir, events, has_died, kcm_for, pids, set_mode, signal, text, until,
};

/// A mount in a temporary directory; unmounted when dropped.
pub struct Mount {
    home: TempDir,
    /// The mount point below it.
    conf: &'static str,
    _cgroup: Arc<OwnCgroup>,
}

impl Mount {
    /// An empty mount.
    pub fn new() -> Self {
        let mount = Self::not_mounted();
        mount.start();
        mount
    }

    /// Only the directories: nothing is mounted yet.
    pub fn not_mounted() -> Self {
        Self::not_mounted_in(&std::env::temp_dir())
    }

    /// The same, below this directory.
    pub fn not_mounted_in(directory: &Path) -> Self {
        reset_signals();
        let home = tempfile::tempdir_in(directory).expect("a temporary directory");
        Self { home, conf: "conf", _cgroup: OwnCgroup::of_this_thread() }
    }

    /// Only the directories, with a mount point that has a parent for kcm only.
    pub fn not_mounted_below_kcm() -> Self {
        let mut mount = Self::not_mounted();
        mount.conf = "kcm/conf";
        mount
    }

    /// `dataplane`, which is exclusive, with the lists 0 and 1: all CPUs of a small machine.
    pub fn with_dataplane() -> Self {
        let mount = Self::new();
        mount.make_pool("dataplane", true, &["0", "1"]);
        mount
    }

    /// `shared`, which is not exclusive, with the lists 0 and 1.
    pub fn with_shared() -> Self {
        let mount = Self::new();
        mount.make_pool("shared", false, &["0", "1"]);
        mount
    }

    pub fn make_pool(&self, pool: &str, exclusive: bool, lists: &[&str]) {
        fs::create_dir(self.pool(pool)).expect("mkdir of a pool");
        fs::write(self.pool(pool).join("exclusive"), if exclusive { "1" } else { "0" }).expect("exclusive");
        for list in lists {
            fs::create_dir(self.pool(pool).join(list)).expect("mkdir of a list");
        }
    }

    /// The directory that holds all files of this test.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    pub fn conf(&self) -> PathBuf {
        self.home.path().join(self.conf)
    }

    pub fn state(&self) -> PathBuf {
        self.home.path().join("state")
    }

    pub fn pool(&self, pool: &str) -> PathBuf {
        self.conf().join("pools").join(pool)
    }

    /// The `tasks` file of a list.
    pub fn tasks(&self, pool: &str, list: &str) -> PathBuf {
        self.pool(pool).join(list).join("tasks")
    }

    pub fn read(&self, file: &str) -> String {
        fs::read_to_string(self.conf().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
    }

    pub fn mount_command(&self) -> Command {
        let mut command = self.kcm(&["mount"]);
        command.arg("--state-dir").arg(self.state());
        command
    }

    /// Starts the daemon.
    pub fn start(&self) {
        let output = self.mount_command().output().expect("kcm mount");
        assert!(output.status.success(), "kcm mount: {}", text(&output.stderr));
    }

    /// Stops it cleanly.
    pub fn stop(&self) {
        let output = self.kcm(&["unmount"]).output().expect("kcm unmount");
        assert!(output.status.success(), "kcm unmount: {}", text(&output.stderr));
    }

    /// `kcm <words> --conf-dir=<conf>`.
    pub fn kcm(&self, words: &[&str]) -> Command {
        kcm_for(&self.conf(), words)
    }

    /// A line for bash, with the mount in `$C`, the state directory in `$S` and kcm in `$KCM`.
    pub fn bash(&self, line: &str) -> Command {
        let mut command = Command::new("bash");
        command.arg("-c").arg(line).env("C", self.conf()).env("S", self.state()).env("KCM", KCM);
        command
    }

    /// The output of a line for bash, which must succeed.
    pub fn sh(&self, line: &str) -> String {
        let output = self.bash(line).output().expect("bash");
        assert!(output.status.success(), "{line}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// The daemon's processes.
    pub fn daemons(&self) -> Vec<u32> {
        let conf = self.conf();
        let conf = conf.as_os_str().as_encoded_bytes();
        let mut found: Vec<u32> = pids()
            .into_iter()
            .filter(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let mut words = line.split(|&b| b == 0).skip(1);
                let is_daemon = matches!(words.next(), Some(b"mount" | b"__daemon"));
                is_daemon && words.any(|word| word.ends_with(conf))
            })
            .collect();
        found.sort_unstable();
        found
    }

    /// The worker: the process that serves requests.
    pub fn worker(&self) -> Option<u32> {
        let is_worker = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|&b| b == 0).nth(2) == Some(b"worker")
        };
        self.daemons().into_iter().find(is_worker)
    }

    /// Stops all processes of the daemon, the supervisor first: it would replace a stopped worker. They continue when the
    /// result is dropped.
    pub fn pause(&self) -> Paused {
        let daemons = self.daemons();
        [self.supervisor()].iter().chain(&daemons).for_each(|&pid| signal(pid, Signal::SIGSTOP));
        Paused(daemons)
    }

    /// The supervisor: the process that holds the mount.
    pub fn supervisor(&self) -> u32 {
        let lock = fs::read_to_string(self.state().join("lock")).expect("the lock of the state directory");
        lock.trim().parse().expect("the supervisor's PID")
    }

    /// Kills all processes of the daemon with SIGKILL and waits until they have died.
    pub fn kill_daemon(&self) {
        let mut killed = Vec::new();
        until("the daemon has ended", || {
            let living = self.daemons();
            living.iter().for_each(|&pid| signal(pid, Signal::SIGKILL));
            killed.extend(&living);
            // A process that is dying has no command line, but still has its descriptors.
            living.is_empty() && killed.iter().all(|&pid| has_died(pid))
        });
    }

    /// A daemon that sees a made-up machine.
    pub fn on_machine(machine: &Machine) -> Self {
        let mount = Self::not_mounted();
        mount.start_on(machine);
        mount
    }

    /// Starts the daemon on a made-up machine.
    pub fn start_on(&self, machine: &Machine) {
        let root = self.home().join("machine");
        let mut command = self.mount_command();
        let output = machine.seen_by(&root, &mut command).output().expect("kcm mount");
        assert!(output.status.success(), "kcm mount: {}", text(&output.stderr));
    }

    /// Lets other users reach the mount; temporary directories are private.
    pub fn let_everybody_in(&self) {
        set_mode(self.home(), 0o755);
    }

    /// As [`Mount::bash`], for `nobody`.
    pub fn bash_as_nobody(&self, line: &str) -> Command {
        use std::os::unix::process::CommandExt as _;
        let mut command = self.bash(line);
        command.uid(NOBODY).gid(NOBODY);
        command
    }

    /// Everything below the mount point, by path relative to it, with its metadata.
    pub fn walk(&self) -> Vec<(String, fs::Metadata)> {
        let mut found = Vec::new();
        let mut todo = vec![String::new()];
        while let Some(path) = todo.pop() {
            let metadata = fs::symlink_metadata(self.conf().join(&path)).expect("stat");
            if metadata.is_dir() {
                let entries = fs::read_dir(self.conf().join(&path)).expect("a directory");
                let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name();
                let names = entries.map(|entry| name(entry).into_string().expect("UTF-8"));
                todo.extend(names.map(|name| if path.is_empty() { name } else { format!("{path}/{name}") }));
            }
            found.push((path, metadata));
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        found
    }

    /// Starts the daemon with this environment variable.
    pub fn start_with(&self, variable: &str, value: &str) {
        let output = self.mount_command().env(variable, value).output().expect("kcm mount");
        assert!(output.status.success(), "kcm mount: {}", text(&output.stderr));
    }

    /// Sends a signal to the current worker; returns its PID.
    pub fn signal_worker(&self, signal: Signal) -> u32 {
        let mut found = None;
        until("there is a worker", || {
            found = self.worker();
            found.is_some()
        });
        let worker = found.expect("a worker");
        super::signal(worker, signal);
        if matches!(signal, Signal::SIGSEGV | Signal::SIGBUS) {
            // Rust's handler catches the first signal and removes itself.
            until("it has crashed", || {
                super::signal(worker, signal);
                has_died(worker)
            });
        }
        worker
    }

    /// Kills the worker and waits until another one serves.
    pub fn replace_worker(&self) {
        let old = self.signal_worker(Signal::SIGKILL);
        until("the next worker serves", || self.worker().is_some_and(|worker| worker != old));
        self.read("info/version");
    }

    /// The daemon's log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.state().join("log")).unwrap_or_default()
    }

    /// `info/events`, each parsed.
    pub fn event_lines(&self) -> Vec<serde_json::Value> {
        let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        self.read("info/events").lines().map(parse).collect()
    }

    /// A shell that is the first process of a PID namespace of its own, with a /proc of its own.
    pub fn container(&self) -> Shell {
        Shell::start(&mut self.bash("exec unshare --pid --fork --mount-proc --kill-child bash"))
    }

    /// The events of `info/events`, each with its PID.
    pub fn events(&self) -> Vec<(String, u32)> {
        events(&self.read("info/events"))
    }

    /// The one line that `kcm mount` fails with; also checks that no daemon is left.
    pub fn mount_failure(&self) -> String {
        let line = dir::failure(self.mount_command().env("KCM_LOG_LEVEL", "ERROR"));
        assert!(self.daemons().is_empty(), "{line}");
        line
    }
}

/// The processes of a daemon that are stopped; they continue when this is dropped.
pub struct Paused(Vec<u32>);

impl Drop for Paused {
    fn drop(&mut self) {
        self.0.iter().for_each(|&pid| signal(pid, Signal::SIGCONT));
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = self.kcm(&["unmount"]).stderr(Stdio::null()).status();
        for pid in self.daemons() {
            signal(pid, Signal::SIGKILL);
        }
        // Cleans up after a failed test.
        let _ = Command::new("umount").arg("-l").arg(self.conf()).stderr(Stdio::null()).status();
    }
}
