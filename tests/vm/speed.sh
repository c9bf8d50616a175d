# How long a claim in an isolated pool takes, beside the writes to the kernel's files that it needs. `scripts/bench isolated`
# runs it, and reads the lines that begin with `measured:`. It checks nothing. Wants 4 CPUs.
. /t/lib.sh
start
mkdir $C/pools/dp $C/pools/dp/3
echo 1 >$C/pools/dp/exclusive
echo isolated >$C/pools/dp/mode
mkdir -p $G/pod/container
echo +memory +pids >$G/cgroup.subtree_control
sleeper_in pod/container

# Milliseconds for one time, from 10 times. The clock is in centiseconds.
time_of() {
    local begun ended
    read -r begun _ </proc/uptime
    for _ in 1 2 3 4 5 6 7 8 9 10; do "$1"; done
    read -r ended _ </proc/uptime
    echo $(($(echo "$ended" | tr -d .) - $(echo "$begun" | tr -d .)))
}
# The kernel's own work after the boot ends by then.
until [ "$(cut -d. -f1 /proc/uptime)" -ge 20 ]; do sleep 1; done
for _ in 1 2 3 4 5 6 7; do
    echo "measured: $(time_of claim_and_release) $(time_of isolate_by_hand)"
done
finish
