//! Columns of text for people: aligned, and as wide as the terminal.
//!
//! Owns the widths, and how a cell is shortened. Does not know what is in the cells.
//!
//! Like ps(1) and kubectl, a command shortens nothing unless standard output is a terminal.

use std::io::{self, IsTerminal as _};

use terminal_size::{Width, terminal_size_of};
use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

/// No column is made narrower than this to fit a terminal, in characters: numbers and short names stay readable.
const LEAST: usize = 8;
/// Without a limit, columns are aligned up to this width, in characters. A longer cell moves the rest of its line.
const ALIGNED: usize = 40;
/// The width of a terminal that does not say its own, such as a serial console.
const DEFAULT_WIDTH: usize = 80;
/// Between two columns.
const GAP: &str = "  ";
/// The end of a word that was cut.
const CUT: &str = "...";

/// A cell: a word, or several of which the first ones stand for all if there is not enough room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    items: Vec<String>,
    separator: &'static str,
    /// What the items are, if their number says something.
    unit: Option<&'static str>,
}

impl Cell {
    /// A cell with tasks.
    pub(crate) fn tasks(tasks: Vec<String>, separator: &'static str) -> Self {
        Self { items: tasks, separator, unit: Some("tasks") }
    }

    /// A CPU list, which is shortened between its parts.
    pub(crate) fn cpus(list: &str) -> Self {
        Self { items: list.split(',').map(String::from).collect(), separator: ",", unit: None }
    }

    /// Returns the whole text.
    pub(crate) fn text(&self) -> String {
        self.items.join(self.separator)
    }

    /// Returns the text, in `room` columns of a terminal if it is possible: `1201,1202 +118 more`.
    pub(crate) fn within(&self, room: usize) -> String {
        let whole = self.text();
        if whole.width() <= room {
            return whole;
        }
        let [_, _, ..] = self.items.as_slice() else { return cut(&whole, room) };
        let (mut shown, mut best) = (String::new(), None);
        for (index, item) in self.items.iter().enumerate() {
            if index > 0 {
                shown.push_str(self.separator);
            }
            shown.push_str(item);
            // What follows only gets longer.
            if shown.width() > room {
                break;
            }
            let short = format!("{shown} +{} more", self.items.len() - index - 1);
            best = if short.width() <= room { Some(short) } else { best };
        }
        let count = self.unit.map(|unit| format!("{} {unit}", self.items.len()));
        best.unwrap_or_else(|| cut(&count.unwrap_or(whole), room))
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(word: T) -> Self {
        Self { items: vec![word.into()], separator: "", unit: None }
    }
}

/// Returns the beginning of a text, with dots at the end if it is longer than `room`.
fn cut(text: &str, room: usize) -> String {
    if text.width() <= room {
        return text.to_owned();
    }
    let (mut used, mut short) = (CUT.len(), String::new());
    for c in text.chars() {
        used += c.width().unwrap_or(0);
        if used > room {
            break;
        }
        short.push(c);
    }
    short + CUT
}

/// Returns the width of the terminal that is standard output, or what `COLUMNS` says about it; `None` if it is not one.
pub(crate) fn terminal_width() -> Option<usize> {
    let stdout = io::stdout();
    if !stdout.is_terminal() {
        return None;
    }
    let chosen = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let own = || terminal_size_of(&stdout).map(|(Width(columns), _)| columns.into());
    Some(chosen.filter(|columns| *columns > 0).or_else(own).unwrap_or(DEFAULT_WIDTH))
}

/// Returns the rows as left-aligned columns, within `width` if that is possible. The widest columns are shortened first.
pub(crate) fn columns<const N: usize>(rows: &[[Cell; N]], width: Option<usize>) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.text().width());
        }
    }
    let most = match width {
        None => usize::MAX,
        Some(width) => {
            let room = width.saturating_sub(GAP.len() * N.saturating_sub(1));
            let widest = widths.iter().copied().max().unwrap_or(0);
            let fits = |most: &usize| widths.iter().map(|width| width.min(most)).sum::<usize>() <= room;
            (LEAST..=widest).rev().find(fits).unwrap_or(LEAST)
        }
    };
    let aligned = if width.is_some() { most } else { ALIGNED };
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let shown = cell.within(most);
            let padding = width.min(aligned).saturating_sub(shown.width());
            line += &format!("{shown}{:padding$}{GAP}", "");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tasks(count: u32) -> Cell {
        Cell::tasks((1201..1201 + count).map(|pid| pid.to_string()).collect(), ",")
    }

    #[test]
    fn a_column_is_as_wide_as_its_widest_cell() {
        let rows = [["A", "B"], ["long", "b"], ["日本", "c"]].map(|row| row.map(Cell::from));
        assert_eq!(columns(&rows, None), "A     B\nlong  b\n日本  c\n");
        assert_eq!(columns(&rows, Some(20)), columns(&rows, None));
    }

    #[test]
    fn a_list_is_summarised_by_its_first_items() {
        for (room, text) in [
            (200, tasks(9).text()),
            (19, "1201,1202 +118 more".into()),
            (18, "1201 +119 more".into()),
            (14, "1201 +119 more".into()),
            (13, "120 tasks".into()),
            (8, "120 t...".into()),
        ] {
            let count = if room == 200 { 9 } else { 120 };
            assert_eq!(tasks(count).within(room), text, "{room}");
        }
        assert_eq!(Cell::cpus("0-2,8,9,10,11").within(12), "0-2 +4 more");
        assert_eq!(Cell::cpus("0-15,128-143").within(11), "0-15,128...");
        assert_eq!(Cell::from("a-long-name").within(8), "a-lon...");
        assert_eq!(Cell::from("日本日本日").within(8), "日本...");
    }

    #[test]
    fn the_widest_column_is_shortened_first() {
        let rows = [
            [Cell::from("POOL"), "TASKS".into(), "NOTE".into()],
            ["dataplane".into(), tasks(120), "offline: 8".into()],
        ];
        let expected = "\
POOL       TASKS                NOTE
dataplane  1201,1202 +118 more  offline: 8
";
        assert_eq!(columns(&rows, Some(42)), expected);
        for width in 38..200 {
            let longest = columns(&rows, Some(width)).lines().map(|line| line.width()).max();
            assert!(longest.unwrap() <= width, "{width}: {longest:?}");
        }
    }

    #[test]
    fn without_a_limit_a_long_cell_does_not_widen_other_lines() {
        let rows = [
            [Cell::from("TASKS"), "NOTE".into()],
            [tasks(120), "first".into()],
            ["-".into(), "second".into()],
        ];
        let text = columns(&rows, None);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], format!("{:40}  NOTE", "TASKS"));
        assert_eq!(lines[1], format!("{}  first", tasks(120).text()));
        assert_eq!(lines[2], format!("{:40}  second", "-"));
    }
}
