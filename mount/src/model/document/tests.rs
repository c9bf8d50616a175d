//! Documents: what is read, what is refused, and what differs.

use super::*;

fn document(text: &str) -> Result<Document, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

fn lines(before: &str, after: &str) -> Vec<String> {
    let read = |text| specs(&document(text).unwrap().pools).unwrap();
    differences(&read(before), &read(after))
}

#[test]
fn a_document_is_read_as_it_is_written() {
    for text in [
        r#"{"pools":{}}"#,
        r#"{"pools":{"a":{"lists":[]}}}"#,
        r#"{"pools":{"a":{"exclusive":true,"partial":true,"mode":"isolated","lists":["0,1","2-3"]}}}"#,
        r#"{"pools":{"a":{"tasks":{"owner":7,"group":8,"mode":"0664"},"lists":[{"cpus":"0","tasks":{"mode":"0600"}}]}}}"#,
    ] {
        assert_eq!(serde_json::to_string(&document(text).unwrap()).unwrap(), text);
    }
}

#[test]
fn a_list_may_be_a_number_or_a_map() {
    let given = document(r#"{"pools":{"a":{"lists":[0,{"cpus":1},{"cpus":"2-3","tasks":{}}]}}}"#).unwrap();
    let names: Vec<&str> = given.pools["a"].lists.iter().map(|list| list.cpus.as_str()).collect();
    assert_eq!(names, ["0", "1", "2-3"]);
}

#[test]
fn nothing_unknown_is_passed_over() {
    for (text, expected) in [
        (r#"{"pools":{"a":{"list":[]}}}"#, "unknown field `list`"),
        (r#"{"pool":{}}"#, "unknown field `pool`"),
        ("{}", "missing field `pools`"),
        (r#"{"pools":{"a":{"mode":"x"}}}"#, "unknown variant `x`"),
        (r#"{"pools":{"a":{"lists":[-1]}}}"#, "-1 is no CPU"),
        (r#"{"pools":{"a":{"lists":[1.5]}}}"#, "expected a CPU list such as 0-3"),
        (r#"{"pools":{"a":{"tasks":{"mode":"688"}}}}"#, "\"688\" is no mode"),
        (r#"{"pools":{"a":{"tasks":{"mode":"1777"}}}}"#, "\"1777\" is no mode"),
    ] {
        let error = document(text).unwrap_err();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn what_cannot_be_is_refused_with_the_pool() {
    for (text, pool, errno) in [
        (r#"{"pools":{"A":{}}}"#, "A", "a pool name is"),
        (r#"{"pools":{"a":{"lists":["0-x"]}}}"#, "a", "not a CPU list"),
        (r#"{"pools":{"a":{"mode":"isolated"}}}"#, "a", "a is shared"),
        (r#"{"pools":{"a":{"lists":["0-1","1"]}}}"#, "a", "CPU 1 is in a 0-1 already"),
        (r#"{"pools":{"a":{"lists":["0-1"]},"b":{"lists":["1-2"]}}}"#, "b", "CPU 1 is in a 0-1 already"),
    ] {
        let (name, refusal) = specs(&document(text).unwrap().pools).unwrap_err();
        assert_eq!(name, pool);
        assert!(refusal.sentence("").starts_with(errno), "{text}: {refusal:?}");
    }
}

#[test]
fn differences_are_named() {
    let one = r#"{"pools":{"a":{"exclusive":true,"lists":["0-1","2"]},"b":{"lists":["3"]}}}"#;
    assert!(lines(one, one).is_empty());
    // The same CPUs by another name are the same list.
    assert!(lines(one, &one.replace("0-1", "0,1")).is_empty());
    let other = r#"{"pools":{"a":{"partial":true,"lists":["0-1","3"]},"c":{"exclusive":true,"mode":"isolated","tasks":{"group":7},"lists":[{"cpus":"4","tasks":{"mode":"0664"}}]}}}"#;
    let expected = [
        "~ a exclusive 1 -> 0",
        "~ a partial 0 -> 1",
        "~ list b 3 -> a",
        "+ pool c",
        "~ c exclusive 0 -> 1",
        "~ c mode affinity -> isolated",
        "~ c tasks group 0 -> 7",
        "+ list c 4",
        "~ c 4 tasks mode 0644 -> 0664",
        "- list a 2",
        "- pool b",
    ];
    assert_eq!(lines(one, other), expected);
}

#[test]
fn what_is_not_given_stays_as_it_is() {
    let changed = r#"{"pools":{"a":{"tasks":{"owner":7,"mode":"0600"}}}}"#;
    assert!(lines(changed, r#"{"pools":{"a":{}}}"#).is_empty());
    assert_eq!(lines(changed, r#"{"pools":{"a":{"tasks":{"owner":0}}}}"#), ["~ a tasks owner 7 -> 0"]);
}
