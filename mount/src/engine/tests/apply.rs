//! The whole configuration at once: all of it or nothing, whatever happens meanwhile.

use nix::errno::Errno;

use super::*;
use crate::model::partition::Missing;
use crate::model::refusal::Refusal;

const A: u32 = 100;
/// The state of a bed.
const AS_IT_IS: &str =
    r#"{"pools":{"excl":{"exclusive":true,"lists":["1","2-3"]},"shared":{"lists":["4-5"]}}}"#;

/// A has the list 1 of the exclusive pool.
fn bed() -> Bed {
    let bed = Bed::new();
    for pid in [SHELL, A] {
        bed.world.spawn(pid, ONLINE, |_| ());
    }
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    bed.world.take_steps();
    bed.world.take_snapshots();
    bed
}

fn apply(bed: &Bed, json: &str) -> Result<(), Refusal> {
    bed.engine.set_config(caller(SHELL, 0), 0.into(), json.as_bytes())
}

fn shown(bed: &Bed) -> String {
    bed.engine.show_config().replace('\n', "")
}

#[test]
fn what_is_shown_can_be_written_and_changes_nothing() {
    let bed = bed();
    assert_eq!(shown(&bed), AS_IT_IS);
    apply(&bed, &bed.engine.show_config()).unwrap();
    assert!(bed.world.take_steps().is_empty(), "nothing is stored");
    let root = caller(SHELL, 0);
    let attributes = crate::engine::Attributes { uid: 7, gid: 0, mode: 0o664 };
    bed.engine.set_attributes(root, EXCL_1.tasks_node(), attributes).unwrap();
    bed.engine.set_partial(root, 0.into(), EXCL, b"1").unwrap();
    let now = shown(&bed);
    assert!(
        now.contains(r#""partial":true,"lists":[{"cpus":"1","tasks":{"owner":7,"mode":"0664"}},"2-3"]"#),
        "{now}"
    );
    bed.world.take_steps();
    apply(&bed, &now).unwrap();
    assert!(bed.world.take_steps().is_empty());
    apply(&bed, AS_IT_IS).unwrap();
    assert!(shown(&bed).contains("0664"), "an owner and a mode that are not given stay");
    assert!(!shown(&bed).contains("partial"));
}

#[test]
fn everything_changes_in_one_step_and_claims_stay() {
    let bed = bed();
    let wanted = r#"{"pools":{"excl":{"exclusive":true,"mode":"isolated","lists":["2-3"]},"new":{"partial":true,"tasks":{"group":9},"lists":["1",{"cpus":"6","tasks":{"mode":"0600"}}]}}}"#;
    apply(&bed, wanted).unwrap();
    assert_eq!(shown(&bed), wanted);
    assert_eq!(bed.claims(), [(A, EXCL_1)], "its list has moved to another pool");
    assert_eq!(bed.world.take_steps().iter().filter(|step| **step == Step::Store).count(), 1);
    for snapshot in bed.world.take_snapshots() {
        let next = Bed::after_crash(&snapshot);
        assert!([AS_IT_IS, wanted].contains(&&*shown(&next)), "{}", shown(&next));
        assert_eq!(next.claims(), [(A, EXCL_1)]);
        next.check_consistency();
    }
    apply(&bed, wanted).unwrap();
    assert!(bed.world.take_steps().is_empty(), "it is idempotent");
    assert_eq!(bed.engine.attributes(SHARED.0), None);
    bed.check_consistency();
}

#[test]
fn what_is_refused_changes_nothing() {
    let bed = bed();
    for (json, errno) in [
        ("", Errno::EINVAL),
        ("{}", Errno::EINVAL),
        (r#"{"pools":{"x":{"list":[]}}}"#, Errno::EINVAL),
        (r#"{"pools":{"X":{}}}"#, Errno::EINVAL),
        (r#"{"pools":{"x":{"lists":["0-"]}}}"#, Errno::EINVAL),
        (r#"{"pools":{"excl":{"exclusive":true,"lists":["1","9"]}}}"#, Errno::EINVAL),
        (r#"{"pools":{"x":{"lists":["0","0-1"]}}}"#, Errno::EBUSY),
        (r#"{"pools":{"x":{"mode":"isolated"}}}"#, Errno::EINVAL),
        // A list with a task does not go, and gets no other mode.
        (r#"{"pools":{}}"#, Errno::EBUSY),
        (r#"{"pools":{"excl":{"exclusive":true,"lists":["1-3"]}}}"#, Errno::EBUSY),
        (r#"{"pools":{"excl":{"exclusive":true,"mode":"isolated","lists":["1"]}}}"#, Errno::EBUSY),
        (r#"{"pools":{"new":{"exclusive":true,"mode":"isolated","lists":["1"]}}}"#, Errno::EBUSY),
    ] {
        assert_eq!(apply(&bed, json).map_err(|it| it.errno()), Err(errno), "{json}");
        assert_eq!(shown(&bed), AS_IT_IS, "{json}");
    }
    bed.world.lack(Some(Missing::Kernel));
    let isolated =
        r#"{"pools":{"excl":{"exclusive":true,"lists":["1"]},"new":{"exclusive":true,"mode":"isolated"}}}"#;
    assert_eq!(apply(&bed, isolated), Err(Refusal::CannotIsolate { missing: Missing::Kernel }));
    let user = bed.engine.set_config(caller(SHELL, 1000), 0.into(), AS_IT_IS.as_bytes());
    assert_eq!(user, Err(Refusal::NotAdmin));
    // Nothing is left reserved.
    bed.world.spawn(200, ONLINE, |_| ());
    bed.write(Target::List(EXCL_23), SHELL, "200").unwrap();
    bed.write(Target::List(SHARED_45), SHELL, "900").unwrap();
    bed.write(Target::List(EXCL_1), SHELL, "-100").unwrap();
    bed.check_consistency();
}

#[test]
fn a_dry_run_is_refused_as_the_real_one_and_changes_nothing() {
    let bed = bed();
    let dry = |pools: &str| apply(&bed, &format!(r#"{{"pools":{pools},"dry_run":true}}"#));
    assert_eq!(dry("{}").unwrap_err().errno(), Errno::EBUSY);
    dry(r#"{"excl":{"exclusive":true,"lists":["1"]}}"#).unwrap();
    apply(&bed, r#"{"pools":{},"dry_run":true,"force":true}"#).unwrap();
    assert_eq!(shown(&bed), AS_IT_IS);
    assert!(!bed.world.take_steps().contains(&Step::Store));
    bed.write(Target::List(EXCL_1), SHELL, "-100").expect("nothing is reserved");
    bed.write(Target::Pool(EXCL), SHELL, "100").unwrap();
    bed.check_consistency();
}

#[test]
fn force_releases_the_tasks_of_a_list_that_goes() {
    let bed = bed();
    bed.write(Target::List(SHARED_45), SHELL, "900").unwrap();
    bed.world.take_snapshots();
    apply(&bed, r#"{"pools":{"shared":{"lists":["4-5"]}},"force":true}"#).unwrap();
    assert_eq!((bed.claims(), bed.world.masks(A)), (vec![(SHELL, SHARED_45)], vec![ONLINE.to_owned()]));
    bed.check_consistency();
    for (index, snapshot) in bed.world.take_snapshots().iter().enumerate() {
        let next = Bed::after_crash(snapshot);
        let is_there = next.engine.configuration().list(EXCL_1).is_some();
        let masks = next.world.masks(A);
        // Between the release and its record the mask may be back, and the list is gone in any case by then.
        assert_eq!(masks, [if is_there { "1" } else { ONLINE }], "step {index}");
        assert_eq!(next.claims().len(), if is_there { 2 } else { 1 });
        next.check_consistency();
    }
}

#[test]
fn a_change_that_cannot_be_stored_leaves_the_tasks_that_it_would_release() {
    let bed = bed();
    bed.on_step(|step, world| {
        if *step == Step::Store {
            world.fail_appends(Some(|| std::io::Error::from(std::io::ErrorKind::StorageFull).into()));
        }
    });
    assert!(matches!(apply(&bed, r#"{"pools":{},"force":true}"#), Err(Refusal::CannotStore { .. })));
    bed.world.fail_appends(None);
    bed.check_locks_at_each_step();
    assert_eq!((bed.claims(), shown(&bed)), (vec![(A, EXCL_1)], AS_IT_IS.to_owned()));
    assert_eq!(bed.world.masks(A), ["1"]);
    bed.write(Target::List(EXCL_23), SHELL, "900").expect("it is open again");
    bed.check_consistency();
}

#[test]
fn a_transient_pool_belongs_to_the_command_that_made_it() {
    let bed = bed();
    bed.engine.set_transient(caller(SHELL, 0), 0.into(), EXCL, b"1").unwrap();
    assert_eq!(shown(&bed), r#"{"pools":{"shared":{"lists":["4-5"]}}}"#);
    apply(&bed, r#"{"pools":{"other":{"lists":["4-5"]}}}"#).unwrap();
    assert_eq!(bed.claims(), [(A, EXCL_1)], "it is left alone");
    let refused = apply(&bed, r#"{"pools":{"other":{"lists":["1"]}}}"#).unwrap_err();
    assert!(matches!(&refused, Refusal::Overlap { other, .. } if other.cpus == "1"), "{refused:?}");
    let wanted = r#"{"pools":{"excl":{"exclusive":true,"lists":["1"]}}}"#;
    apply(&bed, wanted).unwrap();
    assert_eq!(shown(&bed), wanted, "a pool that a document has stays");
    assert_eq!(bed.claims(), [(A, EXCL_1)]);
}

#[test]
fn a_thousand_lists_fit_into_one_write() {
    let lists: Vec<String> = (0..1024)
        .map(|n| format!(r#"{{"cpus":"{}-{}","tasks":{{"owner":1000,"mode":"0660"}}}}"#, 8 * n, 8 * n + 7))
        .collect();
    let json = format!(r#"{{"pools":{{"x":{{"lists":[{}]}}}}}}"#, lists.join(","));
    assert!(json.len() < 1 << 20, "{}", json.len());
    let bed = Bed::new();
    let refused = bed.engine.set_config(caller(0, 0), 0.into(), json.as_bytes()).unwrap_err();
    assert!(matches!(refused, Refusal::UnknownCpus { .. }), "{refused:?}");
}
