//! Made-up machines, as the kernel and lscpu would show them.

use std::fs;
use std::path::Path;

/// A machine with this many sockets, cores per socket and threads per core. CPUs are numbered as on most machines:
/// first the first thread of each core, socket by socket. Each socket is a NUMA node.
pub struct Machine {
    pub sockets: u32,
    pub cores: u32,
    pub threads: u32,
    /// Offline CPUs.
    pub offline: Vec<u32>,
    /// The kernel's command line.
    pub cmdline: &'static str,
}

impl Machine {
    pub fn new(sockets: u32, cores: u32, threads: u32) -> Self {
        Self { sockets, cores, threads, offline: Vec::new(), cmdline: "" }
    }

    /// Writes the tree that `lscpu --sysroot` reads, and `/proc/cmdline` beside it.
    pub fn write(&self, root: &Path) {
        let cores = self.sockets * self.cores;
        let count = cores * self.threads;
        let socket = |cpu: u32| cpu % cores / self.cores;
        let file = |path: String, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(path, format!("{text}\n")).expect("a file");
        };
        let system = "sys/devices/system";
        let online = (0..count).filter(|cpu| !self.offline.contains(cpu)).map(|cpu| cpu.to_string());
        file(format!("{system}/cpu/online"), &online.collect::<Vec<_>>().join(","));
        for name in ["possible", "present"] {
            file(format!("{system}/cpu/{name}"), &format!("0-{}", count - 1));
        }
        for cpu in 0..count {
            let topology = format!("{system}/cpu/cpu{cpu}/topology");
            file(format!("{topology}/core_id"), &(cpu % cores % self.cores).to_string());
            file(format!("{topology}/physical_package_id"), &socket(cpu).to_string());
            let siblings = mask(count, |other| other % cores == cpu % cores);
            file(format!("{topology}/thread_siblings"), &siblings);
            file(format!("{topology}/core_siblings"), &mask(count, |other| socket(other) == socket(cpu)));
            // The same sets as lists, which the reader without lscpu needs.
            let list = |is_in: &dyn Fn(u32) -> bool| {
                let cpus = (0..count).filter(|&other| is_in(other)).map(|cpu| cpu.to_string());
                cpus.collect::<Vec<_>>().join(",")
            };
            file(format!("{topology}/thread_siblings_list"), &list(&|other| other % cores == cpu % cores));
            file(format!("{topology}/core_siblings_list"), &list(&|other| socket(other) == socket(cpu)));
        }
        for node in 0..self.sockets {
            file(format!("{system}/node/node{node}/cpumap"), &mask(count, |cpu| socket(cpu) == node));
        }
        // lscpu needs the model of one CPU.
        file("proc/cpuinfo".into(), "processor\t: 0\nmodel name\t: made up");
        file("proc/cmdline".into(), self.cmdline);
    }
}

/// A set of `count` CPUs in hexadecimal words, as the kernel prints masks.
fn mask(count: u32, is_in: impl Fn(u32) -> bool) -> String {
    let bits = |word: u32| (0..32).filter(move |bit| word * 32 + bit < count);
    let word =
        |word: u32| bits(word).filter(|bit| is_in(word * 32 + bit)).fold(0_u32, |mask, bit| mask | 1 << bit);
    let words = (0..count.div_ceil(32)).rev().map(|n| format!("{:08x}", word(n)));
    words.collect::<Vec<_>>().join(",")
}
