# SPDX-License-Identifier: Apache-2.0
"""Podman, Docker and containerd, each as Debian packages it, by the lines of docs/howto: what the tables there claim.

Under Debian 12's kernel the root is Debian 12, under Debian 13's it is Debian 13, with containerd 2.1 besides.
"""

from __future__ import annotations

import json
import os
import shlex

import pytest

from tests.engines import engine as engines
from tests.engines.engine import IMAGE, PAUSE, PROGRAM, Engine, check_opened, check_refused, fill, find_group
from tests.vm.bundles import Done

MACHINE = "single"
KERNELS = ("6.1", "6.12")
# The runner makes the roots and crictl, and passes their paths.
ENGINES = True

CONTAINERDS = ["own", "2.1"] if os.environ.get("OCI_VFIO_RIG_KERNEL") == "6.12" else ["own"]
VERSIONS = {
    "debian-12": {"podman": "4.3.1", "docker": "20.10.24", "containerd": "1.6.20"},
    "debian-13": {"podman": "5.4.2", "docker": "26.1.5", "containerd": "1.7.24"},
}
# No device: the host bridge, which is never bound.
BRIDGE = "0000:00:00.0"
REFUSED = "vfio-guest-bind: error: ["
LOG = "/run/hook.log"
POD = {
    "metadata": {"name": "pod", "namespace": "default", "uid": "pod", "attempt": 1},
    # 2: the node's own network.
    "linux": {"security_context": {"namespace_options": {"network": 2}}},
    "log_directory": "/run/logs",
}


def test_versions(engine: Engine, release: str) -> None:
    """The how-to names what was run: it is this."""
    for name, version in VERSIONS[release].items():
        assert version in engine.run(name, "--version").stdout
        assert version in (engines.HOWTO / f"{name}.md").read_text()


@pytest.fixture(scope="module")
def podman(engine: Engine) -> Engine:
    """Return the root with our image in podman's storage."""
    engine.do("podman load -i /run/probe.tar")
    return engine


@pytest.fixture(scope="module")
def docker(engine: Engine) -> Engine:
    """Return the root with Docker running, the runtime declared by the how-to's lines, our image in its storage."""
    engine.do("systemctl restart containerd")
    *installs, _ = engines.read_howto("docker", "Declare once: a runtime")
    for install in installs:
        engine.do(install)
    engine.do("docker load -i /run/probe.tar")
    return engine


@pytest.mark.way("podman", "hooks.d, by annotation")
def test_podman_by_annotation(podman: Engine) -> None:
    (line,) = engines.read_howto("podman", "By annotation")
    group = find_group()
    check_opened(podman.type(fill(line)), group)
    # crun hides the hook's line; the page on failures names the annotation that shows it.
    (shown,) = [text for text in engines.read_howto("debug", "Podman") if "stderr" in text]
    check = podman.type(fill(shown, devices=BRIDGE))
    assert check.code != 0
    assert REFUSED in podman.do(f"cat {LOG}")


@pytest.mark.way("podman", "hook by CDI")
def test_podman_by_cdi(podman: Engine) -> None:
    install, line = engines.read_howto("podman", "By CDI")
    podman.do(install)
    # A directory without hooks: it must be the CDI file that brings them.
    podman.do("mkdir -p /run/no-hooks")
    check_opened(podman.type(fill(line).replace("podman", "podman --hooks-dir /run/no-hooks", 1)), find_group())


@pytest.mark.way("docker", "runtime that adds the hooks")
def test_docker(docker: Engine, release: str) -> None:
    *_, line = engines.read_howto("docker", "Declare once: a runtime")
    (annotated,) = engines.read_howto("docker", "By annotation")
    group = find_group()
    check_opened(docker.type(fill(line)), group)
    if release == "debian-12":
        assert "unknown flag: --annotation" in docker.type(fill(annotated)).stderr
        hooks = "/etc/oci-vfio-hooks/hooks.json"
        docker.do(f"sed -i s/auto/{BRIDGE}/ {hooks}")
        check_refused(docker.type(fill(line)), REFUSED)
        docker.do(f"sed -i s/{BRIDGE}/auto/ {hooks}")
    else:
        check_opened(docker.type(fill(annotated)), group)
        check_refused(docker.type(fill(annotated, devices=BRIDGE)), REFUSED)


@pytest.mark.way("docker", "--device of an unbound group: refused")
def test_dockers_device_of_an_unbound_group(docker: Engine) -> None:
    """Docker's own words come before any hook; the check by hand gives the reason."""
    group = find_group()
    done = docker.type(f"docker run --rm --runtime vfio --device /dev/vfio/{group} {IMAGE}")
    assert done.code != 0
    assert "error gathering device information" in done.stderr, done.stderr
    done = docker.type(f"vfio-host-check --group {group}")
    assert done.code == 1
    assert "vfio-host-check: error: [" in done.stderr, done.stderr


@pytest.mark.way("docker", "hook by CDI; before 25 refused")
def test_docker_by_cdi(docker: Engine, release: str) -> None:
    install, line = engines.read_howto("docker", "By CDI")
    docker.do(install)
    done = docker.type(fill(line))
    if release == "debian-12":
        assert done.code != 0
    else:
        check_opened(done, find_group())


@pytest.mark.way("containerd", "ctr run --config")
@pytest.mark.parametrize("containerd", CONTAINERDS, indirect=True)
def test_ctr_run_config(containerd: Engine) -> None:
    containerd.do("systemctl restart containerd")
    containerd.do("ctr images import /run/probe.tar && mkdir -p /srv/probe && ctr images mount " + IMAGE + " /mnt")
    containerd.do("cp -a /mnt/. /srv/probe && ctr images unmount /mnt")
    make, run = engines.read_howto("containerd", "Per container: ctr")
    containerd.do(make)
    config = json.loads(containerd.do("cat /run/config.json"))
    config["root"]["path"] = "/srv/probe"
    config["process"]["args"] = list(PROGRAM)
    # The one of `ctr oci spec`, /default, is that of all containers of this namespace: with another one it is busy.
    assert config["linux"]["cgroupsPath"] == "/default"
    config["linux"]["cgroupsPath"] = "/default/one"
    containerd.write("/run/config.json", json.dumps(config))
    group = find_group()
    check_opened(containerd.type(run.replace("NAME", "one")), group)
    containerd.do(f'sed -i \'s/"auto"/"{BRIDGE}"/\' /run/config.json')
    check_refused(containerd.type(run.replace("NAME", "two")), REFUSED)


@pytest.mark.way("containerd", "runtime class, pod of two containers")
@pytest.mark.parametrize("containerd", CONTAINERDS, indirect=True)
def test_pod_of_two_containers(containerd: Engine) -> None:
    """The container with the annotation has the group; its neighbour sees none. Our pause image is used."""
    name = 'sandbox_image = "PAUSE"'.replace("PAUSE", PAUSE)
    section = '[plugins."io.containerd.grpc.v1.cri"]'
    containerd.do(f"sed -i '/^  .plugins..io.containerd.grpc.v1.cri..$/a {name}' /etc/containerd/config.toml")
    assert section in containerd.do("cat /etc/containerd/config.toml")
    *lines, _ = [*engines.read_howto("containerd", "Declare once: a runtime class"), ""]
    for line in lines:
        containerd.do(line)
    for image in ("probe", "pause"):
        containerd.do(f"ctr -n k8s.io images import /run/{image}.tar")
    group = find_group()
    pod = dict(POD)
    (run,) = engines.read_howto("containerd", "Pods")
    containers: dict[str, dict[str, object]] = {
        name: {"metadata": {"name": name}, "image": {"image": IMAGE}} for name in ("packets", "other")
    }
    logs = {}
    sandbox = run_pod(containerd, pod)
    containers["packets"]["annotations"] = {engines.DEVICES: "auto"}
    for key, container in containers.items():
        container["log_path"] = f"{key}.log"
        started = start_container(containerd, sandbox, pod, container)
        assert started.code == 0, started.stderr
        logs[key] = wait_for_log(containerd, key)
    assert f"opened /dev/vfio/{group}" in logs["packets"], logs
    assert "opened" not in logs["other"], logs
    containerd.do(f"crictl rmp --force {sandbox}")
    engines.check_back()
    # A bad request, by the how-to's line: its hook's line is in what crictl prints.
    containers["packets"]["annotations"] = {engines.DEVICES: BRIDGE}
    containerd.write("/srv/container.json", json.dumps(containers["packets"]))
    check_refused(containerd.type(run.replace("--runtime", "--no-pull --runtime"), "/srv"), REFUSED)
    containerd.do("crictl rmp --force --all")


def run_pod(engine: Engine, pod: dict[str, object]) -> str:
    """Start a pod's sandbox under the class; return its id."""
    engine.write("/srv/pod.json", json.dumps(pod))
    return engine.do("crictl runp --runtime vfio /srv/pod.json").strip().splitlines()[-1]


def start_container(engine: Engine, sandbox: str, pod: object, container: object) -> Done:
    """Create and start a container of a pod."""
    engine.write("/srv/container.json", json.dumps(container))
    made = engine.do(f"crictl create --no-pull {sandbox} /srv/container.json /srv/pod.json")
    return engine.type(f"crictl start {shlex.quote(made.strip().splitlines()[-1])}")


def wait_for_log(engine: Engine, name: str) -> str:
    """Return what a container printed, when it has ended."""
    return engine.do(
        f"for i in $(seq 60); do grep -q ran /run/logs/{name}.log && break; sleep 1; done; cat /run/logs/{name}.log"
    )
