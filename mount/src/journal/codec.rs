//! One record per line: its checksum, a space, JSON.
//!
//! Owns the way in which a complete record is distinguished from a damaged or interrupted one. Does not know what
//! records say.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The length in bytes of a checksum and the space after it.
const CHECKSUM: usize = 9;

/// Returns a record as a line. `seed` is mixed into the checksum, so records written with another seed are rejected.
pub(super) fn encode(seed: &str, record: &impl Serialize) -> std::io::Result<Vec<u8>> {
    let mut line = vec![b' '; CHECKSUM];
    serde_json::to_writer(&mut line, record)?;
    let checksum = checksum(seed, line.get(CHECKSUM..).unwrap_or_default());
    line.splice(..CHECKSUM - 1, format!("{checksum:08x}").into_bytes());
    line.push(b'\n');
    Ok(line)
}

/// How much of a file of records could be read.
#[derive(Debug)]
pub(super) struct Decoded {
    /// The number of lines that are not records.
    pub(super) bad: usize,
    /// The length in bytes up to the last newline. The rest was interrupted while it was written.
    pub(super) whole: usize,
}

/// Reads all lines. Each record that can be read is passed to `accept`, which returns whether it makes sense. One by
/// one, because all records together may need many times the memory of what they add up to.
pub(super) fn decode<T: DeserializeOwned>(
    seed: &str,
    bytes: &[u8],
    mut accept: impl FnMut(T) -> bool,
) -> Decoded {
    let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |end| end + 1);
    let lines = bytes.get(..whole).unwrap_or_default().split_inclusive(|&b| b == b'\n');
    let bad = lines.filter(|line| !record(seed, line).is_ok_and(&mut accept)).count();
    let is_tail_damaged = has_lost_its_end::<T>(seed, bytes.get(whole..).unwrap_or_default());
    Decoded { bad: bad + usize::from(is_tail_damaged), whole }
}

/// Reads only the first line: the header, which has its own seed and names the seed of the other lines.
pub(super) fn decode_first<T: DeserializeOwned>(seed: &str, bytes: &[u8]) -> Option<T> {
    record(seed, bytes.split_inclusive(|&b| b == b'\n').next()?).ok()
}

/// Why a line is not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadLine {
    #[error("the checksum does not match")]
    Checksum,
    #[error("not a record of this format")]
    Malformed,
}

/// Reads one line, with its newline.
pub(super) fn record<T: DeserializeOwned>(seed: &str, line: &[u8]) -> Result<T, BadLine> {
    let json = json(seed, line).ok_or(BadLine::Checksum)?;
    serde_json::from_slice(json).map_err(|_| BadLine::Malformed)
}

/// Returns the JSON of a line whose checksum matches.
fn json<'a>(seed: &str, line: &'a [u8]) -> Option<&'a [u8]> {
    let line = line.strip_suffix(b"\n")?;
    let (sum, json) = line.split_at_checked(CHECKSUM)?;
    let sum = std::str::from_utf8(sum.strip_suffix(b" ")?).ok()?;
    let canonical = sum.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let expected = u32::from_str_radix(sum, 16).ok().filter(|_| canonical)?;
    (checksum(seed, json) == expected).then_some(json)
}

/// Whether a tail is a record except for its last byte. Then it was not interrupted but damaged.
pub(super) fn has_lost_its_end<T: DeserializeOwned>(seed: &str, tail: &[u8]) -> bool {
    tail.split_last().is_some_and(|(_, rest)| record::<T>(seed, &[rest, b"\n"].concat()).is_ok())
}

fn checksum(seed: &str, json: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(seed.as_bytes());
    hasher.update(json);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records<T: DeserializeOwned>(seed: &str, bytes: &[u8]) -> Vec<T> {
        let mut records = Vec::new();
        decode(seed, bytes, |record| {
            records.push(record);
            true
        });
        records
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let line = encode("seed", &vec![1, 22, 333]).unwrap();
        assert_eq!(records::<Vec<u32>>("seed", &line), [[1, 22, 333]]);
        assert!(records::<Vec<u32>>("other", &line).is_empty());
        for bit in 0..line.len() * 8 {
            let mut flipped = line.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(records::<Vec<u32>>("seed", &flipped).is_empty(), "bit {bit}");
        }
    }

    #[test]
    fn a_tail_with_a_damaged_newline_is_damage() {
        let line = encode("", &1).unwrap();
        for bit in 0..8 {
            let mut flipped = line.clone();
            *flipped.last_mut().unwrap() ^= 1 << bit;
            assert_eq!(decode("", &flipped, |_: u32| true).bad, 1, "bit {bit}");
        }
    }

    #[test]
    fn a_tail_without_a_newline_is_not_damage() {
        let mut file = encode("", &1).unwrap();
        let whole = file.len();
        file.extend(encode("", &2).unwrap());
        for cut in whole..file.len() - 1 {
            let mut records = Vec::new();
            let decoded = decode("", &file[..cut], |record: u32| {
                records.push(record);
                true
            });
            assert_eq!((records, decoded.bad, decoded.whole), (vec![1], 0, whole), "cut {cut}");
        }
    }
}
