#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The first thing that runs in the machine: `inside.sh JOB DIRECTORY...`. Tells the rig that it is up, runs the job,
# tells how it ended. DIRECTORY: those of the outside that must be seen as they are there.
set -eu
# Standard error is the kernel's console's: the job's words all go one way, in order.
exec 2>&1
control=/dev/virtio-ports/rig.control
echo '{"up": true}' >$control
job=$1
shift

# virtme-ng's root has no cache: every import asks the outside for every file, each time. The same tree once more,
# with a cache, over the directories that are read all the time, makes pytest start in a third of the time. That
# also shows what virtme-ng hides behind an empty tmpfs.
mkdir -p /run/host /run/usr/upper /run/usr/work /run/modules
mount -t 9p -o ro,version=9p2000.L,trans=virtio,access=any,cache=loose,msize=512000 rig.root /run/host
for directory in "$@"; do
    mkdir -p "$directory"
    mount --bind "/run/host$directory" "$directory"
done
mount --bind /lib/modules /run/modules
mount -t overlay -o lowerdir=/run/host/usr,upperdir=/run/usr/upper,workdir=/run/usr/work rig.usr /usr
mkdir -p /usr/lib/modules
mount --move /run/modules /usr/lib/modules
umount -l /run/host
# /var shows what is outside, and goes on doing so while hooks there leave records.
mkdir -p /var/lib/oci-vfio-hooks
mount -t tmpfs -o mode=0755 records /var/lib/oci-vfio-hooks

code=0
sh "$job" </dev/null || code=$?
echo "{\"exit\": $code}" >$control
