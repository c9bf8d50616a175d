# A machine with cgroup v2 alone: cpusets that narrow a claimed task, and a controller that is switched on later.
# Wants siblings n and n + 8.
. /t/lib.sh
G=/sys/fs/cgroup
start
holds "kcm init" kcm init --num-dp-cores=3 --num-cp-cores=1
D=$C/pools/dataplane
mkdir $G/service

in_cgroup() {
    sh -c "echo \$\$ >$G/$1/cgroup.procs; exec sleep 99999" &
    job=$!
    until_named sleep "$job"
}

in_cgroup service
claim $D/1,9/tasks "$job"
is "a task in a cgroup is claimed for" "$(mask "$job")" 1,9
echo +cpuset >$G/cgroup.subtree_control
if newer 6.2; then
    is "the cpuset controller is switched on: the mask stays" "$(mask "$job")" 1,9
else
    known "the cpuset controller is switched on: the mask stays" "$(mask "$job")" 1,9
    kcm reconcile --repair >/dev/null
    is "reconcile --repair restores it" "$(mask "$job")" 1,9
fi
is "the claim stays" "$(cat $D/1,9/tasks)" "$job"
kill "$job"

mkdir $G/pod
echo 0-15 >$G/pod/cpuset.cpus
in_cgroup pod
claim $D/0,8/tasks "$job"
is "a task in a cpuset is claimed for" "$(mask "$job")" 0,8
echo 4-7 >$G/pod/cpuset.cpus
is "the cpuset leaves the list: reconcile names the task" "$(kcm reconcile | grep -c "\"pid\": $job")" 1
kcm reconcile --repair >/dev/null 2>&1
echo 0-15 >$G/pod/cpuset.cpus
kcm reconcile --repair >/dev/null
is "the cpuset is widened: reconcile --repair moves it back" "$(mask "$job")" 0,8
kill "$job"

mkdir $G/small
echo 4-7 >$G/small/cpuset.cpus
in_cgroup small
fails "a list outside the cpuset of the task is refused" "nvalid argument" sh -c "echo $job >$D/0,8/tasks"
is "and the task keeps its mask" "$(mask "$job")" 4-7
kill "$job"
finish
