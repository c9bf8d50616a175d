//! `kcm device-plugin`: CPU lists as devices of the kubelet, so that a pod gets one by asking for it.
//!
//! Owns which pools are resources at the moment, and the end of the command. `look` sees the lists, in another process that may hang
//! with the mount; `plugin` keeps one resource registered, `serve` answers its calls, and `api` has the messages. Does not claim:
//! the container runtime does, by the CDI spec of `kcm cdi`.

mod api;
mod look;
mod observe;
mod plugin;
mod serve;

use std::collections::BTreeMap;
use std::pin::pin;
use std::process::ExitCode;

use anyhow::{Context as _, Error};
use futures_util::future::{Either, select};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::cli;
use crate::kubernetes::interrupted;
use look::Offer;
use plugin::Plugin;

/// Serves the kubelet until a signal ends the command.
///
/// # Errors
/// No thread can be started, or signals cannot be caught.
pub(super) fn run(args: &cli::DevicePlugin) -> Result<ExitCode, Error> {
    if args.look {
        return look::run(&args.dir.conf_dir);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("the command cannot start; look at the limits of this user")?;
    let (sender, offer) = watch::channel(Offer::new());
    observe::start(args.dir.conf_dir.clone(), sender)?;
    runtime.block_on(serve_pools(args, offer))?;
    Ok(ExitCode::SUCCESS)
}

/// Keeps a plugin for each pool.
async fn serve_pools(args: &cli::DevicePlugin, mut offer: watch::Receiver<Offer>) -> Result<(), Error> {
    let mut end = pin!(interrupted());
    let mut plugins = JoinSet::new();
    let mut running = BTreeMap::new();
    loop {
        let names: Vec<String> = offer.borrow_and_update().keys().cloned().collect();
        for pool in names {
            // A plugin ends when its pool is gone. The pool may come again before it has ended.
            if running.get(&pool).is_none_or(tokio::task::AbortHandle::is_finished) {
                let plugin = Plugin::new(&pool, &args.plugins_dir, offer.clone());
                running.insert(pool, plugins.spawn(plugin.run()));
            }
        }
        let change = async {
            select(pin!(offer.changed()), pin!(join_next(&mut plugins))).await;
        };
        if let Either::Right((signal, _)) = select(pin!(change), &mut end).await {
            signal.context("signals cannot be caught; look at the limits of this user")?;
            break;
        }
    }
    // Each one removes its socket.
    plugins.shutdown().await;
    Ok(())
}

/// Waits until a plugin has ended; without end if there is no plugin.
async fn join_next(plugins: &mut JoinSet<()>) {
    if plugins.join_next().await.is_none() {
        std::future::pending::<()>().await;
    }
}
