//! Options before the command: `kcm --conf-dir=/c describe`, as the legacy kcm understood them.
//!
//! Owns the order of the words. Does not know what an option means: clap parses it behind the command, to which it belongs.

use std::ffi::{OsStr, OsString};

use clap::{ArgAction, Command};

/// Moves options that precede the command behind it. Returns other command lines as they are. `args`: with the name of the
/// program.
pub(super) fn command_first(args: Vec<OsString>, definitions: &Command) -> Vec<OsString> {
    let mut command = 1;
    while let Some(option) = args.get(command).and_then(|word| word.to_str()?.strip_prefix("--")) {
        // These are of kcm itself, and -- ends the options.
        if ["", "help", "version"].contains(&option) {
            return args;
        }
        command += if takes_next_word(option, definitions) { 2 } else { 1 };
    }
    let is_command = |word: &OsStr| definitions.find_subcommand(word).is_some();
    if !args.get(command).is_some_and(|word| is_command(word)) {
        return args;
    }
    let mut args = args;
    if let Some(words) = args.get_mut(1..=command) {
        words.rotate_right(1);
    }
    args
}

/// Whether the value of an option is the next word. The option may be abbreviated.
fn takes_next_word(option: &str, definitions: &Command) -> bool {
    let all = definitions.get_subcommands().flat_map(Command::get_arguments);
    let mut meant = all.filter(|arg| arg.get_long().is_some_and(|long| long.starts_with(option)));
    meant.any(|arg| {
        matches!(arg.get_action(), ArgAction::Set | ArgAction::Append) && !arg.is_require_equals_set()
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::Cli;

    fn ordered(line: &str) -> String {
        let words = std::iter::once("kcm").chain(line.split(' ')).map(OsString::from).collect();
        let words = command_first(words, &Cli::command());
        words.iter().skip(1).map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn options_move_behind_the_command() {
        for (typed, meant) in [
            ("--conf-dir=/c describe", "describe --conf-dir=/c"),
            ("--conf-dir /c describe", "describe --conf-dir /c"),
            ("--conf describe describe", "describe --conf describe"),
            ("--conf-dir=/c --format table describe", "describe --conf-dir=/c --format table"),
            ("--publish reconcile --interval=1", "reconcile --publish --interval=1"),
            ("--pool=p --wait isolate x -- --y", "isolate --pool=p --wait x -- --y"),
        ] {
            assert_eq!(ordered(typed), meant);
        }
        for same in [
            "describe --conf-dir=/c",
            "--version",
            "--help describe",
            "-h",
            "--conf-dir=/c",
            "--conf-dir /c",
            "--conf-dir=/c no-command",
            "-- describe",
            "isolate --pool=p -- kcm --conf-dir=/c describe",
        ] {
            assert_eq!(ordered(same), same);
        }
    }
}
