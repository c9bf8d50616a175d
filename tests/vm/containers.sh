# podman with devices of an isolated pool, on a machine with cgroup v2 alone: all processes of a container are on its list, also
# those that are executed in it later. Wants 4 CPUs.
. /t/lib.sh
modprobe fuse
start
D=$C/pools/dp
mkdir -p /root/fs/bin /root/fs/proc /root/fs/sys /root/fs/dev /root/fs/tmp /root/fs/etc /root/fs/run
cp /usr/busybox/busybox /root/fs/bin/
for name in sh sleep grep taskset cat; do ln -s busybox /root/fs/bin/$name; done
# The root of this machine is the memory disk, for which there is no pivot_root(2).
mkdir -p /etc/containers
printf '[engine]\nno_pivot_root = true\n' >/etc/containers/containers.conf
P="podman --cgroup-manager=cgroupfs --storage-driver=vfs --events-backend=none"
# run NAME DEVICE OPTION...: starts a container that sleeps.
run() {
    local name=$1 device=$2
    shift 2
    $P run --detach --name="$name" --network=none --log-driver=none --device="kcm.intel.com/$device" "$@" --rootfs /root/fs \
        sh -c 'sleep 9999 & wait' >/dev/null
}
# The CPUs of a process that is executed in a container.
executed() { $P exec "$1" grep Cpus_allowed_list /proc/self/status | tr -dc '0-9,-'; }
first() { $P inspect --format='{{.State.Pid}}' "$1"; }

# podman makes cgroups of its own at the first container.
holds "a container without a device" $P run --rm --network=none --log-driver=none --rootfs /root/fs sh -c :
tree >/tmp/before
holds "a pool" kcm pool create dp --isolated 2 3
holds "its devices" kcm cdi install
holds "a container with any list" run one dp=any
one=$(first one)
list=$(mask "$one")
is "everybody else has the other CPUs" "$(numbers <$G/cpuset.cpus.effective | tr '\n' ' ')" "$(for n in 0 1 2 3; do [ $n = "$list" ] || echo $n; done | tr '\n' ' ')"
is "it is isolated" "$(cat $D/$list/state) $(cat $D/$list/tasks)" "isolated $one"
is "all of its cgroup is" "$(cat "$G$(cgroup "$one")/cpuset.cpus.partition")" root
is "its child is on the list" "$(mask "$(cat "/proc/$one/task/$one/children" | tr -d ' ')")" "$list"
is "and so is what is executed in it" "$(executed one)" "$list"
fails "that cannot leave the list" "nvalid argument" $P exec one taskset -p 1 1
holds "a second container" run two dp=any
two=$(first two)
is "gets the other list" "$(cat $D/$list/tasks $D/$(mask "$two")/tasks | tr '\n' ' ')" "$one $two "
is "what is executed in each is on its list" "$(executed one) $(executed two)" "$list $(mask "$two")"
# crun throws away what a hook prints, unless the container has an annotation.
fails "there is no third" "error executing hook" run three dp=any
is "an event says why" "$(kcm events | tail -1 | grep -c 'refused.*dp . is held by')" 1
fails "nor one with the list of another" "error executing hook" run four "dp=$list" --annotation=run.oci.hooks.stderr=/tmp/refused
is "with the annotation, a file says why" "$(grep -c "dp $list is held by $one" /tmp/refused)" 1
dying=$(worker)
kill -9 "$dying"
until_is "the worker dies: the containers stay where they are" "isolated isolated" sh -c "echo \$(cat $D/2/state $D/3/state)"
is "and what is executed in them" "$(executed one) $(executed two)" "$list $(mask "$two")"
holds "a container ends" $P rm --force --time=0 one
until_is "its list is free" free cat "$D/$list/state"
holds "the next one gets it" run five "dp=$list"
is "with all of it" "$(executed five)" "$list"
holds "all end" $P rm --force --all --time=0
until_is "all lists are free" "free free" sh -c "echo \$(cat $D/2/state $D/3/state)"
until_is "nothing is left of it" same same_tree
holds "the devices are removed" kcm cdi uninstall
finish
