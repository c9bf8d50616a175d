//! The fake API server answers recorded requests as a real one (v1.36) did.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::api_server::rights::Rights;
use super::api_server::{ADMIN, ApiServer};
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

const NODE: &str = "/api/v1/nodes/kcm-02-zzwt7w";
const POD: &str = "/api/v1/namespaces/default/pods/kcm-init-install-discover-pod-kcm-02-zzwt7w";

fn recordings() -> BTreeMap<String, Value> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/kubernetes/api_server/recordings");
    let files = fs::read_dir(directory).expect("recordings").map(|entry| entry.expect("an entry").path());
    files
        .map(|file| {
            let recording = serde_json::from_slice(&fs::read(&file).unwrap()).expect("JSON");
            (file.file_stem().unwrap().to_string_lossy().into_owned(), recording)
        })
        .collect()
}

/// A client that speaks HTTP/2 over TLS.
struct Client(http2::SendRequest<Full<Bytes>>);

impl Client {
    async fn connect(server: &ApiServer) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(server.certificate().as_bytes()).unwrap()).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let stream = TcpStream::connect(server.address()).await.unwrap();
        let name = "127.0.0.1".try_into().unwrap();
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let (sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    /// Returns status, content type and body; for a watch, this number of lines.
    async fn send(
        &mut self,
        token: &str,
        request: &Value,
        address: &str,
        lines: usize,
    ) -> (u16, String, String) {
        let method = request["method"].as_str().unwrap();
        let uri = format!("https://{address}{}", request["path"].as_str().unwrap());
        let mut builder = Request::builder().method(method).uri(uri);
        builder = builder
            .header("authorization", format!("Bearer {token}"))
            .header("user-agent", "Python-urllib/3.13");
        for (header, field) in [("content-type", "contentType"), ("accept", "accept")] {
            if let Some(value) = request[field].as_str() {
                builder = builder.header(header, value);
            }
        }
        let body = if request["body"].is_null() { String::new() } else { request["body"].to_string() };
        let request = builder.body(Full::new(Bytes::from(body))).unwrap();
        let response = self.0.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
        let mut body = response.into_body();
        let mut text = String::new();
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.unwrap().into_data() {
                text.push_str(std::str::from_utf8(&data).unwrap());
            }
            if lines > 0 && text.lines().count() >= lines {
                break;
            }
        }
        (status, kind, text)
    }
}

/// Removes fields that differ each time, and the managed fields of everything but server-side apply.
fn comparable(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.iter().filter(|(name, _)| {
                !matches!(
                    name.as_str(),
                    "uid" | "creationTimestamp" | "resourceVersion" | "time" | "lastTransitionTime"
                )
            });
            let mut kept: serde_json::Map<String, Value> =
                kept.map(|(name, value)| (name.clone(), comparable(value))).collect();
            if let Some(Value::Array(managers)) = kept.get_mut("managedFields") {
                managers.retain(|entry| entry["operation"] == "Apply");
                if managers.is_empty() {
                    kept.remove("managedFields");
                }
            }
            // The description of the column with the name is long, and kcm does not need it.
            if kept.get("format").is_some_and(|format| format == "name") {
                kept.remove("description");
            }
            kept.into()
        }
        Value::Array(items) => items.iter().map(comparable).collect(),
        other => other.clone(),
    }
}

/// Replaces the resource versions of the recording with ours.
fn with_our_versions(request: &Value, versions: &BTreeMap<String, String>) -> Value {
    let mut text = request.to_string();
    for (theirs, ours) in versions {
        for (before, after) in [("\"resourceVersion\":\"", "\""), ("resourceVersion=", "&")] {
            text = text.replace(&format!("{before}{theirs}{after}"), &format!("{before}@{ours}{after}"));
        }
    }
    serde_json::from_str(&text.replace("\"@", "\"").replace("=@", "=")).unwrap()
}

/// Changes the cluster as others had changed it before a recording.
fn prepare(server: &ApiServer, name: &str, all: &BTreeMap<String, Value>) {
    match name {
        "05-node-status-patch-without-capacity" => {
            let mut node = all["06-node-get"]["response"]["body"].clone();
            node["status"] = json!({});
            server.put(NODE, node);
        }
        "06-node-get" => server.change(NODE, |node| {
            node["status"] = all["06-node-get"]["response"]["body"]["status"].clone();
        }),
        "14-node-list" => {
            let mut node = all[name]["response"]["body"]["items"][1].clone();
            node["kind"] = "Node".into();
            server.put("/api/v1/nodes/n1", node);
        }
        "21-crd-get-established" => std::thread::sleep(Duration::from_millis(200)),
        "28-pod-create" => server.put("/api/v1/namespaces", json!({ "default": true })),
        "34-pod-watch-until-succeeded" => {
            for phase in ["Running", "Succeeded"] {
                server.change(POD, |pod| pod["status"]["phase"] = phase.into());
            }
        }
        _ => {}
    }
}

#[test]
fn recorded_requests_get_recorded_answers() {
    let all = recordings();
    assert!(all.len() >= 35, "the recordings are there");
    let server = ApiServer::start();
    let rules = all["01-create-clusterrole"]["request"]["body"]["rules"].as_array().unwrap().clone();
    server.add_user("the-account", "system:serviceaccount:kcm-system:kcm", Rights::Rules(rules));
    server.add_user("nobody", "nobody", Rights::None);
    let address = server.address().to_string();
    let mut client = server.run(Client::connect(&server));
    let (mut versions, mut wrong) = (BTreeMap::new(), Vec::new());
    for (name, recording) in &all {
        prepare(&server, name, &all);
        let token = match recording["caller"].as_str().unwrap_or_default() {
            "cluster admin" | "" => ADMIN,
            "no rights" => "nobody",
            caller if caller.starts_with("service account") => "the-account",
            _ => "unknown",
        };
        let request = with_our_versions(&recording["request"], &versions);
        let expected = &recording["response"];
        let events = expected["events"].as_array().cloned().unwrap_or_default();
        let (status, kind, body) = server.run(client.send(token, &request, &address, events.len()));
        assert_eq!(json!(status), expected["status"], "{name}: {body}");
        if let Some(expected) = expected["contentType"].as_str() {
            assert_eq!(kind, expected, "{name}");
        }
        if !events.is_empty() {
            let ours: Vec<Value> = body.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            assert_eq!(comparable(&json!(ours)), comparable(&json!(events)), "{name}");
            continue;
        }
        if expected["body"].is_string() {
            assert_eq!(body, expected["body"].as_str().unwrap(), "{name}");
            continue;
        }
        let body: Value = serde_json::from_str(&body).expect("JSON");
        if name.starts_with("02") {
            // Only the version itself is comparable.
            assert_eq!(body["gitVersion"], expected["body"]["gitVersion"]);
            continue;
        }
        let (ours, theirs) = (comparable(&body), comparable(&expected["body"]));
        if ours != theirs {
            wrong.push(format!("{name}\n  ours   {ours}\n  theirs {theirs}"));
        }
        let version = |body: &Value| body["metadata"]["resourceVersion"].as_str().map(String::from);
        if let (Some(theirs), Some(ours)) = (version(&expected["body"]), version(&body)) {
            versions.insert(theirs, ours);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
