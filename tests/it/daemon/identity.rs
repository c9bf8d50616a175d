//! A daemon is known by what the kernel says of it. Processes that only look like one are named and not touched, and a
//! mount is known by its connection, not by its path.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::{KCM, Mount, NOBODY, Shell, Sleeper, has_died, run, signal, until};
use nix::sys::signal::Signal;

/// The command line of a daemon process, after the name of the program.
const WORDS: &str = "mount --foreground --conf-dir=\"$C\" --state-dir=\"$S\"";

/// Processes that look like the daemon of the mount, one of each kind.
fn impostors(mount: &Mount) -> Vec<Sleeper> {
    let wait = "sleep 1000 & wait";
    let as_nobody = |name: &str| {
        let line = format!("exec -a {name} bash -c '{wait}' {WORDS}");
        let mut command = mount.bash(&line);
        command.uid(NOBODY).gid(NOBODY).current_dir("/");
        command
    };
    let all = [
        // By the command line, and by the name of the program too.
        as_nobody("bash"),
        as_nobody("kcm"),
        as_nobody("/proc/self/exe"),
        // A worker.
        mount.bash(&format!(
            "exec -a kcm setpriv --reuid={NOBODY} bash -c '{wait}' __daemon worker --conf-dir=\"$C\""
        )),
        // With a device of its own, and the lock file open for reading.
        mount.bash(&format!("exec -a kcm bash -c '{wait}' {WORDS} 3<>/dev/fuse 5</dev/null 6<\"$S/lock\"")),
        // The same, as the root of a container: without capabilities.
        mount.bash(&format!(
            "exec setpriv --bounding-set=-all --inh-caps=-all bash -c '{wait}' {WORDS} \
             3<>/dev/fuse 5</dev/null 6<\"$S/lock\""
        )),
        // The same, as an ordinary user.
        mount.bash(&format!(
            "exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups bash -c '{wait}' {WORDS} \
             3<>/dev/fuse 5</dev/null 6<\"$S/lock\""
        )),
    ];
    all.into_iter().map(|mut command| Sleeper::spawn(&mut command)).collect()
}

/// The processes that a message does not name.
fn unnamed(message: &str, impostors: &[Sleeper]) -> Vec<String> {
    let name = |impostor: &Sleeper| format!("PID {} of user ", impostor.pid());
    impostors.iter().map(name).filter(|name| !message.contains(name.as_str())).collect()
}

#[test]
fn an_open_file_of_a_mount_that_does_not_answer_is_not_asked_about() {
    let (mount, silent) = (Mount::new(), Mount::with_shared());
    let client = Sleeper::spawn(&mut silent.bash("exec 3<$C/pools/shared/0/tasks; exec sleep 1000"));
    // The daemon's device has this number.
    until("it is open", || fs::read_link(format!("/proc/{}/fd/3", client.pid())).is_ok());
    let paused = silent.pause();
    let mut unmount = mount.kcm(&["unmount"]).spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(8);
    while unmount.try_wait().unwrap().is_none() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    let ended = unmount.try_wait().unwrap();
    drop(paused);
    unmount.wait().unwrap();
    assert!(ended.is_some_and(|status| status.success()), "unmount waits for another mount");
}

#[test]
fn an_impostor_of_each_kind_is_ignored_and_named() {
    let mount = Mount::with_shared();
    let impostors = impostors(&mount);
    let all_run = || impostors.iter().all(|impostor| !has_died(impostor.pid()));
    let claims = |impostor: &Sleeper| {
        let line = fs::read(format!("/proc/{}/cmdline", impostor.pid())).unwrap_or_default();
        let text = String::from_utf8_lossy(&line).into_owned();
        text.contains("sleep 1000") && !text.contains("setpriv") && !text.contains("exec ")
    };
    until("each has its command line", || impostors.iter().all(claims));

    let old = mount.daemons();
    let real = [mount.supervisor(), mount.worker().unwrap()];
    real.iter().for_each(|pid| signal(*pid, Signal::SIGSTOP));
    let (_, err, status) = run(&mut mount.mount_command());
    assert_eq!(status, Some(0), "{err}");
    assert_eq!(unnamed(&err, &impostors), Vec::<String>::new(), "named in the log: {err}");
    assert!(all_run(), "no impostor was killed");
    assert!(real.iter().all(|pid| has_died(*pid)), "the real daemon was replaced: {old:?}");
    assert_eq!(mount.read("pools/shared/exclusive"), "0\n");
    assert!(real.iter().all(|pid| *pid != mount.supervisor()));

    let started = Instant::now();
    let (_, err, status) = run(&mut mount.kcm(&["unmount"]));
    assert_eq!(status, Some(0), "{err}");
    assert!(
        started.elapsed() < Duration::from_secs(8),
        "nobody waits for an impostor: {:?}",
        started.elapsed()
    );
    assert_eq!(unnamed(&err, &impostors), Vec::<String>::new(), "{err}");
    assert!(all_run());
}

#[test]
fn without_a_real_daemon_an_impostor_hands_nothing_over() {
    let mount = Mount::new();
    let impostors = impostors(&mount);
    let upgrade = |supervisor: u32| {
        // The lock file is root's. Even if it names an impostor, that one is not signalled.
        fs::write(mount.state().join("lock"), format!("{supervisor:<10}\n")).unwrap();
        run(mount.kcm(&["mount", "--upgrade", "--state-dir"]).arg(mount.state()))
    };
    let supervisor = mount.supervisor();
    let (_, err, status) = upgrade(impostors[4].pid());
    assert_eq!(status, Some(1), "{err}");
    assert!(err.contains("is not the supervisor of"), "{err}");
    assert!(!has_died(impostors[4].pid()));
    let (_, err, status) = upgrade(supervisor);
    assert_eq!(status, Some(0), "{err}");
}

#[test]
fn the_state_directory_of_a_takeover_is_that_of_the_daemon() {
    let mount = Mount::new();
    let real = [mount.supervisor(), mount.worker().unwrap()];
    real.iter().for_each(|pid| signal(*pid, Signal::SIGSTOP));
    let other = mount.home().join("other");
    let mut command = mount.kcm(&["mount", "--state-dir"]);
    let (_, err, status) = run(command.arg(&other));
    let used = mount.state();
    assert!(err.contains(&format!("its daemon uses the state directory {}", used.display())), "{err}");
    assert_eq!(status, Some(1));
    assert!(real.iter().all(|pid| !has_died(*pid)), "nothing was killed");
    real.iter().for_each(|pid| signal(*pid, Signal::SIGCONT));
}

/// A shell in a mount namespace of its own.
fn namespace(mount: &Mount) -> Shell {
    Shell::start(&mut mount.bash("exec unshare --mount --propagation private bash 2>&1"))
}

#[test]
fn the_same_path_in_another_mount_namespace_is_another_mount() {
    let mount = Mount::with_shared();
    let here = [mount.supervisor(), mount.worker().unwrap()];
    let mut there = namespace(&mount);
    let other = mount.home().join("other");
    let mount_there = format!("{KCM} mount --conf-dir=\"$C\" --state-dir={}", other.display());
    // The copy of our mount is only detached there; its daemon serves us.
    let line = there.ask(&format!("time -p {KCM} unmount --conf-dir=\"$C\"; echo status $?"));
    assert!(
        line.contains(&format!("PID {} still serves it in another mount namespace", here[0]))
            || line.contains(&format!("PID {} still serves it in another mount namespace", here[1])),
        "{line}"
    );
    let real: f64 =
        line.split("real ").nth(1).and_then(|text| text.split_whitespace().next()).unwrap().parse().unwrap();
    assert!(real < 5.0, "it says so at once: {line}");
    assert!(here.iter().all(|pid| !has_died(*pid)));
    let line = there.ask(&format!("{mount_there}; echo status $?"));
    assert!(line.ends_with("status 0\n"), "{line}");
    let lock = fs::read_to_string(other.join("lock")).unwrap();
    let supervisor: u32 = lock.trim().parse().unwrap();
    // A mount there that does not answer is taken over; the daemon here is not touched.
    let line = there.ask(&format!(
        "kill -STOP {supervisor} $(pgrep -P {supervisor}); {mount_there}; echo status $?; timeout 20 cat \"$C/info/version\""
    ));
    assert!(line.contains("status 0\n"), "{line}");
    assert!(!line.contains("is ignored"), "the daemon here is no impostor: {line}");
    assert!(has_died(supervisor));
    assert!(here.iter().all(|pid| !has_died(*pid)), "{line}");
    assert_eq!(mount.read("pools/shared/exclusive"), "0\n");
    let line = there.ask(&format!("time -p {KCM} unmount --conf-dir=\"$C\"; echo status $?"));
    assert!(line.contains("status 0\n"), "{line}");
    assert_eq!(mount.read("pools/shared/exclusive"), "0\n");
}

#[test]
fn something_that_is_mounted_over_it_does_not_end_the_daemon() {
    let mount = Mount::with_shared();
    let supervisor = mount.supervisor();
    let inside = fs::File::open(mount.conf().join("info/version")).unwrap();
    mount.sh("mount -t tmpfs tmpfs \"$C\"");
    assert!(fs::read_dir(mount.conf()).unwrap().next().is_none(), "it is hidden");
    // The supervisor has seen the change of the mount table, and has acted on a worker that ends meanwhile.
    let worker = mount.signal_worker(Signal::SIGKILL);
    until("there is another worker", || mount.worker().is_some_and(|other| other != worker));
    mount.sh("umount \"$C\"");
    assert_eq!(mount.read("pools/shared/exclusive"), "0\n");
    assert_eq!(mount.supervisor(), supervisor);
    drop(inside);
    // Its own mount ends it, and nothing else does: somebody else's mount at the path stays.
    mount.sh("mount -t tmpfs tmpfs \"$C\" && touch \"$C/theirs\"");
    signal(supervisor, Signal::SIGTERM);
    until("the daemon has ended", || mount.daemons().is_empty());
    assert!(mount.conf().join("theirs").exists(), "another mount is not unmounted");
    let _ = Command::new("umount").arg(mount.conf()).status();
}

/// The kernel's numbers of the mount: its ID, and the device, whose minor number is the connection.
fn numbers(mount: &Mount) -> Option<(String, String)> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let words: Vec<Vec<&str>> = table.lines().map(|line| line.split(' ').collect()).collect();
    let ours = words.iter().find(|words| words[4] == mount.conf().to_str().unwrap())?;
    Some((ours[0].into(), ours[2].into()))
}

/// The kernel gives the numbers of a mount that has ended to the next mount. The supervisor is stopped meanwhile, so
/// that it sees only the new mount.
#[test]
fn another_mount_that_gets_its_numbers_is_not_its_mount() {
    let mut reused = 0;
    for _ in 0..5 {
        let mount = Mount::new();
        let (before, supervisor, worker) = (numbers(&mount), mount.supervisor(), mount.worker().unwrap());
        signal(supervisor, Signal::SIGSTOP);
        assert!(Command::new("umount").arg("-l").arg(mount.conf()).status().unwrap().success());
        until("the worker notices the end of the mount", || has_died(worker));
        let other = Mount::new();
        reused += u32::from(numbers(&other) == before);
        signal(supervisor, Signal::SIGCONT);
        until("the supervisor exits", || has_died(supervisor));
        assert_eq!(numbers(&mount), None, "it does not mount again");
    }
    println!("the numbers were reused {reused} times of 5");
}
