//! The settings that a process inherits do not change how the daemon serves: limits, priorities, signals,
//! variables, standard files, umask and working directory.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use crate::harness::{Mount, Sleeper, masks, run, stat, write};

/// The name of a heritage, and the line for bash that starts the daemon with it.
const HERITAGES: [(&str, &str); 23] = [
    ("few processes", "ulimit -u 1; MOUNT"),
    ("no core file", "ulimit -c 0; MOUNT"),
    ("large core files", "ulimit -c unlimited; MOUNT"),
    ("no locked memory", "ulimit -l 0; MOUNT"),
    ("a small stack", "ulimit -S -s 256; MOUNT"),
    ("a stack without limit", "ulimit -s unlimited; MOUNT"),
    ("no pending signals", "ulimit -i 0; MOUNT"),
    ("no real-time priority", "ulimit -r 0; ulimit -e 0; MOUNT"),
    ("a low priority", "exec nice -n 19 MOUNT"),
    ("only idle time", "exec chrt --idle 0 MOUNT"),
    ("batch", "exec chrt --batch 0 MOUNT"),
    ("only idle disk time", "exec ionice --class idle MOUNT"),
    ("ignored signals", "trap '' HUP INT QUIT TERM CHLD PIPE USR1 USR2 ALRM TSTP TTIN TTOU XCPU XFSZ; MOUNT"),
    (
        "blocked signals",
        "exec python3 -c 'import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execvp(\"bash\", [\"bash\", \"-c\", os.environ[\"M\"]])'",
    ),
    ("small stacks of threads", "export RUST_MIN_STACK=1; MOUNT"),
    ("huge stacks of threads", "export RUST_MIN_STACK=999999999999999; MOUNT"),
    ("backtraces", "export RUST_BACKTRACE=full RUST_LIB_BACKTRACE=1; MOUNT"),
    (
        "another heap",
        "export MALLOC_CHECK_=3 MALLOC_PERTURB_=165 MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=1 MALLOC_TOP_PAD_=1; MOUNT",
    ),
    ("a level that does not exist", "export KCM_LOG_LEVEL=loud; MOUNT"),
    (
        "nobody who manages services",
        "export NOTIFY_SOCKET=/nowhere LISTEN_FDS=9 LISTEN_PID=1 WATCHDOG_USEC=x; MOUNT",
    ),
    ("no standard files", "MOUNT <&- >&- 2>&-"),
    ("a narrow umask", "umask 0777; MOUNT"),
    ("a removed directory", "mkdir gone; cd gone; rmdir ../gone; MOUNT"),
];
const MOUNT: &str = "\"$KCM\" mount --conf-dir=\"$C\" --state-dir=\"$S\"";

#[test]
fn no_heritage_changes_how_the_daemon_serves() {
    for (name, line) in HERITAGES {
        let mount = Mount::not_mounted();
        let mut command = mount.bash(&line.replace("MOUNT", MOUNT));
        let (_, err, status) = run(command.env("M", MOUNT).current_dir(mount.home()));
        assert_eq!(status, Some(0), "{name}: {err}");
        check(&mount, name);
    }
}

/// Claims, survives a death of each process, is upgraded, and ends.
fn check(mount: &Mount, name: &str) {
    mount.make_pool("excl", true, &["0"]);
    let task = Sleeper::new();
    write(&mount.tasks("excl", "0"), task.pid().to_string())
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(masks(task.pid()), ["0"], "{name}");
    mount.replace_worker();
    let (_, err, status) = run(mount.kcm(&["mount", "--upgrade", "--state-dir"]).arg(mount.state()));
    assert_eq!(status, Some(0), "{name}: {err}");
    assert_eq!(mount.read("pools/excl/0/tasks").trim(), task.pid().to_string(), "{name}");
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&mount.state()), 0o700, "{name}");
    assert_eq!(mode(&mount.state().join("claims")), 0o600, "{name}");
    for pid in mount.daemons() {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let mask = |field: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
            u64::from_str_radix(value.trim(), 16).unwrap()
        };
        // SIGCHLD (17), which would collect children behind the daemon's back.
        assert_eq!(mask("SigIgn:") >> 16 & 1, 0, "{name}");
        for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let tid = thread.unwrap().file_name().to_str().unwrap().parse().unwrap();
            // The nice value and the policy of an ordinary process.
            assert_eq!((stat(tid, 19), stat(tid, 41)), ("0".to_owned(), "0".to_owned()), "{name}");
        }
    }
    mount.stop();
    assert_eq!(mode(&mount.conf()), 0o755, "{name}");
    assert!(mount.daemons().is_empty(), "{name}");
}

#[test]
fn a_terminal_that_is_gone_does_not_stop_a_daemon_in_the_foreground() {
    let mount = Mount::not_mounted();
    // Nobody reads what it says.
    let line = format!("{MOUNT} --foreground 2>&1 | true");
    let path = mount.home().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut command = mount.bash(&line);
    let mut daemon = Sleeper::spawn(command.env("KCM_LOG_LEVEL", "DEBUG").env("NOTIFY_SOCKET", &path));
    let mut buffer = [0; 4096];
    while !buffer.starts_with(b"READY=1") {
        socket.recv(&mut buffer).expect("readiness");
    }
    for _ in 0..3 {
        mount.replace_worker();
    }
    mount.make_pool("excl", true, &["0"]);
    mount.stop();
    assert!(daemon.child().wait().is_ok());
}
