//! Legacy programs write a whole list back: only the writer's own PID in it has a meaning.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::Path;

use super::rewriter::Client;
use crate::harness::pid_namespace::PidNamespace;
use crate::harness::program;
use crate::harness::{
    Mount, NOBODY, Sleeper, errno, free, held, masks, set_mode, sleeper_of_nobody, until, write,
};
use nix::errno::Errno;

pub fn client_of_nobody() {
    nix::unistd::setgid(NOBODY.into()).unwrap();
    nix::unistd::setuid(NOBODY.into()).unwrap();
    super::rewriter::client();
}

fn sorted<const N: usize>(mut pids: [u32; N]) -> [u32; N] {
    pids.sort_unstable();
    pids
}

/// A task that another process has put on the list.
fn task_on(list: &Path) -> Sleeper {
    let task = Sleeper::new();
    write(list, task.pid().to_string()).unwrap();
    task
}

#[test]
fn a_client_joins_and_leaves_alone() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "1");
    let mut client = Client::new();
    assert_eq!(client.read(&list), [0_u32; 0]);
    client.join(&list).unwrap();
    assert_eq!((held(&list), masks(client.pid)[0].as_str()), (vec![client.pid], "1"));
    assert!(masks(client.pid).iter().all(|mask| mask == "1"));
    assert_eq!(client.read(&list), [client.pid]);
    client.leave(&list).expect("it opens the file and writes nothing");
    assert_eq!(held(&list), [client.pid], "nothing was written");
    let pid = client.pid;
    client.program.end();
    assert_eq!(held(&list), [0_u32; 0], "it has ended, which is also a release");
    assert_eq!(mount.events().pop().unwrap().1, pid);
}

#[test]
fn leaving_others_behind_restores_the_mask() {
    let mount = Mount::with_shared();
    let list = mount.tasks("shared", "0");
    let other = task_on(&list);
    let mut client = Client::new();
    client.read(&list);
    client.join(&list).unwrap();
    assert_eq!(held(&list), sorted([client.pid, other.pid()]));
    client.read(&list);
    client.leave(&list).unwrap();
    assert_eq!(held(&list), [other.pid()]);
    assert!(masks(client.pid).iter().all(|mask| *mask == free()));
    assert_eq!(masks(other.pid()), ["0"]);
    client.leave(&list).expect("its PID is not there, which is allowed");
    assert_eq!(held(&list), [other.pid()]);
}

#[test]
fn two_clients_do_not_overwrite_each_other() {
    let mount = Mount::with_shared();
    let list = mount.tasks("shared", "0");
    let other = task_on(&list);
    let (mut a, mut b) = (Client::new(), Client::new());
    let pids = [a.pid, b.pid, other.pid()];
    // Both have read the same list before either writes.
    a.read(&list);
    b.read(&list);
    a.join(&list).unwrap();
    b.join(&list).unwrap();
    assert_eq!(held(&list), sorted(pids));
    // Both have read the full list before either leaves.
    a.read(&list);
    b.read(&list);
    a.leave(&list).unwrap();
    assert_eq!(held(&list), sorted([b.pid, other.pid()]));
    b.leave(&list).expect("it names the task that has left");
    assert_eq!(held(&list), [other.pid()]);
    // One leaves while the other comes.
    a.read(&list);
    a.join(&list).unwrap();
    b.read(&list);
    a.read(&list);
    a.leave(&list).unwrap();
    b.join(&list).unwrap();
    assert_eq!(held(&list), sorted([b.pid, other.pid()]));
    assert!(masks(a.pid).iter().all(|mask| *mask == free()), "its mask was not restored");
}

#[test]
fn a_dead_pid_in_the_list_is_harmless() {
    let mount = Mount::with_shared();
    let list = mount.tasks("shared", "0");
    let stays = task_on(&list);
    let mut client = Client::new();
    for collected in [true, false] {
        for leaves in [false, true] {
            let other = task_on(&list);
            client.read(&list);
            if leaves {
                client.join(&list).unwrap();
                client.read(&list);
            }
            let mut kept = None;
            if collected {
                other.end();
            } else {
                let pid = nix::unistd::Pid::from_raw(other.pid() as i32);
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
                until("it has died", || crate::harness::has_died(other.pid()));
                kept = Some(other);
            }
            if leaves {
                client.leave(&list).unwrap();
                assert_eq!(held(&list), [stays.pid()]);
            } else {
                client.join(&list).unwrap();
                assert_eq!(held(&list), sorted([stays.pid(), client.pid]));
            }
            drop(kept);
        }
    }
}

#[test]
fn a_moved_pid_in_the_list_is_harmless() {
    let mount = Mount::with_shared();
    let [list, elsewhere] = ["0", "1"].map(|list| mount.tasks("shared", list));
    let (mut client, other, stays) = (Client::new(), task_on(&list), task_on(&list));
    client.read(&list);
    write(&elsewhere, other.pid().to_string()).unwrap();
    client.join(&list).unwrap();
    assert_eq!(
        (held(&list), held(&elsewhere)),
        (sorted([stays.pid(), client.pid]).into(), vec![other.pid()])
    );
    assert_eq!(masks(other.pid()), ["1"]);
    write(&list, other.pid().to_string()).unwrap();
    client.read(&list);
    write(&elsewhere, other.pid().to_string()).unwrap();
    client.leave(&list).unwrap();
    assert_eq!((held(&list), held(&elsewhere)), (vec![stays.pid()], vec![other.pid()]));
    assert_eq!(masks(other.pid()), ["1"]);
}

#[test]
fn a_reused_pid_in_the_list_is_harmless() {
    let mut inside = PidNamespace::new("shared", false);
    // The shell does what the client does; it is process 1.
    let rewrite = |list: &str| format!("exec 3<>$P/0/tasks; printf %s {list} >&3 && echo ok; exec 3>&-");
    let other = inside.sleeper();
    let full = inside.mask(other);
    inside.shell.ask(&format!("echo {other} > $P/0/tasks"));
    assert_eq!(inside.read("pools/shared/0/tasks"), other.to_string());
    inside.kill(other);
    inside.sleeper_with(other);
    assert_eq!(inside.shell.ask(&rewrite(&format!("{other},1"))).trim(), "ok");
    assert_eq!(inside.read("pools/shared/0/tasks"), "1");
    assert_eq!(inside.mask(other), full, "the mask of the stranger has not changed");
    assert_eq!(inside.mask(1), "0");

    inside.shell.ask(&format!("echo {other} > $P/0/tasks"));
    assert_eq!(inside.read("pools/shared/0/tasks"), format!("1,{other}"));
    inside.kill(other);
    inside.sleeper_with(other);
    inside.shell.ask(&format!("taskset -pc {full} {other}"));
    assert_eq!(inside.shell.ask(&rewrite(&other.to_string())).trim(), "ok");
    assert_eq!(inside.read("pools/shared/0/tasks"), "");
    assert_eq!((inside.mask(other), inside.mask(1)), (full.clone(), full));
}

#[test]
fn the_second_client_on_an_exclusive_list_is_refused() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let (mut first, mut second) = (Client::new(), Client::new());
    // Both have read that the list is free.
    first.read(&list);
    second.read(&list);
    first.join(&list).unwrap();
    assert_eq!(errno(second.join(&list)), Errno::EBUSY);
    // It has read the PID of the other one.
    assert_eq!(second.read(&list), [first.pid]);
    assert_eq!(errno(second.join(&list)), Errno::EBUSY);
    assert_eq!(held(&list), [first.pid]);
    assert!(masks(first.pid).iter().all(|mask| mask == "0"));
    assert!(masks(second.pid).iter().all(|mask| *mask == free()), "the loser keeps its mask");
    // It leaves all the same.
    second.leave(&list).unwrap();
    assert_eq!(held(&list), [first.pid]);
    first.program.end();
    second.read(&list);
    second.join(&list).unwrap();
    assert_eq!(held(&list), [second.pid]);
}

#[test]
fn legacy_and_new_clients_refuse_each_other() {
    let mount = Mount::with_dataplane();
    let [list_0, list_1] = ["0", "1"].map(|list| mount.tasks("dataplane", list));
    let mut client = Client::new();
    client.read(&list_0);
    let other = task_on(&list_0);
    assert_eq!(errno(client.join(&list_0)), Errno::EBUSY, "a claim does not need the lock");
    client.read(&list_1);
    client.join(&list_1).unwrap();
    assert_eq!(errno(write(&list_1, other.pid().to_string())), Errno::EBUSY);
    assert_eq!((held(&list_0), held(&list_1)), (vec![other.pid()], vec![client.pid]));
}

#[test]
fn a_client_leaves_only_the_list_that_it_writes() {
    let mount = Mount::with_shared();
    let [list_0, list_1] = ["0", "1"].map(|list| mount.tasks("shared", list));
    let (_a, _b) = (task_on(&list_0), task_on(&list_1));
    let on = |list: &Path, client: &Client| held(list).contains(&client.pid);
    let mut client = Client::new();
    client.read(&list_0);
    client.join(&list_0).unwrap();
    client.read(&list_1);
    client.leave(&list_1).expect("it is not on this list");
    assert!(on(&list_0, &client) && !on(&list_1, &client));
    client.join(&list_1).unwrap();
    assert!(!on(&list_0, &client) && on(&list_1, &client), "a move");
    assert!(masks(client.pid).iter().all(|mask| mask == "1"));
    client.read(&list_0);
    client.leave(&list_0).unwrap();
    assert!(on(&list_1, &client));
}

#[test]
fn no_stranger_in_the_list_is_pinned() {
    let mount = Mount::with_shared();
    let list = mount.tasks("shared", "0");
    let (stranger, anothers) = (Sleeper::new(), sleeper_of_nobody());
    let daemon = mount.daemons()[0];
    let before = masks(daemon);
    let own = std::process::id();
    let names = format!("1,2,{daemon},{},{},2147483647", stranger.pid(), anothers.pid());
    let mut file = File::options().read(true).write(true).open(&list).unwrap();
    // Without the writer's PID the list says that the writer has left.
    file.write_all(names.as_bytes()).expect("other PIDs are allowed");
    assert_eq!(held(&list), [0_u32; 0]);
    let mut client = Client::new();
    // The client has read all of these PIDs, when they belonged to other processes.
    client.program.say(&format!("read {}", written(&mount, &names).display()));
    client.program.hear();
    client.join(&list).unwrap();
    assert_eq!(held(&list), [client.pid]);
    client.leave(&list).unwrap();
    assert_eq!(held(&list), [0_u32; 0]);
    assert_eq!((masks(stranger.pid()), masks(anothers.pid())), (vec![free()], vec![free()]));
    assert_eq!(masks(daemon), before);
    assert_eq!(masks(own)[0], free());
}

/// A plain file.
fn written(mount: &Mount, text: &str) -> std::path::PathBuf {
    let file = mount.home().join("list");
    fs::write(&file, text).unwrap();
    file
}

#[test]
fn a_writer_not_in_the_list_removes_nobody() {
    let mount = Mount::with_shared();
    let list = mount.tasks("shared", "0");
    let (a, b) = (task_on(&list), task_on(&list));
    let mut reconcile = Client::new();
    reconcile.read(&written(&mount, &a.pid().to_string()));
    reconcile.leave(&list).unwrap();
    assert_eq!(held(&list), sorted([a.pid(), b.pid()]));
    // The truncation does not either, with or without a write after it.
    drop(OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&list).unwrap());
    assert_eq!(held(&list), sorted([a.pid(), b.pid()]));
}

#[test]
fn a_client_needs_no_right_over_the_others() {
    let mount = Mount::with_shared();
    mount.let_everybody_in();
    let list = mount.tasks("shared", "0");
    set_mode(&list, 0o666);
    let roots = task_on(&list);
    let mut client = Client::from(&mut program::command(&[], "client-of-nobody"));
    assert_eq!(client.read(&list), [roots.pid()]);
    client.join(&list).unwrap();
    assert_eq!(held(&list), sorted([roots.pid(), client.pid]));
    client.read(&list);
    client.leave(&list).unwrap();
    assert_eq!(held(&list), [roots.pid()]);
}

#[test]
fn in_a_container_host_pids_work() {
    let mount = Mount::with_shared();
    let list = mount.tasks("shared", "0");
    let other = task_on(&list);
    // /proc shows the host's processes, as in legacy containers.
    let mut client = Client::start(&["unshare", "--pid", "--fork", "--kill-child"]);
    assert_ne!(client.pid, 1);
    client.read(&list);
    client.join(&list).unwrap();
    assert_eq!(held(&list), sorted([other.pid(), client.pid]));
    assert!(masks(client.pid).iter().all(|mask| mask == "0"));
    client.read(&list);
    client.leave(&list).unwrap();
    assert_eq!(held(&list), [other.pid()]);
    assert!(masks(client.pid).iter().all(|mask| *mask == free()));
}

#[test]
fn in_a_container_inner_pids_mean_nothing() {
    let mount = Mount::with_shared();
    let list = mount.tasks("shared", "0");
    let other = task_on(&list);
    let first = masks(1);
    // Its own PID is 1, and so is the PID of a process outside.
    let mut client = Client::start(&["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]);
    assert_eq!(client.pid, 1);
    client.read(&list);
    client.join(&list).expect("it has not named itself, so it is not there");
    assert_eq!(held(&list), [other.pid()]);
    assert_eq!(masks(1), first);
    // A process inside that has the PID of one outside.
    let mut shell = mount.container();
    let inner = "echo $(($N - 1)) > /proc/sys/kernel/ns_last_pid; sleep 1000 >/dev/null & echo $!";
    let inner = shell.ask(&inner.replace("$N", &other.pid().to_string()));
    assert_eq!(inner.trim(), other.pid().to_string());
    shell.ask(&format!("exec 3<>$C/pools/shared/0/tasks; printf %s {} >&3; exec 3>&-", other.pid()));
    assert_eq!(held(&list), [other.pid()]);
    let bash = crate::harness::children(shell.pid())[0];
    let inner = *crate::harness::children(bash).last().unwrap();
    assert_eq!((masks(inner), masks(bash)), (vec![free()], vec![free()]));
}

#[test]
fn other_texts_are_commands_in_read_write_files() {
    let mount = Mount::with_shared();
    let list = mount.tasks("shared", "0");
    let (a, b) = (Sleeper::new(), Sleeper::new());
    let write = |text: String| {
        let mut file = File::options().read(true).write(true).open(&list).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    };
    write(format!("{}\n", a.pid()));
    assert_eq!(held(&list), [a.pid()], "white space");
    write(format!("-{}", a.pid()));
    assert_eq!(held(&list), [0_u32; 0], "a release");
    write(format!("{},-{}", b.pid(), a.pid()));
    assert_eq!(held(&list), [b.pid()]);
    write(b.pid().to_string());
    assert_eq!(held(&list), [b.pid()], "a rewrite without the writer");
    crate::harness::write(&list, format!("{},{}", a.pid(), b.pid())).unwrap();
    assert_eq!(held(&list), sorted([a.pid(), b.pid()]), "a list through a file for writing");
    let mut client = Client::new();
    client.read(&written(&mount, "0"));
    client.join(&list).unwrap();
    assert!(held(&list).contains(&client.pid), "0 names the writer");
}
