//! The command line, on a mount and on a plain directory.

pub mod apply;
pub mod completions;
pub mod describe;
pub mod describe_people;
pub mod describe_svg;
pub mod documented;
pub mod documented_init;
pub mod hostile;
pub mod init;
pub mod install;
pub mod isolate;
pub mod isolate_choice;
pub mod isolate_mount;
pub mod isolate_plain;
pub mod isolate_terminal;
pub mod node_report;
pub mod pool;
pub mod reconcile;
pub mod reconcile_interval;
pub mod repair;
pub mod shield;
pub mod state;
pub mod status;
pub mod top;
pub mod unanswered;
pub mod uninstall;
