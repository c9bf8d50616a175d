//! With `KCM_LOG_LEVEL=DEBUG` the daemon log has one line per request.

use std::fs;

use crate::harness::{Mount, until};

/// The DEBUG lines of the daemon log that are about this operation on this path.
fn requests(mount: &Mount, operation: &str, path: &str) -> Vec<String> {
    let wanted = format!(" op={operation} path=\"{path}\" ");
    mount.log().lines().filter(|line| line.contains(&wanted)).map(str::to_owned).collect()
}

#[test]
fn debug_logs_one_line_per_request() {
    let mount = Mount::not_mounted();
    mount.start_with("KCM_LOG_LEVEL", "DEBUG");
    mount.make_pool("shared", false, &["0"]);
    let shell = mount.sh("echo $$ > $C/pools/shared/0/tasks; echo $$");
    let pid = shell.trim();
    until("the line is written", || !requests(&mount, "write", "/pools/shared/0/tasks").is_empty());
    let lines = requests(&mount, "write", "/pools/shared/0/tasks");
    let [line] = lines.as_slice() else { panic!("{lines:?}") };
    for part in ["DEBUG:root:request id=", &format!(" pid={pid} "), " outcome=ok us="] {
        assert!(line.contains(part), "{part} is missing: {line}");
    }
    // A refusal has its errno, and an operation that does not exist is a request like any other.
    fs::write(mount.tasks("shared", "0"), "nonsense").expect_err("no PID");
    fs::remove_file(mount.tasks("shared", "0")).expect_err("cannot be removed");
    let refused = requests(&mount, "write", "/pools/shared/0/tasks");
    assert!(refused.last().is_some_and(|line| line.contains(" outcome=EINVAL ")), "{refused:?}");
    let unlink = requests(&mount, "unlink", "/pools/shared/0/tasks");
    assert!(unlink.iter().any(|line| line.contains(" outcome=EPERM ")), "{unlink:?}");
    // The next worker logs too.
    mount.replace_worker();
    until("it logs", || {
        requests(&mount, "read", "/info/version").iter().any(|line| line.contains("outcome=ok"))
    });
}

#[test]
fn without_debug_no_request_is_logged() {
    let mount = Mount::with_shared();
    mount.sh("echo $$ > $C/pools/shared/0/tasks");
    assert!(!mount.log().contains("request id="), "{}", mount.log());
}
