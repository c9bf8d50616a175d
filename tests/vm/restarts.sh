# The worker is killed under load. From 6.9 on, no client sees an error. Before that, the directory is mounted anew: clients
# see ENOTCONN for a moment, and nothing is lost.
. /t/lib.sh
start
holds "kcm init" kcm init --num-dp-cores=3 --num-cp-cores=1
D=$C/pools/dataplane
sleeper
claim $D/1,9/tasks "$job"

# Claims and releases in a loop, and counts errors.
client() {
    while [ -e /tmp/go ]; do
        echo $$ >$D/tasks 2>/tmp/error.$1 || { [ -s /tmp/error.$1 ] && cat /tmp/error.$1 >>/tmp/errors; }
        echo -$$ >$D/tasks 2>/dev/null
    done
}
touch /tmp/go
: >/tmp/errors
for n in 1 2; do client $n & done
kills=0
for _ in $(seq 6); do
    sleep 1
    dying=$(worker)
    kill -9 "$dying" && kills=$((kills + 1))
    for _ in $(seq 100); do
        next=$(worker)
        [ -n "$next" ] && [ "$next" != "$dying" ] && break
        sleep 0.1
    done
done
rm /tmp/go
sleep 2
is "the worker was killed six times" "$kills" 6
if newer 6.9; then
    is "clients saw no error" "$(grep -v 'busy' /tmp/errors | sort | uniq -c | head -3)" ""
else
    is "clients saw no error but the end of the old mount" \
        "$(grep -v 'busy\|not connected\|connection abort\|No such file' /tmp/errors | sort | uniq -c | head -3)" ""
fi
until_is "the earlier claim exists" "$job" cat $D/1,9/tasks
is "and its mask" "$(mask "$job")" 1,9
is "one directory is mounted" "$(grep -c " $C " /proc/self/mountinfo)" 1
holds "kcm unmount" kcm unmount --conf-dir=$C
finish
