//! The commands that talk to an API server, and the files in `deploy/`.

pub mod admission;
pub mod api_server;
pub mod cluster_init;
pub mod cluster_init_trouble;
pub mod cluster_uninstall;
pub mod credentials;
pub mod deploy;
pub mod device_plugin;
pub mod discover;
pub mod example_pod;
pub mod helm;
pub mod image;
pub mod kustomize;
pub mod layouts;
pub mod recordings;
pub mod reports;
pub mod undiscover;
pub mod unreachable;
pub mod user_pod;
pub mod withdrawal;
