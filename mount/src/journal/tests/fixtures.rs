//! Shared by the tests of the journal: a comparable state, and samples of everything that is recorded.

use super::*;
use crate::model::command::Kin;

/// The recovered state, without damage.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    pub(super) config: Config,
    pub(super) claims: Vec<Arc<Claim>>,
    pub(super) intents: Vec<Arc<Claim>>,
    pub(super) releasing: Vec<Arc<Claim>>,
    pub(super) reclaimed: Vec<Reclaimed>,
    pub(super) dropped: u64,
    pub(super) next_event: u64,
    pub(super) next_handle: u32,
}

impl State {
    /// The maximum number of records that only contain counters.
    pub(super) const NUMBERS: usize = 3;

    pub(super) fn of(recovered: &Recovered) -> Self {
        Self {
            config: recovered.config.clone(),
            claims: recovered.claims.clone(),
            intents: recovered.intents.clone(),
            releasing: recovered.releasing.clone(),
            reclaimed: recovered.reclaimed.iter().cloned().collect(),
            dropped: recovered.reclaimed_dropped,
            next_event: recovered.next_event,
            next_handle: recovered.next_handle,
        }
    }

    pub(super) fn of_log(live: &LogState) -> Self {
        let mut claims: Vec<(u64, Arc<Claim>)> = live.claims.values().cloned().collect();
        // The claims of one batch do not contradict each other, so they have no order.
        claims.sort_by_key(|(number, claim)| std::cmp::Reverse((*number, claim.task)));
        Self {
            config: Config::default(),
            claims: claims.into_iter().map(|(_, claim)| claim).collect(),
            intents: live.intents.values().cloned().collect(),
            releasing: live.releasing.values().cloned().collect(),
            reclaimed: live.reclaimed.iter().cloned().collect(),
            dropped: live.dropped,
            next_event: live.events.max(1),
            next_handle: live.handles.max(1),
        }
    }

    /// Returns the state that these records add up to.
    pub(super) fn after(records: &[Record]) -> Self {
        let mut live = LogState::default();
        for record in records {
            live.add(record.clone());
        }
        Self::of_log(&live)
    }

    /// Returns the part of the state that is in the claims log.
    pub(super) fn log(&self) -> Self {
        Self { config: Config::default(), ..self.clone() }
    }
}

pub(super) fn directory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

pub(super) fn open_at(path: &Path, boot: &str) -> Result<(StateDir, Recovered), StateError> {
    StateDir::open(StateLock::take(path)?, path, boot, 1, None)
}

pub(super) fn open(directory: &TempDir) -> (StateDir, Recovered) {
    open_at(directory.path(), BOOT).unwrap()
}

/// Returns every file with its content, by name.
pub(super) fn files(directory: &TempDir) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(directory.path()).unwrap().map(Result::unwrap);
    let mut files: Vec<(String, Vec<u8>)> = entries
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

pub(super) fn config() -> Config {
    let list = |id, cpus: &str| ListConfig {
        id: ListId(id),
        name: cpus.into(),
        cpus: cpus.parse().unwrap(),
        draining: false,
    };
    let pool = |name: &str, exclusivity, node, lists| PoolConfig {
        name: name.parse().unwrap(),
        exclusivity,
        partial: false,
        transient: false,
        mode: Mode::Affinity,
        node,
        lists,
    };
    Config {
        pools: vec![
            pool("dataplane", Exclusivity::Exclusive, 64, vec![list(72, "0-1"), list(76, "2")]),
            pool("infra", Exclusivity::Shared, 68, Vec::new()),
        ],
        attributes: vec![
            NodeAttributes { node: 64, uid: 0, gid: 1000, mode: 0o775 },
            NodeAttributes { node: 73, uid: 1000, gid: 0, mode: 0o600 },
        ],
        next_node: 80,
        ..Config::default()
    }
}

pub(super) fn task(n: u32) -> TaskId {
    TaskId { pid: Pid::new(n).unwrap(), ino: 5_000_000 + u64::from(n) }
}

/// Returns a claim that is different for each task.
pub(super) fn claim(n: u32) -> Arc<Claim> {
    Arc::new(Claim {
        task: task(n),
        list: ListId(72),
        saved: if n.is_multiple_of(2) { SavedMask::All } else { SavedMask::Cpus("1,3".parse().unwrap()) },
        since: 1_000_000 + u64::from(n),
        uid: 1000,
        cgroup: 77,
        kin: Kin::default(),
        by_root: n.is_multiple_of(3),
    })
}

/// Returns a claim of the same task on another list.
pub(super) fn moved(n: u32) -> Arc<Claim> {
    Arc::new(Claim { list: ListId(76), since: 2_000_000 + u64::from(n), ..Claim::clone(&claim(n)) })
}

pub(super) fn claimed(n: u32) -> Record {
    Record::Claimed(claim(n))
}

pub(super) fn reclaimed(seq: u64) -> Reclaimed {
    Reclaimed {
        seq,
        time: 1_790_000_000_000,
        pid: 4711,
        pool: "dataplane".into(),
        cpus: "0-1".into(),
        uid: None,
    }
}
