//! Many clients at once.

use std::path::PathBuf;

use crate::client::{Client, Job, OWN, Op};
use crate::common::{Mount, Sleeper};
use crate::harness::row;
use crate::null_fs::NullFs;
use crate::stats::{Rounds, Samples};
use crate::table::{Row, Target};

const ROUNDS: usize = 7;
const MS: u64 = 250;
const LISTS: &str = "a machine with two CPUs has two lists that can be claimed: half of the clients use list 0 of a \
shared pool, half of them list 1. A release and a claim are two writes. Most of the cost beyond the \
exchange of requests is masks, the claims log and the cgroup for heirs; architecture.md (*The cost \
of a claim*) has it call by call";
const REFUSAL: &str = "a refusal is explained: the daemon looks up the writer and four of its ancestors, and records the \
refusal for them, in the claims log and in info/events. The 64 clients also take turns: the one that \
gets the list releases it at once, so there is a claim and a release between the refusals";

pub(super) fn rows() -> Vec<Row> {
    let mount = Mount::with_shared();
    let null_fs = NullFs::new();
    let mut rows = Vec::new();
    for clients in [1, 8, 64] {
        let group = |file: &dyn Fn(&str) -> PathBuf| -> Vec<Job> {
            (0..clients).map(|n| release_and_claim(file(["0", "1"][n % 2]))).collect()
        };
        let [kcm, theirs] =
            measure(&[group(&|list| mount.tasks("shared", list)), group(&|list| null_fs.tasks(list))]);
        let work = format!("release and claim, {clients} clients");
        let name = format!("clients-{clients}");
        rows.push(Row { note: LISTS.into(), ..throughput(&name, &work, &kcm, &theirs) });
        let latency = row(
            &format!("{name}-p99"),
            &work,
            &kcm.samples,
            "empty FUSE",
            &theirs.samples,
            Target::AtMost(3.0),
        );
        let ratio = kcm.samples.all().p99() / theirs.samples.all().p99();
        rows.push(Row { work: format!("{work}: p99"), ratio, ..latency });
    }
    rows.extend(fights());
    rows
}

fn release_and_claim(file: PathBuf) -> Job {
    let put = |text: &str| Op::Put { file: file.clone(), text: text.into() };
    Job { timed: vec![put("-0"), put(OWN)], ..Job::default() }
}

fn fights() -> Vec<Row> {
    let mount = Mount::with_dataplane();
    let null_fs = NullFs::new();
    let file = mount.tasks("dataplane", "0");
    let write = Job { timed: vec![Op::Put { file: null_fs.tasks("0"), text: "0".into() }], ..Job::default() };
    let fight = Job { timed: vec![Op::Contend { file: file.clone() }], ..Job::default() };
    let [kcm, theirs] = measure(&[vec![fight.clone(); 64], vec![write.clone(); 64]]);
    let work = "64 clients compete for one exclusive list: a refusal";
    let many =
        row("clients-refused-64", work, &kcm.samples, "empty FUSE", &theirs.samples, Target::AtMost(1.5));
    // A holder that does not release.
    let holder = Sleeper::new();
    std::fs::write(&file, holder.pid().to_string()).expect("a claim");
    let [kcm, theirs] = measure(&[vec![fight], vec![write]]);
    let one = row(
        "clients-refused-1",
        "one client: a refusal",
        &kcm.samples,
        "empty FUSE",
        &theirs.samples,
        Target::Informational,
    );
    [many, one].map(|row| Row { note: REFUSAL.into(), ..row }).into()
}

/// The results of one set of clients.
#[derive(Default)]
struct Outcome {
    samples: Rounds,
    /// Repetitions per second of all clients together, by round.
    throughput: Rounds,
}

/// Measures sets of clients in turn.
fn measure<const N: usize>(sets: &[Vec<Job>; N]) -> [Outcome; N] {
    let mut clients = sets.each_ref().map(|jobs| jobs.iter().map(Client::start).collect::<Vec<_>>());
    let mut outcomes = [(); N].map(|()| Outcome::default());
    for round in 0..=ROUNDS {
        for n in 0..N {
            let set = (round + n) % N;
            clients[set].iter_mut().for_each(|client| client.order("for", MS));
            let results: Vec<(f64, Samples)> = clients[set].iter_mut().map(Client::result).collect();
            // The first round warms up.
            if round > 0 {
                let Outcome { samples, throughput } = &mut outcomes[set];
                throughput.push(Samples::new(vec![results.iter().map(|(each, _)| each).sum()]));
                samples.push(Samples::join(results.into_iter().map(|(_, samples)| samples)));
            }
        }
    }
    outcomes
}

fn throughput(name: &str, work: &str, kcm: &Outcome, theirs: &Outcome) -> Row {
    Row {
        kcm_p99: None,
        theirs_p99: None,
        unit: "/s",
        ..row(name, work, &kcm.throughput, "empty FUSE", &theirs.throughput, Target::AtLeast(0.5))
    }
}
