//! Only root creates, changes and removes pools, CPU lists and the exclusive flag.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::Path;
use std::time::Instant;

use crate::harness::{
    Machine, Mount, NOBODY, Sleeper, TIMEOUT, as_nobody, errno, missing_for_isolation, set_mode, write,
};
use nix::errno::Errno;

/// The message of the last refusal, without time and PID.
fn reason(mount: &Mount) -> String {
    let line = mount.read("self/last_error");
    line.splitn(3, ' ').nth(2).unwrap_or_else(|| panic!("{line:?}")).trim_end().to_owned()
}

/// The configuration as nodes: every node with its inode number, owner and mode.
fn configuration(mount: &Mount) -> Vec<(String, u64, u32, u32, u32)> {
    let nodes = mount.walk().into_iter().filter(|(path, _)| path.starts_with("pools"));
    nodes.map(|(path, stat)| (path, stat.ino(), stat.uid(), stat.gid(), stat.mode())).collect()
}

#[test]
fn a_pool_name_is_valid_in_kubernetes() {
    let mount = Mount::new();
    for good in ["a", "0", "dataplane", "a-b", "a--b", "0-4294967295", &"x".repeat(63)] {
        fs::create_dir(mount.pool(good)).unwrap_or_else(|error| panic!("{good}: {error}"));
        assert_eq!(mount.read(&format!("pools/{good}/exclusive")), "0\n");
        assert_eq!(mount.read(&format!("pools/{good}/tasks")), "");
        assert_eq!(fs::read_dir(mount.pool(good)).unwrap().count(), 6);
        assert_eq!(errno(fs::create_dir(mount.pool(good))), Errno::EEXIST);
    }
    for bad in ["-", "-a", "a-", "A", "a_b", "a.b", "a b", "ä", "a\n", "...", &"x".repeat(64)] {
        assert_eq!(errno(fs::create_dir(mount.pool(bad))), Errno::EINVAL, "{bad:?}");
        let expected = "EINVAL: a pool name is 1 to 63 of a-z, 0-9 and -, and neither begins nor ends with -; \
            choose another name";
        assert_eq!(reason(&mount), expected);
    }
    assert_eq!(fs::read_dir(mount.conf().join("pools")).unwrap().count(), 7);
}

#[test]
fn a_list_has_cpus_of_the_machine_and_keeps_its_name() {
    let mount = Mount::on_machine(&Machine { offline: vec![3], ..Machine::new(1, 4, 2) });
    mount.make_pool("pool", false, &[]);
    for name in ["1,0", "3", "4-4", "005", "7,6"] {
        fs::create_dir(mount.pool("pool").join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(mount.read(&format!("pools/pool/{name}/tasks")), "");
        assert_eq!(fs::read_dir(mount.pool("pool").join(name)).unwrap().count(), 2);
    }
    let entries = fs::read_dir(mount.pool("pool")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<OsString> = entries.collect();
    names.sort();
    assert_eq!(
        names,
        ["005", "1,0", "3", "4-4", "7,6", "exclusive", "mode", "partial", "queue", "tasks", "transient"]
    );
    assert_eq!(fs::read_dir(mount.pool("pool")).unwrap().count(), 11);
    assert_eq!(
        errno(fs::metadata(mount.pool("pool").join("0-1"))),
        Errno::ENOENT,
        "no other spelling is accepted"
    );

    for (name, why) in [
        ("a", "not a CPU list: \"a\" is neither a number nor a range; write it like 0-2,8-10"),
        (",", "not a CPU list: an empty part; write it like 0-2,8-10"),
        ("2,", "not a CPU list: an empty part; write it like 0-2,8-10"),
        ("2-", "not a CPU list: \"2-\" is neither a number nor a range; write it like 0-2,8-10"),
        ("-2", "not a CPU list: \"-2\" is neither a number nor a range; write it like 0-2,8-10"),
        ("2 ", "not a CPU list: \"2 \" is neither a number nor a range; write it like 0-2,8-10"),
        ("0x2", "not a CPU list: \"0x2\" is neither a number nor a range; write it like 0-2,8-10"),
        ("7-2", "not a CPU list: the range 7-2 runs backwards; write it like 0-2,8-10"),
        ("0-4294967295", "not a CPU list: no CPU has a number above 8191; write it like 0-2,8-10"),
        ("99999999999999999999", "not a CPU list: no CPU has a number above 8191; write it like 0-2,8-10"),
        ("8", "this machine does not have CPU 8, it has 0-7; choose among those"),
        ("2,8-9", "this machine does not have CPU 8-9, it has 0-7; choose among those"),
    ] {
        assert_eq!(errno(fs::create_dir(mount.pool("pool").join(name))), Errno::EINVAL, "{name:?}");
        assert_eq!(reason(&mount), format!("EINVAL: {why}"), "{name:?}");
    }
}

#[test]
fn lists_of_all_pools_are_disjoint() {
    let mount = Mount::on_machine(&Machine::new(1, 8, 1));
    mount.make_pool("a", false, &["2-4"]);
    mount.make_pool("b", true, &["7"]);
    for (list, both, other) in
        [("4", "4", "a 2-4"), ("0-7", "2-4", "a 2-4"), ("2,3,4", "2-4", "a 2-4"), ("5,7", "7", "b 7")]
    {
        for pool in ["a", "b"] {
            assert_eq!(errno(fs::create_dir(mount.pool(pool).join(list))), Errno::EBUSY, "{pool} {list}");
            let expected = format!("EBUSY: CPU {both} is in {other} already; remove that list first");
            assert_eq!(reason(&mount), expected, "{pool} {list}");
        }
    }
    assert_eq!(errno(fs::create_dir(mount.pool("a").join("2-4"))), Errno::EEXIST);
    assert_eq!(errno(fs::create_dir(mount.pool("b").join("2-4"))), Errno::EBUSY);
    fs::remove_dir(mount.pool("a").join("2-4")).unwrap();
    fs::create_dir(mount.pool("b").join("2-4")).unwrap();
}

#[test]
fn new_nodes_have_the_default_mode() {
    let mount = Mount::new();
    mount.sh("umask 077; mkdir $C/pools/a $C/pools/a/0");
    fs::DirBuilder::new().mode(0o1777).create(mount.pool("b")).unwrap();
    for (path, mode) in
        [("a", 0o755), ("a/0", 0o755), ("a/0/tasks", 0o644), ("a/exclusive", 0o644), ("b", 0o755)]
    {
        assert_eq!(fs::metadata(mount.pool(path)).unwrap().mode() & 0o7777, mode, "{path}");
    }
}

#[test]
fn nothing_is_made_or_removed_elsewhere() {
    let mount = Mount::with_dataplane();
    for path in ["new", "self/new", "info/new", "pools/dataplane/0/new", "pools/dataplane/0/1"] {
        assert_eq!(errno(fs::create_dir(mount.conf().join(path))), Errno::EPERM, "{path}");
    }
    for path in ["pools", "self", "info"] {
        assert_eq!(errno(fs::remove_dir(mount.conf().join(path))), Errno::EPERM, "{path}");
    }
    assert_eq!(errno(fs::remove_dir(mount.tasks("dataplane", "0"))), Errno::ENOTDIR);
    assert_eq!(errno(fs::remove_dir(mount.pool("none"))), Errno::ENOENT);
    assert_eq!(errno(fs::remove_dir(mount.pool("dataplane").join("none"))), Errno::ENOENT);
    assert_eq!(errno(fs::create_dir(mount.pool("none").join("0"))), Errno::ENOENT);
    assert_eq!(errno(fs::create_dir(mount.pool("dataplane").join("tasks"))), Errno::EEXIST);
}

#[test]
fn lists_with_tasks_and_pools_with_lists_stay() {
    let mount = Mount::with_dataplane();
    let list = mount.pool("dataplane").join("0");
    let task = Sleeper::new();
    write(&list.join("tasks"), task.pid().to_string()).unwrap();
    assert_eq!(errno(fs::remove_dir(&list)), Errno::EBUSY);
    let expected =
        format!("EBUSY: dataplane 0 has live tasks, one is {} (sleep); release them first", task.pid());
    assert_eq!(reason(&mount), expected);
    assert_eq!(mount.read("pools/dataplane/0/tasks"), format!("{}\n", task.pid()));
    task.end();
    fs::remove_dir(&list).expect("dead tasks hold nothing, even before a read");
    assert_eq!(errno(fs::remove_dir(mount.pool("dataplane"))), Errno::ENOTEMPTY);
    assert_eq!(reason(&mount), "ENOTEMPTY: dataplane has CPU lists; remove them first");
    fs::remove_dir(mount.pool("dataplane").join("1")).unwrap();
    fs::remove_dir(mount.pool("dataplane")).unwrap();
    assert_eq!(fs::read_dir(mount.conf().join("pools")).unwrap().count(), 0);
}

#[test]
fn exclusive_and_partial_take_only_0_or_1() {
    let mount = Mount::with_shared();
    for name in ["exclusive", "partial", "transient"] {
        let flag = mount.pool("shared").join(name);
        assert_eq!(fs::read_to_string(&flag).unwrap(), "0\n");
        for good in ["1", "0", "1\n", "0\n", " 1 \n"] {
            write(&flag, good).unwrap();
            assert_eq!(fs::read_to_string(&flag).unwrap().trim(), good.trim(), "{good:?}");
        }
        let long = "1".repeat(5000);
        for bad in ["2", "-1", "01", "1 1", "10", "yes", "true", "\n", " ", "\0", &long] {
            assert_eq!(errno(write(&flag, bad)), Errno::EINVAL, "{bad:?}");
            assert_eq!(reason(&mount), "EINVAL: not 0 or 1; write one of them", "{bad:?}");
        }
        assert_eq!(fs::read_to_string(&flag).unwrap(), "1\n");
    }
}

#[test]
fn a_machine_that_cannot_isolate_says_why() {
    let mount = Mount::new();
    mount.make_pool("pool", true, &["0"]);
    let pool = mount.pool("pool");
    let mode = pool.join("mode");
    assert_eq!(fs::read_to_string(&mode).unwrap(), "affinity\n");
    for good in ["affinity", " affinity\n"] {
        write(&mode, good).unwrap();
    }
    for bad in ["isolate", "1", " ", "affinity isolated", "\0"] {
        let written = write(&mode, bad);
        assert_eq!(errno(written), Errno::EINVAL, "{bad:?}");
        assert_eq!(reason(&mount), "EINVAL: not affinity or isolated; write one of them", "{bad:?}");
    }
    let isolated = write(&mode, "isolated");
    match missing_for_isolation() {
        Some(why) => {
            assert_eq!(errno(isolated), Errno::EOPNOTSUPP);
            let expected = format!("EOPNOTSUPP: this machine cannot isolate CPUs: {why}");
            assert!(reason(&mount).starts_with(&expected), "{}", reason(&mount));
            assert_eq!(fs::read_to_string(&mode).unwrap(), "affinity\n");
        }
        None => {
            isolated.unwrap();
            assert_eq!(fs::read_to_string(&mode).unwrap(), "isolated\n");
            assert_eq!(errno(write(&pool.join("exclusive"), "0")), Errno::EBUSY);
        }
    }
}

#[test]
fn a_list_with_two_tasks_prevents_exclusive() {
    let mount = Mount::with_shared();
    let flag = mount.pool("shared").join("exclusive");
    let (a, b, c) = (Sleeper::new(), Sleeper::new(), Sleeper::new());
    write(&mount.tasks("shared", "1"), format!("{} {}", a.pid(), b.pid())).unwrap();
    assert_eq!(errno(write(&flag, "1")), Errno::EBUSY);
    let expected = "EBUSY: shared 1 has 2 tasks, an exclusive list takes one; release the others first";
    assert_eq!(reason(&mount), expected);
    assert_eq!(mount.read("pools/shared/exclusive"), "0\n");
    a.end();
    write(&flag, "1").expect("dead tasks do not count, even before a read");
    assert_eq!(errno(write(&mount.tasks("shared", "1"), c.pid().to_string())), Errno::EBUSY);
    write(&flag, "0").unwrap();
    write(&mount.tasks("shared", "1"), c.pid().to_string()).unwrap();
    drop(b);
}

#[test]
fn only_root_configures_whatever_the_modes() {
    let mount = Mount::with_dataplane();
    mount.let_everybody_in();
    let (pools, pool) = (mount.conf().join("pools"), mount.pool("dataplane"));
    let [flag, partial, mode] = ["exclusive", "partial", "mode"].map(|name| pool.join(name));
    as_nobody(|| {
        assert_eq!(errno(fs::create_dir(mount.pool("new"))), Errno::EACCES);
        assert_eq!(errno(fs::remove_dir(pool.join("0"))), Errno::EACCES);
        assert_eq!(errno(write(&flag, "0")), Errno::EACCES);
        assert_eq!(errno(write(&partial, "1")), Errno::EACCES);
        assert_eq!(errno(write(&mode, "affinity")), Errno::EACCES);
    });
    for path in [&pools, &pool, &pool.join("0"), &flag, &partial, &mode] {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        set_mode(path, 0o777);
    }
    as_nobody(|| {
        assert_eq!(errno(fs::create_dir(mount.pool("new"))), Errno::EPERM);
        assert_eq!(errno(fs::create_dir(pool.join("0-1"))), Errno::EPERM);
        assert_eq!(errno(fs::remove_dir(pool.join("0"))), Errno::EPERM);
        assert_eq!(errno(fs::remove_dir(&pool)), Errno::EPERM);
        assert_eq!(errno(write(&flag, "0")), Errno::EPERM);
        assert_eq!(errno(write(&partial, "1")), Errno::EPERM);
        assert_eq!(errno(write(&mode, "affinity")), Errno::EPERM);
        let expected = "EPERM: this needs CAP_SYS_ADMIN on the node, whatever uid and modes say; do it as root of the node";
        assert_eq!(reason(&mount), expected);
    });
    assert_eq!(mount.read("pools/dataplane/exclusive"), "1\n");
}

#[test]
fn exclusive_and_partial_need_root_at_open_and_at_write() {
    let mount = Mount::with_dataplane();
    mount.let_everybody_in();
    for (name, before, new) in
        [("exclusive", "1\n", "0\n"), ("partial", "0\n", "1\n"), ("transient", "0\n", "1\n")]
    {
        let flag = mount.pool("dataplane").join(name);
        set_mode(&flag, 0o666);
        let open = || File::options().write(true).open(&flag).unwrap();
        let (by_nobody, by_root) = (as_nobody(open), open());
        let new_bytes = new.as_bytes();
        assert_eq!(
            errno((&by_nobody).write(new_bytes)),
            Errno::EPERM,
            "{name}: opened by nobody, written by root"
        );
        assert_eq!(
            errno(as_nobody(|| (&by_root).write(new_bytes))),
            Errno::EPERM,
            "{name}: opened by root, written by nobody"
        );
        assert_eq!(fs::read_to_string(&flag).unwrap(), before);
        assert_eq!((&by_root).write(new_bytes).unwrap(), 2);
        assert_eq!(fs::read_to_string(&flag).unwrap(), new);
    }
}

#[test]
fn the_configuration_survives_a_stop_and_a_kill() {
    let mount = Mount::on_machine(&Machine::new(1, 8, 1));
    mount.make_pool("b", true, &["1,0", "003"]);
    mount.make_pool("a", false, &["4-5"]);
    mount.make_pool("gone", false, &["6"]);
    mount.make_pool("empty", true, &[]);
    fs::remove_dir(mount.pool("gone").join("6")).unwrap();
    fs::remove_dir(mount.pool("gone")).unwrap();
    write(&mount.pool("b").join("partial"), "1").unwrap();
    let before = configuration(&mount);
    let flags = |mount: &Mount| {
        let read = |pool, flag| mount.read(&format!("pools/{pool}/{flag}")).trim_end().to_owned();
        ["a", "b", "empty"].map(|pool| read(pool, "exclusive") + &read(pool, "partial"))
    };
    assert_eq!(flags(&mount), ["00", "11", "10"]);
    mount.stop();
    mount.start_on(&Machine::new(1, 8, 1));
    assert_eq!(configuration(&mount), before);
    mount.kill_daemon();
    mount.start_on(&Machine::new(1, 8, 1));
    assert_eq!(configuration(&mount), before);
    assert_eq!(flags(&mount), ["00", "11", "10"]);
    fs::create_dir(mount.pool("new")).unwrap();
    let numbers = configuration(&mount).into_iter().filter(|(path, ..)| path.starts_with("pools/new"));
    let numbers: Vec<u64> = numbers.map(|(_, number, ..)| number).collect();
    assert_eq!(numbers.len(), 7);
    assert!(before.iter().all(|(_, other, ..)| !numbers.contains(other)), "no number is reused");
}

#[test]
fn lists_with_missing_cpus_stay() {
    let mount = Mount::on_machine(&Machine::new(1, 4, 1));
    mount.make_pool("pool", true, &["1", "2-3"]);
    mount.stop();
    mount.start_on(&Machine::new(1, 2, 1));
    assert_eq!(mount.read("pools/pool/2-3/tasks"), "");
    assert_eq!(errno(fs::create_dir(mount.pool("pool").join("3"))), Errno::EINVAL);
    let task = Sleeper::new();
    assert_eq!(errno(write(&mount.tasks("pool", "2-3"), task.pid().to_string())), Errno::EINVAL);
    write(&mount.pool("pool").join("tasks"), task.pid().to_string()).unwrap();
    assert_eq!(mount.read("pools/pool/1/tasks"), format!("{}\n", task.pid()));
    fs::remove_dir(mount.pool("pool").join("2-3")).unwrap();
}

/// Neither a pool name nor a CPU list, with the message of the kernel or the daemon.
fn junk(round: usize) -> (OsString, Errno) {
    let bytes: Vec<u8> = match round % 10 {
        0 => b"..".to_vec(),
        1 => b".".to_vec(),
        2 => "ä-".repeat(100).into_bytes(),
        3 => vec![b'A'; round % 1024 + 1],
        4 => vec![b'-'; 4096 + round],
        5 => [b"0-", round.to_string().as_bytes(), b"\xff"].concat(),
        6 => format!("{round}-{}-", u64::MAX).into_bytes(),
        7 => (0..round % 200 + 1).map(|n| (n * round % 255) as u8 | 0x80).collect(),
        8 => format!("0,{}_", "1,".repeat(round % 500)).into_bytes(),
        _ => format!("{round}\n").into_bytes(),
    };
    let expected = match bytes.as_slice() {
        b"." | b".." => Errno::EEXIST,
        long if long.len() >= 4096 => Errno::ENAMETOOLONG,
        _ => Errno::EINVAL,
    };
    (OsString::from_vec(bytes), expected)
}

#[test]
fn ten_thousand_invalid_names_are_refused_quickly() {
    let mount = Mount::with_dataplane();
    let daemons = mount.daemons();
    let before = configuration(&mount);
    let started = Instant::now();
    let refused = |directory: &Path, name: &OsStr, expected: Errno| {
        assert_eq!(errno(fs::create_dir(directory.join(name))), expected, "{name:?}");
    };
    for round in 0..5_000 {
        let (name, expected) = junk(round);
        refused(&mount.conf().join("pools"), &name, expected);
        refused(&mount.pool("dataplane"), &name, expected);
    }
    for list in ["0-4294967295", "4294967295", "18446744073709551616", "0-8191", "8191"] {
        refused(&mount.pool("dataplane"), OsStr::from_bytes(list.as_bytes()), Errno::EINVAL);
    }
    // A name of 2^64 CPUs would take for ever; an emulated machine takes half a minute for all.
    assert!(started.elapsed() < 2 * TIMEOUT, "{:?}", started.elapsed());
    assert_eq!(configuration(&mount), before);
    assert_eq!(mount.daemons(), daemons);
}

#[test]
fn a_name_that_contains_a_cpu_twice_is_refused() {
    let mount = Mount::new();
    mount.make_pool("pool", true, &[]);
    for name in ["0,0", "0-1,1", "1,0-1"] {
        assert_eq!(errno(fs::create_dir(mount.pool("pool").join(name))), Errno::EINVAL, "{name}");
    }
    assert!(mount.read("self/last_error").contains("CPU 1 is in it twice"));
    fs::create_dir(mount.pool("pool").join("0-1")).unwrap();
}
