//! The picture of the machine: one character per CPU, socket by socket, the siblings of a core together.
//!
//! Owns the characters. Does not know the screen.

use kcm_mount::model::topology::Cpu;

use super::rows::{INTRUDER, Row, STRAY};

/// A CPU that is in no pool.
pub(super) const NO_POOL: char = '.';
/// A CPU that is offline.
pub(super) const OFFLINE: char = '-';

/// A character, and the number of the pool whose colour it has.
pub(super) type Sign = (char, Option<usize>);

/// The place of a CPU: rows in this order are in the machine's shape. Offline CPUs, of which the kernel does not tell the
/// core, are last.
pub(super) fn place(cpu: &Cpu) -> (bool, Option<u32>, Option<u32>, Option<u32>, u32) {
    (!cpu.online, cpu.socket, cpu.node, cpu.core, cpu.id.get())
}

/// Returns the name of the part of the machine that has a CPU: its socket and NUMA node.
pub(super) fn part(cpu: &Cpu) -> String {
    let of = |name: &str, number: Option<u32>| number.map(|number| format!("{name} {number}"));
    let parts = [of("socket", cpu.socket), of("node", cpu.node)];
    match parts.into_iter().flatten().collect::<Vec<_>>().join(", ") {
        _ if !cpu.online => "offline".to_owned(),
        empty if empty.is_empty() => "machine".to_owned(),
        part => part,
    }
}

/// Returns a letter for each pool: the first of its name that no pool before it has, else any.
pub(super) fn letters(pools: &[&str]) -> Vec<char> {
    let mut letters: Vec<char> = Vec::new();
    for pool in pools {
        let own = pool.chars().filter(char::is_ascii_alphabetic).map(|letter| letter.to_ascii_lowercase());
        let letter = own.chain('a'..='z').find(|letter| !letters.contains(letter)).unwrap_or('?');
        letters.push(letter);
    }
    letters
}

/// Returns the lines of the picture, at most `width` wide. `rows` are in the machine's shape. Cores are apart if there is
/// room for it in `most` lines; without room for anything, there is no picture.
pub(super) fn lines(rows: &[&Row], letters: &[char], width: usize, most: usize) -> Vec<Vec<Sign>> {
    for apart in [true, false] {
        let lines = drawn(rows, letters, width, apart);
        if lines.len() <= most {
            return lines;
        }
    }
    Vec::new()
}

fn drawn(rows: &[&Row], letters: &[char], width: usize, apart: bool) -> Vec<Vec<Sign>> {
    let core = |row: &Row| (row.cpu.socket, row.cpu.core);
    let are_siblings = |a: &&Row, b: &&Row| a.cpu.core.is_some() && core(a) == core(b);
    // Without siblings, blanks between cores say nothing.
    let apart = apart && rows.windows(2).any(|pair| matches!(pair, [a, b] if are_siblings(a, b)));
    let indent = rows.iter().map(|row| part(&row.cpu).len()).max().unwrap_or(0) + 2;
    let mut lines: Vec<Vec<Sign>> = Vec::new();
    for of_part in rows.chunk_by(|a, b| part(&a.cpu) == part(&b.cpu)) {
        let name = of_part.first().map(|row| part(&row.cpu)).unwrap_or_default();
        let mut line = text(&format!("{name:indent$}"));
        for of_core in of_part.chunk_by(are_siblings) {
            if line.len() + of_core.len() > width && line.len() > indent {
                lines.push(std::mem::replace(&mut line, text(&" ".repeat(indent))));
            }
            line.extend(of_core.iter().map(|row| sign(row, letters)));
            if apart {
                line.push((' ', None));
            }
        }
        lines.push(line);
    }
    lines
}

fn text(text: &str) -> Vec<Sign> {
    text.chars().map(|letter| (letter, None)).collect()
}

fn sign(row: &Row, letters: &[char]) -> Sign {
    let letter = row.pool.and_then(|pool| letters.get(pool)).copied();
    let sign = match letter {
        _ if row.marks.contains(INTRUDER) => INTRUDER,
        _ if row.marks.contains(STRAY) => STRAY,
        _ if !row.cpu.online => OFFLINE,
        None => NO_POOL,
        Some(letter) if row.is_taken => letter.to_ascii_uppercase(),
        Some(letter) => letter,
    };
    (sign, row.pool)
}

#[cfg(test)]
mod tests {
    use super::super::rows::{self, tests::sample};
    use super::*;

    fn picture(width: usize, most: usize) -> Vec<String> {
        let rows = rows::rows(&sample());
        let mut rows: Vec<&Row> = rows.iter().collect();
        rows.sort_by_key(|row| place(&row.cpu));
        let lines = lines(&rows, &['d', 'i'], width, most);
        lines.iter().map(|line| line.iter().map(|(sign, _)| sign).collect()).collect()
    }

    #[test]
    fn siblings_are_together_in_each_socket() {
        let expected = ["socket 0, node 0  ~~ !. ", "socket 1, node 1  I. I ", "offline           - "];
        assert_eq!(picture(80, 3), expected);
    }

    #[test]
    fn a_picture_without_room_is_closer_or_not_drawn() {
        let wrapped = picture(21, 6);
        assert_eq!(wrapped[..2], ["socket 0, node 0  ~~ ", "                  !. "]);
        assert_eq!(picture(22, 3)[0], "socket 0, node 0  ~~!.");
        assert_eq!(picture(21, 3), [""; 0]);
    }

    #[test]
    fn each_pool_has_its_letter() {
        assert_eq!(letters(&["data", "dpdk", "dp", "7"]), ['d', 'p', 'a', 'b']);
    }
}
