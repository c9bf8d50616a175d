//! The objects in `deploy/`, and a server to which they have been applied.
//!
//! Owns reading the manifests. Does not know what the tests check.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

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

/// Starts a server with two nodes. Each role has a user of the same name, with the name as its token.
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
    server
}
