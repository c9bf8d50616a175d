//! Draws the view: title, picture of the machine, table, keys.
//!
//! Owns places, widths and colours. Colours repeat what letters and words say. Does not know the terminal.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};

use super::picture::{self, NO_POOL, OFFLINE};
use super::rows::{COLUMNS, Row};
use super::view::{self, View};

/// The colours of the pools, by the order of names.
const COLOURS: [Color; 5] = [Color::Cyan, Color::Green, Color::Yellow, Color::Magenta, Color::Blue];
/// The picture has at most this part of the screen.
const PICTURE_PART: u16 = 4;
/// The widths of the columns that are the same on every machine, each with a blank: marks, CPU, core; held, share, others.
const LEFT: [usize; 3] = [3, 6, 5];
const MIDDLE: [usize; 3] = [8, 6, 7];
/// The widest columns of names.
const POOL_MOST: usize = 13;
const LIST_MOST: usize = 10;
const HOLDER_MOST: usize = 30;

const HELP: &str = "\
One row per CPU. In the picture above, a capital letter is a taken CPU.

POOL, LIST   the pool and the CPU list that have the CPU
HOLDER       the task on the list; +2: and two more, on a shared list
HELD         for how long it has had the list; > if it is longer than this:
             its claim is not among the events, or only root may read them
SHARE        what the tasks of the list and their children used of the CPU
OTHERS       what everything else used of it, interrupts included
WHO ELSE     processes that did, on exclusive lists

!  intruder  a process that is pinned within the list without a claim
~  stray     a thread of the task that may run outside the list

q Esc Ctrl-C  quit          s    sort by shape, pool, share or others
/ f           filter rows   p    pause, and continue
arrows PgUp PgDn Home End   scroll          ?    show and leave this help";

/// Draws the view. `colours`: whether the user wants any.
pub(super) fn draw(frame: &mut Frame<'_>, view: &mut View, colours: bool) {
    let mut pen = Pen { all: frame.area(), line: 0, frame, colours };
    pen.title(view);
    if let Some(problem) = &view.problem {
        pen.put(&Line::styled(problem.as_str(), Modifier::REVERSED | Modifier::BOLD));
    }
    pen.picture(view);
    // The last line is for the keys.
    let page = pen.left().saturating_sub(2);
    view.set_page(page.into());
    if view.shows_help {
        HELP.lines().take(page.into()).for_each(|line| pen.put(&Line::raw(line)));
    } else {
        pen.table(view, page);
    }
    pen.keys(view);
}

/// Draws one line below the other.
struct Pen<'a, 'b> {
    frame: &'a mut Frame<'b>,
    all: Rect,
    line: u16,
    colours: bool,
}

impl Pen<'_, '_> {
    /// How many lines are left.
    fn left(&self) -> u16 {
        self.all.height.saturating_sub(self.line)
    }

    fn put(&mut self, line: &Line<'_>) {
        let area = Rect { y: self.line, height: 1, ..self.all }.intersection(self.all);
        self.frame.render_widget(line, area);
        self.line = self.line.saturating_add(1);
    }

    fn of_pool(&self, pool: Option<usize>) -> Style {
        match pool.and_then(|pool| COLOURS.get(pool % COLOURS.len())) {
            Some(colour) if self.colours => Style::new().fg(*colour),
            _ => Style::new(),
        }
    }

    fn title(&mut self, view: &View) {
        let cpus = view.machine().map_or(0, |machine| machine.len());
        let filter = if view.filter.is_empty() { "none" } else { &view.filter };
        let state = if view.is_paused { "paused".to_owned() } else { format!("every {:?}", view.interval) };
        let title = format!(
            "kcm top {}: {cpus} CPUs, {state}, sort: {}, filter: {filter}",
            view.path,
            view.sort.name()
        );
        let width = usize::from(self.all.width);
        self.put(&Line::styled(format!("{title:width$}"), Modifier::REVERSED));
    }

    /// Draws the picture and what its letters mean.
    fn picture(&mut self, view: &View) {
        let Some(machine) = view.machine() else {
            if view.problem.is_none() {
                self.put(&Line::raw("Looking ..."));
            }
            return;
        };
        let pools: Vec<&str> = view.pools.iter().map(String::as_str).collect();
        let letters = picture::letters(&pools);
        let most = self.all.height / PICTURE_PART;
        let lines = picture::lines(&machine, &letters, self.all.width.into(), most.into());
        for line in &lines {
            let spans = line.iter().map(|(sign, pool)| Span::styled(sign.to_string(), self.of_pool(*pool)));
            let line = Line::from_iter(spans.collect::<Vec<_>>());
            self.put(&line);
        }
        if lines.is_empty() {
            return;
        }
        let pools = pools.iter().zip(&letters).enumerate();
        let mut legend: Vec<Span<'_>> = pools
            .map(|(number, (name, letter))| {
                Span::styled(format!("{letter} {name}  "), self.of_pool(Some(number)))
            })
            .collect();
        legend.push(Span::raw(format!("CAPITAL taken  {NO_POOL} no pool  {OFFLINE} offline")));
        self.put(&Line::from(legend));
    }

    fn table(&mut self, view: &View, page: u16) {
        let lines = view.lines();
        let widths = widths(&lines, self.all.width.into());
        let header = std::iter::once("").chain(COLUMNS).zip(widths);
        self.put(&Line::styled(header.map(cell).collect::<String>(), Modifier::BOLD));
        for line in lines.iter().skip(view.above).take(page.into()) {
            match line {
                view::Line::Part(name) => self.put(&Line::styled(name.as_str(), Modifier::BOLD)),
                view::Line::Cpu(row) => self.row(row, widths),
            }
        }
        if lines.is_empty() && view.machine().is_some() {
            self.put(&Line::raw("No row matches the filter."));
        }
    }

    fn row(&mut self, row: &Row, widths: [usize; COLUMNS.len() + 1]) {
        let texts = std::iter::once(row.marks.as_str()).chain(row.cells.iter().map(String::as_str));
        let (of_pool, colours) = (self.of_pool(row.pool), self.colours);
        let spans = texts.zip(widths).enumerate().map(|(column, it)| {
            let style = match column {
                0 if colours => Style::new().fg(Color::Red).add_modifier(Modifier::BOLD),
                0 => Style::new().add_modifier(Modifier::BOLD),
                // Pool and list.
                3 | 4 => of_pool,
                _ => Style::new(),
            };
            Span::styled(cell(it), style)
        });
        let line = Line::from_iter(spans);
        self.put(&line);
    }

    /// Draws the last line of the screen.
    fn keys(&mut self, view: &View) {
        self.line = self.all.height.saturating_sub(1);
        let line = if view.is_typing {
            format!("filter: {}_  Enter keeps it, Esc clears it", view.filter)
        } else {
            let lines = view.lines().len();
            let first = (view.above + 1).min(lines);
            format!(
                "q quit  s sort  / filter  p pause  ? help   ! intruder  ~ stray   line {first} of {lines}"
            )
        };
        self.put(&Line::styled(line, Modifier::BOLD));
    }
}

/// Returns the widths of the marks and of all columns. Holder and who else was there share the rest.
fn widths(lines: &[view::Line<'_>], all: usize) -> [usize; COLUMNS.len() + 1] {
    let rows =
        || lines.iter().filter_map(|line| if let view::Line::Cpu(row) = line { Some(*row) } else { None });
    let widest = |column: usize| {
        rows().filter_map(|row| row.cells.get(column)).map(|text| Span::raw(text).width()).max()
    };
    let width = |column: usize, most: usize| (widest(column).unwrap_or(0).max(4) + 1).min(most);
    let [marks, cpu, core] = LEFT;
    let [held, share, others] = MIDDLE;
    let (pool, list) = (width(2, POOL_MOST), width(3, LIST_MOST));
    let left = all.saturating_sub(LEFT.iter().chain(&MIDDLE).sum::<usize>() + pool + list);
    let holder = width(4, HOLDER_MOST).max(7).min(left * 3 / 5);
    [marks, cpu, core, pool, list, holder, held, share, others, left - holder]
}

/// Returns a text in a column, which ends with a blank. A text that is too long ends with two points.
fn cell((text, width): (&str, usize)) -> String {
    let room = width.saturating_sub(1);
    let mut shown = text.to_owned();
    if Span::raw(&shown).width() > room {
        while Span::raw(&shown).width() + 2 > room && shown.pop().is_some() {}
        shown.push_str("..".get(..room.min(2)).unwrap_or_default());
    }
    let blanks = width.saturating_sub(Span::raw(&shown).width());
    shown + &" ".repeat(blanks)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::rows::tests::sample;
    use super::*;

    #[test]
    fn a_cell_fits_into_its_column() {
        for (text, width, shown) in [
            ("abc", 5, "abc  "),
            ("abcd", 5, "abcd "),
            ("abcde", 5, "ab.. "),
            ("abc", 3, ".. "),
            ("abc", 2, ". "),
            ("abc", 0, ""),
            ("\u{6f22}\u{5b57}x", 5, "\u{6f22}.. "),
        ] {
            assert_eq!(cell((text, width)), shown, "{text} {width}");
        }
    }

    #[test]
    fn every_size_of_a_screen_can_be_drawn() {
        for (width, height) in [(1, 1), (2, 2), (10, 3), (40, 8), (80, 24), (300, 100)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            let mut view = View::new("/etc/kcm".into(), Duration::from_secs(1));
            terminal.draw(|frame| draw(frame, &mut view, true)).unwrap();
            view.update(&sample());
            view.problem = Some("no answer".into());
            terminal.draw(|frame| draw(frame, &mut view, true)).unwrap();
            view.shows_help = true;
            terminal.draw(|frame| draw(frame, &mut view, false)).unwrap();
        }
    }
}
