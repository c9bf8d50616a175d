//! The cgroups of a process: one in each hierarchy (cgroups(7)).
//!
//! Owns the text of `/proc/PID/cgroup`, and which cgroup is below which. Does not know the kernel's numbers of cgroups.

use std::collections::BTreeMap;
use std::fmt;

/// The cgroup of a process in each hierarchy of the machine: one with cgroup v2, about a dozen with cgroup v1.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cgroups {
    /// The path in each hierarchy, as the daemon's cgroup namespace shows it. The name of a hierarchy is that of its
    /// controllers; it is empty for cgroup v2.
    paths: BTreeMap<Box<str>, Box<str>>,
    /// The paths as they are printed. Each claim is recorded with them.
    printed: Box<str>,
}

impl Cgroups {
    /// Parses the text of `/proc/PID/cgroup`: lines like `4:memory:/system.slice`.
    ///
    /// Bytes that are not printable ASCII become escapes, so that different paths stay different. The kernel accepts no
    /// newline in the name of a cgroup.
    ///
    /// ```
    /// use kcm_mount::model::cgroup::Cgroups;
    /// let cgroups = Cgroups::parse(b"2:cpu:/\n1:cpuset:/\n0::/user.slice\n");
    /// assert_eq!(cgroups.to_string(), "cpu;cpuset:/\n:/user.slice");
    /// ```
    #[must_use]
    pub fn parse(text: &[u8]) -> Self {
        let line = |line: &[u8]| {
            let mut fields = line.splitn(3, |&b| b == b':').skip(1);
            let (names, path) = (fields.next()?, fields.next()?);
            Some((escaped(names), escaped(path)))
        };
        Self::new(text.split(|&b| b == b'\n').filter_map(line).collect())
    }

    /// Parses what [`Cgroups`] prints.
    #[must_use]
    pub fn from_printed(text: &str) -> Self {
        let line = |line: &str| {
            let (names, path) = line.split_once(':')?;
            let path: Box<str> = path.into();
            Some(names.split(';').map(|name| (name.into(), path.clone())).collect::<Vec<_>>())
        };
        Self::new(text.lines().filter_map(line).flatten().collect())
    }

    fn new(paths: BTreeMap<Box<str>, Box<str>>) -> Self {
        Self { printed: print(&paths).into(), paths }
    }

    /// Whether each of these cgroups is the one of `other` in the same hierarchy or one below it.
    #[must_use]
    pub fn are_within(&self, other: &Self) -> bool {
        // A hierarchy that was mounted meanwhile or is no longer there says nothing.
        let mut both =
            other.paths.iter().filter_map(|(name, above)| Some((self.paths.get(name)?, above))).peekable();
        both.peek().is_some() && both.all(|(path, above)| is_within(path, above))
    }

    /// Whether all of them are the root of their hierarchy, of which every process of the machine is within.
    ///
    /// A daemon in a cgroup namespace does not see the root of the machine. There the root of the namespace and the
    /// cgroups above it count.
    #[must_use]
    pub fn are_root(&self) -> bool {
        self.paths.values().all(|path| split(path).1.is_empty())
    }

    /// The paths.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.paths.values().map(|path| &**path)
    }
}

/// One line for each path, with the hierarchies that have it, separated by semicolons.
impl fmt::Display for Cgroups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.printed)
    }
}

fn print(paths: &BTreeMap<Box<str>, Box<str>>) -> String {
    let mut by_path: Vec<(&str, String)> = Vec::new();
    // The hierarchy of cgroup v2 comes last, because its name is empty.
    for (name, path) in paths.iter().rev() {
        match by_path.iter_mut().find(|(other, _)| *other == &**path) {
            Some((_, names)) => *names = format!("{name};{names}"),
            None => by_path.push((path, name.to_string())),
        }
    }
    let lines: Vec<String> = by_path.iter().map(|(path, names)| format!("{names}:{path}")).collect();
    lines.join("\n")
}

fn escaped(bytes: &[u8]) -> Box<str> {
    bytes.escape_ascii().to_string().into()
}

/// Splits a path into how many cgroups above the root of the daemon's cgroup namespace it begins (`/..` for each), and
/// the rest; the rest of the root is empty.
fn split(path: &str) -> (usize, &str) {
    let (mut above, mut rest) = (0, path);
    while let Some(next) = rest.strip_prefix("/..").filter(|next| next.is_empty() || next.starts_with('/')) {
        (above, rest) = (above + 1, next);
    }
    (above, if rest == "/" { "" } else { rest })
}

fn is_within(path: &str, other: &str) -> bool {
    let ((up, path), (other_up, other)) = (split(path), split(other));
    if other.is_empty() {
        return up <= other_up;
    }
    let below = path.strip_prefix(other);
    up == other_up && below.is_some_and(|below| below.is_empty() || below.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &[u8] = b"9:name=systemd:/\n8:pids:/a\n3:cpuset:/\n4:cpu,cpuacct:/a\n0::/u/b\n";

    fn v2(path: &str) -> Cgroups {
        Cgroups::parse(format!("0::{path}\n").as_bytes())
    }

    #[test]
    fn within_means_the_same_or_below() {
        for (path, other, expected) in [
            ("/", "/", true),
            ("/a", "/", true),
            ("/a", "/a", true),
            ("/a/b", "/a", true),
            ("/a/b/c", "/a", true),
            ("/", "/a", false),
            ("/ab", "/a", false),
            ("/b", "/a", false),
            ("/a", "/a/b", false),
            // Seen from a cgroup namespace.
            ("/", "/..", true),
            ("/..", "/", false),
            ("/a", "/..", true),
            ("/../b", "/..", true),
            ("/../b/c", "/../b", true),
            ("/../b", "/../../b", false),
            ("/../../b", "/..", false),
            ("/..b", "/", true),
            ("/..b", "/..", true),
            ("/a/../b", "/a", true),
        ] {
            assert_eq!(v2(path).are_within(&v2(other)), expected, "{path} within {other}");
        }
    }

    #[test]
    fn every_hierarchy_counts() {
        let parse = |text: &str| Cgroups::parse(text.as_bytes());
        let holder = parse("2:pids:/a\n1:cpuset:/\n0::/u");
        assert!(parse("2:pids:/a/b\n1:cpuset:/c\n0::/u").are_within(&holder));
        assert!(!parse("2:pids:/a\n1:cpuset:/\n0::/v").are_within(&holder), "beside it in one of them");
        assert!(!holder.are_root() && parse("2:pids:/\n1:cpuset:/\n0::/").are_root());
        assert!(v2("/..").are_root() && !v2("/../a").are_root());
        // Another set of hierarchies.
        assert!(parse("2:pids:/a\n0::/u\n7:misc:/x").are_within(&holder));
        assert!(!parse("7:misc:/x").are_within(&holder), "nothing in common");
        assert!(!parse("").are_within(&parse("")), "nothing is known");
    }

    #[test]
    fn the_printed_form_is_short_and_read_again() {
        let hybrid = Cgroups::parse(HYBRID);
        assert_eq!(hybrid.to_string(), "cpu,cpuacct;pids:/a\ncpuset;name=systemd:/\n:/u/b");
        let odd = Cgroups::parse(b"1:name=a:b:/x\n0::/\xff \x01:;\\");
        assert_eq!(odd.to_string(), "name=a:b:/x\n:/\\xff \\x01:;\\\\");
        for cgroups in [hybrid, v2("/a/b"), v2("/"), Cgroups::default()] {
            assert_eq!(Cgroups::from_printed(&cgroups.to_string()), cgroups);
        }
        assert_ne!(Cgroups::parse(b"0::/\xff"), Cgroups::parse(b"0::/\xfe"));
    }
}
