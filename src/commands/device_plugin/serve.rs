//! The calls of the kubelet for one resource.
//!
//! Owns what is answered: the devices, and which one a container gets. Does not know sockets, or how the lists are found out.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{BoxStream, StreamExt as _, unfold};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::body::Body;
use tonic::server::{Grpc, ServerStreamingService, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use super::api::{
    AllocateRequest, AllocateResponse, CdiDevice, ContainerAllocateResponse, Device, DevicePluginOptions,
    Empty, ListAndWatchResponse, calls,
};
use super::look::{List, Offer};
use crate::commands::cdi::spec;

/// The most connections at a time: the kubelet has one or, when it connects again, two.
const MAX_CONNECTIONS: usize = 16;
/// How long to wait until the next connection is accepted if that was not possible.
const PAUSE: Duration = Duration::from_millis(100);

/// The service of a pool.
#[derive(Debug)]
pub(super) struct Service {
    pool: String,
    offer: watch::Receiver<Offer>,
    /// Each stream of devices has a receiver.
    watched: watch::Sender<()>,
}

impl Service {
    pub(super) fn new(pool: &str, offer: watch::Receiver<Offer>) -> Self {
        Self { pool: pool.to_owned(), offer, watched: watch::Sender::new(()) }
    }

    pub(super) fn has_pool(&self) -> bool {
        self.offer.borrow().contains_key(&self.pool)
    }

    /// Waits until the pool is gone.
    pub(super) async fn gone(&self) {
        // It is also gone if the sender is.
        let _ = self.offer.clone().wait_for(|offer| !offer.contains_key(&self.pool)).await;
    }

    /// Whether somebody has a stream of the devices.
    pub(super) fn is_watched(&self) -> bool {
        self.watched.receiver_count() > 0
    }

    /// Waits until nobody has one.
    pub(super) async fn unwatched(&self) {
        self.watched.closed().await;
    }

    /// Accepts connections, and answers their calls. Ends them when it is dropped.
    pub(super) async fn accept(self: Arc<Self>, listener: UnixListener) {
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            if connections.len() >= MAX_CONNECTIONS {
                connections.join_next().await;
            }
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    log::debug!("{}: a connection cannot be accepted: {error}", self.pool);
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let service = self.clone();
            connections.spawn(async move {
                let answer = service_fn(|request| answer(service.clone(), request));
                let served =
                    http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), answer);
                if let Err(error) = served.await {
                    log::debug!("{}: a connection has ended: {error}", service.pool);
                }
            });
        }
    }

    /// Returns the devices of these lists.
    fn devices(lists: &[List]) -> ListAndWatchResponse {
        let devices =
            lists.iter().map(|list| Device::new(&spec::device(&list.name), list.is_healthy, &list.nodes));
        ListAndWatchResponse { devices: devices.collect() }
    }

    /// Returns the devices, and again whenever they have changed. When the pool is gone, there are none, and the stream ends.
    fn watch(&self) -> BoxStream<'static, Result<ListAndWatchResponse, Status>> {
        let start = (self.offer.clone(), self.watched.subscribe(), self.pool.clone(), None);
        unfold(start, |(mut offer, watched, pool, last)| async move {
            loop {
                let lists = offer.borrow_and_update().get(&pool).map(|lists| Self::devices(lists));
                match (&lists, &last) {
                    (None, Some(None)) => return None,
                    (lists, Some(last)) if lists == last => offer.changed().await.ok()?,
                    _ => {
                        let devices = lists.clone().unwrap_or_default();
                        return Some((Ok(devices), (offer, watched, pool, Some(lists))));
                    }
                }
            }
        })
        .boxed()
    }

    /// Returns what each container needs. Nothing is claimed: the hook in the CDI spec does that when the container starts, and
    /// also when it starts again, when the kubelet does not ask.
    fn allocate(&self, request: &AllocateRequest) -> Result<AllocateResponse, Status> {
        let pool = &self.pool;
        let offer = self.offer.borrow();
        let lists = offer.get(pool).map(Vec::as_slice).unwrap_or_default();
        let container = |ids: &[String]| match ids {
            [id] if lists.iter().any(|list| spec::device(&list.name) == *id) => {
                let name = format!("{}={id}", spec::kind(pool));
                Ok(ContainerAllocateResponse { cdi_devices: vec![CdiDevice { name }] })
            }
            [id] => Err(Status::not_found(format!("pool {pool} has no CPU list {}", id.replace('_', ",")))),
            [] => Ok(ContainerAllocateResponse::default()),
            ids => Err(Status::invalid_argument(format!(
                "a container asks for {} of kcm.intel.com/{pool}, and a process can have one CPU list: ask for 1, and make lists \
                 with more CPUs",
                ids.len()
            ))),
        };
        let requests = request.container_requests.iter();
        let container_responses =
            requests.map(|request| container(&request.devices_ids)).collect::<Result<_, _>>()?;
        Ok(AllocateResponse { container_responses })
    }
}

/// Answers one call.
async fn answer(
    service: Arc<Service>,
    request: http::Request<Incoming>,
) -> Result<http::Response<Body>, Infallible> {
    Ok(match request.uri().path() {
        calls::OPTIONS => unary(request, |_: Empty| Ok(DevicePluginOptions {})).await,
        calls::LIST_AND_WATCH => {
            Grpc::new(ProstCodec::default()).server_streaming(Watch(&service), request).await
        }
        calls::ALLOCATE => unary(request, |request| service.allocate(&request)).await,
        _ => Status::unimplemented("kcm has no such call").into_http(),
    })
}

async fn unary<Q, R, F>(request: http::Request<Incoming>, call: F) -> http::Response<Body>
where
    Q: Message + Default + Send + 'static,
    R: Message + Send + 'static,
    F: FnMut(Q) -> Result<R, Status>,
{
    Grpc::new(ProstCodec::default()).unary(Unary(call), request).await
}

/// A call with one request and one answer.
struct Unary<F>(F);

impl<Q, R, F: FnMut(Q) -> Result<R, Status>> UnaryService<Q> for Unary<F> {
    type Response = R;
    type Future = Ready<Result<Response<R>, Status>>;

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        ready((self.0)(request.into_inner()).map(Response::new))
    }
}

/// The call with the stream of the devices.
struct Watch<'a>(&'a Service);

impl ServerStreamingService<Empty> for Watch<'_> {
    type Response = ListAndWatchResponse;
    type ResponseStream = BoxStream<'static, Result<ListAndWatchResponse, Status>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, _request: Request<Empty>) -> Self::Future {
        ready(Ok(Response::new(self.0.watch())))
    }
}

#[cfg(test)]
mod tests {
    use super::super::api::ContainerAllocateRequest;
    use super::*;

    fn service(pool: &str, lists: &[&str]) -> Service {
        let list = |name: &&str| List { name: (*name).to_owned(), is_healthy: true, nodes: Vec::new() };
        let offer = Offer::from([(pool.to_owned(), lists.iter().map(list).collect())]);
        Service::new(pool, watch::channel(offer).1)
    }

    fn allocated(service: &Service, containers: &[&[&str]]) -> Result<Vec<Vec<String>>, String> {
        let request = |ids: &&[&str]| ContainerAllocateRequest {
            devices_ids: ids.iter().map(|id| (*id).to_owned()).collect(),
        };
        let request = AllocateRequest { container_requests: containers.iter().map(request).collect() };
        let response = service.allocate(&request).map_err(|status| status.message().to_owned())?;
        let names = |response: ContainerAllocateResponse| {
            response.cdi_devices.into_iter().map(|device| device.name).collect()
        };
        Ok(response.container_responses.into_iter().map(names).collect())
    }

    #[test]
    fn each_container_gets_the_cdi_device_of_its_list() {
        let service = service("dp", &["0-3", "4,12"]);
        let expected =
            vec![vec!["kcm.intel.com/dp=4_12".to_owned()], vec!["kcm.intel.com/dp=0-3".to_owned()]];
        assert_eq!(allocated(&service, &[&["4_12"], &["0-3"]]), Ok(expected));
        let digits = self::service("4dp", &["0"]);
        assert_eq!(allocated(&digits, &[&["0"]]), Ok(vec![vec!["kcm.intel.com/pool_4dp=0".to_owned()]]));
    }

    #[test]
    fn what_a_container_cannot_have_is_refused_with_the_reason() {
        let service = service("dp", &["0", "1"]);
        let two = "a container asks for 2 of kcm.intel.com/dp, and a process can have one CPU list: ask for 1, and make \
                   lists with more CPUs";
        assert_eq!(allocated(&service, &[&["0", "1"]]), Err(two.to_owned()));
        assert_eq!(allocated(&service, &[&["2_3"]]), Err("pool dp has no CPU list 2,3".to_owned()));
    }
}
