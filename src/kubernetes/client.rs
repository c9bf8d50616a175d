//! Sends requests to an API server, and retries those that can succeed later.
//!
//! Owns the async runtime, the client configuration, TLS, timeouts and retries. Does not know what is asked for, and
//! never logs or shows anything of a request's headers, because the token is in them.

use std::future::Future;
use std::ops::RangeInclusive;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::future::{ready, select};
use futures_util::{Stream, StreamExt as _};
use http::HeaderValue;
use http::header::{RETRY_AFTER, USER_AGENT};
use kube::client::Body;
use kube::core::{Status, WatchEvent};
use secrecy::ExposeSecret as _;
use serde::de::DeserializeOwned;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};

use super::failure::{Failure, causes, first_line, is_about_credentials, without_user};
use super::objects::Request;
use crate::backoff::Backoff;

/// How long one attempt may take. An API server itself ends ordinary requests after a minute; a request of kcm is
/// small, and takes milliseconds.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The pauses between attempts.
const PAUSES: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(5);

/// A cluster, with an async runtime to talk to it.
pub(crate) struct Cluster {
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl Cluster {
    /// Reads the default configuration chain (`KUBECONFIG`, `~/.kube/config`, the pod's service account). Sends
    /// nothing yet. `retry_timeout`: how long each request is retried.
    ///
    /// # Errors
    /// The configuration is missing or unusable.
    pub(crate) fn find(retry_timeout: Duration) -> Result<Self, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Failure::Unusable(causes(&error)))?;
        let client = runtime.block_on(async {
            let config = kube::Config::infer().await.map_err(|error| Failure::NoCluster(causes(&error)))?;
            log::debug!("talking to {}", without_user(&config.cluster_url));
            kube::Client::try_from(configured(config)?).map_err(|error| Failure::Unusable(causes(&error)))
        })?;
        Ok(Self { runtime, client: Client { kube: client, retry_timeout } })
    }

    /// Sends one request and waits for its answer.
    ///
    /// # Errors
    /// The server refuses, or is not available.
    pub(crate) fn send<T: DeserializeOwned>(&self, request: &Request<T>) -> Result<T, Failure> {
        self.run(self.client.send(request))
    }

    /// Runs async code that needs more than one request at a time.
    pub(crate) fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }
}

/// Sets what differs from kube's defaults.
fn configured(mut config: kube::Config) -> Result<kube::Config, Failure> {
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.write_timeout = Some(ATTEMPT_TIMEOUT);
    // A watch is silent for a long time. Reading is bounded by ATTEMPT_TIMEOUT.
    config.read_timeout = None;
    // kube retries for longer than a command may take, and does not say so.
    config.default_retry = false;
    config.headers.push((USER_AGENT, HeaderValue::from_static(concat!("kcm/", env!("CARGO_PKG_VERSION")))));
    // kube panics over such a token.
    if let Some(token) = &config.auth_info.token
        && HeaderValue::from_str(token.expose_secret()).is_err()
    {
        return Err(Failure::Unusable(
            "the token has a line break or another control character in it".into(),
        ));
    }
    Ok(config)
}

/// Waits, inside [`Cluster::run`], for SIGINT or SIGTERM.
///
/// # Errors
/// Signals cannot be caught.
pub(crate) async fn interrupted() -> std::io::Result<()> {
    let (mut int, mut term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    select(pin!(int.recv()), pin!(term.recv())).await;
    Ok(())
}

/// Sends requests inside [`Cluster::run`].
#[derive(Clone)]
pub(crate) struct Client {
    kube: kube::Client,
    retry_timeout: Duration,
}

/// Why an attempt failed.
#[derive(Debug)]
enum Attempt {
    Final(Failure),
    /// Another attempt can succeed, but not before `after`, if the server names a time.
    Retry {
        cause: String,
        after: Option<Duration>,
    },
}

impl Client {
    /// Sends a request; see [`Cluster::send`].
    pub(crate) async fn send<T: DeserializeOwned>(&self, request: &Request<T>) -> Result<T, Failure> {
        let started = Instant::now();
        let mut backoff = Backoff::new(PAUSES);
        loop {
            let (cause, after) = match self.attempt(request).await.and_then(|body| parse(&body)) {
                Ok(answer) => return Ok(answer),
                Err(Attempt::Final(failure)) => return Err(failure),
                Err(Attempt::Retry { cause, after }) => (cause, after),
            };
            let tried = started.elapsed();
            let pause = after.unwrap_or_else(|| backoff.next());
            if tried + pause > self.retry_timeout {
                return Err(Failure::Unavailable { subject: request.subject().to_owned(), cause, tried });
            }
            log::debug!("{}: {cause}; trying again in {} ms", request.subject(), pause.as_millis());
            sleep(pause).await;
        }
    }

    /// Returns an answer that is text. It is tried once.
    pub(crate) async fn text(&self, request: &Request<String>) -> Result<String, Failure> {
        let body = self.attempt(request).await.map_err(|attempt| attempt.into_failure(request))?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// Opens a watch. It is tried once, because the caller has to open a new one whenever a watch ends. The stream
    /// ends with the watch, or with an event that cannot be understood.
    pub(crate) async fn watch<K>(
        &self,
        request: &Request<WatchEvent<K>>,
    ) -> Result<impl Stream<Item = WatchEvent<K>> + Unpin + use<K>, Failure>
    where
        K: Clone + DeserializeOwned + 'static,
    {
        log::debug!("{} {}", request.method(), request.path());
        let opened = timeout(ATTEMPT_TIMEOUT, self.kube.request_events(request.http())).await;
        let events = match opened {
            Ok(Ok(events)) => events,
            Ok(Err(kube::Error::Api(status))) => {
                return Err(Attempt::of_status(status.code, &status, None, request).into_failure(request));
            }
            Ok(Err(error)) => return Err(Attempt::of_error(&error).into_failure(request)),
            Err(_) => return Err(Attempt::no_answer().into_failure(request)),
        };
        Ok(Box::pin(until_error(events)))
    }

    /// Sends a request once and returns the body of a successful answer.
    ///
    /// `kube::Client::request` does the same, but drops the header `Retry-After`.
    async fn attempt<T>(&self, request: &Request<T>) -> Result<Vec<u8>, Attempt> {
        log::debug!("{} {}", request.method(), request.path());
        let attempt = async {
            let response = self.kube.send(request.http().map(Body::from)).await;
            let response = response.map_err(|error| Attempt::of_error(&error))?;
            let status = response.status();
            let after = response.headers().get(RETRY_AFTER).and_then(seconds);
            let body: Vec<u8> = match response.into_body().collect_bytes().await {
                Ok(body) => body.into(),
                Err(error) => {
                    return Err(Attempt::retry(format!("the answer breaks off: {}", causes(&error))));
                }
            };
            if status.is_success() {
                return Ok(body);
            }
            Err(Attempt::of_status(status.as_u16(), &status_of(&body), after, request))
        };
        timeout(ATTEMPT_TIMEOUT, attempt).await.unwrap_or_else(|_| Err(Attempt::no_answer()))
    }
}

impl Attempt {
    fn retry(cause: String) -> Self {
        Self::Retry { cause, after: None }
    }

    fn no_answer() -> Self {
        Self::retry(format!("no answer within {} s", ATTEMPT_TIMEOUT.as_secs()))
    }

    /// There was no answer.
    fn of_error(error: &kube::Error) -> Self {
        match causes(error) {
            cause if is_about_credentials(error) => Self::Final(Failure::Unusable(cause)),
            cause => Self::retry(cause),
        }
    }

    /// The answer is a refusal.
    fn of_status<T>(code: u16, status: &Status, after: Option<Duration>, request: &Request<T>) -> Self {
        match Failure::of_status(code, status, request.subject(), request.manifest()) {
            Some(failure) => Self::Final(failure),
            None => {
                let cause = format!("the API server answers {code}: {}", first_line(&status.message));
                Self::Retry { cause, after }
            }
        }
    }

    /// Turns the result of an only attempt into a failure.
    fn into_failure<T>(self, request: &Request<T>) -> Failure {
        match self {
            Self::Final(failure) => failure,
            Self::Retry { cause, .. } => {
                let subject = request.subject().to_owned();
                Failure::Unavailable { subject, cause, tried: Duration::ZERO }
            }
        }
    }
}

/// Ends a stream before its first error.
fn until_error<T>(items: impl Stream<Item = Result<T, kube::Error>>) -> impl Stream<Item = T> {
    let items =
        items.map(|item| item.inspect_err(|error| log::debug!("the watch breaks off: {}", causes(error))));
    items.map(Result::ok).take_while(|item| ready(item.is_some())).filter_map(ready)
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Attempt> {
    serde_json::from_slice(body)
        .map_err(|error| Attempt::retry(format!("the answer cannot be understood: {error}")))
}

/// Returns the status in the body of a refusal. If there is none (the page of a proxy, or "404 page not found"), the
/// first line of the body is the message.
fn status_of(body: &[u8]) -> Status {
    match serde_json::from_slice::<Status>(body) {
        Ok(status) if !status.message.is_empty() => status,
        _ => Status::failure(&first_line(&String::from_utf8_lossy(body)), ""),
    }
}

/// Parses `Retry-After`. An API server sends seconds, never a date.
fn seconds(header: &HeaderValue) -> Option<Duration> {
    header.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::objects::node;

    fn config(token: &str) -> kube::Config {
        let mut config = kube::Config::new("https://127.0.0.1:1".parse().unwrap());
        config.auth_info.token = Some(token.to_owned().into());
        config
    }

    #[test]
    fn a_token_that_cannot_be_a_header_is_refused_without_showing_it() {
        assert!(configured(config("s3cr3t")).is_ok());
        let failure = configured(config("s3cr3t\n")).err().unwrap().to_string();
        assert!(failure.contains("the token has a line break") && !failure.contains("s3cr3t"), "{failure}");
    }

    #[test]
    fn requests_name_kcm_and_kube_does_not_retry() {
        let config = configured(config("t")).unwrap();
        let (name, value) = config.headers.last().unwrap();
        assert_eq!(
            (name.as_str(), value.to_str().unwrap()),
            ("user-agent", concat!("kcm/", env!("CARGO_PKG_VERSION")))
        );
        assert!(!config.default_retry);
    }

    #[test]
    fn the_message_of_a_refusal_is_that_of_its_status_or_its_first_line() {
        let status = status_of(br#"{"kind":"Status","message":"no","reason":"Forbidden","code":403}"#);
        assert_eq!((status.message.as_str(), status.reason.as_str()), ("no", "Forbidden"));
        for (body, message) in [
            (&b"404 page not found\n"[..], "404 page not found"),
            (b"<html>\nsurprise", "<html>"),
            (b"{}", "{}"),
            (b"\xff", "\u{fffd}"),
            (b"", "no reason given"),
        ] {
            let status = status_of(body);
            assert_eq!((status.message.as_str(), status.reason.as_str()), (message, ""));
        }
    }

    #[test]
    fn retry_after_is_in_seconds() {
        let parsed = |text: &'static str| seconds(&HeaderValue::from_static(text));
        assert_eq!(parsed(" 3"), Some(Duration::from_secs(3)));
        assert_eq!(parsed("Wed, 21 Oct 2015 07:28:00 GMT"), None);
    }

    #[test]
    fn a_retry_waits_as_long_as_the_server_asks() {
        let request = node::get("n1").unwrap();
        let status = Status::failure("slow down", "TooManyRequests");
        let after = Some(Duration::from_secs(2));
        match Attempt::of_status(429, &status, after, &request) {
            Attempt::Retry { cause, after } => {
                assert_eq!(cause, "the API server answers 429: slow down");
                assert_eq!(after, Some(Duration::from_secs(2)));
            }
            other => panic!("{other:?}"),
        }
        let failure = Attempt::of_status(503, &status, None, &request).into_failure(&request);
        assert!(failure.is_transient());
        assert!(matches!(Attempt::of_status(404, &status, None, &request), Attempt::Final(_)));
    }

    #[test]
    fn an_answer_of_another_form_is_retried() {
        assert!(matches!(parse::<u32>(b"<html>"), Err(Attempt::Retry { .. })));
        assert_eq!(parse::<u32>(b"7").unwrap(), 7);
    }
}
