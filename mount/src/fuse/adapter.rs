//! The FUSE adapter: requests in, replies out.
//!
//! Owns: what the kernel is told (time-outs, flags, attributes). The only file that names fuser's replies.
//! Must not know: any rule; each handler asks [`Node`] or [`OpenFiles`] and answers. Nothing here blocks.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags,
    PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::abi::split_unique;
use crate::engine::{Admission, Attributes, Caller, Engine, RESERVED_HANDLES};
use crate::handles::OpenFiles;
use crate::model::refusal::Refusal;
use crate::tree::{Node, Stat, WriteRequest};

/// Names, and what does not change behind the kernel's back, it may remember for good: whatever changes them
/// goes through it.
const FOR_GOOD: Duration = Duration::from_secs(365 * 24 * 3600);
/// One write(2) of up to this many bytes comes as one request, wherever its buffer lies.
const MAX_WRITE: u32 = 1 << 20;

/// The mount.
#[derive(Debug)]
pub(crate) struct Fs {
    engine: Arc<Engine>,
    files: OpenFiles,
    /// All times that stat(2) shows.
    born: SystemTime,
}

impl Fs {
    pub(crate) fn new(engine: Arc<Engine>, files: OpenFiles) -> Self {
        Self { engine, files, born: SystemTime::now() }
    }

    fn admit(&self, req: &Request) -> Admission {
        let (request, is_replay) = split_unique(req.unique().0);
        self.engine.admit(request, is_replay)
    }

    /// Carries out a request that changes something, unless that has been done; then `repeat` gives what is
    /// answered again.
    fn once<T>(
        &self,
        req: &Request,
        change: impl FnOnce() -> Result<T, Errno>,
        repeat: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match self.admit(req) {
            Admission::New => change(),
            Admission::Answered(None) => repeat(),
            Admission::Answered(Some(errno)) => Err(Errno::from_i32(errno as i32)),
            Admission::Deadly => Err(Errno::EIO),
        }
    }

    fn node(&self, ino: INodeNo) -> Result<Node, Errno> {
        Node::of(&self.engine, ino.into()).ok_or(Errno::ESTALE)
    }

    /// The node of an open file, which may have been removed meanwhile.
    fn opened(&self, ino: INodeNo) -> Result<Node, Errno> {
        Node::of(&self.engine, ino.into()).ok_or(Errno::ENODEV)
    }

    fn child(&self, parent: INodeNo, name: &OsStr) -> Result<Node, Errno> {
        let parent = self.node(parent)?;
        name.to_str().and_then(|name| parent.child(&self.engine, name)).ok_or(Errno::ENOENT)
    }

    fn attributes(&self, stat: &Stat) -> (Duration, FileAttr) {
        let attr = FileAttr {
            ino: INodeNo(stat.node),
            size: stat.size,
            blocks: 0,
            atime: self.born,
            mtime: self.born,
            ctime: self.born,
            crtime: self.born,
            kind: if stat.is_dir { FileType::Directory } else { FileType::RegularFile },
            perm: stat.owner.mode,
            nlink: stat.links,
            uid: stat.owner.uid,
            gid: stat.owner.gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        };
        (if stat.cacheable { FOR_GOOD } else { Duration::ZERO }, attr)
    }

    fn reply_entry(&self, req: &Request, node: Result<Node, Errno>, reply: ReplyEntry) {
        match node {
            Ok(node) => {
                let (lasts, attr) = self.attributes(&node.stat(&self.engine, caller(req)));
                reply.entry_with_ttls(&lasts, &FOR_GOOD, &attr, Generation(0));
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn reply_attr(&self, req: &Request, node: Result<Node, Errno>, reply: ReplyAttr) {
        match node {
            Ok(node) => {
                let (lasts, attr) = self.attributes(&node.stat(&self.engine, caller(req)));
                reply.attr(&lasts, &attr);
            }
            Err(errno) => reply.error(errno),
        }
    }

    /// Takes no more commands through the file.
    fn refuse(&self, fh: FileHandle) {
        if self.files.mark_truncated(fh.into()) {
            self.engine.note_rest(fh.into());
        }
    }

    /// Owner and mode; a truncation means nothing on a control file, and times nothing anywhere.
    fn change(
        &self,
        caller: Caller,
        node: Node,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: bool,
    ) -> Result<(), Errno> {
        if size && !node.is_writable() {
            return Err(Errno::EINVAL);
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
        self.engine.set_attributes(caller, node.id(), new).map_err(|refusal| errno(&refusal))
    }

    fn take(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        data: &[u8],
        flags: OpenFlags,
    ) -> Result<(), Errno> {
        let (node, caller) = (self.opened(ino)?, caller(req));
        if self.files.is_truncated(fh.into()) {
            self.engine.refused(caller, &Refusal::Rest);
            return Err(errno(&Refusal::Rest));
        }
        let request = WriteRequest {
            data,
            opener: OpenFiles::opener(fh.into()),
            read_write: flags.acc_mode() == OpenAccMode::O_RDWR,
        };
        node.store(&self.engine, caller, &request).map_err(|refusal| {
            if refusal == Refusal::TooLong {
                self.refuse(fh);
            }
            errno(&refusal)
        })
    }

    /// What kernfs answers: always readable and writable, and exceptional where the content is another than
    /// was last read through this file.
    fn poll_events(
        &self,
        ino: INodeNo,
        fh: FileHandle,
        notifier: Option<PollNotifier>,
    ) -> Result<PollEvents, Errno> {
        let ordinary =
            PollEvents::POLLIN | PollEvents::POLLOUT | PollEvents::POLLRDNORM | PollEvents::POLLWRNORM;
        let exceptional = ordinary | PollEvents::POLLERR | PollEvents::POLLPRI;
        let Ok(node) = self.opened(ino) else { return Ok(exceptional) };
        if !(node.is_volatile() && node.is_writable()) {
            return Ok(ordinary);
        }
        self.engine.reap();
        let seen = self.files.seen(fh.into());
        let version = match notifier {
            Some(notifier) => self.engine.changes.arm(fh.into(), ino.into(), seen, Box::new(notifier)),
            None => self.engine.changes.version(ino.into()),
        };
        Ok(if version == seen { ordinary } else { exceptional })
    }
}

/// Answers a request that killed two workers; it changes nothing, so otherwise it is carried out again.
macro_rules! admit {
    ($fs:expr, $req:expr, $reply:expr) => {
        if $fs.admit($req) == Admission::Deadly {
            return $reply.error(Errno::EIO);
        }
    };
}

fn caller(req: &Request) -> Caller {
    Caller { tid: req.pid(), uid: req.uid(), request: split_unique(req.unique().0).0 }
}

fn errno(refusal: &Refusal) -> Errno {
    Errno::from_i32(refusal.errno() as i32)
}

/// The parts of `content` that a read sees.
fn window(content: &[u8], offset: u64, size: u32) -> &[u8] {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
    let end = start.saturating_add(size as usize).min(content.len());
    content.get(start..end).unwrap_or_default()
}

impl Filesystem for Fs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // What an old kernel does not offer it does without.
        for wanted in
            [InitFlags::FUSE_ATOMIC_O_TRUNC, InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_HAS_RESEND]
        {
            let _ = config.add_capabilities(wanted);
        }
        let _ = config.set_max_write(MAX_WRITE);
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        admit!(self, req, reply);
        self.reply_entry(req, self.child(parent, name), reply);
    }

    fn getattr(&self, req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        admit!(self, req, reply);
        self.reply_attr(req, self.node(ino), reply);
    }

    fn setattr(
        &self,
        req: &Request,
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
        let node = self.node(ino).and_then(|node| {
            let change = || self.change(caller(req), node, mode, uid, gid, size.is_some());
            self.once(req, change, || Ok(())).map(|()| node)
        });
        self.reply_attr(req, node, reply);
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let made = self.node(parent).and_then(|home| {
            let make = || {
                // A name that is no text is none of a pool or a list; let their rules say so.
                let name = name.to_str().unwrap_or("\u{fffd}");
                let made = home.make_child(&self.engine, caller(req), name).ok_or(Errno::EPERM)?;
                made.map_err(|refusal| errno(&refusal))
            };
            self.once(req, make, || self.child(parent, name))
        });
        self.reply_entry(req, made, reply);
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let remove = || {
            let node = self.child(parent, name)?;
            let removed = node.remove(&self.engine, caller(req)).ok_or(Errno::EPERM)?;
            removed.map_err(|refusal| errno(&refusal))
        };
        match self.once(req, remove, || Ok(())) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn open(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        admit!(self, req, reply);
        match self.node(ino) {
            Ok(_) => {
                let (fh, number) = self.files.open(req.uid());
                if self.files.opened_before(number) % RESERVED_HANDLES == RESERVED_HANDLES - 1 {
                    self.engine.reserve_handles(number);
                }
                // Past the page cache: content changes by itself, and a write is a command.
                let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
                reply.opened(FileHandle(fh), flags);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        admit!(self, req, reply);
        let started = Instant::now();
        let content = self.opened(ino).and_then(|node| {
            let show = || {
                // The version first: a change after it makes poll(2) report once more, never once less.
                let version = self.engine.changes.version(ino.into());
                (version, node.show(&self.engine, caller(req)).unwrap_or_default())
            };
            self.files.read(fh.into(), offset, show).map_err(|_stale| Errno::ESTALE)
        });
        match content {
            Ok(content) => reply.data(window(&content, offset, size)),
            Err(errno) => reply.error(errno),
        }
        self.engine.metrics.took(started.elapsed());
    }

    fn write(
        &self,
        req: &Request,
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
        let taken = self.once(req, || self.take(req, ino, fh, data, flags), || Ok(()));
        match taken {
            Ok(()) => reply.written(data.len() as u32),
            Err(errno) => {
                if errno.code() == nix::errno::Errno::E2BIG as i32 {
                    // Where the answer came from the journal, this may be all that is left to be done.
                    self.refuse(fh);
                }
                reply.error(errno);
            }
        }
        self.engine.metrics.took(started.elapsed());
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if self.files.close(fh.into()) {
            self.engine.note_closed(fh.into());
        }
        self.engine.changes.disarm(fh.into());
        reply.ok();
    }

    fn poll(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        ph: PollNotifier,
        _events: PollEvents,
        flags: PollFlags,
        reply: ReplyPoll,
    ) {
        admit!(self, req, reply);
        if self.files.polled(fh.into(), ph.handle().0) {
            self.engine.note_poll(fh.into(), ph.handle().0);
        }
        let notifier = flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY).then_some(ph);
        match self.poll_events(ino, fh, notifier) {
            Ok(events) => reply.poll(events),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        admit!(self, req, reply);
        let node = match self.node(ino) {
            Ok(node) => node,
            Err(errno) => return reply.error(errno),
        };
        // The place of an entry is its node id, which stays the same whatever else comes and goes.
        let mut entries: Vec<(u64, u64, bool, String)> =
            vec![(1, ino.into(), true, ".".into()), (2, node.parent(&self.engine), true, "..".into())];
        let children = node.children(&self.engine);
        entries.extend(
            children.into_iter().map(|(name, child)| (child.id() + 2, child.id(), child.is_dir(), name)),
        );
        entries.sort_unstable();
        for (place, id, is_dir, name) in entries.into_iter().filter(|(place, ..)| *place > offset) {
            let kind = if is_dir { FileType::Directory } else { FileType::RegularFile };
            if reply.add(INodeNo(id), place, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    // What a control filesystem does not offer is refused as cgroupfs refuses it.

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EACCES);
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        // A file that is made in this way is one that is created.
        reply.error(if mode & libc::S_IFMT == libc::S_IFREG { Errno::EACCES } else { Errno::EPERM });
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn symlink(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _link_name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn link(&self, _req: &Request, _ino: INodeNo, _newparent: INodeNo, _newname: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(if flags.is_empty() { Errno::EPERM } else { Errno::EINVAL });
    }

    fn readlink(&self, _req: &Request, _ino: INodeNo, reply: ReplyData) {
        reply.error(Errno::EINVAL);
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    // These ENOSYS are asked for once; from then on the kernel answers by itself: nothing to flush or sync,
    // extended attributes are not supported, and it seeks alone.

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        reply.error(Errno::ENOSYS);
    }
}
