//! Every statement of docs/semantics.md and docs/compatibility.md names a test that exists.
#![allow(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

/// The source file of a named test.
fn source(file: &str) -> String {
    let path = match file.strip_prefix("mount/") {
        Some(module) => format!("mount/src/{module}.rs"),
        None => format!("tests/{file}.rs"),
    };
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&path))
        .unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The pages, with the number of tests that they name at least.
const PAGES: [(&str, usize); 2] = [("docs/semantics.md", 60), ("docs/compatibility.md", 50)];

#[test]
fn every_statement_names_a_test_that_exists() {
    for (page, least) in PAGES {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).expect(page);
        let (_, statements) = text.split_once("\n## ").expect("sections");
        let mut named = 0;
        for statement in statements.split("\n- ").skip(1) {
            // The next section is not part of the statement.
            let statement = statement.split("\n\n").next().unwrap_or(statement);
            let tests = statement.split('`').filter_map(|word| word.split_once("::"));
            let mut count = 0;
            for (file, test) in tests {
                let found = source(file).contains(&format!("fn {test}("));
                assert!(found, "{page} names {file}::{test}, which does not exist");
                count += 1;
            }
            assert_ne!(count, 0, "{page}: no test is named for: {statement}");
            named += count;
        }
        assert!(named > least, "{page}: only {named} tests are named");
    }
}
