//! The first and the last line of each page.
//!
//! Owns the name of the manual. Does not know the pages.

use crate::version::VERSION;

/// The name of the manual, in the middle of the first line of a page.
pub(super) const MANUAL: &str = "kcm Manual";

/// Returns the date of the program, for the last line of a page; a blank if it is not known, because an empty word would be
/// left out.
pub(super) fn date() -> &'static str {
    let date = VERSION.rsplit_once(' ').and_then(|(_, date)| date.strip_suffix(')'));
    date.unwrap_or(" ")
}

/// Returns the program and its version, for the last line of a page.
pub(super) fn source() -> String {
    format!("kcm {}", VERSION.split(' ').next().unwrap_or(VERSION))
}
