# Isolated pools below systemd, which writes to the same cgroups: what it takes away is made again, what it insists on is
# named, and a scope or a unit that is delegated is left alone. Wants 4 CPUs.
. /t/lib.sh
D=$C/pools/dp
state() { cat "$D/$1/state"; }
tree() {
    find $G \( -name 'cpuset.cpus*' -o -name cgroup.subtree_control -o -name cgroup.type \) | grep -v 'kcm.service' | sort | while read -r file; do
        echo "$file $(cat "$file" 2>/dev/null)"
    done
}

holds "kcm install --systemd" kcm install --systemd
systemctl daemon-reload
holds "systemctl enable --now" systemctl enable --now kcm
mkdir $D $D/2 $D/3
echo 1 >$D/exclusive
holds "the service can isolate" sh -c "echo isolated >$D/mode"

# A unit without Delegate=.
mkdir -p /run/systemd/system
printf '[Service]\nExecStart=/usr/busybox/sleep 99999\n' >/run/systemd/system/plain.service
printf '[Service]\nExecStart=/usr/busybox/sleep 99999\nDelegate=yes\n' >/run/systemd/system/delegated.service
printf '[Service]\nExecStart=/usr/busybox/sleep 99999\n' >/run/systemd/system/greedy.service
systemctl daemon-reload
holds "services start" systemctl start plain delegated greedy
systemctl daemon-reload
tree >/tmp/before
task=$(systemctl show --value -p MainPID plain)
holds "a claim for the service" claim $D/3/tasks "$task"
is "it is isolated" "$(state 3) $(cgroup "$task")" "isolated /system.slice/plain.service/kcm-3"
holds "systemctl daemon-reload" systemctl daemon-reload
until_is "it is isolated again" root cat $G/system.slice/plain.service/kcm-3/cpuset.cpus.partition
until_is "and says so" isolated state 3
is "the task is there" "$(cgroup "$task") $(mask "$task")" "/system.slice/plain.service/kcm-3 3"
holds "somebody gives the CPU to another service" systemctl set-property --runtime greedy.service AllowedCPUs=3
until_is "the state names it, or it is isolated still" yes sh -c "grep -q '^invalid: \|^isolated' $D/3/state && echo yes"
holds "the other service is stopped" systemctl stop greedy
until_is "it is isolated again" isolated state 3
holds "a restart of the daemon" systemctl restart kcm
until_is "keeps it" isolated state 3
holds "the service is stopped" systemctl stop plain
until_is "the list is free" free state 3

# A unit with Delegate=yes.
task=$(systemctl show --value -p MainPID delegated)
holds "a claim for a delegated service" claim $D/3/tasks "$task"
before=$(grep -c '"event":"invalid"' $C/info/events)
holds "systemctl daemon-reload" systemctl daemon-reload
sleep 2
is "nothing has to be made again" "$(state 3) $(grep -c '"event":"invalid"' $C/info/events)" "isolated $before"
holds "a release" claim $D/3/tasks "-$task"
is "the task is in the cgroup of its service" "$(cgroup "$task")" /system.slice/delegated.service
holds "the service is stopped" systemctl stop delegated

# A container in a scope, as runtimes make it with systemd.
systemd-run --quiet --scope -p Delegate=yes --unit=container /usr/busybox/sleep 99999 &
until_is "a scope starts" /system.slice/container.scope sh -c "cut -d: -f3 /proc/\$(cat $G/system.slice/container.scope/cgroup.procs)/cgroup"
task=$(cat $G/system.slice/container.scope/cgroup.procs)
holds "a claim for the whole scope" sh -c "echo cgroup:$task >$D/3/tasks"
(echo 0 >$G/system.slice/container.scope/cgroup.procs; exec /usr/busybox/sleep 99999) &
executed=$!
until_is "what is executed in it is on the list" 3 mask "$executed"
systemctl daemon-reload
until_is "a reload: it is isolated, or again" isolated state 3
until_is "with all processes" "3 3" sh -c "echo \$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/$task/status /proc/$executed/status)"
holds "the scope is stopped" systemctl stop container.scope
until_is "the list is free" free state 3

# A scope of its own.
is "kcm isolate --scope runs a command" "$(kcm isolate --scope --pool=dp -- echo --scope 'a  b' 2>&1)" "--scope a  b"
kcm isolate --scope --pool=dp -- /usr/busybox/sleep 99999 &
started=$!
until_is "it claims a list" isolated state 2
task=$(cat $D/2/tasks)
is "in the same process" "$task" "$started"
is "in a scope" "$(cgroup "$task" | sed 's/run-[^.]*/run/')" /system.slice/run.scope/kcm-2
systemctl daemon-reload
sleep 2
is "a reload leaves it alone" "$(state 2) $(mask "$task")" "isolated 2"
kill "$task"
until_is "the list is free" free state 2
systemctl reset-failed 2>/dev/null
rm /run/systemd/system/plain.service /run/systemd/system/delegated.service /run/systemd/system/greedy.service
finish
