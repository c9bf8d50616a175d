//! The tree: which files exist, who owns them, and how they read.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::{KCM, Machine, Mount, Sleeper, as_nobody, errno, run, text, write};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

/// The text of `tasks` for these PIDs.
fn shown(tasks: &[&Sleeper]) -> String {
    let mut pids: Vec<u32> = tasks.iter().map(|task| task.pid()).collect();
    pids.sort_unstable();
    let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
    if pids.is_empty() { String::new() } else { pids.join(",") + "\n" }
}

fn claim(mount: &Mount, list: &str, task: &Sleeper) {
    write(&mount.tasks("shared", list), task.pid().to_string()).expect("a claim");
}

#[test]
fn every_node_has_its_name_mode_and_owner() {
    let mount = Mount::with_dataplane();
    mount.make_pool("empty", false, &[]);
    let nodes: Vec<String> = mount
        .walk()
        .iter()
        .map(|(path, stat)| {
            let kind = if stat.is_dir() { "directory" } else { "file" };
            format!("{kind} {:04o} {}:{} {path}", stat.mode() & 0o7777, stat.uid(), stat.gid())
        })
        .collect();
    let expected = "
        directory 0755 0:0 
        directory 0755 0:0 info
        file 0600 0:0 info/config
        file 0600 0:0 info/events
        file 0444 0:0 info/metrics
        file 0600 0:0 info/reclaimed
        file 0444 0:0 info/topology
        file 0444 0:0 info/version
        file 0600 0:0 lock
        directory 0755 0:0 pools
        directory 0755 0:0 pools/dataplane
        directory 0755 0:0 pools/dataplane/0
        file 0644 0:0 pools/dataplane/0/state
        file 0644 0:0 pools/dataplane/0/tasks
        directory 0755 0:0 pools/dataplane/1
        file 0644 0:0 pools/dataplane/1/state
        file 0644 0:0 pools/dataplane/1/tasks
        file 0644 0:0 pools/dataplane/exclusive
        file 0644 0:0 pools/dataplane/mode
        file 0644 0:0 pools/dataplane/partial
        file 0644 0:0 pools/dataplane/queue
        file 0644 0:0 pools/dataplane/tasks
        file 0644 0:0 pools/dataplane/transient
        directory 0755 0:0 pools/empty
        file 0644 0:0 pools/empty/exclusive
        file 0644 0:0 pools/empty/mode
        file 0644 0:0 pools/empty/partial
        file 0644 0:0 pools/empty/queue
        file 0644 0:0 pools/empty/tasks
        file 0644 0:0 pools/empty/transient
        directory 0755 0:0 self
        file 0444 0:0 self/claim
        file 0444 0:0 self/cpus
        file 0444 0:0 self/last_error";
    let expected: Vec<&str> = expected.lines().skip(1).map(|line| line.trim_start()).collect();
    assert_eq!(nodes, expected);
}

#[test]
fn below_pools_are_only_pools_and_lists() {
    let mount = Mount::with_shared();
    let found = mount.walk();
    let directories = found.iter().filter(|(_, stat)| stat.is_dir()).filter_map(|(path, stat)| {
        let below = path.strip_prefix("pools/")?;
        // The link count of a directory tells find(1) how many directories are in it.
        Some((below, stat.nlink()))
    });
    assert_eq!(directories.collect::<Vec<_>>(), [("shared", 4), ("shared/0", 2), ("shared/1", 2)]);
}

#[test]
fn every_node_has_its_own_inode_number() {
    let mount = Mount::with_dataplane();
    mount.make_pool("other", false, &[]);
    let found = mount.walk();
    let numbers: BTreeSet<u64> = found.iter().map(|(_, stat)| stat.ino()).collect();
    assert_eq!(numbers.len(), found.len());
}

#[test]
fn stat_shows_the_true_size() {
    let mount = Mount::with_shared();
    let task = Sleeper::new();
    claim(&mount, "0", &task);
    let _ = write(&mount.tasks("shared", "0"), "nonsense");
    for (path, _) in mount.walk().iter().filter(|(_, stat)| stat.is_file()) {
        let is_costly = path == "info/metrics";
        let expected = if is_costly { 4096 } else { mount.read(path).len() as u64 };
        assert_eq!(fs::metadata(mount.conf().join(path)).unwrap().len(), expected, "{path}");
    }
}

#[test]
fn tasks_are_ascending_with_commas_and_a_newline() {
    let mount = Mount::with_shared();
    let (a, b, c) = (Sleeper::new(), Sleeper::new(), Sleeper::new());
    let check = |on_0: &[&Sleeper], on_1: &[&Sleeper]| {
        let all: Vec<&Sleeper> = [on_0, on_1].concat();
        for (file, tasks) in
            [("pools/shared/0/tasks", on_0), ("pools/shared/1/tasks", on_1), ("pools/shared/tasks", &all)]
        {
            let size = fs::metadata(mount.conf().join(file)).unwrap().len();
            assert_eq!(size, shown(tasks).len() as u64, "the size comes first: {file}");
            assert_eq!(mount.read(file), shown(tasks), "{file}");
        }
    };
    check(&[], &[]);
    claim(&mount, "0", &c);
    check(&[&c], &[]);
    claim(&mount, "1", &a);
    claim(&mount, "0", &b);
    check(&[&b, &c], &[&a]);
    claim(&mount, "1", &c);
    check(&[&b], &[&a, &c]);
    c.end();
    check(&[&b], &[&a]);
    a.end();
    b.end();
    check(&[], &[]);
}

#[test]
fn test_s_shows_if_a_list_is_taken() {
    let mount = Mount::with_dataplane();
    let ask = "test -s $C/pools/dataplane/0/tasks && echo taken || echo free";
    assert_eq!(mount.sh(ask), "free\n");
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    assert_eq!(mount.sh(ask), "taken\n");
    assert_eq!(mount.sh(&ask.replace("/0/", "/1/")), "free\n");
    task.end();
    assert_eq!(mount.sh(ask), "free\n", "the death was not seen before");
}

#[test]
fn exclusive_reads_as_0_or_1_with_a_newline() {
    let mount = Mount::with_shared();
    let file = mount.pool("shared").join("exclusive");
    for (line, content) in
        [("echo 1 >", "1\n"), ("echo 0 >>", "0\n"), ("printf 1 >", "1\n"), ("echo 0 >", "0\n")]
    {
        mount.sh(&format!("{line} $C/pools/shared/exclusive"));
        assert_eq!(fs::metadata(&file).unwrap().len(), 2, "{line}");
        assert_eq!(fs::read_to_string(&file).unwrap(), content, "{line}");
    }
}

#[test]
fn state_says_what_keeps_others_off_a_list_and_which_cpus_are_offline() {
    let mount =
        Mount::on_machine(&Machine { offline: vec![3], cmdline: "isolcpus=1", ..Machine::new(1, 4, 1) });
    mount.make_pool("shared", false, &["0", "1", "2-3"]);
    let state = |list: &str| mount.read(&format!("pools/shared/{list}/state"));
    assert_eq!(["0", "1", "2-3"].map(state), ["free\n", "free\n", "free offline=3\n"]);
    let (task, other) = (Sleeper::new(), Sleeper::new());
    claim(&mount, "0", &task);
    claim(&mount, "1", &other);
    assert_eq!(["0", "1"].map(state), ["affinity\n", "boot\n"]);
    task.end();
    assert_eq!(state("0"), "free\n");
    assert_eq!(errno(write(&mount.pool("shared").join("1/state"), "free")), Errno::EINVAL);
}

#[test]
fn lock_is_empty_and_can_be_locked() {
    let mount = Mount::new();
    assert_eq!(mount.read("lock"), "");
    let open = || File::options().read(true).write(true).open(mount.conf().join("lock")).unwrap();
    let first = Flock::lock(open(), FlockArg::LockExclusiveNonblock).unwrap();
    let (_, refused) = Flock::lock(open(), FlockArg::LockExclusiveNonblock).unwrap_err();
    assert_eq!(refused, Errno::EWOULDBLOCK);
    assert_eq!(mount.bash("flock --nonblock $C/lock true").status().unwrap().code(), Some(1));
    drop(first);
    assert_eq!(mount.sh("flock --nonblock $C/lock echo mine"), "mine\n");
    assert_eq!(errno(open().write(b"x")), Errno::EINVAL);
    mount.let_everybody_in();
    let refused = as_nobody(|| File::open(mount.conf().join("lock")).map(|_| ()));
    assert_eq!(errno(refused), Errno::EACCES, "otherwise any user could block the legacy programs");
}

#[test]
fn version_is_the_programs() {
    let mount = Mount::new();
    let program = run(std::process::Command::new(KCM).arg("--version")).0;
    assert_eq!(format!("kcm {}", mount.read("info/version")), program);
}

#[test]
fn topology_has_sockets_cores_cpus_and_nodes() {
    let machine =
        Machine { offline: vec![7], cmdline: "quiet isolcpus=1,4-5 nosmt", ..Machine::new(2, 2, 2) };
    let mount = Mount::on_machine(&machine);
    let cpu = |id: u32, isolated: bool| json!({ "id": id, "isolated": isolated, "node": id % 4 / 2 });
    let expected = json!({
        "sockets": {
            "0": { "id": 0, "cores": [
                { "id": 0, "cpus": [cpu(0, false), cpu(4, true)] },
                { "id": 1, "cpus": [cpu(1, true), cpu(5, true)] },
            ]},
            "1": { "id": 1, "cores": [
                { "id": 2, "cpus": [cpu(2, false), cpu(6, false)] },
                { "id": 3, "cpus": [cpu(3, false)] },
            ]},
        },
        "online": "0-6",
        "offline": "7",
    });
    let text = mount.read("info/topology");
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), expected);
    assert!(text.ends_with("}\n"), "{text}");
}

#[test]
fn the_topology_is_that_of_now() {
    let mut machine = Machine::new(1, 2, 1);
    let mount = Mount::on_machine(&machine);
    let lists = || -> (Value, Value) {
        let text = mount.read("info/topology");
        let value: Value = serde_json::from_str(&text).unwrap();
        (value["online"].clone(), value["offline"].clone())
    };
    assert_eq!(lists(), (json!("0-1"), json!("")));
    mount.make_pool("p", false, &[]);
    let list = mount.pool("p").join("3");
    assert_eq!(errno(fs::create_dir(&list)), Errno::EINVAL);
    machine.offline = vec![1];
    machine.write(&mount.home().join("machine"));
    assert_eq!(lists(), (json!("0"), json!("1")));
    // CPUs are added.
    Machine::new(1, 4, 1).write(&mount.home().join("machine"));
    fs::create_dir(&list).expect("a list of a CPU that was added");
    mount.replace_worker();
    assert_eq!(lists(), (json!("0-3"), json!("")));
}

#[test]
fn a_list_with_an_old_name_is_a_new_node() {
    let mount = Mount::with_dataplane();
    let list = mount.pool("dataplane").join("0");
    let tasks = mount.tasks("dataplane", "0");
    let task = Sleeper::new();
    std::os::unix::fs::chown(&tasks, Some(crate::harness::NOBODY), None).unwrap();
    crate::harness::set_mode(&tasks, 0o606);
    let mut open = File::options().read(true).write(true).open(&tasks).unwrap();
    let old = fs::metadata(&tasks).unwrap();
    fs::remove_dir(&list).unwrap();
    assert!(!list.exists());
    fs::create_dir(&list).unwrap();
    let new = fs::metadata(&tasks).unwrap();
    assert_ne!(new.ino(), old.ino());
    assert_eq!((new.uid(), new.mode() & 0o7777), (0, 0o644), "no right of the old list is left");

    write(&tasks, task.pid().to_string()).unwrap();
    assert_eq!(errno(open.read(&mut [0; 10])), Errno::ENODEV);
    assert_eq!(errno(open.write(b"0")), Errno::ENODEV);
    assert_eq!(mount.read("pools/dataplane/0/tasks"), shown(&[&task]), "the new list is another file");
}

#[test]
fn a_pool_with_an_old_name_is_a_new_node() {
    let mount = Mount::new();
    mount.make_pool("pool", true, &[]);
    let mut flag = File::options().read(true).write(true).open(mount.pool("pool").join("exclusive")).unwrap();
    fs::remove_dir(mount.pool("pool")).unwrap();
    fs::create_dir(mount.pool("pool")).unwrap();
    assert_eq!(mount.read("pools/pool/exclusive"), "0\n");
    assert_eq!(errno(flag.read(&mut [0; 10])), Errno::ENODEV);
    assert_eq!(errno(flag.write(b"1")), Errno::ENODEV);
    assert_eq!(mount.read("pools/pool/exclusive"), "0\n");
}

#[test]
fn names_are_right_while_they_come_and_go() {
    let mount = Mount::with_dataplane();
    let list = mount.pool("dataplane").join("1");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    match fs::read(list.join("tasks")) {
                        Ok(content) => assert_eq!(text(&content), ""),
                        // It was removed before the lookup, between open(2) and read(2), or before the kernel's
                        // second lookup.
                        Err(error) => {
                            let errno = Errno::from_raw(error.raw_os_error().unwrap());
                            assert!(
                                matches!(errno, Errno::ENOENT | Errno::ENODEV | Errno::ESTALE),
                                "{errno}"
                            );
                        }
                    }
                }
            });
        }
        for _ in 0..100 {
            fs::remove_dir(&list).unwrap();
            assert!(!list.exists());
            fs::create_dir(&list).unwrap();
            assert_eq!(fs::read_to_string(list.join("tasks")).unwrap(), "");
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_thousand_lists_are_listed_once_each() {
    // In memory, because each mkdir is synced to disk.
    let mount = Mount::not_mounted_in(Path::new("/dev/shm"));
    mount.start_on(&Machine::new(2, 256, 2));
    let names: BTreeSet<String> = (0..1000).map(|cpu| cpu.to_string()).collect();
    fs::create_dir(mount.pool("big")).unwrap();
    for name in &names {
        fs::create_dir(mount.pool("big").join(name)).unwrap();
    }
    let listing = |pool: &Path| {
        let entries = fs::read_dir(pool).unwrap().map(|entry| entry.unwrap());
        let lists = entries.filter(|entry| entry.file_type().unwrap().is_dir());
        lists.map(|entry| entry.file_name().into_string().unwrap()).collect::<Vec<_>>()
    };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                fs::create_dir(mount.pool("big").join("1001-1023")).unwrap();
                fs::remove_dir(mount.pool("big").join("1001-1023")).unwrap();
            }
        });
        for _ in 0..5 {
            let mut lists = listing(&mount.pool("big"));
            lists.retain(|list| list != "1001-1023");
            assert_eq!(lists.len(), 1000);
            assert_eq!(lists.into_iter().collect::<BTreeSet<_>>(), names);
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(fs::metadata(mount.pool("big")).unwrap().nlink(), 1002);
}

#[test]
fn without_a_daemon_nothing_can_be_written() {
    let mount = Mount::with_dataplane();
    mount.stop();
    for words in [
        &["init"][..],
        &["describe"],
        &["isolate", "--pool=dataplane", "touch", "--", "$C/started"],
        &["isolate", "--pool=dataplane", "--", "true"],
    ] {
        let (out, err, status) = run(&mut mount.kcm(words));
        assert_eq!((&*out, status), ("", Some(1)), "{words:?}");
        let errors: Vec<&str> = err.lines().filter(|line| line.starts_with("ERROR:")).collect();
        assert!(errors.len() == 1 && errors[0].contains("kcm mount is not running; "), "{words:?}: {err}");
    }
    assert_eq!(fs::read_dir(mount.conf()).unwrap().count(), 0);
    mount.start();
    assert_eq!(mount.read("pools/dataplane/exclusive"), "1\n");
}
