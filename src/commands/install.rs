//! `kcm install` and `kcm uninstall`.
//!
//! Owns the files that are installed on a node, the systemd unit and its man page among them, and their removal. Does not
//! know how pools are created.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Error, bail};

use super::common::node::node_name_if_any;
use super::{discover, manual};
use crate::cli;
use crate::confdir::{self, ConfDir};
use crate::host::Host;
use crate::service::UNIT;

/// The file name of the program.
const PROGRAM: &str = "kcm";
/// The man page that the unit names, below the directory of man pages.
const MAN_PAGE: &str = "man1/kcm.1";
/// The systemd target that starts the unit.
const TARGET: &str = "multi-user.target";

/// The number of PIDs in one write: with 12 bytes each they are far below the limit of a command, 64 KiB.
const RELEASES_PER_WRITE: usize = 1000;

/// Installs this program and, with `--systemd`, its unit and the man page that the unit names.
pub(super) fn install(args: &cli::Install) -> Result<ExitCode, Error> {
    let program = args.target.install_dir.join(PROGRAM);
    let own = File::open("/proc/self/exe").context("/proc/self/exe: cannot be read; mount /proc")?;
    install_file(&program, own, 0o755)?;
    log::info!("Installed {}.", program.display());
    if let Some(directory) = &args.systemd {
        let program = std::path::absolute(&program)?;
        let unit = directory.join(UNIT);
        let text = unit_text(&program)?;
        let page = args.man.man_dir.join(MAN_PAGE);
        match install_file(&page, manual::page()?.as_slice(), 0o644) {
            Ok(()) => log::info!("Installed {}.", page.display()),
            // A system whose /usr cannot be written runs the daemon all the same.
            Err(error) => log::warn!("{error:#}; the man page is not installed"),
        }
        install_file(&unit, text.as_bytes(), 0o644)?;
        log::info!(
            "Installed {}; start it: systemctl daemon-reload && systemctl enable --now kcm",
            unit.display()
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Uninstalls in order of increasing damage: the node's Kubernetes resources first (if this is a node), so that no pod
/// arrives; the pools last.
pub(super) fn uninstall(args: &cli::Uninstall) -> Result<ExitCode, Error> {
    confdir::check_answers(&args.dir.conf_dir)?;
    let dir = if args.dir.conf_dir.exists() { Some(ConfDir::open(&args.dir.conf_dir)?) } else { None };
    let dir = dir.filter(|dir| dir.pools_dir().exists());
    let locked_and_unused = || {
        let lock = dir.as_ref().map(ConfDir::lock).transpose()?;
        dir.as_ref().filter(|_| !args.force).map_or(Ok(()), check_unused).map(|()| lock)
    };
    if let Some(node) = node_name_if_any(&args.node)? {
        // The API server may take long to answer, and others need the lock meanwhile.
        drop(locked_and_unused()?);
        discover::unadvertise(&node)?;
    }
    let _lock = locked_and_unused()?;
    let unit = args.systemd.join(UNIT);
    // The link that `systemctl enable` creates.
    let wanted = args.systemd.join(format!("{TARGET}.wants")).join(UNIT);
    for file in [args.target.install_dir.join(PROGRAM), wanted, unit, args.man.man_dir.join(MAN_PAGE)] {
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

/// Checks that no list has tasks.
fn check_unused(dir: &ConfDir) -> Result<(), Error> {
    let host = Host::with_processes()?;
    // A plain directory also has the PIDs of dead tasks.
    let is_live = |pid: &u32| dir.is_mounted() || host.is_alive(*pid);
    for (pool, content) in &dir.pools()? {
        for (list, tasks) in &content.lists {
            if let Some(pid) = tasks.iter().find(|pid| is_live(pid)) {
                bail!("{pool} {list} is held by {pid}; end that first, or release it with --force");
            }
        }
    }
    Ok(())
}

/// Removes all pools. `force`: on a mount, releases the tasks of each list first. The caller holds the lock.
fn remove_pools(dir: &ConfDir, force: bool) -> Result<(), Error> {
    for (pool, content) in dir.pools()? {
        for (list, tasks) in content.lists {
            for pids in tasks.chunks(RELEASES_PER_WRITE).filter(|_| force && dir.is_mounted()) {
                let words: Vec<String> = pids.iter().map(|pid| format!("-{pid}")).collect();
                // An error needs no handling: the removal fails if a task is left, for this reason or a later claim.
                let _ = fs::write(dir.tasks(&pool, &list), words.join(" ") + "\n");
            }
            remove(dir, &dir.pool(&pool).join(&list))?;
        }
        remove(dir, &dir.pool(&pool))?;
    }
    if !dir.is_mounted() {
        let pools = dir.pools_dir();
        fs::remove_dir(&pools).map_err(|error| confdir::file_error(&pools, error))?;
        let lock = dir.path().join("lock");
        fs::remove_file(&lock).map_err(|error| confdir::file_error(&lock, error))?;
    }
    Ok(())
}

/// Removes a pool or a list.
fn remove(dir: &ConfDir, directory: &Path) -> Result<(), Error> {
    dir.remove_created(directory);
    if directory.exists() {
        // Removing it again returns the reason of the failure.
        dir.with_reason(directory, || fs::remove_dir(directory))?;
    }
    Ok(())
}

/// Installs a file by atomic replacement: a process that starts the program gets the old one or the new one.
fn install_file(file: &Path, mut content: impl io::Read, mode: u32) -> Result<(), Error> {
    let directory = file.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory).map_err(|error| confdir::file_error(directory, error))?;
    let new = PathBuf::from(format!("{}.{}.new", file.display(), std::process::id()));
    log::debug!("{}: writing {}", file.display(), new.display());
    let write = || {
        let mut out = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
        io::copy(&mut content, &mut out)?;
        // The umask has narrowed the mode of `open`.
        out.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
        out.sync_all()?;
        // A program that is open for writing cannot be started (ETXTBSY).
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

/// Returns the unit that starts the daemon at boot. It is as restricted as the daemon's work allows: setting affinities
/// of all users' processes, and mounting in the mount namespace of the machine.
///
/// # Errors
/// systemd cannot have this path in a unit.
pub(super) fn unit_text(program: &Path) -> Result<String, Error> {
    let plain =
        program.to_str().filter(|path| !path.contains(|c: char| c.is_control() || "\"\\$".contains(c)));
    let path = plain.with_context(|| {
        format!("{}: systemd does not accept such a name; give another", program.display())
    })?;
    // A percent sign begins a specifier (systemd.unit(5)).
    let program = path.replace('%', "%%");
    Ok(format!(
        "\
[Unit]
Description=CPU pools as a live filesystem
Documentation=man:kcm(1)
Wants=modprobe@fuse.service
After=modprobe@fuse.service
# Whatever starts containers, which bind the directory.
Before=kubelet.service containerd.service crio.service docker.service k3s.service k3s-agent.service
# Clients wait for the next daemon, however often one ends. A limit would end the mount.
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart=\"{program}\" mount --foreground
ExecReload=\"{program}\" mount --upgrade
# systemd holds the mount while the daemon restarts. SIGTERM unmounts; SIGUSR1 leaves the mount to the next daemon.
FileDescriptorStoreMax=4
RestartKillSignal=SIGUSR1
KillMode=mixed
Restart=always
RestartSec=100ms
# The supervisor starts another worker. Without this line the service stops, and the mount with it.
OOMPolicy=continue
OOMScoreAdjust=-900
LimitNOFILE=1048576
StateDirectory=kcm
StateDirectoryMode=0700
UMask=0077
# Not restricted: the mount namespace, because a private one (ProtectSystem=, PrivateTmp=, ProtectKernelTunables=,
# ProtectProc= and similar) hides the mount from all other processes; the user, which has to be root to mount; devices
# other than the FUSE device are closed, but PrivateDevices= has none.
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_SYS_NICE CAP_SYS_PTRACE CAP_SYS_RESOURCE CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER
DeviceAllow=/dev/fuse rw
DevicePolicy=closed
IPAddressDeny=any
# AF_NETLINK tells of CPUs that come and go.
RestrictAddressFamilies=AF_UNIX AF_NETLINK
RestrictNamespaces=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
NoNewPrivileges=yes
ProtectClock=yes
ProtectHostname=yes
KeyringMode=private
ManagedOOMPreference=omit
SystemCallFilter=~@clock @cpu-emulation @debug @module @obsolete @raw-io @reboot @swap
SystemCallErrorNumber=EPERM
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native

[Install]
WantedBy={TARGET}
"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_names_the_program_as_systemd_reads_it() {
        let unit = unit_text(Path::new("/opt/50% off/kcm")).unwrap();
        assert!(unit.contains("ExecStart=\"/opt/50%% off/kcm\" mount --foreground\n"), "{unit}");
        for path in ["/opt/a$b/kcm", "/opt/a\"b/kcm", "/opt/a\\b/kcm", "/opt/a\nb/kcm"] {
            assert!(unit_text(Path::new(path)).is_err(), "{path:?}");
        }
    }

    #[test]
    fn a_file_is_replaced_with_its_mode_and_without_leftovers() {
        use std::os::unix::fs::PermissionsExt as _;
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("bin/kcm");
        for content in ["old", "new"] {
            install_file(&file, content.as_bytes(), 0o755).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), content);
        }
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o755);
        assert_eq!(fs::read_dir(home.path().join("bin")).unwrap().count(), 1);
        fs::create_dir(home.path().join("directory")).unwrap();
        assert!(install_file(&home.path().join("directory"), "x".as_bytes(), 0o644).is_err());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 2, "the new file is removed after an error");
    }

    #[test]
    fn a_plain_directory_is_removed_with_its_pools_and_lock() {
        let home = tempfile::tempdir().unwrap();
        let dir = ConfDir::open(home.path()).unwrap();
        dir.create_pools_dir().unwrap();
        dir.create_pool("p").unwrap();
        dir.set_exclusive("p", true).unwrap();
        dir.create_list("p", "0").unwrap();
        let _lock = dir.lock().unwrap();
        check_unused(&dir).unwrap();
        remove_pools(&dir, false).unwrap();
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_list_with_a_live_task_is_in_use() {
        let home = tempfile::tempdir().unwrap();
        let dir = ConfDir::open(home.path()).unwrap();
        dir.create_pools_dir().unwrap();
        dir.create_pool("p").unwrap();
        dir.set_exclusive("p", true).unwrap();
        dir.create_list("p", "0").unwrap();
        fs::write(dir.tasks("p", "0"), std::process::id().to_string()).unwrap();
        let error = check_unused(&dir).unwrap_err().to_string();
        assert!(error.starts_with(&format!("p 0 is held by {}", std::process::id())), "{error}");
    }
}
