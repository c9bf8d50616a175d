//! Whether the worker hangs: from a suspicion to a question to the mount, and to the conclusion.
//!
//! Owns: what is to be looked at next, and when. A process asks in the keeper's stead, since whoever asks a mount
//! that hangs hangs, too. Must not know: what is suspicious, or how a worker is replaced.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::paths::Places;
use crate::process::PidFd;

/// How often a look is taken whether requests are left lying.
const LOOK: Duration = Duration::from_secs(6);
/// How long requests must lie before that is suspicious.
const SUSPICION: Duration = Duration::from_millis(300);
/// How long the answer to a question may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long it may take where another worker has to begin first.
const PATIENCE_WITH_THE_NEXT: Duration = Duration::from_secs(60);

/// How sure it is that the worker serves.
#[derive(Debug)]
pub(super) enum Doubt {
    /// Nothing is known against it; next look at this time.
    None(Instant),
    /// Requests lay there; a second look at this time.
    Some(Instant),
    /// This process has asked the mount something, and is answered before this time.
    Asking(PidFd, Instant),
}

impl Doubt {
    pub(super) fn none() -> Self {
        Self::None(Instant::now() + LOOK)
    }

    /// When it is time to [`Doubt::go_on`].
    pub(super) fn due(&self) -> Instant {
        match self {
            Self::None(at) | Self::Some(at) | Self::Asking(_, at) => *at,
        }
    }

    /// Where something was asked: readable once it has been answered.
    pub(super) fn question(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Asking(asker, _) => Some(asker.as_fd()),
            _ => None,
        }
    }

    /// Draws the next conclusion; says whether it is that the worker hangs.
    pub(super) fn go_on(&mut self, is_suspect: bool, places: &Places) -> bool {
        let now = Instant::now();
        let (next, hangs) = match std::mem::replace(self, Self::none()) {
            Self::None(_) if is_suspect => (Self::Some(now + SUSPICION), false),
            Self::Some(_) if is_suspect => match ask(places) {
                Ok(asker) => (Self::Asking(asker, now + PATIENCE), false),
                Err(error) => {
                    log::warn!("the mount cannot be asked: {error}");
                    (Self::none(), false)
                }
            },
            // Its answer comes from the next worker.
            Self::Asking(asker, _) => (Self::Asking(asker, now + PATIENCE_WITH_THE_NEXT), true),
            _ => (Self::none(), false),
        };
        *self = next;
        hangs
    }

    /// It serves, or another one will.
    pub(super) fn end(&mut self) {
        if let Self::Asking(asker, _) = std::mem::replace(self, Self::none()) {
            // Where it waits for an answer it ends with that.
            asker.kill();
            let _ = asker.collect();
        }
    }
}

fn ask(places: &Places) -> io::Result<PidFd> {
    let mut command = places.command(Command::new("/proc/self/exe"));
    command.arg("--probe").stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.spawn()?;
    PidFd::open(child.id()).inspect_err(|_| {
        let _ = child.kill();
    })
}
