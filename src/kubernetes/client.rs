//! Sends requests, and sends them again where that can help.
//!
//! Owns: tokio, TLS, the configuration chain, time-outs and back-off, and what is said of a refusal. Must not
//! know: what is asked for. Nothing of a request's headers is ever logged or shown: a token is among them. Nor are
//! passwords in URLs, and what a plugin that is to give a token has printed.

use std::error::Error as StdError;
use std::future::Future;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use futures_util::future::select;
use http_body_util::{BodyExt as _, Limited};
use kube::client::{AuthError, Body};
use secrecy::ExposeSecret as _;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
/// What work in [`Cluster::run`] waits with.
pub(crate) use tokio::sync::Notify;
pub(crate) use tokio::time::{sleep, timeout};

use super::objects::{CRDS, Request};
use crate::backoff::Backoff;

/// How long one request may take.
const REQUEST: Duration = Duration::from_secs(10);
/// How long making a connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// The pause before a second attempt, and the longest.
const PAUSES: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(5);
/// How large an answer may be: a page of 500 nodes is some ten MB.
const LARGEST: usize = 64 << 20;

/// Why there is no answer that could be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("no cluster to talk to: {0}; run in a pod with a service account, or set KUBECONFIG")]
    NoCluster(String),
    /// There is one, and what we have for it does not do.
    #[error("the cluster cannot be talked to: {0}; look at the kubeconfig, or the service account")]
    Unusable(String),
    /// The server has refused, and would refuse again.
    #[error("{subject}: {message} ({code}{}){}", .reason.as_deref().map(|r| format!(" {r}")).unwrap_or_default(), cure(*.code, .manifest))]
    Refused {
        subject: String,
        code: u16,
        reason: Option<String>,
        message: String,
        /// What gives the right.
        manifest: &'static str,
    },
    /// There was no answer, or one that was no use, as long as it was tried.
    #[error("{subject}: {cause}; tried for {} s; is the API server well, and can it be reached from here?", .tried.as_secs())]
    Unavailable { subject: String, cause: String, tried: Duration },
    /// The server's schema does not know our objects.
    #[error("{subject}: {message}; the CRDs are those of another version; apply {CRDS} of this one")]
    Schema { subject: String, message: String },
}

impl Failure {
    /// The status that the server has refused with.
    pub(crate) fn code(&self) -> Option<u16> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// Whether another attempt later can help.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

fn cure(code: u16, manifest: &str) -> String {
    match code {
        401 => {
            "; the token or certificate is not accepted; look at the kubeconfig or the service account".into()
        }
        403 => format!("; give the right: kubectl apply -f {manifest}"),
        404 => "; look at the name, and at the cluster that KUBECONFIG names".into(),
        _ => String::new(),
    }
}

/// A cluster that can be talked to.
pub(crate) struct Cluster {
    runtime: tokio::runtime::Runtime,
    sender: Sender,
}

impl Cluster {
    /// From the default configuration chain. No request is sent yet. `patience`: how long a request is tried.
    ///
    /// # Errors
    /// There is no configuration, or it cannot be used.
    pub(crate) fn find(patience: Duration) -> Result<Self, Failure> {
        let none = |error: &(dyn StdError + 'static)| Failure::NoCluster(causes(error));
        let unusable = |error: &(dyn StdError + 'static)| Failure::Unusable(causes(error));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| unusable(&error))?;
        let client = runtime.block_on(async {
            let mut config = kube::Config::infer().await.map_err(|error| none(&error))?;
            config.connect_timeout = Some(CONNECT);
            config.write_timeout = Some(REQUEST);
            // Both are ours: a watch is silent for long, and Retry-After is to be heeded.
            config.read_timeout = None;
            config.default_retry = false;
            log::debug!("talking to {}", without_user(&config.cluster_url));
            // kube would panic.
            if let Some(token) = &config.auth_info.token
                && http::HeaderValue::from_str(token.expose_secret()).is_err()
            {
                return Err(Failure::Unusable("the token has a line break or the like in it".into()));
            }
            kube::Client::try_from(config).map_err(|error| unusable(&error))
        })?;
        Ok(Self { runtime, sender: Sender { client, patience } })
    }

    /// Sends one request, as often as it takes.
    ///
    /// # Errors
    /// The server refuses, or cannot be had.
    pub(crate) fn send(&self, request: &Request) -> Result<Value, Failure> {
        self.run(self.sender.send(request))
    }

    /// Whatever needs more than one request at a time.
    pub(crate) fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    pub(crate) fn sender(&self) -> Sender {
        self.sender.clone()
    }
}

/// Waits, in [`Cluster::run`], for somebody to tell us to stop.
///
/// # Errors
/// Signals cannot be caught.
pub(crate) async fn interrupted() -> std::io::Result<()> {
    let (mut int, mut term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    select(std::pin::pin!(int.recv()), std::pin::pin!(term.recv())).await;
    Ok(())
}

/// Sends requests from within [`Cluster::run`].
#[derive(Clone)]
pub(crate) struct Sender {
    client: kube::Client,
    patience: Duration,
}

/// What one attempt came to.
enum Attempt {
    Final(Failure),
    /// Worth another one, not before this time has passed, if the server names one.
    Again {
        cause: String,
        after: Option<Duration>,
    },
}

impl Sender {
    /// As [`Cluster::send`].
    pub(crate) async fn send(&self, request: &Request) -> Result<Value, Failure> {
        let started = Instant::now();
        let mut backoff = Backoff::new(PAUSES);
        loop {
            let attempt = match timeout(REQUEST, self.attempt(request)).await {
                Ok(attempt) => attempt,
                Err(_) => Err(Attempt::Again { cause: no_answer(), after: None }),
            };
            let (cause, after) = match attempt {
                Ok(answer) => return Ok(answer),
                Err(Attempt::Final(failure)) => return Err(failure),
                Err(Attempt::Again { cause, after }) => (cause, after),
            };
            let tried = started.elapsed();
            let wait = after.unwrap_or_else(|| backoff.next());
            if tried + wait > self.patience {
                return Err(Failure::Unavailable { subject: request.subject.clone(), cause, tried });
            }
            log::debug!("{}: {cause}; trying again in {} ms", request.subject, wait.as_millis());
            sleep(wait).await;
        }
    }

    /// An answer that is text.
    pub(crate) async fn text(&self, request: &Request) -> Result<String, Failure> {
        let answer = timeout(REQUEST, async {
            let response = self.open(request).await?;
            let body = Limited::new(response.into_body(), LARGEST).collect().await;
            let body = body.map_err(|error| Attempt::Again { cause: causes(&*error), after: None })?;
            Ok(String::from_utf8_lossy(&body.to_bytes()).into_owned())
        });
        let nothing = Err(Attempt::Again { cause: no_answer(), after: None });
        answer.await.unwrap_or(nothing).map_err(|attempt| attempt.failure(request))
    }

    /// Begins a watch. It is tried once: whoever watches has to begin again anyway.
    pub(crate) async fn watch(&self, request: &Request) -> Result<Watch, Failure> {
        let opened = timeout(REQUEST, self.open(request)).await;
        let opened = opened.unwrap_or(Err(Attempt::Again { cause: no_answer(), after: None }));
        let response = opened.map_err(|attempt| attempt.failure(request))?;
        Ok(Watch { body: response.into_body(), read: Vec::new() })
    }

    async fn attempt(&self, request: &Request) -> Result<Value, Attempt> {
        let again = |cause: String| Attempt::Again { cause, after: None };
        let response = self.open(request).await?;
        let body = Limited::new(response.into_body(), LARGEST).collect().await;
        let body = body.map_err(|error| again(format!("the answer breaks off: {}", causes(&*error))))?;
        serde_json::from_slice(&body.to_bytes())
            .map_err(|error| again(format!("the answer is no JSON: {error}")))
    }

    /// Sends it; gives a successful response, of which nothing has been read.
    async fn open(&self, request: &Request) -> Result<http::Response<Body>, Attempt> {
        log::debug!("{} {}", request.method.verb(), request.path);
        let response = self.client.send(http_request(request)?).await.map_err(|error| {
            let cause = causes(&error);
            let is_ours = chain(&error).any(|error| error.is::<AuthError>());
            // It will not get another certificate soon, nor shall we get another token.
            if is_ours || cause.contains("certificate") {
                Attempt::Final(Failure::Unusable(cause))
            } else {
                Attempt::Again { cause, after: None }
            }
        })?;
        let code = response.status().as_u16();
        if response.status().is_success() {
            return Ok(response);
        }
        let seconds = response.headers().get(http::header::RETRY_AFTER).and_then(|value| value.to_str().ok());
        let after = seconds.and_then(|seconds| seconds.trim().parse().ok()).map(Duration::from_secs);
        let body = Limited::new(response.into_body(), LARGEST).collect().await;
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        let status: Value = serde_json::from_slice(&body).unwrap_or_default();
        let text = |field: &str| status.get(field).and_then(Value::as_str).map(String::from);
        // What is no status is some proxy's page, or "404 page not found".
        let plain = || first_line(&String::from_utf8_lossy(&body));
        let message = text("message").unwrap_or_else(plain);
        // Server-side apply of what the schema does not allow is a 500, which would never pass.
        if code == 500 && message.contains("typed patch object") {
            return Err(Attempt::Final(Failure::Schema { subject: request.subject.clone(), message }));
        }
        if code == 429 || code >= 500 {
            let cause = format!("the API server answers {code}: {message}");
            return Err(Attempt::Again { cause, after });
        }
        Err(Attempt::Final(Failure::Refused {
            subject: request.subject.clone(),
            code,
            reason: text("reason"),
            message,
            manifest: request.manifest,
        }))
    }
}

impl Attempt {
    /// Where there is no other attempt.
    fn failure(self, request: &Request) -> Failure {
        match self {
            Self::Final(failure) => failure,
            Self::Again { cause, .. } => {
                Failure::Unavailable { subject: request.subject.clone(), cause, tried: Duration::ZERO }
            }
        }
    }
}

/// A watch that goes on.
pub(crate) struct Watch {
    body: Body,
    read: Vec<u8>,
}

impl Watch {
    /// The next event; None where the watch has ended, which it does sooner or later, or is no use any more.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.read.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return serde_json::from_slice(&line).ok();
            }
            if self.read.len() > LARGEST {
                return None;
            }
            let frame = self.body.frame().await?.ok()?;
            self.read.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        }
    }
}

fn http_request(request: &Request) -> Result<http::Request<Body>, Attempt> {
    let body = request.body.as_ref().map(|body| body.to_string().into_bytes()).unwrap_or_default();
    let mut builder = http::Request::builder().method(request.method.verb()).uri(&request.path);
    builder = builder.header(http::header::ACCEPT, "application/json");
    if let Some(kind) = request.method.content_type() {
        builder = builder.header(http::header::CONTENT_TYPE, kind);
    }
    builder.body(Body::from(body)).map_err(|error| {
        let (subject, message) = (request.subject.clone(), error.to_string());
        Attempt::Final(Failure::Refused {
            subject,
            code: 400,
            reason: None,
            message,
            manifest: request.manifest,
        })
    })
}

fn no_answer() -> String {
    format!("no answer within {} s", REQUEST.as_secs())
}

/// An error, its cause, the cause of that, and so on.
fn chain<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// An error with all its causes, each said once.
fn causes(error: &(dyn StdError + 'static)) -> String {
    if let Some(told) = chain(error).find_map(without_secrets) {
        return told;
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

/// What is said instead of an error whose own words would tell secrets.
fn without_secrets(error: &(dyn StdError + 'static)) -> Option<String> {
    if let Some(AuthError::AuthExecRun { out, .. }) = error.downcast_ref() {
        let status = out.status;
        return Some(format!("the plugin that the kubeconfig gets its token from has failed ({status})"));
    }
    match error.downcast_ref()? {
        kube::Error::ProxyProtocolUnsupported { proxy_url }
        | kube::Error::ProxyProtocolDisabled { proxy_url, .. } => {
            Some(format!("{}: no proxy that kcm can use; give one of http", without_user(proxy_url)))
        }
        _ => None,
    }
}

/// A URL without the name and password in it.
fn without_user(url: &http::Uri) -> String {
    let [scheme, host] = [url.scheme_str(), url.host()].map(Option::unwrap_or_default);
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{scheme}://{host}{port}")
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or("no reason given").chars().take(500).collect()
}
