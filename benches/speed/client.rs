//! A client: a process that repeats some work and reports how long each repetition took.
//!
//! Owns the operations that are measured, the same for kcm and for the baselines. Does not know what is compared.
//!
//! A client is this program, started with `--client` and a [`Job`]. It reads orders (`times N`, `for MS`) line by
//! line. It answers each with one line: the total time and each sample, in nanoseconds.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use rustix::fs::RawDir;
use serde::{Deserialize, Serialize};

use crate::common::{Sleeper, pin, text};
use crate::stats::Samples;

/// The flag that starts this program as a client.
pub const FLAG: &str = "--client";
/// The placeholder for the client's own PID.
pub const OWN: &str = "{pid}";

/// The work of a client. `before` is not measured. `after` is done after each order: a claim that a client
/// does not release could pass to another client as its heir, and a client on a CPU is an intruder for other daemons.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Job {
    pub before: Vec<Op>,
    pub timed: Vec<Op>,
    pub after: Vec<Op>,
}

/// One operation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Op {
    /// Opens a file as a shell's `>` does, writes, closes.
    Put { file: PathBuf, text: String },
    /// Like `Put`, for a list that other clients want, too. A success is released again and not counted.
    Contend { file: PathBuf },
    /// Writes through a file that stays open.
    PutOpen { file: PathBuf, text: String },
    /// Opens a file, reads to the end, closes.
    Get { file: PathBuf },
    /// The work of programs that share a plain file: lock, read, write a new file, rename it, unlock. Adds or removes
    /// the client's own line.
    Rewrite { dir: PathBuf, enter: bool },
    /// Sets the mask of each thread of a process to CPU 0 or to all CPUs, and reads it back.
    Masks { pid: u32, all: bool },
    /// Reads the state of each thread of a process.
    States { pid: u32 },
    /// Reads the mask of every process of the machine.
    Scan,
    /// Moves the client to a CPU, as a task that has claimed it.
    Pin { cpu: usize },
    /// Starts a process and writes its PID.
    Hold { file: PathBuf },
    /// Kills the process of `Hold` and waits until it has gone.
    Kill,
}

/// The state that operations pass on to later ones.
#[derive(Default)]
struct Hands {
    open: Vec<(PathBuf, File)>,
    held: Option<Sleeper>,
    buffer: Vec<u8>,
}

/// Executes the orders on standard input until it ends.
pub fn run(job: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut job: Job = serde_json::from_str(job)?;
    let own = std::process::id().to_string();
    for op in job.before.iter_mut().chain(&mut job.timed) {
        if let Op::Put { text, .. } | Op::PutOpen { text, .. } = op {
            *text = text.replace(OWN, &own);
        }
    }
    let mut hands = Hands { buffer: vec![0; 256 * 1024], ..Hands::default() };
    println!("ready");
    for line in io::stdin().lock().lines() {
        let line = line?;
        let (order, number) = line.split_once(' ').ok_or("an order")?;
        let number: u64 = number.parse()?;
        let (started, mut samples) = (Instant::now(), Vec::new());
        let deadline = Duration::from_millis(number);
        while if order == "times" { samples.len() < number as usize } else { started.elapsed() < deadline } {
            samples.extend(once(&job, &mut hands)?);
        }
        let mut answer = started.elapsed().as_nanos().to_string();
        samples.iter().for_each(|sample| answer += &format!(" {}", sample.as_nanos()));
        for op in &job.after {
            perform(op, &mut hands)?;
        }
        println!("{answer}");
    }
    Ok(())
}

fn once(job: &Job, hands: &mut Hands) -> Result<Option<Duration>, String> {
    for op in &job.before {
        perform(op, hands).map_err(|error| format!("{op:?}: {error}"))?;
    }
    let started = Instant::now();
    let mut counts = true;
    for op in &job.timed {
        counts &= perform(op, hands).map_err(|error| format!("{op:?}: {error}"))?;
    }
    let took = started.elapsed();
    if !counts {
        for op in &job.timed {
            if let Op::Contend { file } = op {
                put(file, "-0").map_err(|error| error.to_string())?;
            }
        }
    }
    Ok(counts.then_some(took))
}

/// Performs an operation. Returns whether the sample counts.
fn perform(op: &Op, hands: &mut Hands) -> io::Result<bool> {
    match op {
        Op::Put { file, text } => put(file, text)?,
        Op::Contend { file } => match put(file, "0") {
            Ok(()) => return Ok(false),
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {}
            Err(error) => return Err(error),
        },
        Op::PutOpen { file, text } => {
            let at = match hands.open.iter().position(|(path, _)| path == file) {
                Some(at) => at,
                None => {
                    hands.open.push((file.clone(), OpenOptions::new().write(true).open(file)?));
                    hands.open.len() - 1
                }
            };
            hands.open[at].1.write_all(text.as_bytes())?;
        }
        Op::Get { file } => {
            let mut file = File::open(file)?;
            while file.read(&mut hands.buffer)? > 0 {}
        }
        Op::Rewrite { dir, enter } => rewrite(dir, *enter)?,
        Op::Masks { pid, all } => {
            let cpus = if *all { 0..CpuSet::count() } else { 0..1 };
            let mut set = CpuSet::new();
            cpus.into_iter().try_for_each(|cpu| set.set(cpu))?;
            each_number(Path::new(&format!("/proc/{pid}/task")), |tid| {
                sched_setaffinity(tid, &set)?;
                Ok(sched_getaffinity(tid).map(|_| ())?)
            })?;
        }
        Op::States { pid } => {
            let tasks = format!("/proc/{pid}/task");
            each_number(Path::new(&tasks), |tid| {
                File::open(format!("{tasks}/{tid}/stat"))?.read(&mut hands.buffer).map(|_| ())
            })?;
        }
        Op::Scan => each_number(Path::new("/proc"), |pid| {
            // The process may have gone.
            let _ = sched_getaffinity(pid);
            Ok(())
        })?,
        Op::Pin { cpu } => pin(0, &[*cpu]),
        Op::Hold { file } => {
            // `before` has released the previous holder's claim.
            hands.held = Some(Sleeper::new());
            let pid = hands.held.as_ref().map_or(0, Sleeper::pid);
            put(file, &pid.to_string())?;
        }
        Op::Kill => {
            if let Some(held) = hands.held.take() {
                held.end();
            }
        }
    }
    Ok(true)
}

/// Calls `each` with every number that is a name in a directory, as fast as the kernel can list them.
fn each_number(dir: &Path, mut each: impl FnMut(Pid) -> io::Result<()>) -> io::Result<()> {
    let dir = File::open(dir)?;
    let mut buffer = [MaybeUninit::uninit(); 32 * 1024];
    let mut entries = RawDir::new(&dir, &mut buffer);
    while let Some(entry) = entries.next() {
        if let Some(number) = entry?.file_name().to_str().ok().and_then(|name| name.parse().ok()) {
            each(Pid::from_raw(number))?;
        }
    }
    Ok(())
}

fn put(file: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new().write(true).truncate(true).open(file)?.write_all(text.as_bytes())
}

fn rewrite(dir: &Path, enter: bool) -> io::Result<()> {
    let lock = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let (tasks, new) = (dir.join("tasks"), dir.join("tasks.new"));
    let old = fs::read_to_string(&tasks).unwrap_or_default();
    let own = std::process::id().to_string();
    let mut pids: Vec<&str> = old.split(',').filter(|pid| !pid.is_empty() && *pid != own).collect();
    if enter {
        pids.push(&own);
    }
    fs::write(&new, pids.join(","))?;
    fs::rename(new, tasks)
}

/// The benchmark's side of a running client, which ends when dropped.
pub struct Client {
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Client {
    pub fn start(job: &Job) -> Self {
        let job = serde_json::to_string(job).expect("JSON");
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args([FLAG, &job]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("a client");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut client = Self { child, answers };
        assert_eq!(client.answer().trim(), "ready");
        client
    }

    /// Sends an order: `times N` or `for MS`.
    pub fn order(&mut self, order: &str, number: u64) {
        let stdin = self.child.stdin.as_mut().expect("a pipe");
        writeln!(stdin, "{order} {number}").expect("a client that listens");
    }

    /// Returns the number of repetitions per second and the time of each in microseconds.
    pub fn result(&mut self) -> (f64, Samples) {
        let answer = self.answer();
        let mut numbers =
            answer.split_whitespace().map(|number| number.parse::<f64>().expect("a number") / 1e3);
        let elapsed = numbers.next().expect("a time");
        let samples = Samples::new(numbers.collect());
        (samples.len() as f64 / elapsed * 1e6, samples)
    }

    fn answer(&mut self) -> String {
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("text");
        if answer.is_empty() {
            let mut why = Vec::new();
            let _ = self.child.stderr.take().map(|mut stderr| stderr.read_to_end(&mut why));
            panic!("a client has ended: {}", text(&why));
        }
        answer
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}
