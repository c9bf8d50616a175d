//! The ancestors of a process in its PID namespace.
//!
//! Owns the walk from a process to its parent, its parent, and so on. Does not know why somebody looks for them.
//!
//! One ancestor costs about 2 us: it is opened, asked for its parent and closed. The cache of pidfds is left to
//! processes that send requests.

use super::namespace::Namespace;
use super::{Process, Processes, sys};
use crate::model::task::{Pid, TaskId};

impl Processes {
    /// Calls `visit` with the parent, its parent, and so on, until it returns false, has seen the first process of the
    /// PID namespace, or has seen `most` ancestors. PID 1 of the machine is left out: it says nothing about other
    /// processes.
    pub(crate) fn walk_ancestors(&self, from: &Process, most: usize, mut visit: impl FnMut(TaskId) -> bool) {
        let Ok(is_ours) = self.shares_namespace(from) else { return };
        let namespace = if is_ours { None } else { self.namespace(from).ok().flatten() };
        if !is_ours && (namespace.is_none() || self.is_namespace_init(from)) {
            return;
        }
        let mut parent = self.parent(from);
        for _ in 0..most {
            let Some(pid) = parent.filter(|pid| pid.get() != 1) else { return };
            // It is alive: the children of a dead process have another parent.
            let Ok(Some(ancestor)) = self.identify(pid) else { return };
            // The kernel names no parent outside the daemon's namespace. A process in it has all its ancestors in it
            // or above it.
            let number = match &namespace {
                None => pid.get(),
                Some(namespace) => match self.number_in(namespace, from, &ancestor) {
                    Some(number) => number,
                    None => return,
                },
            };
            let next = self.parent(&ancestor);
            if !visit(ancestor.id()) || number == 1 {
                return;
            }
            parent = next;
        }
    }

    /// Returns the parent; `None` if the process has died, or its parent is outside the daemon's namespace.
    fn parent(&self, process: &Process) -> Option<Pid> {
        if self.features.info {
            return Pid::new(sys::pidfd_info(process.pidfd(), sys::INFO_PID).ok()?.ppid);
        }
        self.facts(process).ok().flatten()?.parent
    }

    /// Returns the PID of an ancestor in the namespace of `from`; `None` if it is outside.
    fn number_in(&self, namespace: &Namespace, from: &Process, ancestor: &Process) -> Option<u32> {
        if self.features.translation {
            return namespace.number_of(ancestor.id().pid).ok().flatten();
        }
        let pid: Pid = ancestor.id().pid;
        self.number_in_namespace_of(from, pid).filter(|_| self.same_namespace(from, ancestor))
    }
}
