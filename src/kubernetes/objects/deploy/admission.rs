//! `admission.yaml`: the account of nodes may change only the node of its pod.
//!
//! Owns the policies and their expressions. A role cannot say this: it names objects, and each node has another name. Tests
//! evaluate the expressions for the requests that kcm sends.

use k8s_openapi::api::admissionregistration::v1::{
    MatchCondition, MatchResources, NamedRuleWithOperations, ValidatingAdmissionPolicy,
    ValidatingAdmissionPolicyBinding, ValidatingAdmissionPolicyBindingSpec, ValidatingAdmissionPolicySpec,
    Validation, Variable,
};

use super::{GROUP, NAMESPACE, NODE_ACCOUNT, header, named, yaml};

/// The name of the node in the claims of a pod's token.
const NODE: &str = "has(request.userInfo.extra) \
                    && 'authentication.kubernetes.io/node-name' in request.userInfo.extra \
                    ? request.userInfo.extra['authentication.kubernetes.io/node-name'][0] : ''";

/// Resources, and the operations on them that are checked.
struct Checked {
    group: &'static str,
    resources: &'static [&'static str],
    operations: &'static [&'static str],
}

/// A policy with the binding of the same name.
fn policy(name: &str, checked: &[Checked], expression: &str) -> String {
    let words = |words: &[&str]| Some(words.iter().map(|word| (*word).to_owned()).collect());
    let rule = |checked: &Checked| NamedRuleWithOperations {
        api_groups: words(&[checked.group]),
        api_versions: words(&["v1"]),
        operations: words(checked.operations),
        resources: words(checked.resources),
        ..Default::default()
    };
    let is_ours = format!("request.userInfo.username == 'system:serviceaccount:{NAMESPACE}:{NODE_ACCOUNT}'");
    let validation = |expression: &str, message: &str| Validation {
        expression: expression.into(),
        message: Some(message.into()),
        ..Default::default()
    };
    let spec = ValidatingAdmissionPolicySpec {
        failure_policy: Some("Fail".into()),
        match_conditions: Some(vec![MatchCondition { name: "account-of-nodes".into(), expression: is_ours }]),
        match_constraints: Some(MatchResources {
            resource_rules: Some(checked.iter().map(rule).collect()),
            ..Default::default()
        }),
        variables: Some(vec![Variable { name: "node".into(), expression: NODE.into() }]),
        validations: Some(vec![
            validation(
                "variables.node != ''",
                "the token names no node; run in a pod on the node, on Kubernetes 1.30 or newer",
            ),
            validation(expression, "a pod of kcm may change only its own node and the reports of it"),
        ]),
        ..Default::default()
    };
    let policy = ValidatingAdmissionPolicy { metadata: named(name), spec: Some(spec), status: None };
    let binding = ValidatingAdmissionPolicyBinding {
        metadata: named(name),
        spec: Some(ValidatingAdmissionPolicyBindingSpec {
            policy_name: Some(name.into()),
            validation_actions: Some(vec!["Deny".into()]),
            ..Default::default()
        }),
    };
    [yaml(&policy), yaml(&binding)].join("---\n")
}

pub(super) fn policies() -> String {
    let text = "Ties the account kcm-node to the node of its pod: a pod of kcm cannot change another node, the reports about\n\
                it, or write events about anything else. The role in rbac.yaml cannot say this.\n\
                Needs Kubernetes 1.30: there these policies are served, and the tokens of pods have the name of their node.\n\
                A token without that name may change nothing (failurePolicy and validations fail closed).\n\
                Reading is not limited. Other accounts are not concerned, so `kcm undiscover --node` works from outside.";
    let nodes = policy(
        NODE_ACCOUNT,
        &[
            Checked { group: "", resources: &["nodes", "nodes/status"], operations: &["CREATE", "UPDATE"] },
            Checked {
                group: GROUP,
                resources: &["nodereports", "reconcilereports"],
                operations: &["CREATE", "UPDATE"],
            },
        ],
        "object.metadata.name == variables.node",
    );
    let events = policy(
        "kcm-node-events",
        &[Checked { group: "", resources: &["events"], operations: &["CREATE", "UPDATE"] }],
        "object.involvedObject.kind == 'Node' && object.involvedObject.name == variables.node",
    );
    header(text) + &[nodes, events].join("---\n")
}
