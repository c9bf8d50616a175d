//! Tasks, and the grammar of one write to a `tasks` file.
//!
//! Owns the identity of tasks, and the meaning of the bytes of a write. Does not know whether a process is alive,
//! who may touch it, or what a claim is.

use std::fmt;
use std::num::NonZeroU32;

/// A process (thread group) by its number in the daemon's PID namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pid(NonZeroU32);

impl Pid {
    /// Returns the process with this number; `None` for 0 and for numbers that do not fit the kernel's `pid_t`.
    #[must_use]
    pub const fn new(number: u32) -> Option<Self> {
        match NonZeroU32::new(number) {
            Some(number) if number.get() <= i32::MAX as u32 => Some(Self(number)),
            _ => None,
        }
    }

    /// Returns the number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A PID that a user wrote: a process in the writer's PID namespace, not in ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WrittenPid(pub NonZeroU32);

impl fmt::Display for WrittenPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Identifies a task uniquely for this boot, even if its PID is reused.
///
/// Ordered by PID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId {
    /// Its PID.
    pub pid: Pid,
    /// The inode of its pidfd (pidfs, kernel 6.9 and newer: unique for one boot). On older kernels its start time in
    /// clock ticks since boot, with the top bit set.
    pub ino: u64,
}

/// The longest command in bytes.
pub const MAX_COMMAND: usize = 64 * 1024;

/// The meaning of one write to a `tasks` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// A command. It has no tokens if the write was only white space.
    Command(Vec<Token>),
    /// A rewrite by a legacy client: the list that it has read before, with the writer added or removed. PIDs are in
    /// the daemon's PID namespace.
    Rewrite(Vec<Pid>),
}

/// One word of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Token {
    /// Claim for this process.
    Claim(Named),
    /// Claim for this process, and put its whole cgroup on the list if that is isolated.
    ClaimForCgroup(Named),
    /// End the claim of this process.
    Release(Named),
}

/// How a command names a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Named {
    /// `0`: the writer.
    Writer,
    /// A PID in the writer's PID namespace.
    Number(WrittenPid),
}

/// Why the bytes of a write are neither a command nor a rewrite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoWrite {
    /// A word that is not a number.
    Nonsense(String),
    /// Longer than [`MAX_COMMAND`], or cut by stdio in the middle of a list: a multiple of 4,096 bytes
    /// without a separator at its end.
    TooLong,
}

impl Write {
    /// Parses the bytes of one write(2). `read_write` says whether the file was opened for reading too, as legacy
    /// clients do.
    ///
    /// The text ends at the first NUL byte, as in cgroupfs: programs write C strings with their end, and whole buffers.
    /// Without any word before it the write is nonsense.
    ///
    /// ```
    /// use kcm_mount::model::task::{Named, Token, Write};
    /// assert_eq!(Write::parse(b"0\n", false), Ok(Write::Command(vec![Token::Claim(Named::Writer)])));
    /// assert!(matches!(Write::parse(b"17,4711", true), Ok(Write::Rewrite(_))));
    /// assert!(Write::parse(b"make", false).is_err());
    /// ```
    ///
    /// # Errors
    /// [`NoWrite`] if the bytes are invalid.
    pub fn parse(bytes: &[u8], read_write: bool) -> Result<Self, NoWrite> {
        if bytes.len() > MAX_COMMAND {
            return Err(NoWrite::TooLong);
        }
        let text = before_nul(bytes);
        if text.len() < bytes.len() {
            return if text.iter().all(|&b| is_separator(b)) {
                Err(NoWrite::Nonsense(shown(bytes)))
            } else {
                Self::parse_text(text, read_write)
            };
        }
        let ends_in_a_word = bytes.last().is_some_and(|&b| !is_separator(b));
        let cut = !bytes.is_empty() && bytes.len().is_multiple_of(4096) && ends_in_a_word;
        if cut { Err(NoWrite::TooLong) } else { Self::parse_text(bytes, read_write) }
    }

    fn parse_text(bytes: &[u8], read_write: bool) -> Result<Self, NoWrite> {
        let words = bytes.split(|&b| is_separator(b)).filter(|word| !word.is_empty());
        let tokens = words.map(token).collect::<Result<Vec<Token>, NoWrite>>()?;
        if read_write && !tokens.is_empty() && !bytes.iter().any(|&b| is_space(b)) {
            let pids: Option<Vec<Pid>> = tokens.iter().map(|token| token.as_plain_pid()).collect();
            if let Some(pids) = pids {
                return Ok(Self::Rewrite(pids));
            }
        }
        Ok(Self::Command(tokens))
    }
}

impl Token {
    fn as_plain_pid(self) -> Option<Pid> {
        match self {
            Self::Claim(Named::Number(number)) => Pid::new(number.0.get()),
            _ => None,
        }
    }
}

/// Returns the bytes before the first NUL byte.
#[must_use]
pub fn before_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&b| b == 0).next().unwrap_or_default()
}

const fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r')
}

const fn is_separator(byte: u8) -> bool {
    byte == b',' || is_space(byte)
}

fn token(word: &[u8]) -> Result<Token, NoWrite> {
    let (token, digits): (fn(Named) -> Token, _) =
        match (word.strip_prefix(b"-"), word.strip_prefix(b"cgroup:")) {
            (Some(digits), _) => (Token::Release, digits),
            (_, Some(digits)) => (Token::ClaimForCgroup, digits),
            (None, None) => (Token::Claim, word),
        };
    let number = std::str::from_utf8(digits)
        .ok()
        .filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|digits| digits.parse::<u32>().ok())
        .filter(|&number| number <= i32::MAX as u32)
        .ok_or_else(|| NoWrite::Nonsense(shown(word)))?;
    let named = NonZeroU32::new(number).map_or(Named::Writer, |number| Named::Number(WrittenPid(number)));
    Ok(token(named))
}

/// Returns the beginning of a word, printable and without a quote, for a message that quotes it.
fn shown(word: &[u8]) -> String {
    let text: String = word
        .iter()
        .take(24)
        .map(|&b| if b.is_ascii_graphic() && b != b'"' { b as char } else { '?' })
        .collect();
    if word.len() > 24 { text + "..." } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn named(number: u32) -> Named {
        NonZeroU32::new(number).map_or(Named::Writer, |n| Named::Number(WrittenPid(n)))
    }

    fn claim(number: u32) -> Token {
        Token::Claim(named(number))
    }

    fn release(number: u32) -> Token {
        Token::Release(named(number))
    }

    #[test]
    fn commands() {
        for (bytes, tokens) in [
            (&b"0"[..], vec![claim(0)]),
            (b"4711\n", vec![claim(4711)]),
            (b"1,2 3\t4\n\n5\r\n", vec![claim(1), claim(2), claim(3), claim(4), claim(5)]),
            (b"-0", vec![release(0)]),
            (b"-17,18", vec![release(17), claim(18)]),
            (b"", vec![]),
            (b" \n\t", vec![]),
            (b",,,", vec![]),
            (b"2147483647", vec![claim(i32::MAX as u32)]),
            (b"007", vec![claim(7)]),
            (b"cgroup:0", vec![Token::ClaimForCgroup(Named::Writer)]),
            (b"-17 cgroup:18\n", vec![release(17), Token::ClaimForCgroup(named(18))]),
        ] {
            assert_eq!(Write::parse(bytes, false), Ok(Write::Command(tokens)), "{bytes:?}");
        }
    }

    #[test]
    fn a_command_ends_at_its_first_nul_byte() {
        for (bytes, tokens) in [
            (&b"17\0"[..], vec![claim(17)]),
            (b"17\n\0", vec![claim(17)]),
            (b"17 -18\0rest\xff", vec![claim(17), release(18)]),
        ] {
            assert_eq!(Write::parse(bytes, false), Ok(Write::Command(tokens)), "{bytes:?}");
        }
        assert_eq!(Write::parse(b"17\0", true), Write::parse(b"17", true));
        let mut buffer = vec![0; 4096];
        buffer[..2].copy_from_slice(b"17");
        assert_eq!(Write::parse(&buffer, false), Ok(Write::Command(vec![claim(17)])), "a whole buffer");
        buffer.resize(MAX_COMMAND + 1, 0);
        assert_eq!(Write::parse(&buffer, false), Err(NoWrite::TooLong));
    }

    #[test]
    fn nonsense() {
        for bytes in [
            &b"a"[..],
            b"1 a",
            b"--1",
            b"-",
            b"+1",
            b"1.5",
            b"0x10",
            b"2147483648",
            b"99999999999",
            b"\0",
            b" \n\0",
            b"\x001",
            b"1a\0",
            b"\xff",
            b"1;2",
            b"cgroup:",
            b"cgroup:-1",
            b"-cgroup:1",
            b"Cgroup:1",
            b"cgroup: 1",
        ] {
            assert!(matches!(Write::parse(bytes, false), Err(NoWrite::Nonsense(_))), "{bytes:?}");
            assert!(matches!(Write::parse(bytes, true), Err(NoWrite::Nonsense(_))), "{bytes:?}");
        }
    }

    #[test]
    fn a_rewrite_is_a_bare_list_through_a_descriptor_for_reading_and_writing() {
        let pids =
            |numbers: &[u32]| Ok(Write::Rewrite(numbers.iter().filter_map(|&n| Pid::new(n)).collect()));
        assert_eq!(Write::parse(b"17", true), pids(&[17]));
        assert_eq!(Write::parse(b"17,4711", true), pids(&[17, 4711]));
        assert_eq!(Write::parse(b"17,,4711,", true), pids(&[17, 4711]));
        for bytes in [&b"17\n"[..], b"17, 18", b"0", b"0,17", b"-17", b"-17,18", b"", b",", b"cgroup:17"] {
            assert!(matches!(Write::parse(bytes, true), Ok(Write::Command(_))), "{bytes:?}");
        }
        assert!(matches!(Write::parse(b"17,4711", false), Ok(Write::Command(_))));
    }

    #[test]
    fn what_is_too_long_or_cut_by_stdio() {
        let list = |len: usize| "12345,".repeat(len / 6 + 1).into_bytes()[..len].to_vec();
        assert_eq!(Write::parse(&list(4096), false), Err(NoWrite::TooLong));
        assert_eq!(Write::parse(&list(8192), false), Err(NoWrite::TooLong));
        assert!(Write::parse(&list(4095), false).is_ok());
        assert!(Write::parse(&list(4098), false).is_ok());
        assert!(Write::parse(&list(MAX_COMMAND - 1), false).is_ok());
        assert_eq!(Write::parse(&list(MAX_COMMAND + 1), false), Err(NoWrite::TooLong));
        let mut whole = list(4095);
        whole.push(b'\n');
        assert!(Write::parse(&whole, false).is_ok());
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200), read_write: bool) {
            match Write::parse(&bytes, read_write) {
                Ok(Write::Rewrite(pids)) => prop_assert!(read_write && !pids.is_empty()),
                Ok(Write::Command(tokens)) => prop_assert!(tokens.len() <= bytes.len()),
                Err(NoWrite::Nonsense(word)) => prop_assert!(word.bytes().all(|b| b.is_ascii_graphic() && b != b'"')),
                Err(NoWrite::TooLong) => prop_assert!(false),
            }
        }
    }
}
