//! Every JSON that kcm prints or serves has a schema in docs/schemas, and real output fits it. A schema cannot fall behind: an
//! output with a field that the schema does not have fails, and so does a schema with a field that no output has.
//!
//! The validator here knows only the keywords that the schemas use, and fails at any other. The crates that know all keywords
//! have forty dependencies, with licences and second versions that deny.toml does not allow.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::harness::reconcile_loop::ReconcileLoop;
use crate::harness::{Mount, Sleeper, Stray, held, kcm_for, killed_on, pin, report, run, until, write};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The content of docs/schemas, by the names of the files without `.json`.
fn schemas() -> BTreeMap<String, Value> {
    let entries = fs::read_dir(Path::new(ROOT).join("docs/schemas")).unwrap();
    let read = |path: &Path| {
        let schema = serde_json::from_str(&fs::read_to_string(path).unwrap());
        schema.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.map(|path| (path.file_stem().unwrap().to_str().unwrap().to_owned(), read(&path))).collect()
}

/// What is wrong with a part of a document, `at` this place in it.
fn errors(root: &Value, schema: &Value, document: &Value, at: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut wrong = |what: String| found.push(format!("{at}: {what}: {document}"));
    let mut inner = Vec::new();
    for (keyword, value) in schema.as_object().expect("a schema is an object") {
        match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" => {}
            "$ref" => inner.extend(errors(root, target(root, value), document, at)),
            "oneOf" => {
                let fits = |one: &&Value| errors(root, one, document, at).is_empty();
                let fitting = value.as_array().unwrap().iter().filter(fits).count();
                if fitting != 1 {
                    wrong(format!("{fitting} alternatives of {value} fit"));
                }
            }
            "type" => {
                let types = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
                if !types.iter().any(|name| is_of_type(document, name.as_str().unwrap())) {
                    wrong(format!("not of type {value}"));
                }
            }
            "enum" if !value.as_array().unwrap().contains(document) => wrong(format!("not one of {value}")),
            "minimum" if document.as_f64().is_some_and(|number| number < value.as_f64().unwrap()) => {
                wrong(format!("less than {value}"));
            }
            "enum" | "minimum" => {}
            "required" => {
                let missing = value.as_array().unwrap().iter();
                let missing = missing.filter(|name| document.get(name.as_str().unwrap()).is_none());
                missing.for_each(|name| wrong(format!("no {name}")));
            }
            "properties" | "additionalProperties" => {
                let named = schema.get("properties");
                for (name, field) in document.as_object().into_iter().flatten() {
                    let is_named = named.is_some_and(|named| named.get(name).is_some());
                    let at = format!("{at}/{name}");
                    match keyword.as_str() {
                        "properties" if is_named => inner.extend(errors(root, &value[name], field, &at)),
                        "additionalProperties" if is_named => {}
                        "additionalProperties" if *value == false => {
                            wrong(format!("an unknown field {name}"))
                        }
                        "additionalProperties" => inner.extend(errors(root, value, field, &at)),
                        _ => {}
                    }
                }
            }
            "items" => {
                for (index, item) in document.as_array().into_iter().flatten().enumerate() {
                    inner.extend(errors(root, value, item, &format!("{at}/{index}")));
                }
            }
            _ => panic!("the keyword {keyword} is not known here"),
        }
    }
    found.extend(inner);
    found
}

/// The part of a schema that `$ref` names.
fn target<'a>(root: &'a Value, reference: &Value) -> &'a Value {
    let pointer = reference.as_str().unwrap().strip_prefix('#').expect("a place in the same file");
    root.pointer(pointer).unwrap_or_else(|| panic!("no {reference}"))
}

fn is_of_type(document: &Value, name: &str) -> bool {
    match name {
        "object" => document.is_object(),
        "array" => document.is_array(),
        "string" => document.is_string(),
        "boolean" => document.is_boolean(),
        "integer" => document.is_i64() || document.is_u64(),
        "null" => document.is_null(),
        other => panic!("the type {other} is not known here"),
    }
}

/// The objects of a document that have named fields: where each one is, and the part of the schema that describes it.
fn objects<'a>(
    root: &'a Value,
    schema: &'a Value,
    document: &Value,
    at: &str,
    found: &mut Vec<(String, &'a Value)>,
) {
    if let Some(reference) = schema.get("$ref") {
        return objects(root, target(root, reference), document, at, found);
    }
    for alternative in schema.get("oneOf").and_then(Value::as_array).into_iter().flatten() {
        if errors(root, alternative, document, at).is_empty() {
            objects(root, alternative, document, at, found);
        }
    }
    if let (Some(properties), Some(fields)) = (schema.get("properties"), document.as_object()) {
        found.push((at.to_owned(), schema));
        for (name, field) in fields {
            objects(root, &properties[name], field, &format!("{at}/{name}"), found);
        }
    } else if let (Some(of), Some(fields)) = (schema.get("additionalProperties"), document.as_object()) {
        for (name, field) in fields {
            let name = name.replace('~', "~0").replace('/', "~1");
            objects(root, of, field, &format!("{at}/{name}"), found);
        }
    } else if let (Some(of), Some(items)) = (schema.get("items"), document.as_array()) {
        for (index, item) in items.iter().enumerate() {
            objects(root, of, item, &format!("{at}/{index}"), found);
        }
    }
}

/// The parts of a schema that describe objects with named fields.
fn described(schema: &Value) -> Vec<&Value> {
    let mut found: Vec<&Value> = schema.get("properties").map(|_| schema).into_iter().collect();
    let inner: Vec<&Value> = match schema {
        Value::Object(fields) => fields.values().collect(),
        Value::Array(items) => items.iter().collect(),
        _ => Vec::new(),
    };
    found.extend(inner.into_iter().flat_map(described));
    found
}

/// The JSON lines of a text.
fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Real documents of each schema, from a mount on which something has happened.
fn documents() -> Vec<(&'static str, Value)> {
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0"]);
    mount.make_pool("infra", false, &["1"]);
    let (list, shared) = (mount.tasks("dataplane", "0"), mount.tasks("infra", "1"));
    let (task, other) = (Sleeper::new(), Sleeper::new());
    write(&list, task.pid().to_string()).unwrap();
    assert!(write(&list, other.pid().to_string()).is_err());
    write(&shared, task.pid().to_string()).unwrap();
    write(&shared, format!("-{}", task.pid())).unwrap();
    killed_on(&list);
    // A shell that leaves a process behind.
    let left = mount.sh("echo $$ > $C/pools/dataplane/0/tasks; sleep 1000 > /dev/null 2>&1 & echo $!");
    let left = Stray(left.trim().parse().unwrap());
    until("it has inherited the list", || held(&list) == [left.0]);
    left.end();
    write(&shared, task.pid().to_string()).unwrap();
    pin(task.pid(), &[0, 1]);
    let mut found = vec![
        ("describe", report(&mut mount.kcm(&["describe"]))),
        ("describe", report(&mut mount.kcm(&["describe", "--pool=infra"]))),
        ("topology", serde_json::from_str(&mount.read("info/topology")).unwrap()),
        ("node-report", report(&mut mount.kcm(&["node-report"]))),
        ("node-report", report(&mut kcm_for(&mount.home().join("absent"), &["node-report"]))),
    ];
    let status = || {
        let (out, err, _) = run(&mut mount.kcm(&["status", "--json", "--timeout=60"]));
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"))
    };
    found.push(("status", status()));
    found.extend(lines(&mount.read("info/events")).into_iter().map(|line| ("event", line)));
    found.extend(lines(&mount.read("info/reclaimed")).into_iter().map(|line| ("reclaimed", line)));
    found.push(("reconcile", report(&mut mount.kcm(&["reconcile"]))));
    let looking = ReconcileLoop::start(mount.home(), mount.kcm(&["reconcile", "--interval=1000"]));
    until("it has reported", || looking.lines().len() == 1);
    found.push(("interval", looking.lines().remove(0)));
    drop(looking);
    until("a line was dropped", || {
        (0..100).for_each(|_| assert!(write(&list, "x").is_err()));
        lines(&mount.read("info/events")).first().is_some_and(|line| line.get("dropped").is_some())
    });
    found.extend(lines(&mount.read("info/events")).into_iter().take(2).map(|line| ("event", line)));
    mount.stop();
    found.push(("status", status()));
    found
}

/// What no test can make in a short time, or without a kernel that isolates.
fn rare() -> Vec<(&'static str, Value)> {
    let list = json!({ "cpus": "0", "pool": "p", "reason": "Cpu list in cpuset.cpus not exclusive" });
    let member = json!({ "container": "main", "pid": 7, "pod": "default/fwd" });
    let list_in_pod = json!({ "cpus": "0", "pods": [member], "tasks": [7] });
    let pool = json!({ "cpuLists": { "0": list_in_pod }, "exclusive": true, "name": "p" });
    let described = json!({ "path": "/etc/kcm", "pools": { "p": pool } });
    let mount = json!({ "errors": [], "live": true, "ok": true, "since": null });
    let checks = json!({ "configDirectory": { "errors": [], "ok": true }, "mount": mount });
    let report = json!({ "checks": checks, "description": described, "topology": { "sockets": {} } });
    let reconciled = json!({ "mismatchedCpuMasks": [], "notIsolated": [list], "reclaimedCpuLists": [] });
    vec![
        ("reclaimed", json!({ "dropped": 1 })),
        ("reconcile", reconciled),
        ("describe", described),
        ("node-report", report),
    ]
}

#[test]
fn a_document_with_another_form_does_not_fit() {
    let schema = &schemas()["describe"];
    let list = json!({ "cpus": "0", "tasks": [7] });
    let pool = json!({ "cpuLists": { "0": list }, "exclusive": true, "name": "p" });
    let right = json!({ "path": "/etc/kcm", "pools": { "p": pool } });
    assert_eq!(errors(schema, schema, &right, ""), [""; 0]);
    for (at, value) in [
        ("/path", json!(1)),
        ("/pools", json!([])),
        ("/pools/p/exclusive", json!(1)),
        ("/pools/p/cpuLists/0/tasks/0", json!("7")),
        ("/pools/p/cpuLists/0/tasks/0", json!(-7)),
        ("/pools/p/cpuLists/0/tasks/0", json!(7.5)),
        ("/pools/p/cpuLists/0", json!({ "cpus": "0" })),
    ] {
        let mut wrong = right.clone();
        *wrong.pointer_mut(at).unwrap() = value;
        assert_eq!(errors(schema, schema, &wrong, "").len(), 1, "{at}: {wrong}");
    }
}

#[test]
fn real_output_has_exactly_the_fields_of_its_schema() {
    let schemas = schemas();
    let mut used: BTreeMap<*const Value, BTreeSet<String>> = BTreeMap::new();
    for (name, document) in documents().into_iter().chain(rare()) {
        let schema = schemas.get(name).unwrap_or_else(|| panic!("{name}: no schema"));
        assert_eq!(errors(schema, schema, &document, ""), [""; 0], "{name}");
        let mut found = Vec::new();
        objects(schema, schema, &document, "", &mut found);
        assert!(!found.is_empty(), "{name}");
        for (at, part) in found {
            let fields = document.pointer(&at).unwrap().as_object().unwrap().keys().cloned();
            used.entry(std::ptr::from_ref(part)).or_default().extend(fields);
            let mut other = document.clone();
            other.pointer_mut(&at).unwrap()["unknown"] = json!(1);
            assert_eq!(errors(schema, schema, &other, "").len(), 1, "{name}: an unknown field in {at:?}");
        }
    }
    for (name, schema) in &schemas {
        for part in described(schema) {
            let fields: BTreeSet<String> = part["properties"].as_object().unwrap().keys().cloned().collect();
            let used = used.get(&std::ptr::from_ref(part)).cloned().unwrap_or_default();
            assert_eq!(used, fields, "{name}: fields that no output has: {part:#}");
        }
    }
}

#[test]
fn every_schema_is_one_and_says_what_each_field_is() {
    let page = fs::read_to_string(Path::new(ROOT).join("docs/programming.md")).unwrap();
    for (name, schema) in schemas() {
        assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema", "{name}");
        assert!(page.contains(&format!("](schemas/{name}.json)")), "{name}: not in docs/programming.md");
        for part in described(&schema) {
            assert_eq!(part["additionalProperties"], false, "{name}: {part:#}");
            for (field, of) in part["properties"].as_object().unwrap() {
                assert!(of.get("description").or(of.get("$ref")).is_some(), "{name}: {field}");
            }
        }
    }
}

/// The kinds of events in the code: `event: "refused"`, `claim_event("reclaimed", …`, `("claimed", Counter::Claimed, …`.
#[test]
fn the_schema_of_events_has_every_kind() {
    let mut kinds = BTreeSet::new();
    for entry in fs::read_dir(Path::new(ROOT).join("mount/src/engine")).unwrap() {
        let path = entry.unwrap().path();
        let code = if path.is_file() { fs::read_to_string(path).unwrap() } else { continue };
        for before in ["event: \"", "claim_event(\"", "list_event_of(\"", "(\""] {
            for rest in code.split(before).skip(1) {
                let (kind, after) = rest.split_once('"').unwrap();
                if before != "(\"" || after.starts_with(", Counter::") {
                    kinds.insert(kind.to_owned());
                }
            }
        }
    }
    let listed = &schemas()["event"]["$defs"]["event"]["properties"]["event"]["enum"];
    let listed: BTreeSet<String> = serde_json::from_value(listed.clone()).unwrap();
    assert_eq!(listed, kinds);
}
