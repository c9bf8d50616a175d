//! Every request and object that kcm sends to an API server, built without I/O.
//!
//! Owns which objects there are, their names and contents, and how a request is shown. Paths, queries and encodings
//! come from kube. Does not know how requests are sent, or what the answers are used for.

#[cfg(test)]
mod deploy;
pub(crate) mod event;
#[cfg(test)]
mod golden;
pub(crate) mod node;
pub(crate) mod pods;
pub(crate) mod reports;

use std::marker::PhantomData;

use kube::core::params::PatchParams;
use serde::Serialize;
use serde_json::Value;

/// The API group of kcm.
pub(crate) const GROUP: &str = "kcm.intel.com";

/// Parameters of a server-side apply: it creates a missing object, and replaces our fields of an existing one.
fn apply() -> PatchParams {
    PatchParams::apply("kcm").force()
}

/// A request whose answer is a `T`.
#[derive(Clone, Debug)]
pub(crate) struct Request<T> {
    http: http::Request<Vec<u8>>,
    subject: String,
    manifest: &'static str,
    answer: PhantomData<fn() -> T>,
}

/// A request, unless a name cannot be part of one.
pub(crate) type Built<T> = Result<Request<T>, kube::core::request::Error>;

impl<T> Request<T> {
    /// `subject`: the object of the request, for people, such as `node n1`.
    fn new(http: http::Request<Vec<u8>>, subject: String) -> Self {
        Self { http, subject, manifest: RBAC, answer: PhantomData }
    }

    /// Names another manifest that grants the right to make the request.
    fn granted_by(self, manifest: &'static str) -> Self {
        Self { manifest, ..self }
    }

    pub(crate) fn subject(&self) -> &str {
        &self.subject
    }

    pub(super) fn manifest(&self) -> &'static str {
        self.manifest
    }

    /// Returns what is sent.
    pub(super) fn http(&self) -> http::Request<Vec<u8>> {
        self.http.clone()
    }

    pub(super) fn method(&self) -> &str {
        self.http.method().as_str()
    }

    /// Returns the path with the query, without the empty parameters that kube leaves in it.
    pub(super) fn path(&self) -> String {
        self.http.uri().to_string().replace("?&", "?").trim_end_matches('?').to_owned()
    }

    #[cfg(test)]
    fn body(&self) -> Value {
        serde_json::from_slice(self.http.body()).unwrap_or_default()
    }

    /// Returns the request as `--dry-run` shows it: a comment with the method and path, and the body as YAML.
    pub(crate) fn shown(&self) -> String {
        let kind = self.http.headers().get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let kind = kind.map(|kind| format!(" ({kind})")).unwrap_or_default();
        let body =
            serde_json::from_slice(self.http.body()).map(|body: Value| yaml(&body)).unwrap_or_default();
        format!("# {} {}{kind}\n{body}", self.method(), self.path())
    }
}

/// The manifests that messages name.
pub(crate) const RBAC: &str = "deploy/rbac.yaml";
pub(crate) const CRDS: &str = "deploy/crds.yaml";

/// Formats an object as YAML, with its fields in alphabetical order.
pub(crate) fn yaml(object: &impl Serialize) -> String {
    // Both steps succeed for an object that is valid JSON, and all our objects are.
    let object = serde_json::to_value(object).unwrap_or_default();
    serde_saphyr::to_string(&object).unwrap_or_default()
}

/// Formats several objects as one YAML stream.
pub(crate) fn yaml_stream<'a>(objects: impl IntoIterator<Item = &'a (impl Serialize + 'a)>) -> String {
    objects.into_iter().map(yaml).collect::<Vec<_>>().join("---\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn yaml_has_the_meaning_of_the_json() {
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
