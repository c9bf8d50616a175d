//! The lower bound: a FUSE filesystem that does nothing, with the same fuser and the same mount options as kcm.
//!
//! Owns its process (this program, started with `--empty`) and its mount. Every directory exists, with the files that kcm
//! has: a write is answered and ignored; a read of `tasks` returns as many bytes as the name of the directory says, and of
//! other files nothing. Everybody may write. Does not know what is measured.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

/// The flag that starts this program as such a filesystem.
pub const FLAG: &str = "--empty";
/// The flag that lets the kernel cache file attributes. kcm cannot do that for files whose size must always be right.
pub const REMEMBERED: &str = "--remembered";
/// The same values as in kcm (`mount/src/fuse`).
const THREADS: usize = 4;
const FOR_GOOD: Duration = Duration::from_secs(365 * 24 * 3600);
const MAX_WRITE: u32 = 1 << 20;
/// The names of files; every other name is a directory's.
const FILES: [&str; 7] = ["tasks", "claim", "cpus", "last_error", "metrics", "topology", "version"];

struct Nothing {
    /// How long the kernel may cache the attributes of a file.
    lasts: Duration,
    /// Inode numbers by parent and name; directories have even ones.
    nodes: Mutex<HashMap<(u64, String), u64>>,
    /// The content of `tasks`.
    content: Vec<u8>,
    sizes: Mutex<HashMap<u64, usize>>,
}

impl Nothing {
    fn attributes(&self, node: u64) -> (Duration, FileAttr) {
        let is_dir = node.is_multiple_of(2) || node == 1;
        let born = SystemTime::UNIX_EPOCH;
        let attr = FileAttr {
            ino: INodeNo(node),
            size: 0,
            blocks: 0,
            atime: born,
            mtime: born,
            ctime: born,
            crtime: born,
            kind: if is_dir { FileType::Directory } else { FileType::RegularFile },
            perm: if is_dir { 0o755 } else { 0o666 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        };
        (if is_dir { FOR_GOOD } else { self.lasts }, attr)
    }
}

impl Filesystem for Nothing {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        for wanted in
            [InitFlags::FUSE_ATOMIC_O_TRUNC, InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_HAS_RESEND]
        {
            let _ = config.add_capabilities(wanted);
        }
        let _ = config.set_max_write(MAX_WRITE);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_string_lossy().into_owned();
        let mut nodes = self.nodes.lock().expect("a lock");
        let next = 2 * (nodes.len() as u64 + 2) + u64::from(FILES.contains(&name.as_str()));
        let node = *nodes.entry((parent.into(), name.clone())).or_insert(next);
        let size = name.parse().unwrap_or(0);
        let mut sizes = self.sizes.lock().expect("a lock");
        let size = if name == "tasks" { sizes.get(&parent.into()).copied().unwrap_or(0) } else { size };
        sizes.insert(node, size);
        let (lasts, attr) = self.attributes(node);
        reply.entry_with_ttls(&lasts, &FOR_GOOD, &attr, Generation(0));
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let (lasts, attr) = self.attributes(ino.into());
        reply.attr(&lasts, &attr);
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
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
        let (lasts, attr) = self.attributes(ino.into());
        reply.attr(&lasts, &attr);
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let end = self.sizes.lock().expect("a lock").get(&ino.into()).copied().unwrap_or(0);
        let start = (offset as usize).min(end);
        reply.data(&self.content[start..end.min(start + size as usize)]);
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.written(data.len() as u32);
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    // The kernel asks once.
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
}

/// Mounts and serves until it is unmounted.
pub fn serve(dir: &str, remembered: bool) -> Result<(), Box<dyn std::error::Error>> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    mount(Some("kcm-bench"), dir, Some("fuse.kcm-bench"), flags, Some(data.as_str()))?;
    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    let nothing = Nothing {
        lasts: if remembered { FOR_GOOD } else { Duration::ZERO },
        nodes: Mutex::default(),
        content: vec![b'7'; 1 << 20],
        sizes: Mutex::default(),
    };
    let session = Session::from_fd(nothing, device.into(), SessionACL::All, config)?;
    let place = PathBuf::from(dir);
    std::thread::spawn(move || {
        // The benchmark has ended.
        let _ = std::io::stdin().lines().count();
        umount2(&place, MntFlags::MNT_DETACH)
    });
    println!("ready");
    match session.run() {
        // It was unmounted while clients were waiting.
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => Ok(()),
        ended => Ok(ended?),
    }
}

/// A mounted null filesystem; unmounted when dropped.
pub struct NullFs {
    dir: TempDir,
    child: Child,
}

impl NullFs {
    /// The kernel asks for attributes each time, as for kcm's `tasks`, whose size is always right.
    pub fn new() -> Self {
        Self::start(&[])
    }

    /// The kernel caches attributes. A filesystem whose files change on their own cannot allow that.
    pub fn remembered() -> Self {
        Self::start(&[REMEMBERED])
    }

    fn start(flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.arg(FLAG).arg(dir.path()).args(flags).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("a process");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("text");
        assert_eq!(line.trim(), "ready", "the empty filesystem cannot be mounted");
        Self { dir, child }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The path of a `tasks` file, as deep as kcm's.
    pub fn tasks(&self, list: &str) -> PathBuf {
        self.path().join("pools/dataplane").join(list).join("tasks")
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for NullFs {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}
