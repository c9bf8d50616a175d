//! A program that reads a list and writes it back as legacy programs do. It does each step on request, so other
//! changes can happen in between.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use crate::harness::program::{self, Program};

/// A running rewriter.
pub(crate) struct Client {
    pub(crate) program: Program,
    /// Its PID as its /proc shows it.
    pub(crate) pid: u32,
}

impl Client {
    pub(crate) fn new() -> Self {
        Self::start(&[])
    }

    pub(crate) fn start(by: &[&str]) -> Self {
        Self::from(&mut program::command(by, "client"))
    }

    pub(crate) fn from(command: &mut std::process::Command) -> Self {
        let mut program = Program::start(command);
        let pid = program.hear().parse().unwrap();
        Self { program, pid }
    }

    /// Reads the list and remembers it.
    pub(crate) fn read(&mut self, file: &Path) -> Vec<u32> {
        let output = self.ask("read", file);
        output.split_terminator(',').map(|pid| pid.parse().unwrap()).collect()
    }

    /// Writes the remembered list back, with its own PID added.
    pub(crate) fn join(&mut self, file: &Path) -> io::Result<()> {
        self.write("join", file)
    }

    /// Writes the remembered list back, with its own PID removed.
    pub(crate) fn leave(&mut self, file: &Path) -> io::Result<()> {
        self.write("leave", file)
    }

    fn write(&mut self, verb: &str, file: &Path) -> io::Result<()> {
        match self.ask(verb, file).parse().unwrap() {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    fn ask(&mut self, verb: &str, file: &Path) -> String {
        self.program.say(&format!("{verb} {}", file.display()));
        self.program.hear()
    }
}

/// The program: its own PID is the first field of `$KCM_PROC_FS/self/stat`.
pub fn client() {
    let proc = std::env::var("KCM_PROC_FS").unwrap_or("/proc".into());
    let stat = fs::read_to_string(format!("{proc}/self/stat")).unwrap();
    let own = stat.split(' ').next().unwrap().to_owned();
    program::ready();
    println!("{own}");
    let mut list: Vec<String> = Vec::new();
    loop {
        let line = program::heard();
        let (verb, file) = line.split_once(' ').unwrap();
        match verb {
            "read" => {
                let text = fs::read_to_string(file).unwrap();
                list = text.split(',').filter(|part| !part.is_empty()).map(|pid| pid.trim().into()).collect();
                println!("{}", list.join(","));
                continue;
            }
            "join" => list.push(own.clone()),
            _ => list.retain(|pid| *pid != own),
        }
        let result = write_back(file, &list.join(","));
        println!("{}", result.map_or_else(|error| error.raw_os_error().unwrap(), |()| 0));
    }
}

/// Writes the whole list without a newline. For an empty list there is no write(2).
fn write_back(file: &str, list: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(file)?;
    if !list.is_empty() {
        file.write_all(list.as_bytes())?;
    }
    file.sync_all()
}
