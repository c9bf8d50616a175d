//! Eight clients work while the worker is killed ten times per second and the program is replaced under the mount.
//! The test counts only the answers that the clients got. `scripts/soak` runs it for longer. In the same minute,
//! other tests run `kcm reconcile --interval` on another daemon and restart a third daemon a thousand times.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::harness::{Cgroup, KCM, Mount, Sleeper, masks, run, text, write};
use nix::errno::Errno;
use nix::sys::signal::Signal;

/// Between two kills.
const KILL_INTERVAL: Duration = Duration::from_millis(100);
/// Between two upgrades.
const UPGRADE_INTERVAL: Duration = Duration::from_secs(10);
/// A shorter time is not counted as a pause.
const PAUSE_LIMIT: Duration = Duration::from_micros(500);

/// The answers that the clients got, and the errors that they prove.
#[derive(Default)]
struct Ledger {
    operations: AtomicU64,
    /// Reads that could not continue after a restart, which is allowed, and started again.
    stale: AtomicU64,
    /// Requests that were in flight at three deaths.
    given_up: Mutex<BTreeMap<String, u64>>,
    errors: Mutex<Vec<String>>,
    /// Acknowledged, but not there.
    lost: Mutex<Vec<String>>,
    /// Undone, but there again.
    twice: Mutex<Vec<String>>,
    /// The client on the exclusive list.
    holder: Mutex<Option<usize>>,
    two_holders: AtomicU64,
    /// Operations that took longer than [`PAUSE_LIMIT`].
    pauses: Mutex<Vec<(Instant, Instant)>>,
    /// Of operations that change the configuration: these also wait for the disk.
    pauses_with_disk: Mutex<Vec<(Instant, Instant)>>,
    stop: AtomicBool,
}

impl Ledger {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Carries out an operation and records its result. `None`: the daemon gave it up.
    fn note<T>(
        &self,
        what: &str,
        allowed: &[Errno],
        act: impl Fn() -> io::Result<T>,
    ) -> Option<Result<T, Errno>> {
        loop {
            let started = Instant::now();
            let result = act();
            if started.elapsed() > PAUSE_LIMIT {
                let with_disk = ["mkdir", "exclusive", "rmdir"].contains(&what);
                let pauses = if with_disk { &self.pauses_with_disk } else { &self.pauses };
                pauses.lock().unwrap().push((started, Instant::now()));
            }
            self.operations.fetch_add(1, Ordering::Relaxed);
            let errno = match result {
                Ok(value) => return Some(Ok(value)),
                Err(error) => Errno::from_raw(error.raw_os_error().unwrap_or(0)),
            };
            match errno {
                Errno::ESTALE => self.stale.fetch_add(1, Ordering::Relaxed),
                Errno::EIO => {
                    self.give_up(what);
                    return None;
                }
                errno if allowed.contains(&errno) => return Some(Err(errno)),
                errno => {
                    self.errors.lock().unwrap().push(format!("{what}: {errno}"));
                    return None;
                }
            };
        }
    }

    fn give_up(&self, what: &str) {
        *self.given_up.lock().unwrap().entry(what.to_owned()).or_default() += 1;
    }

    fn done(&self, what: &str, act: impl Fn() -> io::Result<()>) -> bool {
        matches!(self.note(what, &[], act), Some(Ok(())))
    }

    /// Checks whether the task is in the file.
    fn expect(&self, file: &Path, task: u32, expected: bool) {
        let read = || {
            let mut bytes = vec![0; 65536];
            let length = File::open(file)?.read_at(&mut bytes, 0)?;
            Ok(text(&bytes[..length]))
        };
        let Some(Ok(tasks)) = self.note("read", &[], read) else { return };
        let found = tasks.trim().split(',').any(|pid| pid == task.to_string());
        if found != expected {
            let wrong = if expected { &self.lost } else { &self.twice };
            wrong.lock().unwrap().push(format!("{task} in {}: {tasks:?}", file.display()));
        }
    }
}

/// Claims the exclusive list against other clients and leaves it again, by a release or a move.
fn contend(ledger: &Ledger, mount: &Mount, me: usize, task: u32) {
    let (pool, list) = (mount.pool("dataplane").join("tasks"), mount.tasks("dataplane", "0"));
    let shared = mount.tasks("shared", "1");
    let mut turn = me;
    while ledger.goes_on() {
        turn += 1;
        let file = if turn.is_multiple_of(2) { &pool } else { &list };
        let claim = || write(file, task.to_string());
        if !matches!(ledger.note("claim of the exclusive list", &[Errno::EBUSY], claim), Some(Ok(()))) {
            continue;
        }
        if ledger.holder.lock().unwrap().replace(me).is_some() {
            ledger.two_holders.fetch_add(1, Ordering::Relaxed);
        }
        if masks(task) != ["0"] {
            ledger.lost.lock().unwrap().push(format!("the mask of {task}: {:?}", masks(task)));
        }
        ledger.expect(&list, task, true);
        // As soon as the client asks to leave, it may be off the list.
        *ledger.holder.lock().unwrap() = None;
        if turn.is_multiple_of(3) {
            while !ledger.done("move", || write(&shared, task.to_string())) && ledger.goes_on() {}
            ledger.expect(&shared, task, true);
            ledger.expect(&list, task, false);
        }
        for file in [&list, &shared] {
            while !ledger.done("release", || write(file, format!("-{task}"))) && ledger.goes_on() {}
        }
        if ledger.goes_on() {
            ledger.expect(&list, task, false);
            ledger.expect(&shared, task, false);
        }
    }
    // If the last release was given up.
    for file in [&list, &shared] {
        write(file, format!("-{task}")).expect("the last release");
    }
}

fn share(ledger: &Ledger, mount: &Mount, task: u32) {
    let file = mount.tasks("shared", "1");
    while ledger.goes_on() {
        if ledger.done("claim", || write(&file, task.to_string())) {
            ledger.expect(&file, task, true);
        }
        if ledger.done("release", || write(&file, format!("-{task}"))) {
            ledger.expect(&file, task, false);
        }
    }
    write(&file, format!("-{task}")).expect("the last release");
}

fn configure(ledger: &Ledger, mount: &Mount) {
    let (pool, exclusive) = (mount.pool("made"), mount.pool("made").join("exclusive"));
    // An operation that was given up has had no effect.
    let until_done =
        |what: &str, act: &dyn Fn() -> io::Result<()>| while !ledger.done(what, act) && ledger.goes_on() {};
    while ledger.goes_on() {
        until_done("mkdir", &|| fs::create_dir(&pool));
        until_done("exclusive", &|| write(&exclusive, "1"));
        until_done("rmdir", &|| fs::remove_dir(&pool));
    }
    let _ = fs::remove_dir(&pool);
}

/// Two clients in bash: one claims by `echo $$`, one rewrites the file as legacy programs do. Each counts its
/// operations and reports errors; it repeats a stale read.
const BASH: [&str; 2] = [
    r#"
    f=$C/pools/shared/1/tasks
    while [ ! -e "$STOP" ]; do
        echo $$ > $f || wrong claim
        show; [[ ,$x, == *,$$,* ]] || wrong lost
        echo -$$ > $f || wrong release
        show; [[ ,$x, != *,$$,* ]] || wrong twice
        n=$((n + 4))
    done"#,
    r#"
    f=$C/pools/shared/1/tasks
    while [ ! -e "$STOP" ]; do
        exec 3<> $f || wrong open
        read -r old <&3
        printf %s "${old:+$old,}$$" >&3 || wrong add
        exec 3>&-
        show; [[ ,$x, == *,$$,* ]] || wrong lost
        exec 3<> $f || wrong open
        read -r old <&3
        old=,$old, old=${old/,$$,/,} old=${old#,} old=${old%,}
        printf %s "${old:--$$ }" >&3 || wrong remove
        exec 3>&-
        show; [[ ,$x, != *,$$,* ]] || wrong twice
        n=$((n + 8))
    done"#,
];

fn bash(mount: &Mount, stop: &Path, line: &str) -> Child {
    // If only read prints a message, the read was stale; its line is then empty or complete.
    let begin = r#"
    n=0
    wrong() { echo "wrong: $*" ; }
    show() { until { read -r x < $f; } 2> /dev/null || [ -z "$x" ]; do :; done; }
    "#;
    let line = format!("{begin}{line}\necho \"operations: $n\"");
    let mut command = mount.bash(&line);
    command.env("STOP", stop).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("bash")
}

/// Adds the results of the two clients in bash.
fn collect(ledger: &Ledger, child: Child) {
    let output = child.wait_with_output().expect("bash");
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    for line in out.lines() {
        match line.split_once(": ") {
            Some(("operations", n)) => {
                ledger.operations.fetch_add(n.parse().unwrap(), Ordering::Relaxed);
            }
            Some(("wrong", what)) if what.starts_with("lost") => {
                ledger.lost.lock().unwrap().push(line.into())
            }
            Some(("wrong", what)) if what.starts_with("twice") => {
                ledger.twice.lock().unwrap().push(line.into())
            }
            // The message on standard error says more.
            Some(("wrong", _)) => {}
            _ => ledger.errors.lock().unwrap().push(line.into()),
        }
    }
    for line in err.lines() {
        if line.ends_with("Input/output error") {
            ledger.give_up("in bash");
        } else {
            ledger.errors.lock().unwrap().push(line.into());
        }
    }
}

/// Kills the worker again and again, with an upgrade now and then. Returns the moments of each kind.
fn kill_and_upgrade(mount: &Mount, seconds: u64) -> BTreeMap<&'static str, Vec<Instant>> {
    let copy = mount.home().join("kcm");
    assert!(Command::new("cp").arg(KCM).arg(&copy).status().unwrap().success());
    let mut moments: BTreeMap<&str, Vec<Instant>> = BTreeMap::new();
    let (end, mut upgrade) =
        (Instant::now() + Duration::from_secs(seconds), Instant::now() + UPGRADE_INTERVAL / 2);
    let (mut n, mut upgrades) = (0, 0);
    while Instant::now() < end {
        // The worker must serve for a moment before it is killed: a worker that dies at once is restarted after a
        // pause, and requests in flight at three deaths are given up. A stopped worker has served.
        let is_stopped = n % 50 == 25;
        if !is_stopped {
            fs::read(mount.conf().join("self/claim")).expect("a read");
        }
        std::thread::sleep(KILL_INTERVAL);
        let mut moment = |what, at| moments.entry(what).or_default().push(at);
        if Instant::now() > upgrade && !is_stopped {
            upgrade += UPGRADE_INTERVAL;
            upgrades += 1;
            let program = if upgrades % 2 == 1 { copy.as_path() } else { Path::new(KCM) };
            moment("upgrade", Instant::now());
            let mut command = Command::new(program);
            command.args(["mount", "--upgrade", "--conf-dir"]).arg(mount.conf());
            let (_, err, status) = run(command.arg("--state-dir").arg(mount.state()));
            assert_eq!((err.as_str(), status), ("", Some(0)));
            continue;
        }
        n += 1;
        let (what, how) = match n % 50 {
            13 | 38 => ("SIGSEGV", Signal::SIGSEGV),
            25 => ("SIGSTOP", Signal::SIGSTOP),
            _ => ("SIGKILL", Signal::SIGKILL),
        };
        moment(what, Instant::now());
        mount.signal_worker(how);
    }
    moments
}

/// The longest wait of a client for each of the moments, in milliseconds, ascending.
fn waits(pauses: &[(Instant, Instant)], moments: &[Instant]) -> Vec<f64> {
    let wait = |moment: &Instant| {
        // Operations that begin while no worker serves wait, too; it may take a moment until no worker serves.
        let concerned = pauses.iter().filter(|(from, to)| to > moment && *from < *moment + KILL_INTERVAL);
        let waits = concerned.map(|(from, to)| to.duration_since(*from.max(moment)));
        waits.max().unwrap_or_default().as_secs_f64() * 1e3
    };
    let mut waits: Vec<f64> = moments.iter().map(wait).collect();
    waits.sort_by(f64::total_cmp);
    waits
}

#[test]
fn no_death_loses_or_repeats_an_operation() {
    let seconds = std::env::var("KCM_SOAK_SECONDS").map_or(60, |seconds| seconds.parse().expect("a number"));
    let mount = Mount::new();
    mount.make_pool("dataplane", true, &["0"]);
    mount.make_pool("shared", false, &["1"]);
    let cgroup = Cgroup::new();
    let tasks: Vec<Sleeper> = (0..5).map(|_| Sleeper::new()).collect();
    tasks.iter().for_each(|task| cgroup.add(task.pid()));
    let ledger = Ledger::default();
    let stop = mount.home().join("stop");
    let moments = std::thread::scope(|scope| {
        let (ledger, mount) = (&ledger, &mount);
        for (me, task) in tasks.iter().enumerate() {
            let task = task.pid();
            match me {
                0..3 => scope.spawn(move || contend(ledger, mount, me, task)),
                _ => scope.spawn(move || share(ledger, mount, task)),
            };
        }
        scope.spawn(|| configure(ledger, mount));
        let shells = BASH.map(|line| bash(mount, &stop, line));
        let moments = scope.spawn(|| kill_and_upgrade(mount, seconds)).join();
        ledger.stop.store(true, Ordering::Relaxed);
        fs::write(&stop, "").unwrap();
        shells.into_iter().for_each(|shell| collect(ledger, shell));
        moments.expect("the thread that kills")
    });
    let count = |list: &Mutex<Vec<String>>| list.lock().unwrap().len();
    let kills: usize = moments.values().map(Vec::len).sum();
    println!("seconds                        {seconds}");
    println!("operations                     {}", ledger.operations.load(Ordering::Relaxed));
    println!("kills                          {kills}");
    for (what, moments) in &moments {
        println!("  {what:<28} {}", moments.len());
    }
    println!("client errors                  {}", count(&ledger.errors));
    let given_up = ledger.given_up.lock().unwrap();
    println!("given up (EIO)                 {} {given_up:?}", given_up.values().sum::<u64>());
    println!("reads started again (ESTALE)    {}", ledger.stale.load(Ordering::Relaxed));
    println!("acknowledged and lost          {}", count(&ledger.lost));
    println!("applied twice                  {}", count(&ledger.twice));
    println!("two on one exclusive list      {}", ledger.two_holders.load(Ordering::Relaxed));
    for (pauses, beside) in [
        (&ledger.pauses, ""),
        (&ledger.pauses_with_disk, "   of one that configures, and waits for the disk, too"),
    ] {
        for (what, moments) in &moments {
            let waits = waits(&pauses.lock().unwrap(), moments);
            let at = |part: usize| waits[(waits.len() - 1) * part / 100];
            println!(
                "pause at {what:<8} p50 p99 max   {:.1} {:.1} {:.1} ms{beside}",
                at(50),
                at(99),
                at(100)
            );
        }
    }
    for list in [&ledger.errors, &ledger.lost, &ledger.twice] {
        let list = list.lock().unwrap();
        assert!(list.is_empty(), "{} of them, first: {:?}", list.len(), &list[..list.len().min(5)]);
    }
    assert_eq!(ledger.two_holders.load(Ordering::Relaxed), 0);
    // All clients have left, and the daemon is as at its start.
    for file in [mount.tasks("dataplane", "0"), mount.tasks("shared", "1")] {
        assert_eq!(fs::read_to_string(file).unwrap(), "");
    }
    assert_eq!(tasks.iter().map(|task| masks(task.pid())).collect::<Vec<_>>(), vec![["0-1"]; 5]);
    assert_eq!(mount.daemons().len(), 2);
    let claims = fs::metadata(mount.state().join("claims")).unwrap().len();
    assert!(claims < 8 << 20, "the claims log has {claims} bytes");
}
