//! The machine that the commands look at, below roots that the environment may set.
//!
//! Owns the meaning of `KCM_PROC_FS` and `KCM_DEV_LSCPU_SYSFS`. Does not know pools.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Error, anyhow};
use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::model::topology::Topology;
use kcm_mount::procfs::{ProcFs, Stat};

mod cpuset;
mod isolcpus;
mod pods;
mod programs;
mod topology;
mod usage;

pub(crate) use pods::{Container, Names};

/// The machine that a command looks at.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    /// The path of the procfs, for files that do not belong to a process, and for messages.
    proc: PathBuf,
    /// `None` if that path is not a procfs. Then no process exists.
    processes: Option<Arc<ProcFs>>,
    /// The system root that contains `sys`, if it is not `/`.
    system: Option<PathBuf>,
}

/// As [`Host::topology`] of [`Host::from_env`], but read again only if CPUs have come or gone.
///
/// # Errors
/// As for [`Host::topology`].
pub(crate) fn current_topology() -> Result<Topology, Error> {
    static LAST: Mutex<Option<(Lists, Topology)>> = Mutex::new(None);
    let host = Host::from_env();
    let cpus = host.system_root().join("sys/devices/system/cpu");
    let lists = ["present", "online", "isolated"].map(|name| fs::read(cpus.join(name)).ok());
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    match &*last {
        Some((then, topology)) if *then == lists => Ok(topology.clone()),
        _ => {
            let topology = host.topology()?;
            *last = Some((lists, topology.clone()));
            Ok(topology)
        }
    }
}

/// The lists that change when CPUs come or go.
type Lists = [Option<Vec<u8>>; 3];

impl Host {
    /// The machine that `KCM_PROC_FS` and `KCM_DEV_LSCPU_SYSFS` name, or this one.
    pub(crate) fn from_env() -> Self {
        let path =
            |name| std::env::var_os(name).filter(|value: &OsString| !value.is_empty()).map(PathBuf::from);
        Self::at(path("KCM_PROC_FS").unwrap_or_else(|| "/proc".into()), path("KCM_DEV_LSCPU_SYSFS"))
    }

    /// The same, for a command that looks at processes.
    ///
    /// # Errors
    /// `KCM_PROC_FS` is not a procfs: no process would be found.
    pub(crate) fn with_processes() -> Result<Self, Error> {
        Self::from_env().checked()
    }

    fn checked(self) -> Result<Self, Error> {
        let (path, cure) = (self.proc.display(), "set KCM_PROC_FS to a procfs");
        let Some(processes) = &self.processes else {
            return Err(anyhow!("{path}: cannot be read; {cure}"));
        };
        let mut any = self.proc.join("cmdline").exists();
        processes.each_pid(|_| any = true).with_context(|| format!("{path}: cannot be read; {cure}"))?;
        if any { Ok(self) } else { Err(anyhow!("{path}: not a procfs; {cure}")) }
    }

    fn at(proc: PathBuf, system: Option<PathBuf>) -> Self {
        let processes = ProcFs::at(&proc).ok().map(Arc::new);
        Self { proc, processes, system }
    }

    /// Returns sockets, cores, CPUs and NUMA nodes, and which CPUs `isolcpus=` isolates.
    ///
    /// # Errors
    /// Returns an error if sysfs does not list the CPUs, or the kernel's command line cannot be read.
    pub(crate) fn topology(&self) -> Result<Topology, Error> {
        let mut cpus = topology::read(self.system_root()).map_err(|error| self.with_cure(error))?;
        let known: CpuSet = cpus.iter().map(|cpu| cpu.id).collect();
        let isolated = self.isolated(&known)?;
        for cpu in &mut cpus {
            cpu.isolated = isolated.contains(cpu.id);
        }
        Ok(Topology::new(cpus))
    }

    /// Returns the online CPUs.
    ///
    /// # Errors
    /// Returns an error if sysfs does not list them.
    pub(crate) fn online(&self) -> Result<CpuSet, Error> {
        topology::online(self.system_root()).map_err(|error| self.with_cure(error))
    }

    /// Returns the PID of this process in the procfs: the host's PID if it is the host's procfs.
    ///
    /// # Errors
    /// Returns an error if the procfs cannot be read.
    pub(crate) fn own_pid(&self) -> Result<u32, Error> {
        let stat = self.proc.join("self/stat");
        let text = fs::read_to_string(&stat)
            .with_context(|| format!("{}: cannot be read; set KCM_PROC_FS to a procfs", stat.display()))?;
        let pid = text.split(' ').next().and_then(|field| field.parse().ok());
        pid.ok_or_else(|| {
            anyhow!("{}: does not begin with a PID; set KCM_PROC_FS to a procfs", stat.display())
        })
    }

    /// Checks that the procfs has the processes of this PID namespace or of one above: in another one, all of them seem dead. A
    /// copy of a procfs without `self` passes if it has processes.
    ///
    /// # Errors
    /// This process is not in it.
    pub(crate) fn check_namespace(&self) -> Result<(), Error> {
        let has_self = fs::symlink_metadata(self.proc.join("self")).is_ok();
        let mut has_processes = false;
        // A procfs that cannot be listed has none.
        let _ = self.processes.as_ref().map(|processes| processes.each_pid(|_| has_processes = true));
        if has_self || !has_processes { self.own_pid().map(drop) } else { Ok(()) }
    }

    /// Returns the name of the process's program, safe to print on a terminal.
    pub(crate) fn program_name(&self, pid: u32) -> Option<String> {
        self.processes.as_ref()?.program_name(pid)
    }

    /// Returns the process that has this thread.
    pub(crate) fn process_of_thread(&self, tid: u32) -> Option<u32> {
        let status = self.processes.as_ref()?.status(tid).ok().flatten()?;
        status.numbers("Tgid").first().copied()
    }

    /// Whether the process is alive. A zombie is not, unless other threads of it still run. The legacy kcm looked only for the
    /// directory of the process, and there are copies of a procfs without all of its files.
    pub(crate) fn is_alive(&self, pid: u32) -> bool {
        let status = || self.processes.as_ref()?.status(pid).ok().flatten();
        match self.stat(pid) {
            Some(stat) => !stat.has_exited() || !self.thread_masks(pid).is_empty(),
            None => status().is_some_and(|status| !status.has_exited()),
        }
    }

    /// Returns the affinity mask of each living thread by thread id, ascending. Masks contain offline CPUs, too
    /// (`Cpus_allowed_list`). Empty if the process has exited, even if nobody has collected it yet.
    pub(crate) fn thread_masks(&self, pid: u32) -> Vec<(u32, CpuSet)> {
        let Some(processes) = &self.processes else { return Vec::new() };
        let mask = |tid| {
            let status = processes.thread_status(pid, tid).ok().flatten()?;
            if status.has_exited() { None } else { status.allowed_cpus() }
        };
        let tids = processes.threads(pid).unwrap_or_default();
        let mut masks: Vec<(u32, CpuSet)> =
            tids.into_iter().filter_map(|tid| Some((tid, mask(tid)?))).collect();
        masks.sort_unstable_by_key(|(tid, _)| *tid);
        masks
    }

    /// Returns the affinity mask of the first thread of a process.
    pub(crate) fn mask(&self, pid: u32) -> Option<CpuSet> {
        self.processes.as_ref()?.status(pid).ok().flatten()?.allowed_cpus()
    }

    /// Returns the CPUs that the cpuset of a process allows; `None` if that cannot be found out.
    pub(crate) fn allowed(&self, pid: u32) -> Option<CpuSet> {
        cpuset::effective(&self.proc, pid)
    }

    /// Returns the PIDs of all processes that are not kernel threads, ascending.
    pub(crate) fn user_processes(&self) -> Vec<u32> {
        let Some(processes) = &self.processes else { return Vec::new() };
        let mut pids = Vec::new();
        // A procfs that cannot be listed shows no processes, like one that does not exist.
        let _ = processes.each_pid(|pid| pids.push(pid));
        pids.retain(|&pid| self.stat(pid).is_some_and(|stat| !stat.is_kernel_thread()));
        pids.sort_unstable();
        pids
    }

    /// Returns the parent of a process; `None` for the first one.
    pub(crate) fn parent(&self, pid: u32) -> Option<u32> {
        self.stat(pid).map(|stat| stat.parent).filter(|&parent| parent != 0)
    }

    fn stat(&self, pid: u32) -> Option<Stat> {
        self.processes.as_ref()?.stat(pid).ok().flatten()
    }

    /// Returns the CPUs that the kernel keeps out of its scheduler domains. It says so itself; only for another machine than
    /// this one, the command line has to tell.
    fn isolated(&self, known: &CpuSet) -> Result<CpuSet, Error> {
        if let Some(isolated) = topology::isolated(self.system_root()).filter(|_| self.is_this_machine()) {
            return Ok(isolated.intersection(known));
        }
        let file = self.proc.join("cmdline");
        let line = fs::read(&file)
            .with_context(|| format!("{}: cannot be read; set KCM_PROC_FS to a procfs", file.display()))?;
        // The kernel takes any bytes. Bytes that are not UTF-8 are in other parameters.
        Ok(isolcpus::parse(&String::from_utf8_lossy(&line), known))
    }

    /// Whether this is the machine on which the processes run.
    pub(crate) fn is_this_machine(&self) -> bool {
        self.system.is_none() && self.processes.is_some()
    }

    fn system_root(&self) -> &Path {
        self.system.as_deref().unwrap_or(Path::new("/"))
    }

    fn with_cure(&self, error: Error) -> Error {
        let cure = if self.system.is_some() { "look at KCM_DEV_LSCPU_SYSFS" } else { "is /sys mounted?" };
        anyhow!("{error:#}; {cure}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_and_its_threads() {
        let host = Host::at("/proc".into(), None);
        let own = host.own_pid().unwrap();
        assert_eq!(own, std::process::id());
        assert!(host.is_alive(own) && host.user_processes().contains(&own));
        assert_eq!(host.parent(own), Some(std::os::unix::process::parent_id()));
        let in_thread = || host.process_of_thread(nix::unistd::gettid().as_raw().cast_unsigned());
        assert_eq!(std::thread::scope(|scope| scope.spawn(in_thread).join().unwrap()), Some(own));
        assert!(host.thread_masks(own).iter().any(|(tid, mask)| *tid == own && !mask.is_empty()));
        assert!(host.thread_masks(u32::MAX).is_empty() && !host.is_alive(u32::MAX));
    }

    #[test]
    fn a_zombie_is_not_alive() {
        let host = Host::at("/proc".into(), None);
        let mut child = std::process::Command::new("true").spawn().unwrap();
        while host.is_alive(child.id()) {
            std::thread::yield_now();
        }
        assert!(host.stat(child.id()).unwrap().has_exited());
        assert!(host.thread_masks(child.id()).is_empty());
        child.wait().unwrap();
    }

    #[test]
    fn without_a_procfs_no_process_exists() {
        let host = Host::at("/nowhere".into(), None);
        assert!(host.user_processes().is_empty() && !host.is_alive(1));
        assert!(host.program_name(1).is_none() && host.thread_masks(1).is_empty());
        let refused = format!("{:#}", host.clone().checked().unwrap_err());
        assert_eq!(refused, "/nowhere: cannot be read; set KCM_PROC_FS to a procfs");
        let refused = format!("{:#}", Host::at("/dev".into(), None).checked().unwrap_err());
        assert_eq!(refused, "/dev: not a procfs; set KCM_PROC_FS to a procfs");
        assert!(Host::at("/proc".into(), None).checked().is_ok());
        let error = format!("{:#}", host.own_pid().unwrap_err());
        assert!(
            error.starts_with("/nowhere/self/stat: cannot be read; set KCM_PROC_FS to a procfs"),
            "{error}"
        );
    }
}
