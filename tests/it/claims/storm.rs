//! No thread is outside its list after a claim, however busy the machine is and however fast the program creates threads.
//!
//! `KCM_STORM_CLAIMS=10000 scripts/test claims::storm` is the long version.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{Builder, sleep};
use std::time::Duration;

use nix::errno::Errno;

use crate::harness::program::{self, Program};
use crate::harness::{Mount, Sleeper, errno, masks, write};

/// The number of claims for one process.
const CLAIMS_EACH: usize = 5;

#[test]
fn no_thread_is_outside_however_busy_the_machine() {
    let claims = std::env::var("KCM_STORM_CLAIMS").map_or(40, |text| text.parse().expect("a number"));
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    // Threads of low priority are preempted by these for long, also inside clone(2).
    let _busy = [0, 1].map(|_| Sleeper::spawn(Command::new("sh").args(["-c", "while :; do :; done"])));
    let mut given_up = [0; 2];
    for process in 0..claims / CLAIMS_EACH {
        let low = [["nice", "-n", "19"], ["chrt", "--idle", "0"]][process % 2];
        let storm = Program::start(&mut program::command(&low, "storm"));
        let pid = storm.pid();
        for claim in 0..CLAIMS_EACH {
            let refused = write(&list, pid.to_string()).map_err(|error| errno::<()>(Err(error)));
            match refused {
                Ok(()) => {}
                Err(Errno::EAGAIN) => {
                    given_up[process % 2] += 1;
                    continue;
                }
                Err(errno) => panic!("{errno}"),
            }
            for _ in 0..5 {
                let outside: Vec<String> = masks(pid).into_iter().filter(|mask| mask != "0").collect();
                assert!(outside.is_empty(), "process {process}, claim {claim}: {outside:?}");
                sleep(Duration::from_micros(300));
            }
            write(&list, format!("-{pid}")).expect("a release");
        }
        storm.end();
    }
    println!("{claims} claims, {given_up:?} given up (EAGAIN)");
    // An idle thread that is inside clone(2) stays there while others want its CPU.
    let [nice, _idle] = given_up;
    assert!(nice * 20 <= claims, "{nice} of {claims} claims were given up");
}

/// Some 40 threads, each of which creates another one and ends.
pub fn storm() {
    for _ in 0..2 {
        start_thread();
    }
    program::ready();
    program::heard();
}

fn start_thread() {
    while Builder::new().stack_size(64 * 1024).spawn(create_another).is_err() {
        sleep(Duration::from_micros(100));
    }
}

fn create_another() {
    static LIVE: AtomicUsize = AtomicUsize::new(0);
    let live = LIVE.fetch_add(1, Ordering::Relaxed);
    start_thread();
    if live < 40 {
        sleep(Duration::from_millis(2));
    }
    LIVE.fetch_sub(1, Ordering::Relaxed);
}
