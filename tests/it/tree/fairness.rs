//! One user's requests do not hold up another user's, and only the user who sends too many is refused.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::harness::{Mount, NOBODY, Sleeper, held, set_mode, text, until, write};

/// A mount on which `nobody` owns three `tasks` files, and each of its writes takes this long.
fn mount(slow: Duration) -> Mount {
    let mount = Mount::new();
    mount.let_everybody_in();
    mount.make_pool("slow", false, &["0"]);
    mount.make_pool("other", false, &["1"]);
    for file in [mount.tasks("slow", "0"), mount.pool("slow").join("tasks"), mount.tasks("other", "1")] {
        chown(file, Some(NOBODY), None).unwrap();
    }
    mount.stop();
    mount.start_with("KCM_SLOW_WRITES", &slow.as_millis().to_string());
    mount
}

/// A shell of `nobody` that claims this list for itself and then sleeps.
fn claim(mount: &Mount, file: &Path) -> Sleeper {
    let line = format!("echo 0 > {} && echo done && exec sleep 100", file.display());
    let mut command = mount.bash_as_nobody(&line);
    Sleeper::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
}

/// Starts two slow claims of `nobody`, which take the places that it may have.
fn occupy(mount: &Mount) -> [Sleeper; 2] {
    let claims = [mount.tasks("slow", "0"), mount.pool("slow").join("tasks")].map(|file| claim(mount, &file));
    until("both are carried out", || claims.iter().all(|shell| waits_in_write(shell.pid())));
    claims
}

/// Returns whether the process waits for the daemon in write(2).
fn waits_in_write(pid: u32) -> bool {
    let call = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    call.starts_with(&format!("{} ", libc::SYS_write))
}

/// Waits for the first line that the shell prints, and ends it.
fn first_line(mut shell: Sleeper) -> String {
    let mut line = [0; 4];
    match shell.child().stdout.as_mut().unwrap().read_exact(&mut line) {
        Ok(()) => text(&line),
        Err(_) => std::io::read_to_string(shell.child().stderr.as_mut().unwrap()).unwrap(),
    }
}

#[test]
fn slow_claims_of_one_user_leave_others_alone() {
    let slow = Duration::from_secs(2);
    let mount = mount(slow);
    let _slow = occupy(&mount);
    // These wait for the two.
    let mut reads = mount.bash_as_nobody("for n in {1..50}; do cat $C/info/version & done; wait");
    let _reads = Sleeper::spawn(reads.stdout(Stdio::null()));
    let (file, task) = (mount.tasks("other", "1"), Sleeper::new());
    for _ in 0..10 {
        let begin = Instant::now();
        write(&file, task.pid().to_string()).unwrap();
        assert_eq!(held(&file), [task.pid()]);
        fs::metadata(mount.conf().join("self/claim")).unwrap();
        write(&file, format!("-{}", task.pid())).unwrap();
        assert!(begin.elapsed() < slow / 2, "{:?}", begin.elapsed());
    }
}

#[test]
fn the_user_who_sends_too_many_requests_is_refused() {
    // Longer than an emulated machine takes to start a shell.
    let slow = Duration::from_secs(6);
    let mount = mount(slow);
    let _slow = occupy(&mount);
    // Everybody may write this file, and it is not nobody's: its write must not wait long, because others wait for it.
    let file = mount.pool("other").join("tasks");
    set_mode(&file, 0o666);
    let (begin, task) = (Instant::now(), Sleeper::new());
    write(&file, task.pid().to_string()).expect("root is not refused");
    assert!(begin.elapsed() < slow / 2, "{:?}", begin.elapsed());
    // Also to read the reason, nobody has to wait until its claims are done.
    let line =
        "echo 0 > $C/pools/other/tasks || until cat $C/self/last_error 2>/dev/null; do sleep 0.1; done";
    let refused = mount.bash_as_nobody(line).output().unwrap();
    let said = text(&refused.stdout);
    assert!(text(&refused.stderr).contains("Resource temporarily unavailable"), "{refused:?}");
    let reason = "EAGAIN: too many requests of uid 65534 wait; send fewer at a time, then try again\n";
    assert!(said.ends_with(reason), "{said}");
}

#[test]
fn a_worker_that_dies_loses_and_repeats_no_waiting_request() {
    // Those that wait must not be too late.
    let mount = mount(Duration::from_millis(400));
    let mut claims = Vec::from(occupy(&mount));
    claims.push(claim(&mount, &mount.tasks("other", "1")));
    let mut reads = mount.bash_as_nobody("for n in {1..50}; do cat $C/info/version & done; wait");
    let reads = reads.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until("the third one waits", || waits_in_write(claims[2].pid()));
    mount.replace_worker();
    let pids: Vec<u32> = claims.iter().map(Sleeper::pid).collect();
    for shell in claims {
        assert_eq!(first_line(shell), "done");
    }
    let read = reads.wait_with_output().unwrap();
    assert_eq!(text(&read.stdout).lines().count(), 50, "{}", text(&read.stderr));
    let events = mount.events();
    for pid in pids {
        let count = events.iter().filter(|(event, of)| event == "claimed" && *of == pid).count();
        assert_eq!(count, 1, "claims of {pid}: {events:?}");
    }
}
