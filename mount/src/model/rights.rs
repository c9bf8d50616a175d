//! Who may set the affinity of which process: the rules of `sched_setaffinity(2)`, for the opener of a file and for
//! the writer.
//!
//! Owns these rules. Does not know how the credentials of a process are found out.
//!
//! The kernel asks two questions (kernel/sched/syscalls.c, `sched_setaffinity`; security/commoncap.c,
//! `cap_safe_nice`). A capability answers both: `CAP_SYS_NICE` in the user namespace of the target. Without it, the
//! caller's effective uid must be the real or the effective uid of the target, and the target must not have a
//! capability that the caller does not have: so nobody pins a set-user-ID program that he started.

use super::refusal::Refusal;

/// The user ids of a process (credentials(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uids {
    /// The real uid.
    pub real: u32,
    /// The effective uid.
    pub effective: u32,
    /// The saved uid.
    pub saved: u32,
}

impl Uids {
    /// Whether it is root or can become root, and then any other user.
    #[must_use]
    pub fn may_be_root(&self) -> bool {
        [self.real, self.effective, self.saved].contains(&0)
    }
}

/// A user who opened a file or writes to it. A uid alone gives no right over others, not even the uid 0: in a
/// container it may be without any capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// The uid for access to files, as the kernel sends it with a request.
    pub uid: u32,
    /// Whether it has `CAP_SYS_ADMIN` in the user namespace of the daemon.
    pub admin: bool,
    /// Whether it has `CAP_SYS_NICE` in the user namespace of the daemon.
    pub nice: bool,
    /// Its permitted capabilities; empty if that was not asked.
    pub permitted: u64,
}

impl User {
    /// Returns a user without any capability.
    #[must_use]
    pub fn without_capabilities(uid: u32) -> Self {
        Self { uid, ..Self::default() }
    }

    /// # Errors
    /// `EPERM` unless the user has `CAP_SYS_ADMIN` in the user namespace of the daemon.
    pub(crate) fn require_admin(&self) -> Result<(), Refusal> {
        if self.admin { Ok(()) } else { Err(Refusal::NotAdmin) }
    }
}

/// Facts about a process on which a writer's right over it depends. The default is a process that has no capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Whether the process is the writer itself.
    pub is_writer: bool,
    /// Whether the writer has `CAP_SYS_NICE` over the process in a user namespace below the daemon's.
    pub is_covered: bool,
    /// The permitted capabilities of the process; empty if they make no difference.
    pub permitted: u64,
}

/// Checks that the opener and the writer may set the affinity of a process.
///
/// Both need the right. Otherwise a user could open the file, and make a program with more rights write to it
/// (CVE-2021-4197). The opener's capabilities are those in the daemon's user namespace. In a namespace below it, an
/// opener counts as the writer if both have the same uid: the writer's right ends at that namespace.
///
/// # Errors
/// [`Refusal::NotPermitted`] with the one who may not.
pub(super) fn check([opener, writer]: [User; 2], uids: Uids, access: Access) -> Result<(), Refusal> {
    let owns = |user: User| user.uid == uids.real || user.uid == uids.effective;
    let opener_may = opener.nice
        || access.is_covered && opener.uid == writer.uid
        || owns(opener) && (access.permitted == 0 || uids.real == uids.effective);
    let writer_may = access.is_writer
        || writer.nice
        || access.is_covered
        || owns(writer) && access.permitted & !writer.permitted == 0;
    match (opener_may, writer_may) {
        (true, true) => Ok(()),
        (true, false) => Err(Refusal::NotPermitted { uid: writer.uid }),
        (false, _) => Err(Refusal::NotPermitted { uid: opener.uid }),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const USER: u32 = 1000;
    /// `CAP_NET_BIND_SERVICE`.
    const SMALL: u64 = 1 << 10;

    /// The user with this uid on a machine without containers: root has all capabilities, and nobody else any.
    impl From<u32> for User {
        fn from(uid: u32) -> Self {
            let is_root = uid == 0;
            Self { uid, admin: is_root, nice: is_root, permitted: if is_root { u64::MAX } else { 0 } }
        }
    }

    fn uids(real: u32, effective: u32) -> Uids {
        Uids { real, effective, saved: effective }
    }

    fn root_without_capabilities() -> User {
        User::without_capabilities(0)
    }

    #[test]
    fn the_rules_are_those_of_the_kernel() {
        let [root, user, other] = [0, USER, 7].map(User::from);
        let bare = root_without_capabilities();
        let nice = User { nice: true, permitted: 1 << 23, ..user };
        let small = User { permitted: SMALL, ..user };
        let plain = Access::default();
        let own = Access { is_writer: true, ..plain };
        let covered = Access { is_covered: true, permitted: u64::MAX, ..plain };
        let permitted = |permitted| Access { permitted, ..plain };
        for (opener, writer, uids, access, refused) in [
            (root, root, uids(USER, USER), permitted(u64::MAX), None),
            (user, user, uids(USER, USER), plain, None),
            (user, user, uids(USER, 7), plain, None),
            (user, user, uids(7, USER), plain, None),
            (user, user, uids(7, 7), plain, Some(USER)),
            (nice, nice, uids(0, 0), permitted(u64::MAX), None),
            // The uid 0 without capabilities is a user like others.
            (bare, bare, uids(USER, USER), plain, Some(0)),
            (bare, bare, uids(0, 0), plain, None),
            (bare, bare, uids(0, 0), permitted(u64::MAX), Some(0)),
            (bare, bare, uids(0, 0), Access { is_writer: true, permitted: u64::MAX, ..plain }, None),
            (root, bare, uids(7, 7), plain, Some(0)),
            (bare, root, uids(7, 7), plain, Some(0)),
            // A set-user-ID program, and one with file capabilities.
            (user, user, uids(USER, 0), permitted(u64::MAX), Some(USER)),
            (root, user, uids(USER, 0), permitted(u64::MAX), Some(USER)),
            (user, root, uids(USER, 0), permitted(u64::MAX), Some(USER)),
            (user, root, uids(USER, 0), Access { permitted: u64::MAX, ..own }, Some(USER)),
            (user, user, uids(USER, USER), permitted(SMALL), Some(USER)),
            (small, small, uids(USER, USER), permitted(SMALL), None),
            (small, small, uids(USER, USER), permitted(SMALL | 1), Some(USER)),
            // A container with a user namespace.
            (user, user, uids(7, 7), covered, None),
            (other, user, uids(9, 9), covered, Some(7)),
            (root, user, uids(7, 7), covered, None),
            // Each of the two needs the right.
            (other, user, uids(USER, USER), plain, Some(7)),
            (user, other, uids(USER, USER), plain, Some(7)),
            (other, root, uids(USER, USER), plain, Some(7)),
            (other, user, uids(USER, USER), own, Some(7)),
        ] {
            let expected = refused.map_or(Ok(()), |uid| Err(Refusal::NotPermitted { uid }));
            let case = format!("opener {opener:?}, writer {writer:?}, process of {uids:?}, {access:?}");
            assert_eq!(check([opener, writer], uids, access), expected, "{case}");
        }
    }

    #[test]
    fn only_the_capability_configures() {
        assert_eq!(User::from(0).require_admin(), Ok(()));
        assert_eq!(User { admin: true, ..User::from(USER) }.require_admin(), Ok(()));
        assert_eq!(root_without_capabilities().require_admin(), Err(Refusal::NotAdmin));
        assert_eq!(User { nice: true, ..User::from(0) }.require_admin(), Ok(()));
        assert_eq!(User { admin: false, ..User::from(0) }.require_admin(), Err(Refusal::NotAdmin));
    }
}
