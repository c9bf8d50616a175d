# The integration tests that mount, on a machine with cgroup v2 alone.
. /t/lib.sh
modprobe loop
ip link set lo up 2>/dev/null
is "all processes are in cgroups of v2 alone" "$(cut -d: -f1,2 /proc/self/cgroup | tr '\n' ' ')" "0: "
cd "$(cat /t/directory)" || exit 1
# A machine without KVM is slow; what only takes time is left to the machine that runs the gate.
/t/it --test-threads=2 claims:: tree:: daemon:: commands:: $(cat /t/only 2>/dev/null) 2>&1 | tee /tmp/log
is "the integration tests that mount pass" "$(grep -c '^test result: ok\.' /tmp/log) $(grep '^test .* FAILED$' /tmp/log | head -20 | tr '\n' ' ')" "1 "
finish
