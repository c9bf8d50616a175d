//! `kcm install` and `kcm uninstall`.
//!
//! Owns: what is put on a node and taken from it again. Must not know: how pools are made.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Error, bail};

use super::common::node::node_name_if_any;
use super::discover;
use crate::cli;
use crate::confdir::{self, ConfDir};
use crate::host::Host;

/// The name of the program in its directory.
const PROGRAM: &str = "kcm";
/// The name of the unit.
const UNIT: &str = "kcm.service";
/// At which point of the boot it is started.
const TARGET: &str = "multi-user.target";

/// How many PIDs surely fit into one write.
const RELEASED_AT_ONCE: usize = 1000;

/// Puts this program, and a unit for systemd where that is asked for, in their places.
pub(super) fn install(args: &cli::Install) -> Result<ExitCode, Error> {
    let program = args.target.install_dir.join(PROGRAM);
    let own = File::open("/proc/self/exe").context("/proc/self/exe: cannot be read; mount /proc")?;
    put(&program, own, 0o755)?;
    log::info!("Installed {}.", program.display());
    if let Some(directory) = &args.systemd {
        let program = std::path::absolute(&program)?;
        let unit = directory.join(UNIT);
        put(&unit, unit_text(&program)?.as_bytes(), 0o644)?;
        log::info!(
            "Installed {}; start it: systemctl daemon-reload && systemctl enable --now kcm",
            unit.display()
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Takes it all back: first what brings pods here, where this is somebody's node; the pools last, which hurts
/// most.
pub(super) fn uninstall(args: &cli::Uninstall) -> Result<ExitCode, Error> {
    let dir = if args.dir.conf_dir.exists() { Some(ConfDir::open(&args.dir.conf_dir)?) } else { None };
    let dir = dir.filter(|dir| dir.path().join("pools").exists());
    let _lock = dir.as_ref().map(ConfDir::lock).transpose()?;
    if let Some(dir) = dir.as_ref().filter(|_| !args.force) {
        check_unused(dir)?;
    }
    if let Some(node) = node_name_if_any(&args.node)? {
        discover::withdraw(&node)?;
    }
    let unit = args.systemd.join(UNIT);
    // What systemctl enable has made of it.
    let wanted = args.systemd.join(format!("{TARGET}.wants")).join(UNIT);
    for file in [args.target.install_dir.join(PROGRAM), wanted, unit] {
        match fs::remove_file(&file) {
            Ok(()) => log::info!("Removed {}.", file.display()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(confdir::file_error(&file, error)),
        }
    }
    if let Some(dir) = &dir {
        remove_pools(dir, args.force)?;
        log::info!("Removed the pools of {}.", dir.path().display());
        if dir.is_mounted() {
            log::info!("{0} is still served; end that: kcm unmount --conf-dir={0}", dir.path().display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn check_unused(dir: &ConfDir) -> Result<(), Error> {
    let host = Host::from_env();
    // A plain directory still names the dead.
    let holds = |pid: &u32| dir.is_mounted() || host.is_alive(*pid);
    for (pool, content) in &dir.pools()? {
        for (list, tasks) in &content.lists {
            if let Some(pid) = tasks.iter().find(|pid| holds(pid)) {
                bail!("{pool} {list} is held by {pid}; end that first, or release it with --force");
            }
        }
    }
    Ok(())
}

/// For whoever holds the lock. `force`: on a mount, who is on a list is released.
fn remove_pools(dir: &ConfDir, force: bool) -> Result<(), Error> {
    for (pool, content) in dir.pools()? {
        for (list, tasks) in content.lists {
            for pids in tasks.chunks(RELEASED_AT_ONCE).filter(|_| force && dir.is_mounted()) {
                let words: Vec<String> = pids.iter().map(|pid| format!("-{pid}")).collect();
                // Whether it was enough (somebody may have died, or come) is known to who removes the list.
                let _ = fs::write(dir.tasks(&pool, &list), words.join(" ") + "\n");
            }
            remove(dir, &dir.pool(&pool).join(&list))?;
        }
        remove(dir, &dir.pool(&pool))?;
    }
    if !dir.is_mounted() {
        let pools = dir.path().join("pools");
        fs::remove_dir(&pools).map_err(|error| confdir::file_error(&pools, error))?;
        let lock = dir.path().join("lock");
        fs::remove_file(&lock).map_err(|error| confdir::file_error(&lock, error))?;
    }
    Ok(())
}

fn remove(dir: &ConfDir, directory: &Path) -> Result<(), Error> {
    dir.remove_created(directory);
    if directory.exists() {
        // Again, for its reason.
        dir.with_reason(directory, || fs::remove_dir(directory))?;
    }
    Ok(())
}

/// Replaces a file atomically: whoever starts the program gets the old one or the new one.
fn put(file: &Path, mut content: impl io::Read, mode: u32) -> Result<(), Error> {
    let directory = file.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory).map_err(|error| confdir::file_error(directory, error))?;
    let new = PathBuf::from(format!("{}.{}.new", file.display(), std::process::id()));
    let write = || {
        let mut out = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
        io::copy(&mut content, &mut out)?;
        out.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
        out.sync_all()?;
        // A program that is open for writing cannot be started.
        drop(out);
        fs::rename(&new, file)?;
        File::open(directory)?.sync_all()
    };
    let written: io::Result<()> = { write }();
    written.map_err(|error| {
        let _ = fs::remove_file(&new);
        confdir::file_error(file, error)
    })
}

/// A unit that starts the daemon at boot. What it may do besides is what the work allows to forbid: it sets
/// masks of processes of all users, and mounts in the namespace of the machine.
fn unit_text(program: &Path) -> Result<String, Error> {
    let plain =
        program.to_str().filter(|path| !path.contains(|c: char| c.is_control() || "\"\\$".contains(c)));
    let path =
        plain.with_context(|| format!("{}: systemd takes no such name; give another", program.display()))?;
    // A percent sign means something to systemd.
    let program = path.replace('%', "%%");
    Ok(format!(
        "\
[Unit]
Description=CPU pools as a live filesystem
Before=kubelet.service

[Service]
Type=notify
ExecStart=\"{program}\" mount --foreground
# Holds the mount while the daemon is started again; so a restart only asks the daemon to leave (SIGUSR1), and
# a stop unmounts before.
FileDescriptorStoreMax=4
ExecStop=/bin/sh -c 'systemctl list-jobs --no-legend {UNIT} | grep -qw restart || exec \"{program}\" unmount'
KillSignal=SIGUSR1
KillMode=mixed
Restart=always
RestartSec=100ms
OOMScoreAdjust=-900
LimitNOFILE=1048576
StateDirectory=kcm
StateDirectoryMode=0700
UMask=0077
# A namespace of its own (ProtectSystem=, PrivateTmp= and their like) would hide the mount from everybody.
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_SYS_NICE CAP_SYS_PTRACE CAP_SYS_RESOURCE CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER
DeviceAllow=/dev/fuse rw
DevicePolicy=closed
IPAddressDeny=any
RestrictAddressFamilies=AF_UNIX
RestrictNamespaces=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
NoNewPrivileges=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native

[Install]
WantedBy={TARGET}
"
    ))
}
