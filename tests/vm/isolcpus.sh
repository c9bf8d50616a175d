# Isolated CPUs are those that the kernel has, however its command line is written.
. /t/lib.sh
start
wanted=$(numbers <$CPU/isolated | tr '\n' ' ')
ours=$(grep -o '"id":[0-9]*,"isolated":true' $C/info/topology | grep -o '[0-9]*' | sort -n | tr '\n' ' ')
is "info/topology has the isolated CPUs of the kernel" "$ours" "$wanted"
# Of another machine only the command line is known. The kernel corrects some values, which it does not tell there.
if ! grep -q kcm.corrected /proc/cmdline; then
    mkdir /tmp/proc
    cp /proc/cmdline /tmp/proc/
    read=$(KCM_PROC_FS=/tmp/proc kcm node-report |
        awk '/"id":/ { id = $2 } /"isolated": true/ { print id }' | tr -d , | sort -n | tr '\n' ' ')
    is "the command line is read as the kernel reads it" "$read" "$wanted"
fi
finish
