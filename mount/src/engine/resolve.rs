//! From the words of a command to the processes that they name.
//!
//! Owns the rule that a PID is valid in the PID namespace of its writer. Does not know what happens to the processes.

use std::collections::HashSet;
use std::sync::Arc;

use super::ports::{Ports, Process as _, Processes as _, Watch as _};
use super::{Engine, ProcessOf};
use crate::model::command::TaskInfo;
use crate::model::refusal::Refusal;
use crate::model::task::{Named, Token};

/// A process that a write names.
pub(super) struct ResolvedTask<P: Ports> {
    pub(super) info: TaskInfo,
    pub(super) process: Arc<ProcessOf<P>>,
}

/// The processes to claim for, and those to release.
pub(super) type Resolved<P> = (Vec<ResolvedTask<P>>, Vec<ResolvedTask<P>>);

impl<P: Ports> Engine<P> {
    /// Returns the live processes that the tokens name, each once: those to claim for and those to release.
    pub(super) fn resolve(
        &self,
        writer: &Arc<ProcessOf<P>>,
        tokens: &[Token],
    ) -> Result<Resolved<P>, Refusal> {
        let (mut claim, mut release): Resolved<P> = (Vec::new(), Vec::new());
        let mut seen = HashSet::new();
        for token in tokens.iter().filter(|token| seen.insert(**token)) {
            let (named, tasks) = match token {
                Token::Claim(named) => (named, &mut claim),
                Token::Release(named) => (named, &mut release),
            };
            let Some(process) = self.resolve_pid(writer, *named)? else { continue };
            // A watched process has a descriptor already.
            let process = self.processes.watched(&process.id()).unwrap_or(process);
            if tasks.iter().any(|task| task.info.task == process.id()) {
                continue;
            }
            if let Some(info) = self.task_info(&process)? {
                tasks.push(ResolvedTask { info, process });
            }
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
        [Token::Claim(Named::Number(pid)) | Token::Release(Named::Number(pid))] => Some(pid.0.get()),
        _ => None,
    }
}
