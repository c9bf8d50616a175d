//! The tree: rows, names, node ids, modes and sizes, on an engine with two pools on a fake machine.

use std::collections::BTreeSet;

use super::table::may_read_tasks;
use super::*;
use crate::engine::tests::fakes::{Fake, ONLINE};
use crate::engine::tests::{Bed, EXCL, EXCL_1, SHARED, SHELL, caller};
use crate::model::command::Target;
use crate::model::pool::Exclusivity;

fn bed() -> Bed {
    let bed = Bed::new();
    bed.world.spawn(SHELL, ONLINE, |_| ());
    bed
}

fn node(bed: &Bed, path: &str) -> Node<Fake> {
    let root = Node::of(&bed.engine, ROOT).unwrap();
    let names = path.split('/').filter(|name| !name.is_empty());
    names.fold(root, |node, name| node.child(&bed.engine, name).unwrap_or_else(|| panic!("{path}: {name}")))
}

/// Every node with its path.
fn walk(bed: &Bed) -> Vec<(String, Node<Fake>)> {
    let mut found = vec![("/".to_owned(), Node::of(&bed.engine, ROOT).unwrap())];
    let mut next = 0;
    while next < found.len() {
        let (path, node) = found[next].clone();
        let path = path.trim_end_matches('/');
        let children = node.children(&bed.engine).into_iter();
        found.extend(children.map(|(name, child)| (format!("{path}/{name}"), child)));
        next += 1;
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

#[test]
fn names_and_default_modes() {
    let bed = bed();
    let shown: Vec<String> = walk(&bed)
        .into_iter()
        .map(|(path, node)| {
            let stat = node.stat(&bed.engine, caller(SHELL, 0));
            assert_eq!((stat.owner.uid, stat.owner.gid), (0, 0));
            let kind = if stat.is_dir { 'd' } else { '-' };
            let cacheable = if stat.cacheable { "cacheable" } else { "volatile" };
            format!("{kind}{:o} {cacheable} {path}", stat.owner.mode)
        })
        .collect();
    let expected = "d755 cacheable /
d755 cacheable /info
-600 volatile /info/config
-600 volatile /info/events
-444 volatile /info/metrics
-600 volatile /info/reclaimed
-444 cacheable /info/topology
-444 cacheable /info/version
-600 cacheable /lock
d755 cacheable /pools
d755 cacheable /pools/excl
d755 cacheable /pools/excl/1
-644 volatile /pools/excl/1/state
-644 volatile /pools/excl/1/tasks
d755 cacheable /pools/excl/2-3
-644 volatile /pools/excl/2-3/state
-644 volatile /pools/excl/2-3/tasks
-644 cacheable /pools/excl/exclusive
-644 cacheable /pools/excl/mode
-644 cacheable /pools/excl/partial
-644 volatile /pools/excl/queue
-644 volatile /pools/excl/tasks
-644 cacheable /pools/excl/transient
d755 cacheable /pools/shared
d755 cacheable /pools/shared/4-5
-644 volatile /pools/shared/4-5/state
-644 volatile /pools/shared/4-5/tasks
-644 cacheable /pools/shared/exclusive
-644 cacheable /pools/shared/mode
-644 cacheable /pools/shared/partial
-644 volatile /pools/shared/queue
-644 volatile /pools/shared/tasks
-644 cacheable /pools/shared/transient
d755 cacheable /self
-444 volatile /self/claim
-444 volatile /self/cpus
-444 volatile /self/last_error";
    assert_eq!(shown, expected.lines().collect::<Vec<_>>());
}

#[test]
fn node_ids_are_unique_and_lead_to_their_nodes_and_parents() {
    let bed = bed();
    let nodes = walk(&bed);
    let ids: BTreeSet<u64> = nodes.iter().map(|(_, node)| node.id()).collect();
    assert_eq!(ids.len(), nodes.len());
    for (path, node) in nodes {
        let again = Node::of(&bed.engine, node.id()).unwrap();
        assert_eq!((again.id(), again.is_dir()), (node.id(), node.is_dir()), "{path}");
        let parent = Node::of(&bed.engine, node.parent(&bed.engine)).unwrap();
        let is_child = parent.children(&bed.engine).iter().any(|(_, child)| child.id() == node.id());
        assert!(is_child || node.id() == ROOT, "{path}");
    }
    assert_eq!(node(&bed, "pools/excl/tasks").id(), EXCL.tasks_node());
    assert_eq!(node(&bed, "pools/excl/exclusive").id(), EXCL.exclusive_node());
    assert_eq!(node(&bed, "pools/excl/1/tasks").id(), EXCL_1.tasks_node());
    assert_eq!(node(&bed, "pools/excl/partial").id(), EXCL.partial_node());
    assert_eq!(node(&bed, "pools/excl/mode").id(), EXCL.mode_node());
    assert_eq!(node(&bed, "pools/excl/transient").id(), EXCL.transient_node());
    assert_eq!(node(&bed, "pools/excl/queue").id(), EXCL.queue_node());
    assert_eq!(node(&bed, "pools/excl/1/state").id(), EXCL_1.state_node());
    for unknown in [0, 15, 63, EXCL_1.0 + 3, 1 << 40] {
        assert!(Node::of(&bed.engine, unknown).is_none(), "{unknown}");
    }
}

#[test]
fn size_and_links_are_those_of_content_and_directories() {
    let bed = bed();
    bed.write(Target::List(EXCL_1), SHELL, "900").unwrap();
    let reader = caller(SHELL, 0);
    for (path, node) in walk(&bed).into_iter().filter(|(path, _)| path != "/info/metrics") {
        let stat = node.stat(&bed.engine, reader);
        let content = node.show(&bed.engine, reader, 0);
        assert_eq!(stat.size, content.map_or(0, |content| content.len() as u64), "{path}");
        let directories = node.children(&bed.engine).iter().filter(|(_, child)| child.is_dir()).count();
        assert_eq!(stat.links, if node.is_dir() { 2 + directories as u32 } else { 1 }, "{path}");
    }
    let read =
        |path| String::from_utf8(node(&bed, path).show(&bed.engine, reader, 0).unwrap().to_vec()).unwrap();
    assert_eq!((read("pools/excl/1/tasks").as_str(), read("pools/excl/tasks").as_str()), ("900\n", "900\n"));
    assert_eq!(
        (read("pools/excl/exclusive").as_str(), read("pools/shared/exclusive").as_str()),
        ("1\n", "0\n")
    );
    assert_eq!(
        (read("pools/excl/1/state").as_str(), read("pools/excl/2-3/state").as_str()),
        ("affinity\n", "free\n")
    );
    assert_eq!((read("self/claim").as_str(), read("self/cpus").as_str()), ("excl 1\n", "1\n"));
    assert_eq!((read("lock").as_str(), read("pools/excl/2-3/tasks").as_str()), ("", ""));
}

#[test]
fn a_write_reaches_the_file_that_takes_it_and_no_other() {
    let bed = bed();
    let write = |path: &str, data: &[u8]| {
        let request = WriteRequest { data, opener: 0.into(), read_write: false, handle: 0 };
        node(&bed, path).store(&bed.engine, caller(SHELL, 0), &request).map_err(|refused| refused.refusal)
    };
    for (path, node) in walk(&bed) {
        if !node.is_writable() {
            assert_eq!(write(&path, b"0"), Err(Refusal::NotWritable), "{path}");
        }
    }
    write("pools/shared/exclusive", b"1\n").unwrap();
    assert_eq!(bed.engine.configuration().pool(SHARED).unwrap().exclusivity(), Exclusivity::Exclusive);
    write("pools/excl/1/tasks", b"0").unwrap();
    assert_eq!(bed.tasks(EXCL_1), "900");
    write("pools/excl/tasks", b"-0").unwrap();
    assert_eq!(bed.tasks(EXCL_1), "");
    write("info/reclaimed", b"7").unwrap();
    assert_eq!(write("info/reclaimed", b"x"), Err(Refusal::NotASeq));
    assert_eq!(write("pools/shared/exclusive", b"x"), Err(Refusal::NotAFlag));
}

#[test]
fn pools_and_lists_come_and_go_in_their_directories_only() {
    let bed = bed();
    let root = caller(SHELL, 0);
    for path in ["/", "info", "self", "pools/excl/1"] {
        let made = node(&bed, path).make_child(&bed.engine, root, "a");
        assert_eq!(made.map(|_| ()), Err(Refusal::FixedDirectory), "{path}");
    }
    for path in ["/", "info", "pools", "pools/excl/tasks"] {
        assert_eq!(node(&bed, path).remove(&bed.engine, root), Err(Refusal::FixedDirectory), "{path}");
    }
    let pool = node(&bed, "pools").make_child(&bed.engine, root, "a").unwrap();
    let list = pool.make_child(&bed.engine, root, "6").unwrap();
    assert_eq!((node(&bed, "pools/a").id(), node(&bed, "pools/a/6").id()), (pool.id(), list.id()));
    list.remove(&bed.engine, root).unwrap();
    assert!(Node::of(&bed.engine, list.id()).is_none());
    pool.remove(&bed.engine, root).unwrap();
    let again = node(&bed, "pools").make_child(&bed.engine, root, "a").unwrap();
    assert!(again.id() > list.id(), "a node id is never used again");
}

#[test]
fn the_first_class_of_the_mode_that_fits_decides_who_may_read_pids() {
    let bed = bed();
    let may = |uid: u32, mode: u16| {
        let attributes = Attributes { uid: 1000, gid: 0, mode };
        bed.engine.set_attributes(caller(SHELL, 0), EXCL_1.tasks_node(), attributes).unwrap();
        may_read_tasks(&bed.engine, caller(SHELL, uid), EXCL_1)
    };
    assert!(may(1000, 0o400) && !may(1000, 0o044), "the owner");
    assert!(may(7, 0o004) && !may(7, 0o440), "others");
    assert!(may(0, 0o000), "root");
}
