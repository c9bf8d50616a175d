//! The facts on which rights depend: the capabilities of openers and writers, and what a writer has over a process.
//!
//! Owns when they are asked: a process that claims for itself needs none of them. Does not know the rules, which are
//! in the model.

use super::ports::{Ports, Process as _, Processes as _};
use super::{Caller, Engine, ProcessOf};
use crate::model::command::{TaskInfo, Uids};
use crate::model::refusal::Refusal;
use crate::model::rights::{Access, User};
use crate::model::task::TaskId;

impl<P: Ports> Engine<P> {
    /// Checks that the caller may configure, and read events.
    ///
    /// # Errors
    /// `EPERM` unless the caller's thread has `CAP_SYS_ADMIN` in the user namespace of the daemon.
    pub(crate) fn require_admin(&self, caller: Caller) -> Result<(), Refusal> {
        self.user(caller).require_admin()
    }

    /// Checks that the caller and the user who opened the file may configure.
    ///
    /// # Errors
    /// `EPERM` unless both have the capability.
    pub(super) fn require_admins(&self, caller: Caller, opener: User) -> Result<(), Refusal> {
        self.require_admin(caller)?;
        opener.require_admin()
    }

    /// Returns whether the caller may know everything about other users' processes.
    pub(crate) fn is_admin(&self, caller: Caller) -> bool {
        self.require_admin(caller).is_ok()
    }

    /// Returns the caller with its capabilities.
    pub(crate) fn user(&self, caller: Caller) -> User {
        self.processes.user(caller.tid, caller.uid)
    }

    /// Returns what the right of `writer` over a process depends on. `own` is the writer's process.
    pub(super) fn access(
        &self,
        caller: Caller,
        writer: User,
        own: TaskId,
        info: &TaskInfo,
        process: &ProcessOf<P>,
    ) -> Access {
        let Uids { real, effective, .. } = info.uids;
        let is_writer = process.id() == own;
        let has_right = is_writer || writer.nice;
        // For the opener of the file, only the capabilities of a set-user-ID program matter.
        let permitted = if has_right && real == effective { 0 } else { self.processes.permitted(process) };
        let is_owner = writer.uid == real || writer.uid == effective;
        let is_enough = is_owner && permitted & !writer.permitted == 0;
        let is_covered =
            !has_right && !is_enough && self.processes.is_covered(caller.tid, caller.uid, process);
        Access { is_writer, is_covered, permitted }
    }
}
