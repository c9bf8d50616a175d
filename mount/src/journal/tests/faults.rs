//! A disk that fails, writes short, or does not answer: records keep their order, none is lost, none is doubled.
//!
//! Longer than 400 lines because the disk with its faults and the tests that need it are read together.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Condvar;

use super::super::append::IO_TIMEOUT;
use super::super::memory::QUEUE_LIMIT;
use super::*;

/// The way in which a call on the disk fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Error,
    /// A write writes half; any other call fails.
    Short,
}

#[derive(Debug, Default)]
struct Faults {
    /// The number of calls so far.
    calls: AtomicUsize,
    /// By the number of the call.
    at: Mutex<BTreeMap<usize, Fault>>,
    /// Whether calls wait.
    frozen: Mutex<bool>,
    /// How long each call takes.
    takes: Mutex<Duration>,
    thawed: Condvar,
    /// Whether a call waits.
    waits: AtomicBool,
    /// The directory, and a copy of its claims log from before and from the middle of every call, as a kill leaves it.
    copies: Mutex<Option<(PathBuf, Vec<Vec<u8>>)>>,
}

/// A disk with faults that the test controls.
#[derive(Clone, Debug, Default)]
struct FaultyDisk(Arc<Faults>);

impl FaultyDisk {
    fn call(&self) -> Result<(), Fault> {
        let mut frozen = self.0.frozen.lock();
        self.0.waits.store(*frozen, Ordering::SeqCst);
        while *frozen {
            self.0.thawed.wait(&mut frozen);
        }
        drop(frozen);
        std::thread::sleep(*self.0.takes.lock());
        self.copy();
        let number = self.0.calls.fetch_add(1, Ordering::SeqCst);
        self.0.at.lock().get(&number).map_or(Ok(()), |fault| Err(*fault))
    }

    fn copy(&self) {
        if let Some((path, copies)) = &mut *self.0.copies.lock() {
            copies.push(fs::read(path.join("claims")).unwrap_or_default());
        }
    }

    fn freeze(&self) {
        *self.0.frozen.lock() = true;
    }

    fn thaw(&self) {
        *self.0.frozen.lock() = false;
        self.0.thawed.notify_all();
    }

    /// Waits until a call is stuck on the frozen disk.
    fn wait_until_stuck(&self) {
        while !self.0.waits.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    }
}

/// Thaws the disk when dropped, so that a failed assertion does not leave a thread stuck on it.
struct Thaw<'a>(&'a FaultyDisk);

impl Drop for Thaw<'_> {
    fn drop(&mut self) {
        self.0.thaw();
    }
}

fn failed<T>() -> io::Result<T> {
    Err(nix::errno::Errno::EIO.into())
}

impl Disk for FaultyDisk {
    fn open(&self, path: &Path) -> io::Result<File> {
        self.call().or_else(|_| failed())?;
        RealDisk.open(path)
    }

    fn write(&self, file: &File, bytes: &[u8]) -> io::Result<usize> {
        let half = &bytes[..bytes.len() / 2];
        match self.call() {
            Err(Fault::Error) => failed(),
            Err(Fault::Short) => RealDisk.write(file, half),
            Ok(()) if self.0.copies.lock().is_some() => {
                let written = RealDisk.write(file, half)?;
                self.copy();
                Ok(written + RealDisk.write(file, &bytes[written..])?)
            }
            Ok(()) => RealDisk.write(file, bytes),
        }
    }

    fn set_len(&self, file: &File, length: u64) -> io::Result<()> {
        self.call().or_else(|_| failed())?;
        RealDisk.set_len(file, length)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call().or_else(|_| failed())?;
        RealDisk.rename(from, to)
    }
}

fn open_faulty(directory: &TempDir, disk: &FaultyDisk) -> StateDir {
    let lock = StateLock::take(directory.path()).unwrap();
    StateDir::open_on(Box::new(disk.clone()), lock, directory.path(), BOOT, 1, None).unwrap().0
}

/// A step of a test.
#[derive(Clone, Debug)]
enum Step {
    Append(Record),
    Defer(Record),
    Flush,
    /// Defers more records than are queued.
    Overflow,
    /// Appends until the log is compacted.
    Compact,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => any_record().prop_map(Step::Append),
        4 => any_record().prop_map(Step::Defer),
        2 => Just(Step::Flush),
        1 => Just(Step::Overflow),
        1 => Just(Step::Compact),
    ]
}

/// Runs the steps. Returns the records that count, in their order, with those that a kill must not lose.
fn run(state: &StateDir, steps: Vec<Step>, records: &mut Vec<Record>, acknowledged: &mut Vec<usize>) {
    let acknowledge = |records: &Vec<Record>, acknowledged: &mut Vec<usize>| {
        acknowledged.push(records.len());
    };
    for step in steps {
        match step {
            Step::Append(record) => {
                if state.append(&record).is_ok() {
                    records.push(record);
                    acknowledge(records, acknowledged);
                }
            }
            Step::Defer(record) => {
                state.defer(record.clone());
                records.push(record);
            }
            Step::Flush => {
                if state.flush().is_ok() {
                    acknowledge(records, acknowledged);
                }
            }
            Step::Overflow => {
                for n in 0..=QUEUE_LIMIT as u32 {
                    let record = Record::Ended { task: task(4), reclaimed: Some(reclaimed(u64::from(n))) };
                    state.defer(record.clone());
                    records.push(record);
                }
            }
            Step::Compact => {
                let large = Record::Batch(vec![claimed(5); 600]);
                if state.append(&large).is_ok() {
                    records.push(large);
                    acknowledge(records, acknowledged);
                }
            }
        }
        assert_eq!(State::of_log(state.memory.lock().log()), State::after(records));
    }
}

fn recovered(path: &Path) -> State {
    let (_, recovered) = open_at(path, BOOT).unwrap();
    assert!(recovered.damage.is_empty(), "{:?}", recovered.damage);
    by_task(State::of(&recovered))
}

fn after(records: &[Record]) -> State {
    by_task(State::after(records))
}

/// Returns the state with its claims sorted by task, because the claims of one batch have no order.
fn by_task(mut state: State) -> State {
    state.claims.sort_by_key(|claim| claim.task);
    state.log()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_failing_disk_loses_and_doubles_nothing(
        steps in prop::collection::vec(any_step(), 1..20),
        faults in prop::collection::btree_map(0..60_usize, prop_oneof![Just(Fault::Error), Just(Fault::Short)], 0..12),
    ) {
        let (directory, disk) = (directory(), FaultyDisk::default());
        let state = open_faulty(&directory, &disk);
        let opened = disk.0.calls.load(Ordering::SeqCst);
        *disk.0.at.lock() = faults.into_iter().map(|(number, fault)| (opened + number, fault)).collect();
        let (mut records, mut acknowledged) = (Vec::new(), Vec::new());
        run(&state, steps, &mut records, &mut acknowledged);
        disk.0.at.lock().clear();
        state.flush().unwrap();
        drop(state);
        prop_assert_eq!(recovered(directory.path()), after(&records));
    }

    #[test]
    fn a_kill_at_any_call_loses_no_acknowledged_record(
        steps in prop::collection::vec(any_step(), 1..8),
        faults in prop::collection::btree_map(0..20_usize, Just(Fault::Short), 0..4),
    ) {
        let (directory, disk) = (directory(), FaultyDisk::default());
        let state = open_faulty(&directory, &disk);
        let opened = disk.0.calls.load(Ordering::SeqCst);
        *disk.0.at.lock() = faults.into_iter().map(|(number, fault)| (opened + number, fault)).collect();
        *disk.0.copies.lock() = Some((directory.path().to_path_buf(), Vec::new()));
        let (mut records, mut known) = (Vec::new(), Vec::new());
        for step in steps {
            let mut acknowledged = Vec::new();
            let before = known.last().map_or(0, |(_, acknowledged): &(usize, usize)| *acknowledged);
            run(&state, vec![step], &mut records, &mut acknowledged);
            known.push((records.len(), acknowledged.pop().unwrap_or(before)));
            let copies = disk.0.copies.lock().as_mut().map(|(_, copies)| std::mem::take(copies)).unwrap();
            let expected: Vec<State> =
                (before..=records.len()).map(|count| after(&records[..count])).collect();
            for copy in copies {
                let killed = super::directory();
                fs::write(killed.path().join("claims"), &copy).unwrap();
                let found = recovered(killed.path());
                prop_assert!(expected.contains(&found), "{found:?} is none of {expected:?}");
            }
        }
    }
}

#[test]
fn a_queue_for_a_slow_disk_is_no_stalled_disk() {
    let (directory, disk) = (directory(), FaultyDisk::default());
    let state = open_faulty(&directory, &disk);
    *disk.0.takes.lock() = IO_TIMEOUT / 4;
    let records: Vec<Record> = (1..=8).map(claimed).collect();
    std::thread::scope(|scope| {
        let state = &state;
        let append = |record| scope.spawn(move || state.append(record));
        let all: Vec<_> = records.iter().map(append).collect();
        all.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
    });
}

#[test]
fn a_stalled_disk_blocks_only_one_thread() {
    for succeeds in [true, false] {
        let (directory, disk) = (directory(), FaultyDisk::default());
        let state = open_faulty(&directory, &disk);
        let calls = disk.0.calls.load(Ordering::SeqCst);
        if !succeeds {
            disk.0.at.lock().insert(calls, Fault::Error);
        }
        disk.freeze();
        let first = claimed(1);
        let mut records = vec![first.clone()];
        std::thread::scope(|scope| {
            let stuck = scope.spawn(|| state.append(&first));
            disk.wait_until_stuck();
            let _thaw = Thaw(&disk);
            let deferred: Vec<Record> = (1..=3 * QUEUE_LIMIT as u64)
                .map(|seq| Record::Ended { task: task(9), reclaimed: Some(reclaimed(seq)) })
                .chain([Record::Ended { task: task(1), reclaimed: None }, claimed(2)])
                .collect();
            let begun = Instant::now();
            for (n, record) in deferred.iter().enumerate() {
                state.defer(record.clone());
                state.note_event(0, &format!("{{\"seq\":{n}}}"));
                state.flush_deferred();
            }
            state.with_requests(|requests| assert_eq!(requests.answer(1), None));
            // Thousands of calls; the machine may be busy.
            assert!(begun.elapsed() < 10 * IO_TIMEOUT, "nothing here waits for the disk");
            let begun = Instant::now();
            assert!(matches!(state.append(&claimed(3)), Err(AppendError::Stalled)));
            assert!(begun.elapsed() < 5 * IO_TIMEOUT, "{:?}", begun.elapsed());
            let begun = Instant::now();
            for _ in 0..100 {
                assert!(matches!(state.append(&claimed(3)), Err(AppendError::Stalled)));
                assert!(matches!(state.flush(), Err(AppendError::Stalled)));
            }
            assert!(begun.elapsed() < 10 * IO_TIMEOUT, "later requests do not wait: {:?}", begun.elapsed());
            disk.thaw();
            assert_eq!(stuck.join().unwrap().is_ok(), succeeds);
            records.extend(deferred);
        });
        if !succeeds {
            records.remove(0);
        }
        assert_eq!(State::of_log(state.memory.lock().log()), State::after(&records));
        let next = claimed(4);
        state.append(&next).unwrap();
        records.push(next);
        drop(state);
        assert_eq!(recovered(directory.path()), after(&records));
    }
}

#[test]
fn the_queue_is_bounded_however_long_the_disk_stalls() {
    let (directory, disk) = (directory(), FaultyDisk::default());
    let state = open_faulty(&directory, &disk);
    disk.freeze();
    std::thread::scope(|scope| {
        scope.spawn(|| state.append(&claimed(1)));
        disk.wait_until_stuck();
        for _ in 0..20 * QUEUE_LIMIT {
            state.defer(Record::Polled { fh: 1, kh: 1 });
            assert!(state.memory.lock().queued() <= QUEUE_LIMIT + 1);
        }
        disk.thaw();
    });
    for _ in 0..20 * QUEUE_LIMIT {
        state.defer(Record::Closed { fh: 1 });
        assert!(state.memory.lock().queued() <= QUEUE_LIMIT + 1);
    }
    state.flush().unwrap();
    let length = fs::metadata(directory.path().join("claims")).unwrap().len();
    assert!(length < 4096, "{length} bytes: it was rewritten, not appended to");
    drop(state);
    assert_eq!(open(&directory).1.polls, []);
}

#[test]
fn compaction_keeps_records_deferred_meanwhile() {
    let (directory, disk) = (directory(), FaultyDisk::default());
    let state = open_faulty(&directory, &disk);
    const EACH: u64 = 300;
    let done = AtomicBool::new(false);
    let large = Record::Batch(vec![claimed(5); 200]);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .map(|thread| {
                let state = &state;
                scope.spawn(move || {
                    for n in 0..EACH {
                        let reclaimed = Some(reclaimed(thread * EACH + n));
                        state.defer(Record::Ended { task: task(1), reclaimed });
                        state.flush_deferred();
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                state.append(&large).unwrap();
            }
        });
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        done.store(true, Ordering::SeqCst);
    });
    state.flush().unwrap();
    let in_memory = State::of_log(state.memory.lock().log());
    drop(state);
    let found = recovered(directory.path());
    assert_eq!(found, by_task(in_memory));
    for thread in 0..3 {
        let of_thread = found.reclaimed.iter().map(|r| r.seq).filter(|seq| seq / EACH == thread);
        assert_eq!(
            of_thread.collect::<Vec<u64>>(),
            (thread * EACH..(thread + 1) * EACH).collect::<Vec<u64>>()
        );
    }
}

#[test]
fn the_flushing_thread_sleeps_until_it_is_asked() {
    let directory = directory();
    // It lives as long as its thread.
    let state: &'static StateDir = Box::leak(Box::new(open(&directory).0));
    std::thread::spawn(|| state.flush_forever());
    let claims = || fs::read(directory.path().join("claims")).unwrap();
    let before = claims();
    state.defer(claimed(1));
    state.note_event(0, "{\"seq\":1}");
    std::thread::sleep(Duration::from_millis(50));
    assert!(claims() == before, "deferring a record does not write it");
    state.request_flush();
    let deadline = Instant::now() + Duration::from_secs(10);
    while claims() == before || fs::read(directory.path().join("events")).unwrap().is_empty() {
        assert!(Instant::now() < deadline, "it was not written");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!state.memory.lock().has_deferred());
}
