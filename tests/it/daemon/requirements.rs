//! The rights that the daemon needs: without one of them the mount is refused by its name, with the cure.

use std::process::Command;

use crate::harness::dir::failure;
use crate::harness::{KCM, Mount, run};

const MOUNT: &str = "exec \"$KCM\" mount --conf-dir=\"$C\" --state-dir=\"$S\"";

/// Runs a line for bash in a mount namespace of its own.
fn unshared(mount: &Mount, flags: &[&str], line: &str) -> Command {
    let mut command = Command::new("unshare");
    command.arg("--mount").args(flags).args(["bash", "-c", line]).env("KCM_LOG_LEVEL", "ERROR");
    command.env("KCM", KCM).env("C", mount.conf()).env("S", mount.state());
    command
}

#[test]
fn a_capability_that_the_daemon_lacks_is_named() {
    for (capability, name, purpose) in [
        ("sys_admin", "CAP_SYS_ADMIN", "mount a directory"),
        ("sys_nice", "CAP_SYS_NICE", "set the CPUs of other users' processes"),
        ("sys_ptrace", "CAP_SYS_PTRACE", "look at other users' processes"),
    ] {
        let mount = Mount::not_mounted();
        let line = MOUNT
            .replace("exec", &format!("exec setpriv --bounding-set=-{capability} --inh-caps=-{capability}"));
        for line in [line.clone(), format!("{line} --foreground")] {
            let said = failure(mount.bash(&line).env("KCM_LOG_LEVEL", "ERROR"));
            let begin =
                format!("the daemon lacks {name}, without which it cannot {purpose}; give it to its service");
            assert!(said.starts_with(&begin), "{said}");
            assert!(mount.daemons().is_empty() && mount.mounted() == 0 && !mount.state().exists(), "{said}");
        }
    }
}

#[test]
fn a_proc_that_does_not_show_what_the_daemon_needs_is_named() {
    for (name, flags, change, message) in [
        ("none", &[][..], "mount -t tmpfs tmpfs /proc", "/proc: shows no processes: "),
        (
            "that of another namespace",
            &["--pid", "--fork"],
            "true",
            "/proc: is that of another PID namespace: this process is PID 1 here, and ",
        ),
        (
            "only processes",
            &[],
            "mount -t proc -o subset=pid proc /proc",
            "/proc/sys/kernel/random/boot_id: cannot be read: No such file or directory (os error 2); mount /proc without subset=pid",
        ),
        (
            "hidden processes",
            &[],
            // Root without the capability sees only its own processes.
            "mount -t proc -o hidepid=2 proc /proc && exec setpriv --bounding-set=-sys_ptrace --inh-caps=-sys_ptrace",
            "the daemon lacks CAP_SYS_PTRACE",
        ),
    ] {
        let mount = Mount::not_mounted();
        let line = if change.contains("exec ") {
            MOUNT.replace("exec", change)
        } else {
            format!("{change} && {MOUNT}")
        };
        let said = failure(&mut unshared(&mount, flags, &line));
        assert!(said.starts_with(message), "{name}: {said}");
        assert!(mount.daemons().is_empty() && mount.mounted() == 0, "{name}");
    }
}

#[test]
fn claims_work_although_proc_hides_processes() {
    for hidden in ["hidepid=1", "hidepid=2", "hidepid=4"] {
        let mount = Mount::not_mounted();
        let line = format!(
            "mount -t proc -o {hidden} proc /proc && $KCM mount --conf-dir=$C --state-dir=$S || exit 1
            trap '$KCM unmount --conf-dir=$C' EXIT
            mkdir $C/pools/p $C/pools/p/0 && echo 1 > $C/pools/p/exclusive
            setpriv --reuid=65534 --regid=65534 --clear-groups sleep 1000 & task=$!
            until grep -q ^Uid:.65534 /proc/$task/status; do :; done
            echo $task > $C/pools/p/0/tasks && test \"$(cat $C/pools/p/tasks)\" = $task &&
                taskset -p $task | grep -q 'mask: 1$' && kill -9 $task && wait $task
            test -z \"$(cat $C/pools/p/0/tasks)\" && echo done"
        );
        let (out, err, _) = run(&mut unshared(&mount, &[], &line));
        assert_eq!(out, "done\n", "{hidden}: {err}");
    }
}
