//! The pods of processes: which container of which pod of Kubernetes a process is in.
//!
//! Owns the forms of cgroup paths and of log names that the kubelet and container runtimes make. Does not know pools.
//!
//! The cgroup of a process comes from the kernel; a process without rights cannot leave the cgroup of its container, and below
//! it only the outermost pod of a path counts. The names are labels for people: they come from the names of links that the
//! kubelet makes for log files, and nothing is decided by them.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use super::Host;

/// The length of a container's ID: a hash in hexadecimal digits.
const ID_LENGTH: usize = 64;
/// The lengths of a pod's UID: a UUID, or a hash for a pod from a file on the node.
const UID_LENGTHS: [usize; 2] = [36, 32];

/// A container of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Container {
    id: String,
    /// The UID of the pod.
    uid: String,
    /// Whether the pod requests nothing, so that others come first. `false` if the path does not say it.
    pub(crate) is_best_effort: bool,
}

impl Host {
    /// Returns the container of a process; `None` if it is in no pod.
    pub(crate) fn container_of(&self, pid: u32) -> Option<Container> {
        let cgroups = fs::read_to_string(self.proc.join(format!("{pid}/cgroup"))).ok()?;
        // `number:controllers:path` (cgroups(7)). On v1 each hierarchy has a line, with the same path.
        cgroups.lines().find_map(|line| container_in(line.splitn(3, ':').nth(2)?))
    }
}

/// Returns the container in the path of a cgroup.
///
/// ```text
/// /kubepods/besteffort/pod<UID>/<ID>                                      the driver cgroupfs
/// /kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<UID with _ for ->.slice/cri-containerd-<ID>.scope
/// /../../pod<UID>/<ID>                                                    seen from another cgroup namespace
/// ```
fn container_in(path: &str) -> Option<Container> {
    let parts: Vec<&str> = path.split('/').collect();
    let (at, uid) = parts.iter().enumerate().find_map(|(at, part)| Some((at, pod_uid(part)?)))?;
    let (above, below) = parts.split_at_checked(at + 1)?;
    // Users may make such names in their own part of the tree.
    if above.contains(&"user.slice") {
        return None;
    }
    let id = below.iter().find_map(|part| container_id(part))?;
    let is_best_effort = above.iter().any(|part| part.contains("besteffort"));
    Some(Container { id: id.to_owned(), uid, is_best_effort })
}

/// Returns the UID in `pod<UID>` or `<anything>-pod<UID>.slice`.
fn pod_uid(part: &str) -> Option<String> {
    let uid = match part.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        None => part.strip_prefix("pod")?.to_owned(),
    };
    let is_uid = UID_LENGTHS.contains(&uid.len()) && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    is_uid.then_some(uid)
}

/// Returns the ID in `<ID>` or `<runtime>-<ID>.scope`.
fn container_id(part: &str) -> Option<&str> {
    let name = part.strip_suffix(".scope").unwrap_or(part);
    let id = name.rsplit_once('-').map_or(name, |(_, id)| id);
    is_id(id).then_some(id)
}

fn is_id(text: &str) -> bool {
    text.len() == ID_LENGTH && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The names of pods and containers, by the IDs of containers.
#[derive(Debug, Default)]
pub(crate) struct Names(HashMap<String, (String, String)>);

impl Names {
    /// Reads the names of the links in the kubelet's directory of container logs. Nothing else of them is read. Without the
    /// directory there are no names.
    pub(crate) fn read(logs: &Path) -> Self {
        let entries = fs::read_dir(logs).into_iter().flatten().filter_map(Result::ok);
        Self(entries.filter_map(|entry| of_log(entry.file_name().to_str()?)).collect())
    }

    /// Returns `namespace/name` of the pod and the name of the container; the UID and the ID if they have no names.
    pub(crate) fn of(&self, container: &Container) -> (String, String) {
        self.0.get(&container.id).cloned().unwrap_or_else(|| (container.uid.clone(), container.id.clone()))
    }
}

/// Parses `<pod>_<namespace>_<container>-<ID>.log`.
fn of_log(name: &str) -> Option<(String, (String, String))> {
    let (names, id) = name.strip_suffix(".log")?.rsplit_once('-')?;
    let mut names = names.split('_');
    let (pod, namespace, container) = (names.next()?, names.next()?, names.next()?);
    let is_name = |name: &str| {
        !name.is_empty()
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b))
    };
    let are_names = names.next().is_none() && [pod, namespace, container].into_iter().all(is_name);
    (are_names && is_id(id)).then(|| (id.to_owned(), (format!("{namespace}/{pod}"), container.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "8c4d93c1-01d0-4d0b-9e2a-6a1d5f1f3a77";
    const STATIC_UID: &str = "0123456789abcdef0123456789abcdef";

    fn id() -> String {
        "3f".repeat(32)
    }

    #[test]
    fn each_driver_and_runtime_has_its_paths() {
        let (id, under) = (id(), UID.replace('-', "_"));
        let slice =
            |class: &str| format!("/kubepods.slice/kubepods-{class}.slice/kubepods-{class}-pod{under}.slice");
        let best_effort = slice("besteffort");
        for (path, uid, is_best_effort) in [
            (format!("/kubepods/pod{UID}/{id}"), UID, false),
            (format!("/kubepods/burstable/pod{UID}/{id}"), UID, false),
            (format!("/kubepods/besteffort/pod{UID}/{id}"), UID, true),
            (format!("/kubepods.slice/kubepods-pod{under}.slice/cri-containerd-{id}.scope"), UID, false),
            (format!("{}/cri-containerd-{id}.scope", slice("burstable")), UID, false),
            (format!("{best_effort}/crio-{id}.scope"), UID, true),
            (format!("{best_effort}/docker-{id}.scope"), UID, true),
            (format!("{best_effort}/crio-{id}.scope/container/kcm-4"), UID, true),
            (format!("/kubepods/burstable/pod{STATIC_UID}/{id}"), STATIC_UID, false),
            // A node in a container, and a reader in another cgroup namespace.
            (
                format!(
                    "/system.slice/docker-{id}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{under}.slice/cri-containerd-{id}.scope"
                ),
                UID,
                true,
            ),
            (format!("/../../pod{UID}/{id}"), UID, false),
            (format!("/../../kubepods-besteffort-pod{under}.slice/cri-containerd-{id}.scope"), UID, true),
        ] {
            let expected = Container { id: id.clone(), uid: uid.to_owned(), is_best_effort };
            assert_eq!(container_in(&path), Some(expected), "{path}");
        }
    }

    #[test]
    fn other_paths_are_of_no_pod() {
        let id = id();
        for path in [
            "/".to_owned(),
            "/system.slice/sshd.service".to_owned(),
            format!("/system.slice/docker-{id}.scope"),
            format!("/kubepods/burstable/pod{UID}"),
            format!("/kubepods/burstable/podium/{id}"),
            format!("/kubepods/burstable/pod{UID}/short"),
            format!("/user.slice/user-1000.slice/user@1000.service/kubepods/pod{UID}/{id}"),
        ] {
            assert_eq!(container_in(&path), None, "{path}");
        }
    }

    #[test]
    fn a_pod_within_a_pod_is_the_outer_one() {
        let (id, inner) = (id(), "ab".repeat(32));
        let path = format!("/kubepods/pod{UID}/{id}/kubepods/besteffort/pod{STATIC_UID}/{inner}");
        let expected = Container { id, uid: UID.to_owned(), is_best_effort: false };
        assert_eq!(container_in(&path), Some(expected));
    }

    #[test]
    fn names_come_from_the_links_to_logs() {
        let (id, logs) = (id(), tempfile::tempdir().unwrap());
        for name in [
            format!("fwd-7d_default_main-{id}.log"),
            format!("a_b_c_d-{id}.log"),
            "notes.txt".to_owned(),
            "x_y_z-12.log".to_owned(),
            format!("x\n_y_z-{}.log", "ab".repeat(32)),
        ] {
            // A link to nowhere: only its name is read.
            std::os::unix::fs::symlink("/nowhere", logs.path().join(name)).unwrap();
        }
        let names = Names::read(logs.path());
        assert_eq!(names.0.len(), 1);
        let container = Container { id, uid: UID.to_owned(), is_best_effort: false };
        assert_eq!(names.of(&container), ("default/fwd-7d".to_owned(), "main".to_owned()));
        let none = Names::read(Path::new("/nowhere")).of(&container);
        assert_eq!(none, (container.uid, container.id));
    }
}
