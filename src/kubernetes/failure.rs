//! Failures between kcm and an API server, as messages of one line.
//!
//! Owns the messages with their cures, and keeps secrets out of them: passwords in URLs, and the output of a plugin
//! that should have printed a token. Does not know how requests are sent.

use std::error::Error as StdError;
use std::time::Duration;

use kube::client::AuthError;
use kube::core::Status;

use super::objects::CRDS;

/// The longest message that is shown of an error or an answer, in characters.
const LONGEST_MESSAGE: usize = 500;
/// The reason that kube puts into the status of an answer that is not a `Status` object.
const NOT_A_STATUS: &str = "Failed to parse error data";

/// A request without a usable answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The client configuration is missing.
    #[error("no cluster to talk to: {0}; run in a pod with a service account, or set KUBECONFIG")]
    NoCluster(String),
    /// The client configuration does not work.
    #[error("cannot connect to the cluster: {0}; check the kubeconfig or the service account")]
    Unusable(String),
    /// A name cannot be part of a request, or an object cannot be serialized.
    #[error(transparent)]
    Request(#[from] kube::core::request::Error),
    /// The server refuses the request, and would refuse it again.
    #[error("{subject}: {message} ({code}{}){}", .reason.as_deref().map(|r| format!(" {r}")).unwrap_or_default(), cure(*.code, .message, .manifest))]
    Refused {
        /// The object of the request.
        subject: String,
        /// The HTTP status code.
        code: u16,
        /// The machine-readable reason, if the server sent a `Status` object.
        reason: Option<String>,
        message: String,
        /// The manifest that grants the right to make the request.
        manifest: &'static str,
    },
    /// There was no usable answer for as long as the request was retried.
    #[error("{subject}: {cause}; gave up after {} s; check that the API server is up and reachable from here", .tried.as_secs())]
    Unavailable { subject: String, cause: String, tried: Duration },
    /// The server's schema does not have our fields.
    #[error("{subject}: {message}; the CRDs are from another version; apply {CRDS} of this one")]
    Schema { subject: String, message: String },
}

impl Failure {
    /// Classifies a refusal. `None`: another attempt can succeed.
    pub(super) fn of_status(
        code: u16,
        status: &Status,
        subject: &str,
        manifest: &'static str,
    ) -> Option<Self> {
        let (subject, message) = (subject.to_owned(), first_line(&status.message));
        // This is how a server answers an apply of fields that the schema does not have. It would not pass.
        if code == 500 && message.contains("typed patch object") {
            return Some(Self::Schema { subject, message });
        }
        if code == 429 || code >= 500 {
            return None;
        }
        let reason = Some(&status.reason).filter(|reason| !reason.is_empty() && *reason != NOT_A_STATUS);
        Some(Self::Refused { subject, code, reason: reason.cloned(), message, manifest })
    }

    /// Returns the HTTP status code of a refusal.
    pub(crate) fn code(&self) -> Option<u16> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// Whether the server does not know the kind of the object, as opposed to the object.
    pub(crate) fn is_unknown_kind(&self) -> bool {
        matches!(self, Self::Refused { code: 404, reason: None, .. })
    }

    /// Whether the server lets us not name the owner of an object: the admission plugin OwnerReferencesPermissionEnforcement, which
    /// some distributions switch on, asks for the right to delete the object.
    pub(crate) fn is_about_owner(&self) -> bool {
        matches!(self, Self::Refused { code: 403, message, .. } if message.contains("cannot set an ownerRef"))
    }

    /// Whether another attempt later can succeed.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

fn cure(code: u16, message: &str, manifest: &str) -> String {
    match code {
        401 => {
            "; the token or certificate is not accepted; check the kubeconfig or the service account".into()
        }
        // The manifest grants it to accounts of its own, so that applying it does not help another account.
        403 if has_other_account(message) => {
            format!(
                "; kubectl apply -f {manifest}, and use an account of it (cluster-init --service-account=kcm-node)"
            )
        }
        403 => format!("; grant the right: kubectl apply -f {manifest}"),
        404 => "; check the name, and the cluster that KUBECONFIG names".into(),
        _ => String::new(),
    }
}

/// Whether a refusal is about a service account that is not one of `deploy/rbac.yaml`.
fn has_other_account(message: &str) -> bool {
    let account = message.split_once("\"system:serviceaccount:").and_then(|(_, rest)| rest.split('"').next());
    account.and_then(|account| account.split(':').nth(1)).is_some_and(|name| !name.starts_with("kcm-"))
}

/// Whether an error of kube is about our own credentials or certificates: a retry would fail in the same way.
pub(super) fn is_about_credentials(error: &kube::Error) -> bool {
    chain(error).any(|error| error.is::<AuthError>()) || causes(error).contains("certificate")
}

/// Returns an error with its causes on one line, each of them once, without secrets.
pub(super) fn causes(error: &(dyn StdError + 'static)) -> String {
    if let Some(message) = chain(error).find_map(without_secrets) {
        return message;
    }
    let mut text = String::new();
    for cause in chain(error).map(ToString::to_string) {
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    first_line(&text)
}

/// Returns a message for an error whose own message contains secrets.
fn without_secrets(error: &(dyn StdError + 'static)) -> Option<String> {
    if let Some(AuthError::AuthExecRun { out, .. }) = error.downcast_ref() {
        return Some(format!("the credential plugin of the kubeconfig failed ({})", out.status));
    }
    match error.downcast_ref()? {
        kube::Error::ProxyProtocolUnsupported { proxy_url }
        | kube::Error::ProxyProtocolDisabled { proxy_url, .. } => {
            Some(format!("{}: kcm cannot use this proxy; only http proxies work", without_user(proxy_url)))
        }
        _ => None,
    }
}

/// Returns a URL without the user name and password in it.
pub(super) fn without_user(url: &http::Uri) -> String {
    let [scheme, host] = [url.scheme_str(), url.host()].map(Option::unwrap_or_default);
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{scheme}://{host}{port}")
}

/// Returns the first line, shortened to [`LONGEST_MESSAGE`].
pub(super) fn first_line(text: &str) -> String {
    text.trim().lines().next().unwrap_or("no reason given").chars().take(LONGEST_MESSAGE).collect()
}

/// Returns an error, its cause, the cause of that, and so on.
fn chain<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_status(code: u16, reason: &str, message: &str) -> Option<Failure> {
        Failure::of_status(code, &Status::failure(message, reason), "node n1", "deploy/rbac.yaml")
    }

    #[test]
    fn a_refusal_names_the_subject_the_reason_and_the_cure() {
        for (code, reason, line) in [
            (409, "Conflict", "node n1: no (409 Conflict)"),
            (
                403,
                "Forbidden",
                "node n1: no (403 Forbidden); grant the right: kubectl apply -f deploy/rbac.yaml",
            ),
            (
                404,
                "NotFound",
                "node n1: no (404 NotFound); check the name, and the cluster that KUBECONFIG names",
            ),
            (410, NOT_A_STATUS, "node n1: no (410)"),
        ] {
            let failure = of_status(code, reason, "no").unwrap();
            assert_eq!((failure.to_string().as_str(), failure.code()), (line, Some(code)));
            assert!(!failure.is_transient());
        }
    }

    #[test]
    fn an_account_that_the_manifest_does_not_have_is_pointed_to_one() {
        let message =
            |user: &str| format!("nodes \"n1\" is forbidden: User \"{user}\" cannot get resource \"nodes\"");
        let said = |user: &str| of_status(403, "Forbidden", &message(user)).unwrap().to_string();
        let other = said("system:serviceaccount:default:default");
        assert!(other.ends_with("; kubectl apply -f deploy/rbac.yaml, and use an account of it (cluster-init --service-account=kcm-node)"), "{other}");
        for user in ["system:serviceaccount:kcm-system:kcm-node", "alice"] {
            assert!(said(user).ends_with("; grant the right: kubectl apply -f deploy/rbac.yaml"), "{user}");
        }
    }

    #[test]
    fn only_429_and_5xx_are_worth_another_attempt() {
        for code in [429, 500, 502, 503, 504] {
            assert!(of_status(code, "", "in trouble").is_none(), "{code}");
        }
        for code in [400, 401, 403, 404, 405, 409, 410, 415, 422] {
            assert!(of_status(code, "", "no").is_some(), "{code}");
        }
        let schema = of_status(500, "", "failed to create typed patch object: .x: field not declared");
        assert!(matches!(schema, Some(Failure::Schema { .. })));
    }

    #[test]
    fn a_missing_kind_is_not_a_missing_object() {
        assert!(of_status(404, "", "404 page not found").unwrap().is_unknown_kind());
        assert!(!of_status(404, "NotFound", "nodes \"n1\" not found").unwrap().is_unknown_kind());
    }

    #[test]
    fn a_url_is_shown_without_its_user() {
        let url = "https://u:s3cr3t@127.0.0.1:6443/x?token=s3cr3t".parse().unwrap();
        assert_eq!(without_user(&url), "https://127.0.0.1:6443");
        let error = kube::Error::ProxyProtocolUnsupported {
            proxy_url: Box::new("ftp://u:s3cr3t@proxy:9".parse().unwrap()),
        };
        assert_eq!(causes(&error), "ftp://proxy:9: kcm cannot use this proxy; only http proxies work");
    }

    #[test]
    fn an_error_is_one_line_that_says_each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer: inner\nmore")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("inner"));
        assert_eq!(causes(&error), "outer: inner");
        assert_eq!(first_line(""), "no reason given");
        assert_eq!(first_line(&"x".repeat(600)).len(), LONGEST_MESSAGE);
    }
}
