//! The claim machine against its rules.
