//! mv of a pool and of a list: another name, other CPUs, another pool. Tasks keep their claims.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::harness::{Mount, Sleeper, errno, held, masks, write};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

fn reason(mount: &Mount) -> String {
    let line = mount.read("self/last_error");
    line.splitn(3, ' ').nth(2).unwrap_or_else(|| panic!("{line:?}")).trim_end().to_owned()
}

fn rename_with(from: &Path, to: &Path, flags: RenameFlags) -> std::io::Result<()> {
    Ok(renameat2(AT_FDCWD, from, AT_FDCWD, to, flags)?)
}

#[test]
fn a_renamed_pool_keeps_its_nodes_and_claims() {
    let mount = Mount::with_dataplane();
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    let open = File::options().write(true).open(mount.pool("dataplane").join("tasks")).unwrap();
    let node = |path: &str| fs::metadata(mount.pool(path)).unwrap().ino();
    let nodes = ["dataplane", "dataplane/0", "dataplane/0/tasks"].map(node);
    mount.sh("mv $C/pools/dataplane $C/pools/fast && cd $C/pools/fast/0 && [ -s tasks ]");
    assert_eq!(["fast", "fast/0", "fast/0/tasks"].map(node), nodes);
    assert_eq!(errno(fs::metadata(mount.pool("dataplane"))), Errno::ENOENT);
    assert_eq!(
        (held(&mount.tasks("fast", "0")), masks(task.pid())),
        (vec![task.pid()], vec!["0".to_owned()])
    );
    let other = Sleeper::new();
    (&open).write_all(other.pid().to_string().as_bytes()).expect("a file that was open before");
    assert_eq!(held(&mount.tasks("fast", "1")), [other.pid()]);
    mount.make_pool("dataplane", false, &[]);
    mount.replace_worker();
    assert_eq!(held(&mount.tasks("fast", "0")), [task.pid()]);
    assert_eq!(["fast", "fast/0", "fast/0/tasks"].map(node), nodes);
    let claim = mount.read("info/events");
    assert!(claim.contains("dataplane"), "{claim}");
}

#[test]
fn the_tasks_of_a_list_move_with_it_to_other_cpus() {
    let mount = Mount::new();
    mount.make_pool("shared", false, &["0"]);
    let tasks = [Sleeper::new(), Sleeper::new()];
    let pids = tasks.each_ref().map(|task| task.pid());
    write(&mount.tasks("shared", "0"), pids.map(|pid| pid.to_string()).join(" ")).unwrap();
    for (from, to, mask) in [("0", "1", "1"), ("1", "0-1", "0-1"), ("0-1", "0,1", "0-1"), ("0,1", "0", "0")] {
        let pool = mount.pool("shared");
        fs::rename(pool.join(from), pool.join(to)).unwrap_or_else(|error| panic!("{from} to {to}: {error}"));
        let mut on_it = held(&mount.tasks("shared", to));
        on_it.sort_unstable();
        let mut expected = pids;
        expected.sort_unstable();
        assert_eq!(on_it, expected, "{to}");
        for pid in pids {
            assert_eq!(masks(pid), [mask], "{from} to {to}");
        }
        assert_eq!(errno(fs::metadata(pool.join(from))), Errno::ENOENT);
    }
    mount.replace_worker();
    write(&mount.tasks("shared", "0"), format!("-{}", pids[0])).unwrap();
    assert_eq!(masks(pids[0]), ["0-1"], "the mask from before the claim");
    assert_eq!(held(&mount.tasks("shared", "0")), [pids[1]]);
}

#[test]
fn a_list_moves_to_another_pool_with_its_task() {
    let mount = Mount::with_dataplane();
    mount.make_pool("infra", false, &[]);
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), task.pid().to_string()).unwrap();
    mount.sh("mv $C/pools/dataplane/0 $C/pools/infra");
    assert_eq!(held(&mount.tasks("infra", "0")), [task.pid()]);
    assert_eq!(held(&mount.pool("dataplane").join("tasks")), Vec::<u32>::new());
    let other = Sleeper::new();
    write(&mount.tasks("infra", "0"), other.pid().to_string()).expect("the pool is shared");
    let back = fs::rename(mount.pool("infra").join("0"), mount.pool("dataplane").join("0"));
    assert_eq!(errno(back), Errno::EBUSY);
    let expected = "EBUSY: infra 0 has 2 tasks, an exclusive list takes one; release the others first";
    assert_eq!(reason(&mount), expected);
    other.end();
    fs::rename(mount.pool("infra").join("0"), mount.pool("dataplane").join("0")).unwrap();
    mount.replace_worker();
    assert_eq!(
        (held(&mount.tasks("dataplane", "0")), masks(task.pid())),
        (vec![task.pid()], vec!["0".to_owned()])
    );
}

#[test]
fn nothing_is_replaced_and_nothing_goes_where_it_cannot_be() {
    let mount = Mount::with_dataplane();
    mount.make_pool("infra", false, &[]);
    let (pool, infra) = (mount.pool("dataplane"), mount.pool("infra"));
    let list = pool.join("0");
    let before = mount.walk().len();
    for (from, to, errno_of_it, why) in [
        (&pool, infra.clone(), Errno::EEXIST, "it exists already; nothing to do"),
        (
            &infra,
            mount.pool("Infra"),
            Errno::EINVAL,
            "a pool name is 1 to 63 of a-z, 0-9 and -, and neither begins nor ends with -; choose another name",
        ),
        (&list, pool.join("1"), Errno::EEXIST, "it exists already; nothing to do"),
        (&list, pool.join("0-1"), Errno::EBUSY, "CPU 1 is in dataplane 1 already; remove that list first"),
        (
            &list,
            pool.join("new"),
            Errno::EINVAL,
            "not a CPU list: \"new\" is neither a number nor a range; write it like 0-2,8-10",
        ),
        (
            &list,
            mount.pool("0"),
            Errno::EPERM,
            "nothing can be made, renamed or removed here; pools are in pools/, and CPU lists in a pool",
        ),
        (
            &pool,
            infra.join("0"),
            Errno::EPERM,
            "nothing can be made, renamed or removed here; pools are in pools/, and CPU lists in a pool",
        ),
        (
            &pool,
            mount.conf().join("info/dataplane"),
            Errno::EPERM,
            "nothing can be made, renamed or removed here; pools are in pools/, and CPU lists in a pool",
        ),
    ] {
        assert_eq!(errno(fs::rename(from, &to)), errno_of_it, "{to:?}");
        assert_eq!(reason(&mount), format!("{errno_of_it:?}: {why}"), "{to:?}");
    }
    assert_eq!(errno(fs::rename(list.join("tasks"), list.join("new"))), Errno::EPERM);
    assert_eq!(errno(rename_with(&list, &pool.join("1"), RenameFlags::RENAME_NOREPLACE)), Errno::EEXIST);
    assert_eq!(errno(rename_with(&list, &pool.join("1"), RenameFlags::RENAME_EXCHANGE)), Errno::EINVAL);
    assert_eq!(errno(rename_with(&list, &pool.join("4"), RenameFlags::RENAME_WHITEOUT)), Errno::EINVAL);
    assert_eq!(mount.walk().len(), before);
    rename_with(&infra, &mount.pool("other"), RenameFlags::RENAME_NOREPLACE).expect("nothing has this name");
}
