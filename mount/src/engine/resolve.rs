//! From the words of a command to the processes that they name.
//!
//! Owns the rule that a PID is valid in the PID namespace of its writer. Does not know what happens to the processes.

use std::collections::HashSet;
use std::sync::Arc;

use super::ports::{Ports, Process as _, Processes as _, Watch as _};
use super::requester::Requester;
use super::{Engine, ProcessOf};
use crate::model::claims::check_permission;
use crate::model::command::TaskInfo;
use crate::model::partition::Extent;
use crate::model::refusal::Refusal;
use crate::model::rights::User;
use crate::model::task::{Named, Token};

/// A process that a write names.
pub(super) struct ResolvedTask<P: Ports> {
    pub(super) info: TaskInfo,
    pub(super) process: Arc<ProcessOf<P>>,
    /// The extent of the partition, if the list is isolated.
    pub(super) extent: Extent,
}

/// The processes to claim for, and those to release.
pub(super) type Resolved<P> = (Vec<ResolvedTask<P>>, Vec<ResolvedTask<P>>);

impl<P: Ports> Engine<P> {
    /// Returns the live processes that the tokens name, each once: those to claim for and those to release. Stops at the
    /// first process over which the users have no right, so that a command with PIDs of others costs little.
    pub(super) fn resolve(
        &self,
        writer: &Arc<ProcessOf<P>>,
        tokens: &[Token],
        requester: &Requester,
    ) -> Result<Resolved<P>, Refusal> {
        let (mut claim, mut release): Resolved<P> = (Vec::new(), Vec::new());
        let (mut seen, mut known) = (HashSet::new(), HashSet::new());
        for token in tokens.iter().filter(|token| seen.insert(**token)) {
            let (named, tasks, releases) = match token {
                Token::Claim(named) | Token::ClaimForCgroup(named) => (named, &mut claim, false),
                Token::Release(named) => (named, &mut release, true),
            };
            let extent =
                if matches!(token, Token::ClaimForCgroup(_)) { Extent::Cgroup } else { Extent::Task };
            if tokens.len() > 1 {
                requester.check_time()?;
            }
            let Some(process) = self.resolve_pid(writer, *named)? else { continue };
            // A watched process has a descriptor already.
            let process = self.processes.watched(&process.id()).unwrap_or(process);
            if !known.insert((process.id(), releases)) {
                continue;
            }
            tasks.extend(self.look_at(process, requester)?.map(|task| ResolvedTask { extent, ..task }));
            if claim.len() + release.len() > self.processes.limit() {
                return Err(Refusal::TooMany { limit: self.processes.limit() });
            }
        }
        if claim.is_empty() && release.is_empty() {
            Err(Refusal::NoSuchProcess)
        } else {
            Ok((claim, release))
        }
    }

    /// Returns what the model has to know about a process; `None` if it has died.
    ///
    /// # Errors
    /// The users may not claim for it.
    pub(super) fn look_at(
        &self,
        process: Arc<ProcessOf<P>>,
        requester: &Requester,
    ) -> Result<Option<ResolvedTask<P>>, Refusal> {
        let Some(mut info) = self.task_info(&process)? else { return Ok(None) };
        let caller = requester.caller;
        // The writer's capabilities matter only for other processes.
        let writer = if process.id() == requester.process {
            User::without_capabilities(caller.uid)
        } else {
            *requester.writer.get_or_init(|| self.user(caller))
        };
        info.access = self.access(caller, writer, requester.process, &info, &process);
        check_permission(&info, [requester.opener, writer])?;
        Ok(Some(ResolvedTask { info, process, extent: Extent::Task }))
    }

    fn resolve_pid(
        &self,
        writer: &Arc<ProcessOf<P>>,
        named: Named,
    ) -> Result<Option<Arc<ProcessOf<P>>>, Refusal> {
        let Named::Number(pid) = named else { return Ok(Some(Arc::clone(writer))) };
        let fault = self.fault("opening the process");
        let is_own = pid.0.get() == writer.id().pid.get();
        if is_own && self.processes.shares_our_namespace(writer).map_err(&fault)? {
            return Ok(Some(Arc::clone(writer)));
        }
        let found = self.processes.with_pid_in_namespace_of(writer, pid).map_err(&fault)?;
        // Legacy clients in a container know themselves by their PID in the daemon's namespace.
        Ok(found.or_else(|| is_own.then(|| Arc::clone(writer))))
    }
}

/// Returns the PID of a command that names a single process by its PID.
pub(super) fn single_pid(tokens: &[Token]) -> Option<u32> {
    match tokens {
        [
            Token::Claim(Named::Number(pid))
            | Token::ClaimForCgroup(Named::Number(pid))
            | Token::Release(Named::Number(pid)),
        ] => Some(pid.0.get()),
        _ => None,
    }
}
