//! The machine, under roots that can be given: procfs and the system root that lscpu looks at.
//!
//! Owns: `/proc`, lscpu and the kernel's `isolcpus=`. Must not know: pools.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Error, anyhow, bail};
use kcm_mount::model::cpuset::{CpuId, CpuSet};
use kcm_mount::model::topology::{Cpu, Topology};

mod isolcpus;

/// A kernel thread (`PF_KTHREAD`, include/linux/sched.h).
const PF_KTHREAD: u64 = 0x0020_0000;

/// What is needed of `/proc/PID/stat`.
struct Stat {
    state: char,
    parent: u32,
    of_kernel: bool,
}

/// Where the machine is looked at.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    proc: PathBuf,
    /// What lscpu is told to take for `/`.
    system: Option<PathBuf>,
}

impl Host {
    /// As `KCM_PROC_FS` and `KCM_DEV_LSCPU_SYSFS` say.
    pub(crate) fn from_env() -> Self {
        let path =
            |name| std::env::var_os(name).filter(|value: &OsString| !value.is_empty()).map(PathBuf::from);
        Self {
            proc: path("KCM_PROC_FS").unwrap_or_else(|| "/proc".into()),
            system: path("KCM_DEV_LSCPU_SYSFS"),
        }
    }

    /// Sockets, cores, CPUs and nodes, with the CPUs that `isolcpus=` isolates.
    ///
    /// # Errors
    /// lscpu knows no CPUs, or the kernel's command line cannot be read.
    pub(crate) fn topology(&self) -> Result<Topology, Error> {
        let mut cpus = match self.lscpu()? {
            Some(text) => parse_lscpu(&text)?,
            // An image that holds nothing but kcm.
            None => self.sysfs()?,
        };
        let known: CpuSet = cpus.iter().map(|cpu| cpu.id).collect();
        let isolated = self.isolated(&known)?;
        for cpu in &mut cpus {
            cpu.isolated = isolated.contains(cpu.id);
        }
        Ok(Topology::new(cpus))
    }

    /// The CPUs that can be used now.
    ///
    /// # Errors
    /// The kernel does not say.
    pub(crate) fn online(&self) -> Result<CpuSet, Error> {
        let online = self.system_root().join("sys/devices/system/cpu/online");
        list_file(&online)?.with_context(|| format!("{}: no such file; is /sys mounted?", online.display()))
    }

    /// The PID of this process as the procfs has it: a host PID where it is the host's procfs.
    ///
    /// # Errors
    /// There is no procfs.
    pub(crate) fn own_pid(&self) -> Result<u32, Error> {
        let stat = self.proc.join("self/stat");
        let text = fs::read_to_string(&stat)
            .with_context(|| format!("{}: cannot be read; set KCM_PROC_FS to a procfs", stat.display()))?;
        let pid = text.split(' ').next().and_then(|field| field.parse().ok());
        pid.ok_or_else(|| anyhow!("{}: begins with no PID; set KCM_PROC_FS to a procfs", stat.display()))
    }

    /// The name of a process's program, without what a terminal would act on.
    pub(crate) fn program_name(&self, pid: u32) -> Option<String> {
        let comm = fs::read(self.proc.join(pid.to_string()).join("comm")).ok()?;
        let comm = String::from_utf8_lossy(comm.trim_ascii_end());
        Some(comm.chars().map(|c| if c.is_control() { '?' } else { c }).collect())
    }

    /// Whether procfs knows the process; one that nobody has collected yet is not alive.
    pub(crate) fn is_alive(&self, pid: u32) -> bool {
        self.stat(pid)
            .is_some_and(|stat| !matches!(stat.state, 'Z' | 'X') || self.thread_masks(pid).len() > 1)
    }

    /// The masks of all threads of a process, as `Cpus_allowed_list` has them: offline CPUs included. Empty
    /// where it has gone.
    pub(crate) fn thread_masks(&self, pid: u32) -> Vec<(u32, CpuSet)> {
        let threads = fs::read_dir(self.proc.join(pid.to_string()).join("task"));
        let entries = threads.into_iter().flatten().filter_map(Result::ok);
        let mut masks: Vec<(u32, CpuSet)> = entries
            .filter_map(|entry| {
                Some((entry.file_name().to_str()?.parse().ok()?, self.mask_in(&entry.path())?))
            })
            .collect();
        masks.sort_unstable_by_key(|(tid, _)| *tid);
        masks
    }

    fn mask_in(&self, directory: &Path) -> Option<CpuSet> {
        let status = fs::read(directory.join("status")).ok()?;
        let status = String::from_utf8_lossy(&status);
        let mask = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        mask.trim().parse().ok()
    }

    /// All processes but those of the kernel, ascending.
    pub(crate) fn user_processes(&self) -> Vec<u32> {
        let entries = fs::read_dir(&self.proc).into_iter().flatten().filter_map(Result::ok);
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut pids: Vec<u32> =
            pids.filter(|&pid| self.stat(pid).is_some_and(|stat| !stat.of_kernel)).collect();
        pids.sort_unstable();
        pids
    }

    /// The parent of a process; none of the first one.
    pub(crate) fn parent(&self, pid: u32) -> Option<u32> {
        self.stat(pid).map(|stat| stat.parent).filter(|&parent| parent != 0)
    }

    /// `/proc/PID/stat` (proc(5)): the program's name, in parentheses, may hold anything.
    fn stat(&self, pid: u32) -> Option<Stat> {
        let text = fs::read(self.proc.join(pid.to_string()).join("stat")).ok()?;
        let text = String::from_utf8_lossy(&text);
        let mut fields = text.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let flags: u64 = fields.nth(4)?.parse().ok()?;
        Some(Stat { state, parent, of_kernel: flags & PF_KTHREAD != 0 })
    }

    fn isolated(&self, known: &CpuSet) -> Result<CpuSet, Error> {
        let file = self.proc.join("cmdline");
        let line = fs::read_to_string(&file)
            .with_context(|| format!("{}: cannot be read; set KCM_PROC_FS to a procfs", file.display()))?;
        Ok(isolcpus::parse(&line, known))
    }

    /// What lscpu prints; None where the machine has no lscpu.
    fn lscpu(&self) -> Result<Option<String>, Error> {
        let mut command = Command::new("lscpu");
        command
            .args(["--all", "--parse=CPU,CORE,SOCKET,NODE,ONLINE"])
            .env("LC_ALL", "C")
            .stdin(Stdio::null());
        if let Some(system) = &self.system {
            command.arg("--sysroot").arg(system);
        }
        let output = match command.output() {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            output => output.context("lscpu cannot be run")?,
        };
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            bail!(
                "{}; {}",
                why.trim().lines().next().unwrap_or("lscpu failed and does not say why"),
                if self.system.is_some() { "look at KCM_DEV_LSCPU_SYSFS" } else { "is /sys mounted?" }
            );
        }
        Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()))
    }

    fn system_root(&self) -> &Path {
        self.system.as_deref().unwrap_or(Path::new("/"))
    }

    /// The same as lscpu has it, from where lscpu has it: cores, sockets and so on numbered as they come.
    fn sysfs(&self) -> Result<Vec<Cpu>, Error> {
        let root = self.system_root().join("sys/devices/system");
        let required = |name: &str| {
            let file = root.join("cpu").join(name);
            list_file(&file)?.with_context(|| format!("{}: no such file; is /sys mounted?", file.display()))
        };
        let (present, online) = (required("present")?, required("online")?);
        let nodes = nodes(&root.join("node"))?;
        let (mut cores, mut sockets) = (Groups::default(), Groups::default());
        let mut cpus = Vec::new();
        for id in present.iter() {
            let topology = root.join(format!("cpu/cpu{id}/topology"));
            let group =
                |names: &[&str]| names.iter().find_map(|name| list_file(&topology.join(name)).ok().flatten());
            let online = online.contains(id);
            // The older names stand second (Documentation/admin-guide/cputopology.rst).
            let core = group(&["core_cpus_list", "thread_siblings_list"]).map(|set| cores.number(set));
            let socket = group(&["package_cpus_list", "core_siblings_list"]).map(|set| sockets.number(set));
            let node = nodes.iter().find(|(_, cpus)| cpus.contains(id)).map(|(node, _)| *node);
            cpus.push(Cpu {
                id,
                core: if online { core.or(Some(id.get())) } else { None },
                socket: socket.filter(|_| online),
                node,
                online,
                isolated: false,
            });
        }
        Ok(cpus)
    }
}

/// Sets of CPUs, numbered in the order in which they are first met.
#[derive(Default)]
struct Groups(Vec<CpuSet>);

impl Groups {
    fn number(&mut self, set: CpuSet) -> u32 {
        let known = self.0.iter().position(|other| *other == set);
        known.unwrap_or_else(|| {
            self.0.push(set);
            self.0.len() - 1
        }) as u32
    }
}

fn nodes(directory: &Path) -> Result<Vec<(u32, CpuSet)>, Error> {
    let Ok(entries) = fs::read_dir(directory) else { return Ok(Vec::new()) };
    let mut nodes = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("{}: cannot be read", directory.display()))?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("node")?.parse().ok());
        if let Some(number) = number
            && let Some(cpus) = list_file(&entry.path().join("cpulist"))?
        {
            nodes.push((number, cpus));
        }
    }
    Ok(nodes)
}

/// A file that holds a CPU list; None where it is missing.
fn list_file(file: &Path) -> Result<Option<CpuSet>, Error> {
    match fs::read_to_string(file) {
        Ok(text) if text.trim().is_empty() => Ok(Some(CpuSet::new())),
        Ok(text) => text.trim().parse().map(Some).with_context(|| format!("{}: no CPU list", file.display())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{}: cannot be read", file.display())),
    }
}

/// `CPU,Core,Socket,Node,Online` on each line that is no comment; what is not known is left empty.
fn parse_lscpu(text: &str) -> Result<Vec<Cpu>, Error> {
    let mut cpus = Vec::new();
    let mut seen = BTreeSet::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let field = |index: usize| fields.get(index).copied().unwrap_or("");
        let number = |index: usize| field(index).parse::<u32>().ok();
        let id = number(0).and_then(CpuId::new).with_context(|| format!("lscpu: {line:?} names no CPU"))?;
        let online = field(4) != "N";
        if seen.insert(id) {
            cpus.push(Cpu {
                id,
                // A machine that tells of no cores has one for each CPU.
                core: if online { number(1).or(Some(id.get())) } else { None },
                socket: number(2).filter(|_| online),
                node: number(3),
                online,
                isolated: false,
            });
        }
    }
    if cpus.is_empty() {
        bail!("lscpu names no CPU; look at its output: lscpu --all --parse");
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lscpu_lines() {
        let text = "# CPU,Core,Socket,Node,Online\n0,0,0,0,Y\n1,0,0,0,Y\n2,1,1,1,Y\n3,,,1,N\n";
        let topology = Topology::new(parse_lscpu(text).unwrap());
        assert_eq!(topology.cpus().to_string(), "0-3");
        assert_eq!(topology.online().to_string(), "0-2");
        let cores: Vec<String> = topology.cores().iter().map(|core| core.cpus.to_string()).collect();
        assert_eq!(cores, ["0-1", "2"]);
    }

    #[test]
    fn a_machine_without_cores_has_one_for_each_cpu() {
        let topology = Topology::new(parse_lscpu("0,,,,Y\n1,,,,Y\n").unwrap());
        assert_eq!(topology.cores().len(), 2);
    }

    #[test]
    fn lscpu_that_knows_nothing_is_an_error() {
        for text in ["", "# CPU,Core\n", "x,0,0,0,Y\n", "99999,0,0,0,Y"] {
            assert!(parse_lscpu(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn without_lscpu_the_machine_is_the_same() {
        let host = Host { proc: "/proc".into(), system: None };
        let lscpu = host.lscpu().unwrap().expect("lscpu is on this machine");
        let (theirs, ours) = (parse_lscpu(&lscpu).unwrap(), host.sysfs().unwrap());
        assert_eq!(Topology::new(theirs).report(), Topology::new(ours).report());
    }
}
