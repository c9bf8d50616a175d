# 64 writers compete for one exclusive list: one of them has it at a time.
. /t/lib.sh
start
holds "kcm init" kcm init --num-dp-cores=4 --num-cp-cores=1
list=$(lists dataplane | head -1)
T=$C/pools/dataplane/$list/tasks
touch /tmp/go
for n in $(seq 64); do
    sh -c "while [ -e /tmp/go ]; do
        if echo \$\$ 2>/dev/null >$T; then
            mkdir /tmp/holder 2>/dev/null || echo twice >>/tmp/twice
            echo won >>/tmp/won
            rmdir /tmp/holder
            echo -\$\$ 2>/dev/null >$T
        fi
    done" &
done
sleep 15
rm /tmp/go
sleep 3
is "nobody had the list while another one had it" "$(cat /tmp/twice 2>/dev/null | head -3)" ""
is "writers have won" "$([ "$(wc -l </tmp/won)" -gt 10 ] && echo yes || wc -l </tmp/won)" yes
until_is "the list is free afterwards" "" cat "$T"
holds "kcm unmount" kcm unmount --conf-dir=$C
finish
