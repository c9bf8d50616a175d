//! The man page of the configuration directory, kcm(5).
//!
//! Owns the table of its files for readers: name, mode and use. A test compares the names and modes with a real mount. Does
//! not know how a file is served.

use anyhow::Error;
use clap_mangen::roff::{Roff, bold, italic, roman};

use super::heading::{MANUAL, date, source};

/// A file, with POOL and LIST for the names of a pool and a CPU list.
struct File {
    path: &'static str,
    mode: u32,
    about: &'static str,
}

const fn file(path: &'static str, mode: u32, about: &'static str) -> File {
    File { path, mode, about }
}

/// All files and directories below the configuration directory.
const FILES: &[File] = &[
    file("info", 0o755, "Directory of what concerns the whole mount."),
    file("info/config", 0o600, "The whole configuration as JSON. A write replaces it, see kcm-apply(1)."),
    file(
        "info/events",
        0o600,
        "The newest 1,024 events, one JSON object on each line: claims, releases, deaths, refusals.",
    ),
    file("info/metrics", 0o444, "Counters as text for Prometheus."),
    file(
        "info/reclaimed",
        0o600,
        "Claims that were taken back from killed tasks. Write the number of an event to acknowledge all up to it.",
    ),
    file("info/topology", 0o444, "Sockets, cores, CPUs and NUMA nodes of the machine, as JSON."),
    file("info/version", 0o444, "The version of the daemon."),
    file("lock", 0o600, "Locked by legacy clients while they write. A mount needs no lock."),
    file("pools", 0o755, "Directory of pools. mkdir(2) makes a pool, rmdir(2) removes one without lists."),
    file("pools/POOL", 0o755, "A pool. mkdir(2) with the name of a CPU list, such as 0-2,8, makes a list."),
    file("pools/POOL/LIST", 0o755, "A CPU list. rmdir(2) removes it if it has no tasks."),
    file(
        "pools/POOL/LIST/state",
        0o644,
        "free, affinity, boot, isolated or invalid: what keeps others off the CPUs; then offline CPUs. Write drain to let no \
         new task on the list, and undrain to end that.",
    ),
    file(
        "pools/POOL/LIST/tasks",
        0o644,
        "The PIDs of the tasks on the list, separated by commas. A write is a claim or a release, see COMMANDS.",
    ),
    file("pools/POOL/exclusive", 0o644, "1: each list takes one task. 0: any number of tasks."),
    file(
        "pools/POOL/mode",
        0o644,
        "affinity, or isolated: while a list is claimed, nothing else runs on its CPUs.",
    ),
    file("pools/POOL/partial", 0o644, "1: exclusive lists serve while some of their CPUs are offline."),
    file(
        "pools/POOL/queue",
        0o644,
        "The tasks that wait in turn for a list. Write 0 or a PID, then wait with poll(2).",
    ),
    file("pools/POOL/tasks", 0o644, "The tasks on all lists. A write claims a free list of the pool."),
    file("pools/POOL/transient", 0o644, "1: a list is removed when its last task leaves."),
    file("self", 0o755, "Directory of what concerns the reader."),
    file(
        "self/claim",
        0o444,
        "Pool and CPU list of the reader, or of the ancestor that it was born from on the list.",
    ),
    file("self/cpus", 0o444, "The CPUs of that list, in the kernel's list format."),
    file("self/last_error", 0o444, "Why the last refused operation of the reader failed, and what to do."),
];

/// The files of the state directory.
const STATE: &[(&str, &str)] = &[
    ("lock", "locked by the daemon; has the PID of its supervisor"),
    ("config", "pools, lists, owners and modes; survives a boot"),
    ("claims", "the claims log; survives the daemon, and not the boot"),
    ("events", "the newest events"),
    ("log", "messages of a daemon in the background; under systemd, see journalctl -u kcm"),
    ("upgrade", "exists while an upgrade is requested"),
];

/// The words that may be written to a file `tasks`.
const COMMANDS: &[(&str, &str)] = &[
    ("0", "claims for the writer"),
    ("N", "claims for the process N, as the writer's PID namespace numbers it"),
    (
        "cgroup:N, cgroup:0",
        "claims for the process; in an isolated pool its whole cgroup, which must have no other process, is on the list",
    ),
    ("-N", "releases the process N; its threads get the affinity back that they had before the claim"),
];

/// The errnos of a refused write.
const ERRORS: &[(&str, &str)] = &[
    ("EBUSY", "the list, or every list of the pool, is taken"),
    ("EINVAL", "the command is wrong, or the kernel refuses the CPUs for the task"),
    ("EPERM", "the opener may not set the affinity of the task, or may not configure"),
    ("ESRCH", "there is no such process"),
    ("EAGAIN", "another operation has not finished, or a limit is reached; write again"),
    ("ENOTCONN", "the daemon has died; kcm mount takes the directory over"),
];

const EXAMPLES: &str = "  echo $$ > /etc/kcm/pools/dataplane/tasks         claim a free list for this shell
  echo 0 > /etc/kcm/pools/dataplane/0/tasks        claim this list
  echo -$$ > /etc/kcm/pools/dataplane/tasks        release it
  cat /etc/kcm/self/last_error                     show why the last operation was refused
  mkdir /etc/kcm/pools/web /etc/kcm/pools/web/4-7  make a pool with one list
  chgrp dpdk /etc/kcm/pools/web/tasks              let a group claim, after chmod 664";

/// Returns the page.
pub(super) fn page() -> Result<Vec<u8>, Error> {
    let mut page = Roff::new();
    page.control("TH", ["kcm", "5", date(), &source(), MANUAL]);
    page.control("SH", ["NAME"]).text([roman("kcm - the configuration directory: CPU pools as files")]);
    page.control("SH", ["SYNOPSIS"]).text([italic("/etc/kcm/pools/POOL/LIST/tasks")]);
    page.control("SH", ["DESCRIPTION"]).text([
        bold("kcm mount"),
        roman(" serves this directory. A pool is a directory below "),
        italic("pools"),
        roman(", and a CPU list is a directory in a pool. A task that is on a list runs on its CPUs only."),
    ]);
    page.control("PP", []).text([roman(
        "A write to a file tasks is a claim. When the write returns, the affinity of every thread is set and has been read \
         back. One write(2) is one command, and takes effect completely or not at all. A claim ends with its task; children \
         that are left on an exclusive list inherit it. Who may claim is decided by owner and mode of the file, which \
         chown(1) and chmod(1) change and which survive the daemon. Only root configures.",
    )]);
    page.control("PP", []).text([roman("poll(2) on tasks and state reports changes (POLLPRI).")]);
    page.control("SH", ["COMMANDS"]).text([roman("Numbers in one write are separated by blanks or commas.")]);
    terms(&mut page, COMMANDS);
    page.control("SH", ["ERRORS"]);
    terms(&mut page, ERRORS);
    page.control("SH", ["FILES"])
        .text([roman("Below the configuration directory, with the mode after the mount:")]);
    for File { path, mode, about } in FILES {
        page.control("TP", []).text([bold(*path), roman(format!(" ({mode:04o})"))]).text([roman(*about)]);
    }
    page.control("PP", []).text([roman("In the state directory, "), italic("/var/lib/kcm"), roman(":")]);
    terms(&mut page, STATE);
    page.control("SH", ["ENVIRONMENT"]).text([
        bold("KCM_CPUS_ASSIGNED"),
        roman(" is set by kcm isolate and kcm shield for the program: the CPUs of its list. "),
        bold("kcm"),
        roman("(1) lists the variables that the commands read."),
    ]);
    page.control("SH", ["EXAMPLES"]).control("nf", []);
    for line in EXAMPLES.lines() {
        page.text([roman(line)]);
    }
    page.control("fi", []);
    let see = ["kcm-mount", "kcm-init", "kcm-isolate", "kcm-describe", "kcm"];
    let mut words: Vec<_> = see.iter().flat_map(|name| [bold(*name), roman("(1), ")]).collect();
    words.extend([
        bold("sched_setaffinity"),
        roman("(2), "),
        bold("cpuset"),
        roman("(7), "),
        bold("cgroups"),
        roman("(7)"),
    ]);
    page.control("SH", ["SEE ALSO"]).text(words);
    let mut text = Vec::new();
    page.to_writer(&mut text)?;
    Ok(text)
}

fn terms(page: &mut Roff, terms: &[(&str, &str)]) {
    for (name, about) in terms {
        page.control("TP", []).text([bold(*name)]).text([roman(*about)]);
    }
}
