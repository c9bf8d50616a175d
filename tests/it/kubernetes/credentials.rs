//! The sources of credentials, that no command writes a secret into any line, at any log level and with any error, and what
//! each request says of its author.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use super::api_server::commands::{COMMANDS, assert_no_secret, cluster, kcm};
use super::api_server::{ADMIN, ApiServer, Fault};
use crate::harness::{Mount, run};
use serde_json::{Value, json};

const LEVELS: [&str; 6] = ["CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG", "TRACE"];

/// A kubeconfig with other fields for the cluster and the user.
fn kubeconfig(
    server: &ApiServer,
    name: &str,
    change: impl FnOnce(&mut Value, &mut Value),
) -> std::path::PathBuf {
    let text = fs::read_to_string(server.kubeconfig(ADMIN)).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    let (mut cluster, mut user) = (config["clusters"][0]["cluster"].take(), json!({}));
    change(&mut cluster, &mut user);
    config["clusters"][0]["cluster"] = cluster;
    config["users"][0]["user"] = user;
    let file = server.home().join(name);
    fs::write(&file, config.to_string()).unwrap();
    file
}

#[test]
fn no_command_shows_a_token_at_any_level() {
    let stranger = ApiServer::start();
    let stranger = stranger.certificate();
    let at_level = |level: &str| {
        let (server, mount) = (cluster(), Mount::with_dataplane());
        let untrusted = kubeconfig(&server, "untrusted", |cluster, user| {
            let ca = server.home().join("stranger.pem");
            fs::write(&ca, stranger).unwrap();
            cluster["certificate-authority"] = json!(ca);
            *user = json!({ "token": ADMIN });
        });
        let ways = [
            (ADMIN, server.kubeconfig(ADMIN), true),
            ("unknown-4f1c", server.kubeconfig("unknown-4f1c"), false),
            ("tied-4f1c", server.kubeconfig("tied-4f1c"), false),
            (ADMIN, untrusted, false),
        ];
        for words in COMMANDS {
            for (token, kubeconfig, is_well) in ways.iter().rev() {
                if *is_well {
                    server.misbehave(Fault::Status(500, None), 1, |_, _| true);
                    server.misbehave(Fault::Cut, 1, |_, _| true);
                    server.misbehave(Fault::Garbage, 1, |_, _| true);
                }
                let (out, err, code) = run(&mut kcm(&mount, words, kubeconfig, level));
                assert_eq!(code, Some(i32::from(!is_well)), "{words:?} {err}");
                assert_no_secret(&format!("{out}{err}"), token);
                assert_eq!(err.contains("ERROR:root:"), !is_well && level != "CRITICAL", "{words:?} {err}");
                assert_eq!(
                    err.contains("DEBUG:root:talking to https://127.0.0.1:"),
                    level == "DEBUG",
                    "{words:?} {err}"
                );
            }
        }
    };
    thread::scope(|scope| {
        LEVELS.map(|level| scope.spawn(move || at_level(level))).map(|one| one.join().unwrap())
    });
}

#[test]
fn no_source_of_a_secret_is_shown() {
    const SECRET: &str = "s3cr3t-4f1c";
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let plugin = |line: &str| {
        json!({ "apiVersion": "client.authentication.k8s.io/v1", "command": "sh", "args": ["-c", line],
            "interactiveMode": "Never" })
    };
    let credential = json!({ "apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
        "status": { "token": SECRET } });
    let address = server.address();
    let token = server.home().join("token");
    fs::write(&token, format!("{SECRET}\n")).unwrap();
    for (name, cluster, user, part) in [
        ("inline", json!({}), json!({ "token": SECRET }), "401 Unauthorized"),
        ("basic", json!({}), json!({ "username": "u", "password": SECRET }), "401 Unauthorized"),
        ("plugin", json!({}), json!({ "exec": plugin(&format!("echo '{credential}'")) }), "401 Unauthorized"),
        (
            "failing-plugin",
            json!({}),
            json!({ "exec": plugin(&format!("echo {SECRET}; exit 3")) }),
            "cannot connect to the cluster: the credential plugin of the kubeconfig failed (exit status: 3)",
        ),
        (
            "babbling-plugin",
            json!({}),
            json!({ "exec": plugin(&format!("echo '{{\"status\":\"{SECRET}\"}}'")) }),
            "failed to parse auth exec output",
        ),
        ("line-break", json!({}), json!({ "token": format!("{SECRET}\n") }), "the token has a line break"),
        (
            "file",
            json!({}),
            json!({ "tokenFile": token }),
            "cannot connect to the cluster: ServiceError: invalid bearer token",
        ),
        ("no-map", json!({}), json!(SECRET), "failed to parse kubeconfig YAML"),
        ("no-text", json!({}), json!({ "token": [SECRET] }), "failed to parse kubeconfig YAML"),
        (
            "key",
            json!({}),
            json!({ "client-certificate-data": "eA==", "client-key-data": SECRET }),
            "failed to load client key",
        ),
        (
            "url",
            json!({ "server": format!("https://u:{SECRET}@{address}") }),
            json!({ "token": "unknown" }),
            "401 Unauthorized",
        ),
        (
            "proxy",
            json!({ "proxy-url": format!("ftp://u:{SECRET}@127.0.0.1:9") }),
            json!({ "token": "unknown" }),
            "ftp://127.0.0.1:9: kcm cannot use this proxy",
        ),
    ] {
        let file = kubeconfig(&server, name, |place, fields| {
            place.as_object_mut().unwrap().extend(cluster.as_object().unwrap().clone());
            *fields = user;
        });
        for level in LEVELS {
            let (out, err, code) = run(&mut kcm(&mount, &["discover"], &file, level));
            assert_eq!(code, Some(1), "{name} {err}");
            assert_no_secret(&format!("{out}{err}"), SECRET);
            assert_eq!(err.contains(part), level != "CRITICAL", "{name} {err}");
        }
    }
}

#[test]
fn a_token_can_have_four_sources() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let token = server.home().join("token");
    fs::write(&token, ADMIN).unwrap();
    let print = format!(
        r#"echo '{{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{{"token":"{ADMIN}"}}}}'"#
    );
    let plugin = json!({ "apiVersion": "client.authentication.k8s.io/v1", "command": "sh", "args": ["-c", print],
        "interactiveMode": "Never" });
    for (name, user) in [("file", json!({ "tokenFile": token })), ("plugin", json!({ "exec": plugin }))] {
        let file = kubeconfig(&server, name, |_, fields| *fields = user);
        let (out, err, code) = run(&mut kcm(&mount, &["discover"], &file, "DEBUG"));
        assert_eq!(code, Some(0), "{name} {err}");
        assert_no_secret(&format!("{out}{err}"), ADMIN);
    }

    // The environment of a pod.
    let script = "mount -t tmpfs none /run && A=/run/secrets/kubernetes.io/serviceaccount && mkdir -p $A &&
        cp $H/token $A/token && cp $H/ca.pem $A/ca.crt && echo default > $A/namespace && exec \"$@\"";
    for words in COMMANDS {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh"]);
        let of_pod = kcm(&mount, words, Path::new("/nonexistent"), "DEBUG");
        command.arg(of_pod.get_program()).args(of_pod.get_args());
        for (name, value) in of_pod.get_envs() {
            command.env(name, value.unwrap());
        }
        command.env_remove("KUBECONFIG").env("HOME", "/nonexistent").env("H", server.home());
        let port = server.address().port().to_string();
        command.env("KUBERNETES_SERVICE_HOST", "127.0.0.1").env("KUBERNETES_SERVICE_PORT", port);
        let (out, err, code) = run(&mut command);
        assert_eq!(code, Some(0), "{words:?} {err}");
        assert!(err.contains("DEBUG:root:talking to https://127.0.0.1:"), "{words:?} {err}");
        assert_no_secret(&format!("{out}{err}"), ADMIN);
    }
    assert!(server.log().iter().all(|entry| entry.user == "admin"));
}

#[test]
fn each_request_of_each_command_names_kcm() {
    let (server, mount) = (cluster(), Mount::with_dataplane());
    let version = concat!("kcm/", env!("CARGO_PKG_VERSION"));
    for words in COMMANDS {
        server.forget_log();
        let (_, err, code) = run(&mut kcm(&mount, words, &server.kubeconfig(ADMIN), "ERROR"));
        assert_eq!(code, Some(0), "{words:?}: {err}");
        let log = server.log();
        assert!(!log.is_empty() && log.iter().all(|entry| entry.agent == version), "{words:?}: {log:?}");
    }
}
