//! `kcm cluster-init`: the pods that prepare each node, made one after another, many nodes side by side.
//!
//! Owns: the checks before the first request, the order on a node, and what is said of a pod that does not get
//! there. Must not know: what is in a pod.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Error, anyhow, bail};
use futures_util::StreamExt as _;
use futures_util::future::{Either, select};
use futures_util::stream;
use serde_json::Value;

use super::common::output::print;
use crate::backoff::Backoff;
use crate::cli;
use crate::kubernetes::objects::pods::{self, Plan, Pod, State};
use crate::kubernetes::objects::{node, yaml_stream};
use crate::kubernetes::{Cluster, Failure, Notify, Sender, interrupted, sleep, timeout};

mod progress;

use progress::Progress;

/// How long a request is tried.
const PATIENCE: Duration = Duration::from_secs(30);
/// How many nodes are in work at once.
const AT_ONCE: usize = 50;
/// Between watches that end at once, at first and at most.
const PAUSES: RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(5);
/// How long names may be (RFC 1123).
const LONGEST_NAME: usize = 253;

/// Prepares the nodes.
pub(super) fn run(args: &cli::ClusterInit) -> Result<ExitCode, Error> {
    let plan = plan(args)?;
    let named: Vec<String> = args.host_list.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect();
    check_names(&plan, &named)?;
    if args.dry_run && !args.all_hosts {
        return show(&plan, &named);
    }
    let cluster = Cluster::find(PATIENCE)?;
    let known = nodes(&cluster)?;
    let nodes = if args.all_hosts { known } else { all_known(named, &known)? };
    check_names(&plan, &nodes)?;
    if args.dry_run {
        return show(&plan, &nodes);
    }
    log::info!(
        "A pod that mounts {0} itself keeps the mount that it has started with: start it anew when {0} is mounted anew.",
        plan.conf_dir
    );
    let work = Work {
        plan: &plan,
        sender: cluster.sender(),
        timeout: args.timeout,
        pods: RefCell::default(),
        made: RefCell::default(),
        changed: Notify::new(),
        progress: RefCell::new(Progress::new(nodes.len())),
    };
    cluster.run(work.carry_out(&nodes))
}

fn plan(args: &cli::ClusterInit) -> Result<Plan, Error> {
    let path = |flag: &str, path: &Path| {
        let text = path.to_str().filter(|text| text.starts_with('/'));
        let text = text.with_context(|| format!("--{flag}={}: give an absolute path", path.display()))?;
        Ok::<_, Error>(text.trim_end_matches('/').to_owned())
    };
    let plan = Plan {
        commands: args.kcm_cmd_list.0.iter().copied().map(pod_command).collect(),
        namespace: args.namespace.clone(),
        service_account: args.service_account.clone(),
        image: args.kcm_img.clone(),
        pull_policy: args.kcm_img_pol.clone(),
        conf_dir: path("conf-dir", &args.dir.conf_dir)?,
        state_dir: path("state-dir", &args.state_dir)?,
        install_dir: path("install-dir", &args.target.install_dir)?,
        dataplane: args.num_dp_cores,
        controlplane: args.num_cp_cores,
    };
    if [&plan.conf_dir, &plan.state_dir, &plan.install_dir].iter().any(|path| path.is_empty()) {
        bail!("/ itself cannot be given to kcm; give a directory in it");
    }
    Ok(plan)
}

/// Returns the pods' command for a word of `--kcm-cmd-list`.
fn pod_command(command: cli::HostCommand) -> pods::Command {
    match command {
        cli::HostCommand::Init => pods::Command::Init,
        cli::HostCommand::Discover => pods::Command::Discover,
        cli::HostCommand::Install => pods::Command::Install,
        cli::HostCommand::Reconcile => pods::Command::Reconcile,
        cli::HostCommand::NodeReport => pods::Command::NodeReport,
    }
}

/// Whether the pods of these nodes can have their names.
fn check_names(plan: &Plan, nodes: &[String]) -> Result<(), Error> {
    for node in nodes {
        if let Some(pod) = plan.pods(node).into_iter().find(|pod| pod.name.len() > LONGEST_NAME) {
            bail!("{}: too long for the name of a pod; give the node a shorter name", pod.name);
        }
    }
    Ok(())
}

fn show(plan: &Plan, nodes: &[String]) -> Result<ExitCode, Error> {
    let pods: Vec<Pod> = nodes.iter().flat_map(|node| plan.pods(node)).collect();
    print(&yaml_stream(pods.iter().map(|pod| &pod.object)))?;
    Ok(ExitCode::SUCCESS)
}

/// The names of all nodes.
fn nodes(cluster: &Cluster) -> Result<Vec<String>, Error> {
    let (mut names, mut token) = (Vec::new(), None::<String>);
    loop {
        let page = cluster.send(&node::list(token.as_deref()))?;
        names.extend(items(&page).filter_map(node::name).map(String::from));
        token = page.pointer("/metadata/continue").and_then(Value::as_str).map(String::from);
        if token.as_ref().is_none_or(String::is_empty) {
            return Ok(names);
        }
    }
}

fn all_known(named: Vec<String>, known: &[String]) -> Result<Vec<String>, Error> {
    let unknown: Vec<&str> = named.iter().filter(|name| !known.contains(name)).map(String::as_str).collect();
    if !unknown.is_empty() {
        bail!("not in this cluster: {}; nothing was made; look at kubectl get nodes", unknown.join(", "));
    }
    Ok(named)
}

/// What is going on.
struct Work<'a> {
    plan: &'a Plan,
    sender: Sender,
    timeout: cli::Wait,
    /// Our pods as the server last told of them; None before it has.
    pods: RefCell<Option<BTreeMap<String, Value>>>,
    made: RefCell<Vec<String>>,
    changed: Notify,
    progress: RefCell<Progress>,
}

impl Work<'_> {
    async fn carry_out(&self, nodes: &[String]) -> Result<ExitCode, Error> {
        let all = stream::iter(nodes).map(|node| self.prepare(node)).buffer_unordered(AT_ONCE);
        let all = std::pin::pin!(all.collect::<Vec<_>>());
        let others = std::pin::pin!(self.until_disturbed());
        let results = match select(all, others).await {
            Either::Left((results, _)) => results,
            Either::Right((error, _)) => {
                self.progress.borrow_mut().end();
                let made = self.made.borrow();
                let left = if made.is_empty() { "no pod was made".into() } else { made.join(", ") };
                bail!("{error:#}; left as it is: {left}; run again to go on");
            }
        };
        self.progress.borrow_mut().end();
        let failures: Vec<&Error> = results.iter().filter_map(|result| result.as_ref().err()).collect();
        for failure in &failures {
            log::error!("{failure:#}");
        }
        if !failures.is_empty() {
            bail!("{} of {} nodes failed; put that right and run again", failures.len(), nodes.len());
        }
        log::info!("{} nodes are ready.", nodes.len());
        Ok(ExitCode::SUCCESS)
    }

    /// Goes on until somebody tells us to stop or the server does not let us see our pods.
    async fn until_disturbed(&self) -> Error {
        match select(std::pin::pin!(self.follow()), std::pin::pin!(interrupted())).await {
            Either::Left((failure, _)) => failure.into(),
            Either::Right((Ok(()), _)) => anyhow!("interrupted"),
            Either::Right((Err(error), _)) => Error::from(error).context("signals cannot be caught"),
        }
    }

    /// Keeps `pods` as the server has them.
    async fn follow(&self) -> Failure {
        let namespace = &self.plan.namespace;
        let mut backoff = Backoff::new(PAUSES);
        loop {
            let list = match self.sender.send(&pods::list(namespace)).await {
                Ok(list) => list,
                Err(failure) => return failure,
            };
            let items = items(&list).filter_map(|pod| Some((name(pod)?.to_owned(), pod.clone())));
            self.pods.replace(Some(items.collect()));
            self.changed.notify_waiters();
            let mut version = version(&list).unwrap_or_default();
            // A watch ends by itself now and then, and is taken up where it has ended. One that has expired, or from
            // which nothing came, leaves us not knowing: then we list again.
            let mut goes_on = true;
            while goes_on {
                goes_on = false;
                match self.sender.watch(&pods::watch(namespace, &version)).await {
                    Ok(mut watch) => {
                        while let Some(event) = watch.next().await {
                            let newer = self.take(&event);
                            goes_on = newer.is_some();
                            let Some(newer) = newer else { break };
                            version = newer;
                            backoff.reset();
                        }
                    }
                    Err(failure) if failure.is_passing() || failure.code() == Some(410) => {
                        log::debug!("{failure}");
                    }
                    Err(failure) => return failure,
                }
                sleep(backoff.next()).await;
            }
        }
    }

    /// Takes up an event; gives its version. None where we have to list again.
    fn take(&self, event: &Value) -> Option<String> {
        let object = event.get("object")?;
        if let Some(pods) = self.pods.borrow_mut().as_mut()
            && let Some(name) = name(object)
        {
            match event.get("type")?.as_str()? {
                "ADDED" | "MODIFIED" => drop(pods.insert(name.to_owned(), object.clone())),
                "DELETED" => drop(pods.remove(name)),
                _ => {}
            }
        }
        self.changed.notify_waiters();
        version(object)
    }

    /// Brings one node to where all its pods do what they are for.
    async fn prepare(&self, node: &str) -> Result<(), Error> {
        let pods = self.plan.pods(node);
        self.progress.borrow_mut().say(node, "waiting");
        for (index, pod) in pods.iter().enumerate() {
            let done = self.bring_up(node, pod).await;
            if let Err(error) = done {
                self.progress.borrow_mut().finish(node, &format!("{}: failed", pod.does), false);
                return Err(error);
            }
            if index + 1 == pods.len() {
                self.progress.borrow_mut().finish(node, "ready", true);
            }
        }
        Ok(())
    }

    async fn bring_up(&self, node: &str, pod: &Pod) -> Result<(), Error> {
        let subject = format!("pod {}/{}", self.plan.namespace, pod.name);
        let mut last = "not made yet".to_owned();
        let arrived = async {
            self.make(pod).await?;
            loop {
                let changed = self.changed.notified();
                let mut changed = std::pin::pin!(changed);
                changed.as_mut().enable();
                // Every change of any pod wakes us: only a look is taken.
                let state = self.look(&pod.name, |there| pods::state(there, pod.goal));
                match state.with_context(|| format!("{subject}: somebody has deleted it; run again"))? {
                    State::Done => return Ok(()),
                    State::Failed { container, reason } => {
                        return Err(self.told(&subject, pod, container, &reason).await);
                    }
                    State::Waiting(why) if why != last => {
                        self.progress.borrow_mut().say(node, &format!("{}: {why}", pod.does));
                        last = why;
                    }
                    State::Waiting(_) => {}
                }
                changed.await;
            }
        };
        match self.timeout {
            None => arrived.await,
            Some(time) => match timeout(time, arrived).await {
                Ok(done) => done,
                Err(_) => Err(anyhow!(
                    "{subject}: not there after {} s: {last}; look at it with kubectl describe, or give a longer --timeout",
                    time.as_secs()
                )),
            },
        }
    }

    /// Makes a pod, unless it is there already, and as it is to be.
    async fn make(&self, pod: &Pod) -> Result<(), Error> {
        let namespace = &self.plan.namespace;
        let mut backoff = Backoff::new(PAUSES);
        let there = loop {
            if let Some(there) = self.listed(&pod.name).await {
                break there;
            }
            match self.sender.send(&pods::create(namespace, pod)).await {
                Ok(there) => {
                    self.made.borrow_mut().push(pod.name.clone());
                    self.keep(pod, &there);
                    return Ok(());
                }
                // Somebody was faster, perhaps we ourselves, and the answer was lost; or many pods are made at once
                // in a namespace whose quota counts them, and none of this name is there.
                Err(failure) if failure.code() == Some(409) => {
                    match self.sender.send(&pods::get(namespace, &pod.name)).await {
                        Ok(there) if !is_going(&there) => break there,
                        Err(failure) if failure.code() != Some(404) => return Err(failure.into()),
                        _ => {}
                    }
                }
                Err(failure) => return Err(failure.into()),
            }
            sleep(backoff.next()).await;
        };
        if let Some(field) = pods::difference(&there, &pod.object) {
            bail!(
                "pod {namespace}/{0}: there already, and not as it is to be ({1}); kubectl delete pod -n {namespace} {0}",
                pod.name,
                field.trim_start_matches('.')
            );
        }
        self.keep(pod, &there);
        Ok(())
    }

    /// The pod of this name, once the server has told of its pods, and none of this name is on its way out.
    async fn listed(&self, name: &str) -> Option<Value> {
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            match self.pods.borrow().as_ref().map(|pods| pods.get(name).cloned()) {
                None => {}
                Some(Some(there)) if is_going(&there) => {}
                Some(there) => return there,
            }
            changed.await;
        }
    }

    /// Looks at a pod as the server last told of it.
    fn look<T>(&self, name: &str, look: impl FnOnce(&Value) -> T) -> Option<T> {
        self.pods.borrow().as_ref().and_then(|pods| pods.get(name)).map(look)
    }

    /// Notes a pod of which the watch has not told.
    fn keep(&self, pod: &Pod, there: &Value) {
        if let Some(pods) = self.pods.borrow_mut().as_mut() {
            pods.entry(pod.name.clone()).or_insert_with(|| there.clone());
        }
    }

    /// What is to be said of a pod that has failed.
    async fn told(&self, subject: &str, pod: &Pod, container: Option<String>, reason: &str) -> Error {
        let first = pod.object.pointer("/spec/containers/0/name").and_then(Value::as_str);
        let container = container.or_else(|| first.map(String::from)).unwrap_or_default();
        let namespace = &self.plan.namespace;
        let line = self.sender.text(&pods::last_line(namespace, &pod.name, &container)).await.ok();
        let line =
            line.as_deref().and_then(|text| text.lines().last()).filter(|line| !line.trim().is_empty());
        let line = line.map(|line| format!("; its last line: {line}")).unwrap_or_default();
        anyhow!(
            "{subject}, container {container}: {reason}{line}; then kubectl delete pod -n {namespace} {}",
            pod.name
        )
    }
}

/// Those of a list.
fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.get("items").and_then(Value::as_array).into_iter().flatten()
}

fn name(object: &Value) -> Option<&str> {
    object.pointer("/metadata/name").and_then(Value::as_str)
}

/// Whether a pod is being deleted.
fn is_going(pod: &Value) -> bool {
    pod.pointer("/metadata/deletionTimestamp").is_some()
}

fn version(object: &Value) -> Option<String> {
    object.pointer("/metadata/resourceVersion").and_then(Value::as_str).map(String::from)
}
