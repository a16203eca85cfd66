# SPDX-License-Identifier: Apache-2.0
"""The runtime's side of NRI: containerd's own package, built with Go (peer/), for tests/unit/nri/test_peer.py."""
