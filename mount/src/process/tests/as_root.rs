//! Tests that need root: they start processes of other users, PID namespaces, processes with a chosen PID, and cpusets.
//! The root tier of `scripts/test` runs them.

use std::path::PathBuf;

use super::masks::{of, online, two_cpus};
use super::*;

#[test]
fn facts_about_a_process() {
    let child = start(Command::new("sleep").arg("1000"));
    let other = start(Command::new("sleep").arg("1000").uid(65_534));
    for processes in both() {
        let process = open(&processes, child.pid());
        assert_eq!(process.id().pid, child.pid());
        let facts = processes.facts(&process).unwrap().unwrap();
        assert_eq!(facts.parent.map(Pid::get), Some(std::process::id()));
        assert_eq!(facts.uids, Uids { real: 0, effective: 0, saved: 0 });
        assert!(!facts.kernel_thread);
        until("it runs its program", || processes.comm(&process).as_deref() == Some("sleep"));
        let age = clock::since_boot() / clock::tick() - processes.started(&process).unwrap();
        assert!(age < 60 * 1_000_000_000 / clock::tick(), "{age} ticks");
        let other = open(&processes, other.pid());
        let facts = processes.facts(&other).unwrap().unwrap();
        assert_eq!(facts.uids, Uids { real: 65_534, effective: 65_534, saved: 65_534 });
        assert_ne!(other.id(), process.id());
        assert!(processes.cgroup(&process).is_some());
        assert_eq!(processes.cgroup(&process), processes.cgroup(&other));
        assert!(processes.same_namespace(&process, &other));
        assert!(!processes.is_namespace_init(&process));
        assert_eq!(open(&processes, child.pid()).id(), process.id(), "the same each time");
    }
}

#[test]
fn a_reused_pid_is_not_the_old_task() {
    let [one, _] = two_cpus();
    for processes in both() {
        let mut child = start(Command::new("sleep").arg("1000"));
        let old = open(&processes, child.pid());
        let previous = processes.set_mask(&old, &one, &one, Threads::All, BlockedWriter::NONE).unwrap();
        child.0.kill().unwrap();
        child.0.wait().unwrap();
        let again = start_with_pid(child.pid());
        let new = open(&processes, again.pid());
        assert!(new.is_alive() && !old.is_alive());
        if processes.is_certain(&new) {
            assert_ne!(new.id(), old.id());
        }
        assert_eq!(processes.ended(&old), Ending::Killed(9));
        assert_is_unknown(&processes, &old);
        // Operations on the old process do not reach the new one.
        let mask = of(again.pid());
        assert!(!mask.contains(&one));
        assert!(matches!(
            processes.set_mask(&old, &one, &one, Threads::All, BlockedWriter::NONE),
            Err(MaskError::Gone)
        ));
        assert!(matches!(
            processes.set_mask(&old, &one, &one, Threads::OnlyStrays, BlockedWriter::NONE),
            Err(MaskError::Gone)
        ));
        processes.restore_mask(&old, &SavedMask::Cpus(one.clone()), BlockedWriter::NONE);
        processes.undo(&old, previous, BlockedWriter::NONE);
        assert_eq!(of(again.pid()), mask);
        processes.restore_mask(&new, &SavedMask::Cpus(one.clone()), BlockedWriter::NONE);
        let refined = processes.probe_saved_mask(&old, SavedMask::Cpus(one.clone()));
        assert!(matches!(refined, Err(MaskError::Gone)), "{refined:?}");
        assert_eq!(of(again.pid()), std::slice::from_ref(&one));
    }
}

#[test]
fn pids_are_translated_from_the_namespace_of_the_writer() {
    let container = Container::start();
    for processes in both() {
        let first = open(&processes, container.first);
        let ours = open(&processes, Pid::new(std::process::id()).unwrap());
        assert!(!processes.same_namespace(&first, &ours));
        assert!(processes.is_namespace_init(&first));
        assert_eq!(processes.number_in_namespace_of(&first, container.first), Some(1));
        let inside = |number| open_from(&processes, &first, number);
        assert_eq!(inside(1).map(|process| process.id()), Some(first.id()));
        let sleeper = inside(container.sleeper).unwrap();
        until("it runs its program", || processes.comm(&sleeper).as_deref() == Some("sleep"));
        assert_eq!(processes.facts(&sleeper).unwrap().unwrap().parent, Some(container.first));
        assert!(processes.same_namespace(&first, &sleeper) && !processes.is_namespace_init(&sleeper));
        let number = processes.number_in_namespace_of(&first, sleeper.id().pid);
        assert_eq!(number, Some(container.sleeper));
        // Processes outside have no PID inside; processes inside have one outside.
        assert!(inside(i32::MAX as u32).is_none());
        assert_eq!(processes.number_in_namespace_of(&first, ours.id().pid), None);
        let outside = processes.number_in_namespace_of(&ours, sleeper.id().pid);
        assert_eq!(outside, Some(sleeper.id().pid.get()));
        let found = open_from(&processes, &ours, sleeper.id().pid.get());
        assert_eq!(found.map(|process| process.id()), Some(sleeper.id()));
    }
}

#[test]
fn pids_of_one_container_mean_nothing_in_another() {
    let [one, other] = [Container::start(), Container::start()];
    for processes in both() {
        let [first, second] = [&one, &other].map(|container| open(&processes, container.first));
        assert!(!processes.same_namespace(&first, &second));
        assert_eq!(processes.number_in_namespace_of(&first, other.first), None);
        let found = open_from(&processes, &second, other.sleeper).unwrap();
        assert_eq!(processes.facts(&found).unwrap().unwrap().parent, Some(other.first));
        assert_eq!(processes.number_in_namespace_of(&first, found.id().pid), None);
    }
}

#[test]
fn an_ended_container_has_no_pids() {
    for processes in both() {
        let container = Container::start();
        let first = open(&processes, container.first);
        drop(container);
        until("it is dead", || !first.is_alive());
        assert!(open_from(&processes, &first, 1).is_none());
        assert_eq!(processes.number_in_namespace_of(&first, Pid::new(1).unwrap()), None);
        assert!(!processes.same_namespace(&first, &first));
    }
}

#[test]
fn a_cpuset_refuses_and_narrows_masks() {
    let [one, other] = two_cpus();
    let child = program("threads");
    let cgroup = Cpuset::new(&one);
    for processes in both() {
        let process = open(&processes, child.pid());
        let outside = processes.cgroup(&process);
        cgroup.take(child.pid());
        assert_ne!(processes.cgroup(&process), outside, "it is in another cgroup");
        let refused = processes.set_mask(&process, &other, &other, Threads::All, BlockedWriter::NONE);
        assert!(matches!(refused, Err(MaskError::Refused)), "{refused:?}");
        let narrowed =
            processes.set_mask(&process, &one.union(&other), &one, Threads::All, BlockedWriter::NONE);
        assert!(matches!(&narrowed, Err(MaskError::Narrowed { got }) if *got == one), "{narrowed:?}");
        assert!(of(child.pid()).iter().all(|mask| *mask == one));
        let saved = processes.saved_mask(&process).unwrap();
        assert_eq!(saved, SavedMask::Cpus(one.clone()), "as far as it is known without touching the task");
        assert_eq!(processes.probe_saved_mask(&process, saved).unwrap(), SavedMask::All);
        processes.set_mask(&process, &one, &one, Threads::All, BlockedWriter::NONE).unwrap();
        // The mask is no longer possible: the task gets all CPUs, which follow the cpuset when it grows.
        processes.restore_mask(&process, &SavedMask::Cpus(other.clone()), BlockedWriter::NONE);
        assert!(of(child.pid()).iter().all(|mask| *mask == one));
        cgroup.give_back(child.pid());
        until("it follows its cpuset", || of(child.pid()).iter().all(|mask| *mask == online()));
    }
}

/// Starts a child with this PID, which has just become free.
fn start_with_pid(pid: Pid) -> Child {
    for _ in 0..1_000 {
        // The kernel continues counting from this number.
        std::fs::write("/proc/sys/kernel/ns_last_pid", (pid.get() - 1).to_string()).unwrap();
        let child = start(Command::new("sleep").arg("1000"));
        if child.pid() == pid {
            return child;
        }
    }
    panic!("other processes always got PID {pid} first");
}

/// A PID namespace with a shell as its first process and a child of it.
struct Container {
    _unshare: Child,
    first: Pid,
    /// The PID of the child inside the namespace.
    sleeper: u32,
}

impl Container {
    fn start() -> Self {
        let script = "sleep 1000 & echo $!; read x";
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", script]);
        let mut unshare = start(&mut command);
        let mut line = String::new();
        BufReader::new(unshare.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let children = format!("/proc/{pid}/task/{pid}/children", pid = unshare.pid());
        let first = std::fs::read_to_string(children).unwrap().trim().parse().unwrap();
        Self { first: Pid::new(first).unwrap(), sleeper: line.trim().parse().unwrap(), _unshare: unshare }
    }
}

/// The mount point of the hierarchy with the cpuset controller: v1 if there is one, else v2.
fn cpuset_root() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let mounts: Vec<Vec<&str>> = mounts.lines().map(|line| line.split(' ').collect()).collect();
    let v1 =
        mounts.iter().find(|mount| mount[2] == "cgroup" && mount[3].split(',').any(|name| name == "cpuset"));
    let found = v1.or_else(|| mounts.iter().find(|mount| mount[2] == "cgroup2"));
    PathBuf::from(found.expect("a cgroup hierarchy with the controller cpuset")[1])
}

/// A cpuset cgroup; removed when dropped.
struct Cpuset {
    root: PathBuf,
    path: PathBuf,
}

impl Cpuset {
    /// One with these CPUs.
    fn new(cpus: &CpuSet) -> Self {
        let root = cpuset_root();
        // v1 does not have this file, and on v2 the controller may be enabled already.
        let _ = std::fs::write(root.join("cgroup.subtree_control"), "+cpuset");
        let path = root.join(format!("kcm-test-{}", std::process::id()));
        std::fs::create_dir(&path).expect("a test of cpusets needs to be root and makes a cgroup");
        let cgroup = Self { root, path };
        std::fs::write(cgroup.path.join("cpuset.cpus"), cpus.to_string()).unwrap();
        std::fs::write(cgroup.path.join("cpuset.mems"), "0").unwrap();
        cgroup
    }

    fn take(&self, pid: Pid) {
        std::fs::write(self.path.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    fn give_back(&self, pid: Pid) {
        std::fs::write(self.root.join("cgroup.procs"), pid.to_string()).unwrap();
    }
}

impl Drop for Cpuset {
    fn drop(&mut self) {
        for pid in std::fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = std::fs::write(self.root.join("cgroup.procs"), pid);
        }
        let _ = std::fs::remove_dir(&self.path);
    }
}
