//! The terminal of the view: sets it up, restores it, and waits for keys, answers and signals.
//!
//! Owns the terminal's modes and the timing of requests. Does not know what is drawn, or what keys do.
//!
//! The terminal is as before after each ending: a key, a signal, an error, a panic. Only after SIGKILL it is not.

use std::io::{self, Stdout};
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error};
use kcm_mount::mountpoint::{self, Status};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::{Hide, Show};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use ratatui::layout::Rect;

use super::sample::Answer;
use super::screen;
use super::view::{Key, Todo, View};
use crate::commands::common::looker::{Heard, Looker};

/// After this time without an answer the view says so. Usual answers take milliseconds.
const LATE: Duration = Duration::from_secs(2);
/// How long the mount may take to answer when an answer is late.
const PROBE: Duration = Duration::from_secs(1);
/// How often the message about a late answer is brought up to date.
const TICK: Duration = Duration::from_secs(1);
/// These signals end the view, after the terminal is restored.
const ENDING: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];

/// An event that the view waits for.
enum Message {
    Key(Key),
    /// The terminal is gone.
    NoInput,
    Heard(Heard<Answer>),
    Signal(Signal),
    /// The state of the mount while an answer is late.
    Mount(Option<Status>),
}

/// The state of the request to the process that looks.
enum Request {
    /// The next one is due at this time.
    Next(Instant),
    Asked(Instant),
}

/// Shows the view until the user or a signal ends it.
///
/// # Errors
/// The terminal cannot be used, or no process can be started.
pub(super) fn run(mut view: View, conf_dir: &Path) -> Result<ExitCode, Error> {
    // Before any thread starts, so that it blocks the signals, too.
    let signals = block_signals().context("cannot catch signals")?;
    let (sender, messages) = mpsc::channel();
    let mut looker = Some(start_looker(&sender)?);
    // https://no-color.org
    let colours = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let mut screen = Screen::new().context("the terminal cannot be used")?;
    start_threads(&sender, signals)?;
    let request = Request::Next(Instant::now());
    let mut wait = Wait { request, is_probing: false, probed: None, mount: None };
    loop {
        let now = Instant::now();
        if let Request::Next(due) = wait.request
            && due <= now
            && !view.is_paused
        {
            if looker.as_mut().is_some_and(|process| process.ask().is_ok()) {
                wait.request = Request::Asked(now);
            } else {
                // It has ended; another one may do better.
                looker = start_looker(&sender).ok();
                wait.request = Request::Next(now + view.interval);
            }
        }
        wait.say_if_late(&mut view, now, conf_dir, &sender);
        screen.terminal.draw(|frame| screen::draw(frame, &mut view, colours))?;
        let message = match messages.recv_timeout(wait.most(&view)) {
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => break,
            Ok(message) => message,
        };
        match message {
            Message::NoInput => break,
            Message::Key(key) => match view.press(key) {
                Todo::Draw => {}
                Todo::Quit => break,
                Todo::Stop => screen.stop()?,
            },
            Message::Signal(Signal::SIGTSTP) => screen.stop()?,
            // The size is looked at whenever something is drawn.
            Message::Signal(Signal::SIGWINCH) => {}
            // Somebody else has stopped this process, and the shell has set its own modes.
            Message::Signal(Signal::SIGCONT) => screen.repair()?,
            Message::Signal(_) => break,
            Message::Mount(status) => (wait.is_probing, wait.mount) = (false, status),
            Message::Heard(heard) => wait.hear(heard, &mut view),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// When the next thing is due.
struct Wait {
    request: Request,
    /// Whether a thread asks the mount.
    is_probing: bool,
    /// When it was asked.
    probed: Option<Instant>,
    /// The state of the mount, if it was asked during this request.
    mount: Option<Status>,
}

impl Wait {
    /// Returns how long to wait for a message.
    fn most(&self, view: &View) -> Duration {
        match self.request {
            Request::Next(_) if view.is_paused => TICK,
            Request::Next(due) => due.saturating_duration_since(Instant::now()),
            Request::Asked(_) => TICK,
        }
    }

    fn hear(&mut self, heard: Heard<Answer>, view: &mut View) {
        let asked = match self.request {
            Request::Asked(at) | Request::Next(at) => at,
        };
        match heard {
            Heard::Answer(Answer::Sample(sample)) => view.update(&sample),
            Heard::Answer(Answer::Error(error)) => view.problem = Some(error),
            Heard::End => {
                let why = "the process that looks has ended, and is started again";
                view.problem.get_or_insert_with(|| why.to_owned());
            }
        }
        self.request = Request::Next(asked + view.interval);
        self.mount = None;
    }

    /// Says that an answer is late, and why.
    fn say_if_late(&mut self, view: &mut View, now: Instant, conf_dir: &Path, sender: &Sender<Message>) {
        let Request::Asked(at) = self.request else { return };
        let late = now.saturating_duration_since(at);
        if late < LATE {
            return;
        }
        let why = match self.mount {
            Some(Status::NotAnswering) => "kcm mount does not answer",
            Some(_) => "the mount answers, but reading everything takes long",
            None => "reading takes long",
        };
        let age = late.as_secs();
        view.problem = Some(format!("No answer for {age} s: {why}. The rows are old. q quits."));
        // Not more often than the message changes.
        if !self.is_probing && self.probed.is_none_or(|probed| probed + TICK <= now) {
            let (path, sender): (PathBuf, _) = (conf_dir.to_owned(), sender.clone());
            let probe = move || {
                let status = mountpoint::status_within(&path, PROBE).ok();
                let _ = sender.send(Message::Mount(status));
            };
            self.probed = Some(now);
            self.is_probing = thread::Builder::new().spawn(probe).is_ok();
        }
    }
}

/// Blocks the signals that end, stop or resize the view, and returns the descriptor that reads them.
fn block_signals() -> nix::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.extend(ENDING);
    set.extend([Signal::SIGTSTP, Signal::SIGCONT]);
    // crossterm would see it, too, but it misses a key that comes at the same moment, until the next one.
    set.add(Signal::SIGWINCH);
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)
}

/// Starts the process that looks. Its messages would disturb the screen.
fn start_looker(sender: &Sender<Message>) -> Result<Looker, Error> {
    let sender = sender.clone();
    Looker::start(Stdio::null(), move |heard| sender.send(Message::Heard(heard)).is_ok())
}

/// Starts the threads that wait for keys and for signals. They end with the process.
fn start_threads(sender: &Sender<Message>, signals: SignalFd) -> io::Result<()> {
    let keys = sender.clone();
    thread::Builder::new().spawn(move || {
        loop {
            let message = match event::read() {
                Ok(Event::Key(event)) => key(event).map(Message::Key),
                Ok(_) => None,
                Err(_) => Some(Message::NoInput),
            };
            let is_last = matches!(message, Some(Message::NoInput));
            if message.is_some_and(|message| keys.send(message).is_err()) || is_last {
                break;
            }
        }
    })?;
    let caught = sender.clone();
    thread::Builder::new().spawn(move || {
        while let Ok(Some(info)) = signals.read_signal() {
            let signal = i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok());
            if signal.is_some_and(|signal| caught.send(Message::Signal(signal)).is_err()) {
                break;
            }
        }
    })?;
    Ok(())
}

/// Returns what a key event means; `None` for keys without a meaning.
fn key(event: KeyEvent) -> Option<Key> {
    if event.kind == KeyEventKind::Release {
        return None;
    }
    let control = event.modifiers.contains(KeyModifiers::CONTROL);
    Some(match event.code {
        KeyCode::Char('c') if control => Key::CtrlC,
        KeyCode::Char('z') if control => Key::CtrlZ,
        // Some terminals send this for the key.
        KeyCode::Char('h') if control => Key::Backspace,
        KeyCode::Char(_) if control => return None,
        KeyCode::Char(letter) => Key::Char(letter),
        KeyCode::Enter => Key::Enter,
        KeyCode::Esc => Key::Esc,
        KeyCode::Backspace => Key::Backspace,
        KeyCode::Up => Key::Up,
        KeyCode::Down => Key::Down,
        KeyCode::PageUp => Key::PageUp,
        KeyCode::PageDown => Key::PageDown,
        KeyCode::Home => Key::Home,
        KeyCode::End => Key::End,
        _ => return None,
    })
}

/// The terminal while the view uses it. Dropping it restores the terminal.
struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
}

impl Screen {
    fn new() -> io::Result<Self> {
        // Also if the program is built to abort on a panic: then nothing is dropped.
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            restore();
            usual(info);
        }));
        let mut screen = Self { terminal: Terminal::new(CrosstermBackend::new(io::stdout()))? };
        screen.set_up()?;
        Ok(screen)
    }

    /// Sets the terminal up.
    fn set_up(&mut self) -> io::Result<()> {
        execute!(io::stdout(), EnterAlternateScreen)?;
        self.repair()
    }

    /// Sets the modes, and draws everything again, after another program has used the terminal. To enter the alternate
    /// screen twice would lose the place of the cursor on the first one.
    fn repair(&mut self) -> io::Result<()> {
        // Otherwise the modes count as set already.
        disable_raw_mode()?;
        enable_raw_mode()?;
        execute!(io::stdout(), Hide)?;
        // Draws everything again. Terminal::clear would ask for the place of the cursor, which not every terminal tells.
        let size = self.terminal.size()?;
        self.terminal.resize(Rect::new(0, 0, size.width, size.height))
    }

    /// Stops this process, as Ctrl-Z does without a view. Returns when it continues.
    fn stop(&mut self) -> io::Result<()> {
        restore();
        // The signal is blocked. If nobody could continue this process, the kernel ignores it.
        let mut stop = SigSet::empty();
        stop.add(Signal::SIGTSTP);
        raise(Signal::SIGTSTP).and_then(|()| stop.thread_unblock()).and_then(|()| stop.thread_block())?;
        self.set_up()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the terminal. If that fails, the terminal is gone.
fn restore() {
    let _ = execute!(io::stdout(), Show, LeaveAlternateScreen);
    let _ = disable_raw_mode();
}
