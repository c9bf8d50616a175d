//! A PID namespace with a daemon and its clients. No other process is in it, so the test can choose the next PID.

use std::path::{Path, PathBuf};

use super::{Mount, Shell, children};

pub struct PidNamespace {
    // Declared before the mount: all processes end with the shell, which is the first one.
    pub shell: Shell,
    pub mount: Mount,
}

impl PidNamespace {
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
        let output = self.shell.ask("$KCM mount --conf-dir=$C --state-dir=$S 2>&1 && echo mounted");
        assert!(output.ends_with("mounted\n"), "{output}");
    }

    /// Starts a process inside that sleeps; returns its PID there.
    pub fn sleeper(&mut self) -> u32 {
        self.number("sleep 1000 >/dev/null & echo $!")
    }

    /// Returns the PID that this line prints.
    pub fn number(&mut self, line: &str) -> u32 {
        let output = self.shell.ask(line);
        output.trim().parse().unwrap_or_else(|_| panic!("{line}: {output}"))
    }

    /// Starts a process that sleeps and has this PID, which must be free.
    pub fn sleeper_with(&mut self, number: u32) {
        let line =
            format!("echo {} > /proc/sys/kernel/ns_last_pid; sleep 1000 >/dev/null & echo $!", number - 1);
        assert_eq!(self.number(&line), number);
    }

    /// Kills a process inside and reaps it.
    pub fn kill(&mut self, number: u32) {
        self.shell.ask(&format!("kill -KILL {number}; wait {number} 2>/dev/null"));
    }

    /// The CPUs of a process inside.
    pub fn mask(&mut self, number: u32) -> String {
        self.shell.ask(&format!("while read -r name cpus; do [ \"$name\" = Cpus_allowed_list: ] && echo $cpus; done < /proc/{number}/status"))
            .trim()
            .to_owned()
    }

    /// The content of a file of the mount, without its newline.
    pub fn read(&mut self, file: &str) -> String {
        self.shell.ask(&format!("cat $C/{file}")).trim_end().to_owned()
    }

    /// The path of a file of the mount for a process outside.
    pub fn as_seen_inside(&self, file: &Path) -> PathBuf {
        let first = children(self.shell.pid())[0];
        let file = file.strip_prefix("/").expect("an absolute path");
        Path::new("/proc").join(first.to_string()).join("root").join(file)
    }
}
