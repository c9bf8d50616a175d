//! The example of `tests/README.md`, which must have the same text.

use crate::harness::{Mount, Sleeper, errno, held, masks, write};
use nix::errno::Errno;

#[test]
fn a_taken_list_is_refused() {
    // A daemon and its mount, with the exclusive pool `dataplane` and its lists 0 and 1. Dropping it unmounts.
    let mount = Mount::with_dataplane();
    let list = mount.tasks("dataplane", "0");
    // Two processes to claim for. Dropping them kills them.
    let (holder, other) = (Sleeper::new(), Sleeper::new());

    write(&list, holder.pid().to_string()).expect("a claim");
    assert_eq!(errno(write(&list, other.pid().to_string())), Errno::EBUSY);
    assert_eq!((held(&list), masks(holder.pid())), (vec![holder.pid()], vec!["0".to_owned()]));
}
