//! Many idle processes, and one process of many threads.
//!
//! Owns how thousands of them are started fast and all end when dropped. Does not know what is measured.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The flag that starts this program as a process of many threads.
pub const FLAG: &str = "--threads";
/// The length of a command, in bytes; kcm accepts 64 KiB.
const MAX_COMMAND: usize = 60_000;

/// Processes that wait.
pub struct ProcessGroup {
    child: Child,
    pids: Vec<u32>,
}

impl ProcessGroup {
    /// Starts copies of a small shell, which share its memory and wait for the end of a pipe.
    pub fn of_processes(count: usize) -> Self {
        let script = "exec 3<&0; i=0
            while [ $i -lt $0 ]; do read x <&3 & echo $!; i=$((i+1)); done
            echo ready; read x; wait";
        let mut command = Command::new("dash");
        command.args(["-c", script, &count.to_string()]);
        let group = Self::start(&mut command);
        assert_eq!(group.pids.len(), count);
        group
    }

    /// Starts one process, with the only PID.
    pub fn of_threads(count: usize) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args([FLAG, &count.to_string()]);
        Self::start(&mut command)
    }

    fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a process");
        let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines().map_while(Result::ok);
        let pids = lines.take_while(|line| line != "ready").filter_map(|line| line.parse().ok()).collect();
        Self { child, pids }
    }

    pub fn pid(&self) -> u32 {
        self.pids[0]
    }

    /// Claims a CPU list for the first `count` processes in as few writes as possible.
    pub fn claim(&self, file: &Path, count: usize) {
        let mut command = String::new();
        for pid in &self.pids[..count] {
            let _ = write!(command, "{pid} ");
            if command.len() > MAX_COMMAND {
                send(file, &std::mem::take(&mut command));
            }
        }
        send(file, &command);
    }
}

fn send(file: &Path, command: &str) {
    let mut tasks = OpenOptions::new().write(true).open(file).expect("a tasks file");
    tasks.write_all(command.as_bytes()).expect("claims for the group");
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Turns this process into one of `count` threads, until its standard input ends.
pub fn threads(count: &str) -> Result<(), Box<dyn std::error::Error>> {
    let count: usize = count.parse()?;
    for _ in 1..count {
        std::thread::Builder::new().stack_size(16 * 1024).spawn(|| {
            loop {
                std::thread::park();
            }
        })?;
    }
    println!("{}\nready", std::process::id());
    let _ = std::io::stdin().lines().count();
    std::process::exit(0)
}
