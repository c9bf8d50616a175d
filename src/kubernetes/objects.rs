//! Every request and object that kcm sends to an API server, built from plain values.
//!
//! Owns: paths, kinds, names and patches. Must not know: how they are sent, or what came of it.

#[cfg(test)]
mod deploy;
#[cfg(test)]
mod golden;
pub(crate) mod node;
pub(crate) mod pods;
pub(crate) mod reports;

use serde_json::Value;

/// Our API group.
pub(crate) const GROUP: &str = "kcm.intel.com";
/// Whose fields ours are, in server-side apply.
const MANAGER: &str = "kcm";

/// How an object is asked for or changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Create,
    /// RFC 6902.
    JsonPatch,
    /// RFC 7386.
    MergePatch,
    /// Server-side apply: made where it is missing; of what is there, our fields are replaced.
    Apply,
}

impl Method {
    pub(crate) fn verb(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Create => "POST",
            Self::JsonPatch | Self::MergePatch | Self::Apply => "PATCH",
        }
    }

    pub(crate) fn content_type(self) -> Option<&'static str> {
        match self {
            Self::Get => None,
            Self::Create => Some("application/json"),
            Self::JsonPatch => Some("application/json-patch+json"),
            Self::MergePatch => Some("application/merge-patch+json"),
            // JSON is YAML.
            Self::Apply => Some("application/apply-patch+yaml"),
        }
    }
}

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Request {
    pub(crate) method: Method,
    /// With the query.
    pub(crate) path: String,
    pub(crate) body: Option<Value>,
    /// What it is about, for people: `node n1`.
    pub(crate) subject: String,
    /// The manifest that gives the right to it.
    pub(crate) manifest: &'static str,
}

impl Request {
    fn get(path: String, subject: String) -> Self {
        Self { method: Method::Get, path, body: None, subject, manifest: RBAC }
    }

    fn with(method: Method, path: String, body: Value, subject: String) -> Self {
        Self { method, path, body: Some(body), subject, manifest: RBAC }
    }

    fn apply(path: &str, body: Value, subject: String) -> Self {
        Self::with(Method::Apply, format!("{path}?fieldManager={MANAGER}&force=true"), body, subject)
    }

    /// As `--dry-run` shows it: a comment that says where it goes, and the body as YAML.
    pub(crate) fn shown(&self) -> String {
        let kind = self.method.content_type().map(|kind| format!(" ({kind})")).unwrap_or_default();
        let body = self.body.as_ref().map(yaml).unwrap_or_default();
        format!("# {} {}{kind}\n{body}", self.method.verb(), self.path)
    }
}

/// The manifests that errors name.
pub(crate) const RBAC: &str = "deploy/rbac.yaml";
pub(crate) const CRDS: &str = "deploy/crds.yaml";

/// A value as YAML, keys in order of their names.
pub(crate) fn yaml(value: &Value) -> String {
    // Fails for nothing that JSON can say.
    serde_saphyr::to_string(value).unwrap_or_default()
}

/// Several objects as one YAML stream.
pub(crate) fn yaml_stream<'a>(objects: impl IntoIterator<Item = &'a Value>) -> String {
    objects.into_iter().map(yaml).collect::<Vec<_>>().join("---\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn yaml_means_what_the_json_means() {
        let value = json!({
            "a": ["true", "1", "no", "x: y", "# c", "", "null", "~", "1e3", "0x1", "- a", "2017-01-12"],
            "b": { "c": {}, "d": [], "e": [[1], [{ "f": null, "g": true }]], "4,12": 1 },
            "long": "word ".repeat(50),
            "several": "a\nb\n",
        });
        let text = yaml(&value);
        assert_eq!(serde_saphyr::from_str::<Value>(&text).unwrap(), value, "{text}");
    }
}
