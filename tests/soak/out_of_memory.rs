//! A worker that the kernel kills for memory is restarted.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};

use crate::harness::{Cgroup, Mount, Sleeper, until, write};

#[test]
fn a_worker_killed_for_memory_is_restarted() {
    let cgroup = Cgroup::with("memory");
    cgroup.limit_memory(32 << 20);
    let mount = Mount::not_mounted();
    let procs = cgroup.path.join("cgroup.procs");
    let line = "echo $$ > $PROCS && exec $KCM mount --conf-dir=$C --state-dir=$S";
    assert!(mount.bash(line).env("PROCS", &procs).status().unwrap().success());
    mount.make_pool("shared", false, &["0", "1"]);
    let task = Sleeper::new();
    write(&mount.tasks("shared", "0"), task.pid().to_string()).unwrap();
    let supervisor = mount.supervisor();
    let killed = || cgroup.oom_kills();
    // Each open file keeps what was read from it: about 200 KiB.
    for _ in 0..1100 {
        write(&mount.tasks("shared", "1"), "nonsense that makes a long line of events ".repeat(3))
            .unwrap_err();
    }
    let mut open = Vec::new();
    until("the kernel has killed it", || {
        let mut file = File::open(mount.conf().join("info/events")).expect("open");
        let mut some = [0; 4096];
        // Not to the end, so that the daemon keeps the rest. The events themselves are lost with the worker.
        let _ = file.read(&mut some[..1]).expect("a read");
        open.push(file);
        if open.len() > 2000 {
            open.clear();
        }
        killed() > 0
    });
    drop(open);
    assert_eq!(fs::read_to_string(mount.tasks("shared", "0")).unwrap(), format!("{}\n", task.pid()));
    let mut file = fs::OpenOptions::new().write(true).open(mount.tasks("shared", "1")).unwrap();
    file.write_all(task.pid().to_string().as_bytes()).expect("a move");
    assert_eq!(mount.supervisor(), supervisor);
    mount.kill_daemon();
}
