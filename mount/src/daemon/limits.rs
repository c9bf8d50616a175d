//! The limits of resources that the daemon inherits from the shell or service that starts it (getrlimit(2)).
//!
//! Owns what the daemon needs. Raises what it may, and refuses the mount by the name of what is too low, because a daemon that
//! reaches a limit later refuses claims or dies. Does not know what the resources are used for.

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, rlim_t, setrlimit};

use super::error::MountError;

/// A limit, and what the daemon needs at least.
struct Need {
    resource: Resource,
    /// The name in getrlimit(2), and the letter of `ulimit`.
    name: &'static str,
    letter: char,
    least: rlim_t,
    /// Up to where the limit is raised.
    most: rlim_t,
}

const NEEDS: [Need; 7] = [
    // Each watched task takes a descriptor, beside some 100 that are always or briefly open.
    Need {
        resource: Resource::RLIMIT_NOFILE,
        name: "RLIMIT_NOFILE",
        letter: 'n',
        least: 256,
        most: RLIM_INFINITY,
    },
    // The claims log, in bytes: some 200 for each claim before it is compacted.
    Need {
        resource: Resource::RLIMIT_FSIZE,
        name: "RLIMIT_FSIZE",
        letter: 'f',
        least: 64 << 20,
        most: RLIM_INFINITY,
    },
    // In seconds: a daemon runs for years.
    Need {
        resource: Resource::RLIMIT_CPU,
        name: "RLIMIT_CPU",
        letter: 't',
        least: RLIM_INFINITY,
        most: RLIM_INFINITY,
    },
    // In bytes: snapshots of open files take up to 64 MiB, stacks of threads and their arenas the rest.
    Need {
        resource: Resource::RLIMIT_AS,
        name: "RLIMIT_AS",
        letter: 'v',
        least: 1 << 30,
        most: RLIM_INFINITY,
    },
    Need {
        resource: Resource::RLIMIT_DATA,
        name: "RLIMIT_DATA",
        letter: 'd',
        least: 256 << 20,
        most: RLIM_INFINITY,
    },
    // In bytes: the first thread's. Not unlimited, which would change the layout of the memory of every child.
    Need {
        resource: Resource::RLIMIT_STACK,
        name: "RLIMIT_STACK",
        letter: 's',
        least: 1 << 20,
        most: 8 << 20,
    },
    // The kernel does not count the processes of the machine's root. In a user namespace it does.
    Need {
        resource: Resource::RLIMIT_NPROC,
        name: "RLIMIT_NPROC",
        letter: 'u',
        least: 0,
        most: RLIM_INFINITY,
    },
];

/// Raises each soft limit to its hard limit, as far as more is of use.
///
/// # Errors
/// [`MountError::Limit`]: a hard limit is too low, and this process may not raise it.
pub(super) fn raise() -> Result<(), MountError> {
    for Need { resource, name, letter, least, most } in NEEDS {
        let Ok((soft, hard)) = getrlimit(resource) else { continue };
        // Without CAP_SYS_RESOURCE, only the soft limit can be raised.
        let wanted = hard.min(most);
        let raised = (hard < least && setrlimit(resource, least, least).is_ok())
            || (soft < wanted && setrlimit(resource, wanted, hard).is_ok());
        let now = getrlimit(resource).map_or(soft, |(soft, _)| soft);
        if now < least {
            return Err(MountError::Limit { name, letter, now, least: amount(least) });
        }
        if raised {
            log::debug!("{name} is raised from {soft} to {now}");
        }
    }
    Ok(())
}

fn amount(limit: rlim_t) -> String {
    if limit == RLIM_INFINITY { "unlimited".to_owned() } else { format!("at least {limit}") }
}
