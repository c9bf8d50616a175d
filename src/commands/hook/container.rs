//! A container, as an OCI runtime describes it to a hook (runtime-spec, *State*).
//!
//! Owns the checks of what the runtime says, and the bounds of size and time. Does not know what the hook does.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal as _, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Error, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use serde_json::Value;

use crate::commands::cdi::spec;
use crate::commands::common::deadline::Deadline;
use crate::confdir;

/// The longest state, in bytes. Annotations are a part of it; a pod has at most 256 KiB of them.
const MAX_STATE: u64 = 4 << 20;
/// The longest configuration of a bundle, in bytes.
const MAX_CONFIG: u64 = 16 << 20;
/// How long a runtime may take to write the state.
const PATIENCE: Duration = Duration::from_secs(5);
/// Where the state is.
const SOURCE: &str = "standard input";

/// A container that is created.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Container {
    /// Its first process.
    pub(super) pid: u32,
    /// The directory with its configuration.
    pub(super) bundle: Option<PathBuf>,
}

impl Container {
    /// Reads the state that a runtime writes to its hook.
    ///
    /// # Errors
    /// It is not the state of a container that has a process, it is too long, or it does not come in time.
    pub(super) fn of_standard_input() -> Result<Self, Error> {
        let input = io::stdin();
        if input.is_terminal() {
            bail!("{SOURCE}: a terminal; an OCI runtime runs this hook, so use kcm cdi install");
        }
        let file = input
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| confdir::file_error(Path::new(SOURCE), error))?;
        Self::parse(&read(file.into())?)
    }

    fn parse(text: &[u8]) -> Result<Self, Error> {
        let state: Value = serde_json::from_slice(text)
            .with_context(|| format!("{SOURCE}: not the state of a container"))?;
        let Some(pid) = state.get("pid") else {
            bail!("{SOURCE}: the state of a container without a process; use this as a createRuntime hook");
        };
        let number =
            pid.as_u64().and_then(|pid| i32::try_from(pid).ok()).and_then(|pid| u32::try_from(pid).ok());
        let Some(pid) = number.filter(|pid| *pid > 0) else {
            bail!("{SOURCE}: the state of a container has a pid that is not a PID");
        };
        let bundle = state.get("bundle").and_then(Value::as_str).map(PathBuf::from);
        Ok(Self { pid, bundle })
    }
}

/// Reads to the end, within the bounds.
fn read(mut input: File) -> Result<Vec<u8>, Error> {
    let (deadline, mut text) = (Deadline::after(PATIENCE), Vec::new());
    let mut chunk = [0; 4096];
    loop {
        match poll(&mut [PollFd::new(input.as_fd(), PollFlags::POLLIN)], deadline.poll_timeout()) {
            Ok(1..) => {}
            Ok(_) if deadline.has_passed() => {
                bail!("{SOURCE}: no state of a container within {} s", PATIENCE.as_secs())
            }
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(errno) => return Err(confdir::file_error(Path::new(SOURCE), errno.into())),
        }
        match input.read(&mut chunk) {
            Ok(0) => return Ok(text),
            Ok(length) => text.extend_from_slice(chunk.get(..length).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(confdir::file_error(Path::new(SOURCE), error)),
        }
        if text.len() as u64 > MAX_STATE {
            bail!("{SOURCE}: longer than the state of a container");
        }
        if deadline.has_passed() {
            bail!("{SOURCE}: the state of a container did not end within {} s", PATIENCE.as_secs());
        }
    }
}

/// Returns the devices of kcm in the configuration of a bundle, by the arguments of their hooks. None if it cannot be read: the
/// runtime has read it.
pub(super) fn devices(bundle: &Path) -> Vec<String> {
    let mut text = Vec::new();
    // Something else than a file must not keep the hook waiting.
    let opened =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(bundle.join("config.json"));
    let read = opened.and_then(|file| {
        let is_file = file.metadata()?.is_file();
        if is_file { file.take(MAX_CONFIG).read_to_end(&mut text) } else { Ok(0) }
    });
    if let Err(error) = read {
        log::debug!("{}: {error}", bundle.display());
    }
    let config: Value = serde_json::from_slice(&text).unwrap_or_default();
    let hooks = spec::hooks(config.pointer("/hooks/createRuntime"));
    hooks.map(|args| device(&args)).collect()
}

/// Returns the pool and the list in the arguments of a hook.
fn device(args: &[&str]) -> String {
    let value = |flag: &str| args.iter().find_map(|arg| arg.strip_prefix(flag));
    [value("--pool="), value("--list=")].into_iter().flatten().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_names_a_process_and_a_bundle() {
        let text = br#"{"ociVersion":"1.0.2","id":"c","status":"creating","pid":42,"bundle":"/b","annotations":{"a":"b"}}"#;
        assert_eq!(Container::parse(text).unwrap(), Container { pid: 42, bundle: Some("/b".into()) });
        assert_eq!(Container::parse(br#"{"pid":1}"#).unwrap(), Container { pid: 1, bundle: None });
    }

    #[test]
    fn anything_else_is_one_line() {
        let deep = "[".repeat(100_000);
        for text in [
            "",
            "{",
            "null",
            "[]",
            "\"pid\"",
            "{}",
            r#"{"pid":0}"#,
            r#"{"pid":-1}"#,
            r#"{"pid":"42"}"#,
            r#"{"pid":4.2}"#,
            r#"{"pid":2147483648}"#,
            r#"{"pid":18446744073709551617}"#,
            r#"{"pid":null}"#,
            "{\"pid\":\n\u{1b}[2J}",
            deep.as_str(),
        ] {
            let error = format!("{:#}", Container::parse(text.as_bytes()).unwrap_err());
            assert!(error.starts_with("standard input: ") && error.len() < 200, "{error}");
            assert!(!error.contains(char::is_control), "{error}");
        }
    }

    #[test]
    fn the_devices_of_a_bundle_are_those_of_its_hooks() {
        let home = tempfile::tempdir().unwrap();
        let config = home.path().join("config.json");
        for (text, expected) in [
            ("", &[][..]),
            ("{", &[]),
            (r#"{"hooks":{}}"#, &[]),
            (
                r#"{"hooks":{"createRuntime":[{"path":"/x","args":["x","hook","--pool=p"]},{"path":"/y"},7]}}"#,
                &[],
            ),
            (
                r#"{"hooks":{"createRuntime":[{"path":"/k","args":["kcm","hook","--pool=p","--conf-dir=/c","--list=0,4"]},
                {"path":"/k","args":["kcm","hook","--pool=q"]}]}}"#,
                &["p 0,4", "q"],
            ),
        ] {
            std::fs::write(&config, text).unwrap();
            assert_eq!(devices(home.path()), expected, "{text}");
        }
        std::fs::remove_file(&config).unwrap();
        assert_eq!(devices(home.path()), [""; 0]);
        nix::unistd::mkfifo(&config, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(devices(home.path()), [""; 0], "it does not wait for a writer");
    }
}
