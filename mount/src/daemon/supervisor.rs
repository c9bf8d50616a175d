//! The supervisor: keeps the mount open and restarts the worker.
//!
//! Owns the present worker: starting it, noticing that it exits or hangs, and stopping it. Holds nothing but the
//! descriptors of `fds`, allocates nothing while nothing happens, and starts no thread. Does not know what is served;
//! from the state directory it uses only the lock and the upgrade request.
//!
//! Its duties:
//! - a worker that exits is followed by the next one, after a delay if it failed at once;
//! - a worker that hangs is killed (`watchdog`);
//! - a signal or an unmount ends the mount;
//! - SIGHUP replaces the program (`upgrade`), SIGUSR1 leaves the mount to the holder of a copy of its descriptors;
//! - before Linux 6.9, the directory is mounted again after a worker has died;
//! - a connection that was aborted is replaced: the directory is mounted again, but not twice within [`ABORT_INTERVAL`].
//!
//! Longer than 400 lines because it is one loop, and its events and their handlers are read together.

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

use super::backoff::RestartBackoff;
use super::error::{MountError, io_error};
use super::fds::{self, ControlSocket, HandoffState, InheritedFds, Message};
use super::identity;
use super::mount::{self, new_mount_id};
use super::paths::{MountPaths, THIS_PROGRAM};
use super::role::Role;
use super::systemd;
use super::upgrade::{self, Preflight, Stage, Step};
use super::watchdog::{Probe, Verdict, Watchdog};
use super::worker_process::WorkerProcess;
use crate::failpoint;
use crate::mountpoint::{self, Mounted};
use crate::process::{self, PidFd};

/// How long a worker may take until it serves: it reads the whole state directory.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a killed worker may take to exit: the kernel first ends its system calls.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that is aborted again within this time is not replaced: whatever aborts it would do so again, and each time
/// the clients of open files get an error.
const ABORT_INTERVAL: Duration = Duration::from_secs(60);
/// The environment variables of the service manager, which are meant for one process only (sd_notify(3)).
const SERVICE_VARIABLES: [&str; 4] = ["NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// The supervisor.
#[derive(Debug)]
pub(super) struct Supervisor {
    paths: MountPaths,
    fds: InheritedFds,
    signals: SignalFd,
    /// The mount that is served, in this mount namespace.
    mounted: Option<Mounted>,
    /// Reports each change of the mount table, so that umount(8) is noticed even if files are still open.
    mounts: File,
    worker_command: Command,
    worker: Option<WorkerProcess>,
    /// When the next worker is started.
    next_start: Option<Instant>,
    backoff: RestartBackoff,
    watchdog: Watchdog,
    probe: Option<Probe>,
    /// Whether the kernel sends unanswered requests to the next worker.
    resends: bool,
    /// Whether there has been a worker that served.
    has_served: bool,
    /// Why the present worker cannot serve.
    failure: Option<String>,
    stage: Stage,
    preflight: Option<Preflight>,
    /// When a connection that was aborted was replaced last.
    last_abort: Option<Instant>,
}

/// Why the supervisor stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// The mount ends.
    Stop,
    /// The mount ends, and what it has stored is of no more use.
    Unused,
    /// The mount stays, because another process has its descriptors.
    Detach,
}

/// The events that [`Supervisor::wait`] reports.
#[derive(Clone, Copy, Debug, Default)]
struct Events {
    signal: bool,
    mount_table: bool,
    message: bool,
    worker_exit: bool,
    probe_exit: bool,
    preflight_exit: bool,
}

impl Supervisor {
    /// Puts the descriptors where workers inherit them. Starts no worker yet.
    ///
    /// # Errors
    /// No descriptors are left, or the mount table cannot be read.
    pub(super) fn new(paths: MountPaths, fds: InheritedFds, signals: SignalFd) -> Result<Self, MountError> {
        let failed = |source| io_error(&paths.conf_dir, "cannot be supervised", source);
        let fds = fds.install().map_err(failed)?;
        fds.lock.write_pid();
        let mut worker_command = paths.role_command(Path::new(THIS_PROGRAM), Role::Worker);
        worker_command.stdin(Stdio::null()).stdout(Stdio::null());
        for variable in SERVICE_VARIABLES {
            worker_command.env_remove(variable);
        }
        let mounts = File::open("/proc/self/mountinfo").map_err(failed)?;
        let connection = identity::connection_of(&fds.device);
        let mounted = mountpoint::at(&paths.conf_dir, connection).map_err(failed)?;
        let now = Instant::now();
        Ok(Self {
            paths,
            fds,
            signals,
            mounted,
            mounts,
            worker_command,
            worker: None,
            next_start: Some(now),
            backoff: RestartBackoff::default(),
            watchdog: Watchdog::new(now),
            probe: None,
            resends: false,
            has_served: false,
            failure: None,
            stage: Stage::Idle,
            preflight: None,
            last_abort: None,
        })
    }

    /// Makes workers write their messages to this log, or to nowhere.
    pub(super) fn log_workers_to(&mut self, log: Option<&File>) {
        let log = log.and_then(|log| log.try_clone().ok());
        self.worker_command.stderr(log.map_or_else(Stdio::null, Stdio::from));
    }

    /// Continues for another supervisor, with its worker if that lives.
    ///
    /// # Errors
    /// The handoff state cannot be read.
    pub(super) fn resume(&mut self, worker: PidFd, control: ControlSocket) -> io::Result<()> {
        self.resends = self.fds.handoff.read()?.resends();
        self.has_served = true;
        self.worker = WorkerProcess::resume(worker, control);
        if self.worker.is_some() {
            self.next_start = None;
        }
        Ok(())
    }

    /// Continues an upgrade in the new program: replaces the worker of the old program.
    pub(super) fn finish_upgrade(&mut self) {
        log::debug!("upgrade: the new program supervises; replacing the worker");
        self.stage = Stage::AwaitingWorker;
        self.kill_worker();
    }

    /// Kills the present worker; the next one is started when it has exited.
    fn kill_worker(&self) {
        if let Some(worker) = &self.worker {
            worker.kill();
        }
    }

    /// Tells the service manager that the mount is served.
    pub(super) fn notify_ready(&self) {
        systemd::notify_ready(&self.fds, self.resends);
    }

    /// Supervises until the mount ends. Calls `ready` when the mount is served for the first time.
    ///
    /// # Errors
    /// The first worker cannot serve, or the directory cannot be mounted again.
    pub(super) fn run(&mut self, ready: impl FnOnce(&Self)) -> Result<Exit, MountError> {
        let mut ready = Some(ready);
        let mut report_ready = |supervisor: &Self| {
            if supervisor.has_served
                && let Some(ready) = ready.take()
            {
                ready(supervisor);
            }
        };
        report_ready(self);
        loop {
            if self.next_start.is_some_and(|start| start <= Instant::now()) {
                self.next_start = None;
                if let Err(error) = self.start_worker() {
                    log::error!("no worker can be started: {error}");
                    self.schedule_start(None);
                }
            }
            let events = self.wait();
            if events.signal
                && let Some(exit) = self.handle_signal()
            {
                return Ok(exit);
            }
            if let Err(error) = self.advance_upgrade(events.preflight_exit) {
                log::error!("not upgraded: {error}");
                upgrade::report(&self.paths.state_dir, Some(&error.to_string()));
            }
            if events.mount_table && !self.is_mounted() {
                return Ok(Exit::Stop);
            }
            if events.message
                && let Some(exit) = self.handle_message()
            {
                return Ok(exit);
            }
            report_ready(self);
            if events.probe_exit {
                log::debug!("watchdog: the probe was answered");
                self.end_probe();
            }
            if events.worker_exit
                && let Some(exit) = self.on_worker_exit()?
            {
                return Ok(exit);
            }
            self.check_health();
        }
    }

    /// Ends the worker after the directory was unmounted.
    pub(super) fn stop_worker(&mut self) {
        self.end_probe();
        if let Some(worker) = self.worker.take() {
            // Killed, because it has nothing to clean up: what it knows is in the state directory.
            worker.stop(STOP_TIMEOUT);
        }
    }

    /// Whether the mount still exists, whatever is mounted over it; if that is unknown, it does.
    pub(super) fn is_mounted(&self) -> bool {
        self.mounted.is_some_and(|mounted| mounted.exists().unwrap_or(true))
    }

    /// Detaches the mount, and does not wait for open files: they get `ENOTCONN` from now on. A mount of somebody else
    /// at the same path stays.
    pub(super) fn detach(&self) {
        self.unmount(MntFlags::MNT_DETACH);
    }

    fn unmount(&self, flags: MntFlags) {
        let conf_dir = &self.paths.conf_dir;
        if mountpoint::topmost(conf_dir).is_ok_and(|topmost| topmost == self.mounted) {
            let _ = umount2(conf_dir, flags);
        } else if self.is_mounted() {
            log::warn!("{}: something is mounted over it; unmount both", conf_dir.display());
        }
    }

    fn start_worker(&mut self) -> io::Result<()> {
        self.worker = Some(WorkerProcess::start(&mut self.worker_command)?);
        failpoint::disarm(&mut self.worker_command);
        Ok(())
    }

    /// Schedules the next worker. `uptime`: for how long the last one served, if it did.
    fn schedule_start(&mut self, uptime: Option<Duration>) {
        let delay = self.backoff.next_delay(uptime);
        log::debug!("the next worker starts in {} ms; the last one served for {uptime:?}", delay.as_millis());
        self.next_start = Some(Instant::now() + delay);
    }

    /// Waits until something has happened, or until a deadline.
    fn wait(&self) -> Events {
        let worker = self.worker.as_ref();
        let control = worker.and_then(WorkerProcess::control);
        let (probe, preflight) = (self.probe.as_ref(), self.preflight.as_ref());
        // The signals stand in for a descriptor that does not exist.
        let signals = self.signals.as_fd();
        let mut fds = [
            PollFd::new(signals, PollFlags::POLLIN),
            PollFd::new(self.mounts.as_fd(), PollFlags::POLLPRI),
            PollFd::new(control.map_or(signals, AsFd::as_fd), PollFlags::POLLIN),
            PollFd::new(worker.map_or(signals, AsFd::as_fd), PollFlags::POLLIN),
            PollFd::new(probe.map_or(signals, AsFd::as_fd), PollFlags::POLLIN),
            PollFd::new(preflight.map_or(signals, AsFd::as_fd), PollFlags::POLLIN),
        ];
        let deadlines = self.next_start.into_iter().chain(self.stage.deadline());
        let next = deadlines.fold(self.watchdog.deadline(), Instant::min);
        // Rounded up: waking up a moment too early would only wait again.
        let left = next.saturating_duration_since(Instant::now()).as_millis() + 1;
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if !matches!(poll(&mut fds, timeout), Ok(1..)) {
            return Events::default();
        }
        let [signal, mount_table, message, worker_exit, probe_exit, preflight_exit] =
            fds.map(|fd| fd.any().unwrap_or(false));
        Events {
            signal,
            mount_table,
            message: message && control.is_some(),
            worker_exit: worker_exit && worker.is_some(),
            probe_exit: probe_exit && probe.is_some(),
            preflight_exit: preflight_exit && preflight.is_some(),
        }
    }

    fn handle_signal(&mut self) -> Option<Exit> {
        let info = self.signals.read_signal().ok().flatten()?;
        let signal = Signal::try_from(info.ssi_signo as i32).ok()?;
        log::debug!("{signal} from PID {}", info.ssi_pid);
        match signal {
            Signal::SIGTERM | Signal::SIGINT => Some(Exit::Stop),
            Signal::SIGUSR1 => Some(Exit::Detach),
            Signal::SIGHUP => {
                self.preflight = None;
                self.stage = Stage::Requested;
                None
            }
            _ => None,
        }
    }

    /// Receives a message of the worker.
    fn handle_message(&mut self) -> Option<Exit> {
        let worker = self.worker.as_mut()?;
        match worker.receive() {
            Some(Message::Ready { resends }) => {
                self.resends = resends;
                self.has_served = true;
                if worker.is_own() && self.stage.complete() {
                    log::debug!("upgrade: complete");
                    upgrade::report(&self.paths.state_dir, None);
                }
            }
            Some(Message::Failed(reason)) => {
                log::debug!("the worker cannot serve: {reason}");
                self.failure = Some(reason);
            }
            Some(Message::Stop) => return Some(Exit::Stop),
            Some(Message::Unused) => return Some(Exit::Unused),
            // Its exit is a separate event.
            None => {}
        }
        None
    }

    /// Schedules the next worker after the present one has exited.
    fn on_worker_exit(&mut self) -> Result<Option<Exit>, MountError> {
        let Some(mut worker) = self.worker.take() else { return Ok(None) };
        // It may have sent a reason before it exited.
        if let Some(Message::Failed(reason)) = worker.receive() {
            self.failure = Some(reason);
        }
        let (uptime, is_own) = (worker.uptime(), worker.is_own());
        let exit_reason = worker.collect();
        // Also collects probes that were killed before they had exited, but not a preflight, whose status is needed and
        // whose PID must not be reused.
        if self.preflight.is_none() {
            process::collect_children();
        }
        if !self.is_mounted() {
            return Ok(Some(Exit::Stop));
        }
        let failure = self.failure.take();
        if !self.has_served {
            let reason = failure.unwrap_or_else(|| format!("the worker has died: {exit_reason}"));
            return Err(MountError::Start(reason));
        }
        if let (Some(failure), Stage::AwaitingWorker, true) = (&failure, self.stage, is_own) {
            upgrade::report(&self.paths.state_dir, Some(failure));
        }
        if !mount::is_connected(&self.fds.device) {
            // The kernel may have given the numbers of an ended mount to a new one, but that is at another path.
            let at_path = mountpoint::at(&self.paths.conf_dir, None).unwrap_or(self.mounted);
            if at_path != self.mounted {
                return Ok(Some(Exit::Stop));
            }
            self.replace_aborted()?;
            return Ok(None);
        }
        match failure {
            None if self.stage == Stage::AwaitingWorker && !is_own => {
                log::info!("the worker of the program before has ended; the next one is started");
            }
            failure => {
                let reason = failure.unwrap_or(exit_reason);
                log::warn!("the worker has died: {reason}; the next one is started");
            }
        }
        self.schedule_start(uptime);
        if !self.resends {
            self.remount("this kernel (before 6.9) cannot continue the mount")?;
        }
        Ok(None)
    }

    /// Mounts the directory again after its connection was aborted, and starts a worker for it.
    ///
    /// # Errors
    /// [`MountError::Aborted`]: it happened a short time ago already. The mount is detached then, because it can never
    /// answer.
    fn replace_aborted(&mut self) -> Result<(), MountError> {
        let now = Instant::now();
        let last = self.last_abort.replace(now);
        if last.is_some_and(|last| now.duration_since(last) < ABORT_INTERVAL) {
            self.detach();
            return Err(MountError::Aborted(self.paths.conf_dir.clone()));
        }
        self.remount(
            "the FUSE connection was aborted, by an administrator or by a request timeout of fs.fuse",
        )?;
        self.next_start = Some(now);
        Ok(())
    }

    /// Mounts the directory again, for this reason. Before 6.9 the kernel does not send requests again, so that the
    /// clients whose requests were in flight would wait without end; they get `ENOTCONN` or `ECONNABORTED` instead.
    fn remount(&mut self, why: &str) -> Result<(), MountError> {
        log::warn!("{}: {why}; mounting again", self.paths.conf_dir.display());
        let failed = |source| io_error(&self.paths.conf_dir, "cannot be mounted again", source);
        let state = self.fds.handoff.read().map_err(failed)?;
        // The connection is aborted, because another process may have its device open too, such as the service manager.
        let end = MntFlags::MNT_FORCE | MntFlags::MNT_DETACH;
        let conf_dir = &self.paths.conf_dir;
        let device = if mountpoint::topmost(conf_dir).map_err(failed)? == self.mounted {
            mount::replace_mount(conf_dir, || {
                // It may have been unmounted meanwhile.
                let _ = umount2(conf_dir, end);
            })?
        } else {
            self.unmount(end);
            mount::mount_device(&mount::MountPoint::open(conf_dir)?)?
        };
        let connection = identity::connection_of(&device);
        self.mounted = mountpoint::at(&self.paths.conf_dir, connection).map_err(failed)?;
        process::replace_fd(device.as_fd(), self.fds.device.as_fd()).map_err(failed)?;
        self.notify_ready();
        let state = HandoffState { mount_id: new_mount_id(), init: None, ..state };
        self.fds.handoff.write(&state).map_err(failed)
    }

    /// Checks, when it is time, whether the worker serves, and replaces it if it does not.
    fn check_health(&mut self) {
        let now = Instant::now();
        if self.watchdog.deadline() > now {
            return;
        }
        let Some(worker) = self.worker.as_ref().filter(|worker| worker.is_ready()) else {
            self.end_probe();
            let start_time = self.worker.as_ref().and_then(WorkerProcess::start_time);
            if start_time.is_some_and(|time| time > START_TIMEOUT) {
                log::error!("the worker does not begin to serve; it is replaced");
                self.kill_worker();
            }
            return;
        };
        let is_suspicious = self.has_unread_requests() || worker.is_stopped();
        let probe_runs = self.probe.as_ref().is_some_and(Probe::is_runnable);
        match self.watchdog.poll(now, is_suspicious, worker.reads(), probe_runs) {
            Verdict::Fine => {}
            Verdict::StartProbe => match Probe::start(&self.paths) {
                Ok(probe) => {
                    log::debug!("watchdog: requests are unread; probing the mount");
                    self.probe = Some(probe);
                }
                Err(error) => {
                    log::warn!("the mount cannot be probed: {error}");
                    self.watchdog.reset(now);
                }
            },
            Verdict::Hangs => {
                log::error!("the worker does not answer; it is replaced");
                self.kill_worker();
            }
        }
    }

    fn end_probe(&mut self) {
        self.probe = None;
        self.watchdog.reset(Instant::now());
    }

    /// Whether the kernel has requests that no worker has read.
    fn has_unread_requests(&self) -> bool {
        let mut fds = [PollFd::new(self.fds.device.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
    }

    /// Takes the next step of an upgrade.
    fn advance_upgrade(&mut self, preflight_exited: bool) -> io::Result<()> {
        match self.stage.advance(Instant::now(), preflight_exited) {
            Step::Wait => Ok(()),
            Step::StartPreflight => {
                let preflight = Preflight::start(&self.paths).inspect_err(|_| self.stage = Stage::Idle)?;
                self.preflight = Some(preflight);
                Ok(())
            }
            Step::Execute => match self.preflight.take() {
                // Returns only if it fails.
                Some(preflight) => Err(self.execute(&preflight.finish()?)),
                None => Ok(()),
            },
        }
    }

    /// Becomes the supervisor of another program, which continues with the same descriptors.
    fn execute(&self, program: &Path) -> io::Error {
        // Without a worker, the new supervisor starts one.
        let prepared = self.worker.as_ref().map_or(Ok(()), WorkerProcess::leave);
        let error = prepared.err().unwrap_or_else(|| {
            log::info!("upgrading to {}", program.display());
            let mut command = self.paths.role_command(program, Role::Supervisor { replace_worker: true });
            // The service manager's descriptors have been taken.
            command.env_remove("LISTEN_PID").env_remove("LISTEN_FDS").env_remove("LISTEN_FDNAMES").exec()
        });
        for number in [fds::WORKER, fds::CONTROL] {
            if let Err(error) = fds::reserve_fd(number) {
                log::error!("no descriptor: {error}");
            }
        }
        error
    }
}
