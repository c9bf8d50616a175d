//! YAML that a user has written.
//!
//! Owns the form of the error: file, line and reason on one line. Does not know what the text is about.

use anyhow::{Error, anyhow};
use serde::de::DeserializeOwned;

/// Parses YAML. JSON is a part of it. `name`: the file, for messages.
///
/// # Errors
/// The text is not YAML, or not a `T`.
pub(crate) fn parse<T: DeserializeOwned>(name: &str, text: &str) -> Result<T, Error> {
    serde_saphyr::from_str(text).map_err(|error| {
        let line = error.location().map(|location| location.line());
        let error = error.without_snippet().to_string();
        // The line is named in front.
        let why = error.lines().next().unwrap_or_default();
        at(name, line, why.rsplit_once(" at line ").map_or(why, |(why, _)| why))
    })
}

/// Returns an error about a line of a file.
pub(crate) fn at(file: &str, line: Option<u64>, why: &str) -> Error {
    match line {
        Some(line) => anyhow!("{file}:{line}: {why}"),
        None => anyhow!("{file}: {why}"),
    }
}
