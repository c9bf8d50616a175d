//! Cgroups for tests, on cgroup v1, on the hybrid layout and on cgroup v2.
//!
//! Owns the knowledge which hierarchies this machine has and where they are mounted; nothing else in the tests names
//! a path of cgroupfs. Does not know what a test does in a cgroup. If this machine does not have a controller that a
//! test needs, the test fails and names it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::signal;

/// A mounted hierarchy; see `cgroups(7)`.
#[derive(Clone, Debug)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub root: PathBuf,
    pub is_v2: bool,
    /// The controllers that it can have.
    controllers: Vec<String>,
}

impl Hierarchy {
    /// All that are mounted, by `/proc/self/mountinfo`; the same one may be mounted twice.
    fn all() -> Vec<Self> {
        let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        table.lines().filter_map(Self::of_line).collect()
    }

    /// By proc(5), the mount point is the fifth field. After ` - ` come the type, the source and the options of the
    /// file system; on v1 the options name the controllers.
    fn of_line(line: &str) -> Option<Self> {
        let (before, behind) = line.split_once(" - ")?;
        let root = PathBuf::from(before.split(' ').nth(4)?);
        let mut fields = behind.split(' ');
        let is_v2 = match fields.next()? {
            "cgroup" => false,
            "cgroup2" => true,
            _ => return None,
        };
        let controllers = if is_v2 {
            fs::read_to_string(root.join("cgroup.controllers"))
                .ok()?
                .split_whitespace()
                .map(str::to_owned)
                .collect()
        } else {
            fields.nth(1)?.split(',').map(str::to_owned).collect()
        };
        Some(Self { root, is_v2, controllers })
    }

    pub fn v2() -> Option<Self> {
        Self::all().into_iter().find(|hierarchy| hierarchy.is_v2)
    }

    /// One to make cgroups in that need no controller: v2 if there is one.
    pub fn any() -> Self {
        let v1 = || Self::find("pids").or_else(|| Self::find("cpuset"));
        Self::v2()
            .or_else(v1)
            .expect("a test needs cgroup v2, or cgroup v1 with the controller pids or cpuset")
    }

    /// The one that has this controller.
    pub fn with(controller: &str) -> Self {
        let found = Self::find(controller);
        let found = found.unwrap_or_else(|| {
            panic!("this test needs the cgroup controller {controller}; mounted are {:?}", Self::all())
        });
        if found.is_v2 {
            let enable = fs::write(found.root.join("cgroup.subtree_control"), format!("+{controller}"));
            enable.unwrap_or_else(|error| {
                let root = found.root.display();
                panic!("this test needs the cgroup controller {controller}; it cannot be enabled below {root}: {error}")
            });
        }
        found
    }

    fn find(controller: &str) -> Option<Self> {
        Self::all().into_iter().find(|hierarchy| hierarchy.controllers.iter().any(|name| name == controller))
    }

    /// The cgroup of this process.
    pub fn own_path(&self) -> std::io::Result<PathBuf> {
        let table = fs::read_to_string("/proc/self/cgroup")?;
        // `number:controllers:path`; v2 has the number 0 and no controllers.
        let is_this = |names: &str| {
            let mut names = names.split(',');
            if self.is_v2 {
                names.next() == Some("")
            } else {
                names.any(|name| self.controllers.iter().any(|c| c == name))
            }
        };
        let path = table.lines().find_map(|line| {
            let (names, path) = line.split_once(':')?.1.split_once(':')?;
            is_this(names).then_some(path)
        });
        Ok(self.root.join(path.unwrap_or("/").trim_start_matches('/')))
    }

    /// The file of a cgroup here that takes single threads.
    pub fn threads_file(&self) -> &'static str {
        if self.is_v2 { "cgroup.threads" } else { "tasks" }
    }
}

/// Where cgroup v2 is mounted.
pub fn root() -> Option<PathBuf> {
    Some(Hierarchy::v2()?.root)
}

/// A cgroup; when dropped, its processes are killed and it is removed.
pub struct Cgroup {
    pub path: PathBuf,
    pub hierarchy: Hierarchy,
    /// Unmounted after the cgroup was removed.
    #[allow(dead_code, reason = "it is only dropped")]
    mounted_v2: Option<MountedV2>,
}

impl Cgroup {
    /// One without a controller: a group of processes.
    pub fn new() -> Self {
        Self::below(Hierarchy::any())
    }

    /// One of v2, for a test that compares with it. Mounts v2 if this machine does not.
    pub fn of_v2() -> Self {
        let mounted = Hierarchy::v2().is_none().then(MountedV2::new);
        let mut cgroup = Self::below(Hierarchy::v2().expect("cgroup v2 was mounted"));
        cgroup.mounted_v2 = mounted;
        cgroup
    }

    /// One whose controller is `controller`, such as `memory`.
    pub fn with(controller: &str) -> Self {
        Self::below(Hierarchy::with(controller))
    }

    fn below(hierarchy: Hierarchy) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // A daemon does not look at processes in the cgroups of other tests (`failpoint::is_of_another_test`).
        let (pid, thread) = (std::process::id(), nix::unistd::gettid());
        let name = format!("kcm-test-{pid}-{thread}-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let path = hierarchy.root.join(name);
        fs::create_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path, hierarchy, mounted_v2: None }
    }

    /// Moves a process into it.
    pub fn add(&self, pid: u32) {
        self.write("cgroup.procs", &pid.to_string());
    }

    fn write(&self, file: &str, text: &str) {
        let path = self.path.join(file);
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// One of its files that nobody may write to.
    pub fn read_only_file(&self) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let entries = fs::read_dir(&self.path).expect("a cgroup").map(|entry| entry.expect("an entry"));
        let is_read_only = |file: &fs::DirEntry| {
            file.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o777 == 0o444)
        };
        entries.filter(is_read_only).map(|file| file.path()).min().expect("a file that is only read")
    }

    /// Its name below the root of each hierarchy, for programs that make it there, too.
    pub fn name(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).expect("a name")
    }

    /// For a cgroup with the controller `memory`.
    pub fn limit_memory(&self, bytes: u64) {
        let file = if self.hierarchy.is_v2 { "memory.max" } else { "memory.limit_in_bytes" };
        self.write(file, &bytes.to_string());
    }

    /// How many processes the kernel has killed for the limit of memory.
    pub fn oom_kills(&self) -> u64 {
        let file = if self.hierarchy.is_v2 { "memory.events" } else { "memory.oom_control" };
        let text = fs::read_to_string(self.path.join(file)).expect(file);
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        line.expect("oom_kill").parse().expect("a number")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A cgroup that another program has made, by its name; empty by now.
        for root in Hierarchy::all().into_iter().map(|hierarchy| hierarchy.root) {
            if let Some(below) =
                self.path.file_name().map(|name| root.join(name)).filter(|it| *it != self.path)
            {
                remove_empty(&below);
            }
        }
        // The cgroups below it, which have no processes.
        let below = fs::read_dir(&self.path).into_iter().flatten().filter_map(Result::ok);
        below.for_each(|entry| remove_empty(&entry.path()));
        // A process that has just been killed is in it for a moment.
        for _ in 0..1000 {
            let procs = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
            procs.lines().filter_map(|pid| pid.parse().ok()).for_each(|pid| signal(pid, Signal::SIGKILL));
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Removes a cgroup and those below it, as far as they are empty.
fn remove_empty(cgroup: &Path) {
    let entries = fs::read_dir(cgroup).into_iter().flatten().filter_map(Result::ok);
    let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    below.for_each(|entry| remove_empty(&entry.path()));
    let _ = fs::remove_dir(cgroup);
}

/// The hierarchy of v2, mounted in a temporary directory.
struct MountedV2(TempDir);

impl MountedV2 {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mounted =
            mount(Some("cgroup2"), directory.path(), Some("cgroup2"), MsFlags::empty(), None::<&str>);
        mounted.expect("this test mounts cgroup v2");
        Self(directory)
    }
}

impl Drop for MountedV2 {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

/// A cgroup with the controller `cpuset`.
pub struct Cpuset(Cgroup);

impl Cpuset {
    /// One that allows these CPUs.
    pub fn new(cpus: &str) -> Self {
        let cpuset = Self(Cgroup::with("cpuset"));
        cpuset.set(cpus);
        if !cpuset.0.hierarchy.is_v2 {
            // A v1 cpuset takes no process before it has memory nodes; one of v2 inherits them.
            let nodes = read(&cpuset.0.hierarchy.root.join("cpuset.mems"));
            cpuset.0.write("cpuset.mems", &nodes);
        }
        cpuset
    }

    /// Allows these CPUs instead.
    pub fn set(&self, cpus: &str) {
        self.0.write("cpuset.cpus", cpus);
    }

    /// Moves a process into it.
    pub fn add(&self, pid: u32) {
        self.0.add(pid);
    }
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// The reason why this machine cannot isolate CPUs; `None` if it can.
pub fn missing_for_isolation() -> Option<&'static str> {
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
    let read = |root: &&Path| fs::read_to_string(root.join("cgroup.controllers")).ok();
    let Some(root) = roots.into_iter().find(|root| read(root).is_some()) else {
        return Some("cgroup v2 is not mounted");
    };
    if !read(&root).is_some_and(|controllers| controllers.split_whitespace().any(|it| it == "cpuset")) {
        return Some("cgroup v2 has no cpuset controller");
    }
    (!root.join("cpuset.cpus.isolated").exists()).then_some("the kernel has no cpuset.cpus.exclusive")
}
