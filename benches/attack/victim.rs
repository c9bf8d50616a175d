//! The victim: a calm program of another user, which claims or reads now and then, and measures how long that takes.
//!
//! It reports each measurement at once, so that one that never ends is known, too.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::crew;
use crate::lines::Talker;
use crate::place::{Place, VICTIM};
use crate::stats::Samples;

/// The flag that starts this program as a victim.
pub const FLAG: &str = "--victim";
/// How long it is measured.
pub const WINDOW: Duration = Duration::from_secs(3);
/// One operation begins this long after the one before, or when that has ended.
const PACE: Duration = Duration::from_millis(5);
/// An answer that takes longer is worth a look, in milliseconds.
const SLOW: f64 = 50.0;
/// How much longer than the window an operation may take before it counts as one that hangs.
const GRACE: Duration = Duration::from_secs(2);

/// Claims or reads until the window ends.
pub fn run(kind: &str, root: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let place = Place::new(root);
    crew::become_user(VICTIM)?;
    let files = [place.victims(), place.file("self/claim")];
    let own = std::process::id().to_string();
    // The mask that a claim gives, and the one before it: an empty filesystem sets none, and the CPU of the list is busy.
    let (all, mut list) = (sched_getaffinity(Pid::from_raw(0))?, CpuSet::new());
    list.set(1)?;
    let started = Instant::now();
    let mut turn = 0;
    while started.elapsed() < WINDOW {
        turn += 1;
        let begin = Instant::now();
        // A claim is measured with its release: open, write, close, twice.
        let result = match kind {
            "claim" => put(&files[0], &own)
                .and_then(|()| pin(&list))
                .and_then(|()| put(&files[0], "-0"))
                .and_then(|()| pin(&all)),
            _ => fs::read(&files[turn % 2]).map(|_| ()),
        };
        let took = begin.elapsed();
        let errno = result.err().map_or(0, |error| error.raw_os_error().unwrap_or(-1));
        println!("{} {errno}", took.as_nanos());
        std::thread::sleep(PACE.saturating_sub(took));
    }
    Ok(())
}

/// Sets the mask of this thread.
fn pin(cpus: &CpuSet) -> io::Result<()> {
    Ok(sched_setaffinity(Pid::from_raw(0), cpus)?)
}

fn put(file: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new().write(true).truncate(true).open(file)?.write_all(text.as_bytes())
}

/// The measurements of a victim.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Milliseconds; infinite for an operation that hung.
    pub samples: Samples,
    /// The first ones beyond [`SLOW`], with the time at which they ended.
    pub slow: Vec<String>,
    /// The errors, by errno.
    pub errors: Vec<i32>,
}

/// A running victim.
pub struct Victim(Talker);

impl Victim {
    /// `kind`: `claim` or `read`.
    pub fn start(kind: &str, root: &Path) -> Self {
        Self(Talker::start(&[FLAG, kind, root.to_str().expect("UTF-8")]))
    }

    /// Collects its measurements until it ends. `started`: when the victims were started.
    pub fn collect(mut self, started: Instant) -> Measured {
        let deadline = started + WINDOW + GRACE;
        let (mut times, mut slow, mut errors, mut last) = (Vec::new(), Vec::new(), Vec::new(), started);
        loop {
            match self.0.hear(deadline) {
                Ok((at, line)) => {
                    let numbers: Vec<f64> =
                        line.split(' ').map(|number| number.parse().expect("a number")).collect();
                    let [took, errno] = numbers[..] else { panic!("two numbers: {line}") };
                    let took = took / 1e6;
                    if took > SLOW && slow.len() < 8 {
                        slow.push(format!("{took:.0} after {:.2} s", (at - started).as_secs_f64()));
                    }
                    times.push(took);
                    errors.extend(Some(errno as i32).filter(|&errno| errno != 0));
                    last = at;
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    slow.push(format!("one that hung for {:.1} s", (deadline - last).as_secs_f64()));
                    times.push(f64::INFINITY);
                    break;
                }
            }
        }
        self.0.end();
        Measured { samples: Samples::new(times), slow, errors }
    }
}
