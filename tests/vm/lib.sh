# Sourced by each scenario, in busybox's shell: the daemon, the CPUs, and checks. A check prints `ok: what holds`, or what
# was found instead.
CPU=/sys/devices/system/cpu
C=/etc/kcm
STATE=/var/lib/kcm
failed=0

# is WHAT GOT WANTED
is() {
    if [ "$2" = "$3" ]; then
        echo "ok: $1"
    else
        failed=1
        echo "not ok: $1: '$2' instead of '$3'"
    fi
}

# holds WHAT COMMAND...: the command succeeds.
holds() {
    local what=$1 status=0
    shift
    "$@" >/tmp/output 2>&1 || status=$?
    is "$what" "$status $([ $status = 0 ] || head -c 300 /tmp/output)" "0 "
}

# fails WHAT TEXT COMMAND...: the command fails with a message that has the text.
fails() {
    local what=$1 text=$2
    shift 2
    if "$@" >/tmp/output 2>&1; then
        is "$what" "it succeeds" "it fails"
    elif grep -qF -- "$text" /tmp/output; then
        echo "ok: $what"
    else
        is "$what" "$(head -c 300 /tmp/output)" "a message with: $text"
    fi
}

# until_is WHAT WANTED COMMAND...: the output of the command becomes what is wanted, within 20 s.
until_is() {
    local what=$1 wanted=$2 got
    shift 2
    for _ in $(seq 100); do
        got=$("$@" 2>/dev/null)
        [ "$got" = "$wanted" ] && break
        sleep 0.2
    done
    is "$what" "$got" "$wanted"
}

finish() { exit "$failed"; }

# newer VERSION: whether the kernel is at least this one.
newer() { [ "$(printf '%s\n' "$1" "$(uname -r)" | sort -t. -k1,1n -k2,2n | head -1)" = "$1" ]; }

start() {
    mkdir -p $C
    kcm mount --conf-dir=$C --state-dir=$STATE || exit 1
}

# The CPUs on which a process may run, as a list.
mask() { sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' "/proc/$1/status"; }

# Starts a program that sleeps; its PID is in $job.
sleeper() {
    sleep 99999 &
    job=$!
    until_named sleep "$job"
}

until_named() { until grep -q "^Name:[[:space:]]*$1$" "/proc/$2/status"; do sleep 0.1; done; }

# in_cgroup NAME COMMAND: starts a command of the shell in a cgroup; its PID is in $job.
in_cgroup() {
    sh -c "echo \$\$ >$G/$1/cgroup.procs; $2" &
    job=$!
}

# Starts a program that sleeps, in a cgroup; its PID is in $job.
sleeper_in() {
    in_cgroup "$1" "exec sleep 99999"
    until_named sleep "$job"
}

# claim FILE PID: writes the PID, without a message.
claim() { echo "$2" 2>/dev/null >"$1"; }

# The supervisor and the worker.
supervisor() { tr -dc 0-9 <$STATE/lock; }
worker() {
    local pid
    for pid in $(pidof kcm); do
        tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q '__daemon worker' && echo "$pid"
    done
}

# The lists of a pool.
lists() { (cd "$C/pools/$1" && ls -d */ | tr -d /); }

# A list of CPUs as numbers, one in each line.
numbers() { tr ',' '\n' | awk -F- 'NF { for (n = $1; n <= $NF; n++) print n }' | sort -n; }

# The tree of cgroups, and the CPUs on which unbound work of the kernel may run, as a mask.
G=/sys/fs/cgroup
WORK=/sys/devices/virtual/workqueue/cpumask

# Everything that kcm could leave behind there.
tree() {
    find $G \( -name 'cpuset.cpus*' -o -name cgroup.subtree_control -o -name cgroup.type \) | sort | while read -r file; do
        echo "$file $(cat "$file" 2>/dev/null)"
    done
    echo "work $(cat $WORK)"
}
# Compares with what `tree` has written to /tmp/before.
same_tree() { tree >/tmp/now && diff /tmp/before /tmp/now >/tmp/difference && echo same || head -c 300 /tmp/difference; }

# The cgroup of a process.
cgroup() { cut -d: -f3 "/proc/$1/cgroup"; }

# A claim of CPU 3 for $job, which is in the cgroup pod/container, and its release.
claim_and_release() {
    echo "$job" >$C/pools/dp/3/tasks
    echo "-$job" >$C/pools/dp/3/tasks
}

# The least that a script writes to the kernel's files to isolate CPU 3 for $job, and to take that back.
isolate_by_hand() {
    local own=$G/pod/container/own above cpus
    cpus=$(cat $WORK)
    mkdir $own
    echo threaded >$own/cgroup.type
    for above in $G $G/pod $G/pod/container; do echo +cpuset >$above/cgroup.subtree_control; done
    for above in $G/pod $G/pod/container $own; do echo 3 >$above/cpuset.cpus.exclusive; done
    echo root >$own/cpuset.cpus.partition
    printf '%x\n' $((0x$cpus & ~8)) >$WORK
    echo "$job" >$own/cgroup.procs
    echo member >$own/cpuset.cpus.partition
    echo "$job" >$G/pod/container/cgroup.procs
    rmdir $own
    echo "$cpus" >$WORK
    for above in $G/pod/container $G/pod; do echo >$above/cpuset.cpus.exclusive; done
    for above in $G/pod/container $G/pod $G; do echo -cpuset >$above/cgroup.subtree_control; done
}
