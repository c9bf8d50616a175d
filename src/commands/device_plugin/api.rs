//! The protocol between the kubelet and a device plugin: `v1beta1`.
//!
//! Owns the messages, with the fields that kcm uses, the paths of the calls and the words. They are those of
//! `k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1` (`api.proto`, `constants.go`), and the numbers of the fields are the protocol; a
//! test has the bytes. Written by hand, because they are few, and generated code would need protoc for each change.

/// The version in each registration.
pub(super) const VERSION: &str = "v1beta1";
/// The name of the kubelet's socket.
pub(super) const KUBELET_SOCKET: &str = "kubelet.sock";
/// The call of the kubelet.
pub(super) const REGISTER: &str = "/v1beta1.Registration/Register";

/// The calls of a plugin.
pub(super) mod calls {
    pub(in super::super) const OPTIONS: &str = "/v1beta1.DevicePlugin/GetDevicePluginOptions";
    pub(in super::super) const LIST_AND_WATCH: &str = "/v1beta1.DevicePlugin/ListAndWatch";
    pub(in super::super) const ALLOCATE: &str = "/v1beta1.DevicePlugin/Allocate";
}

/// The health of a device that the kubelet may allocate.
const HEALTHY: &str = "Healthy";
/// The health of one that it may not allocate: it counts as capacity only.
const UNHEALTHY: &str = "Unhealthy";

/// Nothing.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Empty {}

/// The optional calls that a plugin wants or has; kcm has none.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct DevicePluginOptions {}

/// The address of a plugin, for the kubelet.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RegisterRequest {
    #[prost(string, tag = "1")]
    pub(super) version: String,
    /// The name of the plugin's socket, in the same directory.
    #[prost(string, tag = "2")]
    pub(super) endpoint: String,
    #[prost(string, tag = "3")]
    pub(super) resource_name: String,
    #[prost(message, optional, tag = "4")]
    pub(super) options: Option<DevicePluginOptions>,
}

/// All devices of a resource.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ListAndWatchResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) devices: Vec<Device>,
}

/// A device.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Device {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, tag = "2")]
    pub(super) health: String,
    #[prost(message, optional, tag = "3")]
    pub(super) topology: Option<TopologyInfo>,
}

impl Device {
    /// Returns a device on these NUMA nodes, or on a machine without any.
    pub(super) fn new(id: &str, is_healthy: bool, nodes: &[u32]) -> Self {
        let nodes: Vec<NumaNode> = nodes.iter().map(|&node| NumaNode { id: node.into() }).collect();
        Self {
            id: id.to_owned(),
            health: if is_healthy { HEALTHY } else { UNHEALTHY }.into(),
            topology: (!nodes.is_empty()).then_some(TopologyInfo { nodes }),
        }
    }
}

/// The place of a device in the machine.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TopologyInfo {
    #[prost(message, repeated, tag = "1")]
    nodes: Vec<NumaNode>,
}

/// A NUMA node.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct NumaNode {
    #[prost(int64, tag = "1")]
    id: i64,
}

/// The devices that the kubelet has chosen for containers.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AllocateRequest {
    #[prost(message, repeated, tag = "1")]
    pub(super) container_requests: Vec<ContainerAllocateRequest>,
}

/// The devices of one container.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ContainerAllocateRequest {
    #[prost(string, repeated, tag = "1")]
    pub(super) devices_ids: Vec<String>,
}

/// The answer for each container, in the order of the requests.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AllocateResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) container_responses: Vec<ContainerAllocateResponse>,
}

/// The changes of one container that its devices need. Other fields are environment, mounts, device files and annotations: a CDI spec has them.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ContainerAllocateResponse {
    #[prost(message, repeated, tag = "5")]
    pub(super) cdi_devices: Vec<CdiDevice>,
}

/// A device of the container runtime.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct CdiDevice {
    #[prost(string, tag = "1")]
    pub(super) name: String,
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    /// The bytes of a field with a length: its number, the wire type 2, the length, the content.
    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, u8::try_from(content.len()).unwrap()], content].concat()
    }

    #[test]
    fn messages_have_the_published_field_numbers() {
        let register = RegisterRequest {
            version: VERSION.into(),
            endpoint: "e".into(),
            resource_name: "r/n".into(),
            options: Some(DevicePluginOptions {}),
        };
        // RegisterRequest: version = 1, endpoint = 2, resource_name = 3, options = 4.
        let expected = [field(1, b"v1beta1"), field(2, b"e"), field(3, b"r/n"), field(4, b"")].concat();
        assert_eq!(register.encode_to_vec(), expected);

        let list = ListAndWatchResponse {
            devices: vec![Device::new("4_12", true, &[0, 1]), Device::new("5", false, &[])],
        };
        // NUMANode: ID = 1, an int64; 0 is not sent. TopologyInfo: nodes = 1. Device: ID = 1, health = 2, topology = 3.
        let nodes = [field(1, b""), field(1, &[1 << 3, 1])].concat();
        let first = [field(1, b"4_12"), field(2, b"Healthy"), field(3, &nodes)].concat();
        let second = [field(1, b"5"), field(2, b"Unhealthy")].concat();
        assert_eq!(list.encode_to_vec(), [field(1, &first), field(1, &second)].concat());

        // AllocateRequest: container_requests = 1; ContainerAllocateRequest: devices_ids = 1.
        let bytes = [field(1, &[field(1, b"a"), field(1, b"b")].concat()), field(1, b"")].concat();
        let request = AllocateRequest::decode(bytes.as_slice()).unwrap();
        let ids: Vec<_> = request.container_requests.into_iter().map(|request| request.devices_ids).collect();
        assert_eq!(ids, [vec!["a".to_owned(), "b".into()], vec![]]);

        // AllocateResponse: container_responses = 1; ContainerAllocateResponse: cdi_devices = 5; CDIDevice: name = 1.
        let cdi_devices = vec![CdiDevice { name: "k/c=d".into() }];
        let response =
            AllocateResponse { container_responses: vec![ContainerAllocateResponse { cdi_devices }] };
        assert_eq!(response.encode_to_vec(), field(1, &field(5, &field(1, b"k/c=d"))));
    }
}
