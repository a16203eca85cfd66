#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What rig.service runs: tell the rig that the machine is up, run its job, tell how that ended, power off.
# systemd does not wait for all devices. The ports are devices too.
udevadm settle --timeout=150
ports=/dev/virtio-ports
exec >$ports/rig.output 2>&1
echo '{"up": true}' >$ports/rig.control
code=0
sh /run/rig/job.sh </dev/null || code=$?
echo "{\"exit\": $code}" >$ports/rig.control
echo o >/proc/sysrq-trigger
