//! The request for this node: the numbers of cores, and whether the data plane is isolated.
//!
//! Owns the file of `--layouts` and its precedence over the flags. Does not know the machine.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context as _, Error};
use serde::Deserialize;
use serde::de::{Deserializer, Visitor};

use crate::cli::{self, Cores};
use crate::commands::common::yaml;
use crate::confdir;

/// The entry for nodes without one, and for the fields that an entry leaves out.
const DEFAULT: &str = "default";

/// The requested pools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) dataplane: Cores,
    pub(super) controlplane: Cores,
    /// Whether the data plane is isolated.
    pub(super) isolated: bool,
}

/// The fields of a node in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dataplane: Option<Count>,
    controlplane: Option<Count>,
    isolated: Option<bool>,
}

/// The file: an entry per node.
type File = BTreeMap<String, Option<Entry>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Count(Cores);

impl Layout {
    /// Returns what the flags and the file of `--layouts` request. `node`: the name of this node.
    ///
    /// # Errors
    /// The file cannot be read, or the name of the node is not known.
    pub(super) fn requested(args: &cli::Init, node: Option<&str>) -> Result<Self, Error> {
        let flags =
            Self { dataplane: args.num_dp_cores, controlplane: args.num_cp_cores, isolated: args.isolated };
        let Some(file) = &args.layouts else { return Ok(flags) };
        let node =
            node.context("which node is this? --layouts needs its name: set NODE_NAME, or give --node")?;
        Ok(flags.changed(&read(file)?, node))
    }

    /// Returns the layout of a node, which has the fields of its entry, else of the default entry, else of this layout.
    fn changed(self, file: &File, node: &str) -> Self {
        let entry = |name: &str| file.get(name).copied().flatten().unwrap_or_default();
        let (own, default) = (entry(node), entry(DEFAULT));
        let cores = |own: Option<Count>, default: Option<Count>| own.or(default).map(|count| count.0);
        Self {
            dataplane: cores(own.dataplane, default.dataplane).unwrap_or(self.dataplane),
            controlplane: cores(own.controlplane, default.controlplane).unwrap_or(self.controlplane),
            isolated: own.isolated.or(default.isolated).unwrap_or(self.isolated),
        }
    }
}

fn read(file: &Path) -> Result<File, Error> {
    match fs::read_to_string(file) {
        Ok(text) => parse(&file.display().to_string(), &text),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(File::new()),
        Err(error) => Err(confdir::file_error(file, error)),
    }
}

fn parse(name: &str, text: &str) -> Result<File, Error> {
    let is_blank = |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#');
    if text.lines().all(is_blank) { Ok(File::new()) } else { yaml::parse(name, text) }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(CountVisitor)
    }
}

struct CountVisitor;

impl Visitor<'_> for CountVisitor {
    type Value = Count;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of cores, or auto")
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Count, E> {
        usize::try_from(number).map(|number| Count(Cores::Number(number))).map_err(E::custom)
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Count, E> {
        usize::try_from(number)
            .map(|number| Count(Cores::Number(number)))
            .map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(number), &self))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Count, E> {
        match text {
            "auto" => Ok(Count(Cores::Auto)),
            _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "\
# The nodes of the first rack have eight cores.
default: {dataplane: auto, isolated: true}
node1:
  dataplane: 8
  controlplane: 2
node2: {isolated: false}
node3:
";

    fn layout(dataplane: Cores, controlplane: usize, isolated: bool) -> Layout {
        Layout { dataplane, controlplane: Cores::Number(controlplane), isolated }
    }

    #[test]
    fn a_node_has_its_entry_else_the_default_else_the_flags() {
        let flags = layout(Cores::Number(4), 1, false);
        let file = parse("f", FILE).unwrap();
        for (node, expected) in [
            ("node1", layout(Cores::Number(8), 2, true)),
            ("node2", layout(Cores::Auto, 1, false)),
            ("node3", layout(Cores::Auto, 1, true)),
            ("other", layout(Cores::Auto, 1, true)),
        ] {
            assert_eq!(flags.changed(&file, node), expected, "{node}");
        }
        assert_eq!(flags.changed(&File::new(), "node1"), flags);
        assert_eq!(parse("f", r#"{"node1": {"dataplane": 8}}"#).unwrap().len(), 1, "JSON is YAML");
    }

    #[test]
    fn a_file_without_entries_is_empty_and_so_is_a_missing_one() {
        for text in ["", "\n", "# nothing\n\n"] {
            assert_eq!(parse("f", text).unwrap(), File::new(), "{text:?}");
        }
        let home = tempfile::tempdir().unwrap();
        assert_eq!(read(&home.path().join("layouts.yaml")).unwrap(), File::new());
        assert!(read(home.path()).is_err(), "a directory is not a missing file");
    }

    #[test]
    fn a_mistake_is_named_with_its_line() {
        for (text, part) in [
            ("node1:\n  dp: 4\n", "f:2: unknown field"),
            ("node1:\n  dataplane: all\n", "f:2: "),
            ("node1:\n  dataplane: -1\n", "f:2: "),
            ("node1:\n  dataplane: 1.5\n", "f:2: "),
            ("node1: 4\n", "f:1: "),
        ] {
            let error = parse("f", text).unwrap_err().to_string();
            assert!(error.starts_with(part) && !error.contains('\n'), "{text:?}: {error}");
        }
    }
}
