//! Text that others chose, made safe to show: names of programs, pools and lists.
//!
//! Owns the choice between showing a character and showing an escape. Does not know the source of the text.
//!
//! The rules: one line stays one line; no character changes how the text around it is displayed (control, format and
//! bidirectional characters, invisible ones); and no name looks like a shorter name with a text of kcm behind it.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Returns a name as it is if it consists of letters, digits and harmless signs, else in double quotes with escapes.
///
/// In the quotes, `"` and `\` have a backslash, bytes that are not UTF-8 are `\xff`, and characters that are not
/// printable are `\u{202e}`. Parentheses and commas are `\u{28}` and so on, because lists of names use them:
/// `4711 (sleep), 4712 ("x\u{29}\u{2c} 1 \u{28}init")`.
#[must_use]
pub fn name(bytes: &[u8]) -> Cow<'_, str> {
    match str::from_utf8(bytes) {
        Ok(name) if !name.is_empty() && name.chars().all(is_plain) => Cow::Borrowed(name),
        _ => Cow::Owned(format!("\"{}\"", escaped(bytes))),
    }
}

/// Returns what stands between the quotes of [`name`].
#[must_use]
pub fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '"' | '\\' => text.extend(['\\', c]),
                '(' | ')' | ',' => text.extend(c.escape_unicode()),
                c => push_visible(&mut text, c),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// Returns a message with escapes for every character that is not printable, line ends included. Other characters
/// stay, also quotes and backslashes: the message itself is ours.
#[must_use]
pub fn one_line(message: &str) -> Cow<'_, str> {
    if message.chars().all(is_visible) {
        return Cow::Borrowed(message);
    }
    let mut text = String::with_capacity(message.len() + 8);
    message.chars().for_each(|c| push_visible(&mut text, c));
    Cow::Owned(text)
}

fn push_visible(text: &mut String, c: char) {
    match c {
        c if is_visible(c) => text.push(c),
        '\n' | '\t' | '\r' => text.extend(c.escape_default()),
        c => text.extend(c.escape_unicode()),
    }
}

/// Whether a terminal shows the character as a sign of its own. `escape_debug` knows control, format, private and
/// unassigned characters, separators, and those that combine with the sign before.
fn is_visible(c: char) -> bool {
    match c {
        '"' | '\'' | '\\' | ' ' => true,
        c if c.is_ascii() => c.is_ascii_graphic(),
        // Letters and a sign that are displayed as blanks.
        '\u{115f}' | '\u{1160}' | '\u{3164}' | '\u{ffa0}' | '\u{2800}' => false,
        c => c.escape_debug().len() == 1,
    }
}

fn is_plain(c: char) -> bool {
    if c.is_ascii() {
        c.is_ascii_alphanumeric() || "-_.:/@+=%~#[]*".contains(c)
    } else {
        c.is_alphanumeric() && is_visible(c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn harmless_names_are_shown_as_they_are() {
        for text in ["sleep", "kworker/0:1", "a.out", "zoë", "日本", "python3.11", "x[1]"] {
            assert_eq!(name(text.as_bytes()), text);
        }
    }

    #[test]
    fn other_names_are_quoted_and_escaped() {
        for (bytes, shown) in [
            (&b""[..], r#""""#),
            (b"tmux: server", r#""tmux: server""#),
            (b"x), 1 (init", r#""x\u{29}\u{2c} 1 \u{28}init""#),
            (b"a\"b\\n", r#""a\"b\\n""#),
            (b"a\nb\x1b[2J\0", r#""a\nb\u{1b}[2J\u{0}""#),
            (b"a\xffb", r#""a\xffb""#),
            ("\u{202e}tini".as_bytes(), r#""\u{202e}tini""#),
            ("a\u{2028}b\u{2066}c\u{200b}d\u{feff}".as_bytes(), r#""a\u{2028}b\u{2066}c\u{200b}d\u{feff}""#),
            ("a\u{301}\u{3164}".as_bytes(), r#""a\u{301}\u{3164}""#),
            ("a\u{a0}b\u{85}".as_bytes(), r#""a\u{a0}b\u{85}""#),
            (b"x;y", r#""x;y""#),
        ] {
            assert_eq!(name(bytes), shown);
        }
    }

    #[test]
    fn a_message_keeps_its_quotes_and_stays_one_line() {
        assert_eq!(one_line("\"a\": b\\c (d), ä"), "\"a\": b\\c (d), ä");
        assert_eq!(one_line("a\nERROR:root:b\r\u{202e}"), r"a\nERROR:root:b\r\u{202e}");
    }

    proptest! {
        #[test]
        fn different_names_are_shown_differently(a in prop::collection::vec(any::<u8>(), 0..12),
            b in prop::collection::vec(any::<u8>(), 0..12)) {
            prop_assert_eq!(name(&a) == name(&b), a == b);
        }

        #[test]
        fn what_is_shown_is_visible_and_has_no_frame(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let shown = name(&bytes);
            prop_assert!(shown.chars().all(is_visible));
            prop_assert!(!shown.contains(['(', ')', ',']));
        }
    }
}
