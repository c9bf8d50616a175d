//! One record a line: its checksum, a space, JSON.
//!
//! Owns: how a record is told from what is left of one. Must not know: what records say.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The newest version of the formats that is known here.
pub(super) const VERSION: u32 = 1;

/// Bytes of a checksum and the space behind it.
const CHECKSUM: usize = 9;

/// A record as a line. `seed`: what else the checksum covers, so that a record of another seed is none.
pub(super) fn encode(seed: &str, record: &impl Serialize) -> std::io::Result<Vec<u8>> {
    let mut line = vec![b' '; CHECKSUM];
    serde_json::to_writer(&mut line, record)?;
    let checksum = checksum(seed, line.get(CHECKSUM..).unwrap_or_default());
    line.splice(..CHECKSUM - 1, format!("{checksum:08x}").into_bytes());
    line.push(b'\n');
    Ok(line)
}

/// How sound a file of records is.
#[derive(Debug)]
pub(super) struct Decoded {
    /// How many lines are none.
    pub(super) bad: usize,
    /// How many bytes there are up to the end of the last line that has one: a tail that has none was
    /// interrupted while it was written.
    pub(super) whole: usize,
}

/// Reads all lines; `each` gets the records that are whole, one by one: all together may be many times what they
/// add up to.
pub(super) fn decode<T: DeserializeOwned>(seed: &str, bytes: &[u8], mut each: impl FnMut(T)) -> Decoded {
    let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |end| end + 1);
    let mut decoded = Decoded { bad: 0, whole };
    let lines = bytes.get(..whole).unwrap_or_default().split_inclusive(|&b| b == b'\n');
    for line in lines {
        match record(seed, line) {
            Some(record) => each(record),
            None => decoded.bad += 1,
        }
    }
    if has_lost_its_end::<T>(seed, bytes.get(whole..).unwrap_or_default()) {
        decoded.bad += 1;
    }
    decoded
}

/// The first line alone, with whatever seed: for headers, which say the seed of the rest.
pub(super) fn decode_first<T: DeserializeOwned>(seed: &str, bytes: &[u8]) -> Option<T> {
    record(seed, bytes.split_inclusive(|&b| b == b'\n').next()?)
}

fn record<T: DeserializeOwned>(seed: &str, line: &[u8]) -> Option<T> {
    let line = line.strip_suffix(b"\n")?;
    let (sum, json) = line.split_at_checked(CHECKSUM)?;
    let sum = std::str::from_utf8(sum.strip_suffix(b" ")?).ok()?;
    let canonical = sum.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let expected = u32::from_str_radix(sum, 16).ok().filter(|_| canonical)?;
    (checksum(seed, json) == expected).then(|| serde_json::from_slice(json).ok())?
}

/// Whether a tail is a record but for its last byte: then it was not interrupted, it is damaged.
fn has_lost_its_end<T: DeserializeOwned>(seed: &str, tail: &[u8]) -> bool {
    tail.split_last().is_some_and(|(_, rest)| record::<T>(seed, &[rest, b"\n"].concat()).is_some())
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
        decode(seed, bytes, |record| records.push(record));
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
    fn a_tail_with_another_end_is_damage() {
        let line = encode("", &1).unwrap();
        for bit in 0..8 {
            let mut flipped = line.clone();
            *flipped.last_mut().unwrap() ^= 1 << bit;
            assert_eq!(decode("", &flipped, |_: u32| ()).bad, 1, "bit {bit}");
        }
    }

    #[test]
    fn a_tail_without_an_end_is_no_damage() {
        let mut file = encode("", &1).unwrap();
        let whole = file.len();
        file.extend(encode("", &2).unwrap());
        for cut in whole..file.len() - 1 {
            let mut records = Vec::new();
            let decoded = decode("", &file[..cut], |record: u32| records.push(record));
            assert_eq!((records, decoded.bad, decoded.whole), (vec![1], 0, whole), "cut {cut}");
        }
    }
}
