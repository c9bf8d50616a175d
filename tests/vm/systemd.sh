# The service of `kcm install --systemd`: start, restarts, kills, an out-of-memory kill, upgrade, stop and removal. Before
# Linux 6.9 a restart mounts again: clients see ENOTCONN or ECONNABORTED for a moment, and nobody waits for ever.
. /t/lib.sh
D=$C/pools/dataplane
state() { systemctl show --value -p "$1" kcm; }
mounted() { awk -v at=$C '$5 == at { print $3 }' /proc/self/mountinfo; }
# The daemon has a new main process, and the directory answers.
until_up() {
    for _ in $(seq 300); do
        [ "$(state MainPID)" != "$1" ] && [ "$(state ActiveState)" = active ] && [ -n "$(cat $C/info/version 2>/dev/null)" ] && return
        sleep 0.1
    done
    is "it is up again" "$(state ActiveState) $(state Result)" active
}
# Claims and releases in a loop. The messages of the shell have the errors.
load() {
    touch /tmp/go
    rm -f /tmp/errors.*
    loads=
    for n in 1 2; do
        while [ -e /tmp/go ]; do
            echo $$ >$D/tasks
            cat $D/tasks >/dev/null
        done 2>/tmp/errors.$n &
        loads="$loads $!"
    done
}
# quiet WHAT: ends the load, and checks what it has seen. A read in several steps is ESTALE if the worker died in between.
quiet() {
    rm /tmp/go
    ended=
    for _ in $(seq 100); do
        ended=yes
        for pid in $loads; do kill -0 "$pid" 2>/dev/null && ended=; done
        [ -n "$ended" ] && break
        sleep 0.1
    done
    is "$1: no client hangs" "$ended" yes
    if newer 6.9; then
        is "$1: no client sees an error" "$(cat /tmp/errors.* | grep -v 'busy$\|Stale file handle' | sort | uniq -c | head -3)" ""
    else
        is "$1: clients see only the end of the old mount" \
            "$(cat /tmp/errors.* | grep -v 'busy$\|not connected\|connection abort\|No such file\|nonexistent directory\|Stale file handle' | sort | uniq -c | head -3)" ""
    fi
    is "$1: the claim is kept" "$(cat $D/0/tasks) $(mask "$job")" "$job 0"
}

holds "kcm install --systemd" kcm install --systemd
holds "systemd-analyze verify has nothing to say" sh -c '[ -z "$(systemd-analyze verify kcm.service kcm-cdi.service 2>&1)" ]'
systemctl daemon-reload
holds "systemctl enable --now" systemctl enable --now kcm
is "it is active once the directory answers" "$(state ActiveState) $(wc -l <$C/info/version)" "active 1"
main=$(state MainPID)
holds "kcm mount beside the service has nothing to do" kcm mount
is "the service is the same" "$(state MainPID) $(state ActiveState)" "$main active"
holds "kcm init" kcm init --num-dp-cores=2 --num-cp-cores=1
sleeper
claim $D/0/tasks "$job"
is "a claim" "$(mask "$job")" 0

before=$(mounted)
load
for _ in $(seq 30); do systemctl restart kcm || echo "not restarted" >>/tmp/errors.0; done
quiet "30 restarts in a row"
! newer 6.9 || is "restarts keep the mount" "$(mounted)" "$before"

load
for target in main worker all main worker all all all; do
    old=$(state MainPID)
    case $target in
    main) kill -9 "$old" ;;
    worker) kill -9 "$(worker)"; old= ;;
    all) systemctl kill -s KILL kcm ;;
    esac
    until_up "$old"
done
quiet "kills of the supervisor, the worker and both"
! newer 6.9 || is "kills keep the mount" "$(mounted)" "$before"

if newer 6.9; then
    load
    old=$(state MainPID)
    kill -USR1 "$old"
    until_up "$old"
    quiet "SIGUSR1 leaves the mount to the next daemon"
fi

load
memory=/sys/fs/cgroup/system.slice/kcm.service
# The limit is lowered until something is killed; the worker needs the most.
systemctl set-property --runtime kcm MemoryMax=512M
limit=$(cat $memory/memory.current)
killed() { dmesg | grep -c 'Memory cgroup out of memory: Killed process .*kcm'; }
until [ "$(killed)" -gt 0 ]; do
    limit=$((limit - 65536))
    [ "$limit" -gt 0 ] || break
    echo "$limit" >$memory/memory.max
done 2>/dev/null
echo max >$memory/memory.max
systemctl set-property --runtime kcm MemoryMax=infinity
is "a process is killed for memory" "$([ "$(killed)" -gt 0 ] && echo yes)" yes
until_up "none"
quiet "an out-of-memory kill"
is "and the service continues" "$(state ActiveState)" active

load
main=$(state MainPID)
kcm install >/dev/null 2>&1
holds "systemctl reload upgrades" systemctl reload kcm
quiet "an upgrade"
is "and the main process stays" "$(state MainPID)" "$main"
mv /opt/bin/kcm /tmp/kcm.good
printf '#!/bin/sh\nexit 1\n' >/opt/bin/kcm
chmod 755 /opt/bin/kcm
fails "a program that does not start fails the reload" "" systemctl reload kcm
is "and the old one continues" "$(state ActiveState) $(cat $D/0/tasks)" "active $job"
mv /tmp/kcm.good /opt/bin/kcm

is "the journal has priorities" "$(journalctl -u kcm -p warning -o cat --no-pager | grep -c '^WARNING:root:' | head -1 | sed 's/[1-9][0-9]*/some/')" some
is "and no information among the warnings" "$(journalctl -u kcm -p warning -o cat --no-pager | grep -c '^INFO:root:')" 0

kill -STOP "$(worker)" "$(state MainPID)"
holds "systemctl restart replaces a daemon that is stopped" systemctl restart kcm
is "with its claims" "$(cat $D/0/tasks) $(mask "$job")" "$job 0"
mkdir -p /etc/systemd/system/kcm.service.d
printf '[Service]\nEnvironment=KCM_LOG_LEVEL=DEBUG\n' >/etc/systemd/system/kcm.service.d/log.conf
systemctl daemon-reload
systemctl restart kcm
cat $D/0/tasks >/dev/null
until_is "a drop-in sets the level of messages" some \
    sh -c "journalctl -u kcm -o cat --no-pager | grep -c '^DEBUG:root:' | sed 's/^[1-9][0-9]*$/some/'"
rm -r /etc/systemd/system/kcm.service.d
systemctl daemon-reload

holds "systemctl stop" systemctl stop kcm
is "it unmounts" "$(mounted)" ""
is "and it has not failed" "$(state ActiveState) $(state Result)" "inactive success"
fails "a command names the cure" "start it: systemctl start kcm" kcm describe
printf garbage >>/var/lib/kcm/config
holds "it starts with damaged state" systemctl start kcm
is "claims are there again" "$(cat $D/0/tasks) $(mask "$job")" "$job 0"
is "node-report names the damage" "$(kcm node-report | grep -c 'damaged state file')" 1

old=$(state MainPID)
is "kcm unmount by hand says what ends the service" "$(kcm unmount 2>&1)" \
    "WARNING:root:$C: the service kcm mounts it again; to end it, run systemctl stop kcm"
until_up "$old"
is "the service mounts again" "$(cat $D/0/tasks)" "$job"

# The specs for container runtimes.
specs() { ls /etc/cdi | tr '\n' ' '; }
three="kcm.intel.com-controlplane.json kcm.intel.com-dataplane.json kcm.intel.com-infra.json "
holds "the specs for containers have a service" systemctl enable --now kcm-cdi
until_is "it writes them" "$three" specs
follower=$(systemctl show --value -p MainPID kcm-cdi)
for when in "while the daemon runs" "after a restart of the daemon"; do
    mkdir $C/pools/more
    until_is "a new pool has a spec $when" "${three}kcm.intel.com-more.json " specs
    rmdir $C/pools/more
    until_is "and loses it with its end" "$three" specs
    old=$(state MainPID)
    systemctl restart kcm
    until_up "$old"
done
is "it is the same process" "$(systemctl show --value -p MainPID,NRestarts kcm-cdi | tr '\n' ' ')" "$follower 0 "

fails "kcm uninstall while a list is held" "dataplane 0 is held by $job" kcm uninstall
is "changes nothing" "$(state ActiveState) $(cat $D/0/tasks)" "active $job"
claim $D/0/tasks "-$job"
claim $D/1/tasks "-$$"
# What is left of kcm, without what this machine was started with.
rest() { find / -xdev -name '*kcm*' ! -path '/proc/*' ! -path '/sys/*' ! -path '/t/*' ! -path '/tmp/*' ! -path '/var/log/*' ! -path '/run/systemd/*' | sort; }
uninstall() { /t/kcm uninstall "$@"; }
holds "kcm uninstall" uninstall
is "nothing is mounted" "$(mounted)" ""
is "no unit is left, and none has failed" "$(state LoadState) $(systemctl list-units --failed --no-legend 'kcm*' | wc -l)" "not-found 0"
is "no process is left" "$(pidof kcm)" ""
is "the mount point and the state directory stay" "$(rest | tr '\n' ' ')" "/etc/kcm /var/lib/kcm "

holds "it is installed again" /t/kcm install --systemd
systemctl daemon-reload
holds "and started" systemctl enable --now kcm
holds "with pools and a claim" sh -c "kcm init --num-dp-cores=2 --num-cp-cores=1 && echo $job >$D/1/tasks"
holds "systemctl disable --now" systemctl disable --now kcm
is "nothing is mounted then" "$(mounted)" ""
fails "kcm uninstall after it while a list is held" "dataplane 1 is held by $job" uninstall --purge
is "mounts nothing" "$(mounted)" ""
holds "kcm uninstall --force --purge after it" uninstall --force --purge
is "gives the claim back" "$(mask "$job")" "0-3"
is "nothing of kcm is left" "$(rest)" ""
is "and no process" "$(pidof kcm)" ""

# The daemon of another directory has no service.
holds "another directory is mounted" /t/kcm mount --conf-dir=/run/other --state-dir=/run/other.state
holds "the service is installed again" /t/kcm install --systemd
systemctl daemon-reload
holds "it is started again" systemctl enable --now kcm
holds "kcm uninstall --purge of the other directory" uninstall --conf-dir=/run/other --purge
is "leaves the service and its program alone" "$(state ActiveState) $(ls /opt/bin/kcm) $(ls -d /run/other* 2>&1 | grep -c 'No such file')" \
    "active /opt/bin/kcm 1"

# The machine is shut down while the directory is in use; tests/vm/shutdown has the checks.
holds "it has pools again" kcm init --num-dp-cores=2 --num-cp-cores=1
claim $D/0/tasks "$job"
is "with a claim" "$(cat $D/0/tasks)" "$job"
(cd $D && exec sleep 99999) &
tail -f $C/info/events >/dev/null 2>&1 &
finish
