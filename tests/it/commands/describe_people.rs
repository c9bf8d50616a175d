//! `kcm describe` for people: it fits a terminal and shortens nothing elsewhere, summarises many tasks, and shows only the
//! part that `--pool`, `--cpu` and `--pid` select.

use std::fs::File;
use std::io::Read as _;
use std::process::{Command, Stdio};

use nix::pty::{Winsize, openpty};
use nix::sys::signal::Signal;

use super::describe::{example, on_its_machine};
use crate::harness::dir::failure;
use crate::harness::{
    Machine, Mount, Plain, Sleeper, children, report, run, says, signal, text, threads, until, write,
};

/// What a command prints on a terminal of this width.
fn on_terminal(columns: u16, command: &mut Command) -> String {
    let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&size, None).unwrap();
    let mut child = command.stdout(Stdio::from(pty.slave)).spawn().unwrap();
    command.stdout(Stdio::null());
    let (mut bytes, mut screen) = (Vec::new(), File::from(pty.master));
    // Ends with EIO when no process has the terminal.
    let _ = screen.read_to_end(&mut bytes);
    assert!(child.wait().unwrap().success());
    text(&bytes).replace("\r\n", "\n")
}

/// The length of the longest line.
fn longest(text: &str) -> usize {
    text.lines().map(|line| line.chars().count()).max().unwrap()
}

/// 256 CPUs: two sockets of 64 cores with two threads each, and pools for all of them. 120 tasks are on a shared list.
fn large() -> (Plain, Machine) {
    let plain = Plain::new();
    let pids: Vec<String> = (1201..1321).map(|pid| pid.to_string()).collect();
    plain.make_pool("infra", false, &[("0-15,128-143", &pids.join(","))]);
    let lists: Vec<(String, String)> =
        (16..128).map(|cpu| (format!("{cpu},{}", cpu + 128), (2000 + cpu).to_string())).collect();
    let lists: Vec<(&str, &str)> = lists.iter().map(|(list, task)| (list.as_str(), task.as_str())).collect();
    plain.make_pool("dataplane", true, &lists);
    (plain, Machine::new(2, 64, 2))
}

#[test]
fn a_terminal_is_not_wider_than_its_lines() {
    let (plain, machine) = large();
    for format in ["table", "map"] {
        for columns in [60, 80, 132] {
            let mut command = plain.kcm(&["describe", "--format", format]);
            let command = on_its_machine(&plain, &machine, &mut command).env_remove("COLUMNS");
            let printed = on_terminal(columns, command);
            assert!(longest(&printed) <= columns.into(), "{format} {columns}:\n{printed}");
            let summary = if (format, columns) == ("map", 60) { "120 tasks" } else { " more" };
            assert!(printed.contains(summary) && printed.contains("dataplane"), "{format}:\n{printed}");
            let cpu_lines = if format == "map" { 257 } else { 114 };
            assert_eq!(printed.lines().count(), cpu_lines, "{format}:\n{printed}");
        }
    }
}

#[test]
fn the_first_tasks_stand_for_all_at_a_terminal() {
    let (plain, machine) = large();
    let mut command = plain.kcm(&["describe", "--format=table", "--pool=infra"]);
    let command = on_its_machine(&plain, &machine, &mut command);
    let expected = |tasks: &str| {
        format!(
            "POOL   EXCLUSIVE  CPUS          TASKS{}NOTE\ninfra  no         0-15,128-143  {tasks}\n",
            " ".repeat(tasks.len() - 3)
        )
    };
    let first = "1201,1202,1203 +117 more";
    assert_eq!(on_terminal(62, command.env_remove("COLUMNS")), expected(first));
    assert_eq!(on_terminal(200, command.env("COLUMNS", "62")), expected(first), "COLUMNS takes precedence");
    // A width of 0 is not one.
    assert!(longest(&on_terminal(0, command.env("COLUMNS", "0"))) <= 80);
}

#[test]
fn nothing_is_shortened_in_a_pipe_or_with_wide() {
    let (plain, machine) = large();
    let all: Vec<String> = (1201..1321).map(|pid| pid.to_string()).collect();
    for (format, all) in [("table", all.join(",")), ("map", all.join(", "))] {
        let words = ["describe", "--format", format];
        let mut command = plain.kcm(&words);
        let (piped, _, _) = run(on_its_machine(&plain, &machine, &mut command).env("COLUMNS", "60"));
        assert_eq!(piped.matches(&all).count(), 1, "{format}");
        // The header and the other lines are not as long as the longest cell.
        let others = piped.lines().filter(|line| !line.contains(&all));
        assert!(others.map(|line| line.chars().count()).max().unwrap() < 100, "{format}:\n{piped}");
        let mut command = plain.kcm(&[&words[..], &["-o", "wide"]].concat());
        let wide = on_terminal(60, on_its_machine(&plain, &machine, &mut command));
        let lines = if format == "map" { 32 } else { 1 };
        assert_eq!(wide.matches(&all).count(), lines, "{format}");
    }
    let mut command = plain.kcm(&["describe", "-o", "wide"]);
    let (out, _, _) = run(on_its_machine(&plain, &machine, &mut command));
    assert!(out.starts_with("POOL"), "without a format it is a table");
    for format in ["json", "svg"] {
        let (_, err, status) = run(&mut plain.kcm(&["describe", "-o", "wide", "--format", format]));
        assert_eq!(status, Some(2), "{format}: {err}");
        assert!(err.contains("-o wide is for --format=table and --format=map"), "{format}: {err}");
    }
}

#[test]
fn flags_select_pools_and_cpus_in_every_format() {
    let plain = example();
    let machine = Machine::legacy_example();
    let describe = |words: &[&str]| {
        let mut command = plain.kcm(&[&["describe"][..], words].concat());
        on_its_machine(&plain, &machine, &mut command);
        command
    };
    let lists = |words: &[&str]| {
        let described = report(&mut describe(words));
        let mut found = Vec::new();
        for (name, pool) in described["pools"].as_object().unwrap() {
            let names = pool["cpuLists"].as_object().unwrap().keys();
            found.extend(names.map(|list| format!("{name} {list}")));
        }
        found
    };
    assert_eq!(lists(&["--pool=infra"]), ["infra 0-2,8-10"]);
    assert_eq!(lists(&["--pool=infra", "--pool=controlplane"]), ["controlplane 3,11", "infra 0-2,8-10"]);
    assert_eq!(lists(&["--cpu=4,8"]), ["dataplane 4,12", "infra 0-2,8-10"]);
    assert_eq!(lists(&["--cpu=4-15", "--pool=infra"]), ["infra 0-2,8-10"]);
    assert_eq!(lists(&["--cpu=4", "--pool=infra"]), [""; 0]);
    assert_eq!(lists(&["--pid=2001"]), ["dataplane 5,13"]);
    let expected = "\
POOL       EXCLUSIVE  CPUS  TASKS  NOTE
dataplane  yes        5,13  2001
";
    says(&mut describe(&["--format=table", "--pid=2001"]), expected);
    let expected = "\
CPU  CORE  SOCKET  NODE  POOL       LIST      TASKS
8    0     0       0     infra      0-2,8-10  3000, 3001 (\"a\\u{1b}[31m b\"), 3002
4    4     0       0     dataplane  4,12      2000 (forwarder)
";
    says(&mut describe(&["--format=map", "--cpu=4,8"]), expected);
    let expected = "\
CPU  CORE  SOCKET  NODE  POOL       LIST  TASKS
5    5     0       0     dataplane  5,13  2001
13   5     0       0     dataplane  5,13  2001
";
    says(&mut describe(&["--format=map", "--pid=2001"]), expected);
    let (picture, _, _) = run(&mut describe(&["--format=svg", "--pool=controlplane"]));
    assert_eq!(picture.matches("id=\"cpu-").count(), 2);
    let refused = failure(&mut describe(&["--pool=x"]));
    assert_eq!(refused, "x: no such pool; there is: controlplane, dataplane, infra");
    assert_eq!(failure(&mut describe(&["--cpu=3,99"])), "this machine has no CPU 99; it has 0-15");
    for wrong in ["--cpu=", "--cpu=x", "--pid=-1", "--pid=x"] {
        assert_eq!(run(&mut describe(&[wrong])).2, Some(2), "{wrong}");
    }
}

#[test]
fn a_process_is_found_by_its_pid_or_thread() {
    let mount = Mount::with_dataplane();
    let (holder, other) = (Sleeper::new(), Sleeper::new());
    write(&mount.tasks("dataplane", "1"), holder.pid().to_string()).unwrap();
    let find = |pid: u32| mount.kcm(&["describe", "--format=table", "--pid", &pid.to_string()]);
    let (out, err, status) = run(&mut find(holder.pid()));
    let line = format!("dataplane  yes        1     {}", holder.pid());
    assert_eq!((out.lines().nth(1), status), (Some(line.as_str()), Some(0)), "{err}");
    let expected = format!(
        "{} (sleep): it is on no CPU list; kcm describe --format=table shows the lists with their tasks",
        other.pid()
    );
    assert_eq!(failure(&mut find(other.pid())), expected);
    assert!(failure(&mut find(u32::MAX)).starts_with("4294967295: no such process; "));

    // A process with two threads, and one with a parent on a list.
    let line = "echo $$ > $C/pools/dataplane/0/tasks
        exec python3 -c 'import subprocess, threading, time
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
subprocess.run([\"sleep\", \"1000\"])'";
    let parent = Sleeper::spawn(&mut mount.bash(line));
    let child = || children(parent.pid()).first().copied();
    let is_sleep =
        |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|it| it == "sleep\n");
    until("both sleep", || child().is_some_and(is_sleep) && threads(parent.pid()).len() == 2);
    let thread = threads(parent.pid()).into_iter().find(|tid| *tid != parent.pid()).unwrap();
    let (out, err, _) = run(&mut find(thread));
    assert!(out.ends_with(&format!("{}\n", parent.pid())), "{out}{err}");
    let child = child().unwrap();
    let expected = format!(
        "{child} (sleep): it is on no CPU list itself; its ancestor {} (python3) is on dataplane 0",
        parent.pid()
    );
    assert_eq!(failure(&mut find(child)), expected);
    signal(child, Signal::SIGKILL);
}
