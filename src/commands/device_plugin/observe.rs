//! The other end of the process that looks: starts it, and keeps what it has seen.
//!
//! Owns when a silent process is given up, and the messages about that. While nothing is seen, the lists stay and are unhealthy: the
//! kubelet keeps the capacity, and allocates nothing. Does not know the kubelet.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context as _, Error};
use kcm_mount::mountpoint::{self, Status};
use tokio::sync::watch;

use super::look::{LONGEST, Offer, Seen};
use crate::commands::common::looker::{Heard, Looker};

/// How long the process may be silent: while all is well, it prints a line every [`LONGEST`]. As long as
/// [`mountpoint::status`] waits comes on top.
const SILENCE: Duration = LONGEST.saturating_add(Duration::from_secs(5));
/// How long to wait until another process is started.
const PAUSE: Duration = Duration::from_secs(1);

/// Keeps the offer up to date, in a thread.
///
/// # Errors
/// No thread can be started.
pub(super) fn start(conf_dir: PathBuf, offer: watch::Sender<Offer>) -> Result<(), Error> {
    let observer = Observer { offer, problem: None };
    let started = std::thread::Builder::new().spawn(move || observer.run(&conf_dir));
    started.map(drop).context("no thread can be started; look at the limits of this user")
}

struct Observer {
    offer: watch::Sender<Offer>,
    /// Why nothing is seen, which is said once. Empty if the process itself has said it.
    problem: Option<String>,
}

impl Observer {
    fn run(mut self, conf_dir: &Path) {
        loop {
            let (sender, heard) = mpsc::channel();
            // It dies with this thread.
            let looker = Looker::start(Stdio::inherit(), move |it| sender.send(it).is_ok());
            let problem = match &looker {
                Ok(_) => loop {
                    match heard.recv_timeout(SILENCE) {
                        Ok(Heard::Answer(seen)) => self.see(seen),
                        Ok(Heard::End) | Err(RecvTimeoutError::Disconnected) => {
                            break "the process that looks has ended; look at the limits of this user".into();
                        }
                        Err(RecvTimeoutError::Timeout) => {
                            break format!(
                                "{}: kcm mount does not answer; look at its log",
                                conf_dir.display()
                            );
                        }
                    }
                },
                Err(error) => format!("{error:#}"),
            };
            self.see(Seen::Failed(problem));
            drop(looker);
            // A process that looks now would hang, too. This asks in another one, and starts no second one while that hangs.
            while let Ok(Status::NotAnswering) = mountpoint::status(conf_dir) {
                std::thread::sleep(PAUSE);
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn see(&mut self, seen: Seen) {
        let problem = match seen {
            Seen::Offer(offer) => {
                if self.problem.take().is_some() {
                    log::info!("The pools can be read again.");
                }
                self.offer.send_if_modified(|known| {
                    let has_changed = *known != offer;
                    *known = offer;
                    has_changed
                });
                return;
            }
            Seen::Away => String::new(),
            Seen::Failed(problem) => problem,
        };
        if self.problem.as_ref() != Some(&problem) {
            if !problem.is_empty() {
                log::error!("{problem}; nothing is allocated until then");
            }
            self.problem = Some(problem);
        }
        self.offer.send_if_modified(|known| {
            let mut healthy = known.values_mut().flatten().filter(|list| list.is_healthy).peekable();
            let has_changed = healthy.peek().is_some();
            healthy.for_each(|list| list.is_healthy = false);
            has_changed
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::look::List;
    use super::*;

    #[test]
    fn without_an_answer_lists_stay_and_are_unhealthy() {
        let list = |is_healthy| List { name: "0".into(), is_healthy, nodes: vec![0] };
        let with = |is_healthy| Offer::from([("dp".to_owned(), vec![list(is_healthy)])]);
        let (offer, mut receiver) = watch::channel(Offer::new());
        let mut observer = Observer { offer, problem: None };
        for (seen, expected, is_news) in [
            (Seen::Offer(with(true)), with(true), true),
            (Seen::Offer(with(true)), with(true), false),
            (Seen::Away, with(false), true),
            (Seen::Failed("x".into()), with(false), false),
            (Seen::Offer(with(true)), with(true), true),
        ] {
            observer.see(seen);
            assert_eq!(receiver.has_changed().unwrap(), is_news);
            assert_eq!(*receiver.borrow_and_update(), expected);
        }
    }
}
