//! `kcm top` in a pseudo-terminal, whose screen is read as a person does: what is shown on a real mount and on a machine
//! with 256 CPUs, what keys do, and that the terminal is restored.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::num::NonZero;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::harness::{
    Machine, Mount, Sleeper, TIMEOUT, children, fails, pin, run, signal, stat, until, write,
};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::Signal;
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};

nix::ioctl_write_ptr_bad!(set_size, libc::TIOCSWINSZ, Winsize);

/// A terminal with 80 columns and 24 rows, and `kcm top` in it.
struct Terminal {
    program: Sleeper,
    keyboard: File,
    /// The side of the program, which shows the modes.
    line: File,
    screen: Arc<Mutex<vt100::Parser>>,
    before: Termios,
}

impl Terminal {
    fn start(kcm: &Command) -> Self {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).unwrap();
        let line = File::from(pty.slave);
        let before = tcgetattr(&line).unwrap();
        let end = || Stdio::from(line.try_clone().unwrap());
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(kcm.get_program()).args(kcm.get_args()).arg("--interval=0.1");
        command.env("TERM", "xterm-256color").env_remove("NO_COLOR");
        for (name, value) in kcm.get_envs() {
            command.env(name, value.unwrap());
        }
        command.stdin(end()).stdout(end()).stderr(end());
        let program = Sleeper::spawn(&mut command);
        let keyboard = File::from(pty.master);
        let screen = Arc::new(Mutex::new(vt100::Parser::new(cells(24), cells(80), 0)));
        let (mut output, shown) = (keyboard.try_clone().unwrap(), Arc::clone(&screen));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut bytes) {
                shown.lock().unwrap().process(&bytes[..length]);
            }
        });
        Self { program, keyboard, line, screen, before }
    }

    fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    fn resize(&self, rows: u16, columns: u16) {
        self.screen.lock().unwrap().screen_mut().set_size(cells(rows), cells(columns));
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        resize(&self.keyboard, &size);
    }

    /// The lines of the screen, without blanks at their ends.
    fn lines(&self) -> Vec<String> {
        let parser = self.screen.lock().unwrap();
        let columns = parser.screen().size().1;
        parser.screen().rows(0, columns.get()).map(|line| line.trim_end().to_owned()).collect()
    }

    /// Waits until the screen is as wanted, and returns its lines.
    fn see(&self, wanted: &str, is_it: impl Fn(&[String]) -> bool) -> Vec<String> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let lines = self.lines();
            if is_it(&lines) {
                return lines;
            }
            assert!(Instant::now() < deadline, "{wanted} is not shown:\n{}", lines.join("\n"));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until a line contains a text, and returns all lines.
    fn see_text(&self, wanted: &str) -> Vec<String> {
        self.see(wanted, |lines| lines.iter().any(|line| line.contains(wanted)))
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.line).unwrap().local_flags.contains(LocalFlags::ICANON)
    }

    /// Asserts that the terminal is as before the program.
    fn is_restored(&self) {
        assert_eq!(tcgetattr(&self.line).unwrap(), self.before);
        until("the screen is restored", || {
            let parser = self.screen.lock().unwrap();
            !parser.screen().alternate_screen() && !parser.screen().hide_cursor()
        });
    }

    /// Waits for the end of the program; it must be a success that restores the terminal.
    fn ends(mut self) {
        let mut status = None;
        until("the program has ended", || {
            status = self.program.child().try_wait().unwrap();
            status.is_some()
        });
        assert_eq!(status.unwrap().code(), Some(0), "{}", self.lines().join("\n"));
        self.is_restored();
    }
}

fn cells(count: u16) -> NonZero<u16> {
    NonZero::new(count).unwrap()
}

#[allow(unsafe_code, reason = "there is no safe way")]
fn resize(terminal: &File, size: &Winsize) {
    use std::os::fd::AsRawFd as _;
    // SAFETY: the descriptor is open, and the kernel reads only `size`.
    unsafe { set_size(terminal.as_raw_fd(), size) }.expect("TIOCSWINSZ");
}

/// The words of the row of a CPU. `lines` are sorted in the machine's shape, without marks.
fn row(lines: &[String], cpu: u32) -> Vec<String> {
    let header = lines.iter().position(|line| line.trim_start().starts_with("CPU ")).unwrap_or(0);
    let is_it = |line: &&String| line.get(3..).is_some_and(|rest| rest.starts_with(&format!("{cpu} ")));
    let line = lines[header..].iter().find(is_it);
    line.map(|line| line[3..].split_whitespace().map(str::to_owned).collect()).unwrap_or_default()
}

/// A process that never sleeps.
fn busy() -> Sleeper {
    Sleeper::spawn(Command::new("sh").args(["-c", "while :; do :; done"]))
}

#[test]
fn a_busy_holder_is_shown_with_its_share() {
    let mount = Mount::with_dataplane();
    let (holder, waits) = (busy(), Sleeper::new());
    write(&mount.tasks("dataplane", "0"), holder.pid().to_string()).unwrap();
    write(&mount.tasks("dataplane", "1"), waits.pid().to_string()).unwrap();
    let mut terminal = Terminal::start(&mount.kcm(&["top"]));
    let holder = [holder.pid().to_string(), "(sh)".to_owned()];
    // CPU, core, pool, list, holder (2), held (2), share, others.
    let share = |lines: &[String]| row(lines, 0).get(8).map(|share| share.trim_end_matches('%').to_owned());
    let lines = terminal.see("a share", |lines| {
        share(lines).and_then(|share| share.parse::<u32>().ok()).is_some_and(|share| share > 0)
    });
    let found = row(&lines, 0);
    assert_eq!(found[2..4], ["dataplane", "0"]);
    assert_eq!(found[4..6], holder);
    assert!(found[6].parse::<u32>().is_ok() && found[7] == "s", "the time of the claim is known: {found:?}");
    assert!(found[9].ends_with('%'), "{found:?}");
    let found = row(&lines, 1);
    assert_eq!(found[4..6], [waits.pid().to_string(), "(sleep)".to_owned()]);
    assert!(lines[0].starts_with("kcm top /"), "{lines:?}");
    assert!(lines.iter().any(|line| line.starts_with("d dataplane  CAPITAL taken  . no pool  - offline")));
    terminal.press("q");
    terminal.ends();
}

#[test]
fn intruders_and_strays_are_marked() {
    let mount = Mount::with_dataplane();
    let (task, intruder) = (Sleeper::new(), Sleeper::new());
    write(&mount.tasks("dataplane", "1"), task.pid().to_string()).unwrap();
    pin(intruder.pid(), &[0]);
    // The daemon would move it back from all CPUs, because the kernel may have put it there.
    pin(task.pid(), &[0]);
    let mut terminal = Terminal::start(&mount.kcm(&["top"]));
    terminal.see_text("dataplane");
    // Only the row of the stray, and all of what it says: other tests pin processes, too.
    terminal.resize(24, 2000);
    terminal.press(&format!("/~{}\r", task.pid()));
    let stray = format!("~{} may run on 0", task.pid());
    let lines = terminal.see_text(&stray);
    let line = lines.iter().find(|line| line.contains(&stray)).unwrap();
    assert!(line[..3].contains('~') && line[3..].starts_with("1 "), "{line}");
    terminal.press("/");
    terminal.see_text("Esc clears it");
    terminal.press("\x1b");
    terminal.see_text("filter: none");
    terminal.press(&format!("/!{}\r", intruder.pid()));
    let found = format!("!{} (sleep)", intruder.pid());
    let lines = terminal.see_text(&found);
    let line = lines.iter().find(|line| line.contains(&found)).unwrap();
    assert!(line[..3].contains('!') && line[3..].starts_with("0 "), "{line}");
    terminal.press("q");
    terminal.ends();
}

/// A daemon and `kcm top` on a machine with 256 CPUs: 2 sockets of 64 cores of 2 threads.
fn on_256_cpus() -> (Mount, Command) {
    let machine = Machine::new(2, 64, 2);
    let mount = Mount::on_machine(&machine);
    mount.make_pool("control", false, &["100-103,228-231"]);
    mount.make_pool("data", true, &["104,232", "105,233", "106,234"]);
    let mut command = mount.kcm(&["top"]);
    machine.seen_by(&mount.home().join("machine"), &mut command);
    (mount, command)
}

#[test]
fn a_machine_with_256_cpus_fits_into_80_columns() {
    let (mount, command) = on_256_cpus();
    let mut terminal = Terminal::start(&command);
    let lines = terminal.see_text("line 1 of 258");
    let title =
        format!("kcm top {}: 256 CPUs, every 100ms, sort: shape, filter: none", mount.conf().display());
    assert!(title.starts_with(&lines[0]) && lines[0].len() >= 70, "{}", lines[0]);
    let (blank, dots) = (" ".repeat(18), |count| ".".repeat(count));
    // 62 CPUs in each line; siblings are together, and socket 1 has the CPUs 64-127 and 192-255.
    let picture = [
        format!("socket 0, node 0  {}", dots(62)),
        format!("{blank}{}", dots(62)),
        format!("{blank}{}", dots(4)),
        format!("socket 1, node 1  {}", dots(62)),
        format!("{blank}{}ccccccccdddddd{}", dots(10), dots(38)),
        format!("{blank}{}", dots(4)),
    ];
    assert_eq!(lines[1..7], picture, "{}", lines.join("\n"));
    assert!(lines.iter().any(|line| line.starts_with("c control  d data  CAPITAL taken")), "{lines:?}");
    // There is room for blanks between the cores.
    terminal.resize(48, 80);
    terminal.see_text("socket 0, node 0  .. .. ");
    terminal.press("\x1b[F");
    let lines = terminal.see("the last row", |lines| !row(lines, 255).is_empty());
    assert_eq!(row(&lines, 254)[..4], ["254", "126", "-", "-"]);
    terminal.press("/data\r");
    let lines = terminal.see_text("line 1 of 7");
    let rows = [104, 232, 105, 233, 106, 234].map(|cpu| row(&lines, cpu)[..5].join(" "));
    let expected = [
        "104 104 data 104,232 free",
        "232 104 data 104,232 free",
        "105 105 data 105,233 free",
        "233 105 data 105,233 free",
        "106 106 data 106,234 free",
        "234 106 data 106,234 free",
    ];
    assert_eq!(rows, expected, "{}", lines.join("\n"));
    terminal.press("\x1b");
    terminal.ends();
}

#[test]
fn keys_sort_filter_pause_and_help() {
    let (_mount, command) = on_256_cpus();
    let mut terminal = Terminal::start(&command);
    terminal.see_text("sort: shape");
    terminal.resize(24, 120);
    terminal.press("s");
    let lines = terminal.see_text("sort: pool");
    let lines = if row(&lines, 100).is_empty() { terminal.see_text("control") } else { lines };
    assert_eq!(row(&lines, 100)[..4], ["100", "100", "control", "100-103.."]);
    terminal.press("ss");
    terminal.see_text("sort: others");
    terminal.press("s/zzz");
    terminal.see_text("filter: zzz_  Enter keeps it, Esc clears it");
    terminal.see_text("No row matches the filter.");
    terminal.press("\x1b");
    terminal.see_text("filter: none");
    terminal.press("p");
    terminal.see_text("256 CPUs, paused, sort: shape");
    terminal.press("?");
    terminal.see_text("!  intruder  a process that is pinned within the list without a claim");
    terminal.press("?p");
    terminal.see_text("256 CPUs, every 100ms, sort: shape");
    terminal.press("\x03");
    terminal.ends();
}

/// How many cells of the screen have a colour.
fn coloured(terminal: &Terminal) -> usize {
    let parser = terminal.screen.lock().unwrap();
    let (rows, columns) = parser.screen().size();
    let cells = (0..rows.get()).flat_map(|row| (0..columns.get()).map(move |column| (row, column)));
    let has_colour = |(row, column): &(u16, u16)| {
        let cell = parser.screen().cell(*row, *column).unwrap();
        cell.fgcolor() != vt100::Color::Default || cell.bgcolor() != vt100::Color::Default
    };
    cells.filter(has_colour).count()
}

#[test]
fn pools_have_colours_unless_no_color_is_set() {
    let mount = Mount::with_dataplane();
    for (no_color, has_colours) in [("", true), ("1", false)] {
        let mut terminal = Terminal::start(mount.kcm(&["top"]).env("NO_COLOR", no_color));
        terminal.see_text("d dataplane");
        assert_eq!(coloured(&terminal) > 0, has_colours, "NO_COLOR={no_color}");
        terminal.press("q");
        terminal.ends();
    }
}

#[test]
fn a_daemon_that_does_not_answer_is_named_and_q_quits() {
    let mount = Mount::with_dataplane();
    let mut terminal = Terminal::start(&mount.kcm(&["top"]));
    terminal.see_text("free");
    let paused = mount.pause();
    let lines = terminal.see_text("kcm mount does not answer");
    assert!(lines.iter().any(|line| line.contains("free")), "the rows stay:\n{}", lines.join("\n"));
    drop(paused);
    terminal.see("the end of the message", |lines| !lines.iter().any(|line| line.contains("answer")));
    let _paused = mount.pause();
    terminal.see_text("kcm mount does not answer");
    terminal.press("s");
    terminal.see_text("sort: pool");
    terminal.press("q");
    terminal.ends();
}

#[test]
fn a_daemon_that_does_not_run_is_waited_for() {
    let mount = Mount::with_dataplane();
    mount.stop();
    let mut terminal = Terminal::start(&mount.kcm(&["top"]));
    terminal.resize(24, 200);
    terminal.see_text("kcm mount is not running; start it: kcm mount --conf-dir=");
    mount.start();
    terminal.see_text("free");
    terminal.press("q");
    terminal.ends();
}

#[test]
fn signals_end_it_and_restore_the_terminal() {
    let mount = Mount::with_dataplane();
    for ending in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let terminal = Terminal::start(&mount.kcm(&["top"]));
        terminal.see_text("free");
        assert!(terminal.is_raw());
        signal(terminal.program.pid(), ending);
        terminal.ends();
    }
}

#[test]
fn it_stops_and_continues_with_the_terminal() {
    let mount = Mount::with_dataplane();
    // The kernel stops nothing that nobody can continue, so a shell with job control is needed.
    // It leaves a loop when its job stops.
    let script = "set -m
        \"$0\" \"$@\"; echo stop 1: $?; read line
        fg > /dev/null; echo stop 2: $?; read line
        fg > /dev/null; echo stop 3: $?; read line
        fg > /dev/null; exit $?";
    let kcm = mount.kcm(&["top"]);
    let mut shell = Command::new("bash");
    shell.args(["-c", script]).arg(kcm.get_program()).args(kcm.get_args());
    let mut terminal = Terminal::start(&shell);
    terminal.see_text("free");
    let pid = children(terminal.program.pid())[0];
    terminal.press("\x1a");
    terminal.see_text("stop 1: 148");
    assert_eq!(stat(pid, 3), "T");
    terminal.is_restored();
    terminal.press("\n");
    terminal.see_text("free");
    assert!(terminal.is_raw());
    // A signal to the process is the same; one that cannot be caught leaves the screen as it is.
    signal(pid, Signal::SIGTSTP);
    terminal.see_text("stop 2: 148");
    terminal.press("\n");
    terminal.see_text("free");
    signal(pid, Signal::SIGSTOP);
    terminal.see_text("stop 3: 147");
    terminal.press("\n");
    terminal.see("the view, drawn again", |lines| !lines.iter().any(|line| line.contains("stop 3")));
    until("it has the terminal again", || terminal.is_raw());
    terminal.press("q");
    terminal.ends();
}

#[test]
fn without_a_terminal_it_names_what_to_use() {
    let mount = Mount::with_dataplane();
    let instead = "use kcm top --once, or kcm describe --format=map";
    fails(&mut mount.kcm(&["top"]), "standard output is not a terminal; ", instead);
    let (out, err, code) = run(&mut mount.kcm(&["top", "--once", "--interval=0.1"]));
    assert_eq!((err.as_str(), code), ("", Some(0)), "{out}");
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let lines: Vec<Vec<String>> = out.lines().map(words).collect();
    assert_eq!(lines[0][..7], ["CPU", "CORE", "SOCKET", "NODE", "POOL", "LIST", "HOLDER"]);
    let row = lines.iter().find(|row| row[0] == "0").unwrap();
    assert_eq!(
        (row[4..8].join(" "), row[9].ends_with('%')),
        ("dataplane 0 free -".to_owned(), true),
        "{out}"
    );
    let mut terminal = Terminal::start(mount.kcm(&["top"]).env("TERM", "dumb"));
    terminal.see_text("TERM=dumb: this terminal cannot show the view; use kcm top --once");
    assert_eq!(terminal.program.child().wait().unwrap().code(), Some(1));
}
