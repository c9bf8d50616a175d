//! The name of the Kubernetes node that this machine is, and the taint that nodes get.
//!
//! Owns the precedence of `NODE_NAME` over `--node`. Does not know what a command does with the node.

use anyhow::{Context as _, Error, bail};
use k8s_openapi::api::core::v1::Taint;

use crate::cli::{self, is_dns_name};

/// Returns the taint that nodes get, if they get one.
pub(crate) fn taint(arg: &cli::TaintArg) -> Option<Taint> {
    let cli::TaintSpec { key, value, effect } = arg.wanted()?.clone();
    Some(Taint { key, value, effect, time_added: None })
}

/// Returns the name of this node.
///
/// # Errors
/// Neither `NODE_NAME` nor `--node` is set, or the name is invalid.
pub(crate) fn node_name(arg: &cli::NodeArg) -> Result<String, Error> {
    node_name_if_any(arg)?.context("which node is this? set NODE_NAME, or give --node")
}

/// Returns the name of this node, or `None` if neither `NODE_NAME` nor `--node` is set.
///
/// # Errors
/// The name is invalid.
pub(crate) fn node_name_if_any(arg: &cli::NodeArg) -> Result<Option<String>, Error> {
    let from_env = std::env::var("NODE_NAME").ok().filter(|name| !name.is_empty());
    if let (Some(env), Some(flag)) = (&from_env, &arg.node)
        && env != flag
    {
        log::warn!("NODE_NAME={env} takes precedence over --node={flag}");
    }
    choose(from_env, arg.node.clone())
}

/// Returns whether this process is in a pod of kcm, which has the name of its node in `NODE_NAME`.
pub(crate) fn is_in_pod() -> bool {
    std::env::var_os("NODE_NAME").is_some_and(|name| !name.is_empty())
}

/// Returns the name from the environment, else the one from the flag.
fn choose(env: Option<String>, flag: Option<String>) -> Result<Option<String>, Error> {
    let name = env.or(flag);
    if let Some(name) = name.as_ref().filter(|name| !is_dns_name(name)) {
        bail!("{name:?}: not the name of a node; look at NODE_NAME and --node");
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_takes_precedence() {
        let choose = |env: Option<&str>, flag: Option<&str>| {
            choose(env.map(String::from), flag.map(String::from)).map_err(|error| error.to_string())
        };
        assert_eq!(choose(None, None), Ok(None));
        assert_eq!(choose(Some("a"), Some("b")), Ok(Some("a".into())));
        assert_eq!(choose(None, Some("b")), Ok(Some("b".into())));
        assert!(choose(Some("not/a node"), Some("b")).unwrap_err().contains("not/a node"));
    }
}
