//! Completion for bash.
//!
//! Owns the script, and the words: bash splits a line at `=` and `:` too (COMP_WORDBREAKS), and replaces only the part after
//! the last of them. Does not know what is offered.

use std::ffi::OsString;
use std::io::{Error, Write};
use std::path::Path;

use clap::Command;
use clap_complete::engine::complete;
use clap_complete::env::EnvCompleter;

/// The variable with the number of the word that is completed, which the script sets.
const INDEX: &str = "KCM_COMPLETE_INDEX";

/// The completion for bash, instead of the one in clap_complete, which does not complete `--flag=<value>`.
pub(super) struct Bash;

impl EnvCompleter for Bash {
    fn name(&self) -> &'static str {
        "bash"
    }

    fn is(&self, name: &str) -> bool {
        name == "bash"
    }

    fn write_registration(
        &self,
        var: &str,
        name: &str,
        bin: &str,
        completer: &str,
        buf: &mut dyn Write,
    ) -> Result<(), Error> {
        write!(
            buf,
            r#"_{name}() {{
    local words=("${{COMP_WORDS[@]}}")
    # $2 has no text behind the cursor. It is empty if the cursor is behind an equals sign.
    [[ ${{words[COMP_CWORD]}} == = ]] || words[COMP_CWORD]=$2
    mapfile -t COMPREPLY < <({var}=bash {INDEX}=$COMP_CWORD {completer} -- "${{words[@]}}" 2>/dev/null)
    # More is to come after a flag with a value, or a directory.
    if [[ ${{#COMPREPLY[@]}} == 1 && $COMPREPLY == *[=/] ]]; then
        compopt -o nospace
    fi
}}
complete -o bashdefault -o default -F _{name} {bin}
"#
        )
    }

    fn write_complete(
        &self,
        cmd: &mut Command,
        args: Vec<OsString>,
        current_dir: Option<&Path>,
        buf: &mut dyn Write,
    ) -> Result<(), Error> {
        let index = std::env::var(INDEX).ok().and_then(|index| index.parse().ok()).unwrap_or_default();
        let (args, index, shown) = joined(args, index);
        for candidate in complete(cmd, args, index, current_dir)? {
            let value = candidate.get_value().to_string_lossy();
            writeln!(buf, "{}", value.get(shown..).unwrap_or_default())?;
        }
        Ok(())
    }
}

/// Joins a flag, `=` and its value, which bash passes as three words. Returns the words, the index of the one that is
/// completed, and the length of its part that bash does not replace.
fn joined(words: Vec<OsString>, index: usize) -> (Vec<OsString>, usize, usize) {
    let (mut found, mut new_index, mut kept) = (Vec::<OsString>::new(), 0, 0);
    let mut is_open = false;
    for (number, word) in words.into_iter().enumerate() {
        let is_sign = word == "=";
        let length = match found.last_mut() {
            Some(flag) if is_sign && is_flag(flag) => {
                flag.push("=");
                is_open = true;
                flag.len()
            }
            Some(flag) if is_open => {
                let length = flag.len();
                flag.push(word);
                is_open = false;
                length
            }
            _ => {
                found.push(word);
                0
            }
        };
        if number == index {
            (new_index, kept) = (found.len().saturating_sub(1), length);
        }
    }
    (found, new_index, kept)
}

/// Whether this is a flag without a value.
fn is_flag(word: &OsString) -> bool {
    let bytes = word.as_encoded_bytes();
    bytes.starts_with(b"--") && bytes.len() > 2 && !bytes.contains(&b'=')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_and_its_value_are_one_word() {
        let joined = |words: &str, index| {
            let (words, index, kept) = joined(words.split(' ').map(OsString::from).collect(), index);
            let words: Vec<String> = words.into_iter().map(|word| word.into_string().unwrap()).collect();
            (words.join(" "), index, kept)
        };
        let expect = |words: &str, index, kept| (words.to_owned(), index, kept);
        assert_eq!(joined("kcm isolate --pool =", 3), expect("kcm isolate --pool=", 2, 7));
        assert_eq!(joined("kcm isolate --pool = da", 4), expect("kcm isolate --pool=da", 2, 7));
        assert_eq!(joined("kcm isolate --pool = da --wa", 5), expect("kcm isolate --pool=da --wa", 3, 0));
        assert_eq!(joined("kcm isolate --pool = da = x", 5), expect("kcm isolate --pool=da = x", 3, 0));
        assert_eq!(joined("kcm isolate --pool da", 3), expect("kcm isolate --pool da", 3, 0));
        assert_eq!(joined("kcm isolate -- = x", 4), expect("kcm isolate -- = x", 4, 0));
        assert_eq!(joined("kcm ", 1), expect("kcm ", 1, 0));
    }
}
