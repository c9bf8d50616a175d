//! Files that were truncated, have a flipped bit, were replaced, or were written by a newer kcm: what is kept of them, and
//! what is reported.

use std::os::unix::ffi::OsStrExt as _;

use super::*;

#[test]
fn a_truncated_log_keeps_complete_records() {
    let sample = Sample::new();
    let headed = sample.claims.iter().position(|&b| b == b'\n').unwrap() + 1;
    for cut in 0..=sample.claims.len() {
        let directory = sample.with("claims", &sample.claims[..cut]);
        let (state, recovered) = open(&directory);
        let whole = lines(&sample.claims[..cut]).saturating_sub(sample.begins_with);
        let found = State::of(&recovered);
        assert_eq!(found.log(), State::after(&sample.records[..whole]).log(), "cut at {cut}");
        assert_eq!(found.config, config());
        // After a complete header, part of a record is what a kill leaves. A log always has its header.
        let damaged = cut < headed;
        assert_eq!(
            (recovered.damage.len(), recovered.suspect),
            (usize::from(damaged), damaged),
            "cut at {cut}"
        );
        // The next record is not appended to the incomplete one.
        state.append(&claimed(99)).unwrap();
        drop(state);
        let (_, recovered) = open(&directory);
        assert_eq!(recovered.claims.first(), Some(&claim(99)), "cut at {cut}");
        assert_eq!(recovered.claims[1..], found.claims, "cut at {cut}");
        assert!(recovered.damage.is_empty(), "cut at {cut}");
    }
}

#[test]
fn a_truncated_configuration_keeps_complete_lines() {
    let sample = Sample::new();
    for cut in 0..sample.config.len() {
        let directory = sample.with("config", &sample.config[..cut]);
        let (state, recovered) = open(&directory);
        let found = &recovered.config;
        // Header, next node, pool, two lists, pool, two attributes, next node, end.
        let whole = lines(&sample.config[..cut]);
        let lists = found.pools.iter().map(|pool| pool.lists.len()).sum::<usize>();
        assert_eq!(found.pools.len(), usize::from(whole >= 3) + usize::from(whole >= 6), "cut at {cut}");
        assert_eq!(lists, whole.saturating_sub(3).min(2), "cut at {cut}");
        assert_eq!(found.attributes.len(), whole.saturating_sub(6).min(2), "cut at {cut}");
        assert_nothing_is_invented(found);
        if whole >= 2 {
            assert_eq!(found.next_node, config().next_node, "cut at {cut}");
        }
        assert_set_aside(&directory, &recovered.damage, "config", &sample.config[..cut]);
        assert_eq!(State::of(&recovered).log(), State::after(&sample.records).log());
        drop(state);
        let (_, again) = open(&directory);
        assert_eq!((again.config, again.damage.len()), (recovered.config, 0), "cut at {cut}");
    }
}

#[test]
fn every_flipped_bit_of_the_log_is_noticed() {
    let sample = Sample::new();
    for bit in 0..sample.claims.len() * 8 {
        let flipped = flip(&sample.claims, bit);
        let directory = sample.with("claims", &flipped);
        let (state, recovered) = open(&directory);
        let all = recovered.claims.iter().chain(&recovered.intents).chain(&recovered.releasing);
        for claim in all {
            let known = sample.records.iter().flat_map(claims_in).any(|stored| stored == claim);
            assert!(known, "bit {bit} invents {claim:?}");
        }
        assert!(recovered.reclaimed.iter().all(|r| [reclaimed(41), reclaimed(42)].contains(r)), "bit {bit}");
        assert!(recovered.suspect, "bit {bit}");
        assert_eq!(recovered.config, config(), "bit {bit}");
        assert_set_aside(&directory, &recovered.damage, "claims", &flipped);
        drop(state);
        let (_, again) = open(&directory);
        assert_eq!(State::of(&again), State::of(&recovered), "bit {bit}");
        assert!(again.damage.is_empty() && !again.suspect, "bit {bit}");
    }
}

#[test]
fn every_flipped_bit_of_the_configuration_is_noticed() {
    let sample = Sample::new();
    for bit in 0..sample.config.len() * 8 {
        let flipped = flip(&sample.config, bit);
        let directory = sample.with("config", &flipped);
        let (_, recovered) = open(&directory);
        assert_nothing_is_invented(&recovered.config);
        // The file contains it twice.
        assert_eq!(recovered.config.next_node, config().next_node, "bit {bit}");
        assert!(!recovered.suspect, "bit {bit}: the claims are not touched");
        assert_eq!(State::of(&recovered).log(), State::after(&sample.records).log(), "bit {bit}");
        assert_set_aside(&directory, &recovered.damage, "config", &flipped);
    }
}

#[test]
fn a_missing_record_is_noticed() {
    let sample = Sample::new();
    let lines: Vec<&[u8]> = sample.claims.split_inclusive(|&b| b == b'\n').collect();
    // A log without its last record is a valid log.
    for missing in 0..lines.len() - 1 {
        let mut rest = lines.clone();
        rest.remove(missing);
        let directory = sample.with("claims", &rest.concat());
        let (_, recovered) = open(&directory);
        assert!(recovered.suspect, "line {missing}");
        assert_set_aside(&directory, &recovered.damage, "claims", &rest.concat());
    }
}

#[test]
fn without_a_header_records_of_another_boot_are_rejected() {
    let sample = Sample::new();
    let headed = sample.claims.iter().position(|&b| b == b'\n').unwrap() + 1;
    let directory = sample.with("claims", &sample.claims[headed..]);
    let (_, recovered) = open_at(directory.path(), NEXT_BOOT).unwrap();
    assert!(recovered.claims.is_empty() && recovered.intents.is_empty() && recovered.releasing.is_empty());
    assert!(recovered.suspect);
    let directory = sample.with("claims", &sample.claims[headed..]);
    let (_, recovered) = open(&directory);
    assert_eq!(State::of(&recovered).log(), State::after(&sample.records).log());
}

#[test]
fn a_newer_version_is_refused_and_unchanged() {
    let sample = Sample::new();
    for (name, old) in [("config", &sample.config), ("claims", &sample.claims)] {
        let end = old.iter().position(|&b| b == b'\n').unwrap() + 1;
        let mut header: serde_json::Value = serde_json::from_slice(&old[9..end]).unwrap();
        // In the claims log the version is a field of the header, in the configuration a field of a line of that name.
        let fields = if name == "config" { &mut header["header"] } else { &mut header };
        fields["version"] = serde_json::json!(VERSION + 1);
        let newer = [codec::encode("", &header).unwrap(), old[end..].to_vec()].concat();
        let directory = sample.with(name, &newer);
        let before = files(&directory);
        let error = open_at(directory.path(), BOOT).map(|_| ()).unwrap_err();
        let StateError::NewerVersion { file, found } = &error else { panic!("{error}") };
        assert_eq!((file.file_name().unwrap().as_bytes(), *found), (name.as_bytes(), VERSION + 1));
        assert!(error.to_string().contains("newer kcm"), "{error}");
        assert!(files(&directory) == before, "nothing is changed");
    }
}

#[test]
fn an_unreadable_file_is_set_aside() {
    let sample = Sample::new();
    for name in ["config", "claims"] {
        for what in ["directory", "pipe"] {
            let directory = sample.with(name, b"");
            let file = directory.path().join(name);
            fs::remove_file(&file).unwrap();
            match what {
                "directory" => fs::create_dir(&file).unwrap(),
                _ => nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRUSR).unwrap(),
            }
            let (state, recovered) = open(&directory);
            let [damage] = recovered.damage.as_slice() else { panic!("{:?}", recovered.damage) };
            assert_eq!(damage.file, state.path.join(name));
            assert!(fs::symlink_metadata(damage.kept_as.as_ref().unwrap()).is_ok(), "{damage}");
            assert_eq!(recovered.suspect, name == "claims", "{what}");
            let found = State::of(&recovered);
            match name {
                "config" => {
                    assert_eq!(found.log(), State::after(&sample.records).log());
                    assert!(found.config.pools.is_empty());
                    assert!(found.config.next_node > config().next_node, "node ids are never given twice");
                }
                _ => assert_eq!(found.config, config()),
            }
            state.append(&claimed(99)).unwrap();
            state.store_config(&config()).unwrap();
            drop(state);
            let (_, again) = open(&directory);
            assert_eq!(again.claims.first(), Some(&claim(99)), "{name} {what}");
            assert_eq!((again.config, again.damage), (config(), vec![]), "{name} {what}");
        }
    }
}

#[test]
fn repeated_damage_is_set_aside_under_new_names() {
    let sample = Sample::new();
    let directory = sample.with("claims", b"rubbish\n");
    for n in 1..=3 {
        let (_, recovered) = open(&directory);
        assert!(recovered.damage[0].to_string().contains(".damaged-"), "{}", recovered.damage[0]);
        let aside = files(&directory).into_iter().filter(|(name, _)| name.contains(".damaged-")).count();
        assert_eq!(aside, n);
        fs::write(directory.path().join("claims"), b"rubbish\n").unwrap();
    }
}

#[test]
fn node_ids_never_decrease() {
    let sample = Sample::new();
    let lines: Vec<&[u8]> = sample.config.split_inclusive(|&b| b == b'\n').collect();
    // Without any two of the lines.
    for one in 0..lines.len() {
        for other in one..lines.len() {
            let rest = lines.iter().enumerate().filter(|(n, _)| *n != one && *n != other);
            let rest: Vec<u8> = rest.flat_map(|(_, line)| line.to_vec()).collect();
            let directory = sample.with("config", &rest);
            let (state, recovered) = open(&directory);
            let next = recovered.config.next_node;
            assert!(next >= config().next_node, "without lines {one} and {other}: {next}");
            assert_eq!(next % 4, 0, "ids of pools and lists are multiples of 4");
            drop(state);
            assert_eq!(open(&directory).1.config.next_node, next);
        }
    }
    for rest in [&b""[..], b"\n", lines[0], &sample.config[..7]] {
        let directory = sample.with("config", rest);
        assert!(open(&directory).1.config.next_node > config().next_node);
    }
}

/// Valid files with every kind of state.
struct Sample {
    config: Vec<u8>,
    claims: Vec<u8>,
    /// The number of lines at the beginning of every log.
    begins_with: usize,
    records: Vec<Record>,
}

impl Sample {
    fn new() -> Self {
        let records = vec![
            claimed(1),
            Record::Batch(vec![claimed(2), Record::Releasing { task: task(1) }]),
            Record::Ended { task: task(2), reclaimed: Some(reclaimed(41)) },
            claimed(3),
            Record::Ended { task: task(9), reclaimed: Some(reclaimed(42)) },
            Record::Intent(claim(4)),
            claimed(5),
        ];
        let directory = directory();
        let (state, _) = open(&directory);
        state.store_config(&config()).unwrap();
        let read = |name| fs::read(directory.path().join(name)).unwrap();
        let begins_with = lines(&read("claims"));
        for record in &records {
            state.append(record).unwrap();
        }
        Self { config: read("config"), claims: read("claims"), begins_with, records }
    }

    /// Returns a new directory with both files, one of them with other content.
    fn with(&self, name: &str, bytes: &[u8]) -> TempDir {
        let directory = directory();
        for (file, sound) in [("config", &self.config[..]), ("claims", &self.claims)] {
            fs::write(directory.path().join(file), if file == name { bytes } else { sound }).unwrap();
        }
        fs::write(directory.path().join("lock"), b"").unwrap();
        directory
    }
}

/// Returns the number of complete lines.
fn lines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&b| b == b'\n').count()
}

fn flip(bytes: &[u8], bit: usize) -> Vec<u8> {
    let mut flipped = bytes.to_vec();
    flipped[bit / 8] ^= 1 << (bit % 8);
    flipped
}

/// Checks that only this file is reported as damaged, and that it is kept unchanged.
fn assert_set_aside(directory: &TempDir, damage: &[Damage], name: &str, bytes: &[u8]) {
    let [damage] = damage else { panic!("{damage:?}") };
    assert_eq!(damage.file, directory.path().canonicalize().unwrap().join(name));
    let path = damage.kept_as.as_ref().unwrap();
    let kept_as = path.file_name().unwrap().to_str().unwrap();
    assert!(kept_as.starts_with(&format!("{name}.damaged-")), "{damage}");
    assert!(fs::read(path).unwrap() == bytes, "{damage}: it was changed");
}

/// Checks that every pool, list and attribute was stored before.
fn assert_nothing_is_invented(found: &Config) {
    let stored = config();
    for pool in &found.pools {
        let known = stored.pools.iter().find(|known| known.node == pool.node).expect("no such pool");
        assert_eq!((&pool.name, pool.exclusivity), (&known.name, known.exclusivity));
        assert!(pool.lists.iter().all(|list| known.lists.contains(list)), "{pool:?}");
    }
    assert!(found.attributes.iter().all(|attributes| stored.attributes.contains(attributes)), "{found:?}");
}

fn claims_in(record: &Record) -> Vec<&Arc<Claim>> {
    match record {
        Record::Intent(claim) | Record::Claimed(claim) | Record::Inherited { heir: claim, .. } => vec![claim],
        Record::Batch(records) => records.iter().flat_map(claims_in).collect(),
        _ => Vec::new(),
    }
}
