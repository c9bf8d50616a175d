//! `kcm isolate` with a list, a running process or a user of the caller's choice.

use std::fs;

use crate::harness::dir::{Dir as _, failure, on_both};
use crate::harness::{KCM, Mount, NOBODY, Sleeper, masks, run, says, until, write};

#[test]
fn a_list_can_be_chosen() {
    on_both(|dir| {
        dir.make_pool("p", true, &["0", "1"]);
        says(&mut dir.kcm(&["isolate", "--pool=p", "--list=1", "echo $KCM_CPUS_ASSIGNED"]), "1\n");
        says(
            &mut dir.kcm(&[
                "isolate",
                "--pool=p",
                "--list",
                "1-1",
                "--",
                "sh",
                "-c",
                "echo $KCM_CPUS_ASSIGNED",
            ]),
            "1\n",
        );
        let line = failure(&mut dir.kcm(&["isolate", "--pool=p", "--list=0-1", "true"]));
        let expected = "pool p has no CPU list 0-1; kcm describe --format=table shows its lists";
        assert_eq!(line, expected);
        let _holder =
            Sleeper::spawn(&mut dir.kcm(&["isolate", "--pool=p", "--list=1", "--", "sleep", "1000"]));
        until("it has the list", || !dir.tasks_of("p", "1").is_empty());
        let line = failure(&mut dir.kcm(&["isolate", "--pool=p", "--list=1", "true"]));
        assert!(line.contains("1 is held by "), "{line}");
        assert_eq!(dir.tasks_of("p", "0"), "", "no other list is taken");
        let mut usage = dir.kcm(&["isolate", "--pool=p", "--list=x", "true"]);
        assert_eq!(run(&mut usage).2, Some(2));
    });
}

#[test]
fn a_chosen_list_is_waited_for() {
    let mount = Mount::with_dataplane();
    let holder = Sleeper::new();
    write(&mount.tasks("dataplane", "0"), holder.pid().to_string()).unwrap();
    let mut waiting =
        mount.kcm(&["isolate", "--pool=dataplane", "--list=0", "--wait", "--", "sleep", "1000"]);
    let waiting = Sleeper::spawn(&mut waiting);
    let line = failure(&mut mount.kcm(&["isolate", "--pool=dataplane", "--list=0", "--wait=0.2", "true"]));
    assert!(line.starts_with(&format!("dataplane 0 is held by {} (sleep)", holder.pid())), "{line}");
    assert_eq!(mount.tasks_of("dataplane", "1"), "");
    holder.end();
    until("it has the list", || mount.tasks_of("dataplane", "0") == waiting.pid().to_string());
}

#[test]
fn a_running_process_can_be_put_on_a_list() {
    let mount = Mount::with_dataplane();
    let (first, second, third) = (Sleeper::new(), Sleeper::new(), Sleeper::new());
    let put = |words: &[&str], task: &Sleeper| {
        let pid = format!("--pid={}", task.pid());
        let (out, err, status) = run(mount.kcm(&["isolate", "--pool=dataplane", &pid]).args(words));
        assert_eq!(out, "");
        (err, status)
    };
    assert_eq!(
        put(&["--list=1"], &first),
        (format!("INFO:root:{} is on dataplane 1.\n", first.pid()), Some(0))
    );
    assert_eq!(put(&[], &second), (format!("INFO:root:{} is on dataplane 0.\n", second.pid()), Some(0)));
    assert_eq!((masks(first.pid()), masks(second.pid())), (vec!["1".to_owned()], vec!["0".to_owned()]));
    let (err, status) = put(&[], &third);
    assert!(
        err.starts_with("ERROR:root:No free cpu lists in pool dataplane: no list of dataplane is free"),
        "{err}"
    );
    assert_eq!(status, Some(1));
    let gone = failure(&mut mount.kcm(&["isolate", "--pool=dataplane", "--pid=4194301"]));
    assert!(gone.ends_with("no such process in the writer's PID namespace; look at ps"), "{gone}");
    for wrong in
        [&["--pid=0"][..], &["--pid=1", "true"], &["--pid=1", "--", "true"], &["--pid=1", "--user=root"]]
    {
        assert_eq!(run(mount.kcm(&["isolate", "--pool=dataplane"]).args(wrong)).2, Some(2), "{wrong:?}");
    }
}

#[test]
fn a_command_can_run_as_another_user() {
    let mount = Mount::with_dataplane();
    // A test runs as root, which may open the list; nobody may not.
    let command = [
        "--",
        "sh",
        "-c",
        "id -u; id -G; echo $USER $LOGNAME $KCM_CPUS_ASSIGNED; grep CapEff /proc/self/status",
    ];
    for name in ["nobody", "65534"] {
        let user = format!("--user={name}");
        let (out, err, status) = run(mount.kcm(&["isolate", "--pool=dataplane", &user]).args(command));
        assert_eq!((err.as_str(), status), ("", Some(0)));
        assert_eq!(out, format!("{NOBODY}\n{NOBODY}\nnobody nobody 0\nCapEff:\t0000000000000000\n"));
    }
    assert_eq!(mount.tasks_of("dataplane", "0"), "", "the list is free again");
    let line = failure(&mut mount.kcm(&["isolate", "--pool=dataplane", "--user=no-such", "true"]));
    assert_eq!(line, "--user: /etc/passwd has no user no-such; name one of it");
    mount.let_everybody_in();
    let line = failure(&mut mount.kcm_as_nobody(&["isolate", "--pool=dataplane", "--user=root", "true"]));
    assert_eq!(line, "--user: only root can run a command as another user; run it as root");
    assert!(fs::metadata(KCM).is_ok());
}

#[test]
fn a_plain_directory_has_no_place_for_other_processes() {
    let plain = crate::harness::Plain::new();
    plain.make_pool("p", true, &[("0", "")]);
    for flag in ["--pid=1", "--user=root"] {
        let command = if flag == "--pid=1" { &[][..] } else { &["true"] };
        let line = failure(plain.kcm(&["isolate", "--pool=p", flag]).args(command));
        assert!(line.ends_with(": --pid and --user need a mount; run kcm mount --import"), "{line}");
    }
}
