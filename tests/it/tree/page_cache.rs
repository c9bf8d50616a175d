//! No way to read a file shows one reader the content of another, or old content: the page cache has none of it.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;

use crate::harness::program::{Program, command, heard, ready};
use crate::harness::{Mount, text, write};

const SIZE: usize = 4096;

type Way = fn(&File) -> io::Result<Vec<u8>>;

/// The ways to read a file.
const WAYS: &[(&str, Way)] = &[
    ("read", with_read),
    ("pread", with_pread),
    ("readv", with_readv),
    ("preadv2", with_preadv2),
    ("aio", with_aio),
    ("io_uring", with_io_uring),
    ("sendfile", with_sendfile),
    ("splice", with_splice),
    ("copy_file_range", with_copy_file_range),
    ("mmap", with_private_mapping),
];

/// Ways through the page cache, which fail with these errors.
const REFUSED: &[(&str, i32)] = &[
    ("sendfile", libc::EINVAL),
    ("splice", libc::EINVAL),
    ("copy_file_range", libc::EXDEV),
    ("mmap", libc::EFAULT),
];

fn with_read(mut file: &File) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.read_to_end(&mut content).map(|_| content)
}

fn with_pread(file: &File) -> io::Result<Vec<u8>> {
    let mut content = vec![0; 1 << 20];
    let length = file.read_at(&mut content, 0)?;
    content.truncate(length);
    Ok(content)
}

fn with_readv(mut file: &File) -> io::Result<Vec<u8>> {
    let (mut first, mut rest) = ([0; 2], vec![0; 1 << 20]);
    let length =
        file.read_vectored(&mut [io::IoSliceMut::new(&mut first), io::IoSliceMut::new(&mut rest)])?;
    Ok(first.into_iter().chain(rest).take(length).collect())
}

/// The result of a system call that returns a length.
fn checked(length: isize) -> io::Result<usize> {
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}

#[allow(unsafe_code, reason = "no safe wrapper")]
fn with_preadv2(file: &File) -> io::Result<Vec<u8>> {
    let mut content = vec![0; 1 << 20];
    let piece = libc::iovec { iov_base: content.as_mut_ptr().cast(), iov_len: content.len() };
    // SAFETY: the vector outlives the call.
    let length = checked(unsafe { libc::preadv2(file.as_raw_fd(), &raw const piece, 1, 0, 0) })?;
    content.truncate(length);
    Ok(content)
}

/// `struct iocb` and `struct io_event` of include/uapi/linux/aio_abi.h.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

#[repr(C)]
#[derive(Default)]
struct IoEvent {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

#[allow(unsafe_code, reason = "no safe wrapper")]
fn with_aio(file: &File) -> io::Result<Vec<u8>> {
    let mut content = vec![0_u8; 1 << 20];
    let mut block = Iocb {
        fd: file.as_raw_fd() as u32,
        buffer: content.as_mut_ptr() as u64,
        length: content.len() as u64,
        ..Iocb::default()
    };
    let (mut context, mut event) = (0_u64, IoEvent::default());
    let mut blocks = [&raw mut block];
    // SAFETY: the buffer, the block and the event outlive the calls; the last waits for the end of the read.
    unsafe {
        checked(libc::syscall(libc::SYS_io_setup, 1, &raw mut context) as isize)?;
        checked(libc::syscall(libc::SYS_io_submit, context, 1, blocks.as_mut_ptr()) as isize)?;
        let no_timeout = std::ptr::null_mut::<libc::timespec>();
        checked(libc::syscall(libc::SYS_io_getevents, context, 1, 1, &raw mut event, no_timeout) as isize)?;
        libc::syscall(libc::SYS_io_destroy, context);
    }
    let length =
        usize::try_from(event.result).map_err(|_| io::Error::from_raw_os_error(-event.result as i32))?;
    content.truncate(length);
    Ok(content)
}

#[allow(unsafe_code, reason = "no safe wrapper")]
fn with_io_uring(file: &File) -> io::Result<Vec<u8>> {
    // Of this size: after a short read the kernel reads the rest of the buffer, and from the same offset again, as
    // FUSE's asynchronous reads do not advance it.
    let mut content = vec![0_u8; file.metadata()?.len() as usize];
    let mut ring = io_uring::IoUring::new(1)?;
    let fd = io_uring::types::Fd(file.as_raw_fd());
    let entry = io_uring::opcode::Read::new(fd, content.as_mut_ptr(), content.len() as u32).build();
    // SAFETY: the buffer outlives the read, whose end is waited for.
    unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().expect("a completion").result();
    let length = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))?;
    content.truncate(length);
    Ok(content)
}

fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe().expect("a pipe")
}

/// The content of the pipe.
fn drained(pipe: OwnedFd, length: usize) -> io::Result<Vec<u8>> {
    let mut content = vec![0; length];
    File::from(pipe).read_exact(&mut content).map(|()| content)
}

#[allow(unsafe_code, reason = "no safe wrapper")]
fn with_sendfile(file: &File) -> io::Result<Vec<u8>> {
    let (read, write) = pipe();
    // SAFETY: both descriptors are open.
    let sent =
        unsafe { libc::sendfile(write.as_raw_fd(), file.as_raw_fd(), std::ptr::null_mut(), 16 * SIZE) };
    drained(read, checked(sent)?)
}

#[allow(unsafe_code, reason = "no safe wrapper")]
fn with_splice(file: &File) -> io::Result<Vec<u8>> {
    let (read, write) = pipe();
    let none = std::ptr::null_mut();
    // SAFETY: both descriptors are open.
    let moved = unsafe {
        libc::splice(file.as_raw_fd(), none, write.as_raw_fd(), std::ptr::null_mut(), 16 * SIZE, 0)
    };
    drained(read, checked(moved)?)
}

#[allow(unsafe_code, reason = "no safe wrapper")]
fn with_copy_file_range(file: &File) -> io::Result<Vec<u8>> {
    let copy = tempfile::tempfile()?;
    let none = std::ptr::null_mut();
    // SAFETY: both descriptors are open.
    let copied = unsafe {
        libc::copy_file_range(file.as_raw_fd(), none, copy.as_raw_fd(), std::ptr::null_mut(), SIZE, 0)
    };
    let length = checked(copied)?;
    let mut content = vec![0; length];
    copy.read_exact_at(&mut content, 0).map(|()| content)
}

/// Reads a private mapping by write(2), which fails instead of raising SIGBUS.
#[allow(unsafe_code, reason = "no safe wrapper")]
fn with_private_mapping(file: &File) -> io::Result<Vec<u8>> {
    let (read, write) = pipe();
    // SAFETY: a new mapping, which only the kernel reads, and which is unmapped at the end.
    let written = unsafe {
        let private = libc::MAP_PRIVATE;
        let mapped = libc::mmap(std::ptr::null_mut(), SIZE, libc::PROT_READ, private, file.as_raw_fd(), 0);
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let written = checked(libc::write(write.as_raw_fd(), mapped, SIZE));
        libc::munmap(mapped, SIZE);
        written
    };
    let mut content = drained(read, written?)?;
    content.truncate(file.metadata()?.len() as usize);
    Ok(content)
}

/// A program that reads the files that it is asked for, one way after the other.
pub fn reader() {
    ready();
    loop {
        let line = heard();
        let (way, file) = line.trim_end().split_once(' ').expect("a way and a file");
        let (_, read) = WAYS.iter().find(|(name, _)| *name == way).expect("a known way");
        match File::open(file).and_then(|file| read(&file)) {
            Ok(content) => println!("{}", text(&content).escape_default()),
            Err(error) => println!("errno {}", error.raw_os_error().unwrap_or(0)),
        }
    }
}

/// What the program reads.
fn read_by(program: &mut Program, way: &str, file: &str) -> String {
    program.say(&format!("{way} {file}"));
    program.hear()
}

#[test]
fn no_way_to_read_shows_cached_content() {
    let mount = Mount::with_dataplane();
    let mut readers = [0, 1].map(|_| Program::start(&mut command(&[], "reader")));
    for (cpu, reader) in readers.iter().enumerate() {
        write(&mount.tasks("dataplane", &cpu.to_string()), reader.pid().to_string()).expect("a claim");
    }
    let files: Vec<String> = mount
        .walk()
        .into_iter()
        .filter(|(_, metadata)| metadata.is_file() && metadata.len() <= SIZE as u64)
        .map(|(name, _)| name)
        // They change with every read.
        .filter(|name| !name.ends_with("metrics") && !name.ends_with("lock"))
        .collect();
    for file in ["self/cpus", "self/claim", "self/last_error", "pools/dataplane/0/tasks", "info/events"] {
        assert!(files.iter().any(|name| name.ends_with(file)), "{file} is not in {files:?}");
    }
    for file in &files {
        let path = mount.conf().join(file).display().to_string();
        for (way, _) in WAYS {
            for reader in &mut readers {
                let expected = read_by(reader, "read", &path);
                let got = read_by(reader, way, &path);
                match REFUSED.iter().find(|(refused, _)| refused == way) {
                    // An empty file is not read at all.
                    Some(_) if expected.is_empty() && got.is_empty() => {}
                    Some((_, errno)) => assert_eq!(got, format!("errno {errno}"), "{way} of {file}"),
                    None => assert_eq!(got, expected, "{way} of {file}"),
                }
            }
        }
    }
}

#[test]
fn two_readers_at_once_read_their_own_cpus() {
    let mount = Mount::with_dataplane();
    let path = mount.conf().join("self/cpus").display().to_string();
    std::thread::scope(|scope| {
        for cpu in ["0", "1"] {
            let (mount, path) = (&mount, &path);
            scope.spawn(move || {
                let mut reader = Program::start(&mut command(&[], "reader"));
                write(&mount.tasks("dataplane", cpu), reader.pid().to_string()).expect("a claim");
                for _ in 0..500 {
                    let got = read_by(&mut reader, "sendfile", path);
                    assert_eq!(got, format!("errno {}", libc::EINVAL));
                    assert_eq!(read_by(&mut reader, "read", path), format!("{cpu}\\n"));
                }
            });
        }
    });
}

#[test]
fn programs_that_copy_fall_back_to_read() {
    let mount = Mount::with_dataplane();
    let copy = mount.home().join("copy");
    let copied = mount.sh(&format!(
        "cd {conf}; echo 0 > pools/dataplane/1/tasks; cp self/cpus {copy}; cat {copy} self/cpus;
         python3 -c 'import shutil; shutil.copyfile(\"self/cpus\", \"{copy}\")'; cat {copy}",
        conf = mount.conf().display(),
        copy = copy.display()
    ));
    assert_eq!(copied, "1\n1\n1\n");
}
