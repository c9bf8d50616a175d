//! The reference tables of the documents are complete, and their links lead somewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::harness::{Mount, write};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The type and the labels of each metric, by name, as the mount shows them.
fn metrics(text: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let mut found = BTreeMap::new();
    let mut last = String::new();
    for line in text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            name.clone_into(&mut last);
            found.insert(last.clone(), (kind.to_owned(), BTreeSet::new()));
        } else if let (Some((_, rest)), Some((_, labels))) = (line.split_once('{'), found.get_mut(&last)) {
            let (pairs, _) = rest.rsplit_once('}').unwrap();
            labels.extend(pairs.split(',').map(|pair| pair.split_once('=').unwrap().0.to_owned()));
        }
    }
    found
}

#[test]
fn every_metric_is_in_the_table_with_its_type_and_labels() {
    let mount = Mount::with_dataplane();
    assert!(write(&mount.tasks("dataplane", "0"), "x").is_err());
    let page = fs::read_to_string(Path::new(ROOT).join("docs/metrics.md")).unwrap();
    let mut table = BTreeMap::new();
    for row in page.lines().filter(|line| line.starts_with("| `kcm_")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let labels = cells[3].split(", ").filter(|label| !label.is_empty());
        let labels = labels.map(|label| label.trim_matches('`').to_owned()).collect();
        table.insert(cells[1].trim_matches('`').to_owned(), (cells[2].to_owned(), labels));
    }
    assert_eq!(table, metrics(&mount.read("info/metrics")));
}

/// The Markdown files of the repository's top level, `docs` and `tests`.
fn pages() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for directory in ["", "docs", "docs/decisions", "tests"] {
        let entries = fs::read_dir(Path::new(ROOT).join(directory)).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        found.extend(paths.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
    }
    assert!(found.len() > 15, "{found:?}");
    found
}

/// The anchors that a page's headings have on the usual hosts.
fn anchors(page: &str) -> BTreeSet<String> {
    let headings = page.lines().filter(|line| line.starts_with('#'));
    let anchor = |line: &str| {
        let text = line.trim_start_matches('#').trim().to_lowercase();
        let kept = text.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn every_link_of_a_document_leads_somewhere() {
    for path in pages() {
        let page = fs::read_to_string(&path).unwrap();
        for link in page.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link) {
            if link.starts_with("http") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.with_file_name(file) };
            assert!(target.exists(), "{}: {link}: no such file", path.display());
            if !anchor.is_empty() {
                let found = anchors(&fs::read_to_string(&target).unwrap());
                assert!(found.contains(anchor), "{}: {link}: no such heading", path.display());
            }
        }
    }
}
