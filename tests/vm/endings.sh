# How claims end: an exit is no reclaim, a kill is one, and an event tells of each.
. /t/lib.sh
start
mkdir $C/pools/p
echo 1 >$C/pools/p/exclusive
mkdir $C/pools/p/1
T=$C/pools/p/1/tasks
kinds() { grep -o '"event":"[a-z]*"' $C/info/events | cut -d'"' -f4 | tail -1; }

sh -c "echo \$\$ >$T; exit 0"
until_is "a task that exits leaves a free list" "" cat $T
if newer 6.15; then
    is "and the event is: released" "$(kinds)" released
else
    # Its parent has collected it, and the kernel does not tell how it ended.
    known "the event of a normal exit is not a reclaim" "$(kinds | grep -c reclaimed)" 0
fi
sleeper
claim $T "$job"
kill -9 "$job"
until_is "a task that is killed leaves a free list" "" cat $T
is "and the event is: reclaimed" "$(kinds)" reclaimed
finish
