# SPDX-License-Identifier: Apache-2.0
"""OCI hooks that pass VFIO devices through to containers in virtual machines, as VFIO devices."""

__version__ = "0.1.0"
