//! A terminal with an interactive bash, and what is typed and shown there.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use super::dir::Dir;
use super::{KCM, Sleeper, text, until};
use nix::pty::openpty;

/// A person at a terminal with bash.
pub struct Terminal {
    _bash: Sleeper,
    keyboard: File,
    screen: Arc<Mutex<String>>,
}

impl Terminal {
    /// Starts it, with the directory in `$C` and kcm in `$KCM` and in the path.
    pub fn start(dir: &dyn Dir) -> Self {
        let pty = openpty(None, None).expect("a terminal");
        let end = |fd: &std::os::fd::OwnedFd| Stdio::from(fd.try_clone().expect("a terminal"));
        let mut bash = Command::new("setsid");
        bash.args(["--ctty", "bash", "--norc", "--noprofile", "-i"]);
        bash.env("PS1", "$ ").env("TERM", "dumb").env("KCM", KCM).env("C", dir.conf());
        let directory = Path::new(KCM).parent().expect("a directory");
        let path = std::env::var("PATH").expect("PATH");
        bash.env("PATH", format!("{}:{path}", directory.display()));
        bash.stdin(end(&pty.slave)).stdout(end(&pty.slave)).stderr(end(&pty.slave));
        let bash = Sleeper::spawn(&mut bash);
        let (keyboard, screen) = (File::from(pty.master), Arc::default());
        let (mut output, shown) = (keyboard.try_clone().expect("a terminal"), Arc::clone(&screen));
        std::thread::spawn(move || {
            let mut bytes = [0; 1024];
            while let Ok(length @ 1..) = output.read(&mut bytes) {
                let shown: &Mutex<String> = &shown;
                shown.lock().expect("a terminal").push_str(&text(&bytes[..length]));
            }
        });
        Self { _bash: bash, keyboard, screen }
    }

    /// Presses keys.
    pub fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).expect("a terminal");
    }

    /// Waits until a text is shown; forgets what came before it.
    pub fn see(&self, wanted: &str) {
        let deadline = std::time::Instant::now() + super::TIMEOUT;
        loop {
            let mut screen = self.screen.lock().expect("a terminal");
            if let Some(at) = screen.find(wanted) {
                screen.drain(..at + wanted.len());
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{wanted:?} is not shown: {screen:?}");
            drop(screen);
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    /// The status of the last command.
    pub fn status(&mut self) -> String {
        self.press("echo status=$?.\n");
        self.see("status=$?.");
        self.see("status=");
        until("the line is complete", || self.screen.lock().expect("a terminal").contains('.'));
        self.screen.lock().expect("a terminal").split('.').next().expect("a terminal").to_owned()
    }
}
