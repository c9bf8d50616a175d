//! The history: `info/events` and `info/reclaimed`.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;

use crate::harness::{
    Mount, Shell, Sleeper, Stray, as_nobody, errno, held, if_collected, killed_on, set_mode,
    sleeper_of_nobody, until, write,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};

/// How many events and how many reclaimed claims are kept.
const KEPT: usize = 1024;

/// JSON lines.
fn lines(mount: &Mount, file: &str) -> Vec<Value> {
    let text = mount.read(file);
    assert!(text.is_empty() || text.ends_with('\n'), "{file} ends with a complete line");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn seqs(lines: &[Value]) -> Vec<u64> {
    lines.iter().map(|line| line["seq"].as_u64().expect("a number")).collect()
}

/// The line without the parts that differ between runs.
fn plain(line: &Value) -> Value {
    let mut line = line.clone();
    let time = line.as_object_mut().and_then(|line| line.remove("time")).expect("a time");
    let time = time.as_str().expect("text");
    assert!(time.len() == "2026-11-24T10:15:02.123Z".len() && time.ends_with('Z'), "{time}");
    line.as_object_mut().and_then(|line| line.remove("seq")).expect("a number");
    line
}

#[test]
fn events_report_each_claim_in_order() {
    let mount = Mount::with_dataplane();
    let (list_0, list_1) = (mount.tasks("dataplane", "0"), mount.tasks("dataplane", "1"));
    let task = Sleeper::new();
    let pid = task.pid();
    write(&list_0, pid.to_string()).unwrap();
    write(&list_1, pid.to_string()).unwrap();
    write(&list_1, format!("-{pid}")).unwrap();
    write(&list_1, pid.to_string()).unwrap();
    assert_eq!(errno(write(&list_1, "0")), Errno::EBUSY);
    task.end();
    let ended = mount.sh("echo $$ > $C/pools/dataplane/1/tasks; echo $$");
    // The shell ends when the process that it leaves behind has become sleep(1).
    let heir = mount.sh("echo $$ > $C/pools/dataplane/1/tasks; sleep 1000 >&- 2>&- &
        until [ $(< /proc/$!/comm) = sleep ]; do :; done; echo $$ $!");
    let (shell, heir) = heir.trim().split_once(' ').unwrap();
    let heir = Stray(heir.parse().unwrap());
    let shell: u32 = shell.parse().unwrap();

    // A reader of events waits for a search only briefly, and one of the list until it ends.
    until("the heir has the list", || held(&list_1) == [heir.0]);
    let found: Vec<Value> = lines(&mount, "info/events").iter().map(plain).collect();
    let of = |program: &str, event: &str, cpus: &str, pid: u32| json!({ "event": event, "pool": "dataplane", "cpus": cpus, "pid": pid, "program": program, "uid": 0 });
    let on = |event: &str, cpus: &str| of("sleep", event, cpus, pid);
    let mut moved = on("moved", "1");
    moved["from_pool"] = json!("dataplane");
    moved["from_cpus"] = json!("0");
    let mut inherited = of("sleep", "inherited", "1", heir.0);
    inherited["from_pid"] = json!(shell);
    let refused = json!({
        "event": "refused",
        "pool": "dataplane",
        "cpus": "1",
        "pid": std::process::id(),
        "program": fs::read_to_string(format!("/proc/{}/comm", std::process::id())).unwrap().trim_end(),
        "uid": 0,
        "errno": "EBUSY",
        "reason": format!(
            "dataplane 1 is held by {pid} for 0 s; dataplane 0 is free; a write to pools/dataplane/tasks finds it"
        ),
    });
    let ended: u32 = ended.trim().parse().unwrap();
    let expected = [
        on("claimed", "0"),
        moved,
        on("released", "1"),
        on("claimed", "1"),
        refused,
        on("reclaimed", "1"),
        of("bash", "claimed", "1", ended),
        // Its parent has collected it.
        of("bash", if_collected("ended"), "1", ended),
        of("bash", "claimed", "1", shell),
        inherited,
    ];
    assert_eq!(found, expected);
}

#[test]
fn poll_reports_new_events() {
    let mount = Mount::with_shared();
    let mut file = File::open(mount.conf().join("info/events")).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    let has_news = |timeout| {
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        poll(&mut fds, timeout).unwrap() == 1
    };
    assert!(!has_news(PollTimeout::ZERO));
    let task = Sleeper::new();
    write(&mount.tasks("shared", "0"), task.pid().to_string()).unwrap();
    assert!(has_news(PollTimeout::from(60_000_u16)));
    text.clear();
    file.read_to_string(&mut text).unwrap();
    assert!(text.contains("\"claimed\"") && text.lines().count() == 1, "{text}");
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
    assert_eq!(poll(&mut fds, PollTimeout::ZERO), Ok(0), "it was read");
    for mut command in
        [mount.bash("exec tail -n 0 -f $C/info/events"), mount.kcm(&["events", "--follow", "--json"])]
    {
        let mut follower = Sleeper::spawn(command.stdout(Stdio::piped()));
        let mut lines = BufReader::new(follower.child().stdout.take().unwrap()).lines();
        let (tell, printed) = mpsc::channel();
        thread::spawn(move || lines.try_for_each(|line| tell.send(line.unwrap())));
        // The first ones may come before it has begun.
        until("it prints events as they come", || {
            write(&mount.tasks("shared", "0"), format!("-{}", task.pid())).unwrap();
            write(&mount.tasks("shared", "0"), task.pid().to_string()).unwrap();
            printed.try_iter().any(|line| line.contains("\"released\""))
        });
    }
}

#[test]
fn events_report_a_death_that_nobody_saw() {
    let mount = Mount::with_shared();
    let pid = killed_on(&mount.tasks("shared", "0"));
    assert_eq!(
        lines(&mount, "info/events").last().map(|line| (&line["event"], &line["pid"])).unwrap(),
        (&json!("reclaimed"), &json!(pid))
    );
}

#[test]
fn the_newest_1024_events_are_kept() {
    let mount = Mount::with_shared();
    let mut file = File::options().write(true).open(mount.tasks("shared", "0")).unwrap();
    for round in 0..KEPT + 100 {
        assert_eq!(errno(file.write(format!("x{round}").as_bytes())), Errno::EINVAL);
    }
    let found = lines(&mount, "info/events");
    let (dropped, found) = found.split_first().unwrap();
    assert_eq!(*dropped, json!({ "dropped": 100 }));
    let seqs = seqs(found);
    assert_eq!(seqs.len(), KEPT);
    assert!(seqs.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{seqs:?}");
    for (line, round) in [(&found[0], 100), (&found[KEPT - 1], KEPT + 99)] {
        let reason = line["reason"].as_str().unwrap();
        assert!(reason.starts_with(&format!("\"x{round}\" is not a PID; ")), "{reason}");
    }
}

#[test]
fn events_survive_the_daemon_and_numbers_continue() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    let mut earlier: Vec<u64> = Vec::new();
    for round in 0..3 {
        killed_on(&tasks);
        let seqs = seqs(&lines(&mount, "info/events"));
        assert!(seqs.len() > earlier.len() && seqs.starts_with(&earlier), "{seqs:?} after {earlier:?}");
        assert!(seqs.is_sorted_by(|a, b| a < b), "{seqs:?}");
        earlier = seqs;
        if round == 0 {
            mount.stop();
        } else {
            mount.kill_daemon();
        }
        mount.start();
    }
}

#[test]
fn only_root_reads_events() {
    let mount = Mount::with_shared();
    mount.let_everybody_in();
    for file in ["info/events", "info/reclaimed"] {
        let refused = as_nobody(|| fs::read(mount.conf().join(file)));
        assert_eq!(errno(refused), Errno::EACCES, "{file}");
    }
    assert!(as_nobody(|| fs::read(mount.conf().join("info/metrics"))).is_ok());
}

#[test]
fn reclaims_are_kept_until_acknowledged() {
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "1");
    let file = mount.conf().join("info/reclaimed");
    assert_eq!(mount.read("info/reclaimed"), "");
    let pids: Vec<u32> = (0..3).map(|_| killed_on(&list)).collect();
    mount.sh("echo $$ > $C/pools/dataplane/1/tasks");
    let found = lines(&mount, "info/reclaimed");
    let expected: Vec<Value> =
        pids.iter().map(|pid| json!({ "pid": pid, "pool": "dataplane", "cpus": "1", "uid": 0 })).collect();
    assert_eq!(found.iter().map(plain).collect::<Vec<_>>(), expected, "an exit is not a reclaim");

    let seqs = seqs(&found);
    for (event, seq) in
        lines(&mount, "info/events").iter().filter(|line| line["event"] == "reclaimed").zip(&seqs)
    {
        assert_eq!(event["seq"], *seq, "events and reclaimed have the same numbers");
    }
    for nonsense in ["x", "-1", "1.5", "1 2", "99999999999999999999999", "\u{fffd}"] {
        assert_eq!(errno(write(&file, nonsense)), Errno::EINVAL, "{nonsense}");
    }
    let left = || {
        lines(&mount, "info/reclaimed").iter().map(|line| line["seq"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(left(), seqs);
    write(&file, format!("{}\n", seqs[1])).unwrap();
    assert_eq!(left(), seqs[2..]);
    write(&file, seqs[0].to_string()).unwrap();
    assert_eq!(left(), seqs[2..], "an older number does not acknowledge later reclaims");
    mount.stop();
    mount.start();
    assert_eq!(left(), seqs[2..], "the next daemon neither forgets nor repeats them");
    write(&file, "18446744073709551615").unwrap();
    assert_eq!(left(), [0_u64; 0]);
}

#[test]
fn the_newest_1024_reclaims_are_kept() {
    let mount = Mount::with_shared();
    let tasks = mount.tasks("shared", "0");
    let pids: Vec<u32> = (0..KEPT + 5).map(|_| killed_on(&tasks)).collect();
    let found = lines(&mount, "info/reclaimed");
    let (dropped, kept) = found.split_last().unwrap();
    assert_eq!(*dropped, json!({ "dropped": 5 }));
    let kept: Vec<u64> = kept.iter().map(|line| line["pid"].as_u64().unwrap()).collect();
    assert_eq!(kept, pids[5..].iter().map(|&pid| u64::from(pid)).collect::<Vec<_>>());
    mount.kill_daemon();
    mount.start();
    assert_eq!(lines(&mount, "info/reclaimed"), found, "the count survives the daemon, too");
    let seqs = seqs(&found[..KEPT]);
    write(&mount.conf().join("info/reclaimed"), (seqs[0] - 1).to_string()).unwrap();
    assert_eq!(lines(&mount, "info/reclaimed"), found, "a reader of a part has not read the count");
    let last = seqs[KEPT - 1];
    write(&mount.conf().join("info/reclaimed"), last.to_string()).unwrap();
    assert_eq!(mount.read("info/reclaimed"), "");
    until("the next reclaim is reported", || {
        killed_on(&tasks);
        lines(&mount, "info/reclaimed").len() == 1
    });
}

#[test]
fn a_user_pushes_out_only_its_own_records() {
    let mount = Mount::with_shared();
    mount.let_everybody_in();
    let tasks = mount.tasks("shared", "0");
    set_mode(&tasks, 0o666);
    let reclaimed = killed_on(&tasks);
    let mut shell = Shell::start(&mut mount.bash("exec bash"));
    assert!(shell.ask("echo mine > $C/pools/shared/tasks; cat $C/self/last_error").contains("\"mine\""));
    let before = lines(&mount, "info/events");
    as_nobody(|| {
        let mut file = File::options().write(true).open(&tasks).unwrap();
        for _ in 0..5_000 {
            assert_eq!(errno(file.write(b"nonsense")), Errno::EINVAL);
        }
        assert!(mount.read("self/last_error").contains("\"nonsense\""), "also of refusals without a record");
    });
    for _ in 0..KEPT + 5 {
        let task = sleeper_of_nobody();
        write(&tasks, task.pid().to_string()).unwrap();
        task.end();
    }
    for worker in ["the first", "the next"] {
        assert!(shell.ask("cat $C/self/last_error").contains("\"mine\""), "{worker} worker");
        let events = lines(&mount, "info/events");
        assert!(before.iter().all(|line| events.contains(line)), "{worker} worker");
        assert_eq!(lines(&mount, "info/reclaimed")[0]["pid"], reclaimed, "{worker} worker");
        mount.replace_worker();
    }
}

#[test]
fn tail_follows_the_events() {
    let mount = Mount::with_shared();
    let claim = |times: usize| {
        mount.sh(&format!("for i in $(seq {times}); do sh -c 'echo $$ > $C/pools/shared/0/tasks'; done"));
    };
    // Below and above the number of events that are kept. Each claim has two: its begin and its end.
    for before in [3, 600] {
        claim(before);
        let out = mount.home().join("followed");
        let tail = |words: &str| {
            let command = format!("exec {words} $C/info/events");
            let output = File::create(&out).unwrap();
            Sleeper::spawn(mount.bash(&command).stdout(output).stderr(Stdio::null()))
        };
        for words in ["tail -n 2 -s 0.1 -f", "tail -c +1 -s 0.1 -f"] {
            let following = tail(words);
            let lines =
                || -> Vec<String> { fs::read_to_string(&out).unwrap().lines().map(Into::into).collect() };
            until("it has shown the last events", || lines().len() >= 2);
            let shown = lines().len();
            claim(3);
            let now = mount.read("info/events");
            let last = now.lines().last().unwrap();
            until("it has shown the new events", || lines().last().is_some_and(|line| line == last));
            let seqs: Vec<u64> = lines()
                .iter()
                // The first line may be a count of dropped events.
                .filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["seq"].as_u64())
                .collect();
            assert!(seqs.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{words} after {before}: {seqs:?}");
            assert!(seqs.len() > shown, "{words} after {before}");
            following.end();
        }
    }
}
