//! Messages on stderr, in the legacy format `WARNING:root:text`, which scripts parse.
//!
//! Owns `KCM_LOG_LEVEL` and the format of a line. Does not know who logs.
//!
//! A line to the journal begins with its priority (sd-daemon(3)), and has no time of its own.

use kcm_mount::{daemon, text};
use log::{Level, LevelFilter, Log, Metadata, Record};

/// The environment variable with the level.
const VARIABLE: &str = "KCM_LOG_LEVEL";

struct Stderr;

/// Installs the logger with the level from the environment; the default is INFO.
pub(crate) fn init() {
    let wanted = std::env::var(VARIABLE).ok();
    let level = wanted.as_deref().map_or(Some(LevelFilter::Info), level);
    log::set_max_level(level.unwrap_or(LevelFilter::Info));
    // Fails only if there is a logger already.
    let _ = log::set_logger(&Stderr);
    if level.is_none() {
        log::warn!(
            "{VARIABLE}={}: not a level; using INFO; give CRITICAL, ERROR, WARNING, INFO or DEBUG",
            wanted.unwrap_or_default()
        );
    }
}

/// Returns the level of a legacy name, in upper or lower case.
fn level(name: &str) -> Option<LevelFilter> {
    Some(match name.to_ascii_uppercase().as_str() {
        // kcm logs no message above ERROR, so this level prints nothing.
        "CRITICAL" => LevelFilter::Off,
        "ERROR" => LevelFilter::Error,
        "WARNING" => LevelFilter::Warn,
        "INFO" | "" => LevelFilter::Info,
        "DEBUG" => LevelFilter::Debug,
        _ => return None,
    })
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Messages of libraries are for their developers.
        metadata.target().starts_with("kcm")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let (name, priority) = match record.level() {
            Level::Error => ("ERROR", 3),
            Level::Warn => ("WARNING", 4),
            Level::Info => ("INFO", 6),
            Level::Debug | Level::Trace => ("DEBUG", 7),
        };
        let start = if is_journal() {
            format!("<{priority}>")
        } else if daemon::writes_to_log() {
            // Messages to a terminal have no time, as in the legacy kcm.
            daemon::timestamp() + " "
        } else {
            String::new()
        };
        // A message may contain a path or a word that somebody else chose.
        let message = record.args().to_string();
        let message = text::one_line(&message);
        daemon::write_message(format!("{start}{name}:root:{message}\n"));
    }

    fn flush(&self) {}
}

/// Whether standard error is a stream of the journal: systemd names its device and inode (systemd.exec(5)).
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    nix::sys::stat::fstat(std::io::stderr())
        .is_ok_and(|file| stream == format!("{}:{}", file.st_dev, file.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_have_their_legacy_names() {
        assert_eq!(level("CRITICAL"), Some(LevelFilter::Off));
        assert_eq!(level("WARNING"), Some(LevelFilter::Warn));
        assert_eq!(level(""), Some(LevelFilter::Info));
        assert_eq!(level("debug"), Some(LevelFilter::Debug));
        assert_eq!(level("LOUD"), None);
    }
}
