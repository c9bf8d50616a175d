//! How existing pools differ from the requested ones.
//!
//! Owns the comparison and its words. Does not know what follows from it.

use std::collections::BTreeSet;

use kcm_mount::model::cpuset::CpuSet;

use super::plan::PlannedPool;
use crate::confdir::{Pool, Pools, parse_cpu_list};

/// How many lists a message names of each kind.
const NAMED: usize = 4;

/// Returns what differs: pools, kinds, modes and lists, one sentence each.
pub(super) fn differences(existing: &Pools, planned: &[PlannedPool]) -> Vec<String> {
    let mut found = Vec::new();
    for plan in planned {
        match existing.get(plan.name) {
            Some(pool) => found.extend(of_pool(pool, plan)),
            None => found.push(format!("there is no pool {}", plan.name)),
        }
    }
    let others = existing.keys().filter(|name| planned.iter().all(|plan| plan.name != *name));
    found.extend(others.map(|name| format!("{} is another pool", kcm_mount::text::name(name.as_bytes()))));
    found
}

fn of_pool(pool: &Pool, plan: &PlannedPool) -> Vec<String> {
    let (name, mut found) = (plan.name, Vec::new());
    if pool.exclusive != plan.exclusive {
        let [is, wanted] =
            [pool.exclusive, plan.exclusive].map(|exclusive| if exclusive { "exclusive" } else { "shared" });
        found.push(format!("{name} is {is}, not {wanted}"));
    }
    if pool.isolated != plan.isolated {
        let [is, wanted] =
            [pool.isolated, plan.isolated].map(|isolated| if isolated { "isolated" } else { "affinity" });
        found.push(format!("the mode of {name} is {is}, not {wanted}"));
    }
    let canonical =
        |list: &String| parse_cpu_list(list).map_or_else(|| list.clone(), |cpus| cpus.to_string());
    let is: BTreeSet<String> = pool.lists.keys().map(canonical).collect();
    let wanted: BTreeSet<String> = plan.lists.iter().map(CpuSet::to_string).collect();
    if is != wanted {
        let only = |these: &BTreeSet<String>, those: &BTreeSet<String>| named(these.difference(those));
        let has = match (is.len(), wanted.len()) {
            (is, wanted) if is == wanted => "other lists".to_owned(),
            (1, wanted) => format!("1 list, not {wanted}"),
            (is, wanted) => format!("{is} lists, not {wanted}"),
        };
        found.push(format!(
            "{name} has {has} (only here: {}; only requested: {})",
            only(&is, &wanted),
            only(&wanted, &is)
        ));
    }
    found
}

/// Returns the first lists, and how many there are besides: `0,4 1,5 +2 more`.
fn named<'a>(lists: impl Iterator<Item = &'a String>) -> String {
    let mut lists: Vec<&str> = lists.map(String::as_str).collect();
    lists.sort_by_key(|list| parse_cpu_list(list).and_then(|cpus| cpus.first()));
    let more = lists.len().saturating_sub(NAMED);
    lists.truncate(NAMED);
    match (lists.is_empty(), more) {
        (true, _) => "none".to_owned(),
        (false, 0) => lists.join(" "),
        (false, more) => format!("{} +{more} more", lists.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(exclusive: bool, isolated: bool, lists: &[&str]) -> Pool {
        let lists = lists.iter().map(|list| ((*list).to_owned(), Vec::new())).collect();
        Pool { exclusive, isolated, lists, ..Pool::default() }
    }

    fn planned(name: &'static str, exclusive: bool, isolated: bool, lists: &[&str]) -> PlannedPool {
        let lists = lists.iter().map(|list| list.parse().unwrap()).collect();
        PlannedPool { name, exclusive, isolated, lists }
    }

    #[test]
    fn each_difference_is_named() {
        let existing = Pools::from([
            ("dataplane".to_owned(), pool(false, false, &["0,4", "7"])),
            ("spare".to_owned(), pool(true, false, &["6"])),
        ]);
        let plan = [
            planned("dataplane", true, true, &["0,4", "1,5", "2", "3", "10", "11", "12"]),
            planned("infra", false, false, &["13"]),
        ];
        assert_eq!(
            differences(&existing, &plan),
            [
                "dataplane is shared, not exclusive",
                "the mode of dataplane is affinity, not isolated",
                "dataplane has 2 lists, not 7 (only here: 7; only requested: 1,5 2 3 10 +2 more)",
                "there is no pool infra",
                "spare is another pool",
            ]
        );
    }

    #[test]
    fn pools_as_requested_do_not_differ() {
        let existing = Pools::from([("dataplane".to_owned(), pool(true, false, &["4,0", "1,2,3"]))]);
        assert_eq!(differences(&existing, &[planned("dataplane", true, false, &["0,4", "1-3"])]), [""; 0]);
    }
}
