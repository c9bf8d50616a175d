//! A PID namespace with a daemon and its clients in it, where nobody else is and the next PID is ours to choose.

use std::path::{Path, PathBuf};

use super::{Mount, Shell, children};

pub struct Enclosure {
    // Before the mount: with the shell, which is the first process, all others end.
    pub shell: Shell,
    pub mount: Mount,
}

impl Enclosure {
    /// `pool` has the lists 0 and 1.
    pub fn new(pool: &str, exclusive: bool) -> Self {
        let mount = Mount::not_mounted();
        let mut enclosure = Self { shell: mount.container(), mount };
        enclosure.start();
        let flag = u32::from(exclusive);
        enclosure.shell.ask(&format!("P=$C/pools/{pool}; mkdir $P $P/0 $P/1; echo {flag} > $P/exclusive"));
        enclosure
    }

    /// Starts the daemon inside.
    pub fn start(&mut self) {
        let said = self.shell.ask("$KCM mount --conf-dir=$C --state-dir=$S 2>&1 && echo mounted");
        assert!(said.ends_with("mounted\n"), "{said}");
    }

    /// A process inside that sleeps; its number there.
    pub fn sleeper(&mut self) -> u32 {
        self.number("sleep 1000 >/dev/null & echo $!")
    }

    /// The same, with the number that this line prints.
    pub fn number(&mut self, line: &str) -> u32 {
        let said = self.shell.ask(line);
        said.trim().parse().unwrap_or_else(|_| panic!("{line}: {said}"))
    }

    /// A process that sleeps and has this number, which is free.
    pub fn sleeper_with(&mut self, number: u32) {
        let line =
            format!("echo {} > /proc/sys/kernel/ns_last_pid; sleep 1000 >/dev/null & echo $!", number - 1);
        assert_eq!(self.number(&line), number);
    }

    /// Kills a process inside and collects it.
    pub fn kill(&mut self, number: u32) {
        self.shell.ask(&format!("kill -KILL {number}; wait {number} 2>/dev/null"));
    }

    /// The CPUs of a process inside.
    pub fn mask(&mut self, number: u32) -> String {
        self.shell.ask(&format!("while read -r name cpus; do [ \"$name\" = Cpus_allowed_list: ] && echo $cpus; done < /proc/{number}/status"))
            .trim()
            .to_owned()
    }

    /// What a file of the mount reads, without its newline.
    pub fn read(&mut self, file: &str) -> String {
        self.shell.ask(&format!("cat $C/{file}")).trim_end().to_owned()
    }

    /// A file of the mount as a process outside gets at it.
    pub fn as_seen_inside(&self, file: &Path) -> PathBuf {
        let first = children(self.shell.pid())[0];
        let file = file.strip_prefix("/").expect("an absolute path");
        Path::new("/proc").join(first.to_string()).join("root").join(file)
    }
}
