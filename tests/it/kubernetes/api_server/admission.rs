//! Admission policies: evaluates the expressions of ValidatingAdmissionPolicy objects, in CEL, as a real server does.
//!
//! Owns which requests a policy is about, and the variables of its expressions. Does not know what the policies are for.

use std::collections::BTreeMap;

use cel::{Context, Program};
use serde_json::{Value, json};

use super::rights::Named;

/// The policies of a server, all of them bound with `Deny`, and what it knows about the tokens of pods.
pub struct Admission {
    policies: Vec<Value>,
    /// The namespace of the service accounts, whose names are the names of users.
    namespace: String,
    /// The node in the claims of a token; `None` if tokens name no node.
    node: Option<String>,
}

impl Admission {
    pub fn new(policies: Vec<Value>, namespace: &str, node: Option<&str>) -> Self {
        for policy in &policies {
            assert_eq!(policy["spec"]["failurePolicy"], "Fail", "{policy}");
        }
        Self { policies, namespace: namespace.into(), node: node.map(Into::into) }
    }

    /// Returns the policy that denies a request, and its message.
    pub fn denial(
        &self,
        named: &Named,
        user: &str,
        operation: &str,
        object: &Value,
    ) -> Option<(String, String)> {
        let mut user_info = json!({ "username": format!("system:serviceaccount:{}:{user}", self.namespace) });
        if let Some(node) = &self.node {
            user_info["extra"] = json!({
                "authentication.kubernetes.io/node-name": [node],
                "authentication.kubernetes.io/pod-name": ["kcm-x7k2p"],
            });
        }
        let request = json!({
            "operation": operation, "name": named.name, "namespace": named.namespace, "userInfo": user_info,
            "resource": { "group": named.group, "version": "v1", "resource": named.resource },
        });
        self.policies.iter().find_map(|policy| {
            let spec = &policy["spec"];
            let rules = spec["matchConstraints"]["resourceRules"].as_array().expect("rules");
            if !rules.iter().any(|rule| is_about(rule, named, operation)) {
                return None;
            }
            let mut variables = BTreeMap::new();
            let conditions = spec["matchConditions"].as_array().into_iter().flatten();
            for condition in conditions {
                if evaluated(&condition["expression"], &request, object, &variables) != json!(true) {
                    return None;
                }
            }
            for variable in spec["variables"].as_array().into_iter().flatten() {
                let value = evaluated(&variable["expression"], &request, object, &variables);
                variables.insert(variable["name"].as_str().expect("a name").to_owned(), value);
            }
            let validations = spec["validations"].as_array().expect("validations");
            let failed = validations
                .iter()
                .find(|one| evaluated(&one["expression"], &request, object, &variables) != json!(true))?;
            let text = |value: &Value| value.as_str().expect("text").to_owned();
            Some((text(&policy["metadata"]["name"]), text(&failed["message"])))
        })
    }
}

fn is_about(rule: &Value, named: &Named, operation: &str) -> bool {
    let has =
        |field: &str, value: &str| rule[field].as_array().is_some_and(|all| all.contains(&json!(value)));
    has("apiGroups", &named.group)
        && has("resources", &named.with_subresource())
        && has("operations", operation)
        && has("apiVersions", "v1")
}

/// Evaluates an expression. One that fails denies (`failurePolicy: Fail`), so that it is not true.
fn evaluated(
    expression: &Value,
    request: &Value,
    object: &Value,
    variables: &BTreeMap<String, Value>,
) -> Value {
    let program = Program::compile(expression.as_str().expect("an expression")).expect("CEL");
    let mut context = Context::default();
    for (name, value) in [("request", request), ("object", object), ("variables", &json!(variables))] {
        context.add_variable(name, value).expect("a variable");
    }
    match program.execute(&context) {
        Ok(cel::Value::Bool(is_true)) => is_true.into(),
        Ok(cel::Value::String(text)) => text.as_str().into(),
        Ok(other) => panic!("{expression}: {other:?}"),
        Err(error) => error.to_string().into(),
    }
}
