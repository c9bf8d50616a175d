//! Rewrites the `tasks` file of a plain directory.
//!
//! Owns the order of writes that loses no PID. Does not know who is added or removed. The caller holds the lock.

use std::fs::File;
use std::io::{self, Seek as _, Write as _};

use anyhow::Error;
use kcm_mount::plain::{self, Access};

use super::read::parse_tasks;
use super::{ConfDir, file_error};

impl ConfDir {
    /// Reads the `tasks` file of a list, applies `change` to its PIDs and writes them back. The caller must hold the
    /// directory's lock.
    ///
    /// # Errors
    /// The file cannot be read, parsed or written.
    pub(crate) fn change_tasks(
        &self,
        pool: &str,
        list: &str,
        change: impl FnOnce(&mut Vec<u32>),
    ) -> Result<(), Error> {
        let path = self.tasks(pool, list);
        let error = |error| file_error(&path, error);
        let mut file = self.open_plain(&[pool, list, "tasks"], Access::Write).map_err(error)?;
        let text = plain::read(&mut file).map_err(error)?;
        let mut tasks = parse_tasks(&path, &text)?;
        change(&mut tasks);
        log::debug!("{}: writing {tasks:?}", path.display());
        rewrite(&mut file, &tasks, text.len()).map_err(error)
    }
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
        let home = tempfile::tempdir().unwrap();
        let dir = ConfDir::open(home.path()).unwrap();
        let file = dir.tasks("p", "0");
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "111,222,333").unwrap();
        dir.change_tasks("p", "0", |tasks| tasks.retain(|&pid| pid == 222)).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "222");
        dir.change_tasks("p", "0", Vec::clear).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "");
    }
}
