//! `kcm init --if-empty`: creates pools only if there are none.
//!
//! Owns that existing pools are the configuration, and that the command succeeds on a machine that cannot have the requested ones:
//! in a pod, a failure would keep all other containers from running. Other problems, such as a daemon that does not answer, are
//! failures, and the pod tries again. Does not know how pools are planned or created.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Error;
use kcm_mount::model::topology::Topology;

use super::existing::differences;
use super::layout::Layout;
use super::plan::{Counts, PlannedPool, plan};
use super::{Created, Target, announce, complete, create_new, is_complete, is_part_of};
use crate::cli;
use crate::commands::common::node_events::NodeEvents;
use crate::confdir::{self, ConfDir};
use crate::host::Host;
use crate::kubernetes::Cluster;
use crate::kubernetes::objects::event::Reason;

/// How long sending the Event may take. Other containers wait for this command.
const EVENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Creates the pools, or says why not. `node`: the name of this node, if it is known.
pub(super) fn run(args: &cli::Init, node: Option<&str>) -> Result<ExitCode, Error> {
    let path = &args.dir.conf_dir;
    confdir::check_answers(path)?;
    let target = Target::find(path)?;
    let layout = Layout::requested(args, node);
    if let (Target::Empty { .. }, Ok(layout)) = (&target, &layout) {
        announce(path, *layout);
    }
    let wanted = layout.and_then(wanted);
    match (target, wanted) {
        (Target::Configured(dir), wanted) => keep(&dir, wanted)?,
        (Target::Empty { is_new }, Ok((topology, plan))) => {
            match create_new(path, is_new, &topology, &plan) {
                Ok(Created::All) => {}
                Ok(Created::Nothing(dir)) => keep(&dir, Ok((topology, plan)))?,
                Err(error) => {
                    confdir::check_answers(path)?;
                    report(args, node, &error);
                }
            }
        }
        (Target::Empty { .. }, Err(error)) => report(args, node, &error),
    }
    Ok(ExitCode::SUCCESS)
}

/// The requested pools, with the machine for which they were planned.
type Wanted = (Topology, [PlannedPool; 3]);

/// Returns the requested pools.
///
/// # Errors
/// The machine cannot have them.
fn wanted(layout: Layout) -> Result<Wanted, Error> {
    let topology = Host::from_env().topology()?;
    let plan = plan(&topology, Counts::of(layout, &topology)?)?;
    Ok((topology, plan))
}

/// Leaves existing pools as they are, and says how they differ from the requested ones. Completes what an interrupted init began.
fn keep(dir: &ConfDir, wanted: Result<Wanted, Error>) -> Result<(), Error> {
    let _lock = dir.lock()?;
    dir.remove_incomplete();
    let existing = dir.pools()?;
    let path = dir.path().display();
    match wanted {
        Ok((_, plan)) if !is_complete(&existing) && is_part_of(&existing, &plan) => {
            complete(dir, &plan, &existing)?;
        }
        Ok((_, plan)) => match differences(&existing, &plan).as_slice() {
            [] => log::info!("{path}: has the requested pools."),
            different => {
                log::warn!("{path}: has pools, which stay; not as requested: {}", different.join(", "));
            }
        },
        Err(error) => {
            log::warn!("{path}: has pools, which stay; the requested ones are not possible: {error:#}")
        }
    }
    Ok(())
}

/// Says why there are no pools: in one line, and as an Event of the node.
fn report(args: &cli::Init, node: Option<&str>, error: &Error) {
    let whose = node.map_or_else(|| "this machine".to_owned(), |node| format!("node {node}"));
    let cure = match &args.layouts {
        Some(file) => format!("change its entry in {}, or make pools by hand", file.display()),
        None => "request other numbers, such as --num-dp-cores=auto, or make pools by hand".to_owned(),
    };
    let message = format!("{whose} cannot have the requested pools: {error:#}; there are none; {cure}");
    log::error!("{message}");
    let Some(node) = node else { return };
    match Cluster::find(EVENT_TIMEOUT) {
        Ok(cluster) => NodeEvents::new(node).set(&cluster, Reason::LayoutImpossible, Some(&message)),
        Err(failure) => log::warn!("{failure}; the Event is not sent"),
    }
}
