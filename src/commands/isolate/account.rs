//! The user whose rights the command gets (`--user`).
//!
//! Owns reading `/etc/passwd` and `/etc/group`, and becoming the user. Does not know the claim, which is made before, with the
//! rights of root. Users of other sources (LDAP) are not found: kcm is a static program, and cannot load their libraries.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use anyhow::{Error, anyhow, bail};
use nix::unistd::{Gid, Uid, geteuid, setgid, setgroups, setuid};

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// A user of this machine.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Account {
    name: String,
    uid: Uid,
    gid: Gid,
    /// All groups, the first one included.
    groups: Vec<Gid>,
    home: String,
    shell: String,
}

impl Account {
    /// Finds a user by name or number.
    ///
    /// # Errors
    /// There is no such user, or this process may not become another user.
    pub(super) fn find(wanted: &str) -> Result<Self, Error> {
        if !geteuid().is_root() {
            bail!("--user: only root can run a command as another user; run it as root");
        }
        let read =
            |path: &str| fs::read(Path::new(path)).map(|text| String::from_utf8_lossy(&text).into_owned());
        let passwd = read(PASSWD).map_err(|error| anyhow!("{PASSWD}: {error}; is it mounted?"))?;
        // Without the file there are no further groups.
        let groups = read(GROUP).unwrap_or_default();
        let found = Self::find_in(wanted, &passwd, &groups);
        found.ok_or_else(|| anyhow!("--user: {PASSWD} has no user {wanted}; name one of it"))
    }

    fn find_in(wanted: &str, passwd: &str, groups: &str) -> Option<Self> {
        let accounts = || passwd.lines().filter_map(Self::parse);
        let by_number = || accounts().find(|account| account.uid.to_string() == wanted);
        let mut account = accounts().find(|account| account.name == wanted).or_else(by_number)?;
        for line in groups.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            let [_, _, gid, members] = fields[..] else { continue };
            let Ok(gid) = gid.parse().map(Gid::from_raw) else { continue };
            if members.split(',').any(|member| member == account.name) && !account.groups.contains(&gid) {
                account.groups.push(gid);
            }
        }
        Some(account)
    }

    /// Parses a line of passwd(5), without further groups.
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, shell] = fields[..] else { return None };
        let gid = Gid::from_raw(gid.parse().ok()?);
        Some(Self {
            name: name.to_owned(),
            uid: Uid::from_raw(uid.parse().ok()?),
            gid,
            groups: vec![gid],
            home: home.to_owned(),
            shell: if shell.is_empty() { "/bin/sh" } else { shell }.to_owned(),
        })
    }

    /// Becomes this user, with its groups, and sets what its environment says about it, as runuser(1) does.
    ///
    /// # Errors
    /// This process may be another user than before.
    pub(super) fn become_it(&self, command: &mut Command) -> io::Result<()> {
        setgroups(&self.groups)?;
        setgid(self.gid)?;
        setuid(self.uid)?;
        let Self { name, home, shell, .. } = self;
        command.env("USER", name).env("LOGNAME", name).env("HOME", home).env("SHELL", shell);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &str = "root:x:0:0:root:/root:/bin/bash\nbroken:x:1\nalice:x:1000:100:,,,:/home/alice:\n\
                         4711:x:1001:1001::/:/bin/false\nbob:x:4711:1::/:/bin/zsh\n";
    const GROUPS: &str =
        "users:x:100:\nkvm:x:36:bob,alice\nbroken:x\nmalice:x:9:malice\nusers2:x:100:alice\n";

    fn find(wanted: &str) -> Option<(u32, Vec<u32>, String)> {
        let account = Account::find_in(wanted, USERS, GROUPS)?;
        let groups = account.groups.iter().map(|gid| gid.as_raw()).collect();
        Some((account.uid.as_raw(), groups, account.shell))
    }

    #[test]
    fn a_user_has_its_groups() {
        assert_eq!(find("alice"), Some((1000, vec![100, 36], "/bin/sh".into())));
        assert_eq!(find("1000"), find("alice"));
        assert_eq!(find("root"), Some((0, vec![0], "/bin/bash".into())));
    }

    #[test]
    fn a_name_comes_before_a_number() {
        assert_eq!(find("4711"), Some((1001, vec![1001], "/bin/false".into())));
        for unknown in ["carol", "1", "", "broken", "2000"] {
            assert_eq!(find(unknown), None, "{unknown:?}");
        }
    }
}
