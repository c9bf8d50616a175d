//! The operations of the filesystem, without fuser's types.
//!
//! Owns what all requests share: a request is carried out once even if the kernel sends it again, open files, and
//! the answer to a refusal. Does not know how requests and replies are encoded, or what is in a file.
//!
//! Longer than 400 lines because each operation is short, and they share one way to answer.
//!
//! Nothing here blocks without a bound, and nothing here accesses the mount: that would wait for this process.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::request::{Object, Request, log_request};
use crate::engine::{
    Admission, Attributes, Caller, Engine, FIRST_VERSION, Live, Notify, Place, Ports, RESERVED_HANDLES,
    Refused,
};
use crate::handles::{OpenFiles, Polled};
use crate::model::refusal::Refusal;
use crate::tree::{Content, NO_NODE, Node, ROOT, Stat, WriteRequest};

/// Why an operation failed.
#[derive(Debug)]
enum Failure {
    /// The answer has an explanation, which `self/last_error` shows.
    Refused(Refused),
    /// The kernel or the client asked for something that control files do not have.
    Errno(Errno),
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal.into())
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

/// The changes of chmod(2), chown(2) or truncate(2); `None` leaves a value as it is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AttributeChange {
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    /// Whether the file is truncated.
    pub(super) truncate: bool,
}

/// One entry of a directory listing.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct DirEntry {
    /// The position at which a listing continues after this entry. It depends on the node only, so it stays the
    /// same when other entries come and go.
    pub(super) offset: u64,
    pub(super) node: u64,
    pub(super) is_dir: bool,
    pub(super) name: String,
}

/// How often a refusal of a user is recorded because too many of its requests wait, at most.
const RECORD_INTERVAL: Duration = Duration::from_millis(10);

/// Admits something once per [`RECORD_INTERVAL`] and user, roughly: some users share a place.
#[derive(Debug)]
struct Throttle {
    start: Instant,
    /// When each was admitted next, in milliseconds since the start.
    next: [AtomicU64; 16],
}

impl Throttle {
    fn new() -> Self {
        Self { start: Instant::now(), next: [const { AtomicU64::new(0) }; 16] }
    }

    fn admits(&self, uid: u32) -> bool {
        let Some(next) = self.next.get(uid as usize % self.next.len()) else { return false };
        let now = self.start.elapsed().as_millis() as u64;
        let then = next.load(Ordering::Relaxed);
        let until = now + RECORD_INTERVAL.as_millis() as u64;
        then <= now && next.compare_exchange(then, until, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

/// Carries out requests.
#[derive(Debug)]
pub(super) struct Operations<P: Ports = Live> {
    engine: Arc<Engine<P>>,
    files: OpenFiles,
    recorded: Throttle,
}

impl<P: Ports> Operations<P> {
    pub(super) fn new(engine: Arc<Engine<P>>, files: OpenFiles) -> Self {
        Self { engine, files, recorded: Throttle::new() }
    }

    pub(super) fn lookup(&self, request: Request, parent: u64, name: &OsStr) -> Result<Stat, Errno> {
        self.run(request, "lookup", Object::Name(parent, name), || {
            Ok(self.child(parent, name)?.found(&self.engine, request.caller))
        })
    }

    pub(super) fn getattr(&self, request: Request, node: u64) -> Result<Stat, Errno> {
        self.run(request, "getattr", Object::Node(node), || {
            Ok(self.node(node)?.stat(&self.engine, request.caller))
        })
    }

    /// Changes owner and mode. Truncation has no effect on a control file, and times cannot be changed.
    pub(super) fn setattr(
        &self,
        request: Request,
        node: u64,
        change: AttributeChange,
    ) -> Result<Stat, Errno> {
        let apply = || {
            let node = self.node(node)?;
            self.change_attributes(request.caller, node, change)?;
            Ok(node.found(&self.engine, request.caller))
        };
        let replay = || Ok(self.node(node)?.found(&self.engine, request.caller));
        self.run_once(request, "setattr", Object::Node(node), apply, replay)
    }

    fn change_attributes(
        &self,
        caller: Caller,
        node: Node<P>,
        change: AttributeChange,
    ) -> Result<(), Failure> {
        let AttributeChange { mode, uid, gid, truncate } = change;
        if truncate && !node.is_writable() {
            return Err(Refusal::NotWritable.into());
        }
        if mode.is_none() && uid.is_none() && gid.is_none() {
            return Ok(());
        }
        let old = node.attributes(&self.engine);
        let new = Attributes {
            uid: uid.unwrap_or(old.uid),
            gid: gid.unwrap_or(old.gid),
            mode: mode.map_or(old.mode, |mode| (mode & 0o7777) as u16),
        };
        Ok(self.engine.set_attributes(caller, node.id(), new)?)
    }

    pub(super) fn mkdir(&self, request: Request, parent: u64, name: &OsStr) -> Result<Stat, Errno> {
        let make = || {
            // A name that is not UTF-8 cannot name a pool or a list; their rules refuse it with a reason.
            let text = name.to_str().unwrap_or("\u{fffd}");
            let made = self.node(parent)?.make_child(&self.engine, request.caller, text)?;
            Ok(made.found(&self.engine, request.caller))
        };
        let replay = || Ok(self.child(parent, name)?.found(&self.engine, request.caller));
        self.run_once(request, "mkdir", Object::Name(parent, name), make, replay)
    }

    pub(super) fn rmdir(&self, request: Request, parent: u64, name: &OsStr) -> Result<(), Errno> {
        let remove = || Ok(self.child(parent, name)?.remove(&self.engine, request.caller)?);
        self.run_once(request, "rmdir", Object::Name(parent, name), remove, || Ok(()))
    }

    /// Renames a pool or a list. Nothing is ever replaced.
    pub(super) fn rename(
        &self,
        request: Request,
        (parent, name): (u64, &OsStr),
        (to, new): (u64, &OsStr),
    ) -> Result<(), Errno> {
        let rename = || {
            // As for mkdir(2).
            let text = new.to_str().unwrap_or("\u{fffd}");
            Ok(self.child(parent, name)?.rename(&self.engine, request.caller, self.node(to)?, text)?)
        };
        self.run_once(request, "rename", Object::Name(parent, name), rename, || Ok(()))
    }

    /// Returns the handle of the open file. If it is `writable`, the handle has the opener's capabilities.
    pub(super) fn open(&self, request: Request, node: u64, writable: bool) -> Result<u64, Errno> {
        self.run(request, "open", Object::Node(node), || {
            let node = self.node(node)?;
            let (handle, number) = self.files.open(node.opener(&self.engine, request.caller, writable)?);
            if self.files.opened_before(number) % RESERVED_HANDLES == RESERVED_HANDLES - 1 {
                self.engine.reserve_handles(number);
            }
            Ok(handle)
        })
    }

    /// Returns the content of which a read at `offset` sees a part, and the offset of its first byte.
    ///
    /// # Errors
    /// `EINVAL` for a read that fills the page cache (sendfile(2), splice(2), a private mapping): the cache would show
    /// one reader's content to another, and old content to all. Programs fall back to read(2).
    pub(super) fn read_at(
        &self,
        request: Request,
        node: u64,
        handle: u64,
        offset: u64,
        fills_page_cache: bool,
    ) -> Result<(Content, u64), Errno> {
        self.run(request, "read", Object::Node(node), || {
            if fills_page_cache {
                return Err(Errno::EINVAL.into());
            }
            let file = self.opened(node)?;
            if file.grows() {
                let show = |since| {
                    let (text, end) = self.engine.show_events(since);
                    (text.into_bytes().into(), end)
                };
                let version = self.engine.changes.version(node);
                let read = self.files.read_growing(handle, offset, version, show);
                return read.map_err(|_stale| Errno::ESTALE.into());
            }
            let show = || {
                // The version first: a change after it makes poll(2) report once too often, never once too few.
                let version = self.engine.changes.version(node);
                (version, file.show(&self.engine, request.caller, handle).unwrap_or_default())
            };
            let read = self.files.read(handle, offset, show).map_err(|_stale| Errno::ESTALE)?;
            Ok((read, 0))
        })
    }

    /// Applies one write(2), which is one command. `read_write`: the file is open for reading too.
    pub(super) fn write(
        &self,
        request: Request,
        node: u64,
        handle: u64,
        data: &[u8],
        read_write: bool,
    ) -> Result<(), Errno> {
        let apply = || {
            self.engine.begin_write(request.caller);
            let file = self.opened(node).map_err(|_| Refusal::Removed)?;
            if self.files.is_truncated(handle) {
                return Err(Refusal::AfterTooLong.into());
            }
            let command = WriteRequest { data, opener: OpenFiles::opener(handle), read_write, handle };
            Ok(file.store(&self.engine, request.caller, &command)?)
        };
        let replay = || {
            self.engine.await_refresh();
            Ok(())
        };
        let result = self.run_once(request, "write", Object::Node(node), apply, replay);
        // After a command that was too long, the next write(2) is its rest and must not be taken for a command. This
        // is done for a replayed answer too: the worker before may have died between its record and its answer.
        if result == Err(Errno::E2BIG) && self.files.mark_truncated(handle) {
            self.engine.note_truncated(handle);
        }
        result
    }

    pub(super) fn release(&self, request: Request, node: u64, handle: u64) {
        let _ = self.run(request, "release", Object::Node(node), || {
            let is_noted = self.files.close(handle);
            if self.engine.leave_queue(handle) || is_noted {
                self.engine.note_closed(handle);
            }
            self.engine.changes.disarm(handle);
            Ok(())
        });
    }

    /// Whether the content differs from what was last read through this file. If it does not, `notify` (if any) is
    /// called when it does. `poll_handle` identifies the poller for the kernel.
    pub(super) fn poll(
        &self,
        request: Request,
        node: u64,
        handle: u64,
        poll_handle: u64,
        notify: Option<Box<dyn Notify>>,
    ) -> Result<bool, Errno> {
        self.run(request, "poll", Object::Node(node), || {
            let Ok(file) = self.opened(node) else { return Ok(true) };
            if !file.notifies() {
                return Ok(false);
            }
            if notify.is_some() {
                match self.files.polled(handle, poll_handle) {
                    Polled::New => self.engine.note_poll(handle, poll_handle),
                    Polled::Known => {}
                    // Nobody will notify this client, so it must look for itself.
                    Polled::TooMany => return Ok(true),
                }
            }
            self.engine.reap();
            if self.engine.is_turn(handle).is_some() {
                return Ok(self.await_turn(handle, notify));
            }
            let seen = self.files.seen(handle);
            let version = match notify {
                Some(notify) => self.engine.changes.arm(handle, node, seen, notify),
                None => self.engine.changes.version(node),
            };
            Ok(version != seen)
        })
    }

    /// Returns whether the turn of the task has come that was entered through an open file. If it has not, `notify` is called
    /// when it does.
    fn await_turn(&self, handle: u64, notify: Option<Box<dyn Notify>>) -> bool {
        if let Some(notify) = notify {
            self.engine.changes.arm(handle, NO_NODE, FIRST_VERSION, notify);
        }
        // The turn may have begun before it was armed, or the pool may have been removed.
        let is_ready = self.engine.is_turn(handle) != Some(false);
        if is_ready {
            self.engine.changes.disarm(handle);
        }
        is_ready
    }

    /// Returns the entries of a directory that come after `offset`.
    pub(super) fn readdir(&self, request: Request, node: u64, offset: u64) -> Result<Vec<DirEntry>, Errno> {
        self.run(request, "readdir", Object::Node(node), || {
            let directory = self.node(node)?;
            let dots = [(1, node, "."), (2, directory.parent(&self.engine), "..")];
            let dots =
                dots.map(|(offset, node, name)| DirEntry { offset, node, is_dir: true, name: name.into() });
            let children = directory.children(&self.engine).into_iter().map(|(name, child)| {
                // Node IDs start at 1, and the dots have the offsets 1 and 2.
                DirEntry { offset: child.id() + 2, node: child.id(), is_dir: child.is_dir(), name }
            });
            let mut entries: Vec<_> =
                dots.into_iter().chain(children).filter(|e| e.offset > offset).collect();
            entries.sort_unstable();
            Ok(entries)
        })
    }

    /// An operation on a name that only changes with pools and lists. `what` would have happened to it: `renamed`.
    pub(super) fn refuse_name(
        &self,
        request: Request,
        operation: &'static str,
        object: Object<'_>,
        (what, errno): (&'static str, Errno),
    ) -> Errno {
        let refusal = Refusal::FixedFiles { operation: what, errno };
        let _ = self.answer(request, operation, object, || Err::<(), _>(refusal.into()));
        errno
    }

    /// An operation that control files do not have.
    pub(super) fn unsupported(
        &self,
        request: Request,
        operation: &'static str,
        object: Object<'_>,
        errno: Errno,
    ) -> Errno {
        let _ = self.answer(request, operation, object, || Err::<(), _>(errno.into()));
        errno
    }

    /// Refuses a request because too many of its user wait. Only some are recorded, because a client that is refused
    /// comes back at once.
    pub(super) fn refuse(&self, request: Request, operation: &'static str, object: Object<'_>) -> Errno {
        let uid = request.caller.uid;
        let refusal = Refusal::TooManyRequests { uid };
        let errno = refusal.errno();
        let is_recorded = self.recorded.admits(uid);
        let result = self.answer(request, operation, object, || {
            Err::<(), _>(if is_recorded { refusal.into() } else { errno.into() })
        });
        if !is_recorded {
            self.engine.metrics.refused(errno);
        }
        result.err().unwrap_or(errno)
    }

    /// Returns whether an earlier worker has answered this request.
    pub(super) fn is_answered(&self, request: Request) -> bool {
        self.engine.is_answered(request.caller.request)
    }

    /// Returns whether the node belongs to this user.
    pub(super) fn is_owner(&self, uid: u32, node: u64) -> bool {
        self.node(node).is_ok_and(|node| node.attributes(&self.engine).uid == uid)
    }

    /// Returns as soon as nobody has the lock of the claims, which is at once unless the engine hangs.
    pub(super) fn wait_for_claims(&self) {
        drop(self.engine.configuration());
    }

    /// Counts the time that a request took.
    pub(super) fn count_latency(&self, latency: Duration) {
        self.engine.metrics.took(latency);
    }

    fn node(&self, id: u64) -> Result<Node<P>, Errno> {
        Node::of(&self.engine, id).ok_or(Errno::ESTALE)
    }

    /// The node of an open file, which may have been removed since it was opened.
    fn opened(&self, id: u64) -> Result<Node<P>, Errno> {
        Node::of(&self.engine, id).ok_or(Errno::ENODEV)
    }

    fn child(&self, parent: u64, name: &OsStr) -> Result<Node<P>, Errno> {
        let parent = self.node(parent)?;
        name.to_str().and_then(|name| parent.child(&self.engine, name)).ok_or(Errno::ENOENT)
    }

    /// Carries out a request that changes nothing. If the kernel sends it again it is simply carried out again,
    /// unless it killed three workers.
    fn run<T>(
        &self,
        request: Request,
        operation: &'static str,
        object: Object<'_>,
        work: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<T, Errno> {
        self.answer(request, operation, object, || match self.admit(request) {
            Admission::Poisoned => Err(Errno::EIO.into()),
            Admission::New | Admission::Answered(_) => work(),
        })
    }

    /// Carries out a request that changes something, unless an earlier worker has done so. Then `replay` returns
    /// the answer again.
    fn run_once<T>(
        &self,
        request: Request,
        operation: &'static str,
        object: Object<'_>,
        change: impl FnOnce() -> Result<T, Failure>,
        replay: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<T, Errno> {
        let result = self.answer(request, operation, object, || match self.admit(request) {
            Admission::New => change(),
            Admission::Answered(None) => replay(),
            Admission::Answered(Some(errno)) => Err(errno.into()),
            Admission::Poisoned => Err(Errno::EIO.into()),
        });
        if result.is_ok() {
            self.engine.record_success(request.caller);
        }
        result
    }

    fn admit(&self, request: Request) -> Admission {
        self.engine.admit(request.caller.request, request.is_replay)
    }

    /// Does the work of a request, records its refusal, and logs it.
    fn answer<T>(
        &self,
        request: Request,
        operation: &'static str,
        object: Object<'_>,
        work: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<T, Errno> {
        // Before the work: afterwards the object may have gone.
        let logged = log::log_enabled!(log::Level::Debug).then(|| (self.path(object), Instant::now()));
        let result = work().map_err(|failure| match failure {
            Failure::Refused(refused) => {
                self.engine.record_refusal(request.caller, &refused, self.place(object));
                refused.refusal.errno()
            }
            Failure::Errno(errno) => errno,
        });
        if let Some((path, started)) = logged {
            log_request(request, operation, &path, result.as_ref().err().copied(), started.elapsed());
        }
        result
    }

    /// The pool and the list of an object.
    fn place(&self, object: Object<'_>) -> Option<Place> {
        let node = match object {
            Object::Node(node) => self.node(node),
            Object::Name(parent, name) => self.child(parent, name).or_else(|_| self.node(parent)),
        };
        node.ok()?.place(&self.engine)
    }

    /// The path of an object below the mount point; only for the log. Looked up in the tree, because accessing the
    /// mount would wait for this process.
    fn path(&self, object: Object<'_>) -> String {
        match object {
            Object::Node(node) => self.node_path(node),
            Object::Name(parent, name) => {
                format!("{}/{}", self.node_path(parent).trim_end_matches('/'), name.to_string_lossy())
            }
        }
    }

    fn node_path(&self, id: u64) -> String {
        if id == ROOT {
            return "/".into();
        }
        let mut path = String::new();
        let mut node = id;
        // The tree is four levels deep; the bound is for a list that moves away meanwhile.
        for _ in 0..8 {
            if node == ROOT {
                return path;
            }
            let Some(parent) = Node::of(&self.engine, node).map(|node| node.parent(&self.engine)) else {
                break;
            };
            let siblings = Node::of(&self.engine, parent).map(|parent| parent.children(&self.engine));
            let name = siblings.into_iter().flatten().find(|(_, child)| child.id() == node);
            let Some((name, _)) = name else { break };
            path = format!("/{name}{path}");
            node = parent;
        }
        // Removed, but still open.
        format!("node {id}")
    }
}

#[cfg(test)]
mod tests;
