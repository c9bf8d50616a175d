//! The program is replaced under a mount that keeps working; a program that cannot take over is refused; a service
//! manager that stores the descriptors keeps the mount even if all processes die.
//!
//! Longer than 400 lines because it is a list of independent tests with one set-up.

use std::fs::{self, File, OpenOptions};
use std::io::{IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::harness::{KCM, Mount, Sleeper, errno, masks, run, signal, text, until, write};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// Copies kcm to this path.
fn copy_kcm(to: &Path) {
    // In another process, so that no child of the test inherits it open for writing.
    assert!(Command::new("cp").args(["--remove-destination", KCM]).arg(to).status().unwrap().success());
}

fn script(path: &Path, line: &str) {
    let write = format!("printf '#!/bin/sh\n{line}\n' > \"$0\" && chmod 755 \"$0\"");
    assert!(Command::new("bash").args(["-c", &write]).arg(path).status().unwrap().success());
}

/// The program that a process runs.
fn program(pid: u32) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/exe")).expect("a process")
}

fn upgrade_with(program: &Path, mount: &Mount) -> (String, Option<i32>) {
    let mut command = Command::new(program);
    command.args(["mount", "--upgrade", "--conf-dir"]).arg(mount.conf());
    let (_, err, status) = run(command.arg("--state-dir").arg(mount.state()));
    (err, status)
}

/// Clients that work all the time while `work` runs.
fn under_load(mount: &Mount, work: impl FnOnce()) {
    let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for list in ["0", "1"] {
            let (stop, done) = (&stop, &done);
            scope.spawn(move || {
                let task = Sleeper::new();
                let open = OpenOptions::new().write(true).open(mount.tasks("shared", list)).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    (&open).write_all(task.pid().to_string().as_bytes()).expect("claim");
                    assert_eq!(masks(task.pid()), [list]);
                    write(&mount.tasks("shared", list), format!("-{}", task.pid())).expect("release");
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        until("all clients are working", || done.load(Ordering::Relaxed) > 10);
        work();
        let before = done.load(Ordering::Relaxed);
        until("all clients work", || done.load(Ordering::Relaxed) > before + 10);
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn kcm_mount_upgrade_replaces_the_program() {
    let mount = Mount::with_shared();
    let (device, supervisor) = (fs::metadata(mount.conf()).unwrap().dev(), mount.supervisor());
    let (first, second) = (mount.home().join("kcm-1"), mount.home().join("kcm-2"));
    copy_kcm(&first);
    copy_kcm(&second);
    under_load(&mount, || {
        for new in [&first, &second, &first] {
            let worker = mount.worker().unwrap();
            assert_eq!(upgrade_with(new, &mount), (String::new(), Some(0)));
            assert_eq!(mount.supervisor(), supervisor, "the supervisor keeps its PID");
            assert_eq!(program(supervisor), *new);
            let new_worker = mount.worker().unwrap();
            assert_ne!(new_worker, worker);
            assert_eq!(program(new_worker), *new);
        }
    });
    assert_eq!(fs::metadata(mount.conf()).unwrap().dev(), device);
    assert_eq!(children_that_ended(supervisor), 0, "there is no zombie");
    // The result is an ordinary daemon.
    mount.replace_worker();
    signal(supervisor, Signal::SIGKILL);
    until("there is a new supervisor", || mount.supervisor() != supervisor);
    mount.stop();
    assert!(!mount.state().join("upgrade").exists());
}

/// How many zombies a process has.
fn children_that_ended(parent: u32) -> usize {
    let is_one = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(&format!("Z {parent} ")))
    };
    crate::harness::pids().iter().filter(|pid| is_one(pid)).count()
}

#[test]
fn sighup_starts_the_program_of_that_name() {
    let home = Mount::not_mounted();
    let kcm = home.home().join("kcm");
    copy_kcm(&kcm);
    let start = Command::new(&kcm)
        .args(["mount", "--conf-dir"])
        .arg(home.conf())
        .arg("--state-dir")
        .arg(home.state())
        .status();
    assert!(start.unwrap().success());
    let (supervisor, worker) = (home.supervisor(), home.worker().unwrap());
    home.make_pool("shared", false, &["0", "1"]);
    let before = fs::metadata(&kcm).unwrap().ino();
    under_load(&home, || {
        // In its place, as a package manager does it.
        let new = home.home().join("kcm.new");
        copy_kcm(&new);
        fs::rename(&new, &kcm).unwrap();
        signal(supervisor, Signal::SIGHUP);
        until("the new program serves", || {
            home.worker().is_some_and(|now| now != worker)
                && [Some(supervisor), home.worker()]
                    .into_iter()
                    .flatten()
                    .all(|pid| fs::metadata(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ino() != before))
        });
    });
    assert_eq!(home.supervisor(), supervisor);
}

/// Programs before `kcm __daemon` started the new program with flags of `kcm mount`. This script translates the words of
/// today into those flags, so that the program gets exactly the command lines of an old supervisor.
#[test]
fn an_old_supervisor_upgrades_to_this_program() {
    let mount = Mount::with_shared();
    let (supervisor, worker) = (mount.supervisor(), mount.worker().unwrap());
    let (old, request) = (mount.home().join("old"), mount.state().join("upgrade"));
    let flags =
        format!("--foreground --conf-dir={} --state-dir={}", mount.conf().display(), mount.state().display());
    script(
        &old,
        &format!(
            "case $2 in preflight) exec {KCM} mount {flags} --prove;; \
             supervisor) exec {KCM} mount {flags} --adopt --replace;; *) exit 3;; esac"
        ),
    );
    under_load(&mount, || {
        fs::write(&request, old.as_os_str().as_bytes()).unwrap();
        signal(supervisor, Signal::SIGHUP);
        until("the upgrade is complete", || !request.exists());
    });
    assert_eq!(mount.supervisor(), supervisor, "the supervisor keeps its PID");
    let words = fs::read(format!("/proc/{supervisor}/cmdline")).unwrap();
    assert!(words.split(|&b| b == 0).any(|word| word == b"--adopt"), "the old flags were used");
    assert_ne!(mount.worker(), Some(worker));
    mount.replace_worker();
    mount.stop();
}

#[test]
fn a_program_that_cannot_take_over_is_refused() {
    let mount = Mount::with_shared();
    let (supervisor, worker) = (mount.supervisor(), mount.worker());
    let bad = mount.home().join("bad");
    let wish = mount.state().join("upgrade");
    // The command does the same check; its own program can read the state.
    let wanted = |program: &Path| {
        fs::write(&wish, program.as_os_str().as_bytes()).unwrap();
        signal(supervisor, Signal::SIGHUP);
        let mut answer = String::new();
        until("the supervisor answers", || {
            answer = fs::read_to_string(&wish).expect("not upgraded");
            answer.starts_with("failed: ")
        });
        fs::remove_file(&wish).unwrap();
        answer
    };
    for (line, reason) in [
        ("echo ERROR:root:the moon is full >&2; exit 1", "the moon is full"),
        ("exit 0", "it exits without a reason"),
        ("kill -9 $$", "it exits without a reason"),
    ] {
        script(&bad, line);
        assert_eq!(wanted(&bad), format!("failed: {}: {reason}", bad.display()));
    }
    let missing = mount.home().join("missing");
    assert!(wanted(&missing).starts_with(&format!("failed: {}: No such file", missing.display())));
    assert_eq!((mount.supervisor(), mount.worker()), (supervisor, worker));
    mount.replace_worker();
    assert_eq!(program(mount.worker().unwrap()), program(supervisor));
}

#[test]
fn a_hanging_program_is_given_up() {
    let mount = Mount::with_shared();
    let (supervisor, wish) = (mount.supervisor(), mount.state().join("upgrade"));
    let [hung, left] = ["hung", "left"].map(|name| mount.home().join(name));
    // Its children still hold its pipes after it has been killed.
    script(&hung, &format!("sleep 1000 & echo $! > {}; wait", left.display()));
    fs::write(&wish, hung.as_os_str().as_bytes()).unwrap();
    signal(supervisor, Signal::SIGHUP);
    let answer = || fs::read_to_string(&wish).unwrap();
    until("it hangs", || fs::read_to_string(&left).is_ok_and(|pid| pid.ends_with('\n')));
    mount.replace_worker();
    assert_eq!(answer(), hung.to_str().unwrap(), "the worker was replaced before the program was given up");
    until("it is given up", || answer().starts_with("failed: "));
    assert_eq!(answer(), format!("failed: {}: it does not answer in time", hung.display()));
    signal(fs::read_to_string(&left).unwrap().trim().parse().unwrap(), Signal::SIGKILL);
    mount.replace_worker();
    assert_eq!(mount.supervisor(), supervisor);
}

#[test]
fn state_of_a_newer_version_is_not_taken_over() {
    let mount = Mount::with_shared();
    let (supervisor, worker) = (mount.supervisor(), mount.worker());
    let task = Sleeper::new();
    write(&mount.tasks("shared", "0"), task.pid().to_string()).unwrap();
    let config = mount.state().join("config");
    let old = fs::read(&config).unwrap();
    let first = r#"{"header":{"kcm":"config","version":99}}"#;
    fs::write(&config, format!("{:08x} {first}\n", crc32fast::hash(first.as_bytes()))).unwrap();
    let (err, status) = upgrade_with(Path::new(KCM), &mount);
    assert_eq!(status, Some(1));
    let reason = format!("ERROR:root:{}: written by a newer kcm (format 99", config.display());
    assert!(err.starts_with(&reason) && err.lines().count() == 1, "{err}");
    assert_eq!((mount.supervisor(), mount.worker()), (supervisor, worker));
    fs::write(&config, old).unwrap();
    assert_eq!(fs::read_to_string(mount.tasks("shared", "0")).unwrap(), format!("{}\n", task.pid()));
    assert_eq!(upgrade_with(Path::new(KCM), &mount), (String::new(), Some(0)));
    assert_ne!(mount.worker(), worker);
}

#[test]
fn an_upgrade_works_just_after_a_worker_death() {
    let mount = Mount::with_shared();
    let new = mount.home().join("kcm-1");
    copy_kcm(&new);
    let supervisor = mount.supervisor();
    for n in 0..6 {
        mount.signal_worker(Signal::SIGKILL);
        let program = if n % 2 == 0 { new.as_path() } else { Path::new(KCM) };
        assert_eq!(upgrade_with(program, &mount), (String::new(), Some(0)));
        assert_eq!(self::program(supervisor), fs::canonicalize(program).unwrap());
        let worker = mount.worker().unwrap();
        assert_eq!(self::program(worker), fs::canonicalize(program).unwrap());
    }
    mount.read("info/version");
}

#[test]
fn without_a_mount_there_is_nothing_to_upgrade() {
    let mount = Mount::not_mounted();
    let (err, status) = upgrade_with(Path::new(KCM), &mount);
    assert_eq!(status, Some(1));
    assert!(err.contains("not mounted"), "{err}");
}

/// A stand-in for the service manager: stores the descriptors that it gets over its notify socket, and passes them
/// on.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    stored: Vec<(String, OwnedFd)>,
    ready: bool,
}

impl Manager {
    fn new(path: PathBuf) -> Self {
        let socket = UnixDatagram::bind(&path).unwrap();
        Self { socket, path, stored: Vec::new(), ready: false }
    }

    /// Reads all messages.
    fn listen(&mut self) {
        loop {
            let mut bytes = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let message = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags);
            let Ok(message) = message else { return };
            let mut fds = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            let output = text(&bytes[..message.bytes]);
            let name =
                output.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
            for line in output.lines() {
                match line {
                    "READY=1" => self.ready = true,
                    "FDSTORE=1" => self.stored.extend(fds.drain(..).map(|fd| (name.clone(), fd))),
                    "FDSTOREREMOVE=1" => self.stored.retain(|(stored, _)| *stored != name),
                    _ => {}
                }
            }
        }
    }

    /// The names of the stored descriptors.
    fn names(&self) -> Vec<&str> {
        self.stored.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// Starts the service, passes the stored descriptors, and waits until it is ready.
    fn start(&mut self, mount: &Mount) -> Sleeper {
        self.ready = false;
        let daemon = mount.mount_command();
        let mut shell = Command::new("bash");
        // Descriptors are numbered from 3 and are meant only for this process.
        let line = match self.stored.len() {
            0 => "exec \"$@\"",
            3 => "exec 3<&0 4<&1 5<&2 </dev/null >/dev/null 2>&1; export LISTEN_PID=$$; exec \"$@\"",
            _ => panic!("{:?}", self.names()),
        };
        shell
            .args(["-c", line, "bash"])
            .arg(daemon.get_program())
            .args(daemon.get_args())
            .arg("--foreground");
        shell.env("NOTIFY_SOCKET", &self.path);
        shell.stderr(Stdio::null());
        if let [(_, first), (_, second), (_, third)] = self.stored.as_slice() {
            shell.env("LISTEN_FDNAMES", self.names().join(":")).env("LISTEN_FDS", "3");
            let copy = |fd: &OwnedFd| fd.try_clone().unwrap();
            shell.stdin(copy(first)).stdout(copy(second)).stderr(copy(third));
        }
        let service = Sleeper::spawn(&mut shell);
        drop(shell);
        until("the service is ready", || {
            self.listen();
            self.ready
        });
        service
    }
}

#[test]
fn stored_descriptors_keep_the_mount() {
    let mount = Mount::not_mounted();
    let mut manager = Manager::new(mount.home().join("notify"));
    let mut service = manager.start(&mount);
    assert_eq!(manager.names(), ["kcm-device", "kcm-letter", "kcm-pidfds"]);
    mount.make_pool("shared", false, &["0", "1"]);
    let device = fs::metadata(mount.conf()).unwrap().dev();
    let task = Sleeper::new();
    let open = OpenOptions::new().read(true).write(true).open(mount.tasks("shared", "0")).unwrap();
    for how in [Signal::SIGKILL, Signal::SIGKILL, Signal::SIGUSR1] {
        (&open).write_all(task.pid().to_string().as_bytes()).unwrap();
        if how == Signal::SIGUSR1 {
            // It exits and leaves the mount connected.
            signal(mount.supervisor(), how);
            assert!(service.child().wait().unwrap().success());
        } else {
            mount.kill_daemon();
        }
        until("all processes have ended", || mount.daemons().is_empty());
        let waiting = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| (&open).write(format!("-{}", task.pid()).as_bytes()));
            service = manager.start(&mount);
            waiting.join().unwrap()
        });
        waiting.expect("a write while no worker serves");
        assert_eq!(fs::metadata(mount.conf()).unwrap().dev(), device, "the same mount");
        let mut bytes = [0; 64];
        assert_eq!(open.read_at(&mut bytes, 0).expect("an open file works"), 0);
        assert_eq!(manager.names(), ["kcm-device", "kcm-letter", "kcm-pidfds"], "nothing is stored twice");
    }
    // A service manager does not change how an upgrade works, and its stored descriptors stay valid.
    assert_eq!(upgrade_with(Path::new(KCM), &mount), (String::new(), Some(0)));
    manager.listen();
    mount.kill_daemon();
    service = manager.start(&mount);
    assert_eq!(fs::metadata(mount.conf()).unwrap().dev(), device);
    // A clean stop removes the stored descriptors, so that no later client waits for a connection without a daemon.
    let file = File::open(mount.tasks("shared", "0")).unwrap();
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| mount.stop());
        // Its socket has room for ten messages.
        until("the daemon has stopped", || {
            manager.listen();
            stop.is_finished()
        });
    });
    service.child().wait().unwrap();
    manager.listen();
    assert!(manager.names().is_empty(), "{:?}", manager.names());
    assert_eq!(errno(file.read_at(&mut [0; 8], 0)), Errno::ENOTCONN);
}

#[test]
fn stored_descriptors_of_an_old_mount_are_harmless() {
    let mount = Mount::not_mounted();
    let mut manager = Manager::new(mount.home().join("notify"));
    drop(manager.start(&mount));
    mount.make_pool("shared", false, &["0"]);
    mount.kill_daemon();
    nix::mount::umount2(&mount.conf(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    let _service = manager.start(&mount);
    assert_eq!(mount.sh("ls $C/pools/shared"), "0\nexclusive\nmode\npartial\nqueue\ntasks\ntransient\n");
}
