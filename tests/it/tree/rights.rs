//! Permissions: a user claims for its own processes, through a file that was opened by a user with the same right.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use crate::harness::{
    Mount, NOBODY, Sleeper, as_nobody, errno, pids, run, set_mode, sleeper_of_nobody, write,
};
use nix::errno::Errno;

/// `dataplane`, with `tasks` files that all users may read and write.
fn open_to_all() -> Mount {
    let mount = Mount::with_dataplane();
    mount.let_everybody_in();
    for file in
        [mount.pool("dataplane").join("tasks"), mount.tasks("dataplane", "0"), mount.tasks("dataplane", "1")]
    {
        set_mode(&file, 0o666);
    }
    mount
}

/// A setuid program of root.
fn setuid_root(mount: &Mount, program: &str) -> PathBuf {
    let copy = mount.home().join(program);
    fs::copy(PathBuf::from("/bin").join(program), &copy).expect("a copy");
    set_mode(&copy, 0o4755);
    copy
}

fn held(mount: &Mount, list: &str) -> String {
    mount.read(&format!("pools/dataplane/{list}/tasks"))
}

fn line(task: &Sleeper) -> String {
    format!("{}\n", task.pid())
}

#[test]
fn a_user_claims_only_for_its_own_processes() {
    let mount = open_to_all();
    let (own, roots) = (sleeper_of_nobody(), Sleeper::new());
    let (pool, list) = (mount.pool("dataplane").join("tasks"), mount.tasks("dataplane", "0"));
    as_nobody(|| {
        for file in [&pool, &list] {
            assert_eq!(errno(write(file, line(&roots))), Errno::EPERM);
            assert_eq!(errno(write(file, "1")), Errno::EPERM);
            assert_eq!(errno(write(file, format!("-{}", roots.pid()))), Errno::EPERM);
        }
        let both = format!("{} {}", own.pid(), roots.pid());
        assert_eq!(errno(write(&pool, both)), Errno::EPERM);
    });
    assert_eq!(mount.read("pools/dataplane/tasks"), "", "if a part is refused, nothing is done");
    as_nobody(|| write(&list, line(&own))).unwrap();
    assert_eq!(held(&mount, "0"), line(&own));
    as_nobody(|| write(&mount.tasks("dataplane", "1"), line(&own))).expect("a move");
    as_nobody(|| write(&pool, format!("-{}", own.pid()))).expect("a release");
    assert_eq!(mount.read("pools/dataplane/tasks"), "");
}

#[test]
fn a_user_releases_only_its_own_claims() {
    let mount = open_to_all();
    let (own, roots) = (sleeper_of_nobody(), Sleeper::new());
    write(&mount.tasks("dataplane", "0"), line(&roots)).unwrap();
    write(&mount.tasks("dataplane", "1"), line(&own)).expect("root may claim for all users");
    as_nobody(|| {
        for file in [mount.pool("dataplane").join("tasks"), mount.tasks("dataplane", "0")] {
            assert_eq!(errno(write(&file, format!("-{}", roots.pid()))), Errno::EPERM);
            assert_eq!(errno(write(&file, format!("-{} -{}", own.pid(), roots.pid()))), Errno::EPERM);
        }
    });
    assert_eq!((held(&mount, "0"), held(&mount, "1")), (line(&roots), line(&own)));
    as_nobody(|| write(&mount.tasks("dataplane", "1"), format!("-{}", own.pid()))).unwrap();
    assert_eq!(held(&mount, "1"), "");
}

#[test]
fn a_set_user_id_program_is_not_its_users_to_pin() {
    let mount = open_to_all();
    let sleep = setuid_root(&mount, "sleep");
    let process = Sleeper::spawn(Command::new(sleep).arg("1000").uid(NOBODY).gid(NOBODY));
    crate::harness::until("it runs with root's rights", || {
        let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
        status.contains(&format!("Uid:\t{NOBODY}\t0\t0\t0"))
    });
    let list = mount.tasks("dataplane", "0");
    assert_eq!(errno(as_nobody(|| write(&list, line(&process)))), Errno::EPERM);
    let opened_by_nobody = as_nobody(|| File::options().write(true).open(&list).unwrap());
    assert_eq!(errno((&opened_by_nobody).write(line(&process).as_bytes())), Errno::EPERM);
    let pin = format!("taskset -p -c 0 {}", process.pid());
    assert_ne!(run(&mut mount.bash_as_nobody(&pin)).2, Some(0), "nor by sched_setaffinity(2)");
    write(&list, line(&process)).expect("root may");
    assert_eq!(held(&mount, "0"), line(&process));
}

#[test]
fn a_file_without_the_right_mode_is_not_opened() {
    let mount = Mount::with_dataplane();
    mount.let_everybody_in();
    let list = mount.tasks("dataplane", "0");
    let task = sleeper_of_nobody();
    assert_eq!(errno(as_nobody(|| write(&list, line(&task)))), Errno::EACCES);
    assert_eq!(as_nobody(|| fs::read_to_string(&list)).unwrap(), "");
    let (_, err, status) = run(&mut mount.bash_as_nobody("echo $$ > $C/pools/dataplane/0/tasks"));
    assert!(err.contains("Permission denied") && status == Some(1), "{err}");
    set_mode(&list, 0o600);
    assert_eq!(errno(as_nobody(|| fs::read_to_string(&list))), Errno::EACCES);
    set_mode(&list, 0o000);
    write(&list, line(&task)).expect("root always may");
}

#[test]
fn chown_chgrp_and_chmod_delegate() {
    let mount = Mount::with_dataplane();
    mount.let_everybody_in();
    let (pool, list_0, list_1) =
        (mount.pool("dataplane").join("tasks"), mount.tasks("dataplane", "0"), mount.tasks("dataplane", "1"));
    mount.sh("chown nobody $C/pools/dataplane/0/tasks; chmod o+w $C/pools/dataplane/1/tasks
        chgrp nogroup $C/pools/dataplane/tasks; chmod g+w $C/pools/dataplane/tasks");
    let check = |when: &str| {
        let attributes = [&list_0, &list_1, &pool].map(|file| {
            let stat = fs::metadata(file).unwrap();
            (stat.uid(), stat.gid(), stat.mode() & 0o7777)
        });
        assert_eq!(attributes, [(NOBODY, 0, 0o644), (0, 0, 0o646), (0, NOBODY, 0o664)], "{when}");
        for (file, list) in [("0/tasks", "0"), ("1/tasks", "1"), ("tasks", "0")] {
            let claim = format!("echo $$ > $C/pools/dataplane/{file} && cat $C/self/claim");
            let (out, err, _) = run(&mut mount.bash_as_nobody(&claim));
            assert_eq!(out, format!("dataplane {list}\n"), "{when}: {file}: {err}");
        }
    };
    check("at once");
    mount.stop();
    mount.start();
    check("after a clean stop");
    mount.kill_daemon();
    mount.start();
    check("after a kill");

    mount.sh("chown root $C/pools/dataplane/0/tasks; chmod o-w $C/pools/dataplane/1/tasks");
    let task = sleeper_of_nobody();
    for file in [&list_0, &list_1] {
        assert_eq!(errno(as_nobody(|| write(file, line(&task)))), Errno::EACCES, "the right is withdrawn");
    }
}

#[test]
fn owner_group_and_mode_of_every_node_are_kept() {
    let mount = Mount::with_dataplane();
    let nodes = |mount: &Mount| {
        let nodes = mount.walk().into_iter();
        nodes.map(|(path, stat)| (path, stat.uid(), stat.gid(), stat.mode() & 0o7777)).collect::<Vec<_>>()
    };
    for (number, (path, ..)) in nodes(&mount).iter().enumerate() {
        let (path, number) = (mount.conf().join(path), number as u32);
        chown(&path, Some(1000 + number), Some(2000 + number)).unwrap();
        set_mode(&path, 0o1700 + number);
    }
    let changed = nodes(&mount);
    for (number, (path, uid, gid, mode)) in changed.iter().enumerate() {
        let number = number as u32;
        assert_eq!((*uid, *gid, *mode), (1000 + number, 2000 + number, 0o1700 + number), "{path}");
    }
    mount.stop();
    mount.start();
    assert_eq!(nodes(&mount), changed, "after a clean stop");
    mount.kill_daemon();
    mount.start();
    assert_eq!(nodes(&mount), changed, "after a kill");
    for (path, ..) in &changed {
        chown(mount.conf().join(path), None, Some(0)).unwrap();
    }
    assert!(nodes(&mount).iter().all(|(_, uid, gid, mode)| *uid >= 1000 && *gid == 0 && *mode >= 0o1700));
}

#[test]
fn neither_an_owner_nor_a_stranger_changes_owner_and_mode() {
    let mount = Mount::with_dataplane();
    mount.let_everybody_in();
    let list = mount.tasks("dataplane", "0");
    let change = |mode| {
        as_nobody(|| {
            nix::sys::stat::fchmodat(
                nix::fcntl::AT_FDCWD,
                &list,
                nix::sys::stat::Mode::from_bits_truncate(mode),
                nix::sys::stat::FchmodatFlags::FollowSymlink,
            )
        })
    };
    assert_eq!(change(0o666), Err(Errno::EPERM));
    assert_eq!(errno(as_nobody(|| chown(&list, Some(NOBODY), None))), Errno::EPERM);
    chown(&list, Some(NOBODY), None).unwrap();
    assert_eq!(change(0o660), Err(Errno::EPERM), "a user to whom root delegates cannot delegate further");
    assert_eq!(errno(as_nobody(|| chown(&list, Some(0), None))), Errno::EPERM);
    assert_eq!(fs::metadata(&list).unwrap().mode() & 0o7777, 0o644);
    set_mode(&list, 0o660);
}

#[test]
fn a_file_opened_by_a_user_gives_root_no_right() {
    let mount = open_to_all();
    let (own, roots) = (sleeper_of_nobody(), Sleeper::new());
    // The setuid program does not know what its standard output is (CVE-2021-4197).
    let cat = setuid_root(&mount, "cat");
    let print = |task: &Sleeper, file: &str| {
        let print = format!("echo {} | {} > $C/pools/dataplane/{file}", task.pid(), cat.display());
        run(&mut mount.bash_as_nobody(&print))
    };
    for file in ["0/tasks", "tasks"] {
        let (_, err, status) = print(&roots, file);
        assert!(err.contains("Operation not permitted") && status == Some(1), "{file}: {err}");
    }
    assert_eq!(mount.read("pools/dataplane/tasks"), "");
    assert_eq!(print(&own, "0/tasks").2, Some(0));
    assert_eq!(held(&mount, "0"), line(&own));

    let file = as_nobody(|| File::options().write(true).open(mount.tasks("dataplane", "1")).unwrap());
    assert_eq!(errno((&file).write(line(&roots).as_bytes())), Errno::EPERM);
    assert_eq!(errno((&file).write(b"0")), Errno::EPERM, "nor for root's own process");
    let file =
        as_nobody(|| File::options().read(true).write(true).open(mount.tasks("dataplane", "1")).unwrap());
    let own_pid = std::process::id().to_string();
    assert_eq!(errno((&file).write(own_pid.as_bytes())), Errno::EPERM, "nor in a rewrite");
    assert_eq!(held(&mount, "1"), "");
}

#[test]
fn a_file_opened_by_root_gives_a_user_no_right() {
    let mount = Mount::with_dataplane();
    mount.let_everybody_in();
    let (own, roots) = (sleeper_of_nobody(), Sleeper::new());
    let print = |text: String| {
        let file = File::options().write(true).open(mount.tasks("dataplane", "0")).unwrap();
        let mut command = mount.bash_as_nobody("echo $0");
        run(command.arg(text).stdout(file))
    };
    for text in [roots.pid().to_string(), format!("-{}", roots.pid())] {
        let (_, err, status) = print(text);
        assert!(err.contains("Operation not permitted") && status == Some(1), "{err}");
    }
    assert_eq!(
        print(own.pid().to_string()).2,
        Some(0),
        "for its own process it may: it was given the open file"
    );
    assert_eq!(held(&mount, "0"), line(&own));
}

#[test]
fn kernel_threads_and_the_daemon_cannot_be_claimed() {
    let mount = open_to_all();
    let parent = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().find_map(|line| line.strip_prefix("PPid:\t")?.parse::<u32>().ok())
    };
    let thread = pids().into_iter().find(|&pid| parent(pid) == Some(2)).expect("a kernel thread");
    let daemons = mount.daemons();
    assert!(!daemons.is_empty());
    for pid in [2, thread].into_iter().chain(daemons) {
        let before = crate::harness::masks(pid);
        for file in [mount.pool("dataplane").join("tasks"), mount.tasks("dataplane", "0")] {
            assert_eq!(errno(write(&file, pid.to_string())), Errno::EINVAL, "{pid}");
            assert_eq!(errno(write(&file, format!("-{pid}"))), Errno::EINVAL, "{pid}");
            assert_eq!(errno(as_nobody(|| write(&file, pid.to_string()))), Errno::EPERM, "{pid}");
        }
        assert_eq!(crate::harness::masks(pid), before);
    }
    assert_eq!(mount.read("pools/dataplane/tasks"), "");
}
