//! A session at a shell, as in the README.

use crate::harness::{Mount, run};

#[test]
fn the_session_of_the_readme() {
    let mount = Mount::new();
    mount.sh("$KCM init --conf-dir=$C --num-dp-cores=1 --num-cp-cores=0");
    assert_eq!(mount.sh("ls $C/pools/dataplane"), "0\nexclusive\nmode\npartial\nqueue\ntasks\ntransient\n");

    let claim =
        "echo $$ > $C/pools/dataplane/0/tasks && grep Cpus_allowed_list /proc/$$/status && cat $C/self/claim";
    assert_eq!(mount.sh(claim), "Cpus_allowed_list:\t0\ndataplane 0\n");
    assert_eq!(mount.sh("cat $C/pools/dataplane/0/tasks"), "", "the shell has ended without a release");

    // The refusal names the program, which is bash until it has become sleep.
    let refused = "sleep 100 & echo $! > $C/pools/dataplane/0/tasks
        until [ \"$(cat /proc/$!/comm)\" = sleep ]; do :; done
        echo $$ > $C/pools/dataplane/0/tasks && exit 9
        cat $C/self/last_error
        echo $$ $!
        $KCM isolate --conf-dir=$C --pool=dataplane make
        kill $!";
    let (out, err, _) = run(&mut mount.bash(refused));
    let lines: Vec<&str> = out.lines().collect();
    let [reason, pids] = lines.as_slice() else { panic!("{out}") };
    let (shell, sleep) = pids.split_once(' ').expect("two PIDs");
    let (time, reason) = reason.split_once(' ').expect("a time");
    assert!(time.ends_with('Z') && time.len() == "2026-11-24T10:15:02.250Z".len(), "{time}");
    let begin = format!("{shell}: EBUSY: dataplane 0 is held by {sleep} (sleep) for 0 s; ");
    assert_eq!(
        reason.strip_prefix(&begin),
        Some(
            "no list of dataplane is free; wait for one with poll(2), kcm isolate --wait or kcm claim --wait"
        ),
        "{reason}"
    );
    let messages: Vec<&str> = err.lines().collect();
    assert!(messages[0].ends_with("echo: write error: Device or resource busy"), "{err}");
    assert!(messages[1].starts_with("ERROR:root:No free cpu lists in pool dataplane: "), "{err}");
}
