//! What `self/last_error` says, and to which processes.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::chown;

use crate::harness::{Mount, NOBODY, Shell, Sleeper, as_nobody, errno, set_mode, sleeper_of_nobody, write};
use nix::errno::Errno;

/// The holder of the list, as the message of a refusal names it.
fn holder(line: &str) -> String {
    let output = line.split_once(" is held by ").unwrap_or_else(|| panic!("{line:?}")).1;
    output.split_once(" for ").expect("for how long").0.to_owned()
}

/// The message that `nobody` reads after list 0 was refused to it.
fn refused_to_nobody(mount: &Mount) -> String {
    let own = sleeper_of_nobody();
    as_nobody(|| {
        let file = File::options().write(true).open(mount.tasks("dataplane", "0")).expect("open for writing");
        assert_eq!(errno((&file).write(own.pid().to_string().as_bytes())), Errno::EBUSY);
        mount.read("self/last_error")
    })
}

#[test]
fn root_and_the_owner_read_the_holders_name() {
    let mount = Mount::with_dataplane();
    mount.let_everybody_in();
    let list = mount.tasks("dataplane", "0");
    set_mode(&list, 0o666);
    let task = Sleeper::new();
    write(&list, task.pid().to_string()).unwrap();
    assert_eq!(errno(write(&list, "0")), Errno::EBUSY);
    assert_eq!(holder(&mount.read("self/last_error")), format!("{} (sleep)", task.pid()));
    assert_eq!(holder(&refused_to_nobody(&mount)), task.pid().to_string());
    task.end();
    let task = sleeper_of_nobody();
    write(&list, task.pid().to_string()).unwrap();
    assert_eq!(holder(&refused_to_nobody(&mount)), format!("{} (sleep)", task.pid()));
}

#[test]
fn readers_of_the_file_read_the_holders_pid() {
    let mount = Mount::with_dataplane();
    mount.let_everybody_in();
    let list = mount.tasks("dataplane", "0");
    let task = Sleeper::new();
    write(&list, task.pid().to_string()).unwrap();
    let pid = task.pid().to_string();
    for (owner, group, mode, named) in [
        (0, 0, 0o626, "PID"),
        (0, 0, 0o622, "a task"),
        (0, NOBODY, 0o660, "PID"),
        (0, NOBODY, 0o620, "a task"),
        // The first class that matches decides, as for open(2).
        (0, NOBODY, 0o626, "a task"),
        (NOBODY, 0, 0o600, "PID"),
        (NOBODY, NOBODY, 0o266, "a task"),
    ] {
        chown(&list, Some(owner), Some(group)).unwrap();
        set_mode(&list, mode);
        let may_read = as_nobody(|| File::open(&list).is_ok());
        assert_eq!(may_read, named == "PID", "{owner}:{group} {mode:o}");
        let expected = if may_read { &*pid } else { "a task" };
        assert_eq!(holder(&refused_to_nobody(&mount)), expected, "{owner}:{group} {mode:o}");
    }
}

#[test]
fn a_line_has_time_pid_errno_reason_and_cure() {
    let mount = Mount::with_dataplane();
    let (task, other) = (Sleeper::new(), Sleeper::new());
    write(&mount.tasks("dataplane", "1"), task.pid().to_string()).unwrap();
    for (words, number) in [(other.pid().to_string(), other.pid()), ("0".into(), std::process::id())] {
        assert_eq!(errno(write(&mount.tasks("dataplane", "1"), &words)), Errno::EBUSY);
        let line = mount.read("self/last_error");
        let (time, rest) = line.split_once(' ').unwrap();
        assert!(time.len() == "2026-11-24T10:15:02.250Z".len() && time.ends_with('Z'), "{line}");
        let pid = task.pid();
        assert_eq!(
            rest,
            format!(
                "{number}: EBUSY: dataplane 1 is held by {pid} (sleep) for 0 s; dataplane 0 is free; \
                a write to pools/dataplane/tasks finds it\n"
            )
        );
    }
}

#[test]
fn only_the_writers_side_reads_the_refusal() {
    let mount = Mount::with_dataplane();
    let mut shell = Shell::start(&mut mount.bash("exec bash"));
    assert_eq!(mount.read("self/last_error"), "");
    // A process in its own PID namespace has no ancestors outside.
    let line =
        "unshare --pid --fork bash -c 'echo nonsense > $C/pools/dataplane/tasks; cat $C/self/last_error'";
    let message = shell.ask(line);
    assert!(message.contains(": EINVAL: \"nonsense\" is not a PID; "), "{message}");
    assert_eq!(mount.read("self/last_error"), "");
    assert_eq!(shell.ask("cat $C/self/last_error"), "");
}

#[test]
fn the_writer_and_four_ancestors_read_the_refusal() {
    let mount = Mount::with_dataplane();
    // Level 5 writes; then each level reads without starting a child.
    let message = mount.sh("
        deep() {
            if [ $1 = 5 ]; then echo nonsense > $C/pools/dataplane/tasks 2>/dev/null; else (deep $(($1 + 1))); fi
            read -r line < $C/self/last_error && echo $1 line || echo $1 nothing
        }
        deep 0 2>/dev/null");
    assert_eq!(message, "5 line\n4 line\n3 line\n2 line\n1 line\n0 nothing\n");
    assert_eq!(mount.read("self/last_error"), "");
}

#[test]
fn the_shell_reads_the_refusal_of_its_tool() {
    let mount = Mount::with_dataplane();
    let message = mount.sh("
        echo $$ nonsense | tee $C/pools/dataplane/tasks >/dev/null 2>&1 && exit 9
        cat $C/self/last_error; exit 0");
    assert!(message.contains(": EINVAL: \"nonsense\" is not a PID; "), "{message}");
}

#[test]
fn another_session_reads_no_refusal() {
    let mount = Mount::with_dataplane();
    // Two panes of a terminal multiplexer: two sessions with the same parent.
    let message = mount.sh("
        setsid --wait bash -c 'echo first > $C/pools/dataplane/tasks; cat $C/self/last_error' 2>/dev/null
        setsid --wait cat $C/self/last_error
        cat $C/self/last_error
        echo second > $C/pools/dataplane/tasks 2>/dev/null
        setsid --wait cat $C/self/last_error
        cat $C/self/last_error");
    let lines: Vec<&str> = message.lines().collect();
    assert_eq!(lines.len(), 2, "{message}");
    assert!(
        lines[0].contains("\"first\" is not a PID") && lines[1].contains("\"second\" is not a PID"),
        "{message}"
    );
}

#[test]
fn another_user_reads_no_refusal() {
    let mount = Mount::with_dataplane();
    mount.let_everybody_in();
    let message = mount.sh("
        echo of-root > $C/pools/dataplane/tasks 2>/dev/null
        setpriv --reuid=65534 --regid=65534 --clear-groups cat $C/self/last_error; cat $C/self/last_error");
    assert!(message.lines().count() == 1 && message.contains("\"of-root\" is not a PID"), "{message}");
}

#[test]
fn what_a_program_like_sudo_ran_is_read_through_it_on_the_same_terminal() {
    let mount = Mount::with_dataplane();
    mount.let_everybody_in();
    // A program like sudo(8) with use_pty: it belongs to root, and begins a session for each command.
    let bin = tempfile::tempdir().unwrap();
    set_mode(bin.path(), 0o755);
    let bash = bin.path().join("bash");
    fs::copy("/bin/bash", &bash).unwrap();
    set_mode(&bash, 0o4755);
    let script = "
        sudo() { $SUDO -p -c 'setsid --wait bash -p -c \"$1\"' sh \"$1\"; }
        sudo 'echo of-sudo > $C/pools/dataplane/tasks' 2>/dev/null
        echo before: $(cat $C/self/last_error)
        sudo 'cat $C/self/last_error'
        sudo 'echo > $C/pools/dataplane/tasks'
        sudo 'echo after: $(cat $C/self/last_error)'";
    let user = "setpriv --reuid=65534 --regid=65534 --clear-groups bash -c \"$SCRIPT\"";
    let mut command = mount.bash(&format!("script --quiet --command '{user}' /dev/null"));
    let output = command.env("SUDO", bash).env("SCRIPT", script).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).replace('\r', "");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert_eq!((lines[0], lines[2]), ("before:", "after:"), "{text}");
    assert!(lines[1].contains("\"of-sudo\" is not a PID"), "{text}");
}

#[test]
fn a_success_ends_the_refusals_before_it() {
    let mount = Mount::with_dataplane();
    let script = "
        echo nonsense > $C/pools/dataplane/tasks 2>/dev/null
        cat $C/self/last_error | wc -l
        (echo other > $C/pools/dataplane/tasks; echo > $1; read -r _ < $2; cat $C/self/last_error) 2>/dev/null &
        read -r _ < $1
        mkdir $C/pools/made
        cat $C/self/last_error | wc -l
        echo > $2; wait";
    let fifo = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| fifo.path().join(name));
    for path in [&one, &two] {
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    let mut bash = mount.bash(&format!("set -- {} {}\n{script}", one.display(), two.display()));
    let output = bash.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["1", "0"], "{text}");
    assert!(lines[2].contains("\"other\" is not a PID"), "another program keeps its own: {text}");
    // Neither is it there after the death of the daemon.
    let mut shell = Shell::start(&mut mount.bash("exec bash"));
    assert_eq!(
        shell.ask("echo x > $C/pools/dataplane/tasks; mkdir $C/pools/more; cat $C/self/last_error"),
        ""
    );
    mount.replace_worker();
    assert_eq!(shell.ask("cat $C/self/last_error"), "");
}

#[test]
fn operations_on_names_are_explained() {
    let mount = Mount::with_dataplane();
    for (operation, errno, what) in [
        ("rm $C/info/version", "EPERM", "removed"),
        ("touch $C/pools/new", "EACCES", "created"),
        ("ln -s x $C/pools/new", "EPERM", "created"),
        ("ln $C/info/version $C/info/other", "EPERM", "linked"),
    ] {
        let message = mount.sh(&format!("{operation} 2>/dev/null; cat $C/self/last_error"));
        let expected = format!(": {errno}: files cannot be {what} here; make pools and CPU lists with mkdir");
        assert!(message.contains(&expected), "{operation}: {message}");
    }
    for (operation, reason) in [
        ("mkdir $C/new", "EPERM: nothing can be made, renamed or removed here"),
        ("mv $C/info/version $C/info/other", "EPERM: nothing can be made, renamed or removed here"),
        ("echo x > $C/info/version", "EINVAL: this file is read-only"),
        ("echo x > $C/self/claim", "EINVAL: this file is read-only"),
        ("echo x > $C/lock", "EINVAL: this file is read-only"),
    ] {
        let message = mount.sh(&format!("({operation}) 2>/dev/null; cat $C/self/last_error"));
        assert!(message.contains(reason), "{operation}: {message}");
    }
}

#[test]
fn a_reused_pid_reads_no_earlier_refusal() {
    let mount = Mount::with_dataplane();
    // In a PID namespace the test can choose the next PID. The writer is so deep that the first process of the
    // namespace is not among its four ancestors.
    let message = mount.sh("exec unshare --pid --fork --mount-proc bash -c '
        deep() {
            if [ $1 = 0 ]; then
                echo nonsense > $C/pools/dataplane/tasks
                read -r line < $C/self/last_error && echo $BASHPID line
            else (deep $(($1 - 1)); true); fi
        }
        deep 6 2>/dev/null
        read -r line < $C/self/last_error && echo the first one reads it
        # No other process is here: the seventh one was refused.
        echo 6 > /proc/sys/kernel/ns_last_pid
        (read -r line < $C/self/last_error && echo $BASHPID line || echo $BASHPID nothing)'");
    assert_eq!(message, "7 line\n7 nothing\n");
}

#[test]
fn the_newest_4096_refusals_are_kept() {
    let mount = Mount::with_dataplane();
    let mut shell = Shell::start(&mut mount.bash("exec bash"));
    let first = "echo first > $C/pools/dataplane/tasks; cat $C/self/last_error";
    assert!(shell.ask(first).contains("\"first\" is not a PID"));
    let mut file = File::options().write(true).open(mount.pool("dataplane").join("tasks")).unwrap();
    for _ in 0..4095 {
        assert_eq!(errno(file.write(b"later")), Errno::EINVAL);
    }
    let message = shell.ask("cat $C/self/last_error");
    assert!(message.contains("\"first\" is not a PID"), "4,096 are kept: {message}");
    assert_eq!(errno(file.write(b"later")), Errno::EINVAL);
    let message = shell.ask("cat $C/self/last_error");
    assert!(
        message.contains("\"later\" is not a PID"),
        "the oldest made room; now its parent, the test, is the nearest: {message}"
    );
}
