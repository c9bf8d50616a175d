//! The reference tables of the documents are complete, and their links lead somewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::dir::{Dir as _, failure};
use crate::harness::{KCM, Mount, run, write};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The type and the labels of each metric, by name, as `kcm status --prometheus` shows them.
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
    let (out, err, _) = run(&mut mount.kcm(&["status", "--prometheus", "--timeout=60"]));
    assert_eq!((table, err.as_str()), (metrics(&out), ""));
}

/// What the first column of the table under this heading contains between backquotes.
fn first_column(page: &str, heading: &str) -> Vec<String> {
    let (_, section) = page.split_once(heading).unwrap_or_else(|| panic!("no {heading}"));
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    rows.map(|(cell, _)| cell.to_owned()).collect()
}

#[test]
fn the_messages_of_a_daemon_that_does_not_start_are_in_the_table() {
    let (served, other, newer) = (Mount::new(), Mount::not_mounted(), Mount::new());
    newer.stop();
    let header = r#"{"header":{"kcm":"config","version":99}}"#;
    let config = format!("{:08x} {header}\n", crc32fast::hash(header.as_bytes()));
    fs::write(newer.state().join("config"), config).unwrap();
    let no_fuse = Mount::not_mounted();
    let line = "mount --bind /dev/null /dev/fuse && exec \"$KCM\" mount --conf-dir=\"$C\" --state-dir=\"$S\"";
    let mut without_fuse = Command::new("unshare");
    without_fuse.args(["--mount", "sh", "-c", line]).env("KCM_LOG_LEVEL", "ERROR");
    without_fuse.env("KCM", KCM).env("C", no_fuse.conf()).env("S", no_fuse.state());
    let full = Mount::not_mounted();
    fs::create_dir_all(full.conf().join("something")).unwrap();
    let mut same_state = Command::new(KCM);
    same_state.arg("mount").arg("--conf-dir").arg(other.conf()).arg("--state-dir").arg(served.state());
    let link = Mount::not_mounted();
    std::os::unix::fs::symlink("/nowhere", link.conf()).unwrap();
    let messages = [
        failure(&mut other.kcm_as_nobody(&["mount"])),
        failure(&mut without_fuse),
        full.mount_failure(),
        link.mount_failure(),
        failure(served.mount_command().arg("--foreground").env("KCM_LOG_LEVEL", "ERROR")),
        failure(same_state.env("KCM_LOG_LEVEL", "ERROR")),
        newer.mount_failure(),
    ];
    let page = fs::read_to_string(Path::new(ROOT).join("docs/troubleshooting.md")).unwrap();
    let table = first_column(&page, "## The daemon does not start");
    assert_eq!(table.len(), messages.len(), "{table:?}");
    for (part, message) in table.iter().zip(&messages) {
        assert!(message.contains(part), "{part}: {message}");
    }
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
