//! `kcm apply` and `kcm export`: the whole configuration as a file.
//!
//! Owns the text around it, YAML or JSON, and what is printed. The daemon makes it the configuration, as a whole or not at
//! all. Does not know which changes that needs.

use std::fs;
use std::io::{self, Read as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Error, anyhow};
use kcm_mount::model::document::{self, Document, Order, PoolSpec};

use super::common::output::print;
use super::common::yaml;
use crate::cli;
use crate::confdir::{self, ConfDir};

/// Makes a file the configuration, and prints what has changed.
///
/// # Errors
/// The file is not a configuration, or the daemon refuses it; then nothing has changed.
pub(super) fn apply(args: &cli::Apply) -> Result<ExitCode, Error> {
    let (name, text) = read(&args.file)?;
    let wanted: Document = yaml::parse(&name, &text)?;
    let specs = checked(&wanted)
        .map_err(|(pool, why)| yaml::at(&name, line_of(&text, &pool), &format!("pool {pool}: {why}")))?;
    let dir = ConfDir::open_mounted(&args.dir.conf_dir)?;
    let before =
        checked(&dir.document()?).map_err(|(pool, why)| anyhow!("pool {pool} of the daemon: {why}"))?;
    let mut lines = document::differences(&before, &specs);
    if lines.is_empty() {
        lines.push("unchanged".to_owned());
    }
    let output = lines.join("\n") + "\n";
    if args.dry_run {
        print(&output)?;
    }
    // Also if there seems to be no difference: somebody may have changed something meanwhile.
    dir.apply(&Order { pools: wanted.pools, force: args.force, dry_run: args.dry_run })?;
    if !args.dry_run {
        print(&output)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints the configuration in the form that [`apply`] takes.
///
/// # Errors
/// It cannot be read.
pub(super) fn export(args: &cli::Export) -> Result<ExitCode, Error> {
    let document = ConfDir::open_mounted(&args.dir.conf_dir)?.document()?;
    print(&serde_saphyr::to_string(&document).context("the configuration cannot be written as YAML")?)?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the name of the file for messages, and its text.
fn read(file: &Path) -> Result<(String, String), Error> {
    if file == Path::new("-") {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).context("stdin cannot be read; it has to be UTF-8 text")?;
        return Ok(("stdin".to_owned(), text));
    }
    let text = fs::read_to_string(file).map_err(|error| confdir::file_error(file, error))?;
    Ok((file.display().to_string(), text))
}

fn checked(document: &Document) -> Result<Vec<PoolSpec>, (String, String)> {
    document::specs(&document.pools).map_err(|(pool, refusal)| (pool, refusal.sentence("a task")))
}

/// Returns the line in which a pool begins.
fn line_of(text: &str, pool: &str) -> Option<u64> {
    let keys = [format!("{pool}:"), format!("\"{pool}\":"), format!("'{pool}':")];
    let begins = |line: &str| keys.iter().any(|key| line.trim_start().starts_with(key));
    (1..).zip(text.lines()).find(|(_, line)| begins(line)).map(|(number, _)| number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str, text: &str) -> Result<Document, Error> {
        yaml::parse(name, text)
    }

    const WHOLE: &str = "\
# Two pools.
pools:
  dataplane:
    exclusive: true
    mode: isolated
    lists: [0-1, 2, {cpus: 3, tasks: {group: 7, mode: 0660}}]
  infra:
    tasks: {owner: 1000, mode: \"666\"}
    lists:
      - 4-7
";

    #[test]
    fn a_file_is_yaml_and_what_is_exported_is_the_same() {
        let document = parse("f", WHOLE).unwrap();
        let json = serde_json::to_string(&document).unwrap();
        let expected = r#"{"pools":{"dataplane":{"exclusive":true,"mode":"isolated","lists":["0-1","2",{"cpus":"3","tasks":{"group":7,"mode":"0660"}}]},"infra":{"tasks":{"owner":1000,"mode":"0666"},"lists":["4-7"]}}}"#;
        assert_eq!(json, expected);
        assert_eq!(parse("f", &json).unwrap(), document, "JSON is YAML");
        let yaml = serde_saphyr::to_string(&document).unwrap();
        assert_eq!(parse("f", &yaml).unwrap(), document, "{yaml}");
    }

    #[test]
    fn an_error_names_file_line_and_reason() {
        for (text, expected) in [
            ("pools:\n  a:\n    list: [0]\n", "f:3: unknown field"),
            ("pools:\n  a: {\n", "f:"),
            ("pools:\n  a:\n    mode: fast\n", "f:3: unknown variant"),
            ("pools:\n  a:\n    tasks:\n      mode: 888\n", "f:4: "),
            ("", "f:1: "),
        ] {
            let error = parse("f", text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text:?}: {error}");
            assert!(!error.contains('\n') && !error.contains(" at line "), "{error}");
        }
        let document = parse("f", "pools:\n  a: {lists: [0-1]}\n  b: {lists: [1]}\n").unwrap();
        let (pool, why) = checked(&document).unwrap_err();
        assert_eq!((pool.as_str(), why.as_str()), ("b", "CPU 1 is in a 0-1 already; remove that list first"));
        assert_eq!(line_of("pools:\n  a: {}\n  b: {}\n", "b"), Some(3));
    }
}
