//! Every statement of docs/semantics.md and docs/compatibility.md names a test that runs: one of the test list that is not ignored.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::harness::run;

/// The pages, with the number of tests that they name at least.
const PAGES: [(&str, usize); 2] = [("semantics.md", 60), ("compatibility.md", 50)];

/// The other test binaries, by the prefix that a document gives to their tests, and how cargo selects them.
const OTHERS: [(&str, &[&str]); 3] =
    [("kcm_mount", &["--lib"]), ("kcm", &["--bins"]), ("soak", &["--test", "soak"])];

/// The names of all tests, with the prefix of their binary.
fn test_list() -> BTreeSet<String> {
    let this = std::env::current_exe().unwrap();
    let mut all = names("", &|| Command::new(&this));
    for (prefix, selection) in OTHERS {
        let cargo = || {
            let mut command = Command::new(env!("CARGO"));
            command.args(["test", "--quiet", "--workspace"]).args(selection).arg("--");
            command.current_dir(env!("CARGO_MANIFEST_DIR"));
            command
        };
        all.extend(names(&format!("{prefix}::"), &cargo));
    }
    all
}

/// The tests that a binary lists and does not ignore.
fn names(prefix: &str, binary: &dyn Fn() -> Command) -> BTreeSet<String> {
    let list = |arguments: &[&str]| {
        let (out, err, status) = run(binary().args(["--list", "--format=terse"]).args(arguments));
        assert_eq!(status, Some(0), "{err}");
        let names = out.lines().filter_map(|line| line.strip_suffix(": test"));
        names.map(|name| format!("{prefix}{name}")).collect::<BTreeSet<_>>()
    };
    &list(&[]) - &list(&["--ignored"])
}

/// The statements of a document, each with the tests that it names.
fn statements(document: &str) -> BTreeMap<String, Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(document);
    let page = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (_, sections) = page.split_once("\n## ").expect("sections");
    let mut found = BTreeMap::new();
    for statement in sections.split("\n- ").skip(1) {
        // The next section is not part of the statement.
        let statement = statement.split("\n\n").next().unwrap_or(statement);
        let tests = statement.split('`').skip(1).step_by(2).filter(|word| word.contains("::"));
        found.insert(statement.to_owned(), tests.map(str::to_owned).collect());
    }
    found
}

#[test]
fn every_statement_names_a_test_that_runs() {
    let list = test_list();
    for (page, least) in PAGES {
        let mut named = 0;
        for (statement, tests) in statements(page) {
            assert!(!tests.is_empty(), "docs/{page}: no test is named for: {statement}");
            for test in &tests {
                assert!(list.contains(test), "docs/{page} names {test}, which is not in the test list");
            }
            named += tests.len();
        }
        assert!(named > least, "docs/{page}: only {named} tests are named");
    }
}
