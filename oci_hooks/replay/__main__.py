# SPDX-License-Identifier: Apache-2.0
"""python3 -m oci_hooks.replay: the same as vfio-hook-replay."""

import sys

from oci_hooks.replay.cli import main

sys.exit(main())
