//! What was typed, turned into domain values at once.
//!
//! Owns: names, flags, defaults and help of every command. Must not know: what they do.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

use crate::kubernetes::objects::{is_dns_name, pods};

/// CPU pools as a live filesystem: a PID written into a file is an exclusive, verified claim to CPUs.
#[derive(Debug, Parser)]
#[command(name = "kcm", version, arg_required_else_help = true, subcommand_required = true)]
#[command(after_help = "\
A session:
  kcm mount                                        serve /etc/kcm
  kcm init --num-dp-cores=2 --num-cp-cores=1       make the three pools
  kcm isolate --pool=dataplane -- ./forwarder      run it on CPUs of its own
  echo $$ > /etc/kcm/pools/dataplane/tasks         the same, by hand
  cat /etc/kcm/self/last_error                     why that was refused

Environment: KCM_LOG_LEVEL (CRITICAL, ERROR, WARNING, INFO, DEBUG), KCM_PROC_FS (a procfs, /proc),
KCM_LOCK_TIMEOUT (seconds, 30), KCM_DEV_LSCPU_SYSFS (a system root for lscpu); NODE_NAME, KUBECONFIG.
Exit status: 0 done, 1 failed, 2 usage.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Mount(Mount),
    Unmount(Unmount),
    Init(Init),
    ClusterInit(ClusterInit),
    Isolate(Isolate),
    Describe(Describe),
    Discover(Discover),
    Reconcile(Reconcile),
    NodeReport(NodeReport),
    Install(Install),
    Uninstall(Uninstall),
    Completions(Completions),
    Man(Man),
}

#[derive(Args, Debug)]
pub(crate) struct ConfDirArg {
    /// KCM configuration directory
    #[arg(long, value_name = "dir", default_value = "/etc/kcm")]
    pub(crate) conf_dir: PathBuf,
}

/// Serve the configuration directory as a live filesystem
///
/// Returns once the mount answers. What an earlier daemon recorded in the state directory is in force again:
/// pools, CPU lists, owners and modes, and the claims of tasks that still live.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm mount
  kcm mount --conf-dir=/run/kcm/conf --foreground
  kcm mount --import        take over the plain directory of an older kcm")]
pub(crate) struct Mount {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Where configuration and claims are kept; not inside the configuration directory
    #[arg(long, value_name = "dir", default_value = "/var/lib/kcm")]
    pub(crate) state_dir: PathBuf,
    /// Serve in this process, for service managers; readiness is told by sd_notify(3)
    #[arg(long)]
    pub(crate) foreground: bool,
    /// Take over the pools, lists and living PIDs of a plain directory, and move it aside
    #[arg(long)]
    pub(crate) import: bool,
    /// Make this program the one that serves, on the mount as it is: nobody notices but by a pause
    #[arg(long, conflicts_with_all = ["foreground", "import"])]
    pub(crate) upgrade: bool,
    #[command(flatten)]
    pub(crate) part: Part,
}

/// What a process of the daemon is for; said by the daemon itself alone.
#[derive(Args, Debug)]
pub(crate) struct Part {
    #[arg(long, hide = true, requires = "foreground")]
    pub(crate) worker: bool,
    #[arg(long, hide = true, requires = "foreground")]
    pub(crate) adopt: bool,
    #[arg(long, hide = true, requires = "adopt")]
    pub(crate) replace: bool,
    #[arg(long, hide = true, requires = "foreground")]
    pub(crate) prove: bool,
    #[arg(long, hide = true, requires = "foreground")]
    pub(crate) probe: bool,
}

/// End the mount cleanly; claims live on in the state directory
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  kcm unmount")]
pub(crate) struct Unmount {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
}

/// Make the pools dataplane (exclusive), controlplane and infra (shared)
///
/// Cores are taken socket by socket, core by core; from those that isolcpus= isolates completely, if there are
/// any. Does nothing where the pools are there as asked for.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  kcm init --num-dp-cores=4 --num-cp-cores=1")]
pub(crate) struct Init {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Number of data plane cores
    #[arg(long, value_name = "num", default_value_t = 4)]
    pub(crate) num_dp_cores: usize,
    /// Number of control plane cores
    #[arg(long, value_name = "num", default_value_t = 1)]
    pub(crate) num_cp_cores: usize,
}

/// Prepare Kubernetes nodes: pods on each that mount, make pools, install, discover and report
///
/// Three pods a node at most, each made once the one before has done its work. What is there already and right
/// is left alone, so that a second run goes on where the first one ended.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("hosts").required(true).args(["host_list", "all_hosts"])))]
#[command(after_help = "\
Examples:
  kcm cluster-init --all-hosts
  kcm cluster-init --host-list=node1,node2 --kcm-img=registry/kcm:1 --num-dp-cores=8
  kcm cluster-init --host-list=node1 --dry-run       the pods as YAML")]
pub(crate) struct ClusterInit {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Comma separated list of Kubernetes nodes to prepare
    #[arg(long, value_name = "list", value_delimiter = ',', value_parser = host)]
    pub(crate) host_list: Vec<String>,
    /// Prepare all Kubernetes nodes
    #[arg(long)]
    pub(crate) all_hosts: bool,
    /// Comma separated list of commands to run on each host: init (first), discover, install, reconcile,
    /// nodereport
    #[arg(long, value_name = "list", value_parser = commands)]
    #[arg(default_value = "init,reconcile,install,discover,nodereport")]
    pub(crate) kcm_cmd_list: Commands,
    /// KCM image
    #[arg(long, value_name = "img", default_value = "kcm", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) kcm_img: String,
    /// Image pull policy
    #[arg(long, value_name = "pol", default_value = "IfNotPresent")]
    #[arg(value_parser = ["Never", "IfNotPresent", "Always"])]
    pub(crate) kcm_img_pol: String,
    #[command(flatten)]
    pub(crate) target: InstallDirArg,
    /// Where each node keeps configuration and claims
    #[arg(long, value_name = "dir", default_value = "/var/lib/kcm")]
    pub(crate) state_dir: PathBuf,
    /// Number of data plane cores
    #[arg(long, value_name = "num", default_value_t = 4)]
    pub(crate) num_dp_cores: usize,
    /// Number of control plane cores
    #[arg(long, value_name = "num", default_value_t = 1)]
    pub(crate) num_cp_cores: usize,
    /// The namespace of the pods and of what they report
    #[arg(long, value_name = "name", default_value = "default", value_parser = namespace)]
    pub(crate) namespace: String,
    /// The service account of the pods, which discover and the reports need the rights of
    #[arg(long, value_name = "name", value_parser = host)]
    pub(crate) service_account: Option<String>,
    /// Seconds that a pod may take for its part
    #[arg(long, value_name = "seconds", default_value = "300", value_parser = seconds)]
    pub(crate) timeout: Wait,
    /// Print the pods as YAML, and make none
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// What runs on each host.
#[derive(Clone, Debug)]
pub(crate) struct Commands(pub(crate) Vec<pods::Command>);

fn host(text: &str) -> Result<String, String> {
    let name = text.trim();
    if is_dns_name(name) { Ok(name.into()) } else { Err("not a name that Kubernetes allows".into()) }
}

fn commands(text: &str) -> Result<Commands, String> {
    let mut commands = Vec::new();
    for (index, word) in text.split(',').map(str::trim).enumerate() {
        let known = pods::Command::ALL.into_iter().find(|command| command.name() == word);
        let Some(command) = known else {
            let all = pods::Command::ALL.map(pods::Command::name).join(", ");
            return Err(format!("{word:?}: KCM command should be one of {all}"));
        };
        if command == pods::Command::Init && index > 0 {
            return Err("init command should be run and listed first".into());
        }
        if commands.contains(&command) {
            return Err(format!("{word} is listed twice"));
        }
        commands.push(command);
    }
    Ok(Commands(commands))
}

/// Run a command on a CPU list of a pool
///
/// On a mount, kcm claims and then becomes the command: same PID, signals, terminal and status. On a plain
/// directory it waits for the command and takes itself off the list.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm isolate --pool=dataplane make                  in a shell
  kcm isolate --pool=dataplane 'cd /src && make' -- -j2
  kcm isolate --pool=dataplane -- /bin/prog 'a  b'   without a shell
  kcm isolate --pool=dataplane --wait=30 -- prog     wait for a free list
The command finds its CPU list in $KCM_CPUS_ASSIGNED.")]
#[command(override_usage = "\
kcm isolate [OPTIONS] --pool=<pool> <command> [-- <args>...]
       kcm isolate [OPTIONS] --pool=<pool> -- <program> [<args>...]")]
pub(crate) struct Isolate {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Pool name: dataplane, controlplane, infra, or any other pool
    #[arg(long, value_name = "pool")]
    pub(crate) pool: String,
    /// Wait for a free CPU list, for so many seconds or without end
    #[arg(long, value_name = "seconds", num_args = 0..=1, require_equals = true, default_missing_value = "inf")]
    #[arg(value_parser = seconds)]
    pub(crate) wait: Option<Wait>,
    /// A line for the shell
    #[arg(value_name = "command", required_unless_present = "rest")]
    command: Option<OsString>,
    #[arg(hide = true)]
    args: Vec<OsString>,
    /// The command's arguments, exactly as they stand; without a command, a program and its arguments
    #[arg(last = true, value_name = "args")]
    rest: Vec<OsString>,
}

/// How long something is waited for; `None`: without end.
pub(crate) type Wait = Option<Duration>;

/// What `isolate` runs.
#[derive(Debug)]
pub(crate) enum Program {
    /// A line for `/bin/sh` and its `$@`.
    Shell { line: OsString, args: Vec<OsString> },
    /// A program and its arguments.
    Direct { program: OsString, args: Vec<OsString> },
}

impl Isolate {
    /// What is to be run. `None` where nothing was given, which clap does not let through.
    pub(crate) fn program(&self) -> Option<Program> {
        let mut words = self.args.iter().chain(&self.rest).cloned();
        Some(match &self.command {
            Some(line) => Program::Shell { line: line.clone(), args: words.collect() },
            None => Program::Direct { program: words.next()?, args: words.collect() },
        })
    }
}

fn seconds(text: &str) -> Result<Wait, String> {
    if text == "inf" {
        return Ok(None);
    }
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map(Some).map_err(|_| "not a number of seconds".to_owned())
}

/// Print the configuration directory
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm describe
  kcm describe --format=table
  kcm describe --format=map      who is on which CPU")]
pub(crate) struct Describe {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// json for programs; table and map for people
    #[arg(long, value_enum, value_name = "format", default_value_t = Format::Json)]
    pub(crate) format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Json,
    Table,
    Map,
}

/// Advertise this node's exclusive CPU lists to Kubernetes
///
/// One slot for each list, a label, and a taint that keeps other pods away. What others have set on the node
/// stays. Run again, it changes nothing.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm discover                                       2017's resource, for dataplane
  kcm discover --resource-name=extended --interval=60
  kcm discover --dry-run                             show the patches")]
pub(crate) struct Discover {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    #[command(flatten)]
    pub(crate) node: NodeArg,
    /// opaque: pod.alpha.kubernetes.io/opaque-int-resource-kcm for dataplane;
    /// extended: kcm.intel.com/POOL for every exclusive pool
    #[arg(long, value_enum, value_name = "form", default_value_t = ResourceName::Opaque)]
    pub(crate) resource_name: ResourceName,
    /// Number of seconds to wait between rerunning; 0 runs once
    #[arg(long, value_name = "seconds", default_value = "0", value_parser = interval)]
    pub(crate) interval: Repeat,
    /// Print what would be changed, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Under which name slots are sold: under one alone, or they would be sold twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ResourceName {
    Opaque,
    Extended,
}

/// Whether a report is sent to the Kubernetes API server, and where it lies there.
#[derive(Args, Debug)]
pub(crate) struct Publish {
    /// Publish reports to the Kubernetes API server
    #[arg(long)]
    pub(crate) publish: bool,
    #[command(flatten)]
    pub(crate) node: NodeArg,
    /// The namespace of published reports
    #[arg(long, value_name = "name", default_value = "default", value_parser = namespace)]
    pub(crate) namespace: String,
}

#[derive(Args, Debug)]
pub(crate) struct NodeArg {
    /// The Kubernetes node that this machine is, where NODE_NAME does not say it
    #[arg(long, value_name = "name")]
    pub(crate) node: Option<String>,
}

/// Report claims taken back from the dead, and threads that have left their list
///
/// On a mount the daemon takes claims back at once, and each is told here once, whoever asks. On a plain
/// directory this command does it: run it often.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm reconcile
  kcm reconcile --interval=60
  kcm reconcile --repair        bring strayed threads back to their list
  kcm reconcile --interval=60 --publish
                                as the object ReconcileReport of this node")]
pub(crate) struct Reconcile {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Number of seconds to wait between rerunning; 0 runs once
    #[arg(long, value_name = "seconds", default_value = "0", value_parser = interval)]
    pub(crate) interval: Repeat,
    /// Bring threads back that have left their list
    #[arg(long)]
    pub(crate) repair: bool,
    #[command(flatten)]
    pub(crate) publish: Publish,
}

/// Check the node: configuration, CPUs, intruders on exclusive lists, the kubelet, the mount
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm node-report
  kcm node-report --interval=60
  kcm node-report --publish     as the object NodeReport of this node")]
pub(crate) struct NodeReport {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Number of seconds to wait between rerunning; 0 runs once
    #[arg(long, value_name = "seconds", default_value = "0", value_parser = interval)]
    pub(crate) interval: Repeat,
    /// Where the kubelet keeps cpu_manager_state
    #[arg(long, value_name = "dir", default_value = "/var/lib/kubelet")]
    pub(crate) kubelet_dir: PathBuf,
    #[command(flatten)]
    pub(crate) publish: Publish,
}

/// Put kcm, one static file, into a directory
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm install --install-dir=/opt/bin
  kcm install --systemd         the unit that starts kcm mount at boot, too")]
pub(crate) struct Install {
    #[command(flatten)]
    pub(crate) target: InstallDirArg,
    /// Put kcm.service into this directory, too
    #[arg(long, value_name = "dir", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "/etc/systemd/system")]
    pub(crate) systemd: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct InstallDirArg {
    /// KCM install directory
    #[arg(long, value_name = "dir", default_value = "/opt/bin")]
    pub(crate) install_dir: PathBuf,
}

/// Undo discover, install and init on this node
///
/// Refuses while claims are live. What discover has set is taken back where NODE_NAME or --node says which node
/// this is.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm uninstall
  kcm uninstall --force         release what is claimed")]
pub(crate) struct Uninstall {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    #[command(flatten)]
    pub(crate) target: InstallDirArg,
    #[command(flatten)]
    pub(crate) node: NodeArg,
    /// Where the unit is
    #[arg(long, value_name = "dir", default_value = "/etc/systemd/system")]
    pub(crate) systemd: PathBuf,
    /// Although claims are live: they are released
    #[arg(long)]
    pub(crate) force: bool,
}

/// Print a completion script for a shell
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  kcm completions bash > /usr/share/bash-completion/completions/kcm")]
pub(crate) struct Completions {
    pub(crate) shell: clap_complete::Shell,
}

/// Print a man page
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm man > /usr/share/man/man1/kcm.1
  kcm man isolate | man -l -")]
pub(crate) struct Man {
    /// The page of this command
    pub(crate) command: Option<String>,
}

/// A DNS label (RFC 1123).
fn namespace(text: &str) -> Result<String, String> {
    let is_label = is_dns_name(text) && text.len() <= 63 && !text.contains('.');
    if is_label { Ok(text.into()) } else { Err("not the name of a namespace".into()) }
}

/// How often a command runs (`--interval`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Repeat {
    Once,
    Every(Duration),
}

/// Seconds; 0 means once.
fn interval(text: &str) -> Result<Repeat, String> {
    let invalid = || "not a number of seconds".to_owned();
    let seconds: f64 = text.parse().map_err(|_| invalid())?;
    let interval = Duration::try_from_secs_f64(seconds).map_err(|_| invalid())?;
    match interval.is_zero() {
        false => Ok(Repeat::Every(interval)),
        true if seconds == 0.0 => Ok(Repeat::Once),
        // Less than a nanosecond is not "once".
        true => Err(invalid()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    fn program(words: &[&str]) -> Option<Program> {
        let words = ["kcm", "isolate", "--pool=p"].iter().chain(words);
        match Cli::try_parse_from(words).ok()?.command {
            Command::Isolate(isolate) => isolate.program(),
            _ => None,
        }
    }

    #[test]
    fn arguments_reach_the_command_as_they_stand() {
        match program(&["echo", "--", "a  b", "*", "$HOME", "--flag"]).unwrap() {
            Program::Shell { line, args } => {
                assert_eq!(line, "echo");
                assert_eq!(args, ["a  b", "*", "$HOME", "--flag"]);
            }
            other => panic!("{other:?}"),
        }
        match program(&["--", "cmd", "--", "-x"]).unwrap() {
            Program::Direct { program, args } => {
                assert_eq!(program, "cmd");
                assert_eq!(args, ["--", "-x"]);
            }
            other => panic!("{other:?}"),
        }
        match program(&["sleep", "10"]).unwrap() {
            Program::Shell { line, args } => assert_eq!((line, args), ("sleep".into(), vec!["10".into()])),
            other => panic!("{other:?}"),
        }
        assert!(program(&[]).is_none());
        assert!(program(&["--"]).is_none());
    }

    #[test]
    fn waiting() {
        let wait = |words: &[&str]| match Cli::try_parse_from(
            ["kcm", "isolate", "--pool=p", "true"].iter().chain(words),
        ) {
            Ok(Cli { command: Command::Isolate(isolate) }) => Some(isolate.wait),
            _ => None,
        };
        assert_eq!(wait(&[]), Some(None));
        assert_eq!(wait(&["--wait"]), Some(Some(None)));
        assert_eq!(wait(&["--wait=1.5"]), Some(Some(Some(Duration::from_millis(1500)))));
        assert_eq!(wait(&["--wait=-1"]), None);
        assert_eq!(wait(&["--wait=soon"]), None);
    }
}
