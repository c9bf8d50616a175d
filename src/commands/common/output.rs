//! Output of commands: stdout, JSON text, and an error as one line.
//!
//! Owns the form of output. Does not know what is printed.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Write as _};
use std::path::Path;

use anyhow::Error;
use kcm_mount::daemon::MountError;
use serde_json::Value;

use crate::confdir;

/// Writes `text` to stdout, which carries only what the user asked for; messages go to stderr.
///
/// # Errors
/// stdout cannot be written.
pub(crate) fn print(text: &str) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        // `display_error` knows it.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(error.into()),
        Err(error) => Err(confdir::file_error(Path::new("standard output"), error)),
    }
}

/// Returns `value` as the legacy kcm printed JSON: sorted keys, an indentation of two spaces, a newline at the
/// end, and only ASCII.
pub(crate) fn json_text(value: &Value) -> String {
    ascii(&format!("{value:#}\n"))
}

/// Returns JSON text with only ASCII.
pub(crate) fn ascii(json: &str) -> String {
    let mut text = String::new();
    for c in json.chars() {
        if c.is_ascii() {
            text.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(text, "\\u{unit:04x}");
            }
        }
    }
    text
}

/// Returns the line that shows `error` to the user, or `None` if the user must not see one.
pub(crate) fn display_error(error: &Error) -> Option<String> {
    // The background process has printed its own message.
    if matches!(error.downcast_ref(), Some(MountError::Background)) {
        return None;
    }
    // The reader of stdout has exited (`kcm describe | head -1`): that is not an error to report.
    let is_broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
    };
    if error.chain().any(is_broken_pipe) {
        return None;
    }
    Some(format!("{error:#}").replace('\n', " "))
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;
    use serde_json::json;

    use super::*;

    #[test]
    fn json_is_ascii_sorted_and_indented_by_two() {
        let value = json!({ "b": [], "a": { "ä😀": {} }, "c": [1] });
        let text = "{\n  \"a\": {\n    \"\\u00e4\\ud83d\\ude00\": {}\n  },\n  \"b\": [],\n  \"c\": [\n    1\n  ]\n}\n";
        assert_eq!(json_text(&value), text);
    }

    #[test]
    fn an_error_is_one_line_with_its_causes() {
        let error = Err::<(), _>(io::Error::other("two\nlines")).context("file").unwrap_err();
        assert_eq!(display_error(&error).as_deref(), Some("file: two lines"));
    }

    #[test]
    fn a_closed_pipe_and_a_shown_error_are_silent() {
        let closed = Err::<(), _>(io::Error::from(ErrorKind::BrokenPipe)).context("stdout").unwrap_err();
        assert_eq!(display_error(&closed), None);
        assert_eq!(display_error(&MountError::Background.into()), None);
    }
}
