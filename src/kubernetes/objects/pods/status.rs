//! The meaning of a pod's status.
//!
//! Owns how a pod compares with its goal and with its plan. Does not know what is in a pod.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use serde_json::Value;

use super::Goal;

/// How far a pod is from its goal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It has not reached its goal yet, for this reason.
    Waiting(String),
    Done,
    /// It will not reach its goal.
    Failed {
        container: Option<String>,
        reason: String,
    },
}

/// Reasons for which a container is waiting and will not start.
const FATAL_WAITING_REASONS: [&str; 5] = [
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
    "CreateContainerError",
    "CrashLoopBackOff",
];

/// Compares the status of a pod with its goal.
pub(crate) fn state(pod: &Pod, goal: Goal) -> State {
    let Some(status) = &pod.status else { return State::Waiting("Pending".into()) };
    let containers = status.container_statuses.as_deref().unwrap_or_default();
    let init_containers = status.init_container_statuses.as_deref().unwrap_or_default();
    let mut waiting = None;
    for container in init_containers.iter().chain(containers) {
        if let Some(reason) = fatal_reason(container, goal) {
            return State::Failed { container: Some(container.name.clone()), reason };
        }
        if let Some(reason) = waiting_reason(container) {
            waiting.get_or_insert(format!("{}: {reason}", container.name));
        }
    }
    let mut conditions = status.conditions.iter().flatten();
    let is_unready = conditions.any(|condition| condition.type_ == "Ready" && condition.status == "False");
    let is_ready = containers.iter().all(|container| container.ready) && !is_unready;
    match (status.phase.as_deref().unwrap_or("Pending"), goal) {
        ("Succeeded", Goal::Succeeded) => State::Done,
        ("Running", Goal::Running) if is_ready => State::Done,
        ("Failed", _) | ("Succeeded", Goal::Running) => {
            let reason: Vec<&str> =
                [&status.reason, &status.message].into_iter().flatten().map(String::as_str).collect();
            let reason = if reason.is_empty() { "it has ended".into() } else { reason.join(": ") };
            State::Failed { container: None, reason }
        }
        (phase, _) => State::Waiting(waiting.unwrap_or_else(|| phase.into())),
    }
}

/// Returns why a container is waiting.
fn waiting_reason(container: &ContainerStatus) -> Option<String> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let reason = waiting.reason.clone()?;
    Some([Some(reason), waiting.message.clone()].into_iter().flatten().collect::<Vec<_>>().join(": "))
}

/// Returns why a container keeps its pod from reaching the goal.
fn fatal_reason(container: &ContainerStatus, goal: Goal) -> Option<String> {
    if let Some(reason) = waiting_reason(container)
        && FATAL_WAITING_REASONS.iter().any(|fatal| reason.starts_with(fatal))
    {
        return Some(reason);
    }
    let ended = container.state.as_ref()?.terminated.as_ref()?;
    if ended.exit_code == 0 || goal != Goal::Succeeded {
        return None;
    }
    Some(format!("{} (exit code {})", ended.reason.as_deref().unwrap_or("Error"), ended.exit_code))
}

/// Returns the first field in which an existing pod differs from a planned one. Fields that the server has added do
/// not count.
pub(crate) fn difference(existing: &Pod, wanted: &Pod) -> Option<String> {
    let [existing, wanted] = [existing, wanted].map(|pod| serde_json::to_value(pod).unwrap_or_default());
    ["/metadata/labels", "/spec"].into_iter().find_map(|part| {
        let [existing, wanted] = [&existing, &wanted].map(|pod| pod.pointer(part).unwrap_or(&Value::Null));
        let path = part.trim_start_matches('/').replace('/', ".");
        different_field(existing, wanted, &path)
    })
}

fn different_field(existing: &Value, wanted: &Value, path: &str) -> Option<String> {
    match (existing, wanted) {
        (Value::Object(existing), Value::Object(wanted)) => wanted.iter().find_map(|(name, wanted)| {
            let path = format!("{path}.{name}");
            match existing.get(name) {
                Some(existing) => different_field(existing, wanted, &path),
                None => Some(path),
            }
        }),
        // A server adds items only at the end, such as a volume with the token.
        (Value::Array(existing), Value::Array(wanted)) => {
            wanted.iter().enumerate().find_map(|(index, wanted)| {
                let path = format!("{path}[{index}]");
                match existing.get(index) {
                    Some(existing) => different_field(existing, wanted, &path),
                    None => Some(path),
                }
            })
        }
        _ => (existing != wanted).then(|| path.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use k8s_openapi::api::core::v1::{Container, PodSpec};

    use super::*;

    fn pod(status: Value) -> Pod {
        serde_json::from_value(json!({ "metadata": { "name": "p" }, "status": status })).unwrap()
    }

    fn failed(container: Option<&str>, reason: &str) -> State {
        State::Failed { container: container.map(Into::into), reason: reason.into() }
    }

    #[test]
    fn a_pod_that_runs_is_done_once_its_containers_are_ready() {
        let running = |ready: bool| {
            pod(json!({ "phase": "Running", "containerStatuses": [{ "name": "c", "ready": ready }] }))
        };
        assert_eq!(state(&running(true), Goal::Running), State::Done);
        assert_eq!(state(&running(false), Goal::Running), State::Waiting("Running".into()));
        assert_eq!(state(&running(true), Goal::Succeeded), State::Waiting("Running".into()));
        let not_ready = json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": "False" }] });
        assert_eq!(state(&pod(not_ready), Goal::Running), State::Waiting("Running".into()));
        assert_eq!(state(&pod(json!({})), Goal::Running), State::Waiting("Pending".into()));
    }

    #[test]
    fn a_pod_that_has_ended_is_done_or_failed() {
        let ended = |phase: &str| pod(json!({ "phase": phase }));
        assert_eq!(state(&ended("Succeeded"), Goal::Succeeded), State::Done);
        assert_eq!(state(&ended("Succeeded"), Goal::Running), failed(None, "it has ended"));
        let evicted = pod(json!({ "phase": "Failed", "reason": "Evicted", "message": "low on memory" }));
        assert_eq!(state(&evicted, Goal::Running), failed(None, "Evicted: low on memory"));
    }

    #[test]
    fn a_container_that_will_not_start_fails_its_pod() {
        let waiting = |reason: &str| {
            let state = json!({ "waiting": { "reason": reason, "message": "m" } });
            pod(json!({ "containerStatuses": [{ "name": "c", "state": state }] }))
        };
        for reason in FATAL_WAITING_REASONS {
            assert_eq!(state(&waiting(reason), Goal::Running), failed(Some("c"), &format!("{reason}: m")));
        }
        let expected = State::Waiting("c: ContainerCreating: m".into());
        assert_eq!(state(&waiting("ContainerCreating"), Goal::Running), expected);
    }

    #[test]
    fn an_exit_code_fails_only_a_pod_that_should_succeed() {
        let ended = |code: i32| {
            let state = json!({ "terminated": { "exitCode": code } });
            pod(json!({ "phase": "Running", "initContainerStatuses": [{ "name": "init", "state": state }] }))
        };
        assert_eq!(state(&ended(1), Goal::Succeeded), failed(Some("init"), "Error (exit code 1)"));
        assert_eq!(state(&ended(0), Goal::Succeeded), State::Waiting("Running".into()));
        assert_eq!(state(&ended(1), Goal::Running), State::Done);
    }

    #[test]
    fn fields_that_the_server_adds_are_no_difference() {
        let container =
            |image: &str| Container { name: "c".into(), image: Some(image.into()), ..Default::default() };
        let pod = |containers: Vec<Container>| Pod {
            spec: Some(PodSpec { containers, ..Default::default() }),
            ..Default::default()
        };
        let wanted = pod(vec![container("i")]);
        let mut existing = pod(vec![container("i"), container("added")]);
        existing.spec.as_mut().unwrap().priority = Some(0);
        assert_eq!(difference(&existing, &wanted), None);
        let other = pod(vec![container("j")]);
        assert_eq!(difference(&other, &wanted), Some("spec.containers[0].image".into()));
        assert_eq!(difference(&pod(Vec::new()), &wanted), Some("spec.containers[0]".into()));
    }
}
