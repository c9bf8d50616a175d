//! A fake Kubernetes API server on loopback: the parts that kcm needs, over TLS, HTTP/1.1 and HTTP/2.
//!
//! Owns connections, users (tokens), the log of all requests, and faults on demand. Its answers agree with recordings of
//! a real server (`recordings.rs`). Does not know what the tests check.
//!
//! Longer than 400 lines because the server and its misbehaviour share one state.

pub mod admission;
pub mod answer;
pub mod apply;
pub mod commands;
pub mod deployed;
pub mod nodes;
pub mod objects;
pub mod rights;
pub mod store;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use admission::Admission;
use answer::{Answer, Asked};
use rights::{Rights, Wanted};
use store::Store;

/// The token of a user with all rights.
pub const ADMIN: &str = "token-of-the-admin-4f1c";

/// A request and its outcome.
#[derive(Clone, Debug)]
pub struct Logged {
    pub user: String,
    /// The header `User-Agent`.
    pub agent: String,
    pub method: String,
    /// With the query.
    pub path: String,
    pub body: Value,
    /// The rights that it needed.
    pub wanted: Vec<Wanted>,
    pub status: u16,
}

impl Logged {
    pub fn is_change(&self) -> bool {
        self.method != "GET"
    }
}

/// A fault of the server.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Answers after this time.
    Slow(Duration),
    /// Ends the connection without an answer.
    Cut,
    /// This status, and how many seconds to wait, if any.
    Status(u16, Option<u64>),
    /// Reports a conflict, as if somebody else had changed the object.
    Conflict,
    /// Status 200 with a body that is not JSON.
    Garbage,
    /// A watch whose version is too old.
    Expired,
    /// Carries it out, and ends the connection without an answer.
    CutAfterwards,
    /// Carries it out, and ends the connection in the middle of the answer; of a watch, of the first event.
    Half,
    /// A watch that ends after its first event.
    Ends,
}

type When = Box<dyn Fn(&str, &str) -> bool + Send>;
type Kubelet = Box<dyn Fn(&Value) -> Vec<(Duration, Value)> + Send>;

pub(crate) struct Inner {
    pub(crate) store: Store,
    users: Vec<(String, String, Rights)>,
    faults: Vec<(Fault, usize, When)>,
    log: Vec<Logged>,
    kubelet: Option<Kubelet>,
    /// Whether the admission plugin OwnerReferencesPermissionEnforcement is on.
    pub(crate) guards_owners: bool,
    pub(crate) admission: Option<Admission>,
    /// The output of containers, by `pod/container`.
    pub(crate) logs: Vec<(String, String)>,
}

pub(crate) struct Shared {
    inner: Mutex<Inner>,
    pub(crate) changed: tokio::sync::Notify,
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server; it ends when dropped.
pub struct ApiServer {
    address: SocketAddr,
    certificate: String,
    shared: Arc<Shared>,
    home: TempDir,
    runtime: Option<tokio::runtime::Runtime>,
}

impl ApiServer {
    pub fn start() -> Self {
        let key = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).expect("a certificate");
        let private = PrivateKeyDer::try_from(key.signing_key.serialize_der()).expect("a key");
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions of TLS")
            .with_no_client_auth()
            .with_single_cert(vec![key.cert.der().clone()], private)
            .expect("a configuration");
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let inner = Inner {
            store: Store::new(),
            users: vec![(ADMIN.into(), "admin".into(), Rights::All)],
            faults: Vec::new(),
            log: Vec::new(),
            kubelet: None,
            guards_owners: false,
            admission: None,
            logs: Vec::new(),
        };
        let shared = Arc::new(Shared { inner: Mutex::new(inner), changed: tokio::sync::Notify::new() });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
        let address = listener.local_addr().expect("an address");
        runtime.spawn(accept(listener, TlsAcceptor::from(Arc::new(config)), Arc::clone(&shared)));
        let home = tempfile::tempdir().expect("a directory");
        Self { address, certificate: key.cert.pem(), shared, home, runtime: Some(runtime) }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Adds a user with a token.
    pub fn add_user(&self, token: &str, name: &str, rights: Rights) {
        self.shared.lock().users.push((token.into(), name.into(), rights));
    }

    /// Writes a kubeconfig with this token, and returns its path.
    pub fn kubeconfig(&self, token: &str) -> PathBuf {
        let file = self.home.path().join(format!("kubeconfig-{token}"));
        // A process may be reading it.
        if file.exists() {
            return file;
        }
        let ca = self.home.path().join("ca.pem");
        fs::write(&ca, &self.certificate).expect("the certificate");
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
            "clusters": [{ "name": "test", "cluster": {
                "server": format!("https://{}", self.address), "certificate-authority": ca,
            }}],
            "users": [{ "name": "test", "user": { "token": token } }],
        });
        fs::write(&file, config.to_string()).expect("a kubeconfig");
        file
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Stores an object.
    pub fn put(&self, path: &str, mut object: Value) {
        if object["kind"] == "Node" {
            objects::default_allocatable(&mut object);
        }
        self.shared.lock().store.put(path, object);
        self.shared.changed.notify_waiters();
    }

    pub fn object(&self, path: &str) -> Option<Value> {
        self.shared.lock().store.get(path).cloned()
    }

    /// Changes an object, as a kubelet or another client does.
    pub fn change(&self, path: &str, change: impl FnOnce(&mut Value)) {
        self.shared.lock().store.change(path, change);
        self.shared.changed.notify_waiters();
    }

    pub fn remove(&self, path: &str) {
        self.shared.lock().store.remove(path);
        self.shared.changed.notify_waiters();
    }

    /// Copies a node's capacity to allocatable, as its kubelet does every ten seconds.
    pub fn kubelet_copies(&self, node: &str) {
        self.change(node, objects::copy_capacity);
    }

    /// Lets only users with the right to delete an object name its owner, as some distributions do.
    pub fn guard_owners(&self) {
        self.shared.lock().guards_owners = true;
    }

    /// Forgets the past changes, so that no watch can continue from its version.
    pub fn forget_changes(&self) {
        let store = &mut self.shared.lock().store;
        store.put("/api/v1/namespaces/default/events/e", json!({}));
        store.oldest = store.version();
    }

    /// Sets how the kubelet changes the status of a new pod: each status after its time.
    pub fn kubelet(&self, kubelet: impl Fn(&Value) -> Vec<(Duration, Value)> + Send + 'static) {
        self.shared.lock().kubelet = Some(Box::new(kubelet));
    }

    /// Sets the admission policies.
    pub fn admit_by(&self, admission: Admission) {
        self.shared.lock().admission = Some(admission);
    }

    /// Sets the output of a container.
    pub fn write_log(&self, pod: &str, container: &str, text: &str) {
        self.shared.lock().logs.push((format!("{pod}/{container}"), text.into()));
    }

    /// Applies a fault to the next `times` requests for whose method and path `when` holds.
    pub fn misbehave(&self, fault: Fault, times: usize, when: impl Fn(&str, &str) -> bool + Send + 'static) {
        self.shared.lock().faults.push((fault, times, Box::new(when)));
    }

    pub fn behave(&self) {
        self.shared.lock().faults.clear();
    }

    pub fn log(&self) -> Vec<Logged> {
        self.shared.lock().log.clone()
    }

    pub fn forget_log(&self) {
        self.shared.lock().log.clear();
    }

    /// The requests that change something.
    pub fn changes(&self) -> Vec<Logged> {
        self.log().into_iter().filter(Logged::is_change).collect()
    }

    /// Runs something beside the server.
    pub fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.as_ref().expect("a runtime").block_on(work)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, shared: Arc<Shared>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let (tls, shared) = (tls.clone(), Arc::clone(&shared));
        let _ = stream.set_nodelay(true);
        tokio::spawn(async move {
            let Ok(stream) = tls.accept(stream).await else { return };
            let service = service_fn(move |request| serve(Arc::clone(&shared), request));
            let _ = auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

type Body = UnsyncBoxBody<Bytes, Cut>;

/// Ends the connection.
#[derive(Debug, thiserror::Error)]
#[error("cut")]
struct Cut;

async fn serve(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, Cut> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Cut)?.to_bytes();
    let header = |name: &str| {
        parts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
    };
    let path = parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    // kube leaves empty parameters in a query. A real server ignores them.
    let path = path.replace("?&", "?").trim_end_matches('?').to_owned();
    let asked = Asked {
        method: parts.method.to_string(),
        path: path.clone(),
        content_type: header("content-type"),
        accept: header("accept"),
        agent: header("user-agent"),
        body: serde_json::from_slice(&body).unwrap_or_default(),
    };
    let token = header("authorization").trim_start_matches("Bearer ").to_owned();
    let fault = take_fault(&shared, &asked);
    let conflict = answer::conflict(&path);
    let forced = match fault {
        Some(Fault::Cut) => Some(Err(Cut)),
        Some(Fault::Slow(time)) => {
            tokio::time::sleep(time).await;
            None
        }
        Some(Fault::Status(code, after)) => Some(Ok(Answer::status(code, "", "in trouble").after(after))),
        Some(Fault::Conflict) => Some(Ok(conflict)),
        Some(Fault::Garbage) => Some(Ok(Answer::text(200, "<html>surprise"))),
        Some(Fault::Expired) => Some(Ok(Answer::text(200, &format!("{}\n", answer::expired())))),
        Some(Fault::CutAfterwards | Fault::Half | Fault::Ends) | None => None,
    };
    let known = shared.lock().users.iter().find(|(t, ..)| *t == token).cloned();
    let user = known.as_ref().map(|(_, name, _)| name.clone()).unwrap_or_default();
    let (wanted, answer) = match forced {
        Some(Err(cut)) => {
            note(&shared, &asked, user, Vec::new(), 0);
            return Err(cut);
        }
        Some(Ok(answer)) => (Vec::new(), answer),
        None => match known {
            None => (Vec::new(), Answer::plain_status(401, "Unauthorized", "Unauthorized")),
            Some((_, name, rights)) => answer::answer(&mut shared.lock(), &asked, &name, &rights),
        },
    };
    note(&shared, &asked, user, wanted, answer.code);
    shared.changed.notify_waiters();
    match asked.method.as_str() {
        _ if answer.code == 201 => tend(&shared, &asked, &answer),
        "DELETE" if answer.code == 200 && asked.path.contains("/pods/") => end(&shared, &asked),
        _ => {}
    }
    if matches!(fault, Some(Fault::CutAfterwards)) {
        return Err(Cut);
    }
    let response = response(shared, answer);
    Ok(match fault {
        Some(fault @ (Fault::Half | Fault::Ends)) => broken_off(response, matches!(fault, Fault::Half)).await,
        _ => response,
    })
}

/// The first frame of an answer, or half of it and then a cut.
async fn broken_off(response: Response<Body>, half: bool) -> Response<Body> {
    let (parts, mut body) = response.into_parts();
    let first = body.frame().await.and_then(Result::ok).and_then(|frame| frame.into_data().ok());
    let mut first = first.unwrap_or_default();
    if half {
        first.truncate(first.len() / 2);
    }
    let frames = stream::iter([Ok(Frame::data(first)), Err(Cut)].into_iter().take(if half { 2 } else { 1 }));
    Response::from_parts(parts, StreamBody::new(frames).boxed_unsync())
}

fn take_fault(shared: &Shared, asked: &Asked) -> Option<Fault> {
    let mut inner = shared.lock();
    let found =
        inner.faults.iter_mut().find(|(_, times, when)| *times > 0 && when(&asked.method, &asked.path))?;
    found.1 -= 1;
    Some(found.0.clone())
}

fn note(shared: &Shared, asked: &Asked, user: String, wanted: Vec<Wanted>, status: u16) {
    let Asked { method, path, agent, body, .. } = asked.clone();
    shared.lock().log.push(Logged { user, agent, method, path, body, wanted, status });
}

/// Acts as the rest of a cluster on a new object: establishes definitions, runs pods.
fn tend(shared: &Arc<Shared>, asked: &Asked, answer: &Answer) {
    let Some(object) = answer.json().cloned() else { return };
    let steps: Vec<(Duration, Value)> = match object["kind"].as_str() {
        Some("CustomResourceDefinition") => vec![(Duration::from_millis(30), objects::established(&object))],
        Some("Pod") => shared.lock().kubelet.as_ref().map(|kubelet| kubelet(&object)).unwrap_or_default(),
        _ => return,
    };
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let path = asked.path.split('?').next().unwrap_or_default();
    let path = if path.ends_with(name) { path.to_owned() } else { format!("{path}/{name}") };
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        for (time, status) in steps {
            tokio::time::sleep(time).await;
            shared.lock().store.change(&path, |object| object["status"] = status);
            shared.changed.notify_waiters();
        }
    });
}

/// Ends a deleted pod, as its kubelet does.
fn end(shared: &Arc<Shared>, asked: &Asked) {
    let (shared, path) = (Arc::clone(shared), asked.path.clone());
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(20)).await;
        shared.lock().store.remove(path.split('?').next().unwrap_or_default());
        shared.changed.notify_waiters();
    });
}

fn response(shared: Arc<Shared>, answer: Answer) -> Response<Body> {
    let builder = Response::builder().status(answer.code).header("content-type", answer.content_type());
    let builder = match answer.retry_after {
        Some(seconds) => builder.header("retry-after", seconds),
        None => builder,
    };
    let body = match answer.watch {
        None => Full::new(Bytes::from(answer.bytes())).map_err(|never| match never {}).boxed_unsync(),
        Some(watch) => {
            let ends = tokio::time::Instant::now() + Duration::from_secs(watch.seconds);
            let events = stream::unfold((shared, watch), move |(shared, mut watch)| async move {
                let clock = Arc::clone(&shared);
                loop {
                    let notified = clock.changed.notified();
                    tokio::pin!(notified);
                    // A change from here on is not missed.
                    notified.as_mut().enable();
                    let next = watch.next(&shared.lock().store);
                    if let Some(line) = next {
                        return Some((Ok(Frame::data(Bytes::from(line + "\n"))), (shared, watch)));
                    }
                    tokio::time::timeout_at(ends, notified).await.ok()?;
                }
            });
            StreamBody::new(events).boxed_unsync()
        }
    };
    builder.body(body).expect("a response")
}
