# Simultaneous multithreading is switched off and on: claims stay, whole cores become half ones, and everything is as before
# afterwards. Wants siblings n and n + 8.
. /t/lib.sh
start
holds "kcm init" kcm init --num-dp-cores=3 --num-cp-cores=1
D=$C/pools/dataplane
shared=$(lists controlplane)
first=$(echo "$shared" | numbers | head -1)
sleeper
exclusive=$job
claim $D/1,9/tasks "$exclusive"
sleeper
several=$job
claim "$C/pools/controlplane/$shared/tasks" "$several"
sleeper
free=$job
before=$(mask "$free")
is "tasks are claimed for" "$(mask "$exclusive") $(mask "$several")" "1,9 $shared"

echo off >$CPU/smt/control
is "it is switched off" "$(cat $CPU/online)" 0-7
is "the claims stay" "$(cat $D/1,9/tasks "$C/pools/controlplane/$shared/tasks" | tr '\n' ' ')" "$exclusive $several "
# sched_getaffinity(2) leaves out CPUs that are offline.
runs_on() { taskset -pc "$1" | sed 's/.*: //'; }
is "with the half that is online" "$(runs_on "$exclusive") $(runs_on "$several")" "1 $first"
fails "half a core is not given to anybody" "nvalid argument" sh -c "echo $free >$D/2,10/tasks"
is "the error names the CPU" "$(grep -c 'dataplane 2,10 has offline CPUs: 10' $C/self/last_error)" 1
fails "nor by a claim of the pool" "nvalid argument" sh -c "echo $free >$D/tasks"
is "info/topology names the offline CPUs" "$(grep -o '"offline":"[^"]*"' $C/info/topology)" '"offline":"8-15"'
is "describe names the offline CPUs of each list" "$(kcm describe --format=table | grep -c 'offline: 9$\|offline: 9[^0-9]')" 1
is "node-report names the lists" "$(kcm node-report | grep -c 'dataplane:2,10')" 1
kill -9 "$(worker)"
until_is "a new worker keeps the claims" "$exclusive" cat $D/1,9/tasks
holds "a release" sh -c "echo -$several >$C/pools/controlplane/$shared/tasks"
holds "a shared list serves with its half" sh -c "echo $several >$C/pools/controlplane/$shared/tasks"

echo on >$CPU/smt/control
until_is "the task has its whole core again" 1,9 mask "$exclusive"
until_is "and the other one its whole list" "$shared" mask "$several"
holds "a core can be claimed" sh -c "echo $free >$D/2,10/tasks"
is "as a whole" "$(mask "$free")" 2,10
claim $D/tasks "-$free"
is "a release restores the earlier CPUs" "$(mask "$free")" "$before"
claim $D/tasks "-$exclusive"
is "also of a task that was claimed before" "$(mask "$exclusive" | numbers)" "$(echo "$before" | numbers)"
kill "$free" "$exclusive" "$several"
finish
