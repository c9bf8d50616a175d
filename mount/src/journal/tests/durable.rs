//! A configuration that is not stored durably is not found later.

use super::super::disk::{Disk, RealDisk};
use super::*;

/// A disk that cannot sync directories, so that nobody knows whether a rename survives a loss of power.
#[derive(Debug)]
struct UnsyncedDirectories;

impl Disk for UnsyncedDirectories {
    fn sync(&self, file: &File) -> io::Result<()> {
        if file.metadata()?.is_dir() { Err(nix::errno::Errno::EIO.into()) } else { RealDisk.sync(file) }
    }
}

#[test]
fn a_configuration_whose_directory_cannot_be_synced_is_not_found_later() {
    for old in [None, Some(config())] {
        let directory = tempfile::tempdir().unwrap();
        if let Some(old) = &old {
            let (state, _) = open_at(directory.path(), BOOT).unwrap();
            state.store_config(old).unwrap();
        }
        let lock = StateLock::take(directory.path()).unwrap();
        let disk = Box::new(UnsyncedDirectories);
        let state = StateDir::open_on(disk, lock, directory.path(), BOOT, 1, None).unwrap().0;
        let mut larger = config();
        larger.next_node += 4;
        larger.attributes.clear();
        state.store_config(&larger).unwrap_err();
        drop(state);
        let (_, recovered) = open_at(directory.path(), BOOT).unwrap();
        assert_eq!(recovered.config, old.unwrap_or_default());
    }
}
