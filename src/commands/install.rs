//! `kcm install`.
//!
//! Owns the files that are installed on a machine: the program, the systemd units, man pages and completions. Does not know
//! how they are removed, or what a page says.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Error};
use clap_complete::Shell;

use super::{complete, manual};
use crate::cli;
use crate::confdir;
use crate::service::{CDI_UNIT, UNIT};

/// The file name of the program.
pub(super) const PROGRAM: &str = "kcm";
/// The systemd target that starts the unit.
pub(super) const TARGET: &str = "multi-user.target";
/// Where shells look for completions, below the directory of shared files.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "bash-completion/completions/kcm"),
    (Shell::Fish, "fish/vendor_completions.d/kcm.fish"),
    (Shell::Zsh, "zsh/site-functions/_kcm"),
];

/// Installs this program and, with `--systemd`, its unit, man pages and completions.
pub(super) fn run(args: &cli::Install) -> Result<ExitCode, Error> {
    let placed = |path: &Path| match &args.root {
        Some(root) => root.join(path.strip_prefix("/").unwrap_or(path)),
        None => path.to_owned(),
    };
    let program = args.target.install_dir.join(PROGRAM);
    let own = File::open("/proc/self/exe").context("/proc/self/exe: cannot be read; mount /proc")?;
    install_file(&placed(&program), own, 0o755)?;
    log::info!("Installed {}.", placed(&program).display());
    let Some(directory) = &args.systemd else { return Ok(ExitCode::SUCCESS) };
    let program = std::path::absolute(&program)?;
    let (unit, cdi_unit) = (unit_text(&program)?, cdi_unit_text(&program)?);
    let share_dir = placed(&args.share.share_dir);
    let install = |(name, content): (PathBuf, Vec<u8>)| install_file(&share_dir.join(name), &*content, 0o644);
    match documentation()?.into_iter().try_for_each(install) {
        Ok(()) => log::info!("Installed the man pages and completions below {}.", share_dir.display()),
        // A system whose /usr cannot be written runs the daemon all the same. A package has to be complete.
        Err(error) if args.root.is_none() => {
            log::warn!("{error:#}; the man pages and completions are not installed");
        }
        Err(error) => return Err(error),
    }
    let units = [
        (UNIT, unit, "start it: systemctl daemon-reload && systemctl enable --now kcm"),
        (CDI_UNIT, cdi_unit, "for containers: systemctl enable --now kcm-cdi"),
    ];
    for (name, text, start) in units {
        let unit = placed(&directory.join(name));
        install_file(&unit, text.as_bytes(), 0o644)?;
        log::info!("Installed {}; {start}", unit.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the man pages and completions, by their names below the directory of shared files (`/usr/share`).
pub(super) fn documentation() -> Result<Vec<(PathBuf, Vec<u8>)>, Error> {
    let pages = manual::all()?.into_iter().map(|page| (Path::new("man").join(page.file), page.text));
    let scripts = COMPLETIONS.into_iter().map(|(shell, file)| Ok((file.into(), complete::script(shell)?)));
    pages.map(Ok).chain(scripts).collect()
}

/// Installs a file by atomic replacement: a process that starts the program gets the old one or the new one.
pub(super) fn install_file(file: &Path, mut content: impl io::Read, mode: u32) -> Result<(), Error> {
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

/// Returns the path of the program as a unit has it.
///
/// # Errors
/// systemd cannot have this path in a unit.
fn unit_path(program: &Path) -> Result<String, Error> {
    let plain =
        program.to_str().filter(|path| !path.contains(|c: char| c.is_control() || "\"\\$".contains(c)));
    let path = plain.with_context(|| {
        format!("{}: systemd does not accept such a name; give another", program.display())
    })?;
    // A percent sign begins a specifier (systemd.unit(5)).
    Ok(path.replace('%', "%%"))
}

/// Returns the unit that starts the daemon at boot. It is as restricted as the daemon's work allows: setting affinities
/// of all users' processes, and mounting in the mount namespace of the machine.
///
/// # Errors
/// systemd cannot have this path in a unit.
pub(super) fn unit_text(program: &Path) -> Result<String, Error> {
    let program = unit_path(program)?;
    Ok(format!(
        "\
[Unit]
Description=CPU pools as a live filesystem
Documentation=man:kcm(1) man:kcm(5)
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

/// Returns the unit that keeps the specs for container runtimes up to date. It reads one file of the mount and writes to one
/// directory. The capabilities are for opening that file, and for a directory that root may not write to.
fn cdi_unit_text(program: &Path) -> Result<String, Error> {
    let program = unit_path(program)?;
    Ok(format!(
        "\
[Unit]
Description=CDI specs of the CPU lists of kcm
Documentation=man:kcm-cdi(1)
After={UNIT}
StartLimitIntervalSec=0

[Service]
ExecStart=\"{program}\" cdi install --follow
Restart=always
RestartSec=1s
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_DAC_OVERRIDE
IPAddressDeny=any
RestrictAddressFamilies=AF_UNIX
RestrictNamespaces=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
NoNewPrivileges=yes
ProtectClock=yes
ProtectHostname=yes
KeyringMode=private
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
}
