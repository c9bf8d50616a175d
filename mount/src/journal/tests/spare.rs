//! Records that a disk does not take are left to the next worker in memory.

use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::super::disk::{Disk, RealDisk};
use super::*;

/// A disk that can only be read.
#[derive(Debug)]
struct ReadOnly;

fn refused<T>() -> io::Result<T> {
    Err(Errno::EROFS.into())
}

impl Disk for ReadOnly {
    fn open(&self, _: &Path) -> io::Result<File> {
        refused()
    }

    fn write(&self, _: &File, _: &[u8]) -> io::Result<usize> {
        refused()
    }

    fn set_len(&self, _: &File, _: u64) -> io::Result<()> {
        refused()
    }

    fn rename(&self, _: &Path, _: &Path) -> io::Result<()> {
        refused()
    }
}

fn memfd() -> OwnedFd {
    memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap()
}

/// The next worker on this disk, and the PIDs with claims that it finds.
fn next(disk: Box<dyn Disk>, directory: &TempDir, memfd: &OwnedFd) -> (StateDir, Vec<u32>) {
    let lock = StateLock::take(directory.path()).unwrap();
    let memfd = Some(memfd.try_clone().unwrap());
    let (state, recovered) = StateDir::open_on(disk, lock, directory.path(), BOOT, 1, memfd).unwrap();
    assert!(!recovered.suspect && recovered.damage.is_empty());
    let mut found: Vec<u32> = recovered.claims.iter().map(|claim| claim.task.pid.get()).collect();
    found.sort_unstable();
    (state, found)
}

#[test]
fn what_a_disk_does_not_take_is_left_to_the_next_worker() {
    let (directory, memfd) = (directory(), memfd());
    let (state, _) = next(Box::new(RealDisk), &directory, &memfd);
    (1..=3).for_each(|pid| state.append(&claimed(pid)).unwrap());
    drop(state);
    let (state, found) = next(Box::new(ReadOnly), &directory, &memfd);
    assert_eq!(found, [1, 2, 3]);
    state.append(&claimed(4)).unwrap_err();
    state.defer(Record::Ended { task: task(1), reclaimed: None });
    state.flush().unwrap_err();
    drop(state);
    let (state, found) = next(Box::new(ReadOnly), &directory, &memfd);
    assert_eq!(found, [2, 3], "a claim that was refused is none, and one that has ended has ended");
    state.defer(Record::Ended { task: task(2), reclaimed: None });
    state.flush().unwrap_err();
    drop(state);
    let (state, found) = next(Box::new(RealDisk), &directory, &memfd);
    assert_eq!(found, [3]);
    drop(state);
    assert_eq!(next(Box::new(RealDisk), &directory, &self::memfd()).1, [3], "the file has it");
    // From now on, only the file counts.
    let (state, _) = next(Box::new(RealDisk), &directory, &memfd);
    state.append(&claimed(5)).unwrap();
    drop(state);
    assert_eq!(next(Box::new(RealDisk), &directory, &memfd).1, [3, 5]);
}

#[test]
fn what_was_not_left_completely_is_not_believed() {
    let (directory, memfd) = (directory(), memfd());
    let (state, _) = next(Box::new(RealDisk), &directory, &memfd);
    (1..=2).for_each(|pid| state.append(&claimed(pid)).unwrap());
    drop(state);
    let (state, _) = next(Box::new(ReadOnly), &directory, &memfd);
    state.defer(Record::Ended { task: task(1), reclaimed: None });
    state.flush().unwrap_err();
    drop(state);
    let file = File::from(memfd.try_clone().unwrap());
    let mut whole = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut whole, 0).unwrap();
    for bytes in [&whole[..whole.len() - 1], &whole[..9], &[&[0; 8], &whole[8..]].concat(), &[0xff; 100], b""]
    {
        file.set_len(0).unwrap();
        file.write_all_at(bytes, 0).unwrap();
        assert_eq!(next(Box::new(ReadOnly), &directory, &memfd).1, [1, 2], "{} bytes", bytes.len());
    }
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        file.set_len(0).unwrap();
        file.write_all_at(&flipped, 0).unwrap();
        assert!(next(Box::new(ReadOnly), &directory, &memfd).1 == [1, 2], "byte {at}");
    }
}
