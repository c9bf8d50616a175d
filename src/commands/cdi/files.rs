//! The files of CDI specs in a directory that others use, too.
//!
//! Owns which files are kcm's, and that a reader finds the old spec or the new one. Does not know what a spec says.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use anyhow::{Error, anyhow};
use serde_json::Value;

use super::spec::{Source, may_be_file, unfinished};
use crate::commands::common::output::json_text;
use crate::commands::install::install_file;
use crate::confdir;

/// The longest spec that is read: 1,024 lists need less than a third of it.
const MAX_SIZE: u64 = 1 << 20;
const MODE: u32 = 0o644;

/// A directory of specs, and the source of those that are meant here.
#[derive(Debug)]
pub(super) struct Files<'a> {
    pub(super) directory: &'a Path,
    pub(super) source: &'a Source,
}

/// The result for the files.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) written: Vec<PathBuf>,
    pub(super) removed: Vec<PathBuf>,
    /// The first error.
    pub(super) failed: Option<Error>,
}

impl Changes {
    fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
    }
}

/// A file in the directory.
enum Present {
    Absent,
    /// Made from the same source.
    Own(Value),
    OfAnother,
}

impl Files<'_> {
    /// Writes the specs whose files differ, and removes the specs of other pools. A file that cannot be written does not keep the
    /// others from being written.
    pub(super) fn update(&self, specs: &BTreeMap<String, Value>) -> Changes {
        let mut changes = Changes::default();
        for (name, spec) in specs {
            match self.write(name, spec) {
                Ok(true) => changes.written.push(self.directory.join(name)),
                Ok(false) => {}
                Err(error) => changes.fail(error),
            }
        }
        match self.own() {
            Ok(own) => {
                let is_meant = |file: &PathBuf| {
                    file.file_name().is_some_and(|name| specs.keys().any(|it| **it == *name))
                };
                for file in own.into_iter().filter(|file| !is_meant(file)) {
                    match remove(&file) {
                        Ok(true) => changes.removed.push(file),
                        Ok(false) => {}
                        Err(error) => changes.fail(error),
                    }
                }
            }
            Err(error) => changes.fail(error),
        }
        changes
    }

    /// Removes the files, and returns them.
    ///
    /// # Errors
    /// One of them cannot be removed.
    pub(super) fn remove_all(&self) -> Result<Vec<PathBuf>, Error> {
        self.own()?.into_iter().map(|file| remove(&file).map(|_| file)).collect()
    }

    /// Returns the files that were made from this source, and what a process that was killed has left of one.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub(super) fn own(&self) -> Result<Vec<PathBuf>, Error> {
        let entries = match fs::read_dir(self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(confdir::file_error(self.directory, error)),
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut found: Vec<PathBuf> = names
            .filter(|name| may_be_file(name))
            .filter(|name| match unfinished(name) {
                // One that is being written becomes a spec at once.
                Some((_, pid)) => !Path::new("/proc").join(pid).exists(),
                None => matches!(self.present(name), Present::Own(_)),
            })
            .map(|name| self.directory.join(name))
            .collect();
        found.sort();
        Ok(found)
    }

    /// Writes a spec. Returns whether the file has changed.
    fn write(&self, name: &str, spec: &Value) -> Result<bool, Error> {
        let file = self.directory.join(name);
        match self.present(name) {
            Present::Own(present) if present == *spec => Ok(false),
            Present::Own(_) | Present::Absent => {
                install_file(&file, json_text(spec).as_bytes(), MODE).map(|()| true)
            }
            Present::OfAnother => Err(anyhow!(
                "{}: kcm has not written it for {}; move it away, or rename the pool",
                file.display(),
                self.source.conf_dir()
            )),
        }
    }

    fn present(&self, name: &str) -> Present {
        let path = self.directory.join(name);
        match fs::symlink_metadata(&path) {
            // If it cannot be looked at for another reason, writing it shows that.
            Err(_) => return Present::Absent,
            Ok(file) if file.is_file() && file.len() <= MAX_SIZE => {}
            _ => return Present::OfAnother,
        }
        let mut text = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(MAX_SIZE).read_to_end(&mut text));
        let spec = read.ok().and_then(|_| serde_json::from_slice(&text).ok());
        spec.filter(|spec| self.source.has_made(name, spec)).map_or(Present::OfAnother, Present::Own)
    }
}

/// Removes a file. Returns whether it was there.
fn remove(file: &Path) -> Result<bool, Error> {
    match fs::remove_file(file) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(confdir::file_error(file, error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::commands::cdi::spec;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn specs(source: &Source, pools: &[&str]) -> BTreeMap<String, Value> {
        let spec = |pool: &&str| (spec::file_of(&spec::kind(pool)), source.spec(pool, ["0"].into_iter()));
        pools.iter().map(spec).collect()
    }

    #[test]
    fn files_follow_the_specs_and_those_of_others_stay() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("cdi");
        let source = Source::new(Path::new("/kcm"), Path::new("/etc/kcm")).unwrap();
        let another = Source::new(Path::new("/kcm"), Path::new("/run/kcm/conf")).unwrap();
        let files = Files { directory: &directory, source: &source };
        assert!(files.own().unwrap().is_empty(), "there is no directory");
        let Changes { written, removed, failed } = files.update(&specs(&source, &["a", "b"]));
        assert_eq!((written.len(), removed.len(), failed.is_none()), (2, 0, true));
        assert_eq!(fs::metadata(&written[0]).unwrap().permissions().mode() & 0o7777, 0o644);
        Files { directory: &directory, source: &another }.update(&specs(&another, &["c"]));
        fs::write(directory.join("kcm.intel.com-d.json"), "{}").unwrap();
        fs::write(directory.join("nvidia.com-gpu.json"), "{}").unwrap();
        // No process has this PID.
        fs::write(directory.join("kcm.intel.com-a.json.99999999.new"), "{").unwrap();

        assert!(files.update(&specs(&source, &["a", "b"])).written.is_empty(), "they are as they should be");
        let changes = files.update(&specs(&source, &["b", "d", "e"]));
        assert_eq!(changes.removed, [directory.join("kcm.intel.com-a.json")]);
        let refused = changes.failed.unwrap().to_string();
        assert!(
            refused
                .ends_with("d.json: kcm has not written it for /etc/kcm; move it away, or rename the pool")
        );
        let others = ["kcm.intel.com-c.json", "kcm.intel.com-d.json", "nvidia.com-gpu.json"];
        let mut expected = [&["kcm.intel.com-b.json", "kcm.intel.com-e.json"], &others[..]].concat();
        expected.sort_unstable();
        assert_eq!(names(&directory), expected);
        assert_eq!(files.remove_all().unwrap().len(), 2);
        assert_eq!(names(&directory), others);
    }

    #[test]
    fn a_link_is_not_a_file_of_kcm() {
        let home = tempfile::tempdir().unwrap();
        let source = Source::new(Path::new("/kcm"), Path::new("/etc/kcm")).unwrap();
        let files = Files { directory: home.path(), source: &source };
        files.update(&specs(&source, &["a"]));
        let (file, elsewhere) = (home.path().join("kcm.intel.com-a.json"), home.path().join("x"));
        fs::rename(&file, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &file).unwrap();
        assert!(files.update(&specs(&source, &["a"])).failed.is_some());
        assert!(files.own().unwrap().is_empty());
    }
}
