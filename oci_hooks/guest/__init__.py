# SPDX-License-Identifier: Apache-2.0
"""vfio-guest-bind: the hook of the guest."""
