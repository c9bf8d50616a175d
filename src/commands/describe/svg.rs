//! `kcm describe --format=svg`: a picture of the CPUs in the shape of the machine, for a browser.
//!
//! Owns the drawing: sockets, NUMA nodes, cores with their thread siblings, and the legend. `ink` has colours and text.
//! Does not know where the pools come from.
//!
//! The form of a picture:
//!
//! - A CPU is a `<g class="cpu" id="cpu-N">` in the `<g class="core">` of its core, with its whole description as `<title>`.
//! - A picture contains no time and nothing from outside, so the same machine makes the same file.
//! - It is at most as wide as a usual window, and grows downwards: text stays readable with hundreds of CPUs.

mod ink;

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Error;
use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::model::topology::{Cpu, Topology};
use kcm_mount::text;

use self::ink::{STYLE, Swatches, escaped};
use super::map::{state, tasks};
use super::selection::Selected;
use super::shape::{self, Core, List, Socket};
use super::{list_cell, shown, table};
use crate::commands::common::columns::Cell;
use crate::host::Host;

/// All sizes are in pixels. The page is never wider than a usual window.
const PAGE: usize = 1260;
/// The narrowest page: the legend needs it.
const LEAST_PAGE: usize = 660;
/// Around everything.
const MARGIN: usize = 16;
/// Between two things, and inside of a frame.
const GAP: usize = 8;
/// The size of a CPU. Its width has room for `IN_CPU` characters.
const CPU: (usize, usize) = (136, 54);
/// Characters of a CPU's text.
const IN_CPU: usize = 17;
/// A core has so many CPUs in a row at most.
const CPUS_IN_ROW: usize = 4;
/// The height of a heading of a frame.
const HEADING: usize = 16;
/// The height of a line of the legend.
const LINE: usize = 20;
/// The width of a character of the legend, rounded up.
const CHARACTER: usize = 7;

/// Returns the picture.
///
/// # Errors
/// The topology cannot be read.
pub(super) fn picture(path: &Path, selected: &Selected, host: &Host) -> Result<String, Error> {
    let machine = host.topology()?;
    let swatches = Swatches::new(selected.pools.keys());
    let drawing = Drawing { selected, host, swatches: &swatches };
    let sockets = shape::sockets(&machine, |cpu| selected.has(cpu));
    let cpus = |socket: &Socket<'_>| socket.nodes.iter().flat_map(|node| &node.cores).map(Vec::len).max();
    let in_row = sockets.iter().filter_map(cpus).max().unwrap_or(1).min(CPUS_IN_ROW);
    let core_width = in_row * (CPU.0 + GAP / 2) - GAP / 2 + 2 * GAP;
    let room = PAGE - 2 * MARGIN - 4 * GAP;
    let most_cores = sockets.iter().flat_map(|it| &it.nodes).map(|node| node.cores.len()).max().unwrap_or(1);
    let cores_in_row = ((room + GAP) / (core_width + GAP)).clamp(1, most_cores.max(1));
    let grid = Grid { in_row, core_width, cores_in_row };
    let width = (grid.width() + 4 * GAP + 2 * MARGIN).max(LEAST_PAGE);
    let mut body = String::new();
    let mut y = MARGIN;
    y = drawing.legend(&mut body, path, &machine, width, y);
    for socket in &sockets {
        y = drawing.socket(&mut body, socket, grid, y) + GAP;
    }
    let (height, patterns) = (y + MARGIN - GAP, swatches.definitions());
    let label = escaped(&format!("CPUs and pools of {}", text::one_line(&path.to_string_lossy())));
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         role=\"img\" aria-label=\"{label}\">\n<title>{label}</title>\n<style>{STYLE}</style>\n<defs>\n{patterns}</defs>\n\
         <rect class=\"page\" width=\"{width}\" height=\"{height}\"/>\n{body}</svg>\n"
    ))
}

/// How CPUs are placed.
#[derive(Clone, Copy)]
struct Grid {
    /// CPUs of a core in a row.
    in_row: usize,
    core_width: usize,
    cores_in_row: usize,
}

impl Grid {
    /// The width of a row of cores.
    fn width(self) -> usize {
        self.cores_in_row * (self.core_width + GAP) - GAP
    }

    /// The height of a core.
    fn core_height(self, cpus: usize) -> usize {
        HEADING + cpus.div_ceil(self.in_row) * (CPU.1 + GAP / 2) - GAP / 2 + GAP
    }
}

struct Drawing<'a> {
    selected: &'a Selected,
    host: &'a Host,
    swatches: &'a Swatches,
}

impl Drawing<'_> {
    /// Draws the legend: the pools, what is wrong with lists, and the tasks of shared lists. Returns the end of it.
    fn legend(&self, to: &mut String, path: &Path, machine: &Topology, width: usize, top: usize) -> usize {
        let shown_cpus = machine.all().iter().filter(|cpu| self.selected.has(cpu.id)).count();
        let room = (width - 2 * MARGIN) / CHARACTER;
        let path = text::one_line(&path.to_string_lossy()).into_owned();
        let mut y = top + LINE;
        let (heading, x) = (Cell::from(path).within(room / 2), MARGIN);
        let _ = writeln!(
            to,
            "<text class=\"heading\" x=\"{x}\" y=\"{y}\">{}</text>\n\
             <text x=\"{}\" y=\"{y}\" class=\"right\">{shown_cpus} of {} CPUs</text>",
            escaped(&heading),
            width - MARGIN,
            machine.all().len(),
        );
        y += GAP;
        let online = machine.online();
        for (name, pool) in &self.selected.pools {
            y += LINE;
            let kind = match (pool.exclusive, pool.isolated) {
                (_, true) => "isolated",
                (true, false) => "exclusive",
                (false, false) => "shared",
            };
            let parse = |list: &String| crate::confdir::parse_cpu_list(list).unwrap_or_default();
            let cpus = pool.lists.keys().map(parse).fold(CpuSet::new(), |all, cpus| all.union(&cpus));
            let free = pool.lists.values().filter(|tasks| tasks.is_empty()).count();
            let free = if pool.exclusive { format!(", {free} free") } else { String::new() };
            let name = shown(name);
            let start = format!("{}, {kind}, lists: {}{free}, CPUs: ", name, pool.lists.len());
            let cpus = if cpus.is_empty() { "none".into() } else { Cell::cpus(&cpus.to_string()) };
            let line = start.clone() + &cpus.within(room.saturating_sub(start.chars().count() + 5).max(12));
            let (fill, box_y) = (self.swatches.fill(&name), y - 12);
            let _ = writeln!(
                to,
                "<g class=\"pool\"><title>{}</title><rect class=\"swatch\" x=\"{x}\" y=\"{box_y}\" width=\"24\" \
                 height=\"16\" fill=\"{fill}\"/><text x=\"{}\" y=\"{y}\">{}</text></g>",
                escaped(&(start + &cpus.text())),
                x + 32,
                escaped(&Cell::from(line).within(room - 5)),
            );
        }
        for (name, pool) in &self.selected.pools {
            for (list, pids) in pool.lists_by_cpu() {
                let name = Cell::from(shown(name)).within(room / 3);
                let title = format!("{name} {}: ", list_cell(list).within(room / 3));
                let of_list = List { pool_name: &name, pool, name: list, tasks: pids };
                let rest = room.saturating_sub(title.chars().count());
                let tasks = Some(tasks(&of_list, self.host, None).within(rest)).filter(|_| pids.len() > 1);
                for text in tasks.into_iter().chain(table::note(list, &online)) {
                    y += LINE;
                    let line = escaped(&format!("{title}{text}"));
                    let _ = writeln!(to, "<text class=\"note\" x=\"{x}\" y=\"{y}\">{line}</text>");
                }
            }
        }
        y + LINE
    }

    /// Draws a socket; returns the end of it.
    fn socket(&self, to: &mut String, socket: &Socket<'_>, grid: Grid, top: usize) -> usize {
        let mut nodes = String::new();
        let mut y = top + HEADING + GAP;
        for node in &socket.nodes {
            let mut cores = String::new();
            let start = y;
            y += HEADING;
            for row in node.cores.chunks(grid.cores_in_row) {
                let height = row.iter().map(|core| grid.core_height(core.len())).max().unwrap_or(0);
                for (column, core) in row.iter().enumerate() {
                    let x = MARGIN + 2 * GAP + column * (grid.core_width + GAP);
                    self.core(&mut cores, core, grid, (x, y));
                }
                y += height + GAP;
            }
            let name = node.id.map_or_else(|| "no NUMA node".to_owned(), |id| format!("NUMA node {id}"));
            frame(
                &mut nodes,
                "node",
                &name,
                (MARGIN + GAP, start),
                (grid.width() + 2 * GAP, y - start),
                &cores,
            );
            y += GAP;
        }
        let name = socket.id.map_or_else(|| "offline".to_owned(), |id| format!("Socket {id}"));
        frame(to, "socket", &name, (MARGIN, top), (grid.width() + 4 * GAP, y - top), &nodes);
        y
    }

    /// Draws a core.
    fn core(&self, to: &mut String, core: &Core<'_>, grid: Grid, (left, top): (usize, usize)) {
        let mut cpus = String::new();
        for (index, cpu) in core.iter().enumerate() {
            let column = index % grid.in_row;
            let x = left + GAP + column * (CPU.0 + GAP / 2);
            self.cpu(&mut cpus, cpu, (x, top + HEADING + index / grid.in_row * (CPU.1 + GAP / 2)));
        }
        let number = core.first().and_then(|cpu| cpu.core);
        let name = number.map_or_else(|| "core unknown".to_owned(), |core| format!("core {core}"));
        frame(to, "core", &name, (left, top), (grid.core_width, grid.core_height(core.len())), &cpus);
    }

    /// Draws a CPU: its number and state, its pool and list, and its tasks.
    fn cpu(&self, to: &mut String, cpu: &Cpu, (x, y): (usize, usize)) {
        let list = shape::list_with(&self.selected.pools, cpu.id);
        let flag = state(cpu);
        let id = cpu.id;
        let (place, tasks) = match list {
            None => ("no pool".to_owned(), Cell::from("")),
            Some(list) => {
                (format!("{} {}", shown(list.pool_name), shown(list.name)), tasks(&list, self.host, None))
            }
        };
        let short = match list.map(|list| list.tasks.len()) {
            Some(count @ 2..) => format!("{count} tasks"),
            _ => tasks.within(IN_CPU),
        };
        let is_taken = list.is_some_and(|list| !list.tasks.is_empty());
        let class = match (cpu.online, is_taken, list.is_some()) {
            (false, ..) => "cpu offline",
            (true, true, _) => "cpu taken",
            (true, false, true) => "cpu",
            (true, false, false) => "cpu none",
        };
        // A file with the names of thousands of tasks on each CPU would be of no use.
        let title = format!("CPU {id}: {place}: {}", tasks.within(400));
        let _ = writeln!(to, "<g class=\"{class}\" id=\"cpu-{id}\"><title>{}</title>", escaped(&title));
        let (width, height) = CPU;
        if let Some(list) = list {
            let fill = self.swatches.fill(&shown(list.pool_name));
            let tint = self.swatches.colour(&shown(list.pool_name));
            let _ = writeln!(
                to,
                "<rect class=\"tint\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{tint}\"/>\
                 <rect x=\"{x}\" y=\"{y}\" width=\"10\" height=\"{height}\" fill=\"{fill}\"/>"
            );
        }
        let _ = writeln!(
            to,
            "<rect class=\"outline\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\"/>"
        );
        let left = x + 15;
        let _ = writeln!(to, "<text class=\"number\" x=\"{left}\" y=\"{}\">CPU {id}</text>", y + 16);
        if let Some(flag) = flag {
            let _ =
                writeln!(to, "<text class=\"flag\" x=\"{}\" y=\"{}\">{flag}</text>", x + width - 5, y + 16);
        }
        for (text, y) in [(Cell::from(place).within(IN_CPU), y + 32), (short, y + 47)] {
            let _ = writeln!(to, "<text x=\"{left}\" y=\"{y}\">{}</text>", escaped(&text));
        }
        to.push_str("</g>\n");
    }
}

/// Draws a frame with a name around `content`.
fn frame(
    to: &mut String,
    class: &str,
    name: &str,
    (x, y): (usize, usize),
    (width, height): (usize, usize),
    content: &str,
) {
    let _ = writeln!(
        to,
        "<g class=\"{class}\">\n<rect class=\"frame\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\"/>\n\
         <text class=\"name\" x=\"{}\" y=\"{}\">{name}</text>\n{content}</g>",
        x + GAP,
        y + 12,
    );
}
