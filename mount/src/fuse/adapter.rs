//! The FUSE adapter: decodes requests, calls [`Operations`] and encodes replies.
//!
//! Owns caching times, flags and attributes as the kernel gets them. Does not know what an operation does.
//!
//! Longer than 400 lines because more than half of it is the signatures of fuser's trait.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags,
    PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyWrite, ReplyXattr, TimeOrNow, WriteFlags,
};

use super::abi::split_unique;
use super::operations::{AttributeChange, Operations};
use super::request::{Object, Request};
use crate::engine::{Caller, Engine, Notify};
use crate::handles::OpenFiles;
use crate::tree::Stat;

/// For how long the kernel may cache names and attributes that only change through it: in effect without limit.
const TTL_FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// The largest write(2) that arrives as one request, in bytes. It is larger than the longest command, so that a
/// command that is too long is seen as one.
const MAX_WRITE: u32 = 1 << 20;

/// The mounted filesystem.
#[derive(Debug)]
pub(super) struct Fs {
    operations: Operations,
    /// All times that stat(2) shows.
    mounted_at: SystemTime,
}

impl Fs {
    pub(super) fn new(engine: Arc<Engine>, files: OpenFiles) -> Self {
        Self { operations: Operations::new(engine, files), mounted_at: SystemTime::now() }
    }

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

    fn unsupported(
        &self,
        req: &fuser::Request,
        operation: &'static str,
        object: Object<'_>,
        errno: nix::errno::Errno,
    ) -> Errno {
        encode(self.operations.unsupported(decode(req), operation, object, errno))
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
        self.reply_entry(self.operations.lookup(decode(req), parent.into(), name), reply);
    }

    fn getattr(&self, req: &fuser::Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.reply_attr(self.operations.getattr(decode(req), ino.into()), reply);
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
        self.reply_attr(self.operations.setattr(decode(req), ino.into(), change), reply);
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
        self.reply_entry(self.operations.mkdir(decode(req), parent.into(), name), reply);
    }

    fn rmdir(&self, req: &fuser::Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        match self.operations.rmdir(decode(req), parent.into(), name) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(encode(errno)),
        }
    }

    fn open(&self, req: &fuser::Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.operations.open(decode(req), ino.into(), flags.acc_mode() != OpenAccMode::O_RDONLY) {
            Ok(handle) => {
                // Bypasses the page cache: the content changes without a write, and a write is a command.
                let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
                reply.opened(FileHandle(handle), flags);
            }
            Err(errno) => reply.error(encode(errno)),
        }
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
        match self.operations.read_at(decode(req), ino.into(), fh.into(), offset, fills_page_cache) {
            Ok((content, start)) => {
                reply.data(offset.checked_sub(start).map_or(&[], |at| slice(&content, at, size)))
            }
            Err(errno) => reply.error(encode(errno)),
        }
        self.operations.count_latency(started.elapsed());
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
        match self.operations.write(decode(req), ino.into(), fh.into(), data, read_write) {
            Ok(()) => reply.written(data.len() as u32),
            Err(errno) => reply.error(encode(errno)),
        }
        self.operations.count_latency(started.elapsed());
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
        self.operations.release(decode(req), ino.into(), fh.into());
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
        let handle = ph.handle().0;
        let notify =
            flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY).then(|| Box::new(ph) as Box<dyn Notify>);
        match self.operations.poll(decode(req), ino.into(), fh.into(), handle, notify) {
            Ok(has_changed) => reply.poll(poll_events(has_changed)),
            Err(errno) => reply.error(encode(errno)),
        }
    }

    fn readdir(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        match self.operations.readdir(decode(req), ino.into(), offset) {
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
        reply.error(self.unsupported(
            req,
            "create",
            Object::Name(parent.into(), name),
            nix::errno::Errno::EACCES,
        ));
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
        reply.error(self.unsupported(req, "mknod", Object::Name(parent.into(), name), errno));
    }

    fn unlink(&self, req: &fuser::Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.unsupported(
            req,
            "unlink",
            Object::Name(parent.into(), name),
            nix::errno::Errno::EPERM,
        ));
    }

    fn symlink(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        link_name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(self.unsupported(
            req,
            "symlink",
            Object::Name(parent.into(), link_name),
            nix::errno::Errno::EPERM,
        ));
    }

    fn link(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        _newparent: INodeNo,
        _newname: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(self.unsupported(req, "link", Object::Node(ino.into()), nix::errno::Errno::EPERM));
    }

    fn rename(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        use nix::errno::Errno::{EINVAL, EPERM};
        let errno = if flags.is_empty() { EPERM } else { EINVAL };
        reply.error(self.unsupported(req, "rename", Object::Name(parent.into(), name), errno));
    }

    fn readlink(&self, req: &fuser::Request, ino: INodeNo, reply: ReplyData) {
        reply.error(self.unsupported(req, "readlink", Object::Node(ino.into()), nix::errno::Errno::EINVAL));
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
        reply.error(self.unsupported(
            req,
            "fallocate",
            Object::Node(ino.into()),
            nix::errno::Errno::EOPNOTSUPP,
        ));
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
        reply.error(self.unsupported(req, "ioctl", Object::Node(ino.into()), nix::errno::Errno::ENOTTY));
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
