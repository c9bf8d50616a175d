//! One resource of the kubelet: its socket and its registration.
//!
//! Owns when the socket is made and when it is registered. Does not know what is answered.
//!
//! A kubelet that starts removes all sockets of plugins and makes its own again; so both files are looked at periodically.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream as Probe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Error, anyhow, bail};
use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use nix::errno::Errno;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, timeout};
use tonic::body::Body;
use tonic::client::{Grpc, GrpcService};
use tonic_prost::ProstCodec;

use super::api::{self, DevicePluginOptions, Empty, RegisterRequest};
use super::look::Offer;
use super::serve::Service;
use crate::kubernetes::objects::node::extended;

/// How often the sockets are looked at.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long the kubelet may take for a registration, in which it connects to the plugin, for 10 s at most.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(15);
/// How long after a registration the kubelet may take to ask for the devices, before the plugin registers again.
const WATCH_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the kubelet may take to read that the resource has lost its devices.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// The identity of a socket file: the next one at the same path has another.
type Identity = (u64, u64, i64, i64);

/// A resource.
pub(super) struct Plugin {
    service: Arc<Service>,
    resource: String,
    /// The name of the socket in the directory of the kubelet's sockets.
    endpoint: String,
    socket: PathBuf,
    kubelet: PathBuf,
    listening: Option<Listening>,
    /// The kubelet's socket at the last registration, and when that was.
    registered: Option<(Identity, Instant)>,
    /// The last problem, which is said once.
    said: Option<String>,
}

/// A socket, which is removed when this is dropped, and its connections, which end.
struct Listening {
    path: PathBuf,
    identity: Identity,
    task: AbortHandle,
    /// Has an owner for each connection.
    _tasks: JoinSet<()>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
        // Another process may have made another one.
        if identity(&self.path) == Some(self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Plugin {
    pub(super) fn new(pool: &str, directory: &Path, offer: watch::Receiver<Offer>) -> Self {
        let endpoint = format!("kcm-{pool}.sock");
        Self {
            service: Arc::new(Service::new(pool, offer)),
            resource: extended(pool),
            socket: directory.join(&endpoint),
            endpoint,
            kubelet: directory.join(api::KUBELET_SOCKET),
            listening: None,
            registered: None,
            said: None,
        }
    }

    /// Serves and registers the resource until the pool is gone.
    pub(super) async fn run(mut self) {
        while self.service.has_pool() {
            let problem = self.keep().await.err().map(|error| format!("{error:#}"));
            if let Some(problem) = problem.as_ref().filter(|problem| self.said.as_ref() != Some(problem)) {
                log::error!("{problem}");
            }
            self.said = problem;
            let _ = timeout(INTERVAL, self.service.gone()).await;
        }
        log::info!("The pool of {} is gone.", self.resource);
        let _ = timeout(END_TIMEOUT, self.service.unwatched()).await;
    }

    /// Makes what is missing of the socket and the registration.
    async fn keep(&mut self) -> Result<(), Error> {
        if self.listening.as_ref().is_none_or(|socket| identity(&self.socket) != Some(socket.identity)) {
            self.registered = None;
            self.listening = None;
            self.listening = Some(listen(&self.socket, &self.service)?);
        }
        let kubelet = identity(&self.kubelet).with_context(|| {
            format!("{}: the kubelet does not run, or has its sockets elsewhere", self.kubelet.display())
        })?;
        let is_registered = self.registered.is_some_and(|(then, since)| {
            then == kubelet && (self.service.is_watched() || since.elapsed() < WATCH_TIMEOUT)
        });
        if !is_registered {
            let request = RegisterRequest {
                version: api::VERSION.into(),
                endpoint: self.endpoint.clone(),
                resource_name: self.resource.clone(),
                options: Some(DevicePluginOptions {}),
            };
            let answer = timeout(REGISTER_TIMEOUT, register(&self.kubelet, request)).await;
            let socket = self.kubelet.display();
            answer.map_err(|_| anyhow!("{socket}: the kubelet does not answer; look at its log"))??;
            self.registered = Some((kubelet, Instant::now()));
            log::info!("Registered {} at the kubelet.", self.resource);
        }
        Ok(())
    }
}

fn identity(path: &Path) -> Option<Identity> {
    let file = fs::symlink_metadata(path).ok().filter(|file| file.file_type().is_socket())?;
    Some((file.dev(), file.ino(), file.ctime(), file.ctime_nsec()))
}

/// Makes the socket, in place of one that nobody serves.
fn listen(path: &Path, service: &Arc<Service>) -> Result<Listening, Error> {
    let failed = |error: io::Error| crate::confdir::file_error(path, error);
    if identity(path).is_some() {
        if Probe::connect(path).is_ok() {
            bail!("{}: another process serves it; is there another kcm device-plugin?", path.display());
        }
        fs::remove_file(path).or_else(|error| match error.kind() {
            ErrorKind::NotFound => Ok(()),
            _ => Err(failed(error)),
        })?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let identity = identity(path).ok_or_else(|| failed(Errno::ENOENT.into()))?;
    let mut tasks = JoinSet::new();
    let task = tasks.spawn(service.clone().accept(listener));
    Ok(Listening { path: path.to_owned(), identity, task, _tasks: tasks })
}

/// Tells the kubelet about the resource. It connects to the plugin before it answers.
async fn register(kubelet: &Path, request: RegisterRequest) -> Result<(), Error> {
    let socket = kubelet.display();
    let stream = UnixStream::connect(kubelet).await.map_err(|error| match error.kind() {
        ErrorKind::ConnectionRefused => anyhow!("{socket}: the kubelet does not run"),
        _ => crate::confdir::file_error(kubelet, error),
    })?;
    let broken = || format!("{socket}: the kubelet does not answer as a kubelet does");
    let (sender, connection) =
        handshake(TokioExecutor::new(), TokioIo::new(stream)).await.with_context(broken)?;
    let mut tasks = JoinSet::new();
    tasks.spawn(async {
        let _ = connection.await;
    });
    let origin = http::Uri::from_static("http://localhost");
    let mut kubelet = Grpc::with_origin(Connection(sender), origin);
    kubelet.ready().await.with_context(broken)?;
    let path = http::uri::PathAndQuery::from_static(api::REGISTER);
    let codec = ProstCodec::<RegisterRequest, Empty>::default();
    match kubelet.unary(tonic::Request::new(request), path, codec).await {
        Ok(_) => Ok(()),
        Err(status) => bail!("{socket}: the kubelet refuses the registration: {}", status.message()),
    }
}

/// A connection to the kubelet, as tonic uses it.
struct Connection(SendRequest<Body>);

impl GrpcService<Body> for Connection {
    type ResponseBody = Incoming;
    type Error = hyper::Error;
    type Future = futures_util::future::BoxFuture<'static, hyper::Result<http::Response<Incoming>>>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<hyper::Result<()>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
