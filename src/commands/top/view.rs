//! The part of a sample that is shown: order, filter, place in the list, and how keys change them.
//!
//! Owns the state of the view. Pure: it knows keys by what they do, and no terminal.

use std::cmp::Ordering;
use std::time::Duration;

use super::picture;
use super::rows::{self, Row};
use super::sample::Sample;

/// The order of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    /// Socket, NUMA node, core, CPU.
    Shape,
    Pool,
    /// The largest share of the holder first.
    Share,
    /// The largest share of others first.
    Others,
}

impl Sort {
    fn next(self) -> Self {
        match self {
            Self::Shape => Self::Pool,
            Self::Pool => Self::Share,
            Self::Share => Self::Others,
            Self::Others => Self::Shape,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Shape => "shape",
            Self::Pool => "pool",
            Self::Share => "share",
            Self::Others => "others",
        }
    }
}

/// A key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Char(char),
    Enter,
    Esc,
    Backspace,
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
    CtrlC,
    CtrlZ,
}

/// The next step of the program after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Todo {
    Draw,
    Quit,
    Stop,
}

/// A line of the table.
#[derive(Debug, PartialEq)]
pub(super) enum Line<'a> {
    /// The name of a part of the machine.
    Part(String),
    Cpu(&'a Row),
}

/// The state of the view.
#[derive(Debug)]
pub(super) struct View {
    /// The directory, safe to show.
    pub(super) path: String,
    pub(super) interval: Duration,
    /// The rows of the newest sample, in the machine's shape; `None` before the first one.
    rows: Option<Vec<Row>>,
    /// The names of the pools.
    pub(super) pools: Vec<String>,
    /// Why there is no newer sample.
    pub(super) problem: Option<String>,
    pub(super) sort: Sort,
    pub(super) filter: String,
    /// Whether keys change the filter.
    pub(super) is_typing: bool,
    pub(super) is_paused: bool,
    pub(super) shows_help: bool,
    /// How many lines are above the first one on the screen.
    pub(super) above: usize,
    /// How many lines of the table the screen has.
    page: usize,
}

impl View {
    pub(super) fn new(path: String, interval: Duration) -> Self {
        Self {
            path,
            interval,
            rows: None,
            pools: Vec::new(),
            problem: None,
            sort: Sort::Shape,
            filter: String::new(),
            is_typing: false,
            is_paused: false,
            shows_help: false,
            above: 0,
            page: 1,
        }
    }

    /// Shows a sample.
    pub(super) fn update(&mut self, sample: &Sample) {
        self.pools = rows::pools(sample).into_iter().map(str::to_owned).collect();
        let mut rows = rows::rows(sample);
        rows.sort_by_key(|row| picture::place(&row.cpu));
        self.rows = Some(rows);
        self.problem = None;
    }

    /// Returns all CPUs in the machine's shape; `None` before the first sample.
    pub(super) fn machine(&self) -> Option<Vec<&Row>> {
        Some(self.rows.as_ref()?.iter().collect())
    }

    /// Returns the lines of the table in the order of the view, without those that do not match the filter.
    pub(super) fn lines(&self) -> Vec<Line<'_>> {
        let wanted = self.filter.to_lowercase();
        let matches = |row: &&Row| row.cells.iter().any(|cell| cell.to_lowercase().contains(&wanted));
        let mut rows: Vec<&Row> = self.rows.iter().flatten().filter(matches).collect();
        let largest = |a: Option<f64>, b: Option<f64>| b.unwrap_or(-1.0).total_cmp(&a.unwrap_or(-1.0));
        // Rows that are equal stay in the machine's shape.
        match self.sort {
            Sort::Shape => return in_parts(&rows),
            Sort::Pool => rows.sort_by_key(|row| row.pool.unwrap_or(usize::MAX)),
            Sort::Share => rows.sort_by(|a, b| largest(a.share, b.share)),
            Sort::Others => rows.sort_by(|a, b| largest(a.others, b.others)),
        }
        rows.into_iter().map(Line::Cpu).collect()
    }

    /// Sets how many lines of the table the screen has, and stays within the table.
    pub(super) fn set_page(&mut self, page: usize) {
        self.page = page.max(1);
        self.above = self.above.min(self.lines().len().saturating_sub(self.page));
    }

    /// Does what a key is for.
    pub(super) fn press(&mut self, key: Key) -> Todo {
        match key {
            Key::CtrlC => return Todo::Quit,
            Key::CtrlZ => return Todo::Stop,
            Key::Up => self.above = self.above.saturating_sub(1),
            Key::Down => self.above += 1,
            Key::PageUp => self.above = self.above.saturating_sub(self.page),
            Key::PageDown => self.above += self.page,
            Key::Home => self.above = 0,
            Key::End => self.above = usize::MAX / 2,
            key if self.is_typing => self.edit(key),
            Key::Char('?') => self.shows_help = !self.shows_help,
            Key::Esc if self.shows_help => self.shows_help = false,
            Key::Char('q') | Key::Esc => return Todo::Quit,
            Key::Char('s') => self.sort = self.sort.next(),
            Key::Char('f' | '/') => self.is_typing = true,
            Key::Char('p') => self.is_paused = !self.is_paused,
            Key::Char(_) | Key::Enter | Key::Backspace => {}
        }
        let most = self.lines().len().saturating_sub(self.page);
        self.above = self.above.min(most);
        Todo::Draw
    }

    /// Changes the filter.
    fn edit(&mut self, key: Key) {
        match key {
            Key::Char(letter) => self.filter.push(letter),
            Key::Backspace => drop(self.filter.pop()),
            Key::Enter => self.is_typing = false,
            Key::Esc => {
                self.filter.clear();
                self.is_typing = false;
            }
            _ => {}
        }
        self.above = 0;
    }
}

/// Returns rows in the machine's shape, with the name of each part before its CPUs.
fn in_parts<'a>(rows: &[&'a Row]) -> Vec<Line<'a>> {
    let mut lines = Vec::new();
    for of_part in rows.chunk_by(|a, b| part_order(a, b) == Ordering::Equal) {
        lines.extend(of_part.first().map(|row| Line::Part(picture::part(&row.cpu))));
        lines.extend(of_part.iter().map(|row| Line::Cpu(row)));
    }
    lines
}

fn part_order(a: &Row, b: &Row) -> Ordering {
    picture::part(&a.cpu).cmp(&picture::part(&b.cpu))
}

#[cfg(test)]
mod tests {
    use super::super::rows::tests::sample;
    use super::*;

    fn view() -> View {
        let mut view = View::new("/etc/kcm".into(), Duration::from_secs(1));
        view.update(&sample());
        view.set_page(4);
        view
    }

    fn press(view: &mut View, keys: &str) {
        for key in keys.chars() {
            assert_eq!(view.press(Key::Char(key)), Todo::Draw);
        }
    }

    fn shown(view: &View) -> Vec<String> {
        let text = |line: &Line<'_>| match line {
            Line::Part(name) => name.clone(),
            Line::Cpu(row) => row.cpu.id.to_string(),
        };
        view.lines().iter().map(text).collect()
    }

    #[test]
    fn siblings_are_together_in_the_machines_shape() {
        let expected =
            ["socket 0, node 0", "0", "4", "1", "5", "socket 1, node 1", "2", "6", "3", "offline", "7"];
        assert_eq!(shown(&view()), expected);
    }

    #[test]
    fn s_sorts_by_pool_share_and_others() {
        let mut view = view();
        for (sort, expected) in [
            ("pool", ["0", "4", "1", "2", "3", "5", "6", "7"]),
            ("share", ["0", "4", "2", "1", "3", "5", "6", "7"]),
            ("others", ["4", "1", "2", "0", "3", "5", "6", "7"]),
        ] {
            press(&mut view, "s");
            assert_eq!((view.sort.name(), shown(&view)), (sort, expected.map(str::to_owned).to_vec()));
        }
        press(&mut view, "s");
        assert_eq!(view.sort, Sort::Shape);
    }

    #[test]
    fn a_filter_is_typed_kept_and_cleared() {
        let mut view = view();
        press(&mut view, "/qINF");
        assert_eq!(shown(&view), [""; 0], "q is a letter");
        for _ in 0..4 {
            view.press(Key::Backspace);
        }
        press(&mut view, "InF");
        assert_eq!(shown(&view), ["socket 1, node 1", "2", "3"]);
        view.press(Key::Enter);
        assert!(!view.is_typing && view.filter == "InF");
        press(&mut view, "f");
        assert_eq!(view.press(Key::Esc), Todo::Draw);
        assert_eq!((view.is_typing, view.filter.as_str()), (false, ""));
        press(&mut view, "/stress");
        assert_eq!(shown(&view), ["socket 0, node 0", "1"], "who else ran there is looked at");
    }

    #[test]
    fn scrolling_stays_within_the_table() {
        let mut view = view();
        view.press(Key::Up);
        assert_eq!(view.above, 0);
        view.press(Key::PageDown);
        view.press(Key::Down);
        assert_eq!(view.above, 5);
        view.press(Key::End);
        assert_eq!(view.above, 7);
        view.set_page(9);
        assert_eq!(view.above, 2, "a larger window shows more");
        view.press(Key::PageUp);
        view.press(Key::End);
        view.press(Key::Home);
        assert_eq!(view.above, 0);
    }

    #[test]
    fn keys_quit_pause_and_help() {
        for key in [Key::Char('q'), Key::Esc, Key::CtrlC] {
            assert_eq!(view().press(key), Todo::Quit, "{key:?}");
        }
        let mut view = view();
        press(&mut view, "?p");
        assert!(view.shows_help && view.is_paused);
        assert_eq!(view.press(Key::Esc), Todo::Draw);
        assert!(!view.shows_help);
        press(&mut view, "p/");
        assert!(!view.is_paused);
        assert_eq!(view.press(Key::CtrlC), Todo::Quit, "also while typing");
        assert_eq!(view.press(Key::CtrlZ), Todo::Stop);
    }
}
