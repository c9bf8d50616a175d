//! Rewrites the `tasks` file of a plain directory.
//!
//! Owns the order of writes that loses no PID. Does not know who is added or removed. The caller holds the lock.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::Path;

use anyhow::Error;

use super::file_error;
use super::read::parse_tasks;

/// Reads a `tasks` file, applies `change` to its PIDs and writes them back. The caller must hold the directory's
/// lock.
///
/// # Errors
/// The file cannot be read, parsed or written.
pub(crate) fn change_tasks(file: &Path, change: impl FnOnce(&mut Vec<u32>)) -> Result<(), Error> {
    let mut handle =
        OpenOptions::new().read(true).write(true).open(file).map_err(|error| file_error(file, error))?;
    let mut text = String::new();
    handle.read_to_string(&mut text).map_err(|error| file_error(file, error))?;
    let mut tasks = parse_tasks(file, &text)?;
    change(&mut tasks);
    log::debug!("{}: writing {tasks:?}", file.display());
    rewrite(&mut handle, &tasks, text.len()).map_err(|error| file_error(file, error))
}

/// Replaces the content of a file, whose length is `old_length`, in place.
fn rewrite(file: &mut File, tasks: &[u32], old_length: usize) -> io::Result<()> {
    let words: Vec<String> = tasks.iter().map(u32::to_string).collect();
    let words = words.join(",");
    file.rewind()?;
    // The text is padded with commas to the old length and written at once; then the file is truncated. So a process
    // that dies in between, or a full disk, removes no PID. Readers ignore the commas.
    file.write_all(format!("{words:,<old_length$}").as_bytes())?;
    file.set_len(words.len() as u64)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_rewritten_file_holds_only_the_new_list() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("tasks");
        fs::write(&file, "111,222,333").unwrap();
        change_tasks(&file, |tasks| tasks.retain(|&pid| pid == 222)).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "222");
        change_tasks(&file, |tasks| tasks.clear()).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "");
    }
}
