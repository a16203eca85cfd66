# SPDX-License-Identifier: Apache-2.0
"""Podman's configuration in the virtual machine, which has neither systemd nor a network."""

CONTAINERS_CONF = """\
[containers]
netns = "none"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
"""


def make_storage_conf(driver: str) -> str:
    """Return storage.conf. driver: "overlay", or "vfs" where the containers' root is a directory."""
    return f"""\
[storage]
driver = "{driver}"
graphroot = "/var/lib/containers/storage"
runroot = "/run/containers/storage"
"""
