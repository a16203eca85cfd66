# SPDX-License-Identifier: Apache-2.0
"""vfio-host-check: the hook of the host."""
