//! `kcm state`: what it reads, and what it reports of files that are wrong.

use super::super::format::v1;
use super::super::inspect::inspect;
use super::*;

/// A directory with these files.
fn directory_with(config: &[u8], claims: &[u8]) -> TempDir {
    let directory = directory();
    fs::write(directory.path().join("config"), config).unwrap();
    fs::write(directory.path().join("claims"), claims).unwrap();
    directory
}

/// The problems of these files. They are only read.
fn problems(config: &[u8], claims: &[u8]) -> Vec<String> {
    let directory = directory_with(config, claims);
    let before = files(&directory);
    let found = inspect(directory.path()).unwrap();
    assert!(files(&directory) == before, "nothing is changed");
    found.problems.iter().map(ToString::to_string).collect()
}

/// The files of a daemon with this configuration and these records.
fn written(config: &Config, records: &[Record]) -> (Vec<u8>, Vec<u8>) {
    let directory = directory();
    let (state, _) = open(&directory);
    state.store_config(config).unwrap();
    for record in records {
        state.append(record).unwrap();
    }
    let read = |name| fs::read(directory.path().join(name)).unwrap();
    (read("config"), read("claims"))
}

fn lines(bytes: &[u8]) -> Vec<&[u8]> {
    bytes.split_inclusive(|&b| b == b'\n').collect()
}

#[test]
fn sound_files_have_no_problems() {
    let on_other = |n| Arc::new(Claim { list: ListId(76), ..Claim::clone(&claim(n)) });
    let records = [
        Record::Reserved { events: 100, handles: 1 },
        Record::Batch(vec![Record::Intent(claim(1)), Record::Claimed(claim(1))]),
        Record::Claimed(on_other(2)),
        Record::Releasing { task: task(2) },
        Record::Ended { task: task(9), reclaimed: Some(reclaimed(41)) },
    ];
    let (config, claims) = written(&config(), &records);
    assert_eq!(problems(&config, &claims), [""; 0]);
    // A line that is being written is not a problem.
    for cut in claims.len() - 20..claims.len() - 1 {
        assert_eq!(problems(&config, &claims[..cut]), [""; 0]);
    }
    let directory = directory_with(&config, &claims);
    let found = inspect(directory.path()).unwrap();
    assert_eq!(found.config, super::config());
    assert_eq!(found.log.claims.len(), 1);
    assert_eq!(found.log.releasing.len(), 1);
    assert_eq!(found.boot.as_deref(), Some(BOOT));
}

#[test]
fn a_damaged_line_is_reported_with_its_number() {
    let (config, claims) = written(&config(), &[claimed(1), claimed(2), Record::Releasing { task: task(2) }]);
    for (name, bytes) in [("config", &config), ("claims", &claims)] {
        // Without the header, which names version and seed, no other line can be checked.
        for (number, line) in lines(bytes).iter().enumerate().skip(1) {
            let at = lines(bytes)[..number].concat().len() + line.len() / 2;
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            let found = match name {
                "config" => problems(&damaged, &claims),
                _ => problems(&config, &damaged),
            };
            let expected = format!("{name}:{}: the checksum does not match", number + 1);
            assert!(found.contains(&expected), "{expected}: {found:?}");
        }
    }
}

#[test]
fn a_missing_line_is_reported() {
    let (config, claims) = written(&config(), &[claimed(1), claimed(2), claimed(3)]);
    let without = |bytes: &[u8], missing: usize| {
        let mut lines = lines(bytes);
        lines.remove(missing);
        lines.concat()
    };
    let found = problems(&config, &without(&claims, 4));
    assert!(found.contains(&"claims:5: record 4 follows, where 3 was expected".to_owned()), "{found:?}");
    for missing in 0..lines(&config).len() {
        assert!(!problems(&without(&config, missing), &claims).is_empty(), "line {missing}");
    }
    assert_eq!(problems(&config, &without(&claims, 0)).len(), 1);
}

#[test]
fn a_newer_version_is_reported() {
    let (config, claims) = written(&config(), &[]);
    let header = v1::ConfigLine::Header { kcm: "config".into(), version: VERSION + 1 };
    let newer = [codec::encode("", &header).unwrap(), lines(&config)[1..].concat()].concat();
    assert!(problems(&newer, &claims)[0].starts_with("config:1: written by a newer kcm (format 2"));
    let header = v1::ClaimsHeader { kcm: "claims".into(), version: VERSION + 1, boot: BOOT.into() };
    let newer = [codec::encode("", &header).unwrap(), lines(&claims)[1..].concat()].concat();
    assert!(problems(&config, &newer)[0].starts_with("claims:1: written by a newer kcm (format 2"));
}

#[test]
fn contradictions_between_the_lines_are_reported() {
    let (sound, _) = written(&config(), &[]);
    let two_tasks = written(&config(), &[claimed(1), claimed(2)]).1;
    let found = problems(&sound, &two_tasks);
    assert!(found[0].contains("tasks 1 and 2 are both on the exclusive list dataplane 0-1"), "{found:?}");

    let elsewhere = Arc::new(Claim { list: ListId(999), ..Claim::clone(&claim(1)) });
    let unknown = written(&config(), &[Record::Claimed(elsewhere)]).1;
    let found = problems(&sound, &unknown);
    assert!(found[0].ends_with("the claim of task 1 is on an unknown list (999)"), "{found:?}");
    assert!(found[0].starts_with("claims:6: "), "{found:?}");

    let claims = written(&config(), &[]).1;
    let mut overlapping = config();
    overlapping.pools[1].lists.push(ListConfig {
        id: ListId(77),
        name: "1-3".into(),
        cpus: "1-3".parse().unwrap(),
        draining: false,
    });
    let found = problems(&written(&overlapping, &[]).0, &claims);
    assert!(found.iter().any(|what| what.contains("infra 1-3 and dataplane 0-1 overlap in 1")), "{found:?}");
    assert!(found.iter().any(|what| what.contains("infra 1-3 and dataplane 2 overlap in 2")), "{found:?}");

    let mut wrong = config();
    wrong.next_node = 70;
    wrong.pools[0].lists[0].name = "5".into();
    wrong.pools[1].name = wrong.pools[0].name.clone();
    let found = problems(&written(&wrong, &[]).0, &claims);
    for what in ["is not below the next one", "list \"5\" has the CPUs 0-1", "two pools are named dataplane"]
    {
        assert!(found.iter().any(|problem| problem.contains(what)), "{what}: {found:?}");
    }
}

#[test]
fn missing_files_and_directories() {
    let directory = directory();
    let found = inspect(directory.path()).unwrap();
    let problems: Vec<String> = found.problems.iter().map(ToString::to_string).collect();
    assert_eq!(problems, ["config: there is no such file", "claims: there is no such file"]);
    assert!(inspect(&directory.path().join("nowhere")).is_err());
    fs::create_dir(directory.path().join("claims")).unwrap();
    nix::unistd::mkfifo(&directory.path().join("config"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    let found = inspect(directory.path()).unwrap();
    assert!(found.problems.iter().all(|problem| problem.what == "cannot be read: not a regular file"));
}

#[test]
fn any_bytes_are_read() {
    let (config, claims) = written(&config(), &[claimed(1)]);
    for bytes in [&b""[..], b"\n", b"\n\n\n", b"12345678 {}\n", b"\xff\xfe", &config, &claims, &claims[..7]] {
        problems(bytes, bytes);
    }
}
