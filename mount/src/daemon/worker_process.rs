//! The worker as the supervisor sees it: a child process, its messages, and how it ended.
//!
//! Owns the start and the readiness of one worker. Does not know when a worker is replaced.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::wait::WaitStatus;

use super::fds::{self, ControlSocket, Message};
use crate::process::PidFd;

/// A worker that runs, or has exited and is not yet collected.
#[derive(Debug)]
pub(super) struct WorkerProcess {
    pidfd: PidFd,
    /// `None` after the worker has closed its end.
    control: Option<ControlSocket>,
    /// When it was started; once it serves, when it began to.
    since: Instant,
    is_ready: bool,
    /// Whether this supervisor has started it, so that it runs the same program.
    is_own: bool,
}

impl WorkerProcess {
    /// Starts a worker.
    ///
    /// # Errors
    /// No descriptors or processes are left.
    pub(super) fn start(command: &mut Command) -> io::Result<Self> {
        let (ours, theirs) = ControlSocket::pair()?;
        let control = theirs.install()?;
        let spawned = command.spawn();
        drop(control);
        fds::reserve_fd(fds::CONTROL)?;
        let mut child = spawned?;
        let pidfd = PidFd::open(child.id()).inspect_err(|_| {
            // A worker that cannot be supervised must not serve.
            let _ = child.kill().and_then(|()| child.wait());
        })?;
        log::debug!("worker {} started", child.id());
        Ok(Self { pidfd, control: Some(ours), since: Instant::now(), is_ready: false, is_own: true })
    }

    /// The worker of another supervisor; `None` if it does not live.
    pub(super) fn resume(pidfd: PidFd, control: ControlSocket) -> Option<Self> {
        let (control, since) = (Some(control), Instant::now());
        pidfd.is_of_process().then(|| Self { pidfd, control, since, is_ready: true, is_own: false })
    }

    /// Receives a message. `None`: the worker has closed its end, and is about to exit.
    pub(super) fn receive(&mut self) -> Option<Message> {
        let message = self.control.as_ref().and_then(ControlSocket::receive);
        match &message {
            Some(Message::Ready { .. }) => {
                log::debug!("the worker serves after {:?}", self.since.elapsed());
                self.is_ready = true;
                self.since = Instant::now();
            }
            Some(_) => {}
            None => self.control = None,
        }
        message
    }

    /// The socket on which messages arrive, if it is open.
    pub(super) fn control(&self) -> Option<&ControlSocket> {
        self.control.as_ref()
    }

    pub(super) fn is_ready(&self) -> bool {
        self.is_ready
    }

    pub(super) fn is_own(&self) -> bool {
        self.is_own
    }

    /// For how long it has served, if it serves.
    pub(super) fn uptime(&self) -> Option<Duration> {
        self.is_ready.then(|| self.since.elapsed())
    }

    /// For how long it has been starting, if it does not serve yet.
    pub(super) fn start_time(&self) -> Option<Duration> {
        (!self.is_ready).then(|| self.since.elapsed())
    }

    /// Whether it is stopped by a signal or a debugger.
    pub(super) fn is_stopped(&self) -> bool {
        self.pidfd.is_stopped()
    }

    /// How often it has called read(2), if the kernel counts that. Every request takes one.
    pub(super) fn reads(&self) -> Option<u64> {
        self.pidfd.reads()
    }

    pub(super) fn kill(&self) {
        self.pidfd.kill();
    }

    /// Kills it and waits until it has exited, for this time at most.
    pub(super) fn stop(self, timeout: Duration) {
        self.pidfd.kill();
        self.pidfd.wait(timeout);
    }

    /// Collects it after it has exited. Returns in words how it ended.
    pub(super) fn collect(self) -> String {
        exit_reason(self.pidfd.collect())
    }

    /// Leaves copies of its descriptors under their fixed numbers, for the program that this process becomes.
    ///
    /// # Errors
    /// No descriptors are left.
    pub(super) fn leave(&self) -> io::Result<()> {
        fds::leak(fds::install_fd_at(self.pidfd.as_fd().try_clone_to_owned()?, fds::WORKER)?);
        if let Some(control) = &self.control {
            fds::leak(fds::install_fd_at(control.as_fd().try_clone_to_owned()?, fds::CONTROL)?);
        }
        Ok(())
    }
}

impl AsFd for WorkerProcess {
    /// Readable after it has exited.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

fn exit_reason(status: Option<WaitStatus>) -> String {
    match status {
        Some(WaitStatus::Signaled(_, signal, _)) => format!("killed by {signal}"),
        Some(WaitStatus::Exited(_, code)) => format!("exited with status {code}"),
        // Only the parent gets the status, and another supervisor was the parent.
        _ => "for an unknown reason".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::Signal;
    use nix::unistd::Pid;

    #[test]
    fn the_end_of_a_worker_is_told_in_words() {
        let pid = Pid::from_raw(7);
        assert_eq!(exit_reason(Some(WaitStatus::Signaled(pid, Signal::SIGKILL, false))), "killed by SIGKILL");
        assert_eq!(exit_reason(Some(WaitStatus::Exited(pid, 1))), "exited with status 1");
        assert_eq!(exit_reason(None), "for an unknown reason");
    }

    #[test]
    fn a_worker_is_ready_after_its_message() {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        let pidfd = PidFd::open(std::process::id()).unwrap();
        let mut worker = WorkerProcess {
            pidfd,
            control: Some(ours),
            since: Instant::now(),
            is_ready: false,
            is_own: true,
        };
        assert!(worker.uptime().is_none() && worker.start_time().is_some());
        theirs.send(&Message::Ready { resends: true });
        assert_eq!(worker.receive(), Some(Message::Ready { resends: true }));
        assert!(worker.is_ready() && worker.uptime().is_some() && worker.start_time().is_none());
        drop(theirs);
        assert_eq!(worker.receive(), None);
        assert!(worker.control().is_none());
    }

    #[test]
    fn a_descriptor_that_is_not_of_a_process_is_not_a_worker() {
        let (ours, _theirs) = ControlSocket::pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(WorkerProcess::resume(PidFd::from_fd(null.into()), ours).is_none());
    }
}
