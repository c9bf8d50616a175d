//! The operations on the engine's fakes: what each request answers, that it is done once, and what is logged of it.

use std::os::unix::ffi::OsStrExt as _;
use std::sync::mpsc;

use super::*;
use crate::engine::tests::fakes::Fake;
use crate::engine::tests::{Bed, EXCL, EXCL_1, SHARED_45, caller};
use crate::model::pool::ListId;

const ONLINE: &str = "0-7";
/// A process of root.
const TASK: u32 = 100;
const OTHER: u32 = 200;

/// A mount without a kernel.
struct Mount {
    bed: Bed,
    operations: Operations<Fake>,
}

impl Mount {
    fn new() -> Self {
        let bed = Bed::new();
        bed.world.spawn(TASK, ONLINE, |_| ());
        bed.world.spawn(OTHER, ONLINE, |_| ());
        Self::on(bed)
    }

    /// The next worker, after a death of the first one.
    fn restarted(&self) -> Self {
        let next = Self::on(Bed::after_crash(&self.bed.world.snapshot()));
        next.bed.world.flush();
        next
    }

    fn on(bed: Bed) -> Self {
        let operations = Operations::new(Arc::clone(&bed.engine), OpenFiles::new(1, &[], &[]));
        Self { bed, operations }
    }

    fn open(&self, node: u64) -> u64 {
        self.operations.open(by(TASK, 0), node, true).unwrap()
    }

    fn read(&self, node: u64) -> String {
        let content = self.operations.read(by(TASK, 0), node, self.open(node), 0, false).unwrap();
        String::from_utf8(content.to_vec()).unwrap()
    }

    fn write(&self, request: Request, list: ListId, data: &str) -> Result<(), Errno> {
        let node = list.tasks_node();
        self.operations.write(request, node, self.open(node), data.as_bytes(), false)
    }

    /// The node with this path below the root.
    fn node(&self, path: &str) -> u64 {
        path.split('/').filter(|name| !name.is_empty()).fold(ROOT, |parent, name| {
            self.operations.lookup(by(TASK, 0), parent, name.as_ref()).expect(path).node
        })
    }
}

/// A request of a process of root.
fn by(pid: u32, request: u64) -> Request {
    Request { caller: Caller { request, ..caller(pid, 0) }, is_replay: false }
}

fn replayed(request: Request) -> Request {
    Request { is_replay: true, ..request }
}

impl Operations<Fake> {
    /// Returns the content that a read sees.
    fn read(
        &self,
        request: Request,
        node: u64,
        handle: u64,
        offset: u64,
        fills_page_cache: bool,
    ) -> Result<Content, Errno> {
        self.read_at(request, node, handle, offset, fills_page_cache).map(|(content, _)| content)
    }
}

#[test]
fn a_listing_continues_after_every_offset() {
    let mount = Mount::new();
    for directory in ["", "pools", "pools/excl", "pools/excl/2-3", "self", "info"] {
        let node = mount.node(directory);
        let all = mount.operations.readdir(by(TASK, 0), node, 0).unwrap();
        assert_eq!((&*all[0].name, &*all[1].name), (".", ".."), "{directory}");
        for (index, entry) in all.iter().enumerate() {
            let rest = mount.operations.readdir(by(TASK, 0), node, entry.offset).unwrap();
            assert_eq!(rest, all[index + 1..], "{directory} after {}", entry.name);
        }
        for entry in &all[2..] {
            let stat = mount.operations.lookup(by(TASK, 0), node, entry.name.as_ref()).unwrap();
            assert_eq!((stat.node, stat.is_dir), (entry.node, entry.is_dir), "{directory}/{}", entry.name);
        }
    }
}

#[test]
fn a_write_claims_and_a_read_shows_the_claim() {
    let mount = Mount::new();
    mount.write(by(TASK, 1), EXCL_1, "0").unwrap();
    assert_eq!(mount.read(EXCL_1.tasks_node()), format!("{TASK}\n"));
    assert_eq!(mount.bed.world.masks(TASK), ["1"]);
}

#[test]
fn a_refusal_of_any_operation_is_recorded_once() {
    let mount = Mount::new();
    mount.write(by(TASK, 1), EXCL_1, "0").unwrap();
    let last_error = mount.node("self/last_error");
    assert_eq!(mount.write(by(OTHER, 2), EXCL_1, "0"), Err(Errno::EBUSY));
    let version = mount.node("info/version");
    let mut refused = vec![Errno::EBUSY];
    let written = mount.operations.write(by(OTHER, 3), version, mount.open(version), b"x", false);
    refused.push(written.expect_err("not writable"));
    let made = mount.operations.mkdir(by(OTHER, 4), mount.node("pools/excl"), "1".as_ref());
    refused.push(made.expect_err("exists"));
    let truncate = AttributeChange { truncate: true, ..AttributeChange::default() };
    refused.push(mount.operations.setattr(by(OTHER, 5), version, truncate).expect_err("not writable"));
    assert_eq!(refused, [Errno::EBUSY, Errno::EINVAL, Errno::EEXIST, Errno::EINVAL]);
    let content = mount.operations.read(by(OTHER, 0), last_error, mount.open(last_error), 0, false).unwrap();
    let text = String::from_utf8(content.to_vec()).unwrap();
    // The newest of each process is shown.
    assert_eq!(text.matches("EINVAL").count(), 1, "{text}");
    let events = mount.read(mount.node("info/events"));
    assert_eq!(events.matches("\"refused\"").count(), refused.len(), "{events}");
}

#[test]
fn a_write_that_is_replayed_is_not_done_again() {
    let mount = Mount::new();
    let claim = by(TASK, 7);
    mount.write(claim, EXCL_1, "0").unwrap();
    let next = mount.restarted();
    next.write(by(OTHER, 8), EXCL_1, &format!("-{TASK}")).unwrap();
    next.write(replayed(claim), EXCL_1, "0").expect("it was done");
    assert_eq!(next.read(EXCL_1.tasks_node()), "", "released by another request since");
}

#[test]
fn a_refusal_that_is_replayed_keeps_its_errno() {
    let mount = Mount::new();
    mount.write(by(TASK, 1), EXCL_1, "0").unwrap();
    let refused = by(OTHER, 9);
    assert_eq!(mount.write(refused, EXCL_1, "0"), Err(Errno::EBUSY));
    mount.bed.world.flush();
    let next = mount.restarted();
    next.write(by(TASK, 10), EXCL_1, &format!("-{TASK}")).unwrap();
    assert_eq!(
        next.write(replayed(refused), EXCL_1, "0"),
        Err(Errno::EBUSY),
        "although the list is free now"
    );
}

#[test]
fn a_request_that_was_not_done_is_done_when_it_is_replayed() {
    let mount = Mount::new();
    mount.write(replayed(by(TASK, 11)), EXCL_1, "0").unwrap();
    assert_eq!(mount.bed.claims(), [(TASK, EXCL_1)]);
}

#[test]
fn a_request_that_kills_three_workers_is_answered_eio() {
    let mut mount = Mount::new();
    let poison = replayed(by(TASK, 12));
    // A replay is recorded before it is carried out, so that the next worker knows of it.
    for _ in 0..2 {
        assert_eq!(mount.bed.engine.admit(12, true), Admission::New);
        mount.bed.world.flush();
        mount = mount.restarted();
    }
    let next = mount;
    assert_eq!(next.write(poison, EXCL_1, "0"), Err(Errno::EIO));
    assert_eq!(
        next.operations.getattr(poison, ROOT).unwrap_err(),
        Errno::EIO,
        "one that changes nothing too"
    );
    assert_eq!(next.bed.claims(), []);
}

#[test]
fn the_rest_of_a_command_that_was_too_long_is_refused() {
    let mount = Mount::new();
    let (node, request) = (SHARED_45.tasks_node(), by(TASK, 13));
    let handle = mount.open(node);
    let long = " ".repeat(100_000);
    assert_eq!(mount.operations.write(request, node, handle, long.as_bytes(), false), Err(Errno::E2BIG));
    assert_eq!(mount.operations.write(by(TASK, 14), node, handle, b"0", false), Err(Errno::E2BIG));
    mount.write(by(TASK, 15), SHARED_45, "0").expect("another open file");
    // The next worker refuses the rest too, even if it only repeats the answer.
    mount.bed.world.flush();
    let next = mount.restarted();
    let replay = next.operations.write(replayed(request), node, handle, long.as_bytes(), false);
    assert_eq!(replay, Err(Errno::E2BIG));
    assert_eq!(next.operations.write(by(TASK, 16), node, handle, b"0", false), Err(Errno::E2BIG));
}

#[test]
fn owner_and_mode_change_and_truncation_has_no_effect() {
    let mount = Mount::new();
    let node = EXCL_1.tasks_node();
    // The kernel checks who may do this (mount option default_permissions).
    let change = AttributeChange { mode: Some(0o100_660), gid: Some(5), ..AttributeChange::default() };
    let stat = mount.operations.setattr(by(TASK, 17), node, change).unwrap();
    assert_eq!((stat.owner.mode, stat.owner.uid, stat.owner.gid), (0o660, 0, 5));
    mount.write(by(TASK, 18), EXCL_1, "0").unwrap();
    let truncate = AttributeChange { truncate: true, ..AttributeChange::default() };
    mount.operations.setattr(by(TASK, 19), node, truncate).unwrap();
    assert_eq!(mount.read(node), format!("{TASK}\n"));
}

#[test]
fn directories_are_made_and_removed_by_name() {
    let mount = Mount::new();
    let pools = mount.node("pools");
    let made = mount.operations.mkdir(by(TASK, 20), pools, "new".as_ref()).unwrap();
    assert!(made.is_dir);
    let again = mount.operations.mkdir(replayed(by(TASK, 20)), pools, "new".as_ref());
    assert_eq!(again.unwrap().node, made.node, "a replay answers with the same directory");
    assert_eq!(mount.operations.mkdir(by(TASK, 21), pools, "new".as_ref()).unwrap_err(), Errno::EEXIST);
    let not_text = OsStr::from_bytes(b"\xff");
    assert_eq!(mount.operations.mkdir(by(TASK, 22), pools, not_text).unwrap_err(), Errno::EINVAL);
    assert_eq!(mount.operations.lookup(by(TASK, 0), pools, not_text).unwrap_err(), Errno::ENOENT);
    mount.operations.rmdir(by(TASK, 23), pools, "new".as_ref()).unwrap();
    mount.operations.rmdir(replayed(by(TASK, 23)), pools, "new".as_ref()).expect("a replay");
    assert_eq!(mount.operations.rmdir(by(TASK, 24), pools, "new".as_ref()), Err(Errno::ENOENT));
    assert_eq!(mount.operations.rmdir(by(TASK, 25), ROOT, "info".as_ref()), Err(Errno::EPERM));
}

#[test]
fn a_removed_node_is_stale_and_an_open_file_of_it_has_no_device() {
    let mount = Mount::new();
    let pools = mount.node("pools");
    mount.operations.mkdir(by(TASK, 26), pools, "new".as_ref()).unwrap();
    let file = mount.node("pools/new/exclusive");
    let handle = mount.open(file);
    mount.operations.rmdir(by(TASK, 27), pools, "new".as_ref()).unwrap();
    assert_eq!(mount.operations.getattr(by(TASK, 0), file).unwrap_err(), Errno::ESTALE);
    assert_eq!(mount.operations.open(by(TASK, 0), file, false).unwrap_err(), Errno::ESTALE);
    assert_eq!(mount.operations.read(by(TASK, 0), file, handle, 0, false).unwrap_err(), Errno::ENODEV);
    assert_eq!(mount.operations.write(by(TASK, 28), file, handle, b"1", false), Err(Errno::ENODEV));
    assert_eq!(
        mount.operations.poll(by(TASK, 0), file, handle, 1, None),
        Ok(true),
        "poll reports that it has gone"
    );
}

/// Reports that it was called.
#[derive(Debug)]
struct Report(mpsc::Sender<()>);

impl Notify for Report {
    fn notify(self: Box<Self>) {
        self.0.send(()).unwrap();
    }
}

#[test]
fn poll_reports_a_change_and_notifies_of_the_next_one() {
    let mount = Mount::new();
    let node = EXCL_1.tasks_node();
    let handle = mount.open(node);
    let (sender, reports) = mpsc::channel();
    let poll = |notify: bool| {
        let notify = notify.then(|| Box::new(Report(sender.clone())) as Box<dyn Notify>);
        mount.operations.poll(by(TASK, 0), node, handle, 3, notify).unwrap()
    };
    let notify_due = || mount.bed.engine.changes.take_due().0.into_iter().for_each(Notify::notify);
    assert!(poll(true), "not read yet");
    mount.operations.read(by(TASK, 0), node, handle, 0, false).unwrap();
    assert!(!poll(true), "nothing has changed since");
    notify_due();
    assert!(reports.try_recv().is_err());
    mount.write(by(TASK, 29), EXCL_1, "0").unwrap();
    notify_due();
    assert!(reports.try_recv().is_ok(), "the change is reported");
    assert!(poll(false));
    mount.operations.read(by(TASK, 0), node, handle, 0, false).unwrap();
    assert!(!poll(true));
    mount.operations.release(by(TASK, 0), node, handle);
    mount.write(by(TASK, 30), EXCL_1, &format!("-{TASK}")).unwrap();
    notify_due();
    assert!(reports.try_recv().is_err(), "a closed file is not polled");
    // A file that does not change by itself is always ready, and only that.
    let exclusive = EXCL.exclusive_node();
    let handle = mount.open(exclusive);
    assert_eq!(mount.operations.poll(by(TASK, 0), exclusive, handle, 4, None), Ok(false));
}

#[test]
fn a_later_part_of_a_read_is_of_the_same_snapshot() {
    let mount = Mount::new();
    let node = EXCL_1.tasks_node();
    let handle = mount.open(node);
    mount.write(by(TASK, 31), EXCL_1, "0").unwrap();
    let first = mount.operations.read(by(TASK, 0), node, handle, 0, false).unwrap();
    mount.write(by(TASK, 32), EXCL_1, &format!("-{TASK}")).unwrap();
    assert_eq!(mount.operations.read(by(TASK, 0), node, handle, 1, false).unwrap(), first);
    assert!(mount.operations.read(by(TASK, 0), node, handle, 0, false).unwrap().is_empty());
    let next = mount.restarted();
    assert_eq!(next.operations.read(by(TASK, 0), node, handle, 1, false).unwrap_err(), Errno::ESTALE);
}

#[test]
fn the_log_names_the_path_of_a_node() {
    let mount = Mount::new();
    let path = |object| mount.operations.path(object);
    for wanted in ["/", "/pools", "/pools/excl", "/pools/excl/2-3/tasks", "/self/last_error"] {
        assert_eq!(path(Object::Node(mount.node(wanted))), wanted);
    }
    assert_eq!(path(Object::Name(ROOT, "new".as_ref())), "/new");
    assert_eq!(path(Object::Name(mount.node("pools"), "new".as_ref())), "/pools/new");
    assert_eq!(path(Object::Node(4711)), "node 4711");
}
