//! Publishes reports on the API server.
//!
//! Owns that a report is written when it has changed and at every tenth run, what is said of a change, the pauses after
//! failures, that a missing kind is defined, and that the node is the owner of its reports. Does not know what is in a report.

use std::ops::RangeInclusive;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Error, anyhow};
use serde_json::Value;

use super::common::cluster::connected;
use super::common::node::node_name;
use super::common::node_events::NodeEvents;
use crate::backoff::Backoff;
use crate::cli::{self, Repeat};
use crate::kubernetes::Cluster;
use crate::kubernetes::objects::CRDS;
use crate::kubernetes::objects::node;
use crate::kubernetes::objects::reports::{self, CheckChange, PublishedState, Report, Target};

/// A report that has not changed is written again after this number of runs, to show that its author lives.
const RUNS: u32 = 10;
/// How long a request is retried.
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for a periodic run, which the next one follows.
const PERIODIC_RETRY_TIMEOUT: Duration = Duration::from_secs(3);
/// The pauses between failed runs.
const PAUSES: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(60);
/// How long the server may take to serve a kind after its definition.
const ESTABLISH_TIMEOUT: Duration = Duration::from_secs(10);
/// The pauses between checks whether it does.
const ESTABLISH_PAUSES: RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_millis(500);
/// How many conflicts a report may have, and the pauses after them: some five seconds together.
const CONFLICTS: u32 = 30;
const CONFLICT_PAUSES: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_millis(200);

/// Publishes the reports of one kind for one node.
pub(super) struct Publisher<R> {
    target: Target,
    cluster: Option<Cluster>,
    is_periodic: bool,
    schedule: Schedule<R>,
    events: NodeEvents,
}

impl<R: Report> Publisher<R> {
    /// Returns `None` without `--publish`.
    ///
    /// # Errors
    /// The name of the node is not known.
    pub(super) fn new(args: &cli::Publish, repeat: Repeat) -> Result<Option<Self>, Error> {
        if !args.publish {
            return Ok(None);
        }
        let target = Target { namespace: args.namespace.clone(), node: node_name(&args.node)? };
        let (is_periodic, events) = (repeat != Repeat::Once, NodeEvents::new(&target.node));
        Ok(Some(Self { target, cluster: None, is_periodic, schedule: Schedule::new(), events }))
    }

    /// Writes a report if it has changed or is due. Returns whether it was written. A periodic run logs a failure,
    /// and a later one tries again.
    ///
    /// # Errors
    /// The report cannot be written, and this is the only run.
    pub(super) fn publish(&mut self, report: &R) -> Result<bool, Error> {
        if !self.schedule.is_due(report) {
            return Ok(false);
        }
        let target = self.target.clone();
        let is_written = self.attempt(|cluster| write(cluster, &target, report))?.is_some();
        if is_written {
            let changes = report.changes(self.schedule.written.as_ref());
            self.schedule.written(report);
            self.announce(&changes);
        }
        Ok(is_written)
    }

    /// Says which checks have changed since the last report that was written.
    fn announce(&self, changes: &[CheckChange]) {
        for CheckChange { check, errors } in changes.iter().filter(|_| self.is_periodic) {
            match errors.as_slice() {
                [] => log::info!("check {check}: ok again"),
                errors => errors.iter().for_each(|error| log::warn!("check {check}: {error}")),
            }
        }
    }

    /// Returns the published state, the default one if nothing is published yet; `None` if this run cannot read it.
    ///
    /// # Errors
    /// As for [`Self::publish`].
    pub(super) fn fetch(&mut self) -> Result<Option<PublishedState>, Error> {
        let request = reports::get_state(&self.target)?;
        self.attempt(|cluster| match cluster.send(&request) {
            Ok(state) => Ok(state),
            Err(failure) if failure.code() == Some(404) => Ok(PublishedState::default()),
            Err(failure) => Err(failure.into()),
        })
    }

    /// Sends Events about the checks of a report, as `kcm node-report` prints it, that have failed. Does nothing while the API
    /// server is not available.
    pub(super) fn send_events(&mut self, printed: &Value) {
        if let Some(cluster) = self.cluster.as_ref().filter(|_| !self.schedule.is_paused()) {
            self.events.set_checks(cluster, printed);
        }
    }

    /// Runs `work`, unless the last failure is too recent. Returns `None` if it did not run, or failed in a periodic
    /// run.
    fn attempt<T>(&mut self, work: impl FnOnce(&Cluster) -> Result<T, Error>) -> Result<Option<T>, Error> {
        if self.schedule.is_paused() {
            return Ok(None);
        }
        let retry_timeout = if self.is_periodic { PERIODIC_RETRY_TIMEOUT } else { RETRY_TIMEOUT };
        match connected(&mut self.cluster, retry_timeout).and_then(work) {
            Ok(done) => {
                self.schedule.succeeded();
                Ok(Some(done))
            }
            Err(error) if self.is_periodic => {
                let pause = self.schedule.failed();
                log::error!("{error:#}; not published, next attempt in {:.1} s", pause.as_secs_f64());
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// When a report is written.
struct Schedule<R> {
    /// The report that was written last.
    written: Option<R>,
    /// The number of runs since then.
    runs: u32,
    not_before: Option<Instant>,
    backoff: Backoff,
}

impl<R: Clone + PartialEq> Schedule<R> {
    fn new() -> Self {
        Self { written: None, runs: 0, not_before: None, backoff: Backoff::new(PAUSES) }
    }

    /// Counts a run, and returns whether its report has to be written.
    fn is_due(&mut self, report: &R) -> bool {
        self.runs = self.runs.saturating_add(1);
        self.written.as_ref() != Some(report) || self.runs >= RUNS
    }

    fn written(&mut self, report: &R) {
        self.written = Some(report.clone());
        self.runs = 0;
    }

    /// Whether the last attempt failed so recently that there should be no other one yet.
    fn is_paused(&self) -> bool {
        self.not_before.is_some_and(|time| Instant::now() < time)
    }

    fn succeeded(&mut self) {
        self.not_before = None;
        self.backoff.reset();
    }

    /// Returns the pause before the next attempt.
    fn failed(&mut self) -> Duration {
        let pause = self.backoff.next();
        self.not_before = Some(Instant::now() + pause);
        pause
    }
}

fn write<R: Report>(cluster: &Cluster, target: &Target, report: &R) -> Result<(), Error> {
    let time = timestamp(SystemTime::now());
    let mut owner = uid(cluster, &target.node)?;
    let mut request = reports::publish(target, report, &time, owner.as_deref())?;
    let (mut deadline, mut conflicts) = (None, 0);
    let (mut establish_pauses, mut conflict_pauses) =
        (Backoff::new(ESTABLISH_PAUSES), Backoff::new(CONFLICT_PAUSES));
    loop {
        match cluster.send(&request) {
            // The server does not know the kind, or does not serve it yet.
            Err(failure) if failure.is_unknown_kind() => {
                match deadline {
                    None => define::<R>(cluster)?,
                    Some(deadline) if Instant::now() < deadline => sleep(establish_pauses.next()),
                    Some(_) => {
                        return Err(anyhow!(
                            "{}: its kind is defined, but not served; check the CRD",
                            request.subject()
                        ));
                    }
                }
                deadline.get_or_insert_with(|| Instant::now() + ESTABLISH_TIMEOUT);
            }
            // The report stays when the node is gone.
            Err(failure) if failure.is_about_owner() && owner.is_some() => {
                log::debug!("{failure}; the report gets no owner");
                owner = None;
                request = reports::publish(target, report, &time, None)?;
            }
            // Others apply the same object at the same time. Our fields do not depend on theirs.
            Err(failure) if failure.code() == Some(409) && conflicts < CONFLICTS => {
                conflicts += 1;
                sleep(conflict_pauses.next());
            }
            sent => return Ok(sent.map(|_| ())?),
        }
    }
}

/// Returns the UID of a node; `None` if the server does not tell it to us. It is read each time, because a node that was deleted
/// and registered again has another one.
fn uid(cluster: &Cluster, node: &str) -> Result<Option<String>, Error> {
    match cluster.send(&node::metadata(node)?) {
        Ok(node) => Ok(node.metadata.uid),
        Err(failure) if matches!(failure.code(), Some(403 | 404)) => {
            log::debug!("{failure}; the report gets no owner");
            Ok(None)
        }
        Err(failure) => Err(failure.into()),
    }
}

/// Defines a kind, and waits until the server serves it.
fn define<R: Report>(cluster: &Cluster) -> Result<(), Error> {
    let request = reports::apply_definition::<R>()?;
    let mut definition = cluster.send(&request).map_err(|failure| match failure.code() {
        Some(403) => anyhow!(
            "{} is missing, and the server does not let us create it (403 Forbidden); kubectl apply -f {CRDS}",
            request.subject()
        ),
        _ => Error::from(failure),
    })?;
    log::info!("Created {}.", request.subject());
    let deadline = Instant::now() + ESTABLISH_TIMEOUT;
    let mut pauses = Backoff::new(ESTABLISH_PAUSES);
    while !reports::is_established(&definition) {
        if Instant::now() > deadline {
            return Err(anyhow!("{}: not established; check its conditions", request.subject()));
        }
        sleep(pauses.next());
        definition = cluster.send(&reports::get_definition::<R>()?)?;
    }
    Ok(())
}

/// Formats a time as the legacy reports have it: UTC, with microseconds, without a time zone.
fn timestamp(time: SystemTime) -> String {
    let time = humantime::format_rfc3339_micros(time).to_string();
    time.trim_end_matches('Z').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unchanged_report_is_written_at_every_tenth_run() {
        let mut schedule = Schedule::new();
        let runs = 21;
        let written: Vec<u32> = (0..runs)
            .filter(|_| {
                let is_due = schedule.is_due(&"same");
                if is_due {
                    schedule.written(&"same");
                }
                is_due
            })
            .collect();
        assert_eq!(written, [0, 10, 20]);
    }

    #[test]
    fn a_changed_report_is_written_at_once() {
        let mut schedule = Schedule::new();
        schedule.written(&1);
        assert!(!schedule.is_due(&1));
        assert!(schedule.is_due(&2));
        // It could not be written, so it stays due.
        assert!(schedule.is_due(&2));
    }

    #[test]
    fn failures_pause_the_attempts_until_one_succeeds() {
        let mut schedule = Schedule::<()>::new();
        assert!(!schedule.is_paused());
        let first = schedule.failed();
        assert!(schedule.is_paused());
        assert!(first <= *PAUSES.start() * 3 / 2, "{first:?}");
        assert!(schedule.failed() > *PAUSES.start() / 2 * 3 / 2, "the pause grows");
        schedule.succeeded();
        assert!(!schedule.is_paused());
        assert!(schedule.failed() <= *PAUSES.start() * 3 / 2);
    }

    #[test]
    fn a_timestamp_has_the_legacy_form() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_micros(1_484_265_308_735_918);
        assert_eq!(timestamp(time), "2017-01-12T23:55:08.735918");
    }
}
