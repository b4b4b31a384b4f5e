#!/bin/busybox sh
# The guest's init process. Mounts file systems, loads modules, runs the suites, and powers the
# machine off.
#
# The first serial port is the console. Kernel messages and the suites' stderr go there. The second
# port carries the results: the suites' stdout, between lines that begin with @@ (see
# transcript.rs).

/bin/busybox mkdir -p /proc /sys /dev /tmp /disk /bad-nvme /bad-virtio /python /vulkan
/bin/busybox --install -s /bin
export PATH=/bin HOME=/ LC_ALL=C

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
exec </dev/null >/dev/ttyS1 2>/dev/ttyS0
stty -F /dev/ttyS1 raw

mkdir -p /dev/shm /dev/pts
mount -t devpts pts /dev/pts
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t debugfs debug /sys/kernel/debug
mount -t cgroup2 cgroup /sys/fs/cgroup
for controller in memory io cpu pids; do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done
ifconfig lo up

. /etc/guest/env
touch "$DMALOAD_GUEST_ROWS"
chmod 666 "$DMALOAD_GUEST_ROWS"

while read -r module parameters; do
    # shellcheck disable=SC2086
    insmod "/modules/$module" $parameters || echo "@@problem cannot load the module $module"
done </etc/guest/modules

# Prints the block device with this serial number.
find_device() {
    for folder in /sys/block/*; do
        for file in "$folder/serial" "$folder/device/serial"; do
            serial=
            [ -e "$file" ] && read -r serial <"$file"
            [ "$serial" = "$1" ] && echo "/dev/${folder##*/}" && return
        done
    done
}

while read -r serial folder options; do
    tries=0
    until device=$(find_device "$serial") && [ -n "$device" ]; do
        tries=$((tries + 1))
        [ "$tries" -gt 100 ] && break
        sleep 0.1
    done
    mount -t ext4 -o "$options" "$device" "$folder" || echo "@@problem cannot mount the disk $serial"
done </etc/guest/disks

# The tests contain paths that exist only on the build machine: those of their scratch folders and
# of the command. Links at these paths point to the disk and to /bin.
mkdir -p -m 1777 /disk/tests /disk/unit-tests
chmod 1777 /disk/tests /disk/unit-tests
mkdir -p "$(dirname "$GUEST_TESTS_FOLDER")" "$(dirname "$GUEST_UNIT_TESTS_FOLDER")" "$(dirname "$GUEST_COMMAND")"
ln -s /disk/tests "$GUEST_TESTS_FOLDER"
ln -s /disk/unit-tests "$GUEST_UNIT_TESTS_FOLDER"
ln -s /bin/dmaload "$GUEST_COMMAND"

uptime_seconds() {
    read -r up _ </proc/uptime
    echo "${up%.*}"
}

dmesg -c >/dev/null
echo "@@ready"
while read -r name program seconds_max arguments; do
    echo "@@begin $name"
    begin=$(uptime_seconds)
    # shellcheck disable=SC2086
    (cd /tmp && exec timeout -s KILL "$seconds_max" "/suites/$program" --test-threads=1 $arguments </dev/null)
    status=$?
    # Kills processes that the suite has left running. The signal is not sent to this script,
    # because it is process 1.
    kill -9 -1
    # Changing a terminal's settings first waits for its pending output. When this command returns,
    # the suite's stderr has therefore been written.
    stty -F /dev/ttyS0 -echo
    echo
    echo "@@end $name status=$status seconds=$(($(uptime_seconds) - begin))"
done </etc/guest/suites

echo "@@rows"
cat "$DMALOAD_GUEST_ROWS"
echo "@@kernel"
dmesg | grep -E 'BUG:|WARNING:|Oops|general protection fault'
echo "@@done"
stty -F /dev/ttyS1 raw
poweroff -f
