//! The machine's topology, read from sysfs.
//!
//! Owns the formats of `/sys/devices/system/{cpu,node}` (Documentation/admin-guide/cputopology.rst). Does not know
//! pools or `isolcpus=`.
//!
//! The result is the one that `lscpu --all --parse=CPU,CORE,SOCKET,NODE,ONLINE` prints: cores and sockets are
//! numbered from 0 in the order of their first CPU. lscpu itself is not run, because an image that contains only
//! kcm does not have it. A test compares the two.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context as _, Error, anyhow, bail};
use kcm_mount::model::cpuset::CpuSet;
use kcm_mount::model::topology::Cpu;

/// Reads all CPUs of the machine whose sysfs is at `root`/sys. None is marked as isolated.
///
/// # Errors
/// Returns an error if sysfs does not list the CPUs or contains something other than a CPU list.
pub(super) fn read(root: &Path) -> Result<Vec<Cpu>, Error> {
    let system = root.join("sys/devices/system");
    let (present, online) = (required(&system.join("cpu/present"))?, online(root)?);
    let nodes = nodes(&system.join("node"))?;
    let (mut cores, mut sockets) = (Groups::default(), Groups::default());
    let mut cpus = Vec::new();
    for id in present.iter() {
        let topology = system.join(format!("cpu/cpu{id}/topology"));
        let online = online.contains(id);
        // The second of each pair is the name before kernel 5.3.
        let core = siblings(&topology, ["core_cpus", "thread_siblings"])?.map(|set| cores.number(set));
        let socket = siblings(&topology, ["package_cpus", "core_siblings"])?.map(|set| sockets.number(set));
        let node = nodes.iter().find(|(_, cpus)| cpus.contains(id)).map(|(node, _)| *node);
        cpus.push(Cpu {
            id,
            // A machine that does not describe its cores has one per CPU.
            core: if online { core.or(Some(id.get())) } else { None },
            socket: socket.filter(|_| online),
            node,
            online,
            isolated: false,
        });
    }
    if cpus.is_empty() {
        bail!("{}: lists no CPU", system.join("cpu/present").display());
    }
    Ok(cpus)
}

/// Reads the online CPUs of the machine whose sysfs is at `root`/sys.
///
/// # Errors
/// Returns an error if sysfs does not list them.
pub(super) fn online(root: &Path) -> Result<CpuSet, Error> {
    required(&root.join("sys/devices/system/cpu/online"))
}

/// Reads the CPUs that are isolated from the scheduler's domains; `None` if the kernel does not tell (before 4.2).
pub(super) fn isolated(root: &Path) -> Option<CpuSet> {
    read_set(&root.join("sys/devices/system/cpu/isolated"), parse_list).ok().flatten()
}

/// Sets of CPUs, numbered in the order in which they first occur.
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

/// The NUMA nodes, ascending, each with its CPUs.
fn nodes(directory: &Path) -> Result<Vec<(u32, CpuSet)>, Error> {
    let Ok(entries) = fs::read_dir(directory) else { return Ok(Vec::new()) };
    let mut nodes = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("{}: cannot be read", directory.display()))?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("node")?.parse().ok());
        if let Some(number) = number
            && let Some(cpus) = list_or_mask(&entry.path(), "cpulist", "cpumap")?
        {
            nodes.push((number, cpus));
        }
    }
    nodes.sort_unstable_by_key(|(node, _)| *node);
    Ok(nodes)
}

/// The set under the first name that exists, as a list (`NAME_list`) or as a mask (`NAME`).
fn siblings(topology: &Path, names: [&str; 2]) -> Result<Option<CpuSet>, Error> {
    for name in names {
        if let Some(set) = list_or_mask(topology, &format!("{name}_list"), name)? {
            return Ok(Some(set));
        }
    }
    Ok(None)
}

/// The set in the file `list` or, if that does not exist, in the file `mask`. The kernel has both; a copy of sysfs
/// that was made for lscpu may have the masks only.
fn list_or_mask(directory: &Path, list: &str, mask: &str) -> Result<Option<CpuSet>, Error> {
    if let Some(set) = read_set(&directory.join(list), parse_list)? {
        return Ok(Some(set));
    }
    read_set(&directory.join(mask), CpuSet::from_mask)
}

/// The CPU list in a file that must exist.
fn required(file: &Path) -> Result<CpuSet, Error> {
    read_set(file, parse_list)?.with_context(|| format!("{}: no such file", file.display()))
}

/// The set in a file; `None` if the file does not exist.
fn read_set(file: &Path, parse: fn(&str) -> Option<CpuSet>) -> Result<Option<CpuSet>, Error> {
    match fs::read_to_string(file) {
        Ok(text) => {
            // Some kernels end the text with a NUL byte.
            let set = parse(text.trim_matches(|c: char| c.is_whitespace() || c == '\0'));
            set.map(Some).ok_or_else(|| anyhow!("{}: does not contain a set of CPUs", file.display()))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{}: cannot be read", file.display())),
    }
}

fn parse_list(text: &str) -> Option<CpuSet> {
    if text.is_empty() { Some(CpuSet::new()) } else { text.parse().ok() }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use kcm_mount::model::topology::Topology;

    use super::*;

    #[test]
    fn a_zero_byte_at_the_end_is_tolerated() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "0-31\n\0").unwrap();
        assert_eq!(read_set(file.path(), parse_list).unwrap().unwrap().to_string(), "0-31");
    }

    #[test]
    fn lists_and_masks_describe_the_same_machine() {
        let made = [("lists", true), ("masks", false)].map(|(name, lists)| {
            let root = tempfile::tempdir().unwrap();
            machine(root.path(), lists);
            let topology = Topology::new(read(root.path()).unwrap());
            let cores: Vec<String> = topology.cores().iter().map(|core| core.cpus.to_string()).collect();
            assert_eq!(cores, ["0,4", "1,5", "2,6", "7"], "{name}");
            assert_eq!(topology.sockets().len(), 2, "{name}");
            assert_eq!(topology.cpus().to_string(), "0-7", "{name}");
            assert_eq!(topology.online().to_string(), "0-2,4-7", "{name}");
            topology
        });
        assert_eq!(made[0], made[1]);
        let nodes: Vec<Option<u32>> = made[0].all().iter().map(|cpu| cpu.node).collect();
        assert_eq!(nodes, [0, 0, 1, 1, 0, 0, 1, 1].map(Some));
    }

    #[test]
    fn a_machine_that_does_not_describe_its_cores_has_one_per_cpu() {
        let root = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| write(root.path(), name, text);
        file("cpu/present", "0-1");
        file("cpu/online", "0-1");
        assert_eq!(Topology::new(read(root.path()).unwrap()).cores().len(), 2);
        file("cpu/online", "all");
        assert!(read(root.path()).unwrap_err().to_string().ends_with("does not contain a set of CPUs"));
        file("cpu/present", "");
        file("cpu/online", "");
        assert!(read(root.path()).unwrap_err().to_string().ends_with("cpu/present: lists no CPU"));
        assert!(read(Path::new("/nowhere")).unwrap_err().to_string().ends_with("cpu/present: no such file"));
    }

    /// lscpu is part of util-linux, which every distribution installs.
    #[test]
    fn lscpu_shows_the_same() {
        let root = tempfile::tempdir().unwrap();
        machine(root.path(), false);
        for root in [Path::new("/"), root.path()] {
            let mut lscpu = Command::new("lscpu");
            lscpu.args(["--all", "--parse=CPU,CORE,SOCKET,NODE,ONLINE", "--sysroot"]).arg(root);
            let output = lscpu.env("LC_ALL", "C").output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            let theirs: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
            let ours: Vec<String> = read(root).unwrap().iter().map(line).collect();
            assert_eq!(ours, theirs);
        }
    }

    fn line(cpu: &Cpu) -> String {
        let number = |number: Option<u32>| number.map_or_else(String::new, |number| number.to_string());
        let (core, socket) = (number(cpu.core), number(cpu.socket));
        format!("{},{core},{socket},{},{}", cpu.id, number(cpu.node), if cpu.online { "Y" } else { "N" })
    }

    /// Two sockets of two cores with two threads each; CPU 3 is offline and so has no topology, as on a real machine.
    fn machine(root: &Path, lists: bool) {
        let file = |name: &str, text: &str| write(root, name, text);
        file("cpu/possible", "0-7");
        file("cpu/present", "0-7");
        file("cpu/online", "0-2,4-7");
        write(root, "../../../proc/cpuinfo", "processor\t: 0\nmodel name\t: made up\n");
        for cpu in (0..8_u32).filter(|cpu| *cpu != 3) {
            let core = [cpu % 4, cpu % 4 + 4].into_iter().filter(|cpu| *cpu != 3);
            let socket = [0, 1, 4, 5].map(|other| other + if cpu % 4 < 2 { 0 } else { 2 }).into_iter();
            let set = |name: &str, cpus: &[u32]| {
                let listed: Vec<String> = cpus.iter().map(u32::to_string).collect();
                let mask = cpus.iter().fold(0_u32, |mask, cpu| mask | 1 << cpu);
                match lists {
                    true => file(&format!("cpu/cpu{cpu}/topology/{name}_list"), &listed.join(",")),
                    false => file(&format!("cpu/cpu{cpu}/topology/{name}"), &format!("{mask:08x}")),
                }
            };
            set("thread_siblings", &core.collect::<Vec<_>>());
            set("core_siblings", &socket.filter(|cpu| *cpu != 3).collect::<Vec<_>>());
        }
        for (node, list, mask) in [(0, "0-1,4-5", "00000033"), (1, "2-3,6-7", "000000cc")] {
            match lists {
                true => file(&format!("node/node{node}/cpulist"), list),
                false => file(&format!("node/node{node}/cpumap"), mask),
            }
        }
    }

    fn write(root: &Path, name: &str, text: &str) {
        let path = root.join("sys/devices/system").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }
}
