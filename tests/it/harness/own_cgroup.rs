//! A cgroup for everything that one test starts.
//!
//! Tests run in parallel and pin their processes to the same few CPUs, so a process of one test could pass for the heir
//! of a process of another test that has died. Each test thread that has a mount or a plain directory is therefore moved into a cgroup of its
//! own, and all that it starts is born there. A daemon that is built for tests does not look at processes in the cgroups
//! of other tests (`failpoint::is_of_another_test`).

use std::cell::RefCell;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, gettid};

use super::cgroup::Hierarchy;

/// How many threads have a cgroup, and the cgroup of the process before the first one had.
static USERS: Mutex<(usize, Option<PathBuf>)> = Mutex::new((0, None));

thread_local! {
    static OWN: RefCell<Weak<OwnCgroup>> = const { RefCell::new(Weak::new()) };
}

/// The cgroup of a test thread; left, emptied and removed when dropped.
pub struct OwnCgroup {
    thread: Pid,
    path: PathBuf,
    hierarchy: Hierarchy,
    /// The cgroup of the whole process while some thread has its own.
    top: PathBuf,
}

impl OwnCgroup {
    /// The cgroup of the calling thread, which is made if it has none.
    pub fn of_this_thread() -> Arc<Self> {
        OWN.with_borrow_mut(|own| {
            let enter = || {
                Self::enter().expect("a test makes a cgroup, which needs root and a writable cgroup mount")
            };
            let cgroup = own.upgrade().unwrap_or_else(|| Arc::new(enter()));
            *own = Arc::downgrade(&cgroup);
            cgroup
        })
    }

    fn enter() -> io::Result<Self> {
        let hierarchy = Hierarchy::any();
        let pid = std::process::id();
        let thread = gettid();
        let top = hierarchy.root.join(format!("kcm-tests-{pid}"));
        let mut users = users();
        if users.0 == 0 {
            users.1 = Some(hierarchy.own_path()?);
            fs::create_dir_all(&top)?;
            fs::write(top.join("cgroup.procs"), pid.to_string())?;
        }
        users.0 += 1;
        drop(users);
        let cgroup = Self { thread, path: top.join(thread.to_string()), hierarchy, top };
        fs::create_dir(&cgroup.path)?;
        if cgroup.hierarchy.is_v2 {
            // Only such a cgroup takes some of the threads of a process.
            fs::write(cgroup.path.join("cgroup.type"), "threaded")?;
        }
        cgroup.move_to(&cgroup.path)?;
        Ok(cgroup)
    }

    fn move_to(&self, cgroup: &Path) -> io::Result<()> {
        fs::write(cgroup.join(self.hierarchy.threads_file()), self.thread.to_string())
    }

    /// Kills what the test has left.
    fn empty(&self) {
        let threads = fs::read_to_string(self.path.join(self.hierarchy.threads_file())).unwrap_or_default();
        for thread in threads.lines().filter_map(|thread| thread.parse().ok()) {
            if !Path::new(&format!("/proc/self/task/{thread}")).exists() {
                let _ = kill(Pid::from_raw(thread), Signal::SIGKILL);
            }
        }
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        let _ = self.move_to(&self.top);
        remove(&self.path, || self.empty());
        let mut users = users();
        users.0 -= 1;
        if users.0 == 0 {
            let home = users.1.take().unwrap_or_default();
            let _ = fs::write(home.join("cgroup.procs"), std::process::id().to_string());
            remove(&self.top, || {});
        }
    }
}

/// Removes a cgroup once it is empty, which it is a moment after its last thread has ended.
fn remove(cgroup: &Path, empty: impl Fn()) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while cgroup.exists() && fs::remove_dir(cgroup).is_err() && Instant::now() < deadline {
        empty();
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn users() -> MutexGuard<'static, (usize, Option<PathBuf>)> {
    USERS.lock().unwrap_or_else(PoisonError::into_inner)
}
