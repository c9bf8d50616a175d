//! `self/` is about its reader: the claim of its own process, or the one that it has inherited.

use crate::harness::{Mount, Shell, errno, write};
use nix::errno::Errno;

const BOTH: &str = "cat $C/self/claim $C/self/cpus";

fn shell(mount: &Mount) -> Shell {
    Shell::start(&mut mount.bash("exec bash"))
}

#[test]
fn without_a_claim_there_is_nothing_to_say() {
    let mount = Mount::with_dataplane();
    assert_eq!(mount.sh(BOTH), "");
    assert_eq!(mount.sh("test -s $C/self/claim || test -s $C/self/cpus || echo empty"), "empty\n");
    for file in ["claim", "cpus", "last_error"] {
        assert_eq!(errno(write(&mount.conf().join("self").join(file), "0")), Errno::EINVAL);
    }
}

#[test]
fn a_process_reads_its_own_claim_and_its_children_the_one_they_were_born_into() {
    let mount = Mount::new();
    mount.make_pool("pool", true, &["1,0"]);
    let mut shell = shell(&mount);
    assert_eq!(shell.ask(&format!("echo $$ > $C/pools/pool/tasks; {BOTH}")), "pool 1,0\n1,0\n");
    assert_eq!(shell.ask("read -r own < $C/self/claim; echo $own"), "pool 1,0\n");
    assert_eq!(shell.ask(&format!("bash -c 'bash -c \"{BOTH}\"; true'")), "pool 1,0\n1,0\n");
    assert_eq!(mount.sh(BOTH), "", "it is nobody else's");
    assert_eq!(shell.ask(&format!("echo -$$ > $C/pools/pool/tasks; {BOTH}")), "");
}

#[test]
fn the_nearest_claim_counts() {
    let mount = Mount::with_dataplane();
    let mut shell = shell(&mount);
    assert_eq!(shell.ask(&format!("echo $$ > $C/pools/dataplane/0/tasks; {BOTH}")), "dataplane 0\n0\n");
    let inner = format!("bash -c 'echo $$ > $C/pools/dataplane/1/tasks; {BOTH}; true'");
    assert_eq!(shell.ask(&inner), "dataplane 1\n1\n");
    assert_eq!(shell.ask(BOTH), "dataplane 0\n0\n");
}

#[test]
fn a_child_that_is_older_than_the_claim_or_has_left_the_list_is_told_nothing() {
    let mount = Mount::with_dataplane();
    let mut shell = shell(&mount);
    shell.ask("coproc bash; sleep 0.05");
    assert_eq!(shell.ask(&format!("echo $$ > $C/pools/dataplane/0/tasks; {BOTH}")), "dataplane 0\n0\n");
    assert_eq!(shell.ask(&format!("taskset -c 0,1 bash -c '{BOTH}; true'")), "", "it has left the list");
    assert_eq!(shell.ask(&format!("taskset -c 1 bash -c '{BOTH}; true'")), "", "it is elsewhere");
    // On the list by its own doing: that makes it no part of a claim that came later.
    let older =
        "taskset -pc 0 $COPROC_PID > /dev/null; echo 'read -r a < $C/self/claim; echo told $a' >&${COPROC[1]}
        read -r said <&${COPROC[0]}; echo $said";
    assert_eq!(shell.ask(older), "told\n");
}

#[test]
fn nothing_is_told_about_processes_outside_the_pid_namespace() {
    let mount = Mount::with_dataplane();
    let mut shell = shell(&mount);
    let line =
        format!("echo $$ > $C/pools/dataplane/0/tasks; unshare --pid --fork bash -c '{BOTH}; echo $$'");
    assert_eq!(shell.ask(&line), "1\n");
    let line = format!(
        "unshare --pid --fork bash -c 'echo $$ > $C/pools/dataplane/1/tasks; bash -c \"{BOTH}; true\"; true'"
    );
    assert_eq!(shell.ask(&line), "dataplane 1\n1\n", "up to the first process of it");
}
