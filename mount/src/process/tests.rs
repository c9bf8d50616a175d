//! Tests against real processes, with the features of this kernel and as on the oldest supported one.
//!
//! Tests of masks are in `masks`, tests that need root in `as_root`.
//!
//! Longer than 400 lines because it is a list of independent tests.

mod as_root;
mod masks;

use std::io::{BufRead as _, BufReader, Write as _};
use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal, kill};

use super::cgroups::{earlier_path_hash, path_hash};
use super::*;
use crate::clock;
use crate::model::command::SavedMask;
use crate::model::cpuset::{CpuId, CpuSet};
use crate::model::task::WrittenPid;

/// The variable that tells a copy of this program what to do; see [`program_for_other_tests`].
const PROGRAM: &str = "KCM_TEST_PROGRAM";

fn new_watch() -> Watch {
    Watch::new(KeptPidfds::new().unwrap(), |_| false).unwrap()
}

#[test]
fn features_match_the_kernel_release() {
    let [new, old] = both();
    assert!(!old.is_certain(&open(&old, Pid::new(std::process::id()).unwrap())));
    // The features came with 6.9, 6.11 and 6.13.
    let uname = nix::sys::utsname::uname().unwrap();
    let release: Vec<u32> =
        uname.release().to_str().unwrap().split(['.', '-']).map_while(|part| part.parse().ok()).collect();
    let since = |minor| release.as_slice() >= &[6, minor][..];
    let expected = Features { pidfs: since(9), translation: since(11), info: since(13) };
    assert_eq!(new.features, expected);
}

#[test]
fn cgroup_numbers_of_earlier_versions_are_replaced() {
    let child = start(Command::new("sleep").arg("1000"));
    for processes in both() {
        let process = open(&processes, child.pid());
        let number = processes.cgroup(&process).unwrap().number;
        let paths = std::fs::read(format!("/proc/{}/cgroup", child.pid())).unwrap();
        let earlier = earlier_path_hash(&paths);
        assert_ne!(earlier, number);
        let upgraded = if processes.has_cgroup_ids() { earlier } else { number };
        assert_eq!(processes.upgrade_cgroup(&process, earlier), upgraded);
        assert_eq!(processes.upgrade_cgroup(&process, number), number);
        assert_eq!(processes.upgrade_cgroup(&process, 77), 77, "a number of another cgroup stays");
    }
}

#[test]
fn cgroup_hashes_are_the_same_in_every_build() {
    assert_eq!(path_hash(b"0::/a\n"), 0x8880_c33e_1c96_af3f);
    assert_eq!(earlier_path_hash(b"a"), 0xaf63_dc4c_8601_ec8c);
    assert_ne!(path_hash(b"0::/a\n"), path_hash(b"0::/b\n"));
}

#[test]
fn kernel_threads_are_recognized() {
    for processes in both() {
        let kthreadd = open(&processes, Pid::new(2).unwrap());
        assert!(processes.facts(&kthreadd).unwrap().unwrap().kernel_thread);
        let first = open(&processes, Pid::new(1).unwrap());
        assert!(!processes.facts(&first).unwrap().unwrap().kernel_thread);
    }
}

#[test]
fn program_names_are_safe_for_a_terminal() {
    let script = r"printf 'a\033b\nc' > /proc/$$/comm; echo ready; read x";
    let child = start(Command::new("sh").args(["-c", script])).ready();
    for processes in both() {
        assert_eq!(processes.comm(&open(&processes, child.pid())).as_deref(), Some(r#""a\u{1b}b\nc""#));
    }
}

#[test]
fn any_thread_id_opens_the_process() {
    let child = program("threads");
    for processes in both() {
        let process = open(&processes, child.pid());
        let tids = tids(child.pid());
        assert!(tids.len() > 2, "{tids:?}");
        for tid in tids {
            assert_eq!(open(&processes, tid).id(), process.id());
        }
    }
}

#[test]
fn the_end_of_a_process_is_known_before_and_after_collection() {
    for processes in both() {
        for (signal, expected) in [
            (None, Ending::Exited(7)),
            (Some(Signal::SIGKILL), Ending::Killed(9)),
            (Some(Signal::SIGTERM), Ending::Killed(15)),
        ] {
            let mut child = start(Command::new("sh").args(["-c", "echo ready; read x; exit 7"])).ready();
            let process = open(&processes, child.pid());
            assert!(process.is_alive());
            assert_eq!(processes.ended(&process), Ending::Unknown);
            match signal {
                Some(signal) => kill(child.raw(), signal).unwrap(),
                None => child.0.stdin.take().unwrap().write_all(b"\n").unwrap(),
            }
            until("it is dead", || !process.is_alive());
            assert_eq!(processes.ended(&process), expected, "before it is collected");
            assert_is_unknown(&processes, &process);
            assert!(processes.open(child.pid()).unwrap().is_none());
            let found = processes.find(process.id()).unwrap().expect("the parent has not collected it");
            assert_eq!(processes.ended(&found), expected, "by a process that was opened after the death");
            child.0.wait().unwrap();
            assert!(processes.find(process.id()).unwrap().is_none());
            assert_eq!(processes.ended(&process), expected, "after it was collected");
            assert_is_unknown(&processes, &process);
        }
    }
}

#[test]
fn an_unused_pid_opens_nothing() {
    for processes in both() {
        assert!(processes.open(Pid::new(i32::MAX as u32).unwrap()).unwrap().is_none());
        let own = open(&processes, Pid::new(std::process::id()).unwrap());
        for number in [i32::MAX as u32, u32::MAX] {
            assert!(open_from(&processes, &own, number).is_none());
        }
    }
}

#[test]
fn a_process_without_its_first_thread_is_alive() {
    for processes in both() {
        let mut child = program("without_first_thread");
        let process = Arc::new(open(&processes, child.pid()));
        let watch = new_watch();
        watch.add(Arc::clone(&process)).unwrap();
        kill(child.raw(), Signal::SIGUSR1).unwrap();
        let state = || processes.proc.stat(child.pid().get()).unwrap().unwrap().state;
        until("its first thread has ended", || state() == b'Z');
        assert!(process.is_alive() && !watch.any_dead());
        assert_eq!(open(&processes, child.pid()).id(), process.id());
        let facts = processes.facts(&process).unwrap().unwrap();
        assert_eq!(facts.parent.map(Pid::get), Some(std::process::id()));
        let [one, _] = masks::two_cpus();
        processes.set_mask(&process, &one, &one, Threads::All, BlockedWriter::NONE).unwrap();
        assert!(masks::of(child.pid()).iter().all(|mask| *mask == one));
        // Its last thread exits when its standard input ends.
        drop(child.0.stdin.take());
        until("it is dead", || !process.is_alive());
        assert_eq!(watch.dead(), [process.id()]);
        assert_eq!(processes.ended(&process), Ending::Exited(0));
    }
}

#[test]
fn recent_writers_keep_their_pidfd() {
    for processes in both() {
        let watch = Watch::with_cache(2).unwrap();
        let children: Vec<Child> = (0..3).map(|_| start(Command::new("sleep").arg("1000"))).collect();
        let known = |n: usize| processes.of_thread(children[n].pid(), &watch).unwrap().unwrap();
        let first = known(0);
        known(1);
        assert!(Arc::ptr_eq(&first, &known(0)));
        known(2);
        assert!(Arc::ptr_eq(&first, &known(0)), "the least recently used one makes room");
        assert!(watch.with_pid(children[1].pid()).is_none());
        assert!(!watch.any_dead() && watch.get(&first.id()).is_none(), "it is not watched");
    }
}

#[test]
fn a_dead_writer_is_not_found_in_the_cache() {
    for processes in both() {
        let watch = new_watch();
        let mut child = start(Command::new("sleep").arg("1000"));
        let pid = child.pid();
        let old = processes.of_thread(pid, &watch).unwrap().unwrap();
        child.0.kill().unwrap();
        until("it is dead", || !old.is_alive());
        assert!(processes.of_thread(pid, &watch).unwrap().is_none(), "a zombie sends no requests");
        child.0.wait().unwrap();
        assert!(processes.of_thread(pid, &watch).unwrap().is_none());
    }
}

#[test]
fn a_death_is_reported_until_it_is_removed() {
    for processes in both() {
        let watch = new_watch();
        let mut children: Vec<Child> = (0..3).map(|_| start(Command::new("sleep").arg("1000"))).collect();
        let watched: Vec<Arc<Process>> =
            children.iter().map(|child| Arc::new(open(&processes, child.pid()))).collect();
        for process in &watched {
            watch.add(Arc::clone(process)).unwrap();
        }
        let ready = || {
            let mut fds = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
        };
        assert!(!watch.any_dead() && !ready());
        assert!(watch.dead().is_empty());
        // One stays a zombie; the other is collected.
        children[0].0.kill().unwrap();
        children[1].0.kill().unwrap();
        children[1].0.wait().unwrap();
        until("both are seen", || watch.dead().len() == 2);
        for _ in 0..3 {
            let mut dead = watch.dead();
            dead.sort();
            let mut expected = [watched[0].id(), watched[1].id()];
            expected.sort();
            assert_eq!(dead, expected);
            assert!(watch.any_dead() && ready());
        }
        assert_eq!(watch.remove(&watched[0].id()).map(|process| process.id()), Some(watched[0].id()));
        assert_eq!(watch.dead(), [watched[1].id()]);
        watch.remove(&watched[1].id()).unwrap();
        assert!(!watch.any_dead() && !ready() && watch.dead().is_empty());
        assert!(watch.get(&watched[1].id()).is_none() && watch.remove(&watched[1].id()).is_none());
        assert!(watch.get(&watched[2].id()).is_some());
        // A task that is dead already is reported like any other.
        watch.add(Arc::clone(&watched[0])).unwrap();
        assert_eq!(watch.dead(), [watched[0].id()]);
    }
}

#[test]
fn the_next_worker_takes_the_tasks_that_are_watched() {
    let children = [(); 2].map(|()| start(Command::new("sleep").arg("1000")));
    for processes in both() {
        let kept = KeptPidfds::new().unwrap();
        let next = KeptPidfds::from_fd(kept.as_fd().try_clone_to_owned().unwrap()).unwrap();
        let watch = Watch::new(kept, |_| false).unwrap();
        let [stays, leaves] = children.each_ref().map(|child| Arc::new(open(&processes, child.pid())));
        watch.add(Arc::clone(&stays)).unwrap();
        // So many messages that they are replaced several times.
        for _ in 0..500 {
            watch.add(Arc::clone(&leaves)).unwrap();
            watch.remove(&leaves.id()).unwrap();
        }
        drop(watch);
        let watch = Watch::new(next, |task| *task == stays.id()).unwrap();
        let taken = watch.take_kept(stays.id()).expect("it was watched");
        assert!(taken.is_alive() && taken.id() == stays.id() && processes.is_certain(&taken));
        assert!(watch.take_kept(stays.id()).is_none(), "it is taken once");
        assert!(watch.take_kept(leaves.id()).is_none());
    }
}

#[test]
fn a_task_watched_twice_is_reported_once() {
    let [processes, _] = both();
    let watch = new_watch();
    let mut child = start(Command::new("sleep").arg("1000"));
    let [one, other] = [0, 1].map(|_| Arc::new(open(&processes, child.pid())));
    watch.add(Arc::clone(&one)).unwrap();
    watch.add(other).unwrap();
    drop(one);
    child.0.kill().unwrap();
    until("it is seen", || watch.any_dead());
    assert_eq!(watch.dead().len(), 1);
    watch.remove(&watch.dead()[0]);
    assert!(!watch.any_dead());
}

/// All processes with such a mask.
fn scan(processes: &Processes, wanted: &CpuSet) -> Vec<ScannedProcess> {
    let mut found = Vec::new();
    let mut visit = |process| {
        found.push(process);
        ControlFlow::Continue(())
    };
    processes.scan(&|mask| !mask.is_empty() && mask.is_subset(wanted), &mut visit).unwrap();
    found
}

#[test]
fn the_scan_finds_processes_within_a_list() {
    let [one, _] = masks::two_cpus();
    let child = program("threads");
    for processes in both() {
        let process = open(&processes, child.pid());
        let found = |processes: &Processes| {
            let all = scan(processes, &one);
            let within =
                |process: &ScannedProcess| process.threads.iter().all(|(_, mask)| mask.is_subset(&one));
            assert!(all.iter().all(within));
            all.into_iter().find(|candidate| candidate.task == process.id())
        };
        processes.restore_mask(&process, &SavedMask::All, BlockedWriter::NONE);
        assert!(found(&processes).is_none());
        processes.set_mask(&process, &one, &one, Threads::All, BlockedWriter::NONE).unwrap();
        let found = found(&processes).unwrap();
        assert_eq!(found.threads, [(child.pid().get(), one.clone())]);
        assert_eq!(Some(found.started), processes.started(&process));
        assert_eq!(found.cgroups, [processes.cgroup(&process).unwrap()]);
        assert_eq!(found.facts.parent.map(Pid::get), Some(std::process::id()));
    }
}

#[test]
fn the_scan_finds_threads_wherever_the_first_one_is() {
    let [one, two] = masks::two_cpus();
    let mut child = program("threads");
    for processes in both() {
        let process = open(&processes, child.pid());
        // A scan before: the process is not yet known to have several threads, or no longer.
        scan(&processes, &one);
        processes.set_mask(&process, &two, &two, Threads::All, BlockedWriter::NONE).unwrap();
        let worker = *tids(child.pid()).last().unwrap();
        set_mask_of(worker.get(), &one).unwrap();
        let found: Vec<ScannedProcess> =
            scan(&processes, &one).into_iter().filter(|it| it.task == process.id()).collect();
        let [found] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!(found.threads, [(worker.get(), one.clone())]);
        let own = processes.cgroup(&process).unwrap().cgroups;
        assert!(found.cgroups.len() == 2 && found.cgroups.iter().all(|it| it.cgroups == own), "{found:?}");
        assert_eq!(found.users, [nix::unistd::getuid().as_raw(); 2]);
        // Threads with the same mask are found once, and a first thread that was found comes first.
        set_mask_of(child.pid().get(), &one).unwrap();
        let both: Vec<u32> = scan(&processes, &one)
            .into_iter()
            .filter(|it| it.task == process.id())
            .map(|it| it.threads[0].0)
            .collect();
        assert_eq!(both, [child.pid().get(), worker.get()]);
    }
    child.0.kill().unwrap();
    let [processes, _] = both();
    until("its zombie is not found", || scan(&processes, &one).iter().all(|it| it.task.pid != child.pid()));
}

#[test]
fn a_first_thread_that_has_exited_is_not_found_and_the_others_are() {
    let [one, two] = masks::two_cpus();
    let child = program("without_first_thread");
    let pid = child.pid();
    kill(nix::unistd::Pid::from_raw(pid.get() as i32), Signal::SIGUSR1).unwrap();
    for processes in both() {
        until("its first thread has exited", || {
            processes.proc.thread_stat(pid.get(), pid.get()).unwrap().is_some_and(|stat| stat.has_exited())
        });
        let process = open(&processes, pid);
        let found = |wanted: &CpuSet| scan(&processes, wanted).into_iter().find(|it| it.task == process.id());
        processes.set_mask(&process, &one, &one, Threads::All, BlockedWriter::NONE).unwrap();
        let it = found(&one).unwrap();
        assert!(it.threads.iter().all(|(tid, _)| *tid != pid.get()) && it.users.len() == 1, "{it:?}");
        let others = tids(pid).into_iter().filter(|tid| *tid != pid);
        others.for_each(|tid| set_mask_of(tid.get(), &two).unwrap());
        assert!(found(&one).is_none(), "only the first thread, which has exited, has this mask");
        assert!(found(&two).is_some());
    }
}

#[test]
fn the_user_at_the_death_is_known_until_the_parent_collects_it() {
    for processes in both() {
        let mut child = start(Command::new("sleep").arg("1000"));
        let process = open(&processes, child.pid());
        child.0.kill().unwrap();
        until("it is a zombie", || !process.is_alive());
        assert_eq!(processes.user_at_death(&process), Some(nix::unistd::getuid().as_raw()));
        child.0.wait().unwrap();
        assert_eq!(processes.user_at_death(&process), None);
    }
}

/// Not a test: the program that other tests run as a process with certain threads. It ends when its standard input
/// does.
#[test]
#[ignore = "a program that other tests run"]
fn program_for_other_tests() {
    let Ok(kind) = std::env::var(PROGRAM) else { return };
    let sleep = || std::thread::sleep(Duration::from_secs(1000));
    match kind.as_str() {
        "threads" => (0..3).for_each(|_| drop(std::thread::spawn(sleep))),
        "without_first_thread" => {
            sys::end_first_thread_on_sigusr1().unwrap();
            // The signal must reach the first thread; this is another one.
            SigSet::from(Signal::SIGUSR1).thread_block().unwrap();
        }
        "thread_spawner" => (0..2).for_each(|_| drop(std::thread::spawn(spawn_threads))),
        "many_thread_spawner" => {
            (0..2).for_each(|_| drop(std::thread::spawn(spawn_threads)));
            (0..150).for_each(|_| drop(std::thread::spawn(sleep)));
        }
        "mask_widener" => (0..2).for_each(|_| drop(std::thread::spawn(masks::widen_masks))),
        kind => panic!("unknown program: {kind}"),
    }
    println!("ready");
    let _ = io::stdin().read_line(&mut String::new());
    std::process::exit(0);
}

/// Creates threads that create threads, without end.
fn spawn_threads() {
    loop {
        let one_more = || std::thread::spawn(|| drop(std::thread::spawn(|| ()).join()));
        let _ = one_more().join();
    }
}

/// As on this kernel, and as on the oldest supported one.
fn both() -> [Processes; 2] {
    let none = Features { pidfs: false, translation: false, info: false };
    [Processes::new().unwrap(), Processes::with_features(none).unwrap()]
}

/// A child process that is killed when dropped.
struct Child(std::process::Child);

impl Child {
    fn pid(&self) -> Pid {
        Pid::new(self.0.id()).unwrap()
    }

    fn raw(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.0.id() as i32)
    }

    /// Waits until the program says that it is ready.
    fn ready(mut self) -> Self {
        let lines = BufReader::new(self.0.stdout.take().unwrap()).lines();
        assert!(
            lines.map(Result::unwrap).any(|line| line.ends_with("ready")),
            "the program ended before it was ready"
        );
        self
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(command: &mut Command) -> Child {
    Child(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap())
}

fn program(kind: &str) -> Child {
    let name = "process::tests::program_for_other_tests";
    let mut command = Command::new(std::env::current_exe().unwrap());
    start(command.args([name, "--exact", "--ignored", "--nocapture"]).env(PROGRAM, kind)).ready()
}

fn open(processes: &Processes, tid: Pid) -> Process {
    processes.open(tid).unwrap().expect("it lives")
}

/// Opens a process as if `writer` had written this PID.
fn open_from(processes: &Processes, writer: &Process, number: u32) -> Option<Arc<Process>> {
    let written = WrittenPid(NonZeroU32::new(number).unwrap());
    processes.open_in_namespace_of(writer, written, &new_watch()).unwrap()
}

fn tids(pid: Pid) -> Vec<Pid> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let number = |name: OsString| Pid::new(name.to_str()?.parse().ok()?);
    // A thread may end while the threads are listed.
    entries.filter_map(|entry| number(entry.ok()?.file_name())).collect()
}

/// Asserts that the process is dead, and that a process with the same PID is not taken for it.
fn assert_is_unknown(processes: &Processes, process: &Process) {
    assert!(processes.facts(process).unwrap().is_none());
    assert_eq!(processes.started(process), None);
    assert_eq!(processes.cgroup(process), None);
    assert_eq!(processes.comm(process), None);
}

fn until(what: &str, mut true_now: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !true_now() {
        assert!(Instant::now() < deadline, "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
