//! The state of the claims log in memory, and the records that the file does not have yet.
//!
//! Owns the order of records: the order of the calls of [`Memory::defer`] and [`Memory::begin_append`] is their
//! order in the file. Does no I/O, so that its lock is only ever held for microseconds. Does not know files.
//!
//! A record that is being appended may fail, so it counts only once it is written. Records that are deferred
//! meanwhile come after it: they wait in [`Appending`] and take effect when its outcome is known.
//!
//! Memory stays bounded if the disk stalls. A queue that is longer than [`QUEUE_LIMIT`] is dropped, and the file is
//! rewritten from [`LogState`] (which is bounded by the number of claims and by constants) before anything else is
//! written. If the queue grows that long while one append is stuck, both possible outcomes are kept instead.

use std::collections::VecDeque;

use super::claims_log::{LogState, Record, Requests};

/// How many deferred records are queued one by one. One write of so many is a few hundred kilobytes. In tests it is low,
/// so that they exceed it often.
pub(super) const QUEUE_LIMIT: usize = if cfg!(test) { 16 } else { 1024 };

/// The state of the claims log.
#[derive(Debug)]
pub(super) struct Memory {
    /// The state after all records, including `queue`.
    log: LogState,
    /// Records that are not in the file, the oldest first.
    queue: VecDeque<Record>,
    /// Whether records that were never written have left the queue, so that the file has to be rewritten.
    needs_rewrite: bool,
    /// How often the queue was dropped.
    overflows: u64,
    appending: Option<Appending>,
}

/// A record that is being written.
#[derive(Debug)]
struct Appending {
    record: Record,
    /// Records deferred since.
    after: Vec<Record>,
    /// The state with the record and everything after it; `Memory::log` is the state without the record then.
    /// Only if `after` grew too long.
    if_written: Option<LogState>,
}

/// Which deferred records a write to the file covers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Covered {
    queued: usize,
    overflows: u64,
}

impl Memory {
    pub(super) fn new(log: LogState) -> Self {
        Self { log, queue: VecDeque::new(), needs_rewrite: false, overflows: 0, appending: None }
    }

    /// As [`Self::new`], with a state that the file does not have.
    pub(super) fn unwritten(log: LogState) -> Self {
        Self { needs_rewrite: true, ..Self::new(log) }
    }

    /// The state, with every deferred record.
    pub(super) fn log(&self) -> &LogState {
        &self.log
    }

    pub(super) fn requests(&self) -> &Requests {
        &self.log.requests
    }

    /// Marks a request as carried out, whose record may have been lost.
    pub(super) fn carried_out(&mut self, request: u64) {
        self.log.requests.carried_out(request);
    }

    /// Whether records wait to be written, also those that were deferred during an append that has not ended.
    pub(super) fn has_deferred(&self) -> bool {
        let is_after_append = self.appending.as_ref().is_some_and(|appending| !appending.after.is_empty());
        self.needs_rewrite || !self.queue.is_empty() || is_after_append
    }

    /// Returns how many records are kept one by one.
    #[cfg(test)]
    pub(super) fn queued(&self) -> usize {
        self.queue.len().max(self.appending.as_ref().map_or(0, |appending| appending.after.len()))
    }

    /// Adds a record of something that has happened already.
    pub(super) fn defer(&mut self, record: Record) {
        let Some(appending) = &mut self.appending else {
            self.log.add(record.clone());
            self.queue.push_back(record);
            if self.queue.len() > QUEUE_LIMIT {
                self.drop_queue();
            }
            return;
        };
        if let Some(if_written) = &mut appending.if_written {
            if_written.add(record.clone());
            self.log.add(record);
            return;
        }
        appending.after.push(record);
        if appending.after.len() > QUEUE_LIMIT {
            let after = std::mem::take(&mut appending.after);
            let mut if_written = self.log.clone();
            if_written.add(appending.record.clone());
            for record in after {
                if_written.add(record.clone());
                self.log.add(record);
            }
            appending.if_written = Some(if_written);
            self.drop_queue();
        }
    }

    fn drop_queue(&mut self) {
        self.queue.clear();
        self.needs_rewrite = true;
        self.overflows += 1;
    }

    /// Returns the deferred records, which have to be written before any other; `None` if the file has to be
    /// rewritten first.
    pub(super) fn deferred(&self) -> Option<(Vec<Record>, Covered)> {
        (!self.needs_rewrite).then(|| (self.queue.iter().cloned().collect(), self.covered()))
    }

    /// The deferred records are in the file now.
    pub(super) fn flushed(&mut self, covered: Covered) {
        if covered.overflows == self.overflows {
            self.queue.drain(..covered.queued.min(self.queue.len()));
        }
    }

    /// Begins to append a record. Returns the deferred records, which have to be written before it; `None` if the
    /// file has to be rewritten first, and then nothing has begun.
    pub(super) fn begin_append(&mut self, record: &Record) -> Option<(Vec<Record>, Covered)> {
        let deferred = self.deferred()?;
        self.appending = Some(Appending { record: record.clone(), after: Vec::new(), if_written: None });
        Some(deferred)
    }

    /// The record of [`Self::begin_append`] and everything before it is in the file now; or nothing of it.
    pub(super) fn end_append(&mut self, covered: Covered, written: bool) {
        let Some(appending) = self.appending.take() else { return };
        if let Some(if_written) = appending.if_written {
            if written {
                self.log = if_written;
            }
            return;
        }
        if written {
            self.flushed(covered);
            self.log.add(appending.record);
        }
        for record in appending.after {
            self.defer(record);
        }
    }

    /// Returns what a new file has to say. Not while a record is being appended.
    pub(super) fn snapshot(&self) -> (LogState, Covered) {
        (self.log.clone(), self.covered())
    }

    /// The file says what the snapshot says now.
    pub(super) fn rewritten(&mut self, covered: Covered) {
        if covered.overflows == self.overflows {
            self.flushed(covered);
            self.needs_rewrite = false;
        }
    }

    fn covered(&self) -> Covered {
        Covered { queued: self.queue.len(), overflows: self.overflows }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_is_deferred_during_an_append_waits_to_be_written() {
        let mut memory = Memory::new(LogState::default());
        let record = Record::Mounted { mount: 1 };
        assert!(memory.begin_append(&record).is_some() && !memory.has_deferred());
        memory.defer(Record::Closed { fh: 1 });
        assert!(memory.has_deferred());
        memory.end_append(memory.covered(), true);
        assert!(memory.has_deferred());
    }
}
