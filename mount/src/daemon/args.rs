//! The command line of the daemon's own processes: `kcm __daemon <role> --conf-dir=<dir> --state-dir=<dir>`.
//!
//! Owns its parser, because clap does not know this command. Does not know what a role does.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

use super::error::MountError;
use super::paths::{CONF_DIR, FOREGROUND, MOUNT, MountPaths, STATE_DIR};
use super::role::{COMMAND, PREFLIGHT, PROBE, REPLACE_WORKER, Role, SUPERVISOR, WORKER};

/// A parsed command line of a daemon process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    pub(super) role: Role,
    pub(super) paths: MountPaths,
}

impl Invocation {
    /// Parses the arguments after the program's name. `None`: a user has typed them, and clap parses
    /// them.
    ///
    /// # Errors
    /// The arguments of `__daemon` are wrong.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Option<Result<Self, MountError>> {
        let args: Vec<OsString> = args.into_iter().collect();
        let (command, rest) = args.split_first()?;
        if command == COMMAND {
            return Some(parse_role(rest).map_err(MountError::Usage));
        }
        if command == MOUNT { parse_old_flags(rest).map(Ok) } else { None }
    }
}

fn parse_role(args: &[OsString]) -> Result<Invocation, String> {
    let (role, flags) = args.split_first().ok_or("no role")?;
    let mut role = match role.to_str() {
        Some(WORKER) => Role::Worker,
        Some(SUPERVISOR) => Role::Supervisor { replace_worker: false },
        Some(PREFLIGHT) => Role::Preflight,
        Some(PROBE) => Role::Probe,
        _ => return Err(format!("{role:?} is not a role")),
    };
    let (mut conf_dir, mut state_dir) = (None, None);
    for flag in flags {
        if let Some(path) = value(flag, CONF_DIR) {
            conf_dir = Some(path);
        } else if let Some(path) = value(flag, STATE_DIR) {
            state_dir = Some(path);
        } else if flag == REPLACE_WORKER && matches!(role, Role::Supervisor { .. }) {
            role = Role::Supervisor { replace_worker: true };
        } else {
            return Err(format!("{flag:?} is not a flag of this role"));
        }
    }
    let missing = |name: &str| format!("{name} is missing");
    let conf_dir = conf_dir.ok_or_else(|| missing(CONF_DIR))?;
    let state_dir = state_dir.ok_or_else(|| missing(STATE_DIR))?;
    Ok(Invocation { role, paths: MountPaths { conf_dir, state_dir } })
}

/// Parses the spelling that programs without `__daemon` use: `kcm mount --foreground --conf-dir=<dir>
/// --state-dir=<dir>`, followed by `--prove` or by `--adopt --replace`.
///
/// In an upgrade the supervisor of the old program starts the new program, so the new program must understand the
/// old program's words. The other old roles (`--worker`, `--probe`) were only ever started from the same program.
fn parse_old_flags(args: &[OsString]) -> Option<Invocation> {
    let (mut role, mut is_foreground, mut replace_worker) = (None, false, false);
    let (mut conf_dir, mut state_dir) = (None, None);
    for arg in args {
        match arg.to_str() {
            Some(FOREGROUND) => is_foreground = true,
            Some("--prove") => role = Some(Role::Preflight),
            Some("--adopt") => role = Some(Role::Supervisor { replace_worker: false }),
            Some("--replace") => replace_worker = true,
            _ if value(arg, CONF_DIR).is_some() => conf_dir = value(arg, CONF_DIR),
            _ if value(arg, STATE_DIR).is_some() => state_dir = value(arg, STATE_DIR),
            _ => return None,
        }
    }
    let role = match role? {
        Role::Supervisor { .. } => Role::Supervisor { replace_worker },
        role => role,
    };
    let paths = MountPaths { conf_dir: conf_dir?, state_dir: state_dir? };
    is_foreground.then_some(Invocation { role, paths })
}

/// The path in `<flag><path>`.
fn value(arg: &OsStr, flag: &str) -> Option<PathBuf> {
    let path = arg.as_bytes().strip_prefix(flag.as_bytes())?;
    Some(OsString::from_vec(path.to_vec()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Option<Result<Invocation, MountError>> {
        Invocation::parse(line.split_whitespace().map(OsString::from))
    }

    fn paths() -> MountPaths {
        MountPaths { conf_dir: "/conf".into(), state_dir: "/state".into() }
    }

    #[test]
    fn every_role_is_parsed_from_the_command_that_starts_it() {
        for role in [
            Role::Worker,
            Role::Supervisor { replace_worker: false },
            Role::Supervisor { replace_worker: true },
            Role::Preflight,
            Role::Probe,
        ] {
            let command = paths().role_command("/bin/kcm".as_ref(), role);
            let args = command.get_args().map(OsStr::to_owned);
            let invocation = Invocation::parse(args).expect("a daemon process").expect("a role");
            assert_eq!(invocation, Invocation { role, paths: paths() });
        }
    }

    #[test]
    fn an_old_supervisor_upgrades_to_this_program() {
        let line = "mount --foreground --conf-dir=/conf --state-dir=/state";
        for (flags, role) in [
            ("--prove", Role::Preflight),
            ("--adopt", Role::Supervisor { replace_worker: false }),
            ("--adopt --replace", Role::Supervisor { replace_worker: true }),
        ] {
            let invocation = parse(&format!("{line} {flags}")).expect(flags).expect(flags);
            assert_eq!(invocation, Invocation { role, paths: paths() });
        }
    }

    #[test]
    fn commands_of_users_are_left_to_clap() {
        for line in [
            "",
            "mount",
            "mount --foreground --conf-dir=/conf --state-dir=/state",
            "mount --foreground --conf-dir=/conf --state-dir=/state --import",
            "mount --prove",
            "mount --adopt --help",
            "describe --conf-dir=/conf",
        ] {
            assert!(parse(line).is_none(), "{line}");
        }
    }

    #[test]
    fn wrong_arguments_of_the_hidden_command_are_refused() {
        for (line, message) in [
            ("__daemon", "no role"),
            ("__daemon manager", "\"manager\" is not a role"),
            ("__daemon worker", "--conf-dir= is missing"),
            ("__daemon worker --conf-dir=/conf", "--state-dir= is missing"),
            ("__daemon probe --replace-worker", "\"--replace-worker\" is not a flag of this role"),
        ] {
            let error = parse(line).expect("not for users").expect_err(line).to_string();
            assert!(error.contains(message), "{line}: {error}");
        }
    }

    #[test]
    fn a_path_need_not_be_text() {
        let conf_dir = OsString::from_vec(b"--conf-dir=/c\xff".to_vec());
        let args = ["__daemon".into(), "probe".into(), conf_dir, "--state-dir=/state".into()];
        let invocation = Invocation::parse(args).unwrap().unwrap();
        assert_eq!(invocation.paths.conf_dir.as_os_str().as_bytes(), b"/c\xff");
    }
}
