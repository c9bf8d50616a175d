//! Completion: what a shell offers on a mount, and that it never hangs.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::{KCM, Mount, Terminal, run};

/// How long a completion may take on a busy machine if the daemon does not answer. It gives up after a second.
const MOST: Duration = Duration::from_secs(30);

fn mount() -> Mount {
    let mount = Mount::new();
    mount.make_pool("data-a", true, &["0"]);
    mount.make_pool("data-b", false, &["1"]);
    mount.make_pool("web", true, &[]);
    mount
}

/// The words that bash offers for the last of these words, as the script passes them: split at `=`.
fn offered(words: &[&str]) -> Vec<String> {
    let script = "source <(\"$KCM\" completions bash); kcm() { \"$KCM\" \"$@\"; }; COMP_WORDS=(\"$@\")
        COMP_CWORD=$(($# - 1)); last=${@: -1}; [ \"$last\" != = ] || last=
        compopt() { :; }; _kcm kcm \"$last\" \"\"; printf '%s\\n' \"${COMPREPLY[@]}\"";
    let mut bash = Command::new("bash");
    bash.args(["--norc", "-c", script, "bash"]).args(words).env("KCM", KCM);
    let (out, err, code) = run(&mut bash);
    assert_eq!((err.as_str(), code), ("", Some(0)), "{words:?}");
    out.lines().map(str::to_owned).filter(|line| !line.is_empty()).collect()
}

#[test]
fn pools_are_completed_in_both_spellings() {
    let mount = mount();
    let conf_dir = format!("--conf-dir={}", mount.conf().display());
    let conf = mount.conf().display().to_string();
    let all = ["data-a", "data-b", "web"];
    assert_eq!(offered(&["kcm", "isolate", &conf_dir, "--pool", ""]), all);
    assert_eq!(offered(&["kcm", "isolate", "--conf-dir", "=", &conf, "--pool", "="]), all);
    assert_eq!(offered(&["kcm", "isolate", "--conf-dir", "=", &conf, "--pool", "=", "da"]), &all[..2]);
    assert_eq!(offered(&["kcm", "isolate", &conf_dir, "--pool", "x"]), [""; 0]);
}

#[test]
fn commands_flags_and_values_are_completed() {
    assert_eq!(offered(&["kcm", "desc"]), ["describe"]);
    assert_eq!(offered(&["kcm", "man", "iso"]), ["isolate"]);
    assert!(offered(&["kcm", "man", ""]).contains(&"5".to_owned()));
    assert_eq!(offered(&["kcm", "isolate", "--po"]), ["--pool"]);
    assert_eq!(offered(&["kcm", "describe", "--format", "=", "ta"]), ["table"]);
}

#[test]
fn a_tab_at_a_terminal_completes_a_pool() {
    let mount = mount();
    let mut terminal = Terminal::start(&mount);
    terminal.press("source <(kcm completions bash)\n");
    terminal.see("\n");
    terminal.press(&format!("kcm isolate --conf-dir={} --pool=w\t", mount.conf().display()));
    terminal.see("--pool=web");
    terminal.press("\x15kcm man unin\t");
    terminal.see("kcm man uninstall");
}

#[test]
fn a_completion_ends_if_the_daemon_does_not_answer() {
    let mount = mount();
    let conf_dir = format!("--conf-dir={}", mount.conf().display());
    let paused = mount.pause();
    let started = Instant::now();
    assert_eq!(offered(&["kcm", "isolate", &conf_dir, "--pool", ""]), [""; 0]);
    assert!(started.elapsed() < MOST, "{:?}", started.elapsed());
    drop(paused);
}

#[test]
fn every_shell_has_a_script() {
    for (shell, part) in [
        ("bash", "complete -o bashdefault -o default -F _kcm kcm\n"),
        ("elvish", "set edit:completion:arg-completer[kcm]"),
        ("fish", "complete --keep-order --exclusive --command kcm"),
        ("powershell", "Register-ArgumentCompleter -Native -CommandName kcm"),
        ("zsh", "#compdef kcm\n"),
    ] {
        let (out, err, code) = run(Command::new(KCM).args(["completions", shell]));
        assert_eq!((err.as_str(), code), ("", Some(0)), "{shell}");
        assert!(out.contains(part) && out.contains("KCM_COMPLETE"), "{shell}: {out}");
    }
}
