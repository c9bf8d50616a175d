//! `self/` describes its reader: the claim of its process, or the claim that it has inherited.

use crate::harness::{Mount, Shell, errno, write};
use nix::errno::Errno;

const BOTH: &str = "cat $C/self/claim $C/self/cpus";

fn shell(mount: &Mount) -> Shell {
    Shell::start(&mut mount.bash("exec bash"))
}

#[test]
fn without_a_claim_the_files_are_empty() {
    let mount = Mount::with_dataplane();
    assert_eq!(mount.sh(BOTH), "");
    assert_eq!(mount.sh("test -s $C/self/claim || test -s $C/self/cpus || echo empty"), "empty\n");
    for file in ["claim", "cpus", "last_error"] {
        assert_eq!(errno(write(&mount.conf().join("self").join(file), "0")), Errno::EINVAL);
    }
}

#[test]
fn a_child_reads_the_claim_that_it_was_born_into() {
    let mount = Mount::new();
    mount.make_pool("pool", true, &["1,0"]);
    let mut shell = shell(&mount);
    assert_eq!(shell.ask(&format!("echo $$ > $C/pools/pool/tasks; {BOTH}")), "pool 1,0\n1,0\n");
    assert_eq!(shell.ask("read -r own < $C/self/claim; echo $own"), "pool 1,0\n");
    assert_eq!(shell.ask(&format!("bash -c 'bash -c \"{BOTH}\"; true'")), "pool 1,0\n1,0\n");
    assert_eq!(mount.sh(BOTH), "", "no other process has it");
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
fn older_children_and_strays_read_no_claim() {
    let mount = Mount::with_dataplane();
    let mut shell = shell(&mount);
    shell.ask("coproc bash; sleep 0.05");
    assert_eq!(shell.ask(&format!("echo $$ > $C/pools/dataplane/0/tasks; {BOTH}")), "dataplane 0\n0\n");
    assert_eq!(shell.ask(&format!("taskset -c 0,1 bash -c '{BOTH}; true'")), "", "it has left the list");
    assert_eq!(shell.ask(&format!("taskset -c 1 bash -c '{BOTH}; true'")), "", "it is on other CPUs");
    // It pinned itself, which does not make it part of a later claim.
    let older =
        "taskset -pc 0 $COPROC_PID > /dev/null; echo 'read -r a < $C/self/claim; echo claim: $a' >&${COPROC[1]}
        read -r line <&${COPROC[0]}; echo $line";
    assert_eq!(shell.ask(older), "claim:\n");
}

#[test]
fn processes_outside_the_pid_namespace_do_not_count() {
    let mount = Mount::with_dataplane();
    let mut shell = shell(&mount);
    let line =
        format!("echo $$ > $C/pools/dataplane/0/tasks; unshare --pid --fork bash -c '{BOTH}; echo $$'");
    assert_eq!(shell.ask(&line), "1\n");
    let line = format!(
        "unshare --pid --fork bash -c 'echo $$ > $C/pools/dataplane/1/tasks; bash -c \"{BOTH}; true\"; true'"
    );
    assert_eq!(shell.ask(&line), "dataplane 1\n1\n", "up to the first process of the namespace");
}
