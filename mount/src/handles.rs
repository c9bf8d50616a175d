//! Open files: their openers, the snapshots that are read from them, and truncated commands.
//!
//! Owns file handles. A handle holds the opener's uid in its upper half and its capabilities in two bits, so that the
//! next daemon knows them without a record; the other bits are a number that no other open file of this mount has.
//! Does not know what a file contains.
//!
//! Longer than 400 lines because all that is remembered of an open file is read together.
//!
//! The two bits of the uid 0 say what it *lacks*: handles that an earlier version of this program made have the bits 0,
//! and for it the uid 0 had all rights, and no other uid any.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use crate::model::rights::User;
use crate::tree::Content;

/// The bits for the number of an open file.
const NUMBER: u32 = (1 << 30) - 1;
/// The opener has `CAP_SYS_ADMIN`; of the uid 0, that it lacks it.
const ADMIN: u32 = 1 << 30;
/// The same for `CAP_SYS_NICE`.
const NICE: u32 = 1 << 31;

/// How many open files of one user are polled. The next worker needs about 3 microseconds for each.
const MAX_POLLED: u32 = 4096;
/// The same for root, which is also the root of every container.
const MAX_POLLED_OF_ROOT: u32 = 32_768;
/// How many of all users are. Beyond it, each user still has [`RESERVED_POLLED`].
const MAX_POLLED_OF_ALL: u32 = 65_536;
const RESERVED_POLLED: u32 = 16;

/// The limit for the snapshots of all open files, in bytes.
const MAX_KEPT: usize = 64 << 20;
/// From how many bytes on the snapshot of a file that grows begins anew.
const MAX_FOLLOWED: usize = 1 << 20;

/// The handles of all open files.
#[derive(Debug)]
pub(crate) struct OpenFiles {
    first: u32,
    next: AtomicU32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Only the files of which something has to be remembered.
    files: HashMap<u64, OpenFile>,
    kept: usize,
    /// How many files are polled, in all and of each user.
    polled: u32,
    polled_of: HashMap<u32, u32>,
}

#[derive(Debug, Default)]
struct OpenFile {
    /// The content for reads at offsets greater than 0.
    snapshot: Option<Content>,
    /// For a file that grows: the offset of the snapshot's first byte, and the size of the file at its end.
    place: (u64, u64),
    /// The version of the file when it was last read; 0 if it was not read.
    seen: u64,
    /// A command through it was too long, so the next write may be the rest of it.
    truncated: bool,
    /// The kernel's handle under which it is polled, if that is recorded.
    polled: Option<u64>,
}

impl OpenFile {
    /// Returns whether the journal has a record of it.
    fn is_noted(&self) -> bool {
        self.truncated || self.polled.is_some()
    }
}

impl State {
    /// Counts a polled file. Returns whether its user may poll another one.
    fn count_polled(&mut self, uid: u32) -> bool {
        let of_user = self.polled_of.entry(uid).or_default();
        let most = if uid == 0 { MAX_POLLED_OF_ROOT } else { MAX_POLLED };
        let is_allowed = *of_user < most && (self.polled < MAX_POLLED_OF_ALL || *of_user < RESERVED_POLLED);
        if is_allowed {
            *of_user += 1;
            self.polled += 1;
        }
        is_allowed
    }

    fn forget_polled(&mut self, uid: u32) {
        self.polled = self.polled.saturating_sub(1);
        if let Some(of_user) = self.polled_of.get_mut(&uid) {
            *of_user -= 1;
            if *of_user == 0 {
                self.polled_of.remove(&uid);
            }
        }
    }
}

/// A file that is polled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Polled {
    /// It is new that the file is polled under this handle of the kernel.
    New,
    /// That is known.
    Known,
    /// The user polls too many files.
    TooMany,
}

/// The snapshot is no longer available.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stale;

impl OpenFiles {
    /// Numbers handles from `first`, which no earlier worker has used. `polls` and `truncated` describe files that
    /// were opened through earlier workers.
    pub(crate) fn new(first: u32, polls: &[(u64, u64)], truncated: &[u64]) -> Self {
        let mut state = State::default();
        for &(fh, kh) in polls {
            state.files.entry(fh).or_default().polled = Some(kh);
            state.polled += 1;
            *state.polled_of.entry(user_of(fh)).or_default() += 1;
        }
        for &fh in truncated {
            state.files.entry(fh).or_default().truncated = true;
        }
        Self { first, next: AtomicU32::new(first), state: Mutex::new(state) }
    }

    /// Returns a handle for a file that this user opens, and its number.
    pub(crate) fn open(&self, User { uid, admin, nice, .. }: User) -> (u64, u32) {
        let number = self.next.fetch_add(1, Ordering::Relaxed) & NUMBER;
        let bits = if admin { ADMIN } else { 0 } | if nice { NICE } else { 0 };
        (u64::from(uid) << 32 | u64::from(number | bits ^ meaning_of_zero(uid)), number)
    }

    /// Returns how many files were opened before this number.
    pub(crate) fn opened_before(&self, number: u32) -> u32 {
        number.wrapping_sub(self.first) & NUMBER
    }

    /// Returns the user who opened the file, with the capabilities that it had then.
    pub(crate) fn opener(fh: u64) -> User {
        let uid = user_of(fh);
        let bits = fh as u32 ^ meaning_of_zero(uid);
        User { admin: bits & ADMIN != 0, nice: bits & NICE != 0, ..User::without_capabilities(uid) }
    }

    /// Forgets the file. Returns whether the journal has a record of it.
    pub(crate) fn close(&self, fh: u64) -> bool {
        let mut state = self.state.lock();
        let Some(file) = state.files.remove(&fh) else { return false };
        state.kept -= file.snapshot.as_ref().map_or(0, |snapshot| snapshot.len());
        if file.polled.is_some() {
            state.forget_polled(user_of(fh));
        }
        file.is_noted()
    }

    /// Notes that the file is polled under this handle of the kernel.
    pub(crate) fn polled(&self, fh: u64, kh: u64) -> Polled {
        let mut state = self.state.lock();
        match state.files.get(&fh).and_then(|file| file.polled) {
            Some(known) if known == kh => return Polled::Known,
            Some(_) => {}
            None if state.count_polled(user_of(fh)) => {}
            None => return Polled::TooMany,
        }
        state.files.entry(fh).or_default().polled = Some(kh);
        Polled::New
    }

    /// Returns the content for a read at `offset`: at offset 0 what `show` returns now, at other offsets the same
    /// content as then.
    ///
    /// # Errors
    /// [`Stale`] if it was read through an earlier worker, or dropped because of the limit.
    pub(crate) fn read(
        &self,
        fh: u64,
        offset: u64,
        show: impl FnOnce() -> (u64, Content),
    ) -> Result<Content, Stale> {
        if offset > 0 {
            match self.state.lock().files.get(&fh) {
                Some(OpenFile { snapshot: Some(snapshot), .. }) => return Ok(Content::clone(snapshot)),
                Some(OpenFile { seen: 1.., .. }) => return Err(Stale),
                // It may have been read through an earlier worker.
                _ if !self.is_ours(fh) => return Err(Stale),
                _ => {}
            }
        }
        let (version, content) = show();
        self.keep(fh, version, Content::clone(&content));
        Ok(content)
    }

    /// As [`OpenFiles::read`], for a file to which lines are added while others are dropped, and which has this version now.
    /// `show` returns the lines, and
    /// the size that the file would have if none had been dropped; with an argument, only the lines that were added since
    /// it had that size. Returns the content and its offset.
    ///
    /// A file that is read from the beginning begins with the oldest line. A file that is first read elsewhere
    /// (`tail`) has the offsets that it would have if nothing had been dropped. At the end of the snapshot, the lines
    /// that were added since follow.
    ///
    /// # Errors
    /// As for [`OpenFiles::read`].
    pub(crate) fn read_growing(
        &self,
        fh: u64,
        offset: u64,
        version: u64,
        show: impl FnOnce(Option<u64>) -> (Content, u64),
    ) -> Result<(Content, u64), Stale> {
        let known = self.state.lock().files.get(&fh).map(|file| (file.snapshot.clone(), file.place));
        match known {
            _ if offset == 0 => {}
            Some((Some(snapshot), (start, end))) => {
                if offset < start + snapshot.len() as u64 {
                    return Ok((snapshot, start));
                }
                let (added, now) = show(Some(end));
                let old = if snapshot.len() < MAX_FOLLOWED { &snapshot[..] } else { &[] };
                let start = start + (snapshot.len() - old.len()) as u64;
                return Ok(self.keep_growing(fh, version, [old, &added].concat().into(), (start, now)));
            }
            Some((None, (_, 1..))) => return Err(Stale),
            // It may have been read through an earlier worker.
            _ if !self.is_ours(fh) => return Err(Stale),
            _ => {}
        }
        let (content, now) = show(None);
        let start = if offset == 0 { 0 } else { now.saturating_sub(content.len() as u64) };
        Ok(self.keep_growing(fh, version, content, (start, now)))
    }

    fn keep_growing(&self, fh: u64, version: u64, content: Content, place: (u64, u64)) -> (Content, u64) {
        self.keep(fh, version, Content::clone(&content));
        self.state.lock().files.entry(fh).or_default().place = place;
        (content, place.0)
    }

    fn keep(&self, fh: u64, version: u64, content: Content) {
        let mut state = self.state.lock();
        let len = content.len();
        let file = state.files.entry(fh).or_default();
        file.seen = version;
        let old = file.snapshot.replace(content);
        state.kept = state.kept + len - old.map_or(0, |old| old.len());
        if state.kept > MAX_KEPT {
            for (_, file) in state.files.iter_mut().filter(|(other, _)| **other != fh) {
                file.snapshot = None;
            }
            state.kept = len;
        }
    }

    /// Returns the version that was read last; 0 if none was.
    pub(crate) fn seen(&self, fh: u64) -> u64 {
        self.state.lock().files.get(&fh).map_or(0, |file| file.seen)
    }

    /// Accepts no more commands through this file. Returns whether that is new.
    pub(crate) fn mark_truncated(&self, fh: u64) -> bool {
        !std::mem::replace(&mut self.state.lock().files.entry(fh).or_default().truncated, true)
    }

    pub(crate) fn is_truncated(&self, fh: u64) -> bool {
        self.state.lock().files.get(&fh).is_some_and(|file| file.truncated)
    }

    fn is_ours(&self, fh: u64) -> bool {
        let next = self.next.load(Ordering::Relaxed);
        self.opened_before(fh as u32) < next.wrapping_sub(self.first)
    }
}

/// Returns the uid of the opener.
fn user_of(fh: u64) -> u32 {
    (fh >> 32) as u32
}

/// Returns the capabilities of an opener whose bits are 0.
fn meaning_of_zero(uid: u32) -> u32 {
    if uid == 0 { ADMIN | NICE } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Content {
        text.as_bytes().into()
    }

    #[test]
    fn the_opener_is_in_the_handle() {
        let files = OpenFiles::new(u32::MAX, &[], &[]);
        for uid in [0, 65534, u32::MAX] {
            for (admin, nice) in [(false, false), (false, true), (true, false), (true, true)] {
                let user = User { admin, nice, ..User::without_capabilities(uid) };
                assert_eq!(OpenFiles::opener(files.open(user).0), user);
            }
        }
        assert_ne!(files.open(User::default()), files.open(User::default()));
    }

    #[test]
    fn in_handles_of_the_version_before_root_has_all_rights_and_nobody_else_any() {
        assert_eq!(OpenFiles::opener(7), User { permitted: 0, ..User::from(0) });
        assert_eq!(OpenFiles::opener(65534 << 32 | 7), User::from(65534));
    }

    #[test]
    fn numbers_start_again_after_the_last_one() {
        let files = OpenFiles::new(NUMBER, &[], &[]);
        let ours = [0, 65534].map(|uid| files.open(User::from(uid)).0);
        assert_eq!(ours.map(|fh| fh as u32 & NUMBER), [NUMBER, 0]);
        assert_eq!(ours.map(|fh| files.is_ours(fh)), [true, true]);
        assert_eq!([NUMBER - 1, 1].map(|fh| files.is_ours(fh.into())), [false, false]);
        assert_eq!(files.opened_before(0), 1);
    }

    #[test]
    fn one_open_file_reads_one_snapshot() {
        let files = OpenFiles::new(7, &[], &[]);
        let (fh, _) = files.open(0.into());
        assert_eq!(files.read(fh, 0, || (3, text("a"))), Ok(text("a")));
        assert_eq!(files.read(fh, 1, || (4, text("b"))), Ok(text("a")));
        assert_eq!(files.seen(fh), 3);
        assert_eq!(files.read(fh, 0, || (4, text("b"))), Ok(text("b")));
        files.close(fh);
        assert_eq!(files.state.lock().kept, 0);
    }

    #[test]
    fn what_was_read_through_another_daemon_is_stale() {
        let files = OpenFiles::new(7, &[], &[]);
        let (old, new) = (6, files.open(0.into()).0);
        assert_eq!(files.read(old, 1, || (1, text("b"))), Err(Stale));
        assert_eq!(files.read(new, 1, || (1, text("b"))), Ok(text("b")));
        files.polled(old, 30);
        assert_eq!(files.read(old, 1, || (1, text("b"))), Err(Stale), "also where something is known of it");
    }

    #[test]
    fn a_file_that_grows_is_followed() {
        let files = OpenFiles::new(0, &[], &[]);
        let part = |(content, start): (Content, u64), offset: u64| {
            let from = usize::try_from(offset.saturating_sub(start)).unwrap();
            String::from_utf8(content[from..].to_vec()).unwrap()
        };
        let read = |fh, offset, lines: &str, end: u64| {
            let show = |since: Option<u64>| {
                let added = since.map_or(lines.len(), |since| (end - since) as usize);
                (text(&lines[lines.len().saturating_sub(added)..]), end)
            };
            part(files.read_growing(fh, offset, 1, show).unwrap(), offset)
        };
        // From the beginning, after 10 bytes were dropped.
        let (whole, _) = files.open(0.into());
        assert_eq!(read(whole, 0, "a\nb\n", 14), "a\nb\n");
        assert_eq!(read(whole, 4, "a\nb\n", 14), "");
        assert_eq!(read(whole, 4, "b\nc\n", 16), "c\n");
        assert_eq!(read(whole, 2, "", 99), "b\nc\n", "the snapshot");
        assert_eq!(read(whole, 6, "y\nz\n", 98), "y\nz\n", "lines in between were dropped");
        // From the end, as tail(1) reads.
        let (tail, _) = files.open(0.into());
        assert_eq!(read(tail, 12, "a\nb\n", 14), "b\n");
        assert_eq!(read(tail, 14, "b\nc\n", 16), "c\n");
        assert_eq!(read(tail, 16, "c\nd\n", 18), "d\n");
        assert_eq!(read(tail, 0, "d\ne\n", 20), "d\ne\n");
    }

    #[test]
    fn snapshots_are_bounded() {
        let files = OpenFiles::new(0, &[], &[]);
        let big: Content = vec![b'x'; MAX_KEPT / 2].into();
        let handles: Vec<u64> = (0..4).map(|_| files.open(0.into()).0).collect();
        for &fh in &handles {
            files.read(fh, 0, || (1, Content::clone(&big))).unwrap();
            assert!(files.state.lock().kept <= MAX_KEPT);
        }
        assert_eq!(files.read(handles[0], 1, || (1, text("b"))), Err(Stale));
        assert_eq!(files.read(handles[3], 1, || (1, text("b"))), Ok(big));
    }

    #[test]
    fn what_an_earlier_worker_knew_of_open_files_is_known() {
        let files = OpenFiles::new(7, &[(3, 30)], &[4]);
        assert!(files.is_truncated(4) && !files.is_truncated(3));
        assert_eq!(
            [(3, 30), (3, 31), (5, 50)].map(|(fh, kh)| files.polled(fh, kh)),
            [Polled::Known, Polled::New, Polled::New]
        );
        assert!(files.close(3) && files.close(4) && files.close(5) && !files.close(6));
    }

    #[test]
    fn each_user_polls_a_bounded_number_of_files() {
        let of_user = |uid: u64, n: u32| uid << 32 | u64::from(n);
        let files = OpenFiles::new(0, &[(of_user(1000, 0), 7)], &[]);
        let polled = |uid, n| files.polled(of_user(uid, n), u64::from(n));
        assert!((1..MAX_POLLED).all(|n| polled(1000, n) == Polled::New));
        assert_eq!(polled(1000, MAX_POLLED), Polled::TooMany);
        assert_eq!(polled(1000, 1), Polled::Known);
        assert_eq!(polled(0, 1), Polled::New);
        files.close(of_user(1000, 1));
        assert_eq!(polled(1000, MAX_POLLED), Polled::New);
        // Others have used up the total.
        let users = 2000..2000 + u64::from(MAX_POLLED_OF_ALL / MAX_POLLED);
        for uid in users {
            (0..MAX_POLLED).for_each(|n| {
                polled(uid, n);
            });
        }
        assert!((0..RESERVED_POLLED).all(|n| polled(9000, n) == Polled::New));
        assert_eq!(polled(9000, RESERVED_POLLED), Polled::TooMany);
    }

    #[test]
    fn a_refused_file_stays_refused_until_it_is_closed() {
        let files = OpenFiles::new(0, &[], &[]);
        let (fh, _) = files.open(0.into());
        assert!(!files.is_truncated(fh));
        files.mark_truncated(fh);
        assert!(files.is_truncated(fh));
        assert!(files.close(fh), "the journal knows of it");
        assert!(!files.is_truncated(fh));
    }
}
