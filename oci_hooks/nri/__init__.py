# SPDX-License-Identifier: Apache-2.0
"""vfio-nri: the host check as a plugin of the Node Resource Interface, for runtimes that run hooks late or never."""
