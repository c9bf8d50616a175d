//! The FUSE adapter: decodes requests, calls [`Operations`] in the turn of their user, and encodes replies.
//!
//! Owns caching times, flags and attributes as the kernel gets them, and for how long a request may wait for its turn.
//! Does not know what an operation does, or whose turn it is.
//!
//! Longer than 400 lines because more than half of it is the signatures of fuser's trait.

use std::borrow::Borrow as _;
use std::ffi::OsStr;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags,
    PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, TimeOrNow, WriteFlags,
};

use super::abi::split_unique;
use super::operations::{AttributeChange, Operations};
use super::queue::Turn;
use super::request::{Object, Request};
use super::turns::{Fate, Place, Turns};
use crate::engine::{Caller, Engine, Notify};
use crate::handles::OpenFiles;
use crate::tree::{Stat, depends_on_caller};

/// For how long the kernel may cache names and attributes that only change through it: in effect without limit.
const TTL_FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// The largest write(2) that arrives as one request, in bytes. It is larger than the longest command, so that a
/// command that is too long is seen as one.
const MAX_WRITE: u32 = 1 << 20;

/// For how long a request waits for its turn, at most. A client whose request waits cannot be killed.
const PATIENCE: Duration = Duration::from_secs(1);
/// The same for a write to a file of somebody else: it holds the kernel's lock of the file, for which others wait.
const PATIENCE_OF_GUESTS: Duration = Duration::from_millis(25);

/// A request that waits, with its data and its reply. An operation that is cheap is carried out even if it should be
/// refused.
type Job = Box<dyn FnOnce(&Served, Fate) + Send>;

/// The mounted filesystem.
pub(super) struct Fs {
    served: Arc<Served>,
    turns: Arc<Turns<Job>>,
}

impl fmt::Debug for Fs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fs").field("served", &self.served).finish_non_exhaustive()
    }
}

/// The object on which requests are carried out.
#[derive(Debug)]
struct Served {
    operations: Operations,
    /// All times that stat(2) shows.
    mounted_at: SystemTime,
}

/// Refuses requests that have waited too long.
pub(super) struct LateRequests {
    served: Arc<Served>,
    turns: Arc<Turns<Job>>,
}

impl fmt::Debug for LateRequests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LateRequests").finish_non_exhaustive()
    }
}

impl LateRequests {
    /// Refuses them until the end; for a thread of its own.
    pub(super) fn refuse(&self) {
        self.turns.refuse_late_ones(|job| job(&self.served, Fate::Refuse));
    }

    /// Ends [`LateRequests::refuse`].
    pub(super) fn end(&self) {
        self.turns.end();
    }
}

impl Fs {
    pub(super) fn new(engine: Arc<Engine>, files: OpenFiles) -> Self {
        let served = Served { operations: Operations::new(engine, files), mounted_at: SystemTime::now() };
        Self { served: Arc::new(served), turns: Arc::new(Turns::new()) }
    }

    pub(super) fn late_requests(&self) -> LateRequests {
        LateRequests { served: Arc::clone(&self.served), turns: Arc::clone(&self.turns) }
    }

    /// Carries out a request with this data in its turn: now, and then also the requests that wait for this place; or
    /// on the thread whose place becomes free for it.
    fn serve<D>(
        &self,
        req: &fuser::Request,
        data: &D,
        work: impl FnOnce(&Served, Request, &D, Fate) + Send + 'static,
    ) where
        D: ToOwned + ?Sized,
        D::Owned: Default + Send + 'static,
    {
        self.serve_within(req, data, false, |_| PATIENCE, work);
    }

    /// As [`Fs::serve`], for a request that costs little and is never refused.
    fn serve_cheap<D>(
        &self,
        req: &fuser::Request,
        data: &D,
        work: impl FnOnce(&Served, Request, &D) + Send + 'static,
    ) where
        D: ToOwned + ?Sized,
        D::Owned: Default + Send + 'static,
    {
        self.serve_within(
            req,
            data,
            true,
            |_| PATIENCE,
            |served, request, data, _| work(served, request, data),
        );
    }

    /// As [`Fs::serve`]. `patience`: for how long it may wait, asked only if it has to.
    fn serve_within<D>(
        &self,
        req: &fuser::Request,
        data: &D,
        is_cheap: bool,
        patience: impl FnOnce(&Operations) -> Duration,
        work: impl FnOnce(&Served, Request, &D, Fate) + Send + 'static,
    ) where
        D: ToOwned + ?Sized,
        D::Owned: Default + Send + 'static,
    {
        let request = decode(req);
        if request.is_replay && self.served.operations.is_answered(request) {
            // Its answer is remembered for the next workers, but not without end.
            return work(&self.served, request, data, Fate::Serve);
        }
        let (uid, size) = (request.caller.uid, size_of_val(data));
        let mut turn = match self.turns.arrive(uid, size, is_cheap) {
            Place::Now => {
                work(&self.served, request, data, Fate::Serve);
                self.turns.finish(uid)
            }
            Place::Nowhere => return work(&self.served, request, data, Fate::Refuse),
            Place::Later { with_data } => {
                let owned = if with_data { data.to_owned() } else { D::Owned::default() };
                let job: Job = Box::new(move |served, fate| work(served, request, owned.borrow(), fate));
                self.turns.wait(uid, job, with_data.then_some(size), patience(&self.served.operations))
            }
        };
        while let Some(Turn { uid, job, is_refused }) = turn {
            job(&self.served, if is_refused { Fate::Refuse } else { Fate::Serve });
            turn = self.turns.finish(uid);
        }
    }

    /// An operation on a node that control files do not have.
    fn unsupported(
        &self,
        req: &fuser::Request,
        operation: &'static str,
        node: INodeNo,
        errno: nix::errno::Errno,
        answer: impl FnOnce(Errno) + Send + 'static,
    ) {
        self.serve_cheap(req, &(), move |served, request, ()| {
            let object = Object::Node(node.into());
            answer(encode(served.operations.unsupported(request, operation, object, errno)));
        });
    }

    /// Refuses an operation on a name in a directory. `refusal` is what would have happened to the name, and the error.
    fn refuse_name(
        &self,
        req: &fuser::Request,
        operation: &'static str,
        (parent, name): (INodeNo, &OsStr),
        refusal: (&'static str, nix::errno::Errno),
        answer: impl FnOnce(Errno) + Send + 'static,
    ) {
        self.serve_cheap(req, name, move |served, request, name| {
            let object = Object::Name(parent.into(), name);
            answer(encode(served.operations.refuse_name(request, operation, object, refusal)));
        });
    }
}

impl Served {
    /// How long the kernel may cache the attributes, and the attributes.
    fn attributes(&self, stat: &Stat) -> (Duration, FileAttr) {
        let attr = FileAttr {
            ino: INodeNo(stat.node),
            size: stat.size,
            blocks: 0,
            atime: self.mounted_at,
            mtime: self.mounted_at,
            ctime: self.mounted_at,
            crtime: self.mounted_at,
            kind: file_type(stat.is_dir),
            perm: stat.owner.mode,
            nlink: stat.links,
            uid: stat.owner.uid,
            gid: stat.owner.gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        };
        (if stat.cacheable { TTL_FOREVER } else { Duration::ZERO }, attr)
    }

    fn reply_entry(&self, result: Result<Stat, nix::errno::Errno>, reply: ReplyEntry) {
        match result {
            Ok(stat) => {
                let (ttl, attr) = self.attributes(&stat);
                reply.entry_with_ttls(&ttl, &TTL_FOREVER, &attr, Generation(0));
            }
            Err(errno) => reply.error(encode(errno)),
        }
    }

    fn reply_attr(&self, result: Result<Stat, nix::errno::Errno>, reply: ReplyAttr) {
        match result {
            Ok(stat) => {
                let (ttl, attr) = self.attributes(&stat);
                reply.attr(&ttl, &attr);
            }
            Err(errno) => reply.error(encode(errno)),
        }
    }

    /// Refuses a request because too many of its user wait.
    fn refuse(&self, request: Request, operation: &'static str, object: Object<'_>) -> Errno {
        encode(self.operations.refuse(request, operation, object))
    }
}

fn decode(req: &fuser::Request) -> Request {
    let (request, is_replay) = split_unique(req.unique().0);
    Request { caller: Caller { tid: req.pid(), uid: req.uid(), request }, is_replay }
}

fn encode(errno: nix::errno::Errno) -> Errno {
    Errno::from_i32(errno as i32)
}

fn file_type(is_dir: bool) -> FileType {
    if is_dir { FileType::Directory } else { FileType::RegularFile }
}

/// The events of a poll, as kernfs reports them: always readable and writable, and exceptional if the content has
/// changed since it was last read.
fn poll_events(has_changed: bool) -> PollEvents {
    let ordinary = PollEvents::POLLIN | PollEvents::POLLOUT | PollEvents::POLLRDNORM | PollEvents::POLLWRNORM;
    if has_changed { ordinary | PollEvents::POLLERR | PollEvents::POLLPRI } else { ordinary }
}

/// The part of `content` that a read of `size` bytes at `offset` returns.
fn slice(content: &[u8], offset: u64, size: u32) -> &[u8] {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
    let end = start.saturating_add(size as usize).min(content.len());
    content.get(start..end).unwrap_or_default()
}

impl Filesystem for Fs {
    fn init(&mut self, _req: &fuser::Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Older kernels lack some of these; the error says only that.
        for wanted in
            [InitFlags::FUSE_ATOMIC_O_TRUNC, InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_HAS_RESEND]
        {
            let _ = config.add_capabilities(wanted);
        }
        let _ = config.set_max_write(MAX_WRITE);
        Ok(())
    }

    fn lookup(&self, req: &fuser::Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.serve_cheap(req, name, move |served, request, name| {
            served.reply_entry(served.operations.lookup(request, parent.into(), name), reply);
        });
    }

    fn getattr(&self, req: &fuser::Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        // It is never refused, but where it has to look at the caller it gets no place more than other requests.
        let is_cheap = !depends_on_caller(ino.into());
        self.serve_within(
            req,
            &(),
            is_cheap,
            |_| PATIENCE,
            move |served, request, (), _| {
                served.reply_attr(served.operations.getattr(request, ino.into()), reply);
            },
        );
    }

    fn setattr(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = AttributeChange { mode, uid, gid, truncate: size.is_some() };
        self.serve(req, &(), move |served, request, (), fate| match fate {
            Fate::Serve => served.reply_attr(served.operations.setattr(request, ino.into(), change), reply),
            Fate::Refuse => reply.error(served.refuse(request, "setattr", Object::Node(ino.into()))),
        });
    }

    fn mkdir(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        self.serve(req, name, move |served, request, name, fate| match fate {
            Fate::Serve => served.reply_entry(served.operations.mkdir(request, parent.into(), name), reply),
            Fate::Refuse => reply.error(served.refuse(request, "mkdir", Object::Name(parent.into(), name))),
        });
    }

    fn rmdir(&self, req: &fuser::Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.serve(req, name, move |served, request, name, fate| match fate {
            Fate::Serve => match served.operations.rmdir(request, parent.into(), name) {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(encode(errno)),
            },
            Fate::Refuse => reply.error(served.refuse(request, "rmdir", Object::Name(parent.into(), name))),
        });
    }

    fn rename(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        // Nothing is ever replaced, with or without that flag.
        if !(flags - RenameFlags::RENAME_NOREPLACE).is_empty() {
            let errno = nix::errno::Errno::EINVAL;
            return self.refuse_name(req, "rename", (parent, name), ("exchanged", errno), |errno| {
                reply.error(errno)
            });
        }
        let names = (name.to_owned(), newname.to_owned());
        self.serve(req, &names, move |served, request, (name, new), fate| match fate {
            Fate::Serve => {
                let to = (newparent.into(), new.as_os_str());
                match served.operations.rename(request, (parent.into(), name), to) {
                    Ok(()) => reply.ok(),
                    Err(errno) => reply.error(encode(errno)),
                }
            }
            Fate::Refuse => reply.error(served.refuse(request, "rename", Object::Name(parent.into(), name))),
        });
    }

    fn open(&self, req: &fuser::Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let writable = flags.acc_mode() != OpenAccMode::O_RDONLY;
        self.serve(req, &(), move |served, request, (), fate| {
            if fate == Fate::Refuse {
                return reply.error(served.refuse(request, "open", Object::Node(ino.into())));
            }
            match served.operations.open(request, ino.into(), writable) {
                Ok(handle) => {
                    // Bypasses the page cache: the content changes without a write, and a write is a command. There is
                    // nothing to flush; without that flag, close(2) takes the lock of the inode on Linux 6.12, which a
                    // write of another process may hold.
                    let flags = [
                        FopenFlags::FOPEN_DIRECT_IO,
                        FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
                        FopenFlags::FOPEN_NOFLUSH,
                    ];
                    reply.opened(FileHandle(handle), flags.into_iter().collect());
                }
                Err(errno) => reply.error(encode(errno)),
            }
        });
    }

    fn read(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let started = Instant::now();
        // The kernel names an owner in the reads of a process, but not in those that fill the page cache.
        let fills_page_cache = lock_owner.is_none();
        self.serve(req, &(), move |served, request, (), fate| {
            if fate == Fate::Refuse {
                return reply.error(served.refuse(request, "read", Object::Node(ino.into())));
            }
            match served.operations.read_at(request, ino.into(), fh.into(), offset, fills_page_cache) {
                Ok((content, start)) => {
                    reply.data(offset.checked_sub(start).map_or(&[], |at| slice(&content, at, size)));
                }
                Err(errno) => reply.error(encode(errno)),
            }
            served.operations.count_latency(started.elapsed());
        });
    }

    fn write(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        _offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let started = Instant::now();
        let read_write = flags.acc_mode() == OpenAccMode::O_RDWR;
        let uid = req.uid();
        let patience = |operations: &Operations| {
            if operations.is_owner(uid, ino.into()) { PATIENCE } else { PATIENCE_OF_GUESTS }
        };
        self.serve_within(req, data, false, patience, move |served, request, data, fate| {
            if fate == Fate::Refuse {
                return reply.error(served.refuse(request, "write", Object::Node(ino.into())));
            }
            match served.operations.write(request, ino.into(), fh.into(), data, read_write) {
                Ok(()) => reply.written(data.len() as u32),
                Err(errno) => reply.error(encode(errno)),
            }
            served.operations.count_latency(started.elapsed());
        });
    }

    fn release(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        // Nobody waits for it, and it frees memory.
        self.served.operations.release(decode(req), ino.into(), fh.into());
        reply.ok();
    }

    fn poll(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: FileHandle,
        ph: PollNotifier,
        _events: PollEvents,
        flags: PollFlags,
        reply: ReplyPoll,
    ) {
        self.serve(req, &(), move |served, request, (), fate| {
            if fate == Fate::Refuse {
                // The client looks again, and misses nothing.
                served.refuse(request, "poll", Object::Node(ino.into()));
                return reply.poll(poll_events(true));
            }
            let handle = ph.handle().0;
            let notify =
                flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY).then(|| Box::new(ph) as Box<dyn Notify>);
            match served.operations.poll(request, ino.into(), fh.into(), handle, notify) {
                Ok(has_changed) => reply.poll(poll_events(has_changed)),
                Err(errno) => reply.error(encode(errno)),
            }
        });
    }

    fn readdir(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.serve(req, &(), move |served, request, (), fate| {
            if fate == Fate::Refuse {
                return reply.error(served.refuse(request, "readdir", Object::Node(ino.into())));
            }
            match served.operations.readdir(request, ino.into(), offset) {
                Ok(entries) => {
                    for entry in entries {
                        if reply.add(INodeNo(entry.node), entry.offset, file_type(entry.is_dir), entry.name) {
                            // The buffer is full; the kernel asks for the rest.
                            break;
                        }
                    }
                    reply.ok();
                }
                Err(errno) => reply.error(encode(errno)),
            }
        });
    }

    /// Answered by the thread that reads it, so that the watchdog's question waits behind nobody's requests.
    fn statfs(&self, _req: &fuser::Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.served.operations.wait_for_claims();
        // The answer of a filesystem without blocks, with the longest name.
        reply.statfs(0, 0, 0, 0, 0, 512, 255, 0);
    }

    // The operations below do not exist on control files; they fail as they do on cgroupfs.

    fn create(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        self.refuse_name(req, "create", (parent, name), ("created", nix::errno::Errno::EACCES), |errno| {
            reply.error(errno)
        });
    }

    fn mknod(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        use nix::errno::Errno::{EACCES, EPERM};
        // A regular file is refused as open(2) with O_CREAT is.
        let errno = if mode & libc::S_IFMT == libc::S_IFREG { EACCES } else { EPERM };
        self.refuse_name(req, "mknod", (parent, name), ("created", errno), |errno| reply.error(errno));
    }

    fn unlink(&self, req: &fuser::Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.refuse_name(req, "unlink", (parent, name), ("removed", nix::errno::Errno::EPERM), |errno| {
            reply.error(errno)
        });
    }

    fn symlink(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        link_name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        self.refuse_name(
            req,
            "symlink",
            (parent, link_name),
            ("created", nix::errno::Errno::EPERM),
            |errno| reply.error(errno),
        );
    }

    fn link(
        &self,
        req: &fuser::Request,
        _ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let refusal = ("linked", nix::errno::Errno::EPERM);
        self.refuse_name(req, "link", (newparent, newname), refusal, |errno| reply.error(errno));
    }

    fn readlink(&self, req: &fuser::Request, ino: INodeNo, reply: ReplyData) {
        self.unsupported(req, "readlink", ino, nix::errno::Errno::EINVAL, |errno| reply.error(errno));
    }

    fn fallocate(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        self.unsupported(req, "fallocate", ino, nix::errno::Errno::EOPNOTSUPP, |errno| reply.error(errno));
    }

    fn ioctl(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        self.unsupported(req, "ioctl", ino, nix::errno::Errno::ENOTTY, |errno| reply.error(errno));
    }

    // The kernel takes ENOSYS as an answer for all later requests of the same kind, and does not send them: there
    // is nothing to flush or sync, there are no extended attributes, and it seeks without help.

    fn flush(
        &self,
        _req: &fuser::Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(
        &self,
        _req: &fuser::Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fsyncdir(
        &self,
        _req: &fuser::Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _req: &fuser::Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _req: &fuser::Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &fuser::Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _req: &fuser::Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn lseek(
        &self,
        _req: &fuser::Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        reply.error(Errno::ENOSYS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_returns_the_part_of_the_content_at_its_offset() {
        assert_eq!(slice(b"0123456789", 0, 4), b"0123");
        assert_eq!(slice(b"0123456789", 8, 4), b"89");
        assert_eq!(slice(b"0123456789", 10, 4), b"");
        assert_eq!(slice(b"0123456789", u64::MAX, u32::MAX), b"");
    }

    #[test]
    fn poll_reports_an_exceptional_event_only_after_a_change() {
        assert!(!poll_events(false).intersects(PollEvents::POLLPRI | PollEvents::POLLERR));
        assert!(poll_events(true).contains(PollEvents::POLLPRI | PollEvents::POLLERR));
        for has_changed in [false, true] {
            assert!(poll_events(has_changed).contains(PollEvents::POLLIN | PollEvents::POLLOUT));
        }
    }

    #[test]
    fn errnos_keep_their_number() {
        use nix::errno::Errno;
        for errno in [Errno::EPERM, Errno::EBUSY, Errno::ENOSPC, Errno::ESTALE, Errno::E2BIG] {
            assert_eq!(encode(errno).code(), errno as i32);
        }
    }
}
