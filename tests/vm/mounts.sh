# The integration tests that mount, on a machine with cgroup v2 alone. Some do not pass yet where everything is slow.
. /t/lib.sh
modprobe loop
ip link set lo up 2>/dev/null
is "all processes are in cgroups of v2 alone" "$(cut -d: -f1,2 /proc/self/cgroup | tr '\n' ' ')" "0: "
cd "$(cat /t/directory)" || exit 1
# Without the storm, which counts what kcm gives up when it gets little CPU time: here it always gets little.
RUST_BACKTRACE=0 /t/it alone_ 2>&1 | tee /tmp/alone
is "the tests that need the machine for themselves pass" "$(grep -c '^test result: ok\.' /tmp/alone)" 1
RUST_BACKTRACE=0 /t/it --test-threads=2 --skip claims::storm:: --skip alone_ $(cat /t/names) 2>&1 | tee /tmp/log
is "the integration tests that mount pass" "$(grep -c '^test result: ok\.' /tmp/log) $(grep '^test .* FAILED$' /tmp/log | head -20 | tr '\n' ' ')" "1 "
finish
