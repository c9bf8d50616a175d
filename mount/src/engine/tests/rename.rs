//! Renames: tasks keep their claims and get the CPUs that their list has, whatever happens meanwhile.

use nix::errno::Errno;

use super::fakes::Step;
use super::*;
use crate::model::command::Ending;
use crate::model::refusal::Refusal;

const A: u32 = 100;
const B: u32 = 101;

/// A has the list 1 of the exclusive pool, both have the shared list.
fn bed() -> Bed {
    let bed = Bed::new();
    for pid in [SHELL, A, B] {
        bed.world.spawn(pid, ONLINE, |_| ());
    }
    bed.write(Target::List(SHARED_45), SHELL, "100 101").unwrap();
    bed.world.take_steps();
    bed.world.take_snapshots();
    bed
}

fn resize(bed: &Bed, name: &str) -> Result<(), Refusal> {
    bed.engine.change_list(caller(SHELL, 0), SHARED_45, SHARED, name)
}

fn masks(bed: &Bed) -> [Vec<String>; 2] {
    [A, B].map(|pid| bed.world.masks(pid))
}

fn cpus_of(engine: &Engine<Fake>, list: ListId) -> String {
    engine.configuration().list(list).unwrap().cpus().to_string()
}

#[test]
fn the_tasks_of_a_list_move_to_its_new_cpus_and_keep_what_they_had_before() {
    let bed = bed();
    resize(&bed, "6-7").unwrap();
    assert_eq!(masks(&bed), [["6-7"], ["6-7"]]);
    assert_eq!((bed.tasks(SHARED_45), cpus_of(&bed.engine, SHARED_45)), ("100,101".into(), "6-7".into()));
    bed.check_consistency();
    bed.write(Target::List(SHARED_45), SHELL, "-100").unwrap();
    assert_eq!(bed.world.masks(A), [ONLINE], "the mask before the first claim");
}

#[test]
fn masks_are_set_before_the_configuration_is_stored() {
    let bed = bed();
    resize(&bed, "4-6").unwrap();
    let steps = bed.world.take_steps();
    let at = |wanted: &dyn Fn(&Step) -> bool| steps.iter().position(wanted).unwrap();
    let intent = at(&|it| matches!(it, Step::Append(record) if format!("{record:?}").contains("Intent")));
    let mask = at(&|it| matches!(it, Step::SetMask(..)));
    assert!(intent < mask && mask < at(&|it| *it == Step::Store), "{steps:?}");
}

#[test]
fn a_crash_at_any_step_leaves_the_tasks_on_the_cpus_that_their_list_has() {
    for (name, is_stored) in [("6-7", true), ("4", true), ("4-7", true), ("4-7", false)] {
        let bed = bed();
        if !is_stored {
            bed.on_step(|step, world| {
                if *step == Step::Store {
                    world.fail_appends(Some(|| std::io::Error::from(std::io::ErrorKind::StorageFull).into()));
                }
            });
        }
        assert_eq!(resize(&bed, name).is_ok(), is_stored);
        bed.world.fail_appends(None);
        bed.check_locks_at_each_step();
        bed.check_consistency();
        for (index, snapshot) in bed.world.take_snapshots().iter().enumerate() {
            let next = Bed::after_crash(snapshot);
            let cpus = cpus_of(&next.engine, SHARED_45);
            assert!(cpus == "4-5" || is_stored && cpus == name, "{cpus}");
            assert_eq!(masks(&next), [[cpus.clone()], [cpus.clone()]], "{name}, step {index}");
            assert_eq!(next.claims(), [(A, SHARED_45), (B, SHARED_45)]);
            next.check_consistency();
        }
    }
}

#[test]
fn one_task_that_may_not_go_there_keeps_all_where_they_are() {
    let bed = bed();
    bed.world.change(B, |task| task.allowed = cpus("0-5"));
    let refused = resize(&bed, "6-7").unwrap_err();
    assert!(matches!(&refused, Refusal::MaskRefused { list, .. } if list.cpus == "6-7"), "{refused:?}");
    assert_eq!(
        (masks(&bed), cpus_of(&bed.engine, SHARED_45)),
        ([["4-5".into()], ["4-5".into()]].map(Vec::from), "4-5".into())
    );
    bed.check_consistency();
    resize(&bed, "5-6").unwrap_err();
    resize(&bed, "4,5").expect("the same CPUs by another name");
    assert_eq!(bed.engine.configuration().list(SHARED_45).unwrap().name().cpus, "4,5");
}

#[test]
fn a_task_that_dies_meanwhile_does_not_matter() {
    let bed = bed();
    bed.on_step(|step, world| {
        if matches!(step, Step::Append(_)) {
            world.kill(A, Ending::Killed(9));
        }
    });
    resize(&bed, "6-7").unwrap();
    bed.check_locks_at_each_step();
    assert_eq!((bed.tasks(SHARED_45), bed.world.masks(B)), ("101".into(), vec!["6-7".to_owned()]));
    bed.check_consistency();
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let bed = bed();
    bed.world.set_offline(&cpus("7"));
    let root = caller(SHELL, 0);
    let change = |list, pool, name| bed.engine.change_list(root, list, pool, name).map_err(|it| it.errno());
    bed.write(Target::List(EXCL_1), SHELL, "100").unwrap();
    for (list, pool, name, errno) in [
        (SHARED_45, SHARED, "4-x", Errno::EINVAL),
        (SHARED_45, SHARED, "4-9", Errno::EINVAL),
        (SHARED_45, SHARED, "3-5", Errno::EBUSY),
        (EXCL_1, EXCL, "7", Errno::EINVAL),
        (EXCL_1, PoolId(9999), "1", Errno::ENODEV),
        (ListId(9999), EXCL, "6", Errno::ENODEV),
    ] {
        assert_eq!(change(list, pool, name), Err(errno), "{name}");
    }
    bed.write(Target::List(SHARED_45), SHELL, "900").unwrap();
    assert_eq!(change(SHARED_45, EXCL, "4-5"), Err(Errno::EBUSY), "two tasks");
    let user = caller(SHELL, 1000);
    assert_eq!(bed.engine.change_list(user, SHARED_45, SHARED, "4").unwrap_err(), Refusal::NotAdmin);
    assert_eq!(bed.engine.rename_pool(user, SHARED, "x").unwrap_err(), Refusal::NotAdmin);
    assert_eq!(bed.engine.rename_pool(root, SHARED, "X").unwrap_err().errno(), Errno::EINVAL);
    assert_eq!(bed.engine.rename_pool(root, SHARED, "excl").unwrap_err(), Refusal::Exists);
    assert_eq!(
        change(SHARED_45, SHARED, "5,7"),
        Ok(()),
        "a shared list serves with the CPUs that are online"
    );
    assert_eq!(bed.world.masks(B), ["5"]);
    bed.check_consistency();
}

#[test]
fn draining_survives_the_worker_and_renames() {
    let bed = bed();
    let set = |data: &[u8]| bed.engine.set_state(caller(SHELL, 0), 0.into(), SHARED_45, data);
    assert_eq!(bed.engine.show_state(SHARED_45), "affinity\n");
    set(b"drain\n").unwrap();
    set(b"drain").expect("again");
    resize(&bed, "4").unwrap();
    let next = Bed::after_crash(&bed.world.snapshot());
    assert_eq!(next.engine.show_state(SHARED_45), "affinity draining\n");
    assert!(next.write(Target::Pool(SHARED), SHELL, "0").is_err());
    set(b"undrain").unwrap();
    assert_eq!(bed.engine.show_state(SHARED_45), "affinity\n");
    assert_eq!(set(b"free"), Err(Refusal::NotAStateChange));
    let user = bed.engine.set_state(caller(SHELL, 1000), 0.into(), SHARED_45, b"drain");
    assert_eq!(user, Err(Refusal::NotAdmin));
}
