//! The `kcm` program: parse, dispatch, exit code.

fn main() {}
