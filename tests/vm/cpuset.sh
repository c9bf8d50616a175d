# A machine with cgroup v2 alone: cpusets that narrow a claimed task, and a controller that is switched on later.
# Wants siblings n and n + 8.
. /t/lib.sh
start
holds "kcm init" kcm init --num-dp-cores=3 --num-cp-cores=1
D=$C/pools/dataplane
mkdir $G/service

sleeper_in service
claim $D/1,9/tasks "$job"
is "a task in a cgroup is claimed for" "$(mask "$job")" 1,9
echo +cpuset >$G/cgroup.subtree_control
# Before 6.2 the kernel forgets the mask then.
dying=$(worker)
kill -9 "$dying"
until_is "the cpuset controller is switched on, and the worker dies: the claim is kept" "$job" cat $D/1,9/tasks
until_is "and its mask" 1,9 mask "$job"
echo -cpuset >$G/cgroup.subtree_control
echo +cpuset >$G/cgroup.subtree_control
until_is "the cpuset controller is switched on beside a daemon: the mask is restored" 1,9 mask "$job"
newer 6.2 || is "and an event reports it" "$(grep -c displaced $C/info/events | sed 's/[1-9]/some/')" some
is "the claim stays" "$(cat $D/1,9/tasks)" "$job"
kill "$job"

mkdir $G/pod
echo 0-15 >$G/pod/cpuset.cpus
sleeper_in pod
claim $D/0,8/tasks "$job"
is "a task in a cpuset is claimed for" "$(mask "$job")" 0,8
echo 4-7 >$G/pod/cpuset.cpus
is "the cpuset leaves the list: reconcile names the task" "$(kcm reconcile | grep -c "\"pid\": $job")" 1
until_is "and the daemon tells of it" "kcm_displaced_now 1" grep '^kcm_displaced_now' $C/info/metrics
kcm reconcile --repair >/dev/null 2>&1
echo 0-15 >$G/pod/cpuset.cpus
until_is "the cpuset is widened: the task is moved back" 0,8 mask "$job"
echo 0,4-7 >$G/pod/cpuset.cpus
is "the cpuset has a part of the list: node-report names the task" "$(kcm node-report | grep -c "\"$job (sleep) of dataplane:0,8")" 1
echo 0-15 >$G/pod/cpuset.cpus
until_is "and it has the whole list again afterwards" 0,8 mask "$job"
kill "$job"

mkdir $G/small
echo 4-7 >$G/small/cpuset.cpus
sleeper_in small
fails "a list outside the cpuset of the task is refused" "nvalid argument" sh -c "echo $job >$D/0,8/tasks"
is "and the task keeps its mask" "$(mask "$job")" 4-7
kill "$job"
finish
