# CPUs that go offline and come back: a list with an offline CPU is passed over and named, and a claim finds its CPUs again.
# Wants siblings n and n + 8.
. /t/lib.sh
start
holds "kcm init" kcm init --num-dp-cores=3 --num-cp-cores=1
D=$C/pools/dataplane
sleeper
free=$job
taskset -c 7,15 sleep 99999 &
pinned=$!
until_named sleep "$pinned"
sh -c 'while :; do :; done' &
busy=$!

echo 0 >$CPU/cpu9/online
fails "a list with an offline CPU cannot be claimed" "nvalid argument" sh -c "echo $free >$D/1,9/tasks"
is "the error says why" "$(grep -c 'dataplane 1,9 has offline CPUs: 9; bring them online' $C/self/last_error)" 1
holds "a claim of the pool passes it over" sh -c "echo $free >$D/tasks"
is "and gets a whole core" "$(mask "$free")" 0,8
is "info/topology names it" "$(grep -o '"offline":"[^"]*"' $C/info/topology)" '"offline":"9"'
is "describe names the offline CPU" "$(kcm describe --format=table | grep -c 'offline: 9')" 1
is "node-report names the list" "$(kcm node-report | grep -c 'dataplane:1,9')" 1

shared=$(lists controlplane)
odd=$(echo "$shared" | numbers | tail -1)
rest=$(echo "$shared" | numbers | grep -vx "$odd")
echo 0 >"$CPU/cpu$odd/online"
sleeper
claim "$C/pools/controlplane/$shared/tasks" "$job"
is "a shared list serves with its CPUs that are online" "$(mask "$job" | numbers)" "$rest"
echo 1 >"$CPU/cpu$odd/online"
until_is "and with the others when they come online" "$shared" mask "$job"
kill "$job"

echo 0 >$CPU/cpu15/online
fails "a task with an offline CPU in its mask is refused that list, too" "nvalid argument" sh -c "echo $pinned >$D/1,9/tasks"
echo 1 >$CPU/cpu15/online
is "a refused task has its whole mask when its CPU is back" "$(mask "$pinned")" 7,15

echo 1 >$D/partial
is "state names the offline CPU" "$(cat $D/1,9/state)" "free offline=9"
holds "a partial pool: the list serves with the CPU that is online" sh -c "echo $pinned >$D/1,9/tasks"
is "and only with that" "$(mask "$pinned")" 1
is "state names the offline CPU" "$(cat $D/1,9/state)" "affinity offline=9"
echo 1 >$CPU/cpu9/online
until_is "the task gets the CPU when it comes online" 1,9 mask "$pinned"
is "and state does not name it any more" "$(cat $D/1,9/state)" affinity
claim $D/tasks "-$pinned"
is "a release restores the earlier mask" "$(mask "$pinned")" 7,15
echo 0 >$D/partial
echo 0 >$CPU/cpu9/online

echo 1 >$CPU/cpu9/online
claim $D/1,9/tasks "$pinned"
is "the list is whole again and can be claimed" "$(mask "$pinned")" 1,9
claim $D/tasks "-$pinned"
is "a release restores the earlier mask" "$(mask "$pinned")" 7,15

claim $D/2,10/tasks "$busy"
is "a busy task is claimed for" "$(mask "$busy")" 2,10
echo 0 >$CPU/cpu2/online
is "one CPU of a claimed list goes: the claim stays" "$(cat $D/2,10/tasks)" "$busy"
echo 1 >$CPU/cpu2/online
until_is "and the task is on both when it is back" 2,10 mask "$busy"
echo 0 >$CPU/cpu2/online
echo 0 >$CPU/cpu10/online
sleep 1
is "a whole list goes: the claim stays" "$(cat $D/2,10/tasks)" "$busy"
is "reconcile names the task that runs elsewhere" "$(kcm reconcile | grep -c "\"pid\": $busy")" 1
until_is "the daemon tells of it" 1 grep -c displaced $C/info/events
is "and counts it" "$(grep '^kcm_displaced_now' $C/info/metrics)" "kcm_displaced_now 1"
is "node-report names it" "$(kcm node-report | grep -c "\"$busy (sh) of dataplane:2,10")" 1
echo 1 >$CPU/cpu2/online
echo 1 >$CPU/cpu10/online
until_is "it is moved back when the CPUs are back" 2,10 mask "$busy"
until_is "and no longer counted" "kcm_displaced_now 0" grep '^kcm_displaced_now' $C/info/metrics
kill "$free" "$pinned" "$busy"
finish
