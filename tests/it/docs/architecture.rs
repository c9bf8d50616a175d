//! The modules import each other in one direction only, and what one module owns no other one names.
//!
//! Reads the source text: `use` declarations and paths that start with `crate::` or `super::`. Test code does not count.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// The top-level modules of kcm-mount, each with the ones that it may import: `daemon -> fuse -> tree -> engine -> model`,
/// and `engine -> journal, process`. A module that is not here imports nothing.
const MOUNT: &[(&str, &[&str])] = &[
    (
        "daemon",
        &[
            "clock",
            "engine",
            "failpoint",
            "fuse",
            "handles",
            "import",
            "journal",
            "model",
            "mountpoint",
            "process",
            "text",
            "uevents",
        ],
    ),
    ("fuse", &["engine", "handles", "model", "process", "tree"]),
    ("handles", &["model", "tree"]),
    ("tree", &["engine", "model"]),
    ("import", &["clock", "engine", "journal", "model", "plain", "process"]),
    ("engine", &["clock", "failpoint", "fair", "journal", "metrics", "model", "partitions", "process"]),
    ("partitions", &["failpoint", "model", "text"]),
    ("journal", &["clock", "failpoint", "fair", "model"]),
    ("process", &["model", "procfs"]),
    ("procfs", &["model", "text"]),
    ("affinity", &["model", "process"]),
    ("child", &["process"]),
    ("mountpoint", &["process"]),
    ("state", &["clock", "journal", "model"]),
    ("uevents", &["process"]),
];

/// The top-level modules of kcm, each with the ones that it may import: `commands -> {confdir, host, kubernetes}`, which
/// do not know each other.
const KCM: &[(&str, &[&str])] = &[
    ("commands", &["backoff", "cli", "confdir", "host", "kubernetes", "service", "version"]),
    ("confdir", &["service"]),
    ("cli", &["host_command", "version"]),
    ("kubernetes", &["backoff", "host_command"]),
];

/// The longest file that needs no reason, in lines.
const MAX_LINES: usize = 400;
/// How the head comment of a longer file begins to say why.
const REASON: &str = "onger than 400 lines because";

/// A source file without its tests and comments.
struct Source {
    path: PathBuf,
    /// The module's path below the crate root; empty for the root.
    module: Vec<String>,
    /// Lines; comments are blank.
    code: Vec<String>,
}

/// An import, with its file and line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Import {
    from: Vec<String>,
    to: Vec<String>,
    place: String,
}

impl fmt::Display for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} imports {}", self.place, self.from.join("::"), self.to.join("::"))
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below a directory of the repository.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display())) {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn is_test(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "tests" || part.as_os_str() == "tests.rs")
}

/// The sources of a crate. Modules declared under `#[cfg(test)]` are left out.
fn sources(crate_root: &str) -> Vec<Source> {
    let directory = root().join(crate_root);
    let mut sources = Vec::new();
    let mut test_modules = BTreeSet::new();
    for path in files(&directory) {
        let below = path.strip_prefix(&directory).expect("a file of the crate").with_extension("");
        let mut module: Vec<String> =
            below.components().map(|part| part.as_os_str().to_str().expect("UTF-8").to_owned()).collect();
        if matches!(module.last().map(String::as_str), Some("mod" | "lib" | "main")) {
            module.pop();
        }
        let text = fs::read_to_string(&path).expect("text");
        let code = code(&text, |name| {
            test_modules.insert([module.as_slice(), &[name.to_owned()]].concat());
        });
        sources.push(Source { path: path.strip_prefix(root()).expect("a file").to_owned(), module, code });
    }
    sources.retain(|source| {
        !is_test(&source.path) && !test_modules.iter().any(|test| source.module.starts_with(test))
    });
    sources
}

/// The lines of a file up to its inline tests, without comments. Reports each module file that is only for tests.
fn code(text: &str, mut test_module: impl FnMut(&str)) -> Vec<String> {
    let mut code: Vec<String> = Vec::new();
    let mut for_tests = false;
    for line in text.lines() {
        let line = line.split("//").next().unwrap_or_default();
        if for_tests {
            if let Some(name) = line.trim().trim_start_matches("pub(crate) ").strip_prefix("mod ") {
                if line.trim_end().ends_with('{') {
                    break;
                }
                test_module(name.trim_end_matches(';'));
            }
            for_tests = line.trim_start().starts_with("#[") || line.trim().is_empty();
            code.push(String::new());
            continue;
        }
        for_tests = line.trim() == "#[cfg(test)]";
        code.push(line.to_owned());
    }
    code
}

/// The paths in a use tree such as `a::{b, c::{self, d}}`, which starts at the beginning of `text`.
fn paths(text: &str) -> Vec<Vec<String>> {
    fn tree(text: &mut &str, prefix: &[String], found: &mut Vec<Vec<String>>) {
        let mut path = prefix.to_vec();
        loop {
            *text = text.trim_start();
            if let Some(rest) = text.strip_prefix('{') {
                *text = rest;
                loop {
                    tree(text, &path, found);
                    *text = text.trim_start();
                    match text.chars().next() {
                        Some(',') => *text = &text[1..],
                        Some('}') => {
                            *text = &text[1..];
                            return;
                        }
                        _ => return,
                    }
                }
            }
            let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len());
            let (name, rest) = text.split_at(end);
            if name.is_empty() {
                break;
            }
            path.push(name.to_owned());
            *text = rest;
            match text.strip_prefix("::") {
                Some(rest) => *text = rest,
                None => break,
            }
        }
        found.push(path);
    }
    let (mut rest, mut found) = (text, Vec::new());
    tree(&mut rest, &[], &mut found);
    found
}

/// Every import of one module by another one of the same crate.
fn imports(sources: &[Source]) -> BTreeSet<Import> {
    let modules: BTreeSet<&[String]> = sources.iter().map(|source| source.module.as_slice()).collect();
    let mut imports = BTreeSet::new();
    for source in sources {
        let text = source.code.join("\n");
        for (start, _) in text.match_indices("crate::").chain(text.match_indices("super::")) {
            let before = text[..start].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '_' | ':' | '$')) {
                continue;
            }
            let line = text[..start].lines().count().max(1);
            for path in paths(&text[start..]) {
                let mut target = if path[0] == "crate" { Vec::new() } else { source.module.clone() };
                for name in &path {
                    match name.as_str() {
                        "crate" | "self" => {}
                        "super" => drop(target.pop()),
                        name => target.push(name.to_owned()),
                    }
                }
                // The path ends in an item of a module.
                while !modules.contains(target.as_slice()) {
                    target.pop();
                }
                if target != source.module {
                    let place = format!("{}:{line}", source.path.display());
                    imports.insert(Import { from: source.module.clone(), to: target, place });
                }
            }
        }
    }
    imports
}

/// The imports between top-level modules that the table does not allow.
fn forbidden(imports: &BTreeSet<Import>, allowed: &[(&str, &[&str])]) -> Vec<String> {
    let allowed: BTreeMap<&str, &[&str]> = allowed.iter().copied().collect();
    let is_forbidden = |import: &&Import| {
        let (Some(from), Some(to)) = (import.from.first(), import.to.first()) else {
            // The root of a crate declares its modules; nothing is defined there for others.
            return !import.from.is_empty();
        };
        from != to && !allowed.get(from.as_str()).is_some_and(|may| may.contains(&to.as_str()))
    };
    imports.iter().filter(is_forbidden).map(ToString::to_string).collect()
}

/// The imports that are part of a circle. A module may use its own submodules, and they may use it: they are one unit
/// in several files.
fn circles(imports: &BTreeSet<Import>) -> Vec<String> {
    let edges: BTreeSet<(&[String], &[String])> = imports
        .iter()
        .filter(|import| !import.to.starts_with(&import.from))
        .map(|import| (import.from.as_slice(), import.to.as_slice()))
        .collect();
    let reaches = |from: &[String], wanted: &[String]| {
        let (mut seen, mut todo) = (BTreeSet::new(), vec![from]);
        while let Some(module) = todo.pop() {
            if module == wanted {
                return true;
            }
            if seen.insert(module) {
                todo.extend(edges.iter().filter(|(from, _)| *from == module).map(|(_, to)| *to));
            }
        }
        false
    };
    let in_circle = |import: &&Import| {
        edges.contains(&(import.from.as_slice(), import.to.as_slice())) && reaches(&import.to, &import.from)
    };
    imports.iter().filter(in_circle).map(ToString::to_string).collect()
}

/// The lines that contain a word outside the module that owns it.
fn outside(sources: &[Source], owner: &str, word: &str) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources.iter().filter(|source| source.module.first().is_none_or(|module| module != owner)) {
        for (number, line) in source.code.iter().enumerate() {
            let words = line.split(|c: char| !(c.is_alphanumeric() || c == '_'));
            if words.into_iter().any(|other| other == word) {
                found.push(format!("{}:{}: {}", source.path.display(), number + 1, line.trim()));
            }
        }
    }
    found
}

fn assert_none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

#[test]
fn imports_follow_the_allowed_arrows() {
    for (crate_root, allowed) in [("mount/src", MOUNT), ("src", KCM)] {
        let imports = imports(&sources(crate_root));
        assert!(imports.len() > 50, "the imports of {crate_root} were read");
        assert_none("not an allowed import", &forbidden(&imports, allowed));
    }
}

#[test]
fn modules_do_not_import_each_other_in_a_circle() {
    for crate_root in ["mount/src", "src"] {
        assert_none("part of a circle", &circles(&imports(&sources(crate_root))));
    }
}

#[test]
fn only_fuse_names_fuser_and_only_process_has_unsafe_code() {
    let (mount, kcm) = (sources("mount/src"), sources("src"));
    assert_none("fuser outside fuse/", &outside(&mount, "fuse", "fuser"));
    assert_none("unsafe outside process/", &outside(&mount, "process", "unsafe"));
    for word in ["fuser", "unsafe"] {
        assert_none(&format!("{word} in kcm"), &outside(&kcm, "", word));
    }
}

#[test]
fn a_long_file_says_why() {
    let mut found = Vec::new();
    for path in ["mount/src", "src", "tests", "benches"].iter().flat_map(|path| files(&root().join(path))) {
        let text = fs::read_to_string(&path).expect("text");
        let head: String = text.lines().take_while(|line| line.starts_with("//!")).collect();
        let lines = text.lines().count();
        if lines > MAX_LINES && !head.contains(REASON) {
            found.push(format!("{}: {lines} lines", path.display()));
        }
    }
    assert_none(
        &format!("over {MAX_LINES} lines, and the head comment does not say \"L{REASON} ...\""),
        &found,
    );
}

#[test]
fn the_checks_find_what_they_are_for() {
    let source = |module: &str, code: &str| Source {
        path: format!("{module}.rs").into(),
        module: module.split("::").filter(|name| !name.is_empty()).map(str::to_owned).collect(),
        code: super_code(code),
    };
    let sources = [
        source("a", "use crate::b::{self, c::D};\n"),
        source("b", "fn f() {\n    crate::a::g();\n}\n"),
        source("b::c", "use super::super::e::F; // crate::a\n"),
        source("e", "#[cfg(test)]\nmod tests {\n    use crate::a;\n}\n"),
    ];
    let found = imports(&sources);
    let lines: Vec<String> = found.iter().map(ToString::to_string).collect();
    assert_eq!(
        lines,
        ["a.rs:1: a imports b", "a.rs:1: a imports b::c", "b.rs:2: b imports a", "b::c.rs:1: b::c imports e"]
    );
    assert_eq!(circles(&found), ["a.rs:1: a imports b", "b.rs:2: b imports a"]);
    let allowed: &[(&str, &[&str])] = &[("a", &["b"]), ("b", &["e"])];
    assert_eq!(forbidden(&found, allowed), ["b.rs:2: b imports a"]);
    assert_eq!(outside(&sources, "b", "D"), ["a.rs:1: use crate::b::{self, c::D};"]);
}

fn super_code(text: &str) -> Vec<String> {
    code(text, |_| {})
}
