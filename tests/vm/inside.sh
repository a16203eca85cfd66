#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The first thing that runs in the machine: tells the rig that it is up, runs the job, tells how it ended.
control=/dev/virtio-ports/rig.control
echo '{"up": true}' >$control
sh "$1" </dev/null
echo "{\"exit\": $?}" >$control
