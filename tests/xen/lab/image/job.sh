#!/bin/bash
# What dom0 does in one run; dom0-init starts it from the share with the control port as file 3.
# /mnt/job/{mode,command,environment} say what to run; its output and status go through the port lab.output.
port() {
    for name in /sys/class/virtio-ports/*/name; do
        [ "$(cat "$name")" = "$1" ] && echo "/dev/$(basename "$(dirname "$name")")"
    done
}
exec 4<> "$(port lab.output)"
echo begun >&3
results=/mnt/results
checkout=/run/checkout
mkdir -p $checkout /run/lab && tar -xf /mnt/stage.tar -C $checkout
cd $checkout || exit 1
export PYTHONPATH=$checkout/site XEN_LAB=/opt/lab XEN_LAB_RESULTS=$results
. /mnt/job/environment
mode=$(cat /mnt/job/mode)
if [ -n "$LAB_ADDRESS" ]; then # one of two machines
    modprobe virtio_net
    ip address add "$LAB_ADDRESS/24" dev eth0 && ip link set eth0 up
fi
xl vcpu-set 0 "$LAB_CPUS"

if [ "$mode" = shell ]; then
    # The virtual console of the port "lab.console"; hvc0 is Xen's.
    tty=/dev/hvc1
    cat /mnt/job/terminal | xargs stty -F $tty
    echo 'PS1="dom0:\w# "; HISTFILE=' > /run/lab/bashrc
    setsid --ctty bash --rcfile /run/lab/bashrc -i < $tty > $tty 2>&1 3>&- 4>&-
    status=$?
else
    # A pipe rather than the port itself, so that a command may reopen its /dev/stdout.
    mkfifo /run/lab/output
    cat /run/lab/output >&4 3>&- 4>&- & reader=$!
    bash /mnt/job/command > /run/lab/output 2>&1 < /dev/null 3>&- 4>&-
    status=$?
    for _ in $(seq 300); do
        kill -0 $reader 2> /dev/null || break
        sleep 0.1
    done
fi
cp -r /var/log/xen/. $results/xen 2> /dev/null
xl dmesg > $results/xl-dmesg.log 2>&1
dmesg > $results/dom0-dmesg.log 2>&1
printf '\036lab-done %d\n' $status >&4
exit $status
