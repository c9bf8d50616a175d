//! `kcm isolate` at a terminal: Ctrl-C, Ctrl-Z and fg act on the command as they do without kcm, on a mount and on a
//! plain directory.

use crate::harness::dir::{Dir, on_both};
use crate::harness::{Terminal, children, stat, until};

const CTRL_C: &str = "\x03";
const CTRL_Z: &str = "\x1a";

/// kcm and, on a plain directory, its command.
fn processes(dir: &dyn Dir) -> Vec<u32> {
    let holder: u32 = dir.tasks_of("p", "0").parse().expect("one holder");
    [vec![holder], if dir.is_mounted() { Vec::new() } else { children(holder) }].concat()
}

#[test]
fn ctrl_c_ends_the_command() {
    on_both(|dir| {
        dir.make_pool("p", true, &["0"]);
        let mut terminal = Terminal::start(dir);
        terminal.see("$ ");
        // Not while a shell forks: dash loses a signal at that moment.
        terminal.press(
            "\"$KCM\" isolate --conf-dir=\"$C\" --pool=p -- bash -c 'echo sta\"\"rted; exec sleep 1000'\n",
        );
        terminal.see("started");
        terminal.press(CTRL_C);
        terminal.see("$ ");
        assert_eq!(terminal.status(), "130");
        until("no process is left", || dir.tasks_of("p", "0").is_empty());
    });
}

#[test]
fn a_command_that_handles_ctrl_c_keeps_running() {
    on_both(|dir| {
        dir.make_pool("p", true, &["0"]);
        let mut terminal = Terminal::start(dir);
        terminal.see("$ ");
        // Without children: if one ends at that moment, bash takes the signal for handled.
        let script = r#"trap "echo hand''led; exit 5" INT; echo sta""rted; while :; do read -t 1 x; done"#;
        std::fs::write(dir.conf().with_file_name("script"), script).unwrap();
        terminal.press("\"$KCM\" isolate --conf-dir=\"$C\" --pool=p -- bash \"$C/../script\"\n");
        terminal.see("started");
        terminal.press(CTRL_C);
        terminal.see("handled");
        terminal.see("$ ");
        assert_eq!(terminal.status(), "5", "it gets the signal once, and its status counts");
        until("no process is left", || dir.tasks_of("p", "0").is_empty());
    });
}

#[test]
fn ctrl_z_stops_it_and_fg_continues_it() {
    on_both(|dir| {
        dir.make_pool("p", true, &["0"]);
        let mut terminal = Terminal::start(dir);
        terminal.see("$ ");
        terminal.press(
            "\"$KCM\" isolate --conf-dir=\"$C\" --pool=p -- sh -c 'echo sta\"\"rted; read x; echo got $x'\n",
        );
        terminal.see("started");
        let processes = processes(dir);
        for _ in 0..3 {
            terminal.press(CTRL_Z);
            terminal.see("Stopped");
            terminal.see("$ ");
            until("all have stopped", || processes.iter().all(|&pid| stat(pid, 3) == "T"));
            assert_eq!(dir.tasks_of("p", "0"), processes[0].to_string(), "it keeps its list");
            terminal.press("fg\n");
            until("all run again", || processes.iter().all(|&pid| stat(pid, 3) != "T"));
        }
        terminal.press("hello\n");
        terminal.see("got hello");
        terminal.see("$ ");
        assert_eq!(terminal.status(), "0");
        until("no process is left", || dir.tasks_of("p", "0").is_empty());
    });
}

#[test]
fn a_command_that_ignores_ctrl_z_keeps_running() {
    on_both(|dir| {
        dir.make_pool("p", true, &["0"]);
        let mut terminal = Terminal::start(dir);
        terminal.see("$ ");
        let script = r#"trap "" TSTP; echo sta""rted; while read x; do echo "g""ot $x"; done"#;
        std::fs::write(dir.conf().with_file_name("script"), script).unwrap();
        terminal.press("\"$KCM\" isolate --conf-dir=\"$C\" --pool=p -- bash \"$C/../script\"\n");
        terminal.see("started");
        terminal.press(CTRL_Z);
        terminal.press("hello\n");
        terminal.see("got hello");
        assert!(processes(dir).iter().all(|&pid| stat(pid, 3) != "T"));
        terminal.press("\x04");
        terminal.see("$ ");
        assert_eq!(terminal.status(), "0");
    });
}
