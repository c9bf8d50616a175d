# kcm shield: a command alone on CPUs, with pools and without, and everything as before after it, whoever is killed. Wants 4
# CPUs.
. /t/lib.sh
OWN=/run/kcm-shield
gone() { [ -e $OWN ] || [ -e $OWN.state ] || [ -n "$(pidof kcm)" ] || echo gone; }
if ! newer 6.8; then
    fails "this kernel cannot isolate" "cannot isolate CPUs" kcm shield --cpus=3 true
    until_is "and the daemon that was started ends" gone gone
    finish
fi

# shield CPUS COMMAND...: in the cgroup of a container; the PID is in $job.
shield() {
    local cpus=$1
    shift
    sh -c "echo \$\$ >$G/pod/container/cgroup.procs; exec kcm shield --cpus=$cpus $* 2>/tmp/shield-$cpus" &
    job=$!
}
state() { cat "$OWN/pools/shield/$1/state"; }
all_as_before() {
    until_is "$1: the daemon ends" gone gone
    until_is "everything is as before" same same_tree
}

mkdir -p $G/pod/container
echo +memory +pids >$G/cgroup.subtree_control
tree >/tmp/before
is "no daemon runs" "$(gone)" gone
holds "the status is the one of the command" sh -c "kcm shield --cpus=3 sh -c 'exit 7'; [ \$? = 7 ]"
all_as_before "a command that ends"
holds "-- is not needed, and allowed" sh -c "[ \$(kcm shield --cpus=1-2 -- sh -c 'echo \$KCM_CPUS_ASSIGNED') = 1-2 ]"
fails "a program that does not exist" "No such file" kcm shield --cpus=3 /nothing
all_as_before "a command that cannot be started"
fails "all CPUs" "does not isolate" kcm shield --cpus=0-3 true
all_as_before "a refusal"

shield 3 sleep 99999
one=$job
until_is "a command alone on a CPU" isolated state 3
is "in its own cgroup, in the same process" "$(cgroup $one) $(mask $one) $(cat /proc/$one/comm)" "/pod/container/kcm-3 3 sleep"
shield 1-2 sleep 99999
other=$job
until_is "another one beside it" isolated state 1-2
fails "the CPUs of another" "is held by $one" kcm shield --cpus=3 true
fails "some of the CPUs of another" "remove that list first" kcm shield --cpus=2-3 true
is "they keep them" "$(state 3) $(state 1-2)" "isolated isolated"
STATE=$OWN.state
before=$(worker)
kill -9 "$before"
until_is "the worker dies: another one serves" another sh -c "[ $before != \"\$(cat /proc/\$(cat $STATE/lock)/task/*/children | tr -d ' ')\" ] && echo another"
before=$(supervisor)
kill -9 "$before"
until_is "the supervisor dies: so does another one" another sh -c "[ $before != \"\$(tr -dc 0-9 <$STATE/lock)\" ] && echo another"
is "nothing changes for the commands" "$(state 3) $(state 1-2) $(cgroup $one)" "isolated isolated /pod/container/kcm-3"
kill -9 $one
until_is "a command is killed: its list goes" 1-2 sh -c "cd $OWN/pools/shield && ls -d */ | tr -d /"
kill $other
all_as_before "the last command ends"

shield 3 sleep 99999
until_is "a command" isolated state 3
kill -9 "$(supervisor)" "$(worker)" $job
usleep 200000
holds "all are killed at once: the next command" kcm shield --cpus=2 true
all_as_before "it"

# A kill at any moment. Counted, because each is the same check.
left=0
for n in $(seq 20); do
    shield 3 sleep 99999
    usleep $((n * 12000))
    kill -9 $job
    [ $((n % 4)) != 0 ] || [ -z "$(worker)" ] || kill -9 "$(worker)"
    wait $job
    for _ in $(seq 80); do
        [ "$(gone)" != gone ] || break
        sleep 0.2
    done
    [ "$(gone) $(same_tree)" = "gone same" ] || left=$((left + 1))
done 2>/dev/null
is "20 kills of commands that start: nothing is left" $left 0

# Beside pools.
STATE=/var/lib/kcm
start
mkdir $C/pools/dp $C/pools/dp/2
echo 1 >$C/pools/dp/exclusive
echo isolated >$C/pools/dp/mode
holds "a list of another isolated pool" sh -c "[ \"\$(kcm shield --cpus=2 cat $C/self/claim)\" = 'dp 2' ]"
holds "a list of its own" sh -c "[ \"\$(kcm shield --cpus=3 cat $C/self/claim)\" = 'shield 3' ]"
until_is "it is removed with its pool" dp ls $C/pools
is "the other one stays" "$(cat $C/pools/dp/2/state)" free
is "no other daemon was started" "$(ls -d $OWN* 2>/dev/null)" ""
mkdir $C/pools/plain $C/pools/plain/1
fails "a CPU of a pool that is not isolated" "remove that list first" kcm shield --cpus=1 true
until_is "nothing is left of it" "dp plain " sh -c "ls $C/pools | tr '\n' ' '"
kcm unmount --conf-dir=$C
until_is "everything is as before" same same_tree
fails "while its daemon does not run, a directory is not shielded beside it" "is not running" kcm shield --cpus=3 true
finish
