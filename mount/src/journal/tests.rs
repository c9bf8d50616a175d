//! Real directories, damaged in every way.
