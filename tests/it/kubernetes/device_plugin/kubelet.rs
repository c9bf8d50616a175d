//! A kubelet, as its device plugins see it.
//!
//! Owns the protocol, written from the published one: `k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1/api.proto` has the messages with
//! the numbers of their fields, and `pkg/kubelet/cm/devicemanager` of Kubernetes says what a kubelet does with them. Like that one, it
//! removes the sockets of plugins when it starts, connects to a plugin before it answers a registration, keeps the devices of a
//! plugin that has ended as unhealthy ones, and allocates healthy devices only. Does not know pools.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use futures_util::future::{BoxFuture, FutureExt as _};
use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{UnixListener, UnixStream};
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::server::UnaryService;
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

#[derive(Clone, PartialEq, prost::Message)]
pub struct Empty {}

#[derive(Clone, PartialEq, prost::Message)]
pub struct DevicePluginOptions {
    #[prost(bool, tag = "1")]
    pub pre_start_required: bool,
    #[prost(bool, tag = "2")]
    pub get_preferred_allocation_available: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RegisterRequest {
    #[prost(string, tag = "1")]
    version: String,
    #[prost(string, tag = "2")]
    endpoint: String,
    #[prost(string, tag = "3")]
    resource_name: String,
    #[prost(message, optional, tag = "4")]
    options: Option<DevicePluginOptions>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ListAndWatchResponse {
    #[prost(message, repeated, tag = "1")]
    devices: Vec<Device>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Device {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    health: String,
    #[prost(message, optional, tag = "3")]
    topology: Option<TopologyInfo>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TopologyInfo {
    #[prost(message, repeated, tag = "1")]
    nodes: Vec<NumaNode>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NumaNode {
    #[prost(int64, tag = "1")]
    id: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AllocateRequest {
    #[prost(message, repeated, tag = "1")]
    container_requests: Vec<ContainerAllocateRequest>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerAllocateRequest {
    #[prost(string, repeated, tag = "1")]
    devices_ids: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AllocateResponse {
    #[prost(message, repeated, tag = "1")]
    container_responses: Vec<ContainerAllocateResponse>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerAllocateResponse {
    #[prost(map = "string, string", tag = "1")]
    envs: std::collections::HashMap<String, String>,
    #[prost(map = "string, string", tag = "4")]
    annotations: std::collections::HashMap<String, String>,
    #[prost(message, repeated, tag = "5")]
    cdi_devices: Vec<CdiDevice>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CdiDevice {
    #[prost(string, tag = "1")]
    name: String,
}

/// A resource of a plugin.
#[derive(Clone, Debug, Default)]
pub struct Resource {
    /// The path of the plugin's socket.
    pub socket: PathBuf,
    /// `<ID> <health> <NUMA nodes>`
    pub devices: Vec<String>,
    /// Whether the plugin's stream of devices is open.
    pub is_watched: bool,
    /// How often it was registered.
    pub registrations: usize,
    pub options: Option<DevicePluginOptions>,
}

type Resources = Arc<Mutex<BTreeMap<String, Resource>>>;

/// A kubelet; it ends when it is dropped.
pub struct Kubelet {
    directory: PathBuf,
    resources: Resources,
    /// Refuses registrations for this reason.
    refusal: Arc<Mutex<Option<String>>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Kubelet {
    /// Starts one whose sockets are in this directory.
    pub fn start(directory: &Path) -> Self {
        fs::create_dir_all(directory).unwrap();
        // CleanupPluginDirectory: every file but the checkpoint.
        for entry in fs::read_dir(directory).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let kubelet = Self {
            directory: directory.to_owned(),
            resources: Resources::default(),
            refusal: Arc::default(),
            runtime: Some(runtime),
        };
        let registration = Registration {
            directory: directory.to_owned(),
            resources: kubelet.resources.clone(),
            refusal: kubelet.refusal.clone(),
        };
        let runtime = kubelet.runtime.as_ref().unwrap();
        let listener = {
            let _runtime = runtime.enter();
            UnixListener::bind(directory.join("kubelet.sock")).unwrap()
        };
        runtime.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let registration = registration.clone();
                tokio::spawn(async move {
                    let answer = service_fn(|request| answer(registration.clone(), request));
                    let _ = http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), answer)
                        .await;
                });
            }
        });
        kubelet
    }

    /// Refuses registrations from now on, or no longer.
    pub fn refuse(&self, reason: Option<&str>) {
        *self.refusal.lock().unwrap() = reason.map(str::to_owned);
    }

    /// The resource; empty if it was never registered.
    pub fn resource(&self, name: &str) -> Resource {
        self.resources.lock().unwrap().get(name).cloned().unwrap_or_default()
    }

    /// The names of all resources.
    pub fn resources(&self) -> Vec<String> {
        self.resources.lock().unwrap().keys().cloned().collect()
    }

    /// The devices of a resource, each with its health.
    pub fn devices(&self, name: &str) -> Vec<String> {
        self.resource(name).devices
    }

    /// Asks the plugin for what containers with these devices need: the names of their CDI devices, or the plugin's message.
    pub fn allocate(&self, name: &str, containers: &[&[&str]]) -> Result<Vec<Vec<String>>, String> {
        let request = |ids: &&[&str]| ContainerAllocateRequest {
            devices_ids: ids.iter().map(|id| (*id).to_owned()).collect(),
        };
        let request = AllocateRequest { container_requests: containers.iter().map(request).collect() };
        let socket = self.resource(name).socket;
        let call = call::<_, AllocateResponse>(&socket, "/v1beta1.DevicePlugin/Allocate", request);
        let message = |status: Status| status.message().to_owned();
        let response = self.runtime().block_on(async {
            let mut answers = call.await.map_err(message)?;
            answers.message().await.map_err(message).map(|answer| answer.expect("an answer"))
        })?;
        let names = |container: ContainerAllocateResponse| {
            assert!(container.envs.is_empty() && container.annotations.is_empty());
            container.cdi_devices.into_iter().map(|device| device.name).collect()
        };
        Ok(response.container_responses.into_iter().map(names).collect())
    }

    /// The options that the plugin answers.
    pub fn options(&self, name: &str) -> DevicePluginOptions {
        let socket = self.resource(name).socket;
        let path = "/v1beta1.DevicePlugin/GetDevicePluginOptions";
        self.runtime().block_on(async {
            call(&socket, path, Empty {}).await.unwrap().message().await.unwrap().expect("an answer")
        })
    }

    /// The code and the message of a call that a plugin does not have.
    pub fn refused(&self, name: &str, path: &'static str) -> Status {
        let socket = self.resource(name).socket;
        self.runtime()
            .block_on(async { call::<_, Empty>(&socket, path, Empty {}).await.expect_err("no answer") })
    }

    fn runtime(&self) -> &tokio::runtime::Runtime {
        self.runtime.as_ref().unwrap()
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join("kubelet.sock")
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        // All connections end.
        self.runtime.take().unwrap().shutdown_background();
    }
}

#[derive(Clone)]
struct Registration {
    directory: PathBuf,
    resources: Resources,
    refusal: Arc<Mutex<Option<String>>>,
}

async fn answer(
    registration: Registration,
    request: http::Request<Incoming>,
) -> Result<http::Response<Body>, std::convert::Infallible> {
    assert_eq!(request.uri().path(), "/v1beta1.Registration/Register");
    let mut grpc = tonic::server::Grpc::new(ProstCodec::<Empty, RegisterRequest>::default());
    Ok(grpc.unary(registration, request).await)
}

impl UnaryService<RegisterRequest> for Registration {
    type Response = Empty;
    type Future = BoxFuture<'static, Result<Response<Empty>, Status>>;

    fn call(&mut self, request: Request<RegisterRequest>) -> Self::Future {
        self.clone().register(request.into_inner()).boxed()
    }
}

impl Registration {
    async fn register(self, request: RegisterRequest) -> Result<Response<Empty>, Status> {
        if let Some(reason) = self.refusal.lock().unwrap().clone() {
            return Err(Status::unknown(reason));
        }
        if request.version != "v1beta1" {
            return Err(Status::unknown("requested API version is not supported by kubelet"));
        }
        assert!(request.resource_name.starts_with("kcm.intel.com/"), "{request:?}");
        let socket = self.directory.join(&request.endpoint);
        // It connects before it answers, and asks for the devices afterwards.
        let mut plugin = connect(&socket).await?;
        {
            let mut resources = self.resources.lock().unwrap();
            let resource = resources.entry(request.resource_name.clone()).or_default();
            resource.socket = socket;
            resource.registrations += 1;
            resource.options = request.options;
        }
        tokio::spawn(async move {
            let path = http::uri::PathAndQuery::from_static("/v1beta1.DevicePlugin/ListAndWatch");
            let codec = ProstCodec::<Empty, ListAndWatchResponse>::default();
            let mut devices =
                plugin.server_streaming(Request::new(Empty {}), path, codec).await.unwrap().into_inner();
            let change = |change: &dyn Fn(&mut Resource)| {
                change(self.resources.lock().unwrap().get_mut(&request.resource_name).unwrap());
            };
            while let Ok(Some(list)) = devices.message().await {
                change(&|resource| {
                    resource.is_watched = true;
                    resource.devices = list.devices.iter().map(shown).collect();
                });
            }
            // markResourceUnhealthy
            change(&|resource| {
                resource.is_watched = false;
                for device in &mut resource.devices {
                    *device = device.replace(" Healthy", " Unhealthy");
                }
            });
        });
        Ok(Response::new(Empty {}))
    }
}

fn shown(device: &Device) -> String {
    let nodes = device.topology.iter().flat_map(|topology| &topology.nodes);
    let nodes: Vec<i64> = nodes.map(|node| node.id).collect();
    format!("{} {} {nodes:?}", device.id, device.health)
}

type Plugin = tonic::client::Grpc<Connection>;

/// Connects as the kubelet does, with the authority `localhost`.
async fn connect(socket: &Path) -> Result<Plugin, Status> {
    let failed = |error: &dyn std::fmt::Display| Status::unknown(format!("{}: {error}", socket.display()));
    let stream = UnixStream::connect(socket).await.map_err(|error| failed(&error))?;
    let (sender, connection) =
        handshake(TokioExecutor::new(), TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
    tokio::spawn(connection);
    let origin = http::Uri::from_static("http://localhost");
    Ok(tonic::client::Grpc::with_origin(Connection(sender), origin))
}

/// Sends a request, and returns its answers.
async fn call<Q, R>(socket: &Path, path: &'static str, request: Q) -> Result<Streaming<R>, Status>
where
    Q: prost::Message + 'static,
    R: prost::Message + Default + 'static,
{
    let mut plugin = connect(socket).await?;
    let path = http::uri::PathAndQuery::from_static(path);
    let answers = plugin.server_streaming(Request::new(request), path, ProstCodec::<Q, R>::default()).await?;
    Ok(answers.into_inner())
}

struct Connection(SendRequest<Body>);

impl GrpcService<Body> for Connection {
    type ResponseBody = Incoming;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, hyper::Result<http::Response<Incoming>>>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<hyper::Result<()>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        self.0.send_request(request).boxed()
    }
}
