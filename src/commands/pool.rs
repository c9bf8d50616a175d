//! `kcm pool`: makes, changes and removes a pool, for people.
//!
//! Owns the order of steps, and that a pool is made as a whole or not at all. Everything is mkdir, rmdir, mv and echo on the
//! mount. Does not know what the daemon refuses.

use std::fs;
use std::process::ExitCode;

use anyhow::{Context as _, Error, bail};

use super::describe;
use crate::cli::{self, PoolCommand};
use crate::confdir::ConfDir;

/// PIDs in one write: a command is at most 64 KiB.
const RELEASES_PER_WRITE: usize = 1000;

/// Runs one of the commands.
///
/// # Errors
/// The daemon does not run, or refuses; the error has its reason.
pub(super) fn run(args: &cli::Pool) -> Result<ExitCode, Error> {
    let dir = ConfDir::open_mounted(&args.conf_dir)?;
    match &args.command {
        PoolCommand::List => describe::print_table(&dir.find()?.warned())?,
        PoolCommand::Create(args) => create(&dir, args)?,
        PoolCommand::Add { pool, lists } => {
            // Else the error of mkdir(2) would name the list.
            lists_of(&dir, pool, &[])?;
            all_or_none(&dir, pool, lists)?;
        }
        PoolCommand::Resize { pool, list, cpus } => {
            let pool = dir.pool(pool);
            dir.rename(&pool.join(list), &pool.join(cpus))?;
        }
        PoolCommand::Rename { pool, name } => dir.rename(&dir.pool(pool), &dir.pool(name))?,
        PoolCommand::Drain { pool, lists } => write_state(&dir, pool, lists, "drain")?,
        PoolCommand::Undrain { pool, lists } => write_state(&dir, pool, lists, "undrain")?,
        PoolCommand::Delete { pool, lists, force } => delete(&dir, pool, lists, *force)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn create(dir: &ConfDir, args: &cli::CreatePool) -> Result<(), Error> {
    let pool = dir.pool(&args.pool);
    dir.create_pool(&args.pool)?;
    let fill = || {
        // Only exclusive lists can be isolated.
        let flags = [("exclusive", args.exclusive || args.isolated), ("partial", args.partial)];
        flags
            .iter()
            .filter(|(_, is_set)| *is_set)
            .try_for_each(|(flag, _)| dir.write_word(&pool.join(flag), "1"))?;
        if args.isolated {
            dir.isolate(&args.pool)?;
        }
        all_or_none(dir, &args.pool, &args.lists)
    };
    fill().inspect_err(|_| drop(dir.remove(&pool)))
}

/// Makes lists. If one cannot be made, the others are removed.
fn all_or_none(dir: &ConfDir, pool: &str, lists: &[String]) -> Result<(), Error> {
    for (made, list) in lists.iter().enumerate() {
        dir.create_list(pool, list).inspect_err(|_| {
            for list in lists.iter().take(made) {
                let _ = dir.remove(&dir.pool(pool).join(list));
            }
        })?;
    }
    Ok(())
}

/// Returns the named lists of a pool with their tasks; all of them if none is named.
fn lists_of(dir: &ConfDir, pool: &str, names: &[String]) -> Result<Vec<(String, Vec<u32>)>, Error> {
    let mut pools = dir.pools()?;
    let found =
        pools.remove(pool).with_context(|| format!("pool {pool} does not exist; look at kcm describe"))?;
    if let Some(missing) = names.iter().find(|name| !found.lists.contains_key(*name)) {
        bail!("pool {pool} has no list {missing}; look at kcm describe");
    }
    Ok(found.lists.into_iter().filter(|(list, _)| names.is_empty() || names.contains(list)).collect())
}

fn write_state(dir: &ConfDir, pool: &str, lists: &[String], word: &str) -> Result<(), Error> {
    for (list, _) in lists_of(dir, pool, lists)? {
        dir.write_word(&dir.pool(pool).join(list).join("state"), word)?;
    }
    Ok(())
}

/// Removes lists, or a pool with all of them.
fn delete(dir: &ConfDir, pool: &str, names: &[String], force: bool) -> Result<(), Error> {
    let lists = lists_of(dir, pool, names)?;
    if !force && let Some((list, pid)) = lists.iter().find_map(|(list, tasks)| Some((list, tasks.first()?))) {
        bail!("{pool} {list} is held by {pid}; end that first, drain the list, or release it with --force");
    }
    for (list, tasks) in lists {
        for pids in tasks.chunks(RELEASES_PER_WRITE) {
            let words: Vec<String> = pids.iter().map(|pid| format!("-{pid}")).collect();
            // An error needs no handling: the removal fails if a task is left, for this reason or a later claim.
            let _ = fs::write(dir.tasks(pool, &list), words.join(" ") + "\n");
        }
        dir.remove(&dir.pool(pool).join(list))?;
    }
    if names.is_empty() { dir.remove(&dir.pool(pool)) } else { Ok(()) }
}
