//! A cgroup for all that a test starts.
//!
//! Tests run side by side and pin their processes to the same few CPUs, so that one test's process would pass
//! for the heir of another test's that has died; but an heir is in the cgroup of the dead one. Each thread that
//! has a mount is therefore put into a (threaded) cgroup of its own, where all that it starts is, too.

use std::cell::RefCell;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, gettid};

/// How many threads have one, and where the process was before the first of them.
static USERS: Mutex<(usize, Option<PathBuf>)> = Mutex::new((0, None));

thread_local! {
    static OURS: RefCell<Weak<Cgroup>> = const { RefCell::new(Weak::new()) };
}

/// Left, emptied and removed when dropped.
pub struct Cgroup {
    thread: Pid,
    path: PathBuf,
    /// That of the whole process, meanwhile.
    top: PathBuf,
}

impl Cgroup {
    /// That of this thread; None where there is no cgroup2 to write to.
    pub fn of_this_thread() -> Option<Arc<Self>> {
        OURS.with_borrow_mut(|ours| {
            let cgroup = ours.upgrade().or_else(|| Self::enter().ok().map(Arc::new))?;
            *ours = Arc::downgrade(&cgroup);
            Some(cgroup)
        })
    }

    fn enter() -> io::Result<Self> {
        let root = root().ok_or(io::ErrorKind::NotFound)?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).ok_or(io::ErrorKind::NotFound)?;
        let pid = std::process::id();
        let top = root.join(format!("kcm-tests-{pid}"));
        let thread = gettid();
        let mut users = users();
        if users.0 == 0 {
            fs::create_dir_all(&top)?;
            fs::write(top.join("cgroup.procs"), pid.to_string())?;
            users.1 = Some(root.join(own));
        }
        users.0 += 1;
        drop(users);
        let cgroup = Self { thread, path: top.join(thread.to_string()), top };
        fs::create_dir(&cgroup.path)?;
        fs::write(cgroup.path.join("cgroup.type"), "threaded")?;
        fs::write(cgroup.path.join("cgroup.threads"), thread.to_string())?;
        Ok(cgroup)
    }

    /// Kills what a test has left.
    fn empty(&self) {
        let threads = fs::read_to_string(self.path.join("cgroup.threads")).unwrap_or_default();
        for thread in threads.lines().filter_map(|thread| thread.parse().ok()) {
            if !Path::new(&format!("/proc/self/task/{thread}")).exists() {
                let _ = kill(Pid::from_raw(thread), Signal::SIGKILL);
            }
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.top.join("cgroup.threads"), self.thread.to_string());
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

/// Removes the cgroup once it is empty, which it becomes a moment after its last thread has ended.
fn remove(cgroup: &Path, hurry: impl Fn()) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while cgroup.exists() && fs::remove_dir(cgroup).is_err() && Instant::now() < deadline {
        hurry();
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn users() -> MutexGuard<'static, (usize, Option<PathBuf>)> {
    USERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where cgroup2 is mounted.
pub fn root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.find(|fields| fields.get(2) == Some(&"cgroup2")).map(|fields| PathBuf::from(fields[1]))
}
