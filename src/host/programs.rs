//! The command lines of programs that run with the rights of root on the machine itself.
//!
//! Owns which processes can be believed. Does not know what a program is for.
//!
//! Everybody may give a process any name and any command line. The kernel says what a process may do: `Uid`, `CapEff` and
//! `NSpid` of `/proc/PID/status`, and `/proc/PID/cgroup`. A process with UID 0 and `CAP_SYS_ADMIN` outside of containers can
//! change what it is said to be anyway, so it can be believed. `/proc/PID/exe` would not say more, and needs rights that this
//! process may not have.

use std::fs;

use super::Host;

/// `CAP_SYS_ADMIN` (linux/capability.h).
const CAP_SYS_ADMIN: u64 = 1 << 21;

impl Host {
    /// Returns the command lines, without the program, of the processes with this name that can be believed.
    pub(crate) fn root_command_lines(&self, name: &str) -> Vec<Vec<String>> {
        let mut pids = self.user_processes();
        pids.retain(|&pid| self.program_name(pid).as_deref() == Some(name) && self.is_root_of_machine(pid));
        pids.into_iter().filter_map(|pid| self.arguments(pid)).collect()
    }

    fn arguments(&self, pid: u32) -> Option<Vec<String>> {
        let line = fs::read(self.proc.join(format!("{pid}/cmdline"))).ok()?;
        let words = line.strip_suffix(b"\0").unwrap_or(&line).split(|&byte| byte == 0).skip(1);
        Some(words.map(|word| String::from_utf8_lossy(word).into_owned()).collect())
    }

    /// Whether the process has the rights of root on the machine, and is in no container.
    fn is_root_of_machine(&self, pid: u32) -> bool {
        let status = self.processes.as_ref().and_then(|processes| processes.status(pid).ok().flatten());
        let Some(status) = status else { return false };
        let users = status.numbers("Uid");
        let effective = status.field("CapEff").and_then(|text| u64::from_str_radix(text, 16).ok());
        !users.is_empty()
            && users.iter().all(|&uid| uid == 0)
            && effective.is_some_and(|effective| effective & CAP_SYS_ADMIN != 0)
            && status.numbers("NSpid").len() == 1
            && self.container_of(pid).is_none()
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_procfs_without_the_process_has_no_command_lines() {
        assert!(Host::at("/nowhere".into(), None).root_command_lines("x").is_empty());
    }

    /// Starts a program under this name, and returns its command lines as they are believed.
    fn believed(name: &str, prefix: &[&str]) -> Vec<Vec<String>> {
        let home = tempfile::tempdir().unwrap();
        let program = home.path().join(name);
        fs::copy(fs::canonicalize("/bin/sleep").unwrap(), &program).unwrap();
        let words: Vec<_> = prefix.iter().map(Into::into).chain([program.into_os_string()]).collect();
        let mut child = Command::new(&words[0]).args(&words[1..]).args(["1000", "1001"]).spawn().unwrap();
        let host = Host::at("/proc".into(), None);
        let pid = child.id();
        // execve(2) sets the name before the command line.
        while host.program_name(pid).as_deref() != Some(name)
            || host.arguments(pid).is_none_or(|words| words.is_empty())
        {
            std::thread::yield_now();
        }
        let found = host.root_command_lines(name);
        child.kill().unwrap();
        child.wait().unwrap();
        found
    }

    mod as_root {
        use super::*;

        #[test]
        fn only_root_with_its_rights_is_believed() {
            assert_eq!(believed("kcm-a", &[]), [["1000", "1001"]]);
            let nobody: &[&str] = &["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
            let without = &["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"];
            for (name, prefix) in [("kcm-b", nobody), ("kcm-c", without)] {
                assert_eq!(believed(name, prefix), [[""; 0]; 0], "{prefix:?}");
            }
        }
    }
}
