//! Draining: a list keeps the tasks that it has, and gets no new ones.

use std::fs;

use crate::harness::{Mount, Sleeper, errno, held, until, write};
use nix::errno::Errno;

fn state(mount: &Mount, list: &str) -> String {
    mount.read(&format!("pools/dataplane/{list}/state"))
}

#[test]
fn a_draining_list_keeps_its_task_and_gets_no_new_one() {
    let mount = Mount::with_dataplane();
    let (holder, other) = (Sleeper::new(), Sleeper::new());
    let (list, pool) = (mount.tasks("dataplane", "0"), mount.pool("dataplane").join("tasks"));
    write(&list, holder.pid().to_string()).unwrap();
    mount.sh("echo drain > $C/pools/dataplane/0/state");
    assert_eq!((state(&mount, "0"), state(&mount, "1")), ("affinity draining\n".into(), "free\n".into()));
    write(&list, holder.pid().to_string()).expect("it is there already");
    holder.end();
    assert_eq!(state(&mount, "0"), "free draining\n");
    assert_eq!(errno(write(&list, other.pid().to_string())), Errno::EBUSY);
    let why = mount.read("self/last_error");
    assert!(why.contains("dataplane 0 is draining and takes no new task"), "{why}");
    write(&pool, other.pid().to_string()).unwrap();
    assert_eq!(held(&mount.tasks("dataplane", "1")), [other.pid()], "the pool has another list");
    let third = Sleeper::new();
    assert_eq!(errno(write(&pool, third.pid().to_string())), Errno::EBUSY);
    mount.stop();
    mount.start();
    assert_eq!(state(&mount, "0"), "free draining\n", "it is a part of the configuration");
    write(&mount.pool("dataplane").join("0/state"), "undrain").unwrap();
    write(&pool, third.pid().to_string()).unwrap();
    assert_eq!(held(&list), [third.pid()]);
}

#[test]
fn a_child_that_is_left_behind_inherits_a_draining_list() {
    let mount = Mount::with_dataplane();
    mount.sh("bash -c 'echo 0 > $C/pools/dataplane/0/tasks; echo drain > $C/pools/dataplane/0/state; \
         sleep 1000 > /dev/null 2>&1 & echo $! > $C/../heir'");
    let heir: u32 = fs::read_to_string(mount.home().join("heir")).unwrap().trim().parse().unwrap();
    assert_eq!(held(&mount.tasks("dataplane", "0")), [heir]);
    crate::harness::signal(heir, nix::sys::signal::Signal::SIGKILL);
    until("the heir has ended", || held(&mount.tasks("dataplane", "0")).is_empty());
}

#[test]
fn who_waits_for_a_list_gets_it_when_it_is_undrained() {
    let mount = Mount::with_dataplane();
    for list in ["0", "1"] {
        write(&mount.pool("dataplane").join(list).join("state"), "drain").unwrap();
    }
    let mut waiting = mount.kcm(&["isolate", "--pool=dataplane", "--wait", "--", "true"]).spawn().unwrap();
    until("it waits", || {
        fs::read_to_string(format!("/proc/{}/wchan", waiting.id())).is_ok_and(|at| at.contains("poll"))
    });
    assert!(waiting.try_wait().unwrap().is_none());
    write(&mount.pool("dataplane").join("1/state"), "undrain").unwrap();
    assert!(waiting.wait().unwrap().success());
}
