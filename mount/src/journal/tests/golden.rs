//! Golden files: what earlier versions wrote.
//!
//! The files below `testdata` were written by the first program with that format, with every kind of record in them.
//! Never change them. A test here that fails means that an upgrade loses claims: repair the code, or add a new format
//! with a new directory.

use super::*;
use crate::model::cgroup::Cgroups;
use crate::model::command::Kin;
use crate::model::cpuset::CpuSet;
use crate::model::partition::{Level, Partition};
use crate::model::pool::PoolId;
use crate::model::queue::Waiter;

const CONFIG: &[u8] = include_bytes!("../testdata/v1/config");
const CLAIMS: &[u8] = include_bytes!("../testdata/v1/claims");
const COMPACTED: &[u8] = include_bytes!("../testdata/v1/claims.compacted");
const PARTITIONS: &[u8] = include_bytes!("../testdata/v1/claims.partitions");
const QUEUES: &[u8] = include_bytes!("../testdata/v1/claims.queues");
const OWNERS: &[u8] = include_bytes!("../testdata/v1/claims.owners");
/// From the first program that recorded the kin of a claim.
const CLAIMS_WITH_KIN: &[u8] = include_bytes!("../testdata/v1/claims.kin");
const EVENTS: &[u8] = include_bytes!("../testdata/v1/events");

const MOUNT: u64 = 0x1234_5678_9abc_def0;

fn golden_config() -> Config {
    Config { last: Some(LastRequest { mount: MOUNT, request: 96 }), ..config() }
}

fn refusal(pid: u32, holder: Option<Holder>) -> Arc<RefusalRecord> {
    Arc::new(RefusalRecord {
        time: 1_790_000_000_123,
        pid,
        errno: 16,
        text: format!("list dataplane 0-1 is held by task {HOLDER}"),
        holder,
        subjects: vec![task(20), task(21)],
        uid: None,
        session: None,
    })
}

/// The records of the golden claims log, after the ones that every new log begins with.
fn golden_records() -> Vec<Record> {
    let holder = Holder { task: task(1), list: ListId(72), held: 5_000_000_000 };
    let answered = |request, errno, session_thread| Record::Answered { request, errno, session_thread };
    vec![
        Record::Reserved { events: 0, handles: 0 },
        Record::Mounted { mount: 0 },
        Record::Mounted { mount: 0 },
        Record::Mounted { mount: MOUNT },
        Record::Reserved { events: 700, handles: 9 },
        Record::Batch(vec![Record::Intent(claim(1)), Record::Intent(claim(2))]),
        Record::Batch(vec![claimed(1), claimed(2), answered(10, 0, 0)]),
        claimed(3),
        claimed(4),
        Record::Intent(claim(5)),
        Record::Intent(claim(6)),
        Record::Abandoned { task: task(5) },
        Record::Releasing { task: task(2) },
        Record::Batch(vec![Record::Releasing { task: task(3) }, answered(12, 0, 1)]),
        Record::Released { task: task(3) },
        Record::Inherited { from: task(1), heir: claim(7) },
        Record::Ended { task: task(4), reclaimed: Some(reclaimed(41)) },
        Record::Dropped { count: 3 },
        Record::RetainedReclaim(reclaimed(42)),
        claimed(8),
        Record::Ended { task: task(8), reclaimed: None },
        Record::Intent(moved(7)),
        Record::Reserved { events: 800, handles: 0 },
        Record::Refused { request: 14, session_thread: 2, refusal: refusal(4711, Some(holder)) },
        Record::Refused { request: 0, session_thread: 0, refusal: refusal(4712, None) },
        Record::Mounted { mount: MOUNT },
        Record::Retried { request: 16 },
        Record::Polled { fh: 3, kh: 33 },
        Record::Polled { fh: 4, kh: 34 },
        Record::Truncated { fh: 5 },
        Record::Truncated { fh: 6 },
        Record::Closed { fh: 4 },
        Record::Closed { fh: 6 },
        claimed(9),
        answered(18, 22, 0),
        Record::Acknowledged { seq: 41 },
        Record::Dropped { count: 2 },
    ]
}

fn golden_state() -> State {
    State {
        config: golden_config(),
        claims: vec![claim(9), claim(7)],
        intents: vec![claim(6), moved(7)],
        releasing: vec![claim(2)],
        reclaimed: vec![reclaimed(42)],
        dropped: 2,
        next_event: 800,
        next_handle: 9,
    }
}

/// A directory with these files, opened on the mount of the golden files.
fn open_golden(claims: &[u8]) -> (TempDir, StateDir, Recovered) {
    let directory = directory();
    for (name, bytes) in [("config", CONFIG), ("claims", claims), ("events", EVENTS)] {
        fs::write(directory.path().join(name), bytes).unwrap();
    }
    let lock = StateLock::take(directory.path()).unwrap();
    let (state, recovered) = StateDir::open(lock, directory.path(), BOOT, MOUNT, None).unwrap();
    (directory, state, recovered)
}

#[test]
fn version_1_is_read() {
    for claims in [CLAIMS, COMPACTED] {
        let (directory, state, recovered) = open_golden(claims);
        assert_eq!(State::of(&recovered), golden_state());
        assert!(recovered.damage.is_empty() && !recovered.suspect);
        assert_eq!(recovered.polls, [(3, 33)]);
        assert_eq!(recovered.truncated, [5]);
        assert_eq!(recovered.refusals.last(), Some(&refusal(4712, None)));
        assert_eq!(recovered.events.iter().map(|event| event.seq).collect::<Vec<u64>>(), [1, 2]);
        state.with_requests(|requests| {
            let answers = [10, 12, 14, 18, 96, 98].map(|request| requests.answer(request));
            assert_eq!(answers, [Some(0), Some(0), Some(16), Some(22), Some(0), None]);
            assert!(requests.retries(16) == 1 && requests.retries(18) == 0);
        });
        // The next records are appended to what is there.
        state.append(&claimed(10)).unwrap();
        let found = fs::read(directory.path().join("claims")).unwrap();
        assert!(found.starts_with(claims));
    }
}

/// The records of `CLAIMS_WITH_KIN`, after the ones that every new log begins with.
fn records_with_kin() -> [Record; 3] {
    let cgroups = |texts: &[&str]| texts.iter().map(|text| Arc::new(Cgroups::from_printed(text))).collect();
    let with = |n, kin| Arc::new(Claim { kin, ..Claim::clone(&claim(n)) });
    let first = cgroups(&["cpu,cpuacct;pids:/a\ncpuset:/\n:/u/b"]);
    let heir = Kin { cgroups: cgroups(&[":/", "pids:/c\n:/"]), users: vec![1000, 1001], any_user: false };
    [
        Record::Claimed(with(1, Kin { cgroups: first, users: Vec::new(), any_user: true })),
        Record::Inherited { from: task(1), heir: with(7, heir) },
        claimed(3),
    ]
}

#[test]
fn the_kin_of_a_claim_is_an_optional_field_of_version_1() {
    let (_directory, _, recovered) = open_golden(CLAIMS_WITH_KIN);
    assert!(recovered.damage.is_empty());
    let [_, Record::Inherited { heir, .. }, Record::Claimed(without)] = records_with_kin() else { panic!() };
    assert_eq!(recovered.claims.len(), 2);
    assert!([heir, without].iter().all(|claim| recovered.claims.contains(claim)), "{:?}", recovered.claims);
    let directory = directory();
    let lock = StateLock::take(directory.path()).unwrap();
    let (state, _) = StateDir::open(lock, directory.path(), BOOT, MOUNT, None).unwrap();
    records_with_kin().iter().for_each(|record| state.append(record).unwrap());
    let found = fs::read_to_string(directory.path().join("claims")).unwrap();
    assert_eq!(found, str::from_utf8(CLAIMS_WITH_KIN).unwrap());
}

#[test]
fn the_boot_id_is_part_of_version_1() {
    let directory = directory();
    fs::write(directory.path().join("claims"), CLAIMS).unwrap();
    let (_, recovered) = open_at(directory.path(), NEXT_BOOT).unwrap();
    assert!(recovered.claims.is_empty() && recovered.intents.is_empty() && recovered.releasing.is_empty());
    assert!(recovered.damage.is_empty());
}

#[test]
fn the_same_bytes_are_written_as_version_1() {
    let directory = directory();
    let lock = StateLock::take(directory.path()).unwrap();
    let (state, _) = StateDir::open(lock, directory.path(), BOOT, MOUNT, None).unwrap();
    for record in &golden_records()[4..] {
        state.append(record).unwrap();
    }
    state.store_config(&golden_config()).unwrap();
    let read = |name| String::from_utf8(fs::read(directory.path().join(name)).unwrap()).unwrap();
    assert_eq!(read("claims"), str::from_utf8(CLAIMS).unwrap());
    assert_eq!(read("config"), str::from_utf8(CONFIG).unwrap());
    let mut log = LogState::default();
    golden_records().into_iter().for_each(|record| log.add(record));
    let other = super::directory();
    append::rewrite(&RealDisk, other.path(), BOOT, || log).unwrap();
    let compacted = fs::read(other.path().join("claims")).unwrap();
    assert_eq!(str::from_utf8(&compacted).unwrap(), str::from_utf8(COMPACTED).unwrap());
}

/// Records with the user to whom they belong, which version 1 got later.
fn owned_records() -> Vec<Record> {
    let refusal = Arc::new(RefusalRecord { uid: Some(1000), ..RefusalRecord::clone(&refusal(4713, None)) });
    vec![
        Record::Refused { request: 0, session_thread: 0, refusal },
        Record::Ended { task: task(9), reclaimed: Some(Reclaimed { uid: Some(1000), ..reclaimed(43) }) },
    ]
}

/// Records of partitions, which version 1 got later.
fn partition_records() -> Vec<Record> {
    let level = |enabled, exclusive| Level { enabled, exclusive };
    let partition = |list, cpus: &str, is_whole_cgroup, workqueues: CpuSet| {
        Record::Partition(Partition {
            list: ListId(list),
            cpus: cpus.parse().unwrap(),
            parent: "/system.slice/a \u{e4}.service".to_owned(),
            is_whole_cgroup,
            levels: vec![level(true, false), level(false, true), level(true, true), level(false, false)],
            workqueues,
        })
    };
    let taken = "5".parse().unwrap();
    vec![
        partition(72, "2-3", false, CpuSet::new()),
        partition(76, "5", false, taken),
        Record::Unpartitioned { list: ListId(72) },
        partition(80, "6", true, CpuSet::new()),
    ]
}

#[test]
fn partitions_are_recorded_in_version_1() {
    let directory = directory();
    fs::write(directory.path().join("claims"), PARTITIONS).unwrap();
    let lock = StateLock::take(directory.path()).unwrap();
    let (state, recovered) = StateDir::open(lock, directory.path(), BOOT, MOUNT, None).unwrap();
    assert!(recovered.damage.is_empty());
    assert_eq!(
        recovered.partitions.into_iter().map(Record::Partition).collect::<Vec<_>>(),
        [&partition_records()[1..2], &partition_records()[3..]].concat()
    );
    drop(state);
    let directory = super::directory();
    let lock = StateLock::take(directory.path()).unwrap();
    let (state, _) = StateDir::open(lock, directory.path(), BOOT, MOUNT, None).unwrap();
    partition_records().iter().for_each(|record| state.append(record).unwrap());
    let written = fs::read_to_string(directory.path().join("claims")).unwrap();
    assert_eq!(written, str::from_utf8(PARTITIONS).unwrap());
}

#[test]
fn what_a_pool_is_besides_exclusive_are_optional_fields_of_version_1() {
    let mut config = golden_config();
    let pool = &mut config.pools[1];
    (pool.partial, pool.mode, pool.transient) = (true, Mode::Isolated, true);
    let (directory, state, _) = open_golden(CLAIMS);
    state.store_config(&config).unwrap();
    let written = fs::read_to_string(directory.path().join("config")).unwrap();
    let line = r#"{"pool":{"name":"infra","exclusivity":"shared","partial":true,"isolated":true,"transient":true,"node":68}}"#;
    assert!(written.contains(line), "{written}");
    drop(state);
    let lock = StateLock::take(directory.path()).unwrap();
    let (_, recovered) = StateDir::open(lock, directory.path(), BOOT, MOUNT, None).unwrap();
    assert_eq!(recovered.config, config);
}

#[test]
fn draining_and_what_the_kernel_has_to_look_at_are_optional_fields_of_version_1() {
    let mut config = golden_config();
    config.pools[0].lists[1].draining = true;
    config.stale = vec![String::new(), "gone".to_owned(), "dataplane/0-1".to_owned()];
    let (directory, state, _) = open_golden(CLAIMS);
    state.store_config(&config).unwrap();
    let written = fs::read_to_string(directory.path().join("config")).unwrap();
    for part in [
        r#""list":{"id":76,"name":"2","cpus":"2","draining":true}"#,
        r#"{"last":{"mount":1311768467463790320,"request":96,"stale":["","gone","dataplane/0-1"]}}"#,
    ] {
        assert!(written.contains(part), "{written}");
    }
    drop(state);
    let lock = StateLock::take(directory.path()).unwrap();
    let (_, recovered) = StateDir::open(lock, directory.path(), BOOT, MOUNT, None).unwrap();
    assert_eq!(recovered.config, config);
}

#[test]
fn records_have_owners_in_version_1() {
    let directory = directory();
    fs::write(directory.path().join("claims"), OWNERS).unwrap();
    let lock = StateLock::take(directory.path()).unwrap();
    let (state, recovered) = StateDir::open(lock, directory.path(), BOOT, MOUNT, None).unwrap();
    assert!(recovered.damage.is_empty());
    let uids = (recovered.refusals.last().unwrap().uid, recovered.reclaimed.back().unwrap().uid);
    assert_eq!(uids, (Some(1000), Some(1000)));
    drop(state);
    let directory = super::directory();
    let lock = StateLock::take(directory.path()).unwrap();
    let (state, _) = StateDir::open(lock, directory.path(), BOOT, MOUNT, None).unwrap();
    owned_records().iter().for_each(|record| state.append(record).unwrap());
    let written = fs::read_to_string(directory.path().join("claims")).unwrap();
    assert_eq!(written, str::from_utf8(OWNERS).unwrap());
}

/// Records of tasks that wait in turn, and of successes, which version 1 got later.
fn queue_records() -> Vec<Record> {
    let waiter = |fh, pid| {
        Record::Queued(Waiter { fh, pool: PoolId(64), task: task(pid), uid: 1000, since: 1_790_000_000_123 })
    };
    let refused = |pid| {
        let refusal = refusal(pid, None);
        let refusal = RefusalRecord { session: Some(7), uid: Some(1000), ..RefusalRecord::clone(&refusal) };
        Record::Refused { request: 0, session_thread: 0, refusal: Arc::new(refusal) }
    };
    vec![
        refused(4714),
        Record::Succeeded { tasks: vec![task(20)] },
        waiter(31, 1),
        waiter(32, 2),
        waiter(33, 3),
        Record::Closed { fh: 32 },
        waiter(31, 1),
    ]
}

#[test]
fn queues_and_successes_are_recorded_in_version_1() {
    let directory = directory();
    fs::write(directory.path().join("claims"), QUEUES).unwrap();
    let lock = StateLock::take(directory.path()).unwrap();
    let (state, recovered) = StateDir::open(lock, directory.path(), BOOT, MOUNT, None).unwrap();
    assert!(recovered.damage.is_empty());
    assert_eq!(recovered.queued.iter().map(|waiter| waiter.fh).collect::<Vec<u64>>(), [33, 31]);
    let refusal = recovered.refusals.last().unwrap();
    assert_eq!((refusal.session, &*refusal.subjects), (Some(7), &[task(21)][..]));
    drop(state);
    let directory = super::directory();
    let lock = StateLock::take(directory.path()).unwrap();
    let (state, _) = StateDir::open(lock, directory.path(), BOOT, MOUNT, None).unwrap();
    queue_records().iter().for_each(|record| state.append(record).unwrap());
    let written = fs::read_to_string(directory.path().join("claims")).unwrap();
    assert_eq!(written, str::from_utf8(QUEUES).unwrap());
}

#[test]
fn every_kind_of_record_is_in_the_golden_files() {
    // A new variant does not compile here until the golden files of a new version contain it.
    fn kind(record: &Record) -> &'static str {
        match record {
            Record::Intent(_) => "intent",
            Record::Claimed(_) => "claimed",
            Record::Abandoned { .. } => "abandoned",
            Record::Releasing { .. } => "releasing",
            Record::Released { .. } => "released",
            Record::Inherited { .. } => "inherited",
            Record::Ended { .. } => "ended",
            Record::RetainedReclaim(_) => "kept",
            Record::Dropped { .. } => "dropped",
            Record::Acknowledged { .. } => "acknowledged",
            Record::Mounted { .. } => "mounted",
            Record::Answered { .. } => "answered",
            Record::Refused { .. } => "refused",
            Record::Retried { .. } => "tried",
            Record::Polled { .. } => "polled",
            Record::Truncated { .. } => "rest",
            Record::Closed { .. } => "closed",
            Record::Reserved { .. } => "reserved",
            Record::Partition(_) => "partition",
            Record::Unpartitioned { .. } => "unpartitioned",
            Record::Queued(_) => "queued",
            Record::Succeeded { .. } => "succeeded",
            Record::Batch(_) => "batch",
        }
    }
    let text = [CLAIMS, PARTITIONS, QUEUES].map(|file| str::from_utf8(file).unwrap()).concat();
    let mut kinds: Vec<&str> =
        golden_records().iter().chain(&partition_records()).chain(&queue_records()).map(kind).collect();
    kinds.sort_unstable();
    kinds.dedup();
    assert_eq!(kinds.len(), 23);
    for kind in kinds {
        assert!(text.contains(&format!("{{\"{kind}\":")), "{kind}");
    }
}
