//! The content of a state directory, for `kcm state`.
//!
//! Owns how it is shown, as text and as JSON. Works offline and beside a running daemon; only reads. Does not know the
//! format of the files.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::clock;
use crate::journal::{Found, StateLock, inspect};
use crate::model::command::{Claim, SavedMask};
use crate::model::pool::{Exclusivity, Mode};

pub use crate::journal::Problem;

/// A state directory as it was when it was read.
#[derive(Debug)]
pub struct State {
    path: PathBuf,
    found: Found,
    /// The supervisor of the daemon that uses the directory.
    supervisor: Option<u32>,
    /// Whether the claims log belongs to this boot.
    is_of_this_boot: bool,
}

impl State {
    /// Reads a state directory. Changes nothing, and takes no lock.
    ///
    /// # Errors
    /// The directory does not exist or cannot be read. Files that cannot be read are [problems](Self::problems).
    pub fn read(path: &Path) -> io::Result<Self> {
        let found = inspect(path)?;
        Ok(Self {
            path: path.to_path_buf(),
            supervisor: StateLock::supervisor(path),
            is_of_this_boot: found.boot.as_ref().is_some_and(|boot| *boot == clock::boot_id()),
            found,
        })
    }

    /// The supervisor of the daemon that uses the directory, if there is one.
    #[must_use]
    pub fn supervisor(&self) -> Option<u32> {
        self.supervisor
    }

    /// Whether it has something that only a daemon can take back: claims of this boot, or their partitions.
    #[must_use]
    pub fn has_claims(&self) -> bool {
        let log = &self.found.log;
        let is_empty = log.claims.is_empty() && log.intents.is_empty() && log.releasing.is_empty();
        self.is_of_this_boot && !(is_empty && log.partitions.is_empty())
    }

    /// Whether it has pools.
    #[must_use]
    pub fn has_pools(&self) -> bool {
        !self.found.config.pools.is_empty()
    }

    /// Everything that is wrong with the files.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.found.problems
    }

    /// Returns the content as text for people.
    #[must_use]
    pub fn to_text(&self) -> String {
        let Found { config, log, records, events, set_aside, problems, .. } = &self.found;
        let mut text = String::new();
        let mut line = |depth: usize, line: String| {
            let _ = writeln!(text, "{:1$}{line}", "", 2 * depth);
        };
        line(0, format!("state directory {}", self.path.display()));
        line(
            0,
            match self.supervisor {
                Some(pid) => format!("used by the daemon with the supervisor {pid}"),
                None => "not in use".to_owned(),
            },
        );
        line(0, "configuration".to_owned());
        for pool in &config.pools {
            let kind = exclusivity(pool.exclusivity);
            let partial = if pool.partial { ", partial" } else { "" };
            let transient = if pool.transient { ", transient" } else { "" };
            let mode = if pool.mode == Mode::Isolated { ", isolated" } else { "" };
            line(1, format!("pool {} ({kind}{partial}{mode}{transient}, node {})", pool.name, pool.node));
            for list in &pool.lists {
                line(2, format!("list {} (node {})", list.name, list.id.0));
            }
        }
        for changed in &config.attributes {
            line(
                1,
                format!(
                    "node {}: uid {}, gid {}, mode {:04o}",
                    changed.node, changed.uid, changed.gid, changed.mode
                ),
            );
        }
        line(1, format!("next node id {}", config.next_node));
        line(0, format!("claims log: {records} records, boot {}", self.boot()));
        for (kind, claims) in self.claims() {
            for claim in claims {
                line(1, format!("{kind} {}", self.claim_text(claim)));
            }
        }
        for reclaimed in log.reclaimed.iter() {
            let time = clock::rfc3339(reclaimed.time);
            let list = format!("{} {}", reclaimed.pool, reclaimed.cpus);
            line(
                1,
                format!("reclaimed from task {} on {list} at {time}, event {}", reclaimed.pid, reclaimed.seq),
            );
        }
        if log.dropped > 0 {
            line(1, format!("{} reclaimed claims were dropped", log.dropped));
        }
        line(1, format!("{} refusals", log.refusals.len()));
        let requests = &log.requests;
        line(
            1,
            format!(
                "mount {}: {} polled and {} truncated open files, {} retried requests",
                requests.mount(),
                requests.polls.len(),
                requests.truncated.len(),
                requests.retried()
            ),
        );
        line(
            1,
            format!("event numbers below {}, open files below {} may be in use", log.events, log.handles),
        );
        line(0, format!("events: {events}"));
        for name in set_aside {
            line(0, format!("damaged file {name}"));
        }
        for problem in problems {
            line(0, format!("problem: {problem}"));
        }
        text
    }

    /// Returns the content as JSON.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let Found { config, log, records, events, set_aside, problems, .. } = &self.found;
        let pools = config.pools.iter().map(|pool| {
            let lists = pool.lists.iter().map(|list| json!({ "node": list.id.0, "cpus": list.name }));
            json!({
                "name": pool.name.as_str(),
                "exclusive": pool.exclusivity == Exclusivity::Exclusive,
                "partial": pool.partial,
                "transient": pool.transient,
                "isolated": pool.mode == Mode::Isolated,
                "node": pool.node,
                "lists": lists.collect::<Vec<Value>>(),
            })
        });
        let attributes = config.attributes.iter().map(|changed| {
            json!({ "node": changed.node, "uid": changed.uid, "gid": changed.gid, "mode": changed.mode })
        });
        let reclaimed = log.reclaimed.iter().map(|reclaimed| {
            json!({
                "seq": reclaimed.seq,
                "time": clock::rfc3339(reclaimed.time),
                "pid": reclaimed.pid,
                "pool": reclaimed.pool,
                "cpus": reclaimed.cpus,
            })
        });
        let problems = problems
            .iter()
            .map(|problem| json!({ "file": problem.file, "line": problem.line, "what": problem.what }));
        let claims = self.claims().map(|(kind, claims)| {
            (format!("{kind}s"), claims.into_iter().map(|claim| self.claim_json(claim)).collect::<Value>())
        });
        let mut value = json!({
            "path": self.path.to_string_lossy(),
            "supervisor": self.supervisor,
            "boot": self.found.boot,
            "isOfThisBoot": self.is_of_this_boot,
            "pools": pools.collect::<Vec<Value>>(),
            "attributes": attributes.collect::<Vec<Value>>(),
            "nextNode": config.next_node,
            "records": records,
            "reclaimed": reclaimed.collect::<Vec<Value>>(),
            "reclaimedDropped": log.dropped,
            "refusals": log.refusals.len(),
            "mount": log.requests.mount(),
            "polledFiles": log.requests.polls.len(),
            "truncatedFiles": log.requests.truncated.len(),
            "nextEvent": log.events,
            "nextHandle": log.handles,
            "events": events,
            "damagedFiles": set_aside,
            "problems": problems.collect::<Vec<Value>>(),
        });
        if let Some(fields) = value.as_object_mut() {
            fields.extend(claims);
        }
        value
    }

    fn boot(&self) -> String {
        match &self.found.boot {
            Some(boot) if self.is_of_this_boot => format!("{boot} (this one)"),
            Some(boot) => format!("{boot} (another one: the next daemon forgets the claims)"),
            None => "unknown".to_owned(),
        }
    }

    /// The claims by what becomes of them.
    fn claims(&self) -> [(&'static str, Vec<&Claim>); 3] {
        let log = &self.found.log;
        [
            ("claim", log.claims.values().map(|(_, claim)| &**claim).collect()),
            ("intent", log.intents.values().map(|claim| &**claim).collect()),
            ("release", log.releasing.values().map(|claim| &**claim).collect()),
        ]
    }

    fn claim_text(&self, claim: &Claim) -> String {
        let list = self.found.list_name(claim.list);
        let Claim { task, since, uid, cgroup, by_root, .. } = claim;
        let by_root = if *by_root { ", requested by root" } else { "" };
        let since = since / 1_000_000_000;
        format!(
            "of task {} on {list}: since {since} s after boot, uid {uid}, cgroup {cgroup}, saved mask {}, pidfd inode {}{by_root}",
            task.pid,
            saved(&claim.saved),
            task.ino
        )
    }

    fn claim_json(&self, claim: &Claim) -> Value {
        json!({
            "pid": claim.task.pid.get(),
            "inode": claim.task.ino,
            "list": self.found.list_name(claim.list),
            "node": claim.list.0,
            "sinceBootNs": claim.since,
            "uid": claim.uid,
            "cgroup": claim.cgroup,
            "savedMask": saved(&claim.saved),
            "byRoot": claim.by_root,
        })
    }
}

fn exclusivity(exclusivity: Exclusivity) -> &'static str {
    match exclusivity {
        Exclusivity::Exclusive => "exclusive",
        Exclusivity::Shared => "shared",
    }
}

fn saved(mask: &SavedMask) -> String {
    match mask {
        SavedMask::All => "all".to_owned(),
        SavedMask::Cpus(cpus) => cpus.to_string(),
    }
}
