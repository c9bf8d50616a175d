//! The legacy client: the system calls of the legacy isolate, reconcile, describe and init, step by step. Like the
//! legacy programs, it is a process with one thread. It waits after each step if the test asks for that.
//!
//! It is this test binary, started with `KCM_LEGACY` set: then [`before_main`] does the work of the client, and no
//! test runs. With `KCM_LEGACY_PAUSES` it prints the name of each step and continues when it reads a line; at the end
//! of its input it continues without pauses.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus, Stdio};

use nix::fcntl::{Flock, FlockArg};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, getpid};
use serde_json::{Value, json};

use crate::harness::Sleeper;

/// The steps of an isolate, in order.
pub const STEPS: [&str; 17] = [
    "pid",
    "locked",
    "read",
    "reread",
    "opened",
    "written",
    "synced",
    "closed",
    "unlocked",
    "pinned",
    "ended",
    "locked again",
    "reread again",
    "opened again",
    "written again",
    "closed again",
    "unlocked again",
];

#[used]
#[allow(
    unsafe_code,
    reason = "a test program's main function belongs to the test harness, which has threads"
)]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = before_main;

extern "C" fn before_main() {
    let Ok(part) = std::env::var("KCM_LEGACY") else { return };
    let result = match part.split_once(' ').unwrap_or((&part, "")) {
        ("isolate", pool) => isolate(pool),
        ("reconcile", _) => reconcile(),
        ("describe", _) => describe(),
        ("init", _) => init(),
        (other, _) => Err(format!("no such command: {other}")),
    };
    if let Err(error) = &result {
        eprintln!("{error}");
    }
    std::process::exit(i32::from(result.is_err()));
}

type Done = Result<(), String>;

/// By pool: whether it is exclusive, and its lists with their tasks.
type Pools = BTreeMap<String, (bool, BTreeMap<String, Vec<u32>>)>;

fn variable(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

fn conf_dir() -> PathBuf {
    variable("KCM_LEGACY_CONF", "/etc/kcm").into()
}

fn proc_fs() -> PathBuf {
    variable("KCM_PROC_FS", "/proc").into()
}

fn tasks_file(pool: &str, list: &str) -> PathBuf {
    conf_dir().join("pools").join(pool).join(list).join("tasks")
}

fn step(name: &str) {
    if std::env::var_os("KCM_LEGACY_PAUSES").is_none() {
        return;
    }
    println!("{name}");
    // Reads one byte at a time, so that input for a child is not consumed. At the end of the input it does not wait.
    let _ = io::stdin().lines().next();
}

fn failed(file: &Path) -> impl Fn(io::Error) -> String {
    move |error| format!("{}: {error}", file.display())
}

fn lock() -> Result<Flock<File>, String> {
    let file = conf_dir().join("lock");
    let opened = OpenOptions::new().read(true).write(true).open(&file).map_err(failed(&file))?;
    Flock::lock(opened, FlockArg::LockExclusive).map_err(|(_, errno)| errno.to_string())
}

fn directories(path: &Path) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(failed(path))? {
        let entry = entry.map_err(failed(path))?;
        if entry.path().is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Only empty parts are skipped.
fn read_tasks(file: &Path) -> Result<Vec<u32>, String> {
    let text = fs::read_to_string(file).map_err(failed(file))?;
    let parts = text.split(',').filter(|part| !part.is_empty());
    parts
        .map(|part| part.trim().parse().map_err(|_| format!("invalid literal for int(): {part:?}")))
        .collect()
}

fn read_pools() -> Result<Pools, String> {
    let mut pools = Pools::new();
    let all = conf_dir().join("pools");
    for pool in directories(&all)? {
        let flag = all.join(&pool).join("exclusive");
        let flag = fs::read(&flag).map_err(failed(&flag))?;
        let mut lists = BTreeMap::new();
        for list in directories(&all.join(&pool))? {
            let tasks = read_tasks(&tasks_file(&pool, &list))?;
            lists.insert(list, tasks);
        }
        pools.insert(pool, (flag.first() == Some(&b'1'), lists));
    }
    Ok(pools)
}

/// O_TRUNC, write the whole list, fsync. `again`: the names of the steps of the second write.
fn write_tasks(file: &Path, tasks: &[u32], again: &str) -> Done {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true).mode(0o644);
    let mut opened = options.open(file).map_err(failed(file))?;
    step(&format!("opened{again}"));
    if !tasks.is_empty() {
        let words: Vec<String> = tasks.iter().map(u32::to_string).collect();
        opened.write_all(words.join(",").as_bytes()).map_err(failed(file))?;
    }
    step(&format!("written{again}"));
    opened.sync_all().map_err(failed(file))?;
    if again.is_empty() {
        step("synced");
    }
    drop(opened);
    step(&format!("closed{again}"));
    Ok(())
}

fn isolate(pool: &str) -> Done {
    let stat = proc_fs().join("self/stat");
    let stat = fs::read_to_string(&stat).map_err(failed(&stat))?;
    let pid: u32 = stat.split(' ').next().and_then(|field| field.parse().ok()).ok_or("no PID")?;
    step("pid");
    let locked = lock()?;
    step("locked");
    let pools = read_pools()?;
    step("read");
    let (exclusive, lists) =
        pools.get(pool).ok_or_else(|| format!("ERROR:root:Requested pool {pool} does not exist"))?;
    let wanted = std::env::var("KCM_LEGACY_LIST").ok();
    let mut lists = lists.iter().filter(|(list, _)| wanted.as_ref().is_none_or(|wanted| wanted == *list));
    let chosen = lists.find(|(_, tasks)| !exclusive || tasks.is_empty());
    let (list, _) = chosen.ok_or_else(|| format!("ERROR:root:No free cpu lists in pool {pool}"))?;
    let file = tasks_file(pool, list);
    let mut tasks = read_tasks(&file)?;
    step("reread");
    tasks.push(pid);
    write_tasks(&file, &tasks, "")?;
    drop(locked);
    step("unlocked");
    let mut cpus = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        for cpu in first.parse::<usize>().unwrap_or(0)..=last.parse().unwrap_or(0) {
            cpus.set(cpu).map_err(|errno| errno.to_string())?;
        }
    }
    sched_setaffinity(getpid(), &cpus).map_err(|errno| errno.to_string())?;
    step("pinned");
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(variable("KCM_LEGACY_COMMAND", "true")).env("KCM_CPUS_ASSIGNED", list);
    command.stdin(Stdio::null()).status().map_err(|error| error.to_string())?;
    step("ended");
    let locked = lock()?;
    step("locked again");
    let mut tasks = read_tasks(&file)?;
    step("reread again");
    tasks.retain(|&task| task != pid);
    write_tasks(&file, &tasks, " again")?;
    drop(locked);
    step("unlocked again");
    Ok(())
}

fn reconcile() -> Done {
    let (mut reclaimed, mut mismatched) = (Vec::new(), Vec::new());
    let locked = lock()?;
    step("locked");
    let pools = read_pools()?;
    step("read");
    let all = || {
        let lists = |pool: &str| pools.get(pool).map(|(_, lists)| lists.clone()).unwrap_or_default();
        pools
            .keys()
            .flat_map(move |pool| lists(pool).into_iter().map(move |(list, tasks)| (pool, list, tasks)))
    };
    for (pool, list, tasks) in all() {
        for pid in tasks.into_iter().filter(|pid| !proc_fs().join(pid.to_string()).exists()) {
            let file = tasks_file(pool, &list);
            let mut left = read_tasks(&file)?;
            left.retain(|&task| task != pid);
            write_tasks(&file, &left, "")?;
            reclaimed.push(json!({ "cpus": list, "pid": pid, "pool": pool }));
        }
    }
    drop(locked);
    step("unlocked");
    for (pool, list, tasks) in all() {
        for pid in tasks {
            let Ok(mask) = sched_getaffinity(Pid::from_raw(pid as i32)) else { continue };
            let actual: Vec<usize> =
                (0..CpuSet::count()).filter(|&cpu| mask.is_set(cpu).unwrap_or(false)).collect();
            let named: Vec<String> = actual.iter().map(usize::to_string).collect();
            if named.join(",") != list {
                mismatched.push(json!({ "actualCpus": actual, "cpus": list, "pid": pid, "pool": pool }));
            }
        }
    }
    print(&json!({ "mismatchedCpuMasks": mismatched, "reclaimedCpuLists": reclaimed }));
    Ok(())
}

fn describe() -> Done {
    let locked = lock()?;
    let pools = read_pools()?;
    drop(locked);
    let pools = pools.into_iter().map(|(name, (exclusive, lists))| {
        let lists =
            lists.into_iter().map(|(list, tasks)| (list.clone(), json!({ "cpus": list, "tasks": tasks })));
        let lists: serde_json::Map<String, Value> = lists.collect();
        (name.clone(), json!({ "cpuLists": lists, "exclusive": exclusive, "name": name }))
    });
    let pools: serde_json::Map<String, Value> = pools.collect();
    print(&json!({ "path": conf_dir().to_string_lossy(), "pools": pools }));
    Ok(())
}

fn init() -> Done {
    let conf = conf_dir();
    fs::create_dir_all(&conf).map_err(failed(&conf))?;
    if fs::read_dir(&conf).map_err(failed(&conf))?.next().is_none() {
        fs::create_dir(conf.join("pools")).map_err(failed(&conf))?;
        fs::write(conf.join("lock"), "").map_err(failed(&conf))?;
        return Ok(());
    }
    eprintln!("INFO:root:Configuration directory already exists.");
    let pools = read_pools()?;
    pools.get("dataplane").map(|_| ()).ok_or_else(|| "KeyError: 'dataplane'".to_owned())
}

fn print(value: &Value) {
    println!("{value:#}");
}

/// A legacy client in `conf`: `isolate <pool>`, `reconcile`, `describe` or `init`.
pub fn legacy_client(conf: &Path, part: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("the path of the test binary"));
    command.env("KCM_LEGACY", part).env("KCM_LEGACY_CONF", conf);
    command
}

/// A legacy client that waits after each step.
pub struct Client {
    process: Sleeper,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Client {
    pub fn start(command: &mut Command) -> Self {
        command
            .env("KCM_LEGACY_PAUSES", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = Sleeper::spawn(command);
        let input = process.child().stdin.take();
        let output = BufReader::new(process.child().stdout.take().expect("a pipe"));
        Self { process, input, output }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Continues until this step is done.
    pub fn at(&mut self, step: &str) {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).expect("text"), 0, "it ended before {step}");
            if line.trim_end() == step {
                return;
            }
            self.go();
        }
    }

    /// Continues from the step at which it waits.
    pub fn go(&mut self) {
        writeln!(self.input.as_mut().expect("a pipe")).expect("a client that reads");
    }

    /// Continues to the end; returns its messages and its status.
    pub fn finish(mut self) -> (String, ExitStatus) {
        drop(self.input.take());
        let mut messages = String::new();
        let mut stderr = self.process.child().stderr.take().expect("a pipe");
        io::Read::read_to_string(&mut stderr, &mut messages).expect("text");
        (messages, self.process.child().wait().expect("a status"))
    }

    /// Kills it.
    pub fn kill(self) {
        self.process.end();
    }
}
