//! What all tests need: a real mount in a temporary place, a shell that knows it, and processes to claim for.
//!
//! Owns: set-up and tidying. Must not know: any promise. A test that cannot mount fails.
#![allow(dead_code, reason = "no test file uses all of it")]
#![allow(unreachable_pub, reason = "each test file is a crate of its own")]

pub mod both;
pub mod cgroup;
pub mod cpuset;
pub mod enclosure;
pub mod looking;
pub mod program;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// The program under test.
pub const KCM: &str = env!("CARGO_BIN_EXE_kcm");

/// How long something may take that takes milliseconds: these machines are shared.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A mount in a temporary place; unmounted when dropped.
pub struct Mount {
    home: TempDir,
    _cgroup: Option<Arc<cgroup::Cgroup>>,
}

impl Mount {
    /// An empty mount.
    pub fn new() -> Self {
        let mount = Self::not_mounted();
        mount.start();
        mount
    }

    /// The place alone: nothing is mounted yet.
    pub fn not_mounted() -> Self {
        Self::not_mounted_in(&std::env::temp_dir())
    }

    /// The same, below this directory.
    pub fn not_mounted_in(directory: &Path) -> Self {
        let home = tempfile::tempdir_in(directory).expect("a temporary directory");
        Self { home, _cgroup: cgroup::Cgroup::of_this_thread() }
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

    /// Everything of this test.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    pub fn conf(&self) -> PathBuf {
        self.home.path().join("conf")
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
        let mut command = Command::new(KCM);
        let (name, rest) = words.split_first().expect("a command");
        command.arg(name).arg("--conf-dir").arg(self.conf()).args(rest);
        command
    }

    /// A line for bash, which finds the mount in `$C` and kcm in `$KCM`.
    pub fn bash(&self, line: &str) -> Command {
        let mut command = Command::new("bash");
        command.arg("-c").arg(line).env("C", self.conf()).env("S", self.state()).env("KCM", KCM);
        command
    }

    /// What a line for bash prints. It has to succeed.
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
                words.next() == Some(b"mount") && words.any(|word| word.ends_with(conf))
            })
            .collect();
        found.sort_unstable();
        found
    }

    /// The process that serves.
    pub fn worker(&self) -> Option<u32> {
        let is_worker = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|&b| b == 0).any(|word| word == b"--worker")
        };
        self.daemons().into_iter().find(is_worker)
    }

    /// The process that keeps the mount.
    pub fn keeper(&self) -> u32 {
        let lock = fs::read_to_string(self.state().join("lock")).expect("the lock of the state directory");
        lock.trim().parse().expect("the keeper's PID")
    }

    /// Kills all of the daemon as nothing should be killed, and waits until it has gone.
    pub fn kill_daemon(&self) {
        until("the daemon has gone", || {
            for pid in self.daemons() {
                let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
            }
            self.daemons().is_empty()
        });
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = self.kcm(&["unmount"]).stderr(Stdio::null()).status();
        for pid in self.daemons() {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
        // Whatever a failed test has left.
        let _ = Command::new("umount").arg("-l").arg(self.conf()).stderr(Stdio::null()).status();
    }
}

/// A process that does nothing; killed when dropped.
pub struct Sleeper(Child);

impl Sleeper {
    pub fn new() -> Self {
        Self::spawn(Command::new("sleep").arg("1000"))
    }

    pub fn spawn(command: &mut Command) -> Self {
        Self(command.spawn().expect("a process"))
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    /// Kills it and collects it.
    pub fn end(mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// All processes of the machine.
pub fn pids() -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// `Cpus_allowed_list` of each thread of a process.
pub fn masks(pid: u32) -> Vec<String> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let mask = |tid: fs::DirEntry| {
        let status = fs::read_to_string(tid.path().join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        Some(line.trim().to_owned())
    };
    threads.filter_map(Result::ok).filter_map(mask).collect()
}

/// One write(2) of these bytes through a descriptor opened for writing.
pub fn write(file: &Path, bytes: impl AsRef<[u8]>) -> std::io::Result<()> {
    use std::io::Write as _;
    let written = fs::OpenOptions::new().write(true).open(file)?.write(bytes.as_ref())?;
    assert_eq!(written, bytes.as_ref().len(), "a write is taken wholly or not at all");
    Ok(())
}

/// The errno of a refused operation.
pub fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> nix::errno::Errno {
    nix::errno::Errno::from_raw(result.expect_err("should be refused").raw_os_error().unwrap_or(0))
}

/// Waits for something that has to come true.
pub fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_true() {
        assert!(Instant::now() < deadline, "in vain waited until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Standard output, standard error and status of a command.
pub fn run(command: &mut Command) -> (String, String, Option<i32>) {
    let Output { stdout, stderr, status } = command.output().expect("a command");
    (text(&stdout), text(&stderr), status.code())
}

// Other users, other machines, and processes that are asked.

/// The user id of `nobody`, and its group.
pub const NOBODY: u32 = 65534;

impl Mount {
    /// A daemon that takes a made-up machine for this one; `isolcpus`: the kernel's command line.
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

    /// Temporary directories are for their owner alone; now everybody gets to the mount.
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

    /// Everything below the mount point, by path from there, with what stat(2) says.
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
}

/// A machine of this many sockets, cores a socket and threads a core, numbered as on most: first each core's
/// first thread, socket by socket. Each socket is a NUMA node.
pub struct Machine {
    pub sockets: u32,
    pub cores: u32,
    pub threads: u32,
    /// Offline CPUs.
    pub offline: Vec<u32>,
    /// The kernel's command line.
    pub cmdline: &'static str,
}

impl Machine {
    pub fn new(sockets: u32, cores: u32, threads: u32) -> Self {
        Self { sockets, cores, threads, offline: Vec::new(), cmdline: "" }
    }

    /// The tree that `lscpu --sysroot` reads, and `/proc/cmdline` beside it.
    pub fn write(&self, root: &Path) {
        let cores = self.sockets * self.cores;
        let count = cores * self.threads;
        let socket = |cpu: u32| cpu % cores / self.cores;
        let file = |path: String, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(path, format!("{text}\n")).expect("a file");
        };
        let system = "sys/devices/system";
        let online = (0..count).filter(|cpu| !self.offline.contains(cpu)).map(|cpu| cpu.to_string());
        file(format!("{system}/cpu/online"), &online.collect::<Vec<_>>().join(","));
        for name in ["possible", "present"] {
            file(format!("{system}/cpu/{name}"), &format!("0-{}", count - 1));
        }
        for cpu in 0..count {
            let topology = format!("{system}/cpu/cpu{cpu}/topology");
            file(format!("{topology}/core_id"), &(cpu % cores % self.cores).to_string());
            file(format!("{topology}/physical_package_id"), &socket(cpu).to_string());
            let siblings = mask(count, |other| other % cores == cpu % cores);
            file(format!("{topology}/thread_siblings"), &siblings);
            file(format!("{topology}/core_siblings"), &mask(count, |other| socket(other) == socket(cpu)));
            // The same as lists, for whoever has no lscpu.
            let list = |is_in: &dyn Fn(u32) -> bool| {
                let cpus = (0..count).filter(|&other| is_in(other)).map(|cpu| cpu.to_string());
                cpus.collect::<Vec<_>>().join(",")
            };
            file(format!("{topology}/thread_siblings_list"), &list(&|other| other % cores == cpu % cores));
            file(format!("{topology}/core_siblings_list"), &list(&|other| socket(other) == socket(cpu)));
        }
        for node in 0..self.sockets {
            file(format!("{system}/node/node{node}/cpumap"), &mask(count, |cpu| socket(cpu) == node));
        }
        // lscpu wants to know the model of one CPU.
        file("proc/cpuinfo".into(), "processor\t: 0\nmodel name\t: made up");
        file("proc/cmdline".into(), self.cmdline);
    }
}

/// A set of `count` CPUs in hexadecimal words, as the kernel shows masks.
fn mask(count: u32, is_in: impl Fn(u32) -> bool) -> String {
    let bits = |word: u32| (0..32).filter(move |bit| word * 32 + bit < count);
    let word =
        |word: u32| bits(word).filter(|bit| is_in(word * 32 + bit)).fold(0_u32, |mask, bit| mask | 1 << bit);
    let words = (0..count.div_ceil(32)).rev().map(|n| format!("{:08x}", word(n)));
    words.collect::<Vec<_>>().join(",")
}

/// A shell that stays and can be asked again and again; killed when dropped.
pub struct Shell {
    process: Sleeper,
    input: std::process::ChildStdin,
    output: std::io::BufReader<std::process::ChildStdout>,
}

impl Shell {
    /// `command` starts a shell that reads its lines from standard input, such as `mount.bash("exec bash")`.
    pub fn start(command: &mut Command) -> Self {
        let mut process = Sleeper::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let input = process.child().stdin.take().expect("a pipe");
        let output = std::io::BufReader::new(process.child().stdout.take().expect("a pipe"));
        Self { process, input, output }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What the line prints on standard output.
    pub fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.hear()
    }

    /// Has the line carried out; [`Shell::hear`] tells what came of it.
    pub fn tell(&mut self, line: &str) {
        use std::io::Write as _;
        writeln!(self.input, "{line}\necho; echo ---").expect("a shell that listens");
    }

    pub fn hear(&mut self) -> String {
        use std::io::BufRead as _;
        let mut said = String::new();
        while !said.ends_with("\n---\n") {
            assert_ne!(self.output.read_line(&mut said).expect("text"), 0, "the shell has gone: {said}");
        }
        // The empty line ends a last line without its newline.
        said.truncate(said.len() - "\n---\n".len());
        said
    }
}

/// Runs `work` with the rights of `nobody` over files, in a thread of this process.
pub fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
    let as_nobody = || {
        setfsgid(Gid::from_raw(NOBODY));
        setfsuid(Uid::from_raw(NOBODY));
        work()
    };
    std::thread::scope(|scope| scope.spawn(as_nobody).join()).expect("the work")
}

/// A process of `nobody`.
pub fn sleeper_of_nobody() -> Sleeper {
    use std::os::unix::process::CommandExt as _;
    Sleeper::spawn(Command::new("sleep").arg("1000").uid(NOBODY).gid(NOBODY))
}

pub fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

// Killing the daemon and looking into it.

impl Mount {
    /// Starts the daemon with this in its environment.
    pub fn start_with(&self, variable: &str, value: &str) {
        let output = self.mount_command().env(variable, value).output().expect("kcm mount");
        assert!(output.status.success(), "kcm mount: {}", text(&output.stderr));
    }

    /// Sends a signal to the present worker; gives its PID.
    pub fn signal_worker(&self, signal: Signal) -> u32 {
        let mut found = None;
        until("there is a worker", || {
            found = self.worker();
            found.is_some()
        });
        let worker = found.expect("a worker");
        let _ = kill(Pid::from_raw(worker as i32), signal);
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
}

/// Sends a signal to a process that may have gone.
pub fn signal(pid: u32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid as i32), signal);
}

/// The number behind `key:` in a file of /proc.
pub fn proc_number(file: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// How often the threads of a process have gone to sleep.
pub fn sleeps(pid: u32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("a process").filter_map(Result::ok);
    let sleeps = |thread: fs::DirEntry| {
        proc_number(&thread.path().join("status").to_string_lossy(), "voluntary_ctxt_switches")
    };
    threads.filter_map(sleeps).sum()
}

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

// Plain directories, programs of several threads, and outputs compared to committed ones.

/// A configuration directory in the layout of 2017, which no daemon serves.
pub struct Plain {
    home: TempDir,
}

impl Plain {
    /// Without pools.
    pub fn new() -> Self {
        let home = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir_all(home.path().join("conf/pools")).expect("mkdir");
        fs::write(home.path().join("conf/lock"), "").expect("a lock");
        Self { home }
    }

    /// `lists`: names and what stands in `tasks`.
    pub fn make_pool(&self, pool: &str, exclusive: bool, lists: &[(&str, &str)]) {
        let pool = self.conf().join("pools").join(pool);
        fs::create_dir(&pool).expect("mkdir of a pool");
        fs::write(pool.join("exclusive"), if exclusive { "1" } else { "0" }).expect("exclusive");
        for (list, tasks) in lists {
            fs::create_dir(pool.join(list)).expect("mkdir of a list");
            fs::write(pool.join(list).join("tasks"), tasks).expect("tasks");
        }
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }

    pub fn conf(&self) -> PathBuf {
        self.home.path().join("conf")
    }

    pub fn tasks(&self, pool: &str, list: &str) -> PathBuf {
        self.conf().join("pools").join(pool).join(list).join("tasks")
    }

    /// `kcm <words> --conf-dir=<conf>`.
    pub fn kcm(&self, words: &[&str]) -> Command {
        kcm_for(&self.conf(), words)
    }
}

/// `kcm <words> --conf-dir=<conf>`.
pub fn kcm_for(conf: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(KCM);
    let (name, rest) = words.split_first().expect("a command");
    command.arg(name).arg("--conf-dir").arg(conf).args(rest);
    command
}

/// This test program, started again to do the part of `test` in which the environment variable is set.
pub fn again(test: &str, variable: &str, value: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("our own path"));
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(variable, value);
    command
}

/// Sets the mask of one thread.
pub fn pin(tid: u32, cpus: &[usize]) {
    let mut set = nix::sched::CpuSet::new();
    cpus.iter().for_each(|&cpu| set.set(cpu).expect("a CPU"));
    nix::sched::sched_setaffinity(Pid::from_raw(tid as i32), &set).expect("sched_setaffinity");
}

/// The threads of a process, ascending.
pub fn threads(pid: u32) -> Vec<u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().filter_map(Result::ok);
    let mut tids: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    tids.sort_unstable();
    tids
}

/// What stands in a file of `tests/data`, with each `{name}` replaced.
pub fn data(file: &str, names: &[(&str, &str)]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    names.iter().fold(text, |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
}

/// Ends with success and says nothing but this.
pub fn says(command: &mut Command, expected: &str) {
    let (out, err, code) = run(command);
    assert_eq!((out.as_str(), err.as_str(), code), (expected, "", Some(0)), "{command:?}");
}

/// Fails with one line, which begins and ends like this, and says nothing on standard output.
pub fn fails(command: &mut Command, begin: &str, end: &str) {
    let (out, err, code) = run(command);
    assert_eq!((out.as_str(), code), ("", Some(1)), "{command:?}: {err}");
    let line = err.strip_suffix('\n').expect("a line");
    assert!(!line.contains('\n'), "{command:?}: {err}");
    let text = line.strip_prefix("ERROR:root:").unwrap_or_else(|| panic!("{command:?}: {err}"));
    assert!(text.starts_with(begin) && text.ends_with(end), "{command:?}: {text}");
}

// Containers, and what the kernel knows of a process.

impl Mount {
    /// A shell that is the first process of a PID namespace of its own, with a /proc of its own.
    pub fn container(&self) -> Shell {
        Shell::start(&mut self.bash("exec unshare --pid --fork --mount-proc --kill-child bash"))
    }
}

impl Mount {
    /// What happened to whom, by `info/events`.
    pub fn events(&self) -> Vec<(String, u32)> {
        events(&self.read("info/events"))
    }
}

/// What happened to whom, by the text of `info/events`.
pub fn events(text: &str) -> Vec<(String, u32)> {
    let event = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let pid = line["pid"].as_u64().unwrap_or(0) as u32;
        (line["event"].as_str().expect("an event").to_owned(), pid)
    };
    text.lines().map(event).collect()
}

/// The mask of a process that was never claimed.
pub fn free() -> String {
    masks(std::process::id())[0].clone()
}

/// The PIDs in a `tasks` file.
pub fn held(file: &Path) -> Vec<u32> {
    let text = fs::read_to_string(file).expect("tasks");
    assert!(text.is_empty() || text.ends_with('\n'), "{text:?}");
    text.trim_end().split_terminator(',').map(|pid| pid.parse().expect("a PID")).collect()
}

/// A process that is not our child; killed when dropped.
pub struct Stray(pub u32);

impl Stray {
    /// Kills it, and waits until it has died.
    pub fn end(self) {
        signal(self.0, Signal::SIGKILL);
        until("it has died", || has_died(self.0));
    }
}

impl Drop for Stray {
    fn drop(&mut self) {
        signal(self.0, Signal::SIGKILL);
    }
}

/// The children of a process that has one thread.
pub fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|pid| pid.parse().expect("a PID")).collect()
}

/// A field of `/proc/PID/stat`, counted as in proc(5); from the third on.
pub fn stat(pid: u32, field: usize) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
    let behind_the_name = text.rsplit_once(')').expect("a name").1;
    behind_the_name.split_whitespace().nth(field - 3).expect("a field").to_owned()
}

/// Whether nothing of a process runs any more, collected or not.
pub fn has_died(pid: u32) -> bool {
    let Ok(text) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    let state = text.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    // Of one whose first thread alone has exited, others are left.
    let others = || fs::read_dir(format!("/proc/{pid}/task")).map_or(0, |threads| threads.count()) > 1;
    matches!(state, Some('Z' | 'X')) && !others()
}

/// Waits until what happens next happens later than the start of the process also by the kernel's count, which is
/// in clock ticks.
pub fn let_a_tick_pass(pid: u32) {
    use nix::time::{ClockId, clock_gettime};
    use nix::unistd::{SysconfVar, sysconf};
    let tick = 1_000_000_000 / sysconf(SysconfVar::CLK_TCK).expect("CLK_TCK").expect("CLK_TCK");
    let started: i64 = stat(pid, 22).parse().expect("ticks");
    until("a tick has passed", || {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("a clock");
        (now.tv_sec() * 1_000_000_000 + now.tv_nsec()) / tick > started
    });
}

impl Mount {
    /// The one line that `kcm mount` fails with; nothing is mounted then.
    pub fn mount_failure(&self) -> String {
        let line = both::failure(self.mount_command().env("KCM_LOG_LEVEL", "ERROR"));
        assert!(self.daemons().is_empty(), "{line}");
        line
    }
}

// Claims that are taken back, and reports of it.

/// A process that was killed while it was on the list.
pub fn killed_on(tasks: &Path) -> u32 {
    let task = Sleeper::new();
    let pid = task.pid();
    write(tasks, pid.to_string()).expect("a claim");
    task.end();
    pid
}

/// The JSON that a command prints, which says nothing else.
pub fn report(command: &mut Command) -> serde_json::Value {
    let (out, err, code) = run(command);
    assert_eq!((err.as_str(), code), ("", Some(0)), "{command:?}: {out}");
    serde_json::from_str(&out).expect("JSON")
}

/// The PIDs of one part of a report of reconcile.
pub fn told_of(report: &serde_json::Value, part: &str) -> Vec<u64> {
    report[part]
        .as_array()
        .expect("a list")
        .iter()
        .map(|entry| entry["pid"].as_u64().expect("a PID"))
        .collect()
}
