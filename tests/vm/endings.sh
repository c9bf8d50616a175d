# How claims end: an exit is no reclaim, and an event tells of each end. Before 6.15 the kernel does not tell how a task
# ended that its parent has collected.
. /t/lib.sh
start
mkdir $C/pools/p
echo 1 >$C/pools/p/exclusive
mkdir $C/pools/p/1
T=$C/pools/p/1/tasks
kinds() { grep -o '"event":"[a-z]*"' $C/info/events | cut -d'"' -f4 | tail -1; }

sh -c "echo \$\$ >$T; exit 0"
until_is "a task that exits leaves a free list" "" cat $T
is "and its event is no reclaim" "$(kinds)" "$(newer 6.15 && echo ended || echo died)"
# Its parent does not collect it.
sh -c 'sleep 99999 & echo $! >/tmp/job; exec sleep 99999' &
until [ -s /tmp/job ]; do sleep 0.1; done
job=$(cat /tmp/job)
claim $T "$job"
kill -9 "$job"
until_is "a task that is killed leaves a free list" "" cat $T
is "and its event is a reclaim while it is not collected" "$(kinds)" reclaimed
is "info/reclaimed has only the kill" "$(wc -l <$C/info/reclaimed)" 1
is "the metrics agree" "$(grep -E '^kcm_(ended|reclaimed|died)_total' $C/info/metrics | sort | tr '\n' ' ')" \
    "$(newer 6.15 && echo 'kcm_died_total 0 kcm_ended_total 1 ' || echo 'kcm_died_total 1 kcm_ended_total 0 ')kcm_reclaimed_total 1 "
finish
