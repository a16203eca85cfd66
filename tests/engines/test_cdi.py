# SPDX-License-Identifier: Apache-2.0
"""The file of `vfio-host-check --cdi generate` is read by Debian 13's engines and by containerd 2.1.

The machine is the host here: vfio-pci has the NIC, and a container gets its group by the name in the file. The lines
are those of docs/howto.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.engines import engine as engines
from tests.engines.engine import IMAGE, PAUSE, Engine, fill
from tests.engines.test_engines import POD, wait_for_log
from tests.vm import devices, guest
from tests.vm.bundles import Done

MACHINE = "single"
KERNELS = ("6.12",)
# The runner makes the roots and crictl, and passes their paths.
ENGINES = True

CONFIG = "/etc/containerd/config.toml"
BUSY = "vfio-host-check: error: [group-busy]"
NOT_VIABLE = "vfio-host-check: error: [group-not-viable]"
FILE = "/run/cdi/oci-vfio-hooks.yaml"


def write_file(engine: Engine) -> None:
    """Write the CDI file by the lines of the page on CDI."""
    *lists, generate = engines.read_howto("cdi", "Write the file")
    for line in lists:
        engine.do(line)
    engine.do(generate)
    assert FILE in generate


def check_passed(engine: Engine, line: str, group: str, unbound: str) -> None:
    """Run a container by a line whose group is 13: it opens the group, and knows its address on the host.

    Then another process has the group open: the host check that the file brings refuses, and its line is shown. Then
    the group is not bound any more, which is refused in these words.
    """
    nic = guest.find_device(devices.NIC_E1000E)
    line = line.replace("group=13", f"group={group}")
    done = engine.type(line)
    assert done.code == 0, done.stderr
    check_output(done.stdout, group)
    with Path(f"/dev/vfio/{group}").open("rb+", buffering=0):
        check_named(engine.type(line), BUSY)
    guest.bind_native(nic)
    check_named(engine.type(line), unbound)


def node_of(group: str) -> str:
    """Return a group's node: an engine that finds none names it, before any hook."""
    return f"/dev/vfio/{group}"


def check_output(output: str, group: str) -> None:
    """Raise AssertionError unless a container's output has the group, opened, and the variable."""
    nic = guest.find_device(devices.NIC_E1000E)
    assert f"opened /dev/vfio/{group}" in output
    assert f"PCIDEVICE_OCI_VFIO_HOOKS_GROUP_{group}='{nic}'" in output


def check_named(done: Done, words: str) -> None:
    """Raise AssertionError unless a command failed and printed these words."""
    assert done.code != 0
    assert words in done.stdout + done.stderr, done.stdout + done.stderr


@pytest.mark.way("podman", "group by CDI")
def test_podman(engine: Engine, group: str) -> None:
    write_file(engine)
    engine.do("podman load -i /run/probe.tar")
    (line,) = engines.read_howto("cdi", "Use it")
    # crun hides the hook's line.
    check_passed(
        engine, line.replace("podman", "podman --runtime runc", 1).replace("IMAGE", IMAGE), group, node_of(group)
    )


@pytest.mark.way("docker", "group by CDI")
def test_docker(engine: Engine, group: str) -> None:
    engine.do("systemctl restart containerd")
    for install in engines.read_howto("docker", "Declare once: a runtime")[:-1]:
        engine.do(install)
    engine.do("docker load -i /run/probe.tar")
    write_file(engine)
    *_, line = engines.read_howto("docker", "A group of the host by CDI")
    # dockerd keeps a node's numbers: the container is made, and the host check refuses it.
    check_passed(engine, fill(line), group, NOT_VIABLE)
    # When the file is another, it reads them anew, and there is no node.
    engine.do(f"cp {FILE} /run/cdi/new.yaml; mv /run/cdi/new.yaml {FILE}")
    check_named(engine.type(fill(line).replace("group=13", f"group={group}")), node_of(group))
    # Without the feature it has no driver for such a name, and reports that without naming the feature.
    engine.do("sed -i s/true/false/ /etc/docker/daemon.json; systemctl restart docker")
    check_named(engine.type(fill(line)), 'could not select device driver "cdi"')
    engine.do("rm /etc/docker/daemon.json")


@pytest.mark.way("containerd", "ctr run --device, group by CDI; before 2.0 refused")
@pytest.mark.parametrize("containerd", ["own", "2.1"], indirect=True)
def test_ctr(containerd: Engine, group: str) -> None:
    """ctr takes CDI names from 2.x on; that of 1.7 takes the name for a path."""
    containerd.do("systemctl restart containerd; ctr images import /run/probe.tar")
    write_file(containerd)
    line, *_ = engines.read_howto("containerd", "A group of the host by CDI")
    line = line.replace("IMAGE NAME", f"{IMAGE} cdi")
    if "1.7" in containerd.do("containerd --version"):
        check_named(containerd.type(line), "oci-vfio-hooks/group=13")
    else:
        check_passed(containerd, line, group, node_of(group))


@pytest.mark.way("containerd", "pod, group by CDI")
@pytest.mark.parametrize("containerd", ["own", "2.1"], indirect=True)
def test_pod(containerd: Engine, group: str) -> None:
    """A container of a pod gets the group by annotation: 1.7 with enable_cdi, 2.x anyway."""
    containerd.do(f"cp {CONFIG} /srv/config.toml")
    lines = [f'sandbox_image = "{PAUSE}"']
    if "1.7" in containerd.do("containerd --version"):
        lines += [text for text in engines.read_howto("containerd", "By CDI") if " = " in text]
        assert lines[1:], "the page has the keys"
    for text in lines:
        added = f"/^  .plugins..io.containerd.grpc.v1.cri..$/a {text}"
        containerd.do(f"sed -i {shlex.quote(added)} {CONFIG}")
    containerd.do("systemctl restart containerd")
    for image in ("probe", "pause"):
        containerd.do(f"ctr -n k8s.io images import /run/{image}.tar")
    write_file(containerd)
    described = {
        "metadata": {"name": "cdi"},
        "image": {"image": IMAGE},
        "annotations": {"cdi.k8s.io/vfio": f"oci-vfio-hooks/group={group}"},
        "log_path": "cdi.log",
    }
    containerd.write("/srv/pod.json", json.dumps(POD))
    containerd.write("/srv/container.json", json.dumps(described))
    _, line = engines.read_howto("containerd", "A group of the host by CDI")
    line = line.replace("crictl run", "crictl run --no-pull", 1)
    done = containerd.type(line, "/srv")
    assert done.code == 0, done.stderr
    check_output(wait_for_log(containerd, "cdi"), group)
    containerd.do("crictl rmp --force --all")
    with Path(f"/dev/vfio/{group}").open("rb+", buffering=0):
        check_named(containerd.type(line, "/srv"), BUSY)
    containerd.do(f"crictl rmp --force --all; rm /run/logs/cdi.log; cp /srv/config.toml {CONFIG}")
