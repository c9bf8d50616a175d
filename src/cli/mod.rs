//! The command line: commands, flags, defaults and help texts.
//!
//! Owns the definitions; `validate` parses values into domain types, so that a command gets no unchecked text and a
//! wrong value is a usage error. Does not know what the commands do. Help, man pages and completion scripts come from
//! these definitions.
//!
//! Longer than 400 lines because the definitions of all commands are one table.

mod order;
mod suggestions;
mod validate;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use clap::error::ErrorKind;
use clap::{ArgGroup, Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use kcm_mount::model::cpuset::CpuSet;
use nix::sys::resource::{Resource, getrlimit};

use crate::version::VERSION;
pub(crate) use validate::{Cores, HostCommands, Repeat, TaintSpec, Wait, is_dns_name};

/// CPU pools as a live filesystem: a PID written into a file is an exclusive, verified claim to CPUs.
#[derive(Debug, Parser)]
#[command(name = "kcm", version = VERSION, arg_required_else_help = true, subcommand_required = true)]
#[command(infer_long_args = true)]
#[command(after_help = "\
A session:
  kcm mount                                        serve /etc/kcm
  kcm init --num-dp-cores=2 --num-cp-cores=1       create the three pools
  kcm isolate --pool=dataplane -- ./forwarder      run a program on a CPU list of its own
  kcm shield --cpus=2-3 ./forwarder                the same without pools
  echo $$ > /etc/kcm/pools/dataplane/tasks         claim a CPU list for this shell
  cat /etc/kcm/self/last_error                     show why the last operation was refused
  kcm status                                       show whether all is well
  kcm top                                          show the CPUs live

Environment:
  KCM_LOG_LEVEL        CRITICAL (no messages), ERROR, WARNING, INFO (the default) or DEBUG
  KCM_PROC_FS          the procfs to read instead of /proc, such as the host's in a container
  KCM_LOCK_TIMEOUT     seconds to wait for the lock of a plain directory, and to hold it (30)
  KCM_DEV_LSCPU_SYSFS  for tests: the system root that lscpu describes
  NODE_NAME            the name of this Kubernetes node
  KUBECONFIG           the configuration of the Kubernetes client

Exit status: 0 success, 1 failure, 2 wrong usage.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The stack for parsing the command line, in bytes: ten times as much as a program without optimization needs.
const PARSER_STACK: usize = 4 << 20;

impl Cli {
    /// Parses the command line of this process. If it is wrong, prints why and ends the process.
    pub(crate) fn of_process() -> Self {
        // The stack of the first thread may be small (ulimit -s), and the definitions need some room. A thread takes longer.
        let has_room = getrlimit(Resource::RLIMIT_STACK).is_ok_and(|(soft, _)| soft >= PARSER_STACK as u64);
        let start = || std::thread::Builder::new().stack_size(PARSER_STACK).spawn(Self::parsed).ok();
        let thread = if has_room { None } else { start() };
        thread.and_then(|thread| thread.join().ok()).unwrap_or_else(Self::parsed)
    }

    fn parsed() -> Self {
        let words = order::command_first(std::env::args_os().collect(), &Self::command());
        Self::try_parse_from(words).unwrap_or_else(|error| suggestions::without_far_ones(error).exit())
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Mount(Mount),
    Unmount(Unmount),
    Init(Init),
    Pool(Pool),
    Apply(Apply),
    Export(Export),
    ClusterInit(ClusterInit),
    ClusterUninstall(ClusterUninstall),
    Isolate(Isolate),
    Claim(Claim),
    Shield(Shield),
    Cdi(Cdi),
    Hook(Hook),
    Status(Status),
    Events(Events),
    Top(Top),
    Describe(Describe),
    DevicePlugin(DevicePlugin),
    Discover(Discover),
    Undiscover(Undiscover),
    Reconcile(Reconcile),
    NodeReport(NodeReport),
    Install(Install),
    Uninstall(Uninstall),
    Completions(Completions),
    Man(Man),
    State(State),
}

#[derive(Args, Debug)]
pub(crate) struct ConfDirArg {
    /// KCM configuration directory
    #[arg(long, value_name = "dir", default_value = "/etc/kcm")]
    pub(crate) conf_dir: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct KubeletArg {
    /// Directory of the kubelet's cpu_manager_state
    #[arg(long, value_name = "dir", default_value = "/var/lib/kubelet")]
    pub(crate) kubelet_dir: PathBuf,
    /// The kubelet's configuration, which says which CPUs are reserved. Without this flag: what the kubelet's command line
    /// says, else config.yaml in its directory
    #[arg(long, value_name = "file")]
    pub(crate) kubelet_config: Option<PathBuf>,
}

/// For commands that name the pods of tasks.
#[derive(Args, Clone, Debug)]
pub(crate) struct PodsArg {
    /// Directory of the kubelet's links to container logs, whose names have the names of pods. Nothing else is read of it
    #[arg(long, value_name = "dir", default_value = "/var/log/containers")]
    pub(crate) container_logs: PathBuf,
}

/// Serve the configuration directory as a live filesystem
///
/// Returns when the mount answers. Restores what an earlier daemon recorded in the state directory: pools, CPU lists,
/// owners and modes, and the claims of tasks that still run.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm mount
  kcm mount --conf-dir=/run/kcm/conf --foreground
  kcm mount --import        take over a plain directory of the legacy kcm")]
pub(crate) struct Mount {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Directory for configuration and claims; must be outside the configuration directory
    #[arg(long, value_name = "dir", default_value = "/var/lib/kcm")]
    pub(crate) state_dir: PathBuf,
    /// Serve in this process, for service managers; readiness is reported with sd_notify(3)
    #[arg(long)]
    pub(crate) foreground: bool,
    /// Import the pools, lists and running tasks of a plain directory, and rename that directory; without =partial, nothing is
    /// changed if anything cannot be imported
    #[arg(long, value_enum, value_name = "what", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "all")]
    pub(crate) import: Option<Import>,
    /// End when there are no pools, and remove the state directory; for a machine without pools of its own
    #[arg(long, conflicts_with = "upgrade")]
    pub(crate) until_unused: bool,
    /// Replace the running daemon with this binary without unmounting (clients see a short pause)
    #[arg(long, conflicts_with_all = ["foreground", "import"])]
    pub(crate) upgrade: bool,
}

/// How much of a plain directory is imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Import {
    All,
    Partial,
}

/// Unmount and end the daemon; the state directory keeps the claims
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  kcm unmount")]
pub(crate) struct Unmount {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
}

/// Create the pools dataplane (exclusive), controlplane and infra (shared)
///
/// Cores are assigned in order of sockets and cores. If isolcpus= isolates whole cores, dataplane and controlplane get
/// only those. Changes nothing if the pools exist and have the requested number of cores.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm init --num-dp-cores=4 --num-cp-cores=1
  kcm init --num-dp-cores=auto --num-cp-cores=auto
  kcm init --if-empty --layouts=/etc/kcm-layouts/layouts.yaml

A file of layouts:
  default: {dataplane: auto, controlplane: auto}
  node1: {dataplane: 8, controlplane: 2, isolated: true}")]
pub(crate) struct Init {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Number of data plane cores, or auto: all but one for infra and those of the control plane
    #[arg(long, value_name = "num", default_value = "4", value_parser = validate::cores)]
    pub(crate) num_dp_cores: Cores,
    /// Number of control plane cores, or auto: one, but none if the data plane needs it
    #[arg(long, value_name = "num", default_value = "1", value_parser = validate::cores)]
    pub(crate) num_cp_cores: Cores,
    /// Let nothing else run on the data plane cores while they are claimed (needs kcm mount and cgroup v2)
    #[arg(long)]
    pub(crate) isolated: bool,
    /// Create pools only if there are none; a difference to existing pools is a warning. If this machine cannot have the
    /// requested pools, say why, also with an Event of the Kubernetes node, and succeed without pools
    #[arg(long)]
    pub(crate) if_empty: bool,
    /// YAML or JSON file with the numbers of cores per node; what the entry of a node leaves out is as in default, else as the
    /// other flags say; a file that does not exist is empty
    #[arg(long, value_name = "file")]
    pub(crate) layouts: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) node: NodeArg,
}

/// Create, change and remove pools and their CPU lists
///
/// Does what mkdir, mv, echo and rmdir below pools do, and prints the reason if something is refused. Tasks keep their claims.
#[derive(Args, Debug)]
#[command(arg_required_else_help = true, subcommand_required = true)]
#[command(after_help = "\
Examples:
  kcm pool list
  kcm pool create dataplane --exclusive 0-1 2-3
  kcm pool drain dataplane 0-1         no new task gets this list
  kcm pool resize dataplane 2-3 2-5    the tasks of the list move to the new CPUs
  kcm pool delete dataplane")]
pub(crate) struct Pool {
    /// KCM configuration directory
    #[arg(long, value_name = "dir", default_value = "/etc/kcm", global = true)]
    pub(crate) conf_dir: PathBuf,
    #[command(subcommand)]
    pub(crate) command: PoolCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// Show the pools with their CPU lists, as describe --format=table does
    List,
    Create(CreatePool),
    /// Add CPU lists to a pool
    Add {
        /// Name of the pool
        #[arg(value_parser = validate::pool)]
        pool: String,
        /// CPU lists, such as 0-1
        #[arg(value_name = "list", required = true, value_parser = validate::list)]
        lists: Vec<String>,
    },
    /// Give a CPU list other CPUs; its tasks move there
    Resize {
        /// Name of the pool
        #[arg(value_parser = validate::pool)]
        pool: String,
        /// The CPU list
        #[arg(value_parser = validate::list)]
        list: String,
        /// The new CPU list
        #[arg(value_name = "new-list", value_parser = validate::list)]
        cpus: String,
    },
    /// Give a pool another name; its tasks keep their claims
    Rename {
        /// Name of the pool
        #[arg(value_parser = validate::pool)]
        pool: String,
        /// The new name
        #[arg(value_name = "new-name", value_parser = validate::pool)]
        name: String,
    },
    /// Let no new task on CPU lists; those that are there stay
    Drain {
        /// Name of the pool
        #[arg(value_parser = validate::pool)]
        pool: String,
        /// CPU lists; all of the pool if there are none
        #[arg(value_name = "list", value_parser = validate::list)]
        lists: Vec<String>,
    },
    /// Let new tasks on drained CPU lists again
    Undrain {
        /// Name of the pool
        #[arg(value_parser = validate::pool)]
        pool: String,
        /// CPU lists; all of the pool if there are none
        #[arg(value_name = "list", value_parser = validate::list)]
        lists: Vec<String>,
    },
    /// Remove CPU lists, or a pool with all of its lists
    Delete {
        /// Name of the pool
        #[arg(value_parser = validate::pool)]
        pool: String,
        /// CPU lists; the whole pool if there are none
        #[arg(value_name = "list", value_parser = validate::list)]
        lists: Vec<String>,
        /// Release live claims instead of refusing
        #[arg(long)]
        force: bool,
    },
}

/// Create a pool; if that is not possible as a whole, nothing is created
#[derive(Args, Debug)]
pub(crate) struct CreatePool {
    /// Name of the pool
    #[arg(value_parser = validate::pool)]
    pub(crate) pool: String,
    /// CPU lists, such as 0-1
    #[arg(value_name = "list", value_parser = validate::list)]
    pub(crate) lists: Vec<String>,
    /// Let each list have one task only
    #[arg(long)]
    pub(crate) exclusive: bool,
    /// Let nothing else run on the CPUs of a claimed list; isolated lists are exclusive
    #[arg(long)]
    pub(crate) isolated: bool,
    /// Let exclusive lists with offline CPUs be claimed
    #[arg(long)]
    pub(crate) partial: bool,
}

/// Make a file the configuration: all pools, in one step or not at all
///
/// Pools and lists that are not in the file are removed, but no list with tasks unless --force is given. A list that is in
/// another pool keeps its tasks. Prints what has changed; a second run changes nothing.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm apply -f pools.yaml --dry-run
  kcm apply -f pools.yaml
  kcm export > pools.yaml

A file:
  pools:
    dataplane:
      exclusive: true
      lists: [0-1, 2-3]
    infra:
      tasks: {group: 100, mode: \"0664\"}
      lists: [4-7]")]
pub(crate) struct Apply {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// YAML or JSON; - is stdin
    #[arg(short, long, value_name = "file")]
    pub(crate) file: PathBuf,
    /// Print the difference, and check whether it is possible
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Release the tasks of lists that are removed
    #[arg(long)]
    pub(crate) force: bool,
}

/// Print the configuration as YAML, which apply takes
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  kcm export > pools.yaml")]
pub(crate) struct Export {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
}

/// Prepare Kubernetes nodes: create pods that mount, create pools, install, discover and report
///
/// Creates at most three pods per node, each when the one before it has done its work. Pods that exist and are right
/// stay as they are, so that a second run continues an interrupted first one.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("hosts").required(true).args(["host_list", "all_hosts"])))]
#[command(after_help = "\
Examples:
  kcm cluster-init --all-hosts
  kcm cluster-init --host-list=node1,node2 --kcm-img=registry/kcm:1 --num-dp-cores=8
  kcm cluster-init --host-list=node1 --dry-run       print the pods as YAML")]
pub(crate) struct ClusterInit {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Comma separated list of Kubernetes nodes to prepare
    #[arg(long, value_name = "list", value_delimiter = ',', value_parser = validate::host)]
    pub(crate) host_list: Vec<String>,
    /// Prepare all Kubernetes nodes
    #[arg(long)]
    pub(crate) all_hosts: bool,
    /// Comma separated list of commands to run on each host: init (first), discover, install, reconcile,
    /// nodereport
    #[arg(long, value_name = "list", value_parser = validate::host_commands)]
    #[arg(default_value = "init,reconcile,install,discover,nodereport")]
    pub(crate) kcm_cmd_list: HostCommands,
    #[command(flatten)]
    pub(crate) image: ImageArg,
    #[command(flatten)]
    pub(crate) target: InstallDirArg,
    /// Directory for configuration and claims on each node
    #[arg(long, value_name = "dir", default_value = "/var/lib/kcm")]
    pub(crate) state_dir: PathBuf,
    /// Number of data plane cores, or auto: all but one for infra and those of the control plane
    #[arg(long, value_name = "num", default_value = "4", value_parser = validate::cores)]
    pub(crate) num_dp_cores: Cores,
    /// Number of control plane cores, or auto: one, but none if the data plane needs it
    #[arg(long, value_name = "num", default_value = "1", value_parser = validate::cores)]
    pub(crate) num_cp_cores: Cores,
    /// Let nothing else run on the data plane cores while they are claimed (needs cgroup v2 on the nodes)
    #[arg(long)]
    pub(crate) isolated: bool,
    #[command(flatten)]
    pub(crate) taint: TaintArg,
    /// Namespace of the pods and of their reports
    #[arg(long, value_name = "name", default_value = "default", value_parser = validate::namespace)]
    pub(crate) namespace: String,
    /// Service account of the pods; discover and the reports need its rights
    #[arg(long, value_name = "name", value_parser = validate::host)]
    pub(crate) service_account: Option<String>,
    /// Seconds to wait for each pod, or inf
    #[arg(long, value_name = "seconds", default_value = "300", value_parser = validate::wait)]
    pub(crate) timeout: Wait,
    /// Print the pods as YAML, and create none
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Undo cluster-init: uninstall on each node, delete the pods, and remove slots, label and taint
///
/// Runs kcm uninstall in a pod on each node, which removes the pools and the installed program, and is refused while a claim
/// is live. Then it deletes the pods of cluster-init. A node without any of this is left as it is, so that a second run
/// continues an interrupted first one. The state directory and the mount point stay on the nodes.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("hosts").required(true).args(["host_list", "all_hosts"])))]
#[command(after_help = "\
Examples:
  kcm cluster-uninstall --all-hosts --dry-run
  kcm cluster-uninstall --host-list=node1 --namespace=kcm-system
  kcm cluster-uninstall --all-hosts --force          release live claims")]
pub(crate) struct ClusterUninstall {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Comma separated list of Kubernetes nodes
    #[arg(long, value_name = "list", value_delimiter = ',', value_parser = validate::host)]
    pub(crate) host_list: Vec<String>,
    /// All Kubernetes nodes
    #[arg(long)]
    pub(crate) all_hosts: bool,
    #[command(flatten)]
    pub(crate) image: ImageArg,
    #[command(flatten)]
    pub(crate) target: InstallDirArg,
    /// Directory for configuration and claims on each node
    #[arg(long, value_name = "dir", default_value = "/var/lib/kcm")]
    pub(crate) state_dir: PathBuf,
    /// Namespace of the pods
    #[arg(long, value_name = "name", default_value = "default", value_parser = validate::namespace)]
    pub(crate) namespace: String,
    /// Seconds to wait for each pod, or inf
    #[arg(long, value_name = "seconds", default_value = "300", value_parser = validate::wait)]
    pub(crate) timeout: Wait,
    /// Release live claims instead of refusing
    #[arg(long)]
    pub(crate) force: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Run a command on a CPU list of a pool
///
/// On a mount, kcm claims a list and then executes the command in the same process, so that PID, signals, terminal and
/// status are the command's own. On a plain directory it waits for the command and then removes itself from the list.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm isolate --pool=dataplane make -- -j2           run a program
  kcm isolate --pool=dataplane 'cd /src && make' -- -j2
  kcm isolate --pool=dataplane -- /bin/prog 'a  b'   run a program without a shell
  kcm isolate --pool=dataplane --wait=30 -- prog     wait up to 30 seconds for a free list
  kcm isolate --pool=dataplane --list=0,8 -- prog    run a program on this list
  kcm isolate --pool=dataplane --user=alice -- prog  run a program as another user
  kcm isolate --pool=dataplane --pid=4711            put a running process on a list

Environment of the command:
  KCM_CPUS_ASSIGNED  its CPU list

Exit status: the command's own, 126 if it cannot be started, 127 if it does not exist, 1 if no list is free, 2 wrong usage.")]
#[command(override_usage = "\
kcm isolate [OPTIONS] --pool=<pool> <command> [-- <args>...]
       kcm isolate [OPTIONS] --pool=<pool> -- <program> [<args>...]
       kcm isolate [OPTIONS] --pool=<pool> --pid=<pid>")]
pub(crate) struct Isolate {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Pool name: dataplane, controlplane, infra, or any other pool
    #[arg(long, value_name = "pool")]
    pub(crate) pool: String,
    /// Wait in turn for a free CPU list: as many seconds as given, else without limit
    #[arg(long, value_name = "seconds", num_args = 0..=1, require_equals = true, default_missing_value = "inf")]
    #[arg(value_parser = validate::wait)]
    pub(crate) wait: Option<Wait>,
    /// Run the command in a scope of its own, which systemd leaves alone: for isolated pools
    #[arg(long)]
    pub(crate) scope: bool,
    /// CPU list, in the kernel's list format; without it, any free one of the pool
    #[arg(long, value_name = "list", value_parser = validate::cpus)]
    pub(crate) list: Option<CpuSet>,
    /// Put this running process on the list, and run no command
    #[arg(long, value_name = "pid", value_parser = clap::value_parser!(u32).range(1..))]
    #[arg(conflicts_with_all = ["command", "rest", "scope", "user"])]
    pub(crate) pid: Option<u32>,
    /// Run the command as this user, with its groups; root claims the list before
    #[arg(long, value_name = "name", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) user: Option<String>,
    /// Program, or a command line for the shell
    #[arg(value_name = "command", required_unless_present_any = ["rest", "pid"])]
    command: Option<OsString>,
    #[arg(hide = true)]
    args: Vec<OsString>,
    /// Arguments of the command, passed on unchanged; without a command, a program and its arguments
    #[arg(last = true, value_name = "args")]
    rest: Vec<OsString>,
}

/// Claim a CPU list of a pool for the shell that calls this, or for another process
///
/// Prints the CPUs. The claim ends with the process. Tasks that wait get a list in the order in which they came.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm claim --pool=dataplane            for the shell that calls it
  kcm claim --pool=dataplane --wait=30  wait up to 30 seconds for a free list
  sudo kcm claim --pool=dataplane --pid=$$")]
pub(crate) struct Claim {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Pool name
    #[arg(long, value_name = "pool")]
    pub(crate) pool: String,
    /// Wait in turn for a free CPU list: as many seconds as given, else without limit
    #[arg(long, value_name = "seconds", num_args = 0..=1, require_equals = true, default_missing_value = "inf")]
    #[arg(value_parser = validate::wait)]
    pub(crate) wait: Option<Wait>,
    /// Claim for this process instead of the one that calls kcm
    #[arg(long, value_name = "pid", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) pid: Option<u32>,
}

/// Print what happened: claims, releases, refusals, intruders
///
/// Prints the events that the daemon keeps, about the last thousand. Root only.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm events
  kcm events --follow           print new ones as they come
  kcm events --since=1042 --json")]
pub(crate) struct Events {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Go on with new events, also when another daemon takes over
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Print only the events after the one with this number
    #[arg(long, value_name = "seq")]
    pub(crate) since: Option<u64>,
    /// Print JSON lines
    #[arg(long)]
    pub(crate) json: bool,
}

/// Run a command on CPUs of its own, for as long as it runs
///
/// Nothing else runs on the CPUs until the command and all processes that it has left there have ended; then everything is
/// as it was before. No pools are needed. If no daemon runs, one is started that ends with the last command.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm shield --cpus=2-3 ./forwarder --fast
  kcm shield --cpus=2-3 -- taskset -c 3 ./forwarder
Needs root and cgroup v2 (Linux 6.8).

Environment of the program:
  KCM_CPUS_ASSIGNED  its CPU list

Exit status: the program's own, 126 if it cannot be started, 127 if it does not exist, 1 if the CPUs cannot be had, 2 wrong
usage.")]
#[command(override_usage = "kcm shield [OPTIONS] --cpus=<list> [--] <program> [<args>...]")]
pub(crate) struct Shield {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// The CPUs, in the kernel's list format
    #[arg(long, value_name = "list", value_parser = validate::cpus)]
    pub(crate) cpus: CpuSet,
    /// Run the command in a scope of its own, which systemd leaves alone
    #[arg(long)]
    pub(crate) scope: bool,
    /// A program and its arguments, passed on unchanged
    #[arg(value_name = "program", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<OsString>,
}

impl Shield {
    /// Returns the program to run. `None` if no words were given, which clap refuses.
    pub(crate) fn program(&self) -> Option<Program> {
        let (program, args) = self.words.split_first()?;
        Some(Program::Direct { program: program.clone(), args: args.to_vec() })
    }
}

/// Describe the CPU lists to container runtimes, so that --device claims one for a container
///
/// Writes a spec of the Container Device Interface for each pool: the kind is kcm.intel.com/POOL, and the devices are its CPU
/// lists, with _ for each comma, and any. The hook of the spec is kcm hook.
#[derive(Args, Debug)]
#[command(arg_required_else_help = true, subcommand_required = true)]
#[command(after_help = "\
Examples:
  kcm cdi install
  kcm cdi install --follow                                 and again whenever lists come and go
  podman run --device kcm.intel.com/dataplane=any IMAGE    a container on any free list
  podman run --device kcm.intel.com/dataplane=4_12 IMAGE   a container on the list 4,12
  kcm cdi uninstall")]
pub(crate) struct Cdi {
    /// KCM configuration directory
    #[arg(long, value_name = "dir", default_value = "/etc/kcm", global = true)]
    pub(crate) conf_dir: PathBuf,
    /// Directory of the specs
    #[arg(long, value_name = "dir", default_value = CDI_DIR, global = true)]
    pub(crate) dir: PathBuf,
    #[command(subcommand)]
    pub(crate) command: CdiCommand,
}

/// Where container runtimes look for specs.
const CDI_DIR: &str = "/etc/cdi";

#[derive(Debug, Subcommand)]
pub(crate) enum CdiCommand {
    /// Write the specs of all pools, and remove the specs of pools that are gone
    Install {
        /// Stay, and write them again whenever pools and lists come and go, also when another daemon takes over
        #[arg(long)]
        follow: bool,
        /// The program that runs as the hook, as container runtimes see it; this program by default
        #[arg(long, value_name = "file")]
        program: Option<PathBuf>,
        /// Do not mount the directory into the containers; some runtimes cannot do that in a user namespace
        #[arg(long)]
        no_mount: bool,
    },
    /// Remove the specs that install has written for the directory
    Uninstall,
}

/// Claim a CPU list for a container, as the createRuntime hook of an OCI runtime
///
/// Reads the state of the container from standard input, and claims the list for the first process of the container, before it
/// runs. If it fails, the runtime does not start the container, and prints the reason. kcm cdi install writes specs with this
/// hook.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  kcm hook --pool=dataplane < state.json")]
pub(crate) struct Hook {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Pool name
    #[arg(long, value_name = "pool", value_parser = validate::pool)]
    pub(crate) pool: String,
    /// CPU list, by its name; without it, any free one of the pool
    #[arg(long, value_name = "list", value_parser = validate::list)]
    pub(crate) list: Option<String>,
    /// Claim for this process, and print the result as JSON, in a process that may hang
    #[arg(long, hide = true, value_name = "pid", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) claim: Option<u32>,
    /// The bundle of the container
    #[arg(long, hide = true, value_name = "dir", requires = "claim")]
    pub(crate) bundle: Option<PathBuf>,
}

/// The program that `isolate` or `shield` runs.
#[derive(Debug)]
pub(crate) enum Program {
    /// A line for `/bin/sh`, and its `$@`.
    Shell { line: OsString, args: Vec<OsString> },
    /// A program and its arguments.
    Direct { program: OsString, args: Vec<OsString> },
}

impl Isolate {
    /// Refuses `--wait 10 …`, which would run the program `10` after the wait: the seconds belong to the flag.
    ///
    /// # Errors
    /// A usage error with the right spelling.
    pub(crate) fn check_wait(&self) -> Result<(), clap::Error> {
        let word = self.command.as_ref().and_then(|word| word.to_str());
        let seconds = word.filter(|word| self.wait == Some(None) && word.parse::<f64>().is_ok());
        match seconds {
            None => Ok(()),
            Some(seconds) => {
                let message =
                    format!("'{seconds}' is no command; the seconds follow an equals sign: --wait={seconds}");
                Err(Cli::command().error(ErrorKind::InvalidValue, message))
            }
        }
    }

    /// Returns the program to run. `None` if no words were given, which clap refuses.
    pub(crate) fn program(&self) -> Option<Program> {
        let mut words = self.args.iter().chain(&self.rest).cloned();
        Some(match &self.command {
            Some(line) => Program::Shell { line: line.clone(), args: words.collect() },
            None => Program::Direct { program: words.next()?, args: words.collect() },
        })
    }
}

/// Show whether all is well: the daemon, the pools, and each problem with what to do
///
/// Checks everything that node-report checks. Answers in time, whatever hangs.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm status
  kcm status --json
  kcm status > /dev/null || echo look at this node
  kcm status --prometheus > kcm.prom.new && mv kcm.prom.new kcm.prom

Exit status: 0 no problem, 1 there are problems, 2 wrong usage, 3 no daemon runs, or it does not answer. With
--prometheus it is 0 if the text is printed.")]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Print text for Prometheus: the result of each check, and the metrics of the daemon
    #[arg(long, conflicts_with = "json")]
    pub(crate) prometheus: bool,
    /// Check only that a daemon answers, for probes: exit status 0 or 3, whatever the checks would find
    #[arg(long, conflicts_with_all = ["json", "prometheus"])]
    pub(crate) alive: bool,
    /// Seconds to wait for answers
    #[arg(long, value_name = "seconds", default_value = "2", value_parser = validate::wait)]
    pub(crate) timeout: Wait,
    #[command(flatten)]
    pub(crate) kubelet: KubeletArg,
    #[command(flatten)]
    pub(crate) pods: PodsArg,
    /// Look, and print the JSON, in a process that may hang
    #[arg(long, hide = true)]
    pub(crate) look: bool,
}

/// Show the CPUs live: who has each one, for how long, and who else runs there
///
/// One row per CPU in the machine's shape, brought up to date each second. `?` explains columns, marks and keys. Needs a
/// terminal; --once prints one frame as text.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm top
  kcm top --interval=0.5
  kcm top --once | grep '!'      the CPUs with intruders

Keys: q quit, s sort, / filter, p pause, arrows scroll, ? help. NO_COLOR=1 turns colours off.")]
pub(crate) struct Top {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Seconds between two frames; shares are of this time
    #[arg(long, value_name = "seconds", default_value = "1", value_parser = validate::interval)]
    pub(crate) interval: Duration,
    /// Print one frame as text, after one interval, and exit
    #[arg(long)]
    pub(crate) once: bool,
    /// Look, and print JSON for each line of standard input, in a process that may hang
    #[arg(long, hide = true)]
    pub(crate) look: bool,
}

/// Print the pools, their CPU lists and tasks
///
/// At a terminal, table and map are shortened to its width. Elsewhere nothing is shortened.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm describe
  kcm describe --format=table
  kcm describe --format=map      one line per CPU, with its tasks
  kcm describe --format=svg > cpus.svg
                                 a picture of the CPUs, for a browser
  kcm describe --pid=4711 -o wide
                                 the list that has this process; exit status 1 if there is none")]
pub(crate) struct Describe {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// json for programs (the default); table or map for people; svg for a browser
    #[arg(long, value_enum, value_name = "format")]
    format: Option<Format>,
    /// wide: shorten nothing, name the pods of tasks, and print the tasks of a list on the line of each of its CPUs (table,
    /// the default, or map)
    #[arg(short, long, value_enum, value_name = "form")]
    pub(crate) output: Option<Output>,
    /// Only this pool; can be given several times
    #[arg(long, value_name = "pool")]
    pub(crate) pool: Vec<String>,
    /// Only these CPUs, and the lists that have one of them
    #[arg(long, value_name = "list", value_parser = validate::cpus)]
    pub(crate) cpu: Option<CpuSet>,
    /// Only the list that has this process
    #[arg(long, value_name = "pid")]
    pub(crate) pid: Option<u32>,
    #[command(flatten)]
    pub(crate) pods: PodsArg,
}

impl Describe {
    /// Returns the format.
    ///
    /// # Errors
    /// A usage error if the format cannot be wide.
    pub(crate) fn format(&self) -> Result<Format, clap::Error> {
        match (self.format, self.output) {
            (format, None) => Ok(format.unwrap_or(Format::Json)),
            (None, Some(Output::Wide)) => Ok(Format::Table),
            (Some(format @ (Format::Table | Format::Map)), Some(Output::Wide)) => Ok(format),
            (Some(Format::Json | Format::Svg), Some(Output::Wide)) => {
                let message =
                    "-o wide is for --format=table and --format=map; the other formats shorten nothing";
                Err(Cli::command().error(ErrorKind::ArgumentConflict, message))
            }
        }
    }
}

/// Print or check a state directory, for troubleshooting
///
/// Works offline and beside a running daemon. Never changes anything.
#[derive(Args, Debug)]
#[command(hide = true)]
pub(crate) struct State {
    #[command(subcommand)]
    pub(crate) command: StateCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum StateCommand {
    /// Print configuration, claims and counters
    Show {
        #[command(flatten)]
        dir: StateDirArg,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check the files and print each problem with file and line; the exit status is 1 if there are any
    Check {
        #[command(flatten)]
        dir: StateDirArg,
    },
}

#[derive(Args, Debug)]
pub(crate) struct StateDirArg {
    /// The directory that kcm mount uses
    #[arg(long, value_name = "dir", default_value = "/var/lib/kcm")]
    pub(crate) state_dir: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Json,
    Table,
    Map,
    Svg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Wide,
}

/// Give pods of Kubernetes CPU lists by their resource requests, as a device plugin of the kubelet
///
/// Registers the resource kcm.intel.com/POOL for each exclusive pool. Its devices are the CPU lists. A container that is given one
/// gets it as a CDI device, so that the container runtime claims the list, and the pod needs neither hostPath nor a wrapper. kcm cdi
/// install --follow has to run on the node, too, and kcm discover sets no slots there: --resource-name=none. Runs until a signal
/// ends it.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  kcm device-plugin --conf-dir=/run/kcm/conf")]
pub(crate) struct DevicePlugin {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Directory of the sockets of the kubelet and its device plugins
    #[arg(long, value_name = "dir", default_value = "/var/lib/kubelet/device-plugins")]
    pub(crate) plugins_dir: PathBuf,
    /// Print the lists as JSON, again and again, in a process that may hang
    #[arg(long, hide = true)]
    pub(crate) look: bool,
}

/// Advertise this node's exclusive CPU lists to Kubernetes
///
/// Sets one slot per list, a label, and a taint that keeps other pods away. Keeps everything that others have set on the
/// node. A second run changes nothing. With --interval, removes the slots while the daemon does not answer; a signal that ends
/// the command removes nothing.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm discover                                       the legacy resource, for dataplane
  kcm discover --resource-name=extended --interval=60
  kcm discover --taint=dedicated=kcm:NoSchedule      another taint
  kcm discover --no-taint                            other pods may run on the node, too
  kcm discover --dry-run                             print the patches")]
pub(crate) struct Discover {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    #[command(flatten)]
    pub(crate) node: NodeArg,
    /// opaque: pod.alpha.kubernetes.io/opaque-int-resource-kcm for dataplane;
    /// extended: kcm.intel.com/POOL for every exclusive pool;
    /// none: no slots, because kcm device-plugin has them, only label and taint
    #[arg(long, value_enum, value_name = "form", default_value_t = ResourceName::Opaque)]
    pub(crate) resource_name: ResourceName,
    #[command(flatten)]
    pub(crate) taint: TaintArg,
    /// Seconds between runs; 0 runs once
    #[arg(long, value_name = "seconds", default_value = "0", value_parser = validate::repeat)]
    pub(crate) interval: Repeat,
    /// Print the changes instead of making them
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print the slots as JSON, in a process that may hang
    #[arg(long, hide = true)]
    pub(crate) look: bool,
}

/// Remove from Kubernetes nodes what discover has set
///
/// Works from everywhere with the credentials of kubectl, also if kcm or the node itself does not run any more: after the
/// DaemonSet has left a node. Removes the slots, the label, the taint and the published reports. Programs on their CPUs are not
/// disturbed, and the pools stay. A second run changes nothing.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("nodes").required(true).args(["node", "all_hosts"])))]
#[command(after_help = "\
Examples:
  kcm undiscover --node=node1 --dry-run
  kcm undiscover --node=node1,node2
  kcm undiscover --all-hosts")]
pub(crate) struct Undiscover {
    /// Comma separated list of Kubernetes nodes; NODE_NAME is ignored
    #[arg(long, value_name = "list", value_delimiter = ',', value_parser = validate::host)]
    pub(crate) node: Vec<String>,
    /// All Kubernetes nodes
    #[arg(long)]
    pub(crate) all_hosts: bool,
    /// Namespace of published reports
    #[arg(long, value_name = "name", default_value = "default", value_parser = validate::namespace)]
    pub(crate) namespace: String,
    /// Print the changes instead of making them
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// The resource name of the slots. Only one of them: under two names, Kubernetes would give every slot away twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ResourceName {
    Opaque,
    Extended,
    /// The kubelet has them, from its device plugin.
    None,
}

/// The flags of commands that publish a report.
#[derive(Args, Debug)]
pub(crate) struct Publish {
    /// Publish reports to the Kubernetes API server
    #[arg(long)]
    pub(crate) publish: bool,
    #[command(flatten)]
    pub(crate) node: NodeArg,
    /// Namespace of published reports
    #[arg(long, value_name = "name", default_value = "default", value_parser = validate::namespace)]
    pub(crate) namespace: String,
}

#[derive(Args, Debug)]
pub(crate) struct NodeArg {
    /// Name of this Kubernetes node, if NODE_NAME is not set
    #[arg(long, value_name = "name")]
    pub(crate) node: Option<String>,
}

/// Report reclaimed claims of killed tasks, and threads that have left their list
///
/// On a mount the daemon reclaims immediately; each reclaim is reported once, to whichever reconcile runs first. On a
/// plain directory this command removes dead tasks itself: run it often.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm reconcile
  kcm reconcile --interval=60
  kcm reconcile --repair        move strayed threads back to their list
  kcm reconcile --interval=60 --publish
                                publish it as the ReconcileReport of this node")]
pub(crate) struct Reconcile {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Seconds between runs, which print a report, as one line, only if it has changed; 0 runs once
    #[arg(long, value_name = "seconds", default_value = "0", value_parser = validate::repeat)]
    pub(crate) interval: Repeat,
    /// Move threads back that have left their list
    #[arg(long)]
    pub(crate) repair: bool,
    #[command(flatten)]
    pub(crate) publish: Publish,
}

/// Check the node: configuration, CPUs, intruders on exclusive lists, the kubelet and the mount
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm node-report
  kcm node-report --interval=60
  kcm node-report --publish     publish it as the NodeReport of this node")]
pub(crate) struct NodeReport {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    /// Seconds between runs, which print a report, as one line, only if it has changed; 0 runs once
    #[arg(long, value_name = "seconds", default_value = "0", value_parser = validate::repeat)]
    pub(crate) interval: Repeat,
    #[command(flatten)]
    pub(crate) kubelet: KubeletArg,
    #[command(flatten)]
    pub(crate) pods: PodsArg,
    #[command(flatten)]
    pub(crate) publish: Publish,
}

/// Copy kcm, one static file, to a directory
///
/// With --systemd also installs the unit that mounts at boot, one that keeps CDI specs up to date, man pages, and completions for
/// bash, fish and zsh.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm install --install-dir=/opt/bin
  kcm install --systemd                                 for containers, which mount /opt/bin
  kcm install --systemd --install-dir=/usr/local/bin    for people, who have it in PATH")]
pub(crate) struct Install {
    #[command(flatten)]
    pub(crate) target: InstallDirArg,
    /// Install kcm.service and kcm-cdi.service too, in this directory
    #[arg(long, value_name = "dir", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "/etc/systemd/system")]
    pub(crate) systemd: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) share: ShareDirArg,
    /// Put all files below this directory, for a package
    #[arg(long, value_name = "dir")]
    pub(crate) root: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct ShareDirArg {
    /// Directory of man pages and completions, which belong to the systemd unit
    #[arg(long, value_name = "dir", default_value = "/usr/local/share")]
    pub(crate) share_dir: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct ImageArg {
    /// KCM image
    #[arg(long, value_name = "img", default_value = "kcm", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) kcm_img: String,
    /// Image pull policy
    #[arg(long, value_name = "pol", default_value = "IfNotPresent")]
    #[arg(value_parser = ["Never", "IfNotPresent", "Always"])]
    pub(crate) kcm_img_pol: String,
}

#[derive(Args, Debug)]
pub(crate) struct TaintArg {
    /// The taint, key[=value]:effect; a taint that an earlier run has set is removed
    #[arg(long, value_name = "taint", default_value = "kcm=true:NoSchedule", value_parser = validate::taint)]
    taint: TaintSpec,
    /// Set no taint; a taint that an earlier run has set is removed
    #[arg(long, conflicts_with = "taint")]
    no_taint: bool,
}

impl TaintArg {
    /// Returns the taint that nodes get, if they get one.
    pub(crate) fn wanted(&self) -> Option<&TaintSpec> {
        (!self.no_taint).then_some(&self.taint)
    }
}

#[derive(Args, Debug)]
pub(crate) struct InstallDirArg {
    /// KCM install directory
    #[arg(long, value_name = "dir", default_value = "/opt/bin")]
    pub(crate) install_dir: PathBuf,
}

/// Undo discover, install, init and mount on this node
///
/// Refuses while any list has tasks. Removes the pools, stops the service, unmounts, and removes what kcm install has
/// installed. Removes what discover has set if NODE_NAME or --node names this node. In a pod (NODE_NAME is set) the mount
/// stays: delete the pod. A service of another directory than --conf-dir stays, with its program. If no daemon runs and the
/// state directory has claims or pools, kcm starts one for the removal.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm uninstall --dry-run       say what would be removed
  kcm uninstall --purge         remove the state directory and the mount point too
  kcm uninstall --force         release the claims first")]
pub(crate) struct Uninstall {
    #[command(flatten)]
    pub(crate) dir: ConfDirArg,
    #[command(flatten)]
    pub(crate) target: InstallDirArg,
    #[command(flatten)]
    pub(crate) node: NodeArg,
    /// Directory of the systemd units
    #[arg(long, value_name = "dir", default_value = "/etc/systemd/system")]
    pub(crate) systemd: PathBuf,
    #[command(flatten)]
    pub(crate) share: ShareDirArg,
    /// Directory of the specs of kcm cdi install
    #[arg(long, value_name = "dir", default_value = CDI_DIR)]
    pub(crate) cdi_dir: PathBuf,
    /// State directory; by default the one of the daemon, and /var/lib/kcm for /etc/kcm if none runs
    #[arg(long, value_name = "dir")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Release live claims instead of refusing
    #[arg(long)]
    pub(crate) force: bool,
    /// Remove the state directory and the mount point too
    #[arg(long)]
    pub(crate) purge: bool,
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Print a completion script for a shell
///
/// The script asks kcm at each completion, which knows the pools, CPU lists and nodes at that time.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  source <(kcm completions bash)
  kcm completions fish > ~/.config/fish/completions/kcm.fish")]
pub(crate) struct Completions {
    #[arg(required_unless_present = "nodes")]
    pub(crate) shell: Option<clap_complete::Shell>,
    /// Print the names of the nodes of the cluster, one in each line
    #[arg(long, hide = true)]
    pub(crate) nodes: bool,
}

/// Print a man page
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kcm man isolate | man -l -
  kcm man 5 | man -l -          the files of the configuration directory")]
pub(crate) struct Man {
    /// Command whose page to print, or 5 for kcm(5); without it, the page of kcm
    pub(crate) command: Option<String>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

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
    fn arguments_of_isolate_are_passed_on_unchanged() {
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
    fn wait_is_optional_and_takes_optional_seconds() {
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
        let refused = |words: &[&str]| {
            let words = ["kcm", "isolate", "--pool=p"].iter().chain(words);
            match Cli::try_parse_from(words).unwrap().command {
                Command::Isolate(isolate) => isolate.check_wait().err().map(|error| error.to_string()),
                _ => None,
            }
        };
        assert!(refused(&["--wait", "10", "--", "prog"]).unwrap().contains("--wait=10"));
        for right in [&["--wait=10", "prog"][..], &["--wait", "prog"], &["10"], &["--wait", "--", "10"]] {
            assert_eq!(refused(right), None, "{right:?}");
        }
    }
}
