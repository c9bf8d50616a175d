# Isolated pools, on a machine with cgroup v2 alone: nobody else runs on the CPUs of a claimed list, what others change is
# set right or named, and nothing is left of it. Wants 4 CPUs or more.
. /t/lib.sh
# All CPUs, those without CPU 3, and both as masks.
last=$(sed 's/.*-//' $CPU/online)
all=0-$last all_mask=$(printf %x $(((1 << (last + 1)) - 1)))
rest=0-2$([ "$last" = 3 ] || echo ",4-$last") rest_mask=$(printf %x $(((1 << (last + 1)) - 1 - 8)))
start
D=$C/pools/dp
mkdir $D $D/2 $D/3
echo 1 >$D/exclusive
is "a pool is in affinity mode at first" "$(cat $D/mode)" affinity
if ! newer 6.8; then
    fails "this kernel cannot isolate" "ot supported" sh -c "echo isolated >$D/mode"
    is "and the error says why" "$(grep -c 'EOPNOTSUPP: .*the kernel has no cpuset.cpus.exclusive' $C/self/last_error)" 1
    is "the pool keeps its mode" "$(cat $D/mode)" affinity
    fails "kcm pool create --isolated says it, too" "no cpuset.cpus.exclusive" kcm pool create other --isolated 1
    is "and makes nothing" "$(ls $C/pools)" dp
    finish
fi

fails "there is no scope without systemd" "systemd does not manage this machine" kcm isolate --scope --pool=dp true

state() { cat "$D/$1/state"; }

mkdir -p $G/pod/container $G/other
echo +memory +pids >$G/cgroup.subtree_control
tree >/tmp/before
holds "kcm pool create --isolated" kcm pool create other --isolated 1
is "makes an exclusive isolated pool" "$(cat $C/pools/other/exclusive $C/pools/other/mode | tr '\n' ' ')" "1 isolated "
kcm pool delete other
holds "the mode is set" sh -c "echo isolated >$D/mode"
is "nothing is written for that" "$(same_tree)" same

sleeper
pinned=$job
taskset -p 8 "$pinned" >/dev/null
sleeper_in pod/container
task=$job
holds "a claim" claim $D/3/tasks "$task"
is "it says so" "$(state 3) $(state 2)" "isolated free"
is "the task stays within its cgroup" "$(cgroup "$task")" /pod/container/kcm-3
is "with the mask of the list" "$(mask "$task")" 3
is "everybody else has the other CPUs" "$(cat $G/cpuset.cpus.effective)" "$rest"
fails "root cannot put anything else there" "nvalid argument" taskset -p 8 $$
is "unbound work of the kernel has the other CPUs, too" "$(cat $WORK)" "$rest_mask"
echo "$all_mask" >$WORK
until_is "somebody allows it there: it is kept off again" "$rest_mask" cat $WORK
is "who was pinned there is elsewhere" "$(mask "$pinned")" "$rest"

# The threads of others that may run there, without those of the kernel whose CPUs nobody may set: those that are bound to a
# CPU, and the rescuers of workqueues, which run only when memory is short.
others() {
    local status list
    for status in /proc/[0-9]*/task/[0-9]*/status; do
        [ "${status#/proc/$task/}" = "$status" ] || continue
        list=$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' "$status" 2>/dev/null)
        flags=$(sed 's/.*) //' "${status%us}" | cut -d' ' -f7)
        [ $((flags & 0x04000000)) = 0 ] || continue
        echo "$list" | numbers | grep -qx 3 && echo "$(head -1 "$status" | cut -f2) $list"
    done | tr '\n' ','
}
is "no thread of another may run there" "$(others)" ""

holds "a release" claim $D/3/tasks "-$task"
is "it is free" "$(state 3)" free
is "everything is as before" "$(same_tree)" same
is "the task is in its cgroup again" "$(cgroup "$task") $(mask "$task")" "/pod/container $all"
is "who was pinned there is there again" "$(mask "$pinned")" 3
kill "$pinned" "$task"

# The hook of a container runtime, and what `exec` into the container does: a process in the cgroup of the container. The
# whole cgroup is isolated.
B=$G/pod/container
sleeper_in pod/container
task=$job
holds "the hook claims" sh -c "echo '{\"pid\": $task}' | kcm hook --pool=dp --list=3"
is "and isolates the cgroup of the container" "$(state 3) $(cgroup "$task") $(cat $B/cpuset.cpus.partition)" "isolated /pod/container root"
sleeper_in pod/container
executed=$job
is "a process that is executed in the container later runs on the list" "$(cgroup "$executed") $(mask "$executed")" "/pod/container 3"
fails "and cannot leave it" "nvalid argument" taskset -p 1 "$executed"
is "no thread of another may run there" "$(others | sed 's/sleep 3,//')" ""
echo member >$B/cpuset.cpus.partition
until_is "somebody makes it an ordinary cgroup: it is isolated again" root cat $B/cpuset.cpus.partition
until_is "with what was executed" "isolated 3" sh -c "echo \$(cat $D/3/state) \$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/$executed/status)"
kill -9 "$(worker)"
until_is "the worker is killed: the next one finds it" "$task" cat $D/3/tasks
sleep 1
is "as it was" "$(state 3) $(cat $B/cpuset.cpus.partition) $(grep -c '"event":"invalid"' $C/info/events)" "isolated root 1"
fails "what was executed cannot have another list" "ot supported" sh -c "echo $executed >$D/2/tasks"
is "and the error says why" "$(grep -c 'task.s cgroup /pod/container: all of it is on dp 3; start' $C/self/last_error)" 1
holds "the first process moves to another list" claim $D/2/tasks "$task"
is "and takes the whole container along" "$(state 3) $(state 2) $(mask "$task") $(mask "$executed")" "free isolated 2 2"
holds "a release" claim $D/2/tasks "-$task"
is "all are back in their places" "$(state 2) $(mask "$task") $(mask "$executed") $(same_tree)" "free $all $all same"
fails "a cgroup with other processes is not isolated as a whole" "ot supported" sh -c "echo cgroup:$task >$D/3/tasks"
is "and the error says why" "$(grep -c 'task.s cgroup /pod/container: it has other processes; start' $C/self/last_error)" 1
kill "$executed"
until_is "only the first process is there" "$task" cat $B/cgroup.procs
mkdir $B/below
fails "nor is one with cgroups below it" "ot supported" sh -c "echo cgroup:$task >$D/3/tasks"
rmdir $B/below
holds "a claim for the cgroup" sh -c "echo cgroup:$task >$D/3/tasks"
holds "the runtime makes a cgroup in the container" mkdir $B/below
echo "$task" >$B/below/cgroup.procs
sleep 1
is "the first process moves there: nothing has to be made again" "$(state 3) $(cgroup "$task") $(grep -c '"event":"invalid"' $C/info/events)" "isolated /pod/container/below 1"
kill "$task"
until_is "the container ends: its cgroup can be removed at once" "" sh -c "rmdir $B/below $B && echo"
until_is "the list is free" free state 3
mkdir $B
until_is "everything is as before" same same_tree

# Who has claimed by itself is isolated, and what is executed in the container runs elsewhere.
sleeper_in pod/container
task=$job
holds "a claim for a process" claim $D/3/tasks "$task"
sleeper_in pod/container
is "a process that is executed in the container later runs elsewhere" "$(cgroup "$job") $(mask "$job")" "/pod/container $rest"
fails "and cannot be put on the list" "nvalid argument" taskset -p 8 "$job"
kill "$task" "$job"
until_is "the container has ended: the list is free" free state 3
until_is "everything is as before" same same_tree

# A child of a holder, which is in its partition, can have a list of its own.
in_cgroup pod/container "echo 0 >$D/3/tasks; sleep 99999 & wait"
task=$job
until_is "a holder has a child in its partition" 2 sh -c "wc -l <$B/kcm-3/cgroup.threads"
child=$(grep -vx "$task" $B/kcm-3/cgroup.threads)
holds "the child claims another list" claim $D/2/tasks "$child"
is "both are isolated" "$(state 3) $(mask "$task") $(state 2) $(mask "$child") $(cgroup "$child")" "isolated 3 isolated 2 /pod/container/kcm-2"
holds "the child releases it" claim $D/2/tasks "-$child"
is "it runs elsewhere" "$(state 2) $(mask "$child") $(cgroup "$child")" "free $rest /pod/container"
echo "$child" >$B/kcm-3/cgroup.procs
mkdir $C/pools/shared $C/pools/shared/1
holds "it claims a list that is not isolated" claim $C/pools/shared/1/tasks "$child"
is "and is there" "$(mask "$child") $(cgroup "$child")" "1 /pod/container"
kill "$child" "$task"
until_is "all lists are free" "free free" sh -c "echo \$(cat $D/2/state) \$(cat $D/3/state)"
rmdir $C/pools/shared/1 $C/pools/shared
until_is "everything is as before" same same_tree

# How much of the CPU a busy holder gets beside two busy loops for each CPU, and how often it is interrupted.
measure() {
    local holder others='' begun before after ended
    in_cgroup pod/container "echo 0 >$D/3/tasks; while :; do :; done"
    holder=$job
    until [ "$(cat $D/3/tasks)" = "$holder" ]; do sleep 0.2; done
    for _ in $(seq $((2 * (last + 1)))); do
        sh -c 'while :; do :; done' &
        others="$others $!"
    done
    # The kernel's own work on the CPU after the boot and after the claim ends by then.
    sleep 1
    until [ "$(cut -d. -f1 /proc/uptime)" -ge 40 ]; do sleep 1; done
    switches=$(sed -n 's/^nonvoluntary_ctxt_switches:[[:space:]]*//p' "/proc/$holder/status")
    # In this order, the share is never too high.
    read -r begun _ </proc/uptime
    read -r before _ <"/proc/$holder/schedstat"
    sleep 8
    read -r after _ <"/proc/$holder/schedstat"
    read -r ended _ </proc/uptime
    begun=$(echo "$begun" | tr -d .) ended=$(echo "$ended" | tr -d .)
    share=$(((after - before) / 10000 / (ended - begun)))
    switches=$(($(sed -n 's/^nonvoluntary_ctxt_switches:[[:space:]]*//p' "/proc/$holder/status") - switches))
    kill $others $holder
    echo "$1: a share of $share in 1000, $switches involuntary switches in 8 s"
}
echo affinity >$D/mode
measure affinity
affinity_switches=$switches
until_is "the list comes free" "" cat $D/3/tasks
echo isolated >$D/mode
measure isolated
is "a busy holder has its CPU" "$([ $share -ge 970 ] && echo whole)" whole
is "and is hardly interrupted" "$([ $((switches * 4)) -le $affinity_switches ] && echo hardly)" hardly
until_is "the list comes free when the holder is killed" "" cat $D/3/tasks
until_is "and nothing is left of the partition" same same_tree

# Each write to a file of a cgroup can cost milliseconds, because the kernel sets up its scheduling domains again.
sleeper_in pod/container
grep -q tracefs /proc/mounts || mount -t tracefs tracefs /sys/kernel/tracing
echo 'p:kcm/writes cgroup_file_write' >/sys/kernel/tracing/kprobe_events
echo 1 >/sys/kernel/tracing/events/kcm/enable
written() { awk '$1 == "writes" { print $2 }' /sys/kernel/tracing/kprobe_profile; }
writes_of() {
    local before
    before=$(written)
    "$1"
    echo $(($(written) - before))
}
by_hand=$(writes_of isolate_by_hand) by_kcm=$(writes_of claim_and_release)
echo 0 >/sys/kernel/tracing/events/kcm/enable
echo >/sys/kernel/tracing/kprobe_events
is "the least number of writes is counted" "$by_hand" 16
is "a claim and its release take one more: they clear what an earlier daemon may have left" "$by_kcm" 17
kill "$job"
is "nothing is left" "$(same_tree)" same

# Beside processes that are moved between cgroups all the time: with another kind of partition, Linux 6.12 hangs.
mkdir $G/a $G/b
sleeper
moved=$job
sleeper_in pod/container
(while :; do echo $moved >$G/a/cgroup.procs; echo $moved >$G/b/cgroup.procs; done) 2>/dev/null &
mover=$!
n=0
while [ $n -lt 100 ]; do claim_and_release; n=$((n + 1)); done
kill $mover $moved $job
is "100 claims beside processes that move between cgroups" "$n $(state 3)" "100 free"
until_is "the cgroups can be removed" "" sh -c "rmdir $G/a $G/b && echo"

# A list of several CPUs is balanced within.
rmdir $D/2 $D/3
mkdir $D/2-3
in_cgroup pod/container "echo 0 >$D/2-3/tasks; (while :; do :; done) & while :; do :; done"
until_is "a claim of two CPUs" isolated state 2-3
fails "root cannot put anything else there" "nvalid argument" taskset -p 8 $$
sleep 2
ran() { for it in $(cat $G/pod/container/kcm-2-3/cgroup.threads); do sed 's/.*) //' "/proc/$it/stat" | cut -d' ' -f37; done | sort | tr '\n' ' '; }
until_is "two busy processes share its two CPUs" "2 3 " ran
kill $(cat $G/pod/container/kcm-2-3/cgroup.threads)
until_is "nothing is left of it" same same_tree
rmdir $D/2-3
mkdir $D/2 $D/3

# What others change.
sleeper_in pod/container
task=$job
holds "another claim" claim $D/tasks "$task"
is "of the first list" "$(cat $D/2/tasks) $(state 2)" "$task isolated"
P=$G/pod/container/kcm-2
echo member >$P/cpuset.cpus.partition
until_is "somebody makes it an ordinary cgroup: it is isolated again" root cat $P/cpuset.cpus.partition
echo "$task" >$G/other/cgroup.procs
until_is "somebody moves the task: it is isolated in its new cgroup" /other/kcm-2 cgroup "$task"
until_is "and says so" isolated state 2
is "nothing is left in the old one" "$(ls -d $G/pod/container/kcm* 2>/dev/null)" ""
echo -cpuset >$G/cgroup.subtree_control 2>/dev/null
echo -cpuset >$G/other/cgroup.subtree_control
until_is "somebody switches the controller off: it is isolated again" root cat $G/other/kcm-2/cpuset.cpus.partition
until_is "the state is isolated" isolated state 2
# As a container runtime does when it is told to change the CPUs of a container.
echo 0-1 >$G/other/cpuset.cpus
sleep 1
is "a container gets other CPUs from its runtime: the task stays isolated" "$(state 2) $(mask "$task")" "isolated 2"
echo "$all" >$G/other/cpuset.cpus
sleep 1
is "and when it gets all again" "$(state 2) $(mask "$task")" "isolated 2"
# Another cgroup that takes the CPU for itself, as soon as it is not taken.
mkdir $G/taker
for _ in $(seq 1000); do
    echo member >$G/other/kcm-2/cpuset.cpus.partition
    echo >$G/other/kcm-2/cpuset.cpus.exclusive
    echo >$G/other/cpuset.cpus.exclusive
    ! echo 2 >$G/taker/cpuset.cpus.exclusive || break
done 2>/dev/null
until_is "somebody takes the CPU: the state says so" invalid sh -c "cut -d: -f1 $D/2/state"
kcm reconcile >/tmp/report
is "so does reconcile" "$(tr -d ' \n' </tmp/report | cut -d'"' -f4-8)" 'notIsolated":[{"cpus":"2'
kcm node-report >/tmp/report
is "and node-report" "$(grep -c 'CPU list dp:2 is not isolated: ' /tmp/report)" 1
rmdir $G/taker
# The controller stayed on for that cgroup.
echo -cpuset >$G/cgroup.subtree_control 2>/dev/null
until_is "it is isolated again afterwards" isolated state 2
# The kernel may refuse to take the last CPU of a partition away.
if echo 0 2>/tmp/output >$CPU/cpu2/online; then
    until_is "the CPU goes offline: the state says so" invalid sh -c "cut -d: -f1 $D/2/state"
    echo 1 >$CPU/cpu2/online
else
    is "the CPU cannot go offline" "$(cat $CPU/cpu2/online)" 1
fi
until_is "it is isolated afterwards" isolated state 2
is "events report it" "$(grep -c '"event":"invalid"' $C/info/events | sed 's/[1-9][0-9]*/some/')" some

kill -9 "$(worker)"
until_is "the worker dies: the task keeps its list" "$task" cat $D/2/tasks
is "and its partition" "$(state 2) $(cgroup "$task")" "isolated /other/kcm-2"
kill -9 "$(supervisor)" "$(worker)"
until_is "all of the daemon dies: nothing changes for the task" "$(mask "$task")" echo 2
kcm mount --conf-dir=$C --state-dir=$STATE
is "a new daemon knows the partition" "$(cat $D/2/tasks) $(state 2)" "$task isolated"
holds "the task moves to another list" claim $D/3/tasks "$task"
is "with its partition" "$(state 2) $(state 3) $(cgroup "$task")" "free isolated /other/kcm-3"
holds "a release" claim $D/3/tasks "-$task"
kill "$task"
until_is "nothing is left" same same_tree

# What the holder leaves behind inherits, whoever its user is, and nobody else does.
in_cgroup pod/container "echo 0 >$D/3/tasks; setsid chpst -u nobody sleep 7777 2>/dev/null & setsid sleep 8888 & sleep 0.5; exec true"
until_is "a process in the partition inherits" "sleep" sh -c "cat /proc/\$(cat $D/3/tasks)/comm"
is "in the partition" "$(cgroup "$(cat $D/3/tasks)") $(state 3)" "/pod/container/kcm-3 isolated"
fails "nobody else gets the list" "busy" sh -c "echo $$ >$D/3/tasks"
killall sleep
until_is "the last one ends: the list is free" "free" state 3
until_is "the cgroup of a container can be removed at once" "" sh -c "rmdir $G/pod/container && echo"
mkdir $G/pod/container
until_is "nothing is left" same same_tree

# Refusals leave nothing.
mkdir -p $G/pod/inner/child
sleeper_in pod/inner/child
below=$job
sleeper_in pod/inner
fails "a cgroup that can have no threaded one below it" "ot supported" sh -c "echo $job >$D/3/tasks"
is "the error names it" "$(grep -c 'EOPNOTSUPP: .*/pod/inner: ' $C/self/last_error)" 1
is "the task keeps its mask" "$(mask "$job") $(cgroup "$job") $(state 3)" "$all /pod/inner free"
kill "$job" "$below"
until_is "the cgroups can be removed" "" sh -c "rmdir $G/pod/inner/child $G/pod/inner && echo"
mkdir $G/taken
echo +cpuset >$G/cgroup.subtree_control
echo 3 >$G/taken/cpuset.cpus
sleeper_in pod/container
fails "a CPU that another cgroup needs" "nvalid argument" sh -c "echo $job >$D/3/tasks"
is "the error says so" "$(grep -c 'EINVAL: the kernel does not isolate dp 3: ' $C/self/last_error)" 1
is "the task keeps its mask" "$(mask "$job") $(cgroup "$job") $(state 3)" "$all /pod/container free"
holds "another list can be claimed" claim $D/tasks "$job"
is "it is isolated" "$(state 2)" isolated
holds "and released" claim $D/tasks "-$job"
is "a controller that somebody else uses stays on" "$(grep -c cpuset $G/cgroup.subtree_control)" 1
rmdir $G/taken
echo -cpuset >$G/cgroup.subtree_control
kill "$job"
is "nothing is left" "$(same_tree)" same

# Kills at any moment. Counted, because each kill is the same check.
wrong='' kept=0
for n in $(seq 30); do
    in_cgroup pod/container "exec sleep 99999"
    until_named sleep "$job"
    claim $D/3/tasks "$job" &
    usleep $((n * 1500 % 40000))
    if [ $((n % 3)) = 0 ]; then kill -9 "$(supervisor)"; else kill -9 "$(worker)"; fi
    wait $!
    # The next worker may have to take a partition back first.
    for _ in $(seq 100); do
        held=$(cat $D/3/tasks)
        [ "$(cgroup "$job")" != "/pod/container${held:+/kcm-3}" ] || break
        sleep 0.1
    done
    now=$(cgroup "$job")
    [ "$now" = "/pod/container${held:+/kcm-3}" ] || wrong="$wrong kill $n: held by '$held', in $now;"
    claim $D/tasks "-$job" &
    usleep $((n * 1300 % 30000))
    kill -9 "$(worker)"
    wait $!
    kill "$job"
    for _ in $(seq 200); do
        [ "$(state 3)" != free ] || break
        sleep 0.1
    done
    [ "$(state 3)" = free ] || kept=$((kept + 1))
done
is "30 kills in the middle of a claim: the claim has its partition, or there is neither" "$wrong" ""
is "30 kills in the middle of a release: the list is free afterwards" "$kept" 0
until_is "nothing is left of all" same same_tree

# A daemon in a container that shares the PID namespace of the node: it sees its own part of the tree only, read-only.
kcm unmount --conf-dir=$C
mount --bind $C $C
mount --make-shared $C
mkdir $G/pod/daemon
tree >/tmp/before
cat >/tmp/in-container <<'SCRIPT'
umount /sys/fs/cgroup
mount -t cgroup2 -o ro cgroup /sys/fs/cgroup || exit 1
[ -e /sys/fs/cgroup/cgroup.type ] || exit 1
exec kcm mount --conf-dir=/etc/kcm --state-dir=/var/lib/kcm
SCRIPT
holds "a daemon in a container" sh -c "echo \$\$ >$G/pod/daemon/cgroup.procs; exec /bin/unshare --cgroup --mount --propagation unchanged sh /tmp/in-container"
is "it knows the pool" "$(cat $D/mode)" isolated
sleeper_in pod/container
holds "a claim" claim $D/3/tasks "$job"
is "it is isolated in the cgroup of the task" "$(state 3) $(cgroup "$job")" "isolated /pod/container/kcm-3"
holds "a release" claim $D/3/tasks "-$job"
is "nothing is left" "$(same_tree)" same
kill "$job"
finish
