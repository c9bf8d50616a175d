# The Debian package: installed, upgraded with a claim, removed and purged, with apt and dpkg.
. /t/lib.sh
D=$C/pools/dataplane
state() { systemctl show --value -p "$1" kcm; }
mounted() { grep -c " $C .* - fuse.kcm " /proc/self/mountinfo; }
# Everything that a package or a daemon could leave behind. dpkg keeps its own records.
rest() {
    find / -xdev -name '*kcm*' ! -path '/proc/*' ! -path '/sys/*' ! -path '/t/*' ! -path '/tmp/*' ! -path '/var/lib/dpkg/*' \
        ! -path '/var/log/*' ! -path '/var/cache/*' ! -path '/run/systemd/transient/*' 2>/dev/null | sort | tr '\n' ' '
}
# By its path: the shell would start busybox's own one.
DPKG=/usr/bin/dpkg
FIRST=/t/kcm_first.deb NEXT=/t/kcm_next.deb

is "nothing of kcm is there" "$(rest)" ""
holds "apt-get install" apt-get install -y -q $FIRST
is "kcm is in PATH" "$(command -v kcm) $(kcm --version | cut -d' ' -f1)" "/usr/bin/kcm kcm"
is "dpkg finds all of its files as they were" "$($DPKG --verify kcm)" ""
is "nothing was started" "$(state ActiveState) $(mounted)" "inactive 0"
holds "systemd-analyze verify has nothing to say" sh -c '[ -z "$(systemd-analyze verify kcm.service kcm-cdi.service 2>&1)" ]'
for page in "1 kcm" "1 kcm-isolate" "1 kcm-uninstall" "5 kcm"; do
    holds "man $page" sh -c "man $page | grep -q 'SEE ALSO'"
done
is "man warns of nothing" "$(for page in /usr/share/man/man[15]/kcm*; do man --warnings -E UTF-8 -l "$page" 2>&1 >/dev/null; done | head -3)" ""

holds "systemctl enable --now" systemctl enable --now kcm
holds "kcm init" kcm init --num-dp-cores=2 --num-cp-cores=1
is "kcm status is content" "$(kcm status --timeout=60 | grep -c '^unit:\|^version:')" 0
sleeper
claim $D/0/tasks "$job"
is "a claim" "$(cat $D/0/tasks) $(mask "$job")" "$job 0"
main=$(state MainPID) old=$(worker)
holds "dpkg -i of a higher version" $DPKG -i $NEXT
is "the service was not restarted" "$(state MainPID) $(state NRestarts)" "$main 0"
is "another worker serves" "$([ "$(worker)" != "$old" ] && [ -n "$(worker)" ] && echo yes)" yes
is "with the claim" "$(cat $D/0/tasks) $(mask "$job")" "$job 0"

fails "apt-get remove while a list is held" "dataplane 0 is held by $job" apt-get remove -y -q kcm
is "changes nothing" "$(state ActiveState) $(cat $D/0/tasks)" "active $job"
claim $D/0/tasks "-$job"
holds "apt-get remove" apt-get remove -y -q kcm
is "ends the mount" "$(mounted) $(ls /usr/bin/kcm 2>&1 | grep -c 'No such file')" "0 1"
is "and no unit has failed" "$(systemctl list-units --failed --no-legend 'kcm*' | wc -l)" 0
holds "it is installed again" apt-get install -y -q $NEXT
holds "and started" systemctl enable --now kcm
is "the pools are there again" "$(lists dataplane | tr '\n' ' ')" "0 1 "

# A daemon that the service does not manage.
holds "the service is stopped" systemctl disable --now kcm
kcm mount --foreground >/dev/null 2>&1 &
until_is "a daemon without the service" 1 mounted
claim $D/1/tasks "$job"
old=$(worker)
holds "it is upgraded, too" $DPKG -i $NEXT
is "another worker serves" "$([ "$(worker)" != "$old" ] && [ -n "$(worker)" ] && echo yes)" yes
is "with the claim" "$(cat $D/1/tasks)" "$job"

holds "kcm uninstall --force" kcm uninstall --force
is "ends the mount, and leaves the package" "$(mounted) $(ls /usr/bin/kcm)" "0 /usr/bin/kcm"
holds "apt-get purge" apt-get purge -y -q kcm
is "nothing is left" "$(rest)" ""
is "and no process" "$(pidof kcm)" ""
is "dpkg knows nothing of it" "$($DPKG -s kcm 2>&1 | grep -c 'not installed')" 1
finish
