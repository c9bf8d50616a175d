//! The keeper: holds the mount's descriptor, so that the mount outlives whoever serves it.
//!
//! Owns: the present worker: starting it, noticing its death or that it hangs, and the end of both. Keeps no
//! state but the descriptors of `handover`, allocates nothing while nothing happens, and starts no thread.
//! Must not know: what is served, or anything in the state directory but its lock and the wish for an upgrade.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::WaitStatus;

use super::error::{MountError, at};
use super::fds::{self, Control, Held, Letter, Message};
use super::mount::{mount_device, new_mount_id};
use super::paths::Places;
use super::upgrade::{self, Proof};
use super::watchdog::Doubt;
use crate::failpoint;
use crate::journal::StateLock;
use crate::mountpoint;
use crate::process::{self, PidFd};

/// How long a worker may take until it serves.
const STARTING: Duration = Duration::from_secs(60);
/// A worker that dies within this time has died at once.
const AT_ONCE: Duration = Duration::from_millis(50);
/// Between workers that die at once, at first and at most.
const PAUSE: std::ops::RangeInclusive<Duration> = Duration::from_millis(5)..=Duration::from_secs(1);

/// The present worker.
#[derive(Debug)]
struct Worker {
    handle: PidFd,
    control: Option<Control>,
    started: Instant,
    is_ready: bool,
    /// Of the program that runs here, which one that was taken on may not be.
    is_ours: bool,
}

/// The keeper.
#[derive(Debug)]
pub(crate) struct Keeper {
    places: Places,
    held: Held,
    signals: SignalFd,
    /// Reports each change of the mount table: that is how umount(8) by hand is noticed while somebody still
    /// has files open.
    mounts: File,
    start: Command,
    worker: Option<Worker>,
    /// When the next worker is started.
    due: Option<Instant>,
    pause: Duration,
    doubt: Doubt,
    resends: bool,
    /// Whether there has been a worker that served.
    has_served: bool,
    /// Why the last worker could not serve.
    reason: Option<String>,
    upgrade: Upgrade,
}

/// How far an upgrade is.
#[derive(Debug)]
enum Upgrade {
    No,
    /// It is to be begun.
    Wanted,
    /// The new program reads the state.
    Proving(Proof),
    /// We are the new program; its worker does not serve yet.
    Begun,
}

/// How the keeping ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The mount is to go.
    Stop,
    /// We are to go and the mount is to stay: somebody else holds the descriptor.
    Leave,
}

impl Keeper {
    /// Holds what is held, under the numbers at which workers find it.
    ///
    /// # Errors
    /// No descriptors are left, or the mount table cannot be read.
    pub(crate) fn new(places: Places, held: Held, signals: SignalFd) -> Result<Self, MountError> {
        let failed = |source| at(&places.conf_dir, "cannot be kept", source);
        let held = Held {
            device: fds::place(held.device, fds::DEVICE).map_err(failed)?,
            letters: held.letters.place().map_err(failed)?,
            lock: fds::place(held.lock.into_fd(), fds::LOCK).map(StateLock::from_fd).map_err(failed)?,
        };
        held.lock.write_pid();
        let mut start = places.command(Command::new("/proc/self/exe"));
        start.arg("--worker").stdin(Stdio::null()).stdout(Stdio::null());
        for variable in ["NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
            start.env_remove(variable);
        }
        let mounts = File::open("/proc/self/mountinfo").map_err(failed)?;
        Ok(Self {
            places,
            held,
            signals,
            mounts,
            start,
            worker: None,
            due: Some(Instant::now()),
            pause: Duration::ZERO,
            doubt: Doubt::none(),
            resends: false,
            has_served: false,
            reason: None,
            upgrade: Upgrade::No,
        })
    }

    /// Workers write to this log, or to nowhere.
    pub(crate) fn log_workers_to(&mut self, log: Option<&File>) {
        let log = log.and_then(|log| log.try_clone().ok());
        self.start.stderr(log.map_or_else(Stdio::null, Stdio::from));
    }

    /// Goes on where another keeper was cut off, with the worker that it had, if it had one.
    ///
    /// # Errors
    /// What the other one has left cannot be read.
    pub(crate) fn adopt(&mut self, handle: PidFd, control: Control) -> io::Result<()> {
        self.resends = self.held.letters.read()?.resends();
        self.has_served = true;
        if handle.is_of_process() {
            let (control, started) = (Some(control), Instant::now());
            self.worker = Some(Worker { handle, control, started, is_ready: true, is_ours: false });
            self.due = None;
        }
        Ok(())
    }

    /// This is a new program, and the worker is to be one of it, too.
    pub(crate) fn finish_upgrade(&mut self) {
        self.upgrade = Upgrade::Begun;
        self.replace_worker();
    }

    /// Kills the present worker, so that the next one takes its place.
    fn replace_worker(&self) {
        if let Some(worker) = &self.worker {
            worker.handle.kill();
        }
    }

    /// The open device, for whoever else is to hold it.
    pub(crate) fn held(&self) -> &Held {
        &self.held
    }

    /// Keeps the mount served until it is to end. `ready` is told when it is served for the first time.
    ///
    /// # Errors
    /// The first worker could not serve.
    pub(crate) fn keep(&mut self, ready: impl FnOnce(&Self)) -> Result<End, MountError> {
        let mut ready = Some(ready);
        if self.has_served
            && let Some(ready) = ready.take()
        {
            ready(self);
        }
        loop {
            if self.due.is_some_and(|due| due <= Instant::now()) {
                self.due = None;
                if let Err(error) = self.start_worker() {
                    log::error!("no worker can be started: {error}");
                    self.start_later();
                }
            }
            let [signal, table, message, death, answer, proof] = self.wait();
            if signal && let Some(end) = self.obey() {
                return Ok(end);
            }
            if let Err(error) = self.upgrade(proof) {
                self.upgrade = Upgrade::No;
                log::error!("not upgraded: {error}");
                upgrade::report(&self.places.state_dir, Some(&error.to_string()));
            }
            if table && !mountpoint::is_mounted(&self.places.conf_dir).unwrap_or(true) {
                return Ok(End::Stop);
            }
            if message && self.listen() {
                return Ok(End::Stop);
            }
            if self.has_served
                && let Some(ready) = ready.take()
            {
                ready(self);
            }
            if answer {
                self.doubt.end();
            }
            if death && let Some(end) = self.bury()? {
                return Ok(end);
            }
            self.look();
        }
    }

    /// Ends the worker; the mount has been detached.
    pub(crate) fn end_worker(&mut self) {
        self.doubt.end();
        let Some(worker) = self.worker.take() else { return };
        // It has nothing to tidy: what it knows is in the state directory.
        worker.handle.kill();
        worker.handle.wait(fds::ENDING);
    }

    fn start_worker(&mut self) -> io::Result<()> {
        let (ours, its) = Control::pair()?;
        let control = its.place()?;
        let spawned = self.start.spawn();
        drop(control);
        fds::reserve(fds::CONTROL)?;
        let mut child = spawned?;
        let handle = PidFd::open(child.id()).inspect_err(|_| {
            // One that is not watched must not serve.
            let _ = child.kill().and_then(|()| child.wait());
        })?;
        let (control, started) = (Some(ours), Instant::now());
        self.worker = Some(Worker { handle, control, started, is_ready: false, is_ours: true });
        failpoint::disarm(&mut self.start);
        Ok(())
    }

    fn start_later(&mut self) {
        self.pause = (self.pause * 2).clamp(*PAUSE.start(), *PAUSE.end());
        self.due = Some(Instant::now() + self.pause);
    }

    /// Waits until something happens: a signal, a change of the mount table, a message, a death, an answer to
    /// our question, the end of a proof; or until it is time for something.
    fn wait(&self) -> [bool; 6] {
        let worker = self.worker.as_ref();
        let control = worker.and_then(|worker| worker.control.as_ref());
        let question = self.doubt.question();
        let proof = match &self.upgrade {
            Upgrade::Proving(proof) => Some(proof),
            _ => None,
        };
        // Where there is nothing to be waited for, the signals stand in.
        let signals = self.signals.as_fd();
        let mut fds = [
            PollFd::new(signals, PollFlags::POLLIN),
            PollFd::new(self.mounts.as_fd(), PollFlags::POLLPRI),
            PollFd::new(control.map_or(signals, AsFd::as_fd), PollFlags::POLLIN),
            PollFd::new(worker.map_or(signals, |worker| worker.handle.as_fd()), PollFlags::POLLIN),
            PollFd::new(question.unwrap_or(signals), PollFlags::POLLIN),
            PollFd::new(proof.map_or(signals, AsFd::as_fd), PollFlags::POLLIN),
        ];
        let others = self.due.into_iter().chain(proof.map(|proof| proof.deadline));
        let next = others.fold(self.doubt.due(), Instant::min);
        // Rounded up, so as not to come a moment too early and turn round.
        let left = next.saturating_duration_since(Instant::now()).as_millis() + 1;
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(1..) => {
                let [signal, table, message, death, answer, proved] = fds.map(|fd| fd.any().unwrap_or(false));
                let (message, death) = (message && control.is_some(), death && worker.is_some());
                [signal, table, message, death, answer && question.is_some(), proved && proof.is_some()]
            }
            _ => [false; 6],
        }
    }

    fn obey(&mut self) -> Option<End> {
        let info = self.signals.read_signal().ok().flatten()?;
        match Signal::try_from(info.ssi_signo as i32) {
            Ok(Signal::SIGTERM | Signal::SIGINT) => Some(End::Stop),
            Ok(Signal::SIGUSR1) => Some(End::Leave),
            Ok(Signal::SIGHUP) => {
                self.upgrade = Upgrade::Wanted;
                None
            }
            _ => None,
        }
    }

    /// Takes a message of the worker. Whether the mount is to end.
    fn listen(&mut self) -> bool {
        let Some(worker) = &mut self.worker else { return false };
        match worker.control.as_ref().and_then(Control::receive) {
            Some(Message::Ready { resends }) => {
                worker.is_ready = true;
                worker.started = Instant::now();
                self.resends = resends;
                self.has_served = true;
                if matches!(self.upgrade, Upgrade::Begun) && worker.is_ours {
                    self.upgrade = Upgrade::No;
                    upgrade::report(&self.places.state_dir, None);
                }
            }
            Some(Message::Failed(reason)) => {
                log::debug!("the worker cannot serve: {reason}");
                self.reason = Some(reason);
            }
            Some(Message::Stop) => return true,
            // Its death is told elsewhere.
            None => worker.control = None,
        }
        false
    }

    /// The worker has died: the next one is due.
    fn bury(&mut self) -> Result<Option<End>, MountError> {
        let Some(worker) = self.worker.take() else { return Ok(None) };
        // What it said before it died.
        if let Some(Message::Failed(reason)) = worker.control.as_ref().and_then(Control::receive) {
            self.reason = Some(reason);
        }
        let status = worker.handle.collect();
        // Probes that have outlived their question.
        process::collect_children();
        if !mountpoint::is_mounted(&self.places.conf_dir).unwrap_or(true) {
            return Ok(Some(End::Stop));
        }
        let reason = self.reason.take();
        if !self.has_served {
            let reason = reason.unwrap_or_else(|| format!("the worker has died: {}", told(status)));
            return Err(MountError::Start(reason));
        }
        let how = reason.clone().unwrap_or_else(|| told(status));
        log::warn!("the worker has died: {how}; the next one is started");
        if let (Some(reason), Upgrade::Begun, true) = (&reason, &self.upgrade, worker.is_ours) {
            upgrade::report(&self.places.state_dir, Some(reason));
        }
        if worker.is_ready && worker.started.elapsed() > AT_ONCE {
            self.pause = Duration::ZERO;
            self.due = Some(Instant::now());
        } else {
            self.start_later();
        }
        if !self.resends {
            self.mount_anew()?;
        }
        Ok(None)
    }

    /// Before 6.9 the kernel does not send requests again: those that were in hand would hang for ever.
    fn mount_anew(&mut self) -> Result<(), MountError> {
        log::warn!(
            "{}: this kernel (before 6.9) cannot go on with the mount; it is made anew",
            self.places.conf_dir.display()
        );
        let failed = |source| at(&self.places.conf_dir, "cannot be mounted anew", source);
        let letter = self.held.letters.read().map_err(failed)?;
        // The old connection ends with its descriptor, which the new one replaces.
        let _ = umount2(&self.places.conf_dir, MntFlags::MNT_DETACH);
        let device = mount_device(&self.places.conf_dir)?;
        process::replace_fd(device.as_fd(), self.held.device.as_fd()).map_err(failed)?;
        let letter = Letter { mount: new_mount_id(), init: None, ..letter };
        self.held.letters.write(&letter).map_err(failed)
    }

    /// Looks, where it is time to, whether the worker still serves.
    fn look(&mut self) {
        if self.doubt.due() > Instant::now() {
            return;
        }
        let Some(worker) = self.worker.as_ref().filter(|worker| worker.is_ready) else {
            self.doubt.end();
            if self.worker.as_ref().is_some_and(|worker| worker.started.elapsed() > STARTING) {
                log::error!("the worker does not begin to serve; it is replaced");
                self.replace_worker();
            }
            return;
        };
        let is_suspect = self.leaves_requests_lying() || worker.handle.is_stopped();
        if self.doubt.go_on(is_suspect, &self.places) {
            log::error!("the worker does not answer; it is replaced");
            self.replace_worker();
        }
    }

    /// Whether requests lie there that nobody has read.
    fn leaves_requests_lying(&self) -> bool {
        let mut fds = [PollFd::new(self.held.device.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
    }

    /// Goes on with an upgrade, if there is one to go on with. `proved`: the new program has ended.
    fn upgrade(&mut self, proved: bool) -> io::Result<()> {
        self.upgrade = match std::mem::replace(&mut self.upgrade, Upgrade::No) {
            Upgrade::Wanted => Upgrade::Proving(Proof::begin(&self.places)?),
            Upgrade::Proving(proof) if proved || proof.deadline <= Instant::now() => {
                // Comes back only where it fails.
                return Err(self.become_program(&proof.end()?));
            }
            other => other,
        };
        Ok(())
    }

    /// Becomes the keeper of the program, which goes on with what is held.
    fn become_program(&self, program: &Path) -> io::Error {
        let prepare = || {
            // Where there is no worker just now, the new keeper starts one.
            if let Some(worker) = &self.worker {
                let pidfd = worker.handle.as_fd().try_clone_to_owned()?;
                fds::leave(fds::place(pidfd, fds::WORKER)?);
                if let Some(control) = &worker.control {
                    let control = control.as_fd().try_clone_to_owned()?;
                    fds::leave(fds::place(control, fds::CONTROL)?);
                }
            }
            Ok(())
        };
        let error = prepare().err().unwrap_or_else(|| {
            log::info!("upgrading to {}", program.display());
            self.places.command(Command::new(program)).args(["--adopt", "--replace"]).exec()
        });
        for number in [fds::WORKER, fds::CONTROL] {
            if let Err(error) = fds::reserve(number) {
                log::error!("no descriptor: {error}");
            }
        }
        error
    }
}

/// How a worker ended, in words.
fn told(status: Option<WaitStatus>) -> String {
    match status {
        Some(WaitStatus::Signaled(_, signal, _)) => format!("killed by {signal}"),
        Some(WaitStatus::Exited(_, code)) => format!("ended with status {code}"),
        _ => "in a way that only its parent was told".into(),
    }
}
