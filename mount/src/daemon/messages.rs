//! Writes the messages of a process to its standard error.
//!
//! Owns that no request waits for it without bound: the daemon log may be on a disk, or a pipe, that does not take anything.
//! A worker has a thread that writes; another thread with a message waits for that one, but not for long, and not at
//! all while it is known to be stuck. Does not know the format of a message.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// How long a message is waited for: so that messages are there before an answer, as long as they can be written. A write to
/// the page cache takes microseconds.
const PATIENCE: Duration = Duration::from_millis(100);
/// How many messages wait to be written; of further ones, only the number is kept.
const QUEUED: usize = 1024;

static WRITER: OnceLock<Writer> = OnceLock::new();

#[derive(Debug, Default)]
struct Writer {
    state: Mutex<State>,
    added: Condvar,
    written: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<String>,
    /// How many messages were queued and written since the start.
    added: u64,
    written: u64,
    dropped: u64,
    /// Whether nobody waits, because the thread does not come back from a write.
    is_stuck: bool,
}

/// Writes one or more whole lines to standard error. If that is closed, no one can be informed.
pub fn write(lines: String) {
    match WRITER.get() {
        Some(writer) => writer.add(lines),
        None => write_now(&lines),
    }
}

fn write_now(lines: &str) {
    // One write, so that lines of several processes do not mix.
    let _ = io::stderr().write_all(lines.as_bytes());
}

/// Starts the thread that writes from now on.
///
/// # Errors
/// No thread can be started.
pub(super) fn start_thread() -> io::Result<()> {
    std::thread::Builder::new()
        .name("kcm-log".into())
        .spawn(|| WRITER.get_or_init(Writer::default).run(write_now))?;
    WRITER.get_or_init(Writer::default);
    Ok(())
}

impl Writer {
    fn add(&self, lines: String) {
        let mut state = self.state.lock();
        if state.queue.len() >= QUEUED {
            state.dropped += 1;
            return;
        }
        state.queue.push_back(lines);
        state.added += 1;
        self.added.notify_one();
        let (number, deadline) = (state.added, Instant::now() + PATIENCE);
        while state.written < number && !state.is_stuck {
            state.is_stuck = self.written.wait_until(&mut state, deadline).timed_out();
        }
    }

    fn run(&self, write: impl Fn(&str)) {
        loop {
            let mut state = self.state.lock();
            while state.queue.is_empty() {
                self.added.wait(&mut state);
            }
            let lines: Vec<String> = state.queue.drain(..).collect();
            let dropped = std::mem::take(&mut state.dropped);
            drop(state);
            write(&lines.concat());
            if dropped > 0 {
                write(&format!("WARNING:root:{dropped} messages were dropped: they could not be written\n"));
            }
            let mut state = self.state.lock();
            state.written += lines.len() as u64;
            state.is_stuck = false;
            self.written.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// A writer, what it has written, and the lock that its thread needs for that.
    fn writer() -> (&'static Writer, Arc<Mutex<String>>) {
        // It lives as long as its thread.
        let writer: &'static Writer = Box::leak(Box::default());
        let written = Arc::new(Mutex::new(String::new()));
        let other = Arc::clone(&written);
        std::thread::spawn(move || writer.run(|lines| other.lock().push_str(lines)));
        (writer, written)
    }

    #[test]
    fn a_message_is_there_when_it_has_been_written() {
        let (writer, written) = writer();
        for number in 0..100 {
            writer.add(format!("{number}\n"));
            assert!(written.lock().ends_with(&format!("{number}\n")));
        }
    }

    #[test]
    fn nobody_waits_for_long_for_messages_that_cannot_be_written() {
        let (writer, written) = writer();
        let stuck = written.lock();
        let begun = Instant::now();
        let number = 3 * QUEUED;
        (0..number).for_each(|number| writer.add(format!("{number}\n")));
        assert!(begun.elapsed() < 20 * PATIENCE, "{:?}", begun.elapsed());
        assert!(writer.state.lock().queue.len() <= QUEUED);
        drop(stuck);
        while !writer.state.lock().queue.is_empty() {
            std::thread::yield_now();
        }
        writer.add("last\n".into());
        while !written.lock().contains("last\n") {
            std::thread::yield_now();
        }
        let text = written.lock();
        let lines = text.lines().count();
        let dropped: usize = text
            .lines()
            .find_map(|line| line.strip_prefix("WARNING:root:")?.split(' ').next()?.parse().ok())
            .unwrap();
        assert!(text.starts_with("0\n1\n2\n"), "in their order");
        assert_eq!(lines - 2 + dropped, number, "each is written or counted");
    }
}
