//! `kcm completions`, and the completion of command lines.
//!
//! Owns what is offered for a value: pools, CPU lists, nodes and commands of this moment. clap_complete does the rest, but
//! for bash the words are prepared here. Does not know how a directory is read.
//!
//! A script asks this program at each completion, with the variable `KCM_COMPLETE`. The shell waits for the answer, so
//! another process reads the mount and is given up after a bounded time.

mod bash;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Error};
use clap::{CommandFactory as _, ValueHint};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use clap_complete::env::{Elvish, Fish, Powershell, Shells, Zsh};
use clap_complete::{CompleteEnv, Shell};
use serde::Deserialize;

use super::cluster_init::nodes;
use super::common::other_process::output_within;
use super::common::output::print;
use super::manual;
use crate::cli;
use crate::kubernetes::Cluster;

/// The variable that asks for a completion, and names the shell.
const VARIABLE: &str = "KCM_COMPLETE";
/// How long a shell waits for names at most.
const MOST: Duration = Duration::from_secs(1);
const SHELLS: Shells<'_> = Shells(&[&bash::Bash, &Elvish, &Fish, &Powershell, &Zsh]);
/// The end of the script for zsh. A file of a completion is the body of a function, which has to complete when it is called
/// for the first time.
const ZSH_AUTOLOAD: &str = "\nif [[ $funcstack[1] == _kcm ]]; then _clap_dynamic_completer_kcm \"$@\"; fi\n";

/// Completes a command line and exits, if the script of a shell asks for that.
pub(crate) fn complete_if_asked() {
    CompleteEnv::with_factory(definitions).var(VARIABLE).shells(SHELLS).completer("kcm").complete();
}

/// Prints the completion script for a shell, or the names of the nodes for it.
pub(super) fn run(args: &cli::Completions) -> Result<ExitCode, Error> {
    match args.shell {
        Some(shell) => print(&String::from_utf8_lossy(&script(shell)?))?,
        None => print(&nodes(&Cluster::find(MOST)?)?.join("\n"))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the completion script for a shell.
pub(super) fn script(shell: Shell) -> Result<Vec<u8>, Error> {
    let completer =
        SHELLS.completer(&shell.to_string()).with_context(|| format!("{shell}: unknown shell"))?;
    let mut script = Vec::new();
    completer.write_registration(VARIABLE, "kcm", "kcm", "kcm", &mut script)?;
    if shell == Shell::Zsh {
        script.extend_from_slice(ZSH_AUTOLOAD.as_bytes());
    }
    Ok(script)
}

/// Returns the definitions of all commands, with what is offered for their values. A value is known by the name of its flag,
/// so that each command with such a flag completes it.
fn definitions() -> clap::Command {
    cli::Cli::command().mut_subcommands(|command| {
        let of_man = command.get_name() == "man";
        command.mut_args(|arg| match arg.get_id().as_str() {
            "pool" => arg.add(ArgValueCandidates::new(pools)),
            "list" => arg.add(ArgValueCandidates::new(lists)),
            "node" | "host_list" => arg.add(ArgValueCandidates::new(nodes_of_cluster)),
            "command" if of_man => arg.add(ArgValueCandidates::new(pages)),
            "command" => arg.value_hint(ValueHint::CommandName),
            "words" => arg.value_hint(ValueHint::CommandWithArguments),
            "rest" => arg.value_hint(ValueHint::AnyPath),
            _ => arg,
        })
    })
}

/// The part of the output of `kcm describe` that is used here.
#[derive(Default, Deserialize)]
struct Described {
    pools: BTreeMap<String, Pool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Pool {
    cpu_lists: BTreeMap<String, List>,
    exclusive: bool,
}

#[derive(Deserialize)]
struct List {
    tasks: Vec<u32>,
}

/// The pools, each with its kind.
fn pools() -> Vec<CompletionCandidate> {
    let candidate = |(name, pool): (String, Pool)| {
        let kind = if pool.exclusive { "exclusive" } else { "shared" };
        CompletionCandidate::new(name).help(Some(format!("{kind}, lists: {}", pool.cpu_lists.len()).into()))
    };
    described().pools.into_iter().map(candidate).collect()
}

/// The CPU lists of the pool in the command line, or of all pools, each with its tasks.
fn lists() -> Vec<CompletionCandidate> {
    let wanted = word_of("--pool");
    let pools = described().pools.into_iter();
    let pools = pools.filter(|(name, _)| wanted.as_ref().is_none_or(|wanted| wanted == name));
    let candidate = |(name, list): (String, List)| {
        let tasks =
            if list.tasks.is_empty() { "free".to_owned() } else { format!("tasks: {}", list.tasks.len()) };
        CompletionCandidate::new(name).help(Some(tasks.into()))
    };
    pools.flat_map(|(_, pool)| pool.cpu_lists).map(candidate).collect()
}

/// The nodes of the cluster, if there is one that answers.
fn nodes_of_cluster() -> Vec<CompletionCandidate> {
    let names = asked(&["completions".into(), "--nodes".into()]).unwrap_or_default();
    names.lines().map(CompletionCandidate::new).collect()
}

/// The names of man pages.
fn pages() -> Vec<CompletionCandidate> {
    let of = |command: &clap::Command| {
        CompletionCandidate::new(command.get_name()).help(command.get_about().cloned())
    };
    let directory = CompletionCandidate::new(manual::DIRECTORY)
        .help(Some("The files of the configuration directory".into()));
    cli::Cli::command().get_subcommands().map(of).chain([directory]).collect()
}

/// Returns what `kcm describe` prints for the directory in the command line; nothing if it does not answer in time.
fn described() -> Described {
    let mut words = vec![OsString::from("describe")];
    if let Some(conf_dir) = word_of("--conf-dir") {
        words.push(format!("--conf-dir={conf_dir}").into());
    }
    asked(&words).and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

/// Returns the output of this program with these words, if it comes in time.
fn asked(words: &[OsString]) -> Option<String> {
    let mut command = Command::new("/proc/self/exe");
    command.args(words).env_remove(VARIABLE).env("KCM_LOG_LEVEL", "CRITICAL").stderr(Stdio::null());
    output_within(command, MOST).ok().flatten()
}

/// Returns the value of a flag in the command line that is completed.
fn word_of(flag: &str) -> Option<String> {
    let words: Vec<String> = std::env::args().skip_while(|word| word != "--").skip(2).collect();
    value_of(flag, &words)
}

/// Returns the value of a flag in these words, in one of its spellings: `--flag=value`, `--flag value`, and what bash makes of
/// the first one, `--flag`, `=` and `value`.
fn value_of(flag: &str, words: &[String]) -> Option<String> {
    let place = words.iter().position(|word| word.split('=').next() == Some(flag))?;
    let (first, rest) = words.get(place..)?.split_first()?;
    let value = match first.split_once('=') {
        Some((_, value)) => value,
        None => rest.iter().find(|word| *word != "=")?,
    };
    Some(value.to_owned()).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_has_its_value_in_every_spelling() {
        let value = |words: &str| {
            let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
            value_of("--pool", &words)
        };
        for words in ["isolate --pool=web", "isolate --pool web", "isolate --pool = web --list"] {
            assert_eq!(value(words).as_deref(), Some("web"), "{words}");
        }
        for words in ["isolate", "isolate --pool", "isolate --pool=", "isolate --pools=web"] {
            assert_eq!(value(words), None, "{words}");
        }
    }

    #[test]
    fn the_definitions_with_completions_are_consistent() {
        definitions().debug_assert();
    }
}
