//! Tests that need root, because they mount a small file system. The root tier of `scripts/test` runs them.

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::*;

#[test]
fn a_daemon_starts_on_a_full_disk() {
    let disk = SmallDisk::new(64);
    let path = disk.0.path();
    let (state, _) = open_at(path, BOOT).unwrap();
    state.store_config(&config()).unwrap();
    drop(state);
    // Damaged, so that a sound file has to replace it.
    let mut damaged = fs::read(path.join("config")).unwrap();
    damaged.extend(b"x\n");
    fs::write(path.join("config"), damaged).unwrap();
    let filler = path.join("filler");
    let mut file = File::create(&filler).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
    drop(file);
    for _ in 0..2 {
        // Of another boot, so that a new log has to be written.
        let (state, recovered) = open_at(path, "another boot").unwrap();
        assert_eq!(recovered.config, config());
        assert!(state.append(&claimed(1)).is_err());
    }
    fs::remove_file(&filler).unwrap();
    let (state, _) = open_at(path, "another boot").unwrap();
    state.append(&claimed(1)).unwrap();
    drop(state);
    let (_, recovered) = open_at(path, "another boot").unwrap();
    assert_eq!((recovered.config, recovered.claims), (config(), vec![claim(1)]));
    assert!(recovered.damage.is_empty());
}

#[test]
fn a_full_disk_refuses_whole_records() {
    // The larger disk has too little room to compact the log.
    for kilobytes in [64, 512] {
        let disk = SmallDisk::new(kilobytes);
        let path = disk.0.path();
        let (state, _) = open_at(path, BOOT).unwrap();
        state.store_config(&config()).unwrap();
        let filler = path.join("filler");
        fs::write(&filler, vec![0; 16 * 1024]).unwrap();
        let mut records = Vec::new();
        // First large records, then small ones that still fit.
        let batch = |n| Record::Batch(vec![Record::Intent(claim(n)), claimed(n)]);
        for record in (1..).map(batch) {
            let Err(error) = state.append(&record) else {
                records.push(record);
                continue;
            };
            let AppendError::Io(error) = error else { panic!("{error}") };
            assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
            break;
        }
        records.extend((80_000..).map(claimed).take_while(|record| state.append(record).is_ok()));
        let full = files(&disk.0);
        for n in 90_000..90_010 {
            assert!(state.append(&claimed(n)).is_err());
        }
        let mut larger = config();
        larger.attributes =
            (0..600).map(|node| NodeAttributes { node, uid: 1, gid: 1, mode: 0o644 }).collect();
        assert!(state.store_config(&larger).is_err());
        assert!(files(&disk.0) == full, "both files are as they were, and there is no other");
        fs::remove_file(&filler).unwrap();
        let last = Record::Releasing { task: task(1) };
        state.append(&last).unwrap();
        records.push(last);
        state.store_config(&config()).unwrap();
        drop(state);
        let (_, recovered) = open_at(path, BOOT).unwrap();
        assert_eq!(State::of(&recovered).log(), State::after(&records).log());
        assert!(recovered.damage.is_empty());
        assert_eq!(recovered.config, config());
    }
}

/// A small file system, unmounted on drop.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(kilobytes: u32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = format!("size={kilobytes}k,mode=700");
        mount(Some("tmpfs"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
            .expect("a test of a full disk needs to be root and mounts a tmpfs");
        Self(directory)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}
