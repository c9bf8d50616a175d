//! Tests that hold on a mount and on a plain directory, and how commands fail on both.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{KCM, Machine, Mount, NOBODY, Plain, Sleeper, kcm_for, masks, run, set_mode, until};

/// A configuration directory, mounted or plain.
pub trait Dir {
    fn conf(&self) -> PathBuf;

    fn make_pool(&self, pool: &str, exclusive: bool, lists: &[&str]);

    fn is_mounted(&self) -> bool;

    /// `kcm <words> --conf-dir=<conf>`.
    fn kcm(&self, words: &[&str]) -> Command {
        kcm_for(&self.conf(), words)
    }

    /// The same for `nobody`, who can reach the directory and a copy of kcm.
    fn kcm_as_nobody(&self, words: &[&str]) -> Command {
        use std::os::unix::process::CommandExt as _;
        let conf = self.conf();
        let home = conf.parent().expect("a home");
        set_mode(home, 0o755);
        let copy = home.join("kcm");
        if !copy.exists() {
            copy_kcm(&copy);
        }
        let mut command = Command::new(copy);
        command.args(self.kcm(words).get_args()).uid(NOBODY).gid(NOBODY);
        command
    }

    /// The text of a list's `tasks` file.
    fn tasks_of(&self, pool: &str, list: &str) -> String {
        let file = self.conf().join("pools").join(pool).join(list).join("tasks");
        fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display())).trim().into()
    }
}

impl Dir for Mount {
    fn conf(&self) -> PathBuf {
        self.conf()
    }

    fn make_pool(&self, pool: &str, exclusive: bool, lists: &[&str]) {
        self.make_pool(pool, exclusive, lists);
    }

    fn is_mounted(&self) -> bool {
        true
    }
}

impl Dir for Plain {
    fn conf(&self) -> PathBuf {
        self.conf()
    }

    fn make_pool(&self, pool: &str, exclusive: bool, lists: &[&str]) {
        let lists: Vec<(&str, &str)> = lists.iter().map(|list| (*list, "")).collect();
        self.make_pool(pool, exclusive, &lists);
    }

    fn is_mounted(&self) -> bool {
        false
    }
}

/// Makes a copy of kcm that can be started. Another program makes it: a process that the test starts meanwhile would
/// inherit the copy open for writing.
pub fn copy_kcm(to: &Path) {
    assert!(Command::new("cp").arg(KCM).arg(to).status().expect("cp").success());
}

/// Runs a test on a mount and on a plain directory.
pub fn on_both(promise: impl Fn(&dyn Dir)) {
    promise(&Mount::new());
    promise(&Plain::new());
}

/// The one line that a command fails with: status 1, nothing on standard output.
pub fn failure(command: &mut Command) -> String {
    let (out, err, status) = run(command);
    assert_eq!((out.as_str(), status), ("", Some(1)), "{command:?}: {err}");
    let line = err.strip_prefix("ERROR:root:").and_then(|line| line.strip_suffix('\n'));
    let line = line.unwrap_or_else(|| panic!("{command:?}: not one line: {err:?}"));
    assert!(!line.contains('\n') && !line.is_empty(), "{command:?}: {err:?}");
    line.to_owned()
}

impl Machine {
    /// The example of the legacy documentation: one socket, 8 cores, 16 CPUs.
    pub fn legacy_example() -> Self {
        Self::new(1, 8, 2)
    }

    /// Makes a command see this machine, written below `root`.
    pub fn seen_by<'a>(&self, root: &Path, command: &'a mut Command) -> &'a mut Command {
        self.write(root);
        command.env("KCM_DEV_LSCPU_SYSFS", root).env("KCM_PROC_FS", root.join("proc"))
    }
}

/// A process with these CPUs as its mask.
pub fn pinned(cpus: &str) -> Sleeper {
    let sleeper = Sleeper::spawn(Command::new("taskset").args(["-c", cpus, "sleep", "1000"]));
    let comm = format!("/proc/{}/comm", sleeper.pid());
    until("it sleeps", || fs::read_to_string(&comm).is_ok_and(|name| name == "sleep\n"));
    assert_eq!(masks(sleeper.pid()), [cpus]);
    sleeper
}

impl Mount {
    /// How often the directory is in the mount table.
    pub fn mounted(&self) -> usize {
        let table = fs::read_to_string("/proc/self/mounts").expect("mounts");
        let conf = self.conf();
        table.lines().filter(|line| line.split(' ').nth(1) == conf.to_str()).count()
    }
}
