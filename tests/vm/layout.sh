# Lists are whole cores as the kernel numbers them, a claim gives exactly the CPUs of its list, and the reports say what the
# kernel says.
. /t/lib.sh
start
holds "kcm init makes pools of the cores" kcm init --num-dp-cores=3 --num-cp-cores=1

sleeper
before=$(mask "$job")
for list in $(lists dataplane); do
    first=$(echo "$list" | numbers | head -1)
    siblings=$(numbers <"$CPU/cpu$first/topology/thread_siblings_list" | while read -r n; do
        grep -q 1 "$CPU/cpu$n/online" 2>/dev/null || [ "$n" = 0 ] && echo "$n"
    done | tr '\n' ' ')
    is "a list of dataplane is a whole core" "$(echo "$list" | numbers | tr '\n' ' ')" "$siblings"
    claim "$C/pools/dataplane/$list/tasks" "$job"
    is "a claim sets the CPUs of the list" "$(mask "$job" | numbers)" "$(echo "$list" | numbers)"
    claim "$C/pools/dataplane/tasks" "-$job"
    is "a release restores the earlier CPUs" "$(mask "$job")" "$before"
done
is "there are three lists in dataplane" "$(lists dataplane | wc -l)" 3

# Columns of the kernel: CPU, core, socket, node.
lscpu --online --parse=CPU,CORE,SOCKET,NODE | grep -v '^#' | sed 's/,$/,-/' >/tmp/kernel
kcm describe --format=map | awk 'NR > 1 { n = ($2 == "isolated") ? 3 : 2; print $1 "," $n "," $(n + 1) "," $(n + 2) }' |
    grep -v offline | sort -n >/tmp/ours
is "describe has the same cores, sockets and nodes as lscpu" "$(diff /tmp/kernel /tmp/ours | head -5)" ""
isolated=$(numbers <$CPU/isolated | tr '\n' ' ')
ours=$(grep -o '"id":[0-9]*,"isolated":true' $C/info/topology | grep -o '[0-9]*' | sort -n | tr '\n' ' ')
is "info/topology has the same isolated CPUs as the kernel" "$ours" "$isolated"
if [ -n "$isolated" ]; then
    for list in $(lists dataplane); do
        is "dataplane is made of isolated cores" "$(echo "$list" | numbers | while read -r n; do
            echo " $isolated" | grep -q " $n " || echo "$n"
        done)" ""
    done
fi
lists=$(ls -d $C/pools/*/*/ | wc -l)
is "describe has each list as JSON" "$(kcm describe | grep -c '"cpus": "')" "$lists"
is "and in a table" "$(kcm describe --format=table | tail -n +2 | wc -l)" "$lists"
kcm node-report >/tmp/report
is "node-report finds nothing wrong" "$(grep -B4 '"ok": false' /tmp/report | tr -d '\n')" ""
numbers <$CPU/online | tr '\n' ' ' >/tmp/online
is "and has the CPUs that are online" \
    "$(awk '/"id":/ { id = $2 } /"isolated":/ { print id }' /tmp/report | tr -d , | sort -n | tr '\n' ' ')" "$(cat /tmp/online)"
list=$(lists dataplane | head -1)
claim "$C/pools/dataplane/$list/tasks" "$job"
taskset -pc "$(cat $CPU/online)" "$job" >/dev/null
kcm reconcile --repair >/dev/null
is "reconcile --repair moves a task back that left its list" "$(mask "$job" | numbers)" "$(echo "$list" | numbers)"
holds "kcm unmount" kcm unmount --conf-dir=$C
finish
