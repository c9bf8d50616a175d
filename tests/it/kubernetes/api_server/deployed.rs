//! The objects in `deploy/`, and a server to which they have been applied.
//!
//! Owns reading the manifests. Does not know what the tests check.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::admission::Admission;
use super::rights::Rights;
use super::{ApiServer, objects};

/// The objects of a manifest.
pub fn manifest(name: &str) -> Vec<Value> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(name);
    serde_saphyr::from_multiple(&fs::read_to_string(&file).expect(name)).expect(name)
}

pub fn of_kind(name: &str, kind: &str) -> Vec<Value> {
    manifest(name).into_iter().filter(|object| object["kind"] == kind).collect()
}

/// Returns the admission policies of `deploy/`, for pods on this node.
pub fn admission(node: Option<&str>) -> Admission {
    let policies = of_kind("admission.yaml", "ValidatingAdmissionPolicy");
    for policy in &policies {
        let name = &policy["metadata"]["name"];
        let bindings = of_kind("admission.yaml", "ValidatingAdmissionPolicyBinding");
        let binding =
            bindings.iter().find(|binding| binding["spec"]["policyName"] == *name).expect("a binding");
        assert_eq!(binding["spec"], json!({ "policyName": name, "validationActions": ["Deny"] }));
    }
    Admission::new(policies, "kcm-system", node)
}

/// Expands a word of `command` or `args` as a kubelet does: `$$` is `$`, `$(NAME)` the variable, if there is one.
pub fn expanded(text: &str, variables: &[(&str, &str)]) -> String {
    let (mut done, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once('$') {
        done.push_str(before);
        rest = after;
        if let Some(after) = rest.strip_prefix('$') {
            done.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            match variables.iter().find(|(known, _)| *known == name) {
                Some((_, value)) => done.push_str(value),
                None => done.push_str(&format!("$({name})")),
            }
            rest = after;
        } else {
            done.push('$');
        }
    }
    done + rest
}

/// Starts a server with two nodes and the admission policies, for pods on n1. Each role has a user of the same name, with
/// the name as its token.
pub fn deployed() -> ApiServer {
    let server = ApiServer::start();
    for role in of_kind("rbac.yaml", "ClusterRole") {
        let name = role["metadata"]["name"].as_str().unwrap();
        server.add_user(name, name, Rights::Rules(role["rules"].as_array().unwrap().clone()));
    }
    for mut definition in manifest("crds.yaml") {
        let name = definition["metadata"]["name"].as_str().unwrap().to_owned();
        definition["status"] = objects::established(&definition);
        server.put(&format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"), definition);
    }
    for name in ["n1", "n2"] {
        let node = json!({ "kind": "Node", "apiVersion": "v1", "metadata": { "name": name }, "status": {} });
        server.put(&format!("/api/v1/nodes/{name}"), node);
    }
    server.admit_by(admission(Some("n1")));
    server
}
