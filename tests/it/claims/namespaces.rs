//! A PID means what it means to the writer: a command changes only processes in the writer's PID namespace.

use std::fs::{self, File};
use std::io::Write as _;

use crate::harness::pid_namespace::PidNamespace;
use crate::harness::{Mount, Shell, Sleeper, children, errno, free, held, masks, until, write};
use nix::errno::Errno;

/// The PID of a container's first process, outside.
fn first(container: &Shell) -> u32 {
    until("the container has started", || !children(container.pid()).is_empty());
    children(container.pid())[0]
}

/// Starts a process in the container with this PID there; returns its PID outside.
fn start_inside(container: &mut Shell, number: u32) -> u32 {
    let last = number - 1;
    let line = format!("echo {last} > /proc/sys/kernel/ns_last_pid; sleep 1000 >/dev/null & echo $!");
    assert_eq!(container.ask(&line).trim(), number.to_string());
    *children(first(container)).last().unwrap()
}

/// The output and the errors of a line that the shell runs; empty if it succeeds.
fn printed(shell: &mut Shell, line: &str) -> String {
    shell.ask(&format!("{{ {line}; }} 2>&1")).trim().to_owned()
}

#[test]
fn a_container_shell_claims_with_its_own_pid() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let init = masks(1);
    for text in ["$$", "0"] {
        let mut container = mount.container();
        let line =
            format!("echo {text} > $C/pools/dataplane/0/tasks && cat $C/self/claim $C/self/cpus; echo $$");
        assert_eq!(container.ask(&line).trim(), "dataplane 0\n0\n1", "{text}");
        let bash = first(&container);
        assert_eq!((held(&list), masks(bash)), (vec![bash], vec!["0".to_owned()]), "{text}");
        assert_eq!(printed(&mut container, &format!("echo -{text} > $C/pools/dataplane/tasks")), "");
        assert_eq!((held(&list), masks(bash)), (vec![], vec![free()]), "{text}");
    }
    assert_eq!(masks(1), init);
}

#[test]
fn a_pid_names_the_process_inside() {
    let mount = Mount::with_dataplane();
    let lists = ["0", "1"].map(|list| mount.tasks("dataplane", list));
    let outer = Sleeper::new();
    let n = outer.pid();
    write(&lists[0], n.to_string()).unwrap();
    let mut container = mount.container();
    let outside_is_as_it_was = || {
        assert_eq!(held(&lists[0]), [n]);
        assert_eq!(masks(n), ["0"]);
    };
    let no_such = "No such process";
    for text in [n.to_string(), format!("-{n}")] {
        for file in ["0/tasks", "1/tasks", "tasks"] {
            let refused = printed(&mut container, &format!("echo {text} > $C/pools/dataplane/{file}"));
            assert!(refused.ends_with(no_such), "{text} to {file}: {refused}");
            outside_is_as_it_was();
        }
    }
    let inner = start_inside(&mut container, n);
    assert_ne!(inner, n);
    let busy = printed(&mut container, &format!("echo {n} > $C/pools/dataplane/0/tasks"));
    assert!(busy.ends_with("Device or resource busy"), "{busy}");
    for (text, file) in [("-N", "0/tasks"), ("-N", "tasks"), ("N", "tasks"), ("N", "1/tasks")] {
        let line = format!("echo {} > $C/pools/dataplane/{file}", text.replace('N', &n.to_string()));
        assert_eq!(printed(&mut container, &line), "", "{line}");
        outside_is_as_it_was();
        let claimed = if text == "N" { vec![inner] } else { vec![] };
        assert_eq!(held(&lists[1]), claimed, "{line}");
    }
    assert_eq!(masks(inner), ["1"]);
    assert_eq!(printed(&mut container, &format!("echo -{n} > $C/pools/dataplane/1/tasks")), "");
    assert_eq!((held(&lists[1]), masks(inner)), (vec![], vec![free()]));
    outside_is_as_it_was();
    // Outside, the number names the process outside.
    write(&lists[1], n.to_string()).expect("a move");
    assert_eq!((held(&lists[1]), masks(inner)), (vec![n], vec![free()]));
    write(&lists[0], inner.to_string()).expect("the process inside also has a PID outside");
    assert_eq!((held(&lists[0]), masks(inner)), (vec![inner], vec!["0".to_owned()]));
}

#[test]
fn one_pid_in_two_containers_is_two_processes() {
    let mount = Mount::with_dataplane();
    let lists = ["0", "1"].map(|list| mount.tasks("dataplane", list));
    let mut containers = [mount.container(), mount.container()];
    let inner = containers.each_mut().map(|container| start_inside(container, 4711));
    for (n, container) in containers.iter_mut().enumerate() {
        assert_eq!(printed(container, &format!("echo 4711 > $C/pools/dataplane/{n}/tasks")), "");
    }
    assert_eq!(lists.each_ref().map(|list| held(list)), [vec![inner[0]], vec![inner[1]]]);
    assert_eq!(printed(&mut containers[0], "echo -4711 > $C/pools/dataplane/1/tasks"), "");
    assert_eq!(held(&lists[1]), [inner[1]], "the container cannot release the other's task");
    assert_eq!(printed(&mut containers[0], "echo -4711 > $C/pools/dataplane/tasks"), "");
    assert_eq!(lists.each_ref().map(|list| held(list)), [vec![], vec![inner[1]]]);
}

#[test]
fn a_nested_container_has_its_own_pids() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let mut middle = mount.container();
    let inner = "unshare --pid --fork --mount-proc bash -c 'sleep 1000 & wait' >/dev/null & echo $!";
    let unshare: u32 = middle.ask(inner).trim().parse().unwrap();
    let unshare_outside = *children(first(&middle)).last().unwrap();
    until("the innermost shell has started", || {
        children(unshare_outside).first().is_some_and(|&bash| !children(bash).is_empty())
    });
    let bash = children(unshare_outside)[0];
    let sleep = children(bash)[0];
    // By its PID in the middle namespace, in which it is the child of `unshare`.
    let number = middle.ask(&format!("cat /proc/{unshare}/task/{unshare}/children")).trim().to_owned();
    assert_ne!(number, bash.to_string());
    assert_eq!(printed(&mut middle, &format!("echo {number} > $C/pools/dataplane/0/tasks")), "");
    assert_eq!((held(&list), masks(bash), masks(sleep)), (vec![bash], vec!["0".to_owned()], vec![free()]));
    assert_eq!(printed(&mut middle, &format!("echo -{number} > $C/pools/dataplane/0/tasks")), "");
    // By its PID in its own namespace.
    let inside = |line: &str| {
        let target = format!("nsenter --pid --mount --target={bash} bash -c '{line}'");
        mount.sh(&target)
    };
    inside("echo 1 > $C/pools/dataplane/0/tasks");
    assert_eq!((held(&list), masks(bash)), (vec![bash], vec!["0".to_owned()]));
    inside("echo -1 > $C/pools/dataplane/0/tasks; echo 2 > $C/pools/dataplane/0/tasks");
    assert_eq!((held(&list), masks(bash), masks(sleep)), (vec![sleep], vec![free()], vec!["0".to_owned()]));
}

#[test]
fn a_writer_may_use_the_daemons_pid_for_itself() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    // /proc shows the host's processes.
    let mut container = Shell::start(&mut mount.bash("exec unshare --pid --fork --kill-child bash"));
    let line = "read -r pid rest < /proc/self/stat; echo $pid > $C/pools/dataplane/0/tasks; echo $$ $pid";
    let bash = first(&container);
    assert_eq!(container.ask(line).trim(), format!("1 {bash}"));
    assert_eq!((held(&list), masks(bash)), (vec![bash], vec!["0".to_owned()]));
    // The number names neither the parent nor a child.
    assert_eq!(container.ask("sleep 1000 >/dev/null & echo $!").trim(), "2");
    let child = children(bash)[0];
    for stranger in [container.pid(), child, std::process::id()] {
        let refused = printed(&mut container, &format!("echo {stranger} > $C/pools/dataplane/1/tasks"));
        assert!(refused.ends_with("No such process"), "{stranger}: {refused}");
    }
    assert_eq!(held(&mount.pool("dataplane").join("tasks")), [bash]);
}

#[test]
fn a_writer_invisible_to_the_daemon_is_refused() {
    let mut inside = PidNamespace::new("dataplane", true);
    let task = inside.sleeper();
    inside.shell.ask(&format!("echo {task} > $P/0/tasks"));
    let daemons = inside.mount.daemons();
    let before: Vec<_> = daemons.iter().map(|&pid| masks(pid)).collect();
    let own = std::process::id();
    let [list_0, list_1, pool] = ["0/tasks", "1/tasks", "tasks"]
        .map(|file| inside.as_seen_inside(&inside.mount.pool("dataplane").join(file)));
    for file in [&list_0, &list_1, &pool] {
        for text in
            ["0".into(), "-0".into(), own.to_string(), "1".into(), task.to_string(), format!("-{task}")]
        {
            assert_eq!(errno(write(file, &text)), Errno::ESRCH, "{text}");
            let mut both_ways = File::options().read(true).write(true).open(file).unwrap();
            assert_eq!(errno(both_ways.write(text.as_bytes())), Errno::ESRCH, "{text}");
        }
    }
    assert_eq!(fs::read_to_string(&list_0).unwrap(), format!("{task}\n"), "reading works");
    for file in ["claim", "cpus", "last_error"] {
        let file = inside.as_seen_inside(&inside.mount.conf().join("self").join(file));
        assert_eq!(fs::read_to_string(&file).unwrap(), "", "{}", file.display());
    }
    assert_eq!(daemons.iter().map(|&pid| masks(pid)).collect::<Vec<_>>(), before);
    assert!(masks(own).iter().all(|mask| *mask == free()));
    assert_eq!(inside.read("pools/dataplane/tasks"), task.to_string());
}

#[test]
fn self_files_stop_at_the_first_process() {
    let mount = Mount::with_dataplane();
    let mut outer = Shell::start(&mut mount.bash("exec bash"));
    let about = "cat $C/self/claim $C/self/cpus $C/self/last_error";
    outer.ask("echo $$ > $C/pools/dataplane/0/tasks; echo nonsense > $C/pools/dataplane/tasks 2>/dev/null");
    assert!(outer.ask(about).starts_with("dataplane 0\n0\n20"));
    let container = "unshare --pid --fork --mount-proc bash -c";
    let inside = outer.ask(&format!("{container} '{about}; bash -c \"{about}; true\"; true'"));
    assert_eq!(inside, "", "nothing about the shell outside, although they run on its CPUs");
    let deep = outer.ask(&format!(
        "{container} 'echo $$ > $C/pools/dataplane/1/tasks
            echo more > $C/pools/dataplane/tasks
            bash -c \"bash -c \\\"{about}; true\\\"; true\"
            unshare --pid --fork --mount-proc bash -c \"{about}; echo deeper; true\"' 2>/dev/null"
    ));
    let lines: Vec<&str> = deep.lines().collect();
    let [claim, cpus, error, deeper] = lines[..] else { panic!("{deep}") };
    assert_eq!((claim, cpus, deeper), ("dataplane 1", "1", "deeper"));
    assert!(error.contains(" 1: EINVAL: \"more\" is not a PID"), "{error}");
    assert!(outer.ask("cat $C/self/last_error").contains("\"nonsense\""), "nothing about the shells inside");
}

#[test]
fn a_pipeline_explains_itself_to_its_shell() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    let shells: [(&str, Shell); 2] =
        [("outside", Shell::start(&mut mount.bash("exec bash"))), ("inside", mount.container())];
    for (place, mut shell) in shells {
        let number = shell.ask("echo $$").trim().to_owned();
        let pid = if place == "inside" { first(&shell) } else { shell.pid() };
        let holder = Sleeper::new();
        write(&list, holder.pid().to_string()).unwrap();
        for tee in [
            "tee $C/pools/dataplane/0/tasks",
            "setpriv --no-new-privs sh -c \"tee $C/pools/dataplane/0/tasks; true\"",
        ] {
            shell.ask("echo nonsense > $C/pools/dataplane/tasks 2>/dev/null");
            shell.ask(&format!("echo $$ | {tee} 2>&1"));
            let message = shell.ask("cat $C/self/last_error");
            let expected = format!(" {number}: EBUSY: dataplane 0 is held by {} (sleep) ", holder.pid());
            assert!(message.contains(&expected), "{place}, {tee}: {message}");
        }
        holder.end();
        assert_eq!(shell.ask("echo $$ | tee $C/pools/dataplane/0/tasks"), format!("{number}\n"));
        assert_eq!((held(&list), masks(pid)), (vec![pid], vec!["0".to_owned()]), "{place}");
        assert_eq!(shell.ask("cat $C/self/claim"), "dataplane 0\n", "{place}");
    }
}
