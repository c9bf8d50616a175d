//! Messages for people: `WARNING:root:text` on stderr, as in 2017; scripts parse them.
//!
//! Owns: levels and the form of a line. Must not know: who logs.

use std::io::Write as _;

use kcm_mount::daemon;
use log::{Level, LevelFilter, Log, Metadata, Record};

/// The environment variable that adjusts verbosity.
const VARIABLE: &str = "KCM_LOG_LEVEL";

struct Stderr;

/// Takes up the level that the environment asks for; INFO where it asks for none.
pub(crate) fn init() {
    let wanted = std::env::var(VARIABLE).ok();
    let level = wanted.as_deref().map_or(Some(LevelFilter::Info), level);
    log::set_max_level(level.unwrap_or(LevelFilter::Info));
    // Fails where there is a logger already: there is none.
    let _ = log::set_logger(&Stderr);
    if level.is_none() {
        log::warn!(
            "{VARIABLE}={}: not a level; using INFO; give CRITICAL, ERROR, WARNING, INFO or DEBUG",
            wanted.unwrap_or_default()
        );
    }
}

fn level(name: &str) -> Option<LevelFilter> {
    Some(match name {
        // Nothing of ours is worse than an error.
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
        // What the libraries below tell of is for their own people.
        metadata.target().starts_with("kcm")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let name = match record.level() {
            Level::Error => "ERROR",
            Level::Warn => "WARNING",
            Level::Info => "INFO",
            Level::Debug | Level::Trace => "DEBUG",
        };
        // A log is for those who come later: they want to know when.
        let time = if daemon::writes_to_log() { daemon::timestamp() + " " } else { String::new() };
        // One write, so that lines of several processes do not mix. Where stderr is gone, nobody reads.
        let _ = std::io::stderr().write_all(format!("{time}{name}:root:{}\n", record.args()).as_bytes());
    }

    fn flush(&self) {}
}
