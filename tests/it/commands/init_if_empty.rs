//! `kcm init` with numbers for the machine, and with --if-empty: existing pools are the configuration.

use std::fs;

use super::init::{Place, machine};
use crate::harness::dir::failure;
use crate::harness::run;

#[test]
fn auto_makes_numbers_for_the_machine() {
    for (cores, flags, expected) in [
        (
            4,
            &["--num-dp-cores=auto", "--num-cp-cores=auto"][..],
            ["controlplane: 2,6", "dataplane*: 0,4 1,5", "infra: 3,7"],
        ),
        (
            2,
            &["--num-dp-cores=auto", "--num-cp-cores=auto"],
            ["controlplane: ", "dataplane*: 0,2", "infra: 1,3"],
        ),
        (
            4,
            &["--num-dp-cores=auto", "--num-cp-cores=0"],
            ["controlplane: ", "dataplane*: 0,4 1,5 2,6", "infra: 3,7"],
        ),
    ] {
        for place in Place::both(&machine(1, cores, "")) {
            let err = place.init(flags);
            assert_eq!(place.pools(), expected);
            assert!(
                err.contains(
                    "INFO:root:Requested data plane cores = auto.\nINFO:root:Requested control plane"
                ),
                "{err}"
            );
            // The same numbers for the same machine.
            assert!(place.init(flags).ends_with("INFO:root:Configuration directory already exists.\n"));
        }
    }
    let small = Place::plain(&machine(1, 1, ""));
    let line = failure(small.kcm(&["init", "--num-dp-cores=auto"]).env("KCM_LOG_LEVEL", "ERROR"));
    assert!(line.contains("auto leaves no core for dataplane"), "{line}");
    assert!(!small.conf.exists());
    let (_, _, status) = run(&mut small.kcm(&["init", "--num-dp-cores=many"]));
    assert_eq!(status, Some(2));
}

#[test]
fn existing_pools_are_the_configuration_if_empty() {
    for place in Place::both(&machine(1, 4, "")) {
        let wanted = ["--if-empty", "--num-dp-cores=2", "--num-cp-cores=1"];
        place.init(&wanted);
        let pools = ["controlplane: 2,6", "dataplane*: 0,4 1,5", "infra: 3,7"];
        assert_eq!(place.pools(), pools);
        assert!(place.init(&wanted).ends_with("has the requested pools.\n"));
        // Pools that the flags do not ask for stay, and are named.
        let err = place.init(&["--if-empty", "--num-dp-cores=1", "--num-cp-cores=1"]);
        let line = err.lines().last().unwrap();
        for part in [
            "WARNING:root:",
            "has pools, which stay; not as requested: ",
            "dataplane has 2 lists, not 1 (only here: 1,5; only requested: none)",
            "controlplane has other lists (only here: 2,6; only requested: 1,5)",
        ] {
            assert!(line.contains(part), "{part}: {line}");
        }
        let err = place.init(&["--if-empty", "--num-dp-cores=9"]);
        let part = "the requested ones are not possible: 9 cores requested for dataplane";
        assert!(err.lines().last().unwrap().contains(part), "{err}");
        assert_eq!(place.pools(), pools);
        // Without the flag it is as strict as before.
        let (_, err, status) = run(&mut place.kcm(&["init", "--num-dp-cores=1", "--num-cp-cores=1"]));
        assert_eq!(status, Some(1), "{err}");
    }
}

#[test]
fn pools_made_by_hand_stay_if_empty() {
    let place = Place::mounted(&machine(1, 4, ""));
    let pools = place.conf.join("pools");
    fs::create_dir(pools.join("dataplane")).unwrap();
    fs::create_dir(pools.join("dataplane/3,7")).unwrap();
    let err = place.init(&["--if-empty", "--num-dp-cores=1", "--num-cp-cores=1", "--isolated"]);
    let line = err.lines().last().unwrap();
    for part in [
        "dataplane is shared, not exclusive",
        "the mode of dataplane is affinity, not isolated",
        "there is no pool controlplane",
        "there is no pool infra",
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert_eq!(place.pools(), ["dataplane: 3,7"]);
}

#[test]
fn an_interrupted_init_is_completed_if_empty() {
    for place in Place::both(&machine(1, 4, "")) {
        let wanted = ["--if-empty", "--num-dp-cores=2", "--num-cp-cores=1"];
        place.init(&wanted);
        let whole = place.pools();
        let list = place.conf.join("pools/infra/3,7");
        if place.mount.is_some() {
            fs::remove_dir(&list).unwrap();
        } else {
            fs::remove_dir_all(&list).unwrap();
        }
        assert!(place.init(&wanted).contains("Completing what an earlier init began."));
        assert_eq!(place.pools(), whole);
    }
}
