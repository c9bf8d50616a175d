//! The integration tests: each module is an area, and each file in it holds the tests of one promise.
//!
//! They need root and `/dev/fuse`. `tests/README.md` shows how to add one.
#![allow(
    unreachable_pub,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking, and nothing outside uses this crate"
)]

mod benchmark;
mod claims;
mod commands;
mod containers;
mod daemon;
mod docs;
mod example;
mod harness;
mod kubernetes;
mod tree;

/// Not a test: a second copy of this binary that a test starts as a program of its own (`harness::program`).
#[test]
#[ignore = "a program that tests start"]
fn program() {
    harness::program::run(&[
        ("client", claims::rewriter::client),
        ("client-of-nobody", claims::rewrites::client_of_nobody),
        ("headless", claims::death::headless),
        ("storm", claims::storm::storm),
        ("threads", claims::masks::sleeping_threads),
        ("thread-spawner", claims::masks::thread_spawner),
        ("mask-widener", claims::masks::mask_widener),
        ("writer", claims::exclusive::writer),
        ("reader", tree::page_cache::reader),
    ]);
}
