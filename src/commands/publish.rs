//! Publishing a report: when it is written, and what happens while it cannot be.
//!
//! Owns: that it is written on change or every tenth beat, the back-off from beat to beat, and that the kind is
//! defined where it is missing. Must not know: what is in a report.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Error, anyhow};
use serde_json::Value;

use super::common::cluster::connected;
use super::common::node::node_name;
use crate::backoff::Backoff;
use crate::cli::{self, Repeat};
use crate::kubernetes::objects::CRDS;
use crate::kubernetes::objects::reports::{self, Kind, Target};
use crate::kubernetes::{Cluster, Failure};

/// A report that has not changed is written again after so many beats: that shows that we live.
const BEATS: u32 = 10;
/// How long a request is tried; by a beat of many: the next one comes.
const PATIENCE: Duration = Duration::from_secs(30);
const PATIENCE_OF_A_BEAT: Duration = Duration::from_secs(3);
/// Between attempts over several beats.
const PAUSES: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(60);
/// How long a kind may take from its definition until it is served.
const ESTABLISHING: Duration = Duration::from_secs(10);
/// How many conflicts one report is to survive, and the pauses after each: some five seconds.
const CONFLICTS: u32 = 30;
const CONFLICT_PAUSES: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_millis(200);

/// Publishes the reports of one node.
pub(super) struct Publisher {
    target: Target,
    cluster: Option<Cluster>,
    runs_on: bool,
    /// What was written last, and how many beats ago.
    published: Option<Value>,
    beats: u32,
    /// After trouble: the next attempt, and the pause after that.
    not_before: Option<Instant>,
    backoff: Backoff,
}

impl Publisher {
    /// None where nothing is to be published.
    ///
    /// # Errors
    /// Nobody says which node this is.
    pub(super) fn new(kind: Kind, args: &cli::Publish, repeat: Repeat) -> Result<Option<Self>, Error> {
        if !args.publish {
            return Ok(None);
        }
        let target = Target { kind, namespace: args.namespace.clone(), node: node_name(&args.node)? };
        let (cluster, published, not_before) = (None, None, None);
        let (runs_on, backoff) = (repeat != Repeat::Once, Backoff::new(PAUSES));
        Ok(Some(Self { target, cluster, runs_on, published, beats: 0, not_before, backoff }))
    }

    /// Writes these fields if they have changed or it is time. Says whether they were written; on a beat,
    /// trouble is logged and tried again later.
    ///
    /// # Errors
    /// Only where there is no next beat.
    pub(super) fn publish(&mut self, fields: &Value) -> Result<bool, Error> {
        self.beats = self.beats.saturating_add(1);
        if self.published.as_ref() == Some(fields) && self.beats < BEATS {
            return Ok(false);
        }
        let target = self.target.clone();
        let written = self.attempt(|cluster| write(cluster, &target, fields))?.is_some();
        if written {
            self.published = Some(fields.clone());
            self.beats = 0;
        }
        Ok(written)
    }

    /// What is published now: Some(None) where nothing is; None where that cannot be had at this beat.
    ///
    /// # Errors
    /// As for [`Self::publish`].
    pub(super) fn stored(&mut self) -> Result<Option<Option<Value>>, Error> {
        let request = self.target.get();
        self.attempt(|cluster| match cluster.send(&request) {
            Ok(object) => Ok(Some(object)),
            Err(failure) if failure.code() == Some(404) => Ok(None),
            Err(failure) => Err(failure.into()),
        })
    }

    fn attempt<T>(&mut self, work: impl FnOnce(&Cluster) -> Result<T, Error>) -> Result<Option<T>, Error> {
        if self.not_before.is_some_and(|time| Instant::now() < time) {
            return Ok(None);
        }
        let patience = if self.runs_on { PATIENCE_OF_A_BEAT } else { PATIENCE };
        let done = connected(&mut self.cluster, patience).and_then(work);
        match done {
            Ok(done) => {
                self.not_before = None;
                self.backoff.reset();
                Ok(Some(done))
            }
            Err(error) if self.runs_on => {
                let pause = self.backoff.next();
                log::error!("{error:#}; not published, next attempt in {:.1} s", pause.as_secs_f64());
                self.not_before = Some(Instant::now() + pause);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

fn write(cluster: &Cluster, target: &Target, fields: &Value) -> Result<(), Error> {
    let request = target.apply(fields, &now());
    let (mut deadline, mut conflicts, mut backoff) = (None, 0, Backoff::new(CONFLICT_PAUSES));
    loop {
        match cluster.send(&request) {
            Err(Failure::Refused { code: 404, reason: None, .. }) => {
                // The server knows no such kind, or not yet.
                match deadline {
                    None => define(cluster, target.kind)?,
                    Some(deadline) if Instant::now() < deadline => {
                        std::thread::sleep(Duration::from_millis(100))
                    }
                    Some(_) => {
                        return Err(anyhow!("{}: defined, and not served; look at the CRD", request.subject));
                    }
                }
                deadline.get_or_insert(Instant::now() + ESTABLISHING);
            }
            // Others apply the same object at the same time. Of ours nothing depends on theirs.
            Err(failure) if failure.code() == Some(409) && conflicts < CONFLICTS => {
                conflicts += 1;
                std::thread::sleep(backoff.next());
            }
            sent => return Ok(sent.map(|_| ())?),
        }
    }
}

/// Makes the definition of a kind, and waits until the server has taken it up.
fn define(cluster: &Cluster, kind: Kind) -> Result<(), Error> {
    let request = reports::apply_definition(kind);
    let mut definition = cluster.send(&request).map_err(|failure| match failure.code() {
        Some(403) => anyhow!(
            "{}: it is missing, and may not be made from here (403 Forbidden); kubectl apply -f {CRDS}",
            request.subject
        ),
        _ => failure.into(),
    })?;
    log::info!("{}: made.", request.subject);
    let deadline = Instant::now() + ESTABLISHING;
    while !reports::is_established(&definition) {
        if Instant::now() > deadline {
            return Err(anyhow!("{}: not established; look at its conditions", request.subject));
        }
        std::thread::sleep(Duration::from_millis(50));
        definition = cluster.send(&reports::get_definition(kind))?;
    }
    Ok(())
}

/// The time as in 2017: UTC, microseconds, no zone.
fn now() -> String {
    let time = humantime::format_rfc3339_micros(SystemTime::now()).to_string();
    time.trim_end_matches('Z').to_owned()
}
