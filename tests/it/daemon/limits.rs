//! The limits that a daemon inherits: raised, or the mount is refused with the name of the limit.

use crate::harness::dir::failure;
use crate::harness::{Mount, Sleeper, run, write};

#[test]
fn a_limit_that_is_too_low_is_refused_by_name() {
    for (change, name) in [
        ("ulimit -f 1", "RLIMIT_FSIZE is 1024, "),
        ("ulimit -f 0", "RLIMIT_FSIZE is 0, "),
        ("ulimit -n 64", "RLIMIT_NOFILE is 64, "),
        ("ulimit -t 1000", "RLIMIT_CPU is 1000, "),
    ] {
        let mount = Mount::not_mounted();
        // Without the capability that lets root raise every limit.
        let line = format!(
            "{change}; exec setpriv --bounding-set=-sys_resource --inh-caps=-sys_resource \
             \"$KCM\" mount --conf-dir=\"$C\" --state-dir=\"$S\""
        );
        let line = failure(mount.bash(&line).env("KCM_LOG_LEVEL", "ERROR"));
        assert!(line.starts_with(name) && line.contains("; raise it (ulimit -"), "{change}: {line}");
        assert_eq!(mount.mounted(), 0, "{change}");
    }
}

#[test]
fn a_soft_limit_is_raised() {
    let mount = Mount::not_mounted();
    let line = "ulimit -S -f 1; ulimit -S -n 64; exec \"$KCM\" mount --conf-dir=\"$C\" --state-dir=\"$S\"";
    let (_, err, status) = run(&mut mount.bash(line));
    assert_eq!(status, Some(0), "{err}");
    mount.make_pool("shared", false, &["0"]);
    let task = Sleeper::new();
    write(&mount.tasks("shared", "0"), task.pid().to_string()).expect("a claim");
    // SIGXFSZ (25) and SIGXCPU (24) kill none of its processes.
    for pid in mount.daemons() {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        let blocked = u64::from_str_radix(blocked.trim(), 16).unwrap();
        assert_eq!(blocked >> 23 & 3, 3, "{pid}");
    }
}
