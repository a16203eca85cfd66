# SPDX-License-Identifier: Apache-2.0
"""vfio-hook-replay: inspect recordings, and run the hooks again on them. For tests that it exports."""

from oci_hooks.record.reader import read_record
from oci_hooks.replay.rerun import find_differences

__all__ = ["find_differences", "read_record"]
