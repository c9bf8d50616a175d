//! The man page of the directory, kcm(5), has every file of a mount, with its mode.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use crate::harness::{KCM, Mount, run};

#[test]
fn every_file_of_a_mount_is_in_the_page_with_its_mode() {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0"]);
    let named = |path: &str| path.replace("/dataplane", "/POOL").replace("/0", "/LIST");
    let files = mount.walk().into_iter().filter(|(path, _)| !path.is_empty());
    let files: BTreeMap<String, u32> =
        files.map(|(path, metadata)| (named(&path), metadata.mode() & 0o7777)).collect();
    let (page, err, code) = run(Command::new(KCM).args(["man", "5"]));
    assert_eq!((err.as_str(), code), ("", Some(0)));
    let entry = |line: &str| {
        let (path, mode) = line.strip_prefix("\\fB")?.split_once("\\fR (")?;
        Some((path.to_owned(), u32::from_str_radix(mode.strip_suffix(')')?, 8).ok()?))
    };
    let in_page: BTreeMap<String, u32> = page.lines().filter_map(entry).collect();
    assert_eq!(in_page, files, "src/commands/manual/tree.rs has the table");
}

#[test]
fn groff_warns_of_nothing_in_a_page() {
    let home = tempfile::tempdir().unwrap();
    let root = format!("--root={}", home.path().display());
    let (_, err, code) = run(Command::new(KCM).args(["install", "--systemd", &root]));
    assert_eq!(code, Some(0), "{err}");
    let mut count = 0;
    for section in ["man1", "man5"] {
        for page in std::fs::read_dir(home.path().join("usr/local/share/man").join(section)).unwrap() {
            let page = page.unwrap().path();
            let text = std::fs::read_to_string(&page).unwrap();
            assert_eq!(
                text.matches("\n.TH kcm").count() + usize::from(text.starts_with(".TH kcm")),
                1,
                "{page:?}"
            );
            let warned = run(Command::new("groff").args(["-man", "-ww", "-Tutf8", "-z"]).arg(&page));
            assert_eq!(warned, (String::new(), String::new(), Some(0)), "{page:?}");
            count += 1;
        }
    }
    assert!(count > 15, "{count}");
}
