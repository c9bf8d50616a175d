//! `kcm describe --format=svg`: a picture that any XML parser reads, with each CPU once and in its core, each pool by its
//! name, and names of others as text only.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;

use roxmltree::{Document, Node};

use super::describe::{example, on_its_machine};
use crate::harness::{Machine, Mount, Plain, Sleeper, run, write};

/// The picture of a directory on a machine.
fn picture(plain: &Plain, machine: &Machine) -> String {
    let mut command = plain.kcm(&["describe", "--format=svg"]);
    let (out, _, status) = run(on_its_machine(plain, machine, &mut command));
    assert_eq!(status, Some(0));
    out
}

/// The groups of a class.
fn groups<'a>(document: &'a Document<'a>, class: &str) -> Vec<Node<'a, 'a>> {
    let has_class = |node: &Node<'_, '_>| {
        node.attribute("class").is_some_and(|classes| classes.split(' ').next() == Some(class))
    };
    document.descendants().filter(|node| node.has_tag_name("g") && has_class(node)).collect()
}

/// The visible text of a group, a line for each element.
fn shown(node: &Node<'_, '_>) -> Vec<String> {
    let texts = node.descendants().filter(|node| node.has_tag_name("text"));
    texts.map(|node| node.text().unwrap_or_default().to_owned()).collect()
}

fn id(node: &Node<'_, '_>) -> u32 {
    node.attribute("id").unwrap().strip_prefix("cpu-").unwrap().parse().unwrap()
}

#[test]
fn each_cpu_is_in_its_core_once() {
    for (sockets, cores, threads) in [(1, 2, 1), (1, 8, 2), (2, 4, 1), (4, 16, 2), (2, 64, 2), (1, 2, 8)] {
        let plain = Plain::new();
        plain.make_pool("p", true, &[("0", "")]);
        let picture = picture(&plain, &Machine::new(sockets, cores, threads));
        let document = Document::parse(&picture).unwrap();
        let count = sockets * cores * threads;
        let ids: Vec<u32> = groups(&document, "cpu").iter().map(id).collect();
        assert_eq!(ids.len() as u32, count);
        assert_eq!(ids.iter().copied().collect::<BTreeSet<u32>>(), (0..count).collect());
        let all = groups(&document, "core");
        assert_eq!(all.len() as u32, sockets * cores);
        for core in all {
            let of_core: Vec<u32> =
                core.children().filter(|node| node.attribute("id").is_some()).map(|node| id(&node)).collect();
            let first = of_core[0];
            let siblings: Vec<u32> = (0..threads).map(|thread| first + thread * sockets * cores).collect();
            assert_eq!(of_core, siblings);
        }
        assert_eq!(groups(&document, "socket").len() as u32, sockets);
        assert_eq!(groups(&document, "node").len() as u32, sockets);
    }
}

#[test]
fn nothing_is_drawn_outside_of_the_picture() {
    for machine in [Machine::new(1, 1, 1), Machine::new(2, 64, 2), Machine::new(1, 2, 8)] {
        let plain = example();
        let picture = picture(&plain, &machine);
        let document = Document::parse(&picture).unwrap();
        let number = |node: Node<'_, '_>, name| {
            node.attribute(name).map_or(0, |value| value.parse::<usize>().unwrap())
        };
        let page = document.root_element();
        let (width, height) = (number(page, "width"), number(page, "height"));
        assert!(width <= 1260, "{width}");
        for node in document.descendants().filter(|node| node.has_tag_name("rect")) {
            assert!(number(node, "x") + number(node, "width") <= width, "{node:?}");
            assert!(number(node, "y") + number(node, "height") <= height, "{node:?}");
        }
        for node in document.descendants().filter(|node| node.has_tag_name("text")) {
            let is_right = matches!(node.attribute("class"), Some("right" | "flag"));
            let length = if is_right { 0 } else { node.text().unwrap_or_default().chars().count() * 7 };
            assert!(number(node, "x") + length <= width + 7, "{node:?}");
            assert!(number(node, "y") < height, "{node:?}");
        }
    }
}

#[test]
fn pools_and_holders_are_named_in_text() {
    let plain = example();
    plain.make_pool("spare", true, &[]);
    let machine = Machine { offline: vec![15], cmdline: "isolcpus=4-7,12-14", ..Machine::legacy_example() };
    let picture = picture(&plain, &machine);
    let document = Document::parse(&picture).unwrap();
    let pools: Vec<String> = groups(&document, "pool").iter().flat_map(shown).collect();
    let expected = [
        "controlplane, shared, lists: 1, CPUs: 3,11",
        "dataplane, exclusive, lists: 4, 0 free, CPUs: 4-7,12-15",
        "infra, shared, lists: 1, CPUs: 0-2,8-10",
        "spare, exclusive, lists: 0, 0 free, CPUs: none",
    ];
    assert_eq!(pools, expected);
    let cpus = groups(&document, "cpu");
    let cpu = |number: u32| shown(cpus.iter().find(|node| id(node) == number).unwrap());
    assert_eq!(cpu(4), ["CPU 4", "isolated", "dataplane 4,12", "2000 (forwarder)"]);
    assert_eq!(cpu(0), ["CPU 0", "infra 0-2,8-10", "3 tasks"]);
    assert_eq!(cpu(15), ["CPU 15", "offline", "dataplane 7,15", "2003"]);
    let all: Vec<String> = document
        .descendants()
        .filter(|node| node.has_tag_name("text"))
        .map(|node| node.text().unwrap_or_default().to_owned())
        .collect();
    for line in ["infra 0-2,8-10: 3000, 3001 (\"a\\u{1b}[31m b\"), 3002", "dataplane 7,15: offline: 15"] {
        assert!(all.iter().any(|text| text == line), "{line}: {all:?}");
    }
    assert_eq!(picture, self::picture(&plain, &machine), "the same machine makes the same picture");
}

#[test]
fn a_free_list_and_a_cpu_without_a_pool_say_so() {
    let mount = Mount::on_machine(&Machine::new(1, 4, 1));
    mount.make_pool("dataplane", true, &["0", "1"]);
    let task = Sleeper::new();
    write(&mount.tasks("dataplane", "1"), task.pid().to_string()).unwrap();
    let mut command = mount.kcm(&["describe", "--format=svg"]);
    command.env("KCM_DEV_LSCPU_SYSFS", mount.home().join("machine"));
    let (out, err, _) = run(&mut command);
    let document = Document::parse(&out).unwrap_or_else(|error| panic!("{error}: {err}"));
    let texts: Vec<Vec<String>> = groups(&document, "cpu").iter().map(shown).collect();
    assert_eq!(texts[0], ["CPU 0", "dataplane 0", "free"]);
    assert_eq!(texts[1], ["CPU 1", "dataplane 1", &format!("{} (sleep)", task.pid())]);
    assert_eq!(texts[3], ["CPU 3", "no pool", ""]);
}

/// Names that are markup, or that no XML document may contain.
#[test]
fn names_of_others_are_text() {
    let plain = Plain::new();
    let evil = "</text><script>alert(1)</script>";
    for (number, name) in [evil, "a&b<c>\"d'", "]]>", "\u{1b}[31m\u{7}", "日本\u{202e}x"].iter().enumerate()
    {
        plain.make_pool(&name.replace('/', "\u{2215}"), number % 2 == 0, &[(&number.to_string(), "1")]);
    }
    let not_utf8 = plain.conf().join("pools").join(std::ffi::OsStr::from_bytes(b"x\xff"));
    fs::create_dir(&not_utf8).unwrap();
    fs::write(not_utf8.join("exclusive"), "1").unwrap();
    plain.make_pool("named", true, &[("5", "2000"), ("<x>", "2001")]);
    let machine = Machine::new(1, 8, 1);
    let root = plain.home().join("machine/proc");
    let name = |pid: u32, name: &[u8]| {
        fs::create_dir_all(root.join(pid.to_string())).unwrap();
        fs::write(root.join(format!("{pid}/comm")), name).unwrap();
    };
    name(1, b"<b>&\x01\xff\n");
    let picture = picture(&plain, &machine);
    assert!(picture.chars().all(|c| c == '\n' || !c.is_control()), "{picture}");
    let document = Document::parse(&picture).unwrap();
    let known = ["svg", "title", "style", "defs", "pattern", "rect", "path", "g", "text"];
    for node in document.descendants().filter(Node::is_element) {
        assert!(known.contains(&node.tag_name().name()), "{node:?}");
        assert!(node.attributes().all(|attribute| !attribute.name().starts_with("on")), "{node:?}");
    }
    let titles: Vec<&str> = groups(&document, "cpu")
        .iter()
        .map(|cpu| cpu.children().find(|node| node.has_tag_name("title")).unwrap().text().unwrap())
        .collect();
    assert!(titles[1].starts_with("CPU 1: \"a&b<c>\\\"d'\" 1: 1 (\"<b>&\\u{1}\\xff\")"), "{}", titles[1]);
    assert_eq!(groups(&document, "cpu").len(), 8);
}
