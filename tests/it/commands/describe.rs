//! `kcm describe`: the legacy JSON, byte for byte, and a table and a map for people. It fails with one line if there
//! is nothing to describe, and prints nothing into a pipe without a reader. `describe_people` has what it does at a
//! terminal and which part it shows, `describe_svg` the picture.

use std::fs;
use std::process::Command;

use crate::harness::dir::{Dir, failure, on_both};
use crate::harness::{Machine, Plain, data, says, set_mode, text, write};

/// The example of the legacy documentation, with its tasks.
pub fn example() -> Plain {
    let plain = Plain::new();
    plain.make_pool("controlplane", false, &[("3,11", "1000,1001,1002,1003")]);
    plain.make_pool(
        "dataplane",
        true,
        &[("4,12", "2000"), ("5,13", "2001"), ("6,14", "2002"), ("7,15", "2003")],
    );
    plain.make_pool("infra", false, &[("0-2,8-10", "3000,3001,3002")]);
    plain
}

/// On the machine of the example. Two of the processes have names; one of the names has control characters.
pub fn on_its_machine<'a>(plain: &Plain, machine: &Machine, command: &'a mut Command) -> &'a mut Command {
    let root = plain.home().join("machine");
    machine.write(&root);
    for (pid, name) in [(2000, "forwarder\n"), (3001, "a\u{1b}[31m b\n")] {
        fs::create_dir_all(root.join(format!("proc/{pid}"))).unwrap();
        fs::write(root.join(format!("proc/{pid}/comm")), name).unwrap();
    }
    command.env("KCM_DEV_LSCPU_SYSFS", &root).env("KCM_PROC_FS", root.join("proc"))
}

#[test]
fn the_legacy_example_is_printed_byte_for_byte() {
    let plain = example();
    let expected = data("describe-2017.json", &[("conf", plain.conf().to_str().unwrap())]);
    says(&mut plain.kcm(&["describe"]), &expected);
    says(&mut plain.kcm(&["describe", "--format=json"]), &expected);
}

#[test]
fn names_are_printed_in_ascii_and_sorted() {
    let plain = Plain::new();
    plain.make_pool("zoë", false, &[("10", "1"), ("2", "")]);
    plain.make_pool("a\"b", true, &[]);
    let expected = data("describe-names.json", &[("conf", plain.conf().to_str().unwrap())]);
    says(&mut plain.kcm(&["describe"]), &expected);
}

#[test]
fn the_table_has_a_line_per_list_with_its_errors() {
    let plain = example();
    plain.make_pool("old", false, &[("nonsense", "")]);
    plain.make_pool("later", true, &[]);
    let machine = Machine { offline: vec![8, 15], ..Machine::legacy_example() };
    let mut command = plain.kcm(&["describe", "--format=table"]);
    says(on_its_machine(&plain, &machine, &mut command), &data("describe-table.txt", &[]));
}

#[test]
fn the_map_has_a_line_per_cpu_with_its_tasks() {
    let plain = example();
    plain.make_pool("free", true, &[("11", "")]);
    fs::rename(plain.conf().join("pools/controlplane/3,11"), plain.conf().join("pools/controlplane/3"))
        .unwrap();
    let machine = Machine { offline: vec![15], cmdline: "isolcpus=4-7,12-14", ..Machine::legacy_example() };
    let mut command = plain.kcm(&["describe", "--format=map"]);
    says(on_its_machine(&plain, &machine, &mut command), &data("describe-map.txt", &[]));
}

#[test]
fn an_error_is_one_line() {
    on_both(|dir| {
        let conf = dir.conf();
        let absent = crate::harness::kcm_for(&conf.with_file_name("absent"), &["describe"]);
        let expected = format!(
            "{}: no such directory; run kcm mount, or give --conf-dir",
            conf.with_file_name("absent").display()
        );
        assert_eq!(failure(&mut { absent }), expected);
        let file = conf.with_file_name("file");
        fs::write(&file, "").unwrap();
        let expected = format!("{}: not a directory", file.display());
        assert_eq!(failure(&mut crate::harness::kcm_for(&file, &["describe"])), expected);
        dir.make_pool("p", true, &["0"]);
        let tasks = conf.join("pools/p/0/tasks");
        for path in [tasks.clone(), conf.join("pools/p")] {
            set_mode(&path, 0o700);
            let line = failure(&mut dir.kcm_as_nobody(&["describe"]));
            assert!(line.starts_with(conf.join("pools/p").to_str().unwrap()), "{line}");
            assert!(
                line.ends_with(
                    "Permission denied; run it as root, or let root grant access with chown or chmod"
                ),
                "{line}"
            );
        }
    });
}

#[test]
fn a_broken_plain_directory_is_one_line_with_the_file() {
    let plain = Plain::new();
    let conf = plain.conf();
    let conf = conf.display();
    fs::remove_dir(plain.conf().join("pools")).unwrap();
    let line = failure(&mut plain.kcm(&["describe"]));
    assert_eq!(line, format!("{conf}: no pools; run kcm init (is kcm mount running?)"));
    fs::write(plain.conf().join("pools"), "").unwrap();
    let line = failure(&mut plain.kcm(&["describe"]));
    assert_eq!(line, format!("{conf}/pools: Not a directory"));
}

#[test]
fn the_directory_above_pools_is_named() {
    on_both(|dir| {
        dir.make_pool("p", true, &["0"]);
        let pools = dir.conf().join("pools");
        let line = failure(&mut crate::harness::kcm_for(&pools, &["describe"]));
        let (pools, conf) = (pools.display(), dir.conf());
        let conf = conf.display();
        assert_eq!(line, format!("{pools}: no pools; the directory is the one above: --conf-dir={conf}"));
    });
}

#[test]
fn a_pipe_without_reader_is_no_error_message() {
    on_both(|dir| {
        dir.make_pool("p", true, &["0"]);
        for format in ["json", "table", "map", "svg"] {
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            let mut command = dir.kcm(&["describe", "--format", format]);
            let output = command.stdout(writer).output().unwrap();
            assert_eq!(text(&output.stderr), "", "{format}");
            assert!(!output.status.success(), "{format}");
        }
    });
}

#[test]
fn a_full_disk_is_reported() {
    let plain = example();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = plain.kcm(&["describe"]).stdout(full).output().unwrap();
    let printed = text(&output.stderr);
    assert_eq!(printed, "ERROR:root:standard output: No space left on device; free some disk space\n");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn on_a_mount_only_living_tasks_are_shown() {
    let mount = crate::harness::Mount::with_dataplane();
    let (dying, living) = (crate::harness::Sleeper::new(), crate::harness::Sleeper::new());
    write(&mount.tasks("dataplane", "0"), dying.pid().to_string()).unwrap();
    write(&mount.tasks("dataplane", "1"), living.pid().to_string()).unwrap();
    dying.end();
    let output = Dir::kcm(&mount, &["describe"]).output().unwrap();
    let described: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let lists = &described["pools"]["dataplane"]["cpuLists"];
    assert_eq!(lists["0"]["tasks"], serde_json::json!([]));
    assert_eq!(lists["1"]["tasks"], serde_json::json!([living.pid()]));
}
