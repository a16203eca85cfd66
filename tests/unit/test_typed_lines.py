# SPDX-License-Identifier: Apache-2.0
"""Each line that the documents show to be typed is run by a test that is named here, or there is a reason why not.

The list of lines is made from the documents: a new line that is nowhere here fails, and so does an entry whose line,
or whose test, is gone.
"""

from __future__ import annotations

import ast
import re

import pytest

from tests.newcomer import lines
from tests.provision import REPOSITORY

DEMO = "tests/newcomer/test_demo.py::test_demo_every_row_as_expected"
TESTS = "tests/newcomer/test_tests.py::test_tests_run_lists_all_packages"
BUILT = "tests/newcomer/test_install.py::test_build_needs_exactly_the_packages_in_control"
DEBS = "tests/newcomer/test_install.py::test_debs_install_and_run"
PIP = "tests/newcomer/test_install.py::test_pip_install_into_virtual_environment"
TYPED = "tests/newcomer/test_install.py::test_documented_commands_run"
INSTALLS = "tests/newcomer/test_install.py::test_documented_example_commands_run"
PAGE = "tests/packaging/test_install_page.py::test_every_line_of_the_page_works"
PURGE = "tests/newcomer/test_install.py::test_purge_leaves_nothing"
CDI = "tests/vm/test_installed.py::test_installed_cdi"
ALWAYS = "tests/vm/test_installed.py::test_installed_check_always"

ENGINES = "tests/engines/test_engines.py"
DOCKER = f"{ENGINES}::test_docker"
IMAGE = "tests/runtime/test_kata_image.py::test_documented_lines"
CLASS = "tests/packaging/test_containerd.py::test_only_the_class_is_new"

# tests/run runs up to its first test, where it is run inside itself.
COMPILED = "tests/unit/test_executables.py::test_executables_write_no_bytecode"
RUN = {
    "examples/demo": DEMO,
    "tests/run": TESTS,
    "tests/run --list lint unit": TESTS,
    "~/.cache/oci-vfio-hooks/venv-tests-*/bin/pytest tests/unit/guest/test_selection.py": TESTS,
    "packaging/build": BUILT,
    "apt update && apt install ./dist/python3-oci-vfio-hooks_*.deb ./dist/oci-vfio-hooks_*.deb": DEBS,
    "apt update && apt install ./dist/python3-oci-vfio-hooks_*.deb ./dist/oci-vfio-hooks-guest_*.deb": DEBS,
    "vfio-guest-bind --version": DEBS,
    "python3 -m compileall -q oci_hooks": COMPILED,
    "apt update && apt install python3-venv": PIP,
    "python3 -m venv /opt/oci-vfio-hooks": PIP,
    "/opt/oci-vfio-hooks/bin/pip install .": PIP,
    "rpmbuild --rebuild dist/oci-vfio-hooks-0.1.0-1.src.rpm": PAGE,
    "apt purge python3-oci-vfio-hooks oci-vfio-hooks oci-vfio-hooks-guest": PURGE,
    "podman run --annotation io.katacontainers.x.vfio.devices=auto --ulimit memlock=-1 IMAGE PROGRAM": (
        "tests/vm/test_installed.py::test_line_for_podman"
    ),
    "vfio-guest-bind --dry-run --bundle /path/to/bundle": TYPED,
    "vfio-host-check --bundle /path/to/bundle": TYPED,
    "vfio-host-check --all": TYPED,
    "vfio-guest-bind --all": TYPED,
    "vfio-hook-replay list": TYPED,
    "vfio-hook-replay explain": TYPED,
    "vfio-hook-replay show": TYPED,
    "vfio-host-check --group 12": TYPED,
    "vfio-host-check --bundle DIR": TYPED,
    "vfio-host-check --all --format nfd": TYPED,
    "vfio-host-check --all --format npd": TYPED,
    "vfio-host-check --all --json": TYPED,
    "install -D -m 644 hooks.d/vfio-host-check.json /usr/share/containers/oci/hooks.d/vfio-host-check.json": INSTALLS,
    "install -D -m 644 hooks.d/vfio-guest-bind.json /usr/share/containers/oci/hooks.d/vfio-guest-bind.json": INSTALLS,
    "install -D -m 644 hooks.d/vfio-host-check-always.json /etc/containers/oci/hooks.d/vfio-host-check.json": ALWAYS,
    "install -D -m 644 hooks.d/podman.conf /etc/containers/containers.conf.d/oci-hooks.conf": ALWAYS,
    "podman run --rm IMAGE true": ALWAYS,
    "install -D -m 644 cdi/oci-vfio-hooks.json /etc/cdi/oci-vfio-hooks.json": CDI,
    "podman run --device oci-vfio-hooks/hook=guest-bind --annotation io.katacontainers.x.vfio.devices=auto"
    " --ulimit memlock=-1 IMAGE": CDI,
    "install -m 755 docker/vfio-runc /usr/local/sbin/ && install -D -m 644 config.json/guest.json"
    " /etc/oci-vfio-hooks/hooks.json": "tests/vm/test_installed.py::test_installed_docker_wrapper",
    "install -m 755 docker/vfio-runc /usr/local/sbin/": DOCKER,
    "install -D -m 644 config.json/guest.json /etc/oci-vfio-hooks/hooks.json": DOCKER,
    "install -D -m 644 docker/daemon.json /etc/docker/daemon.json": DOCKER,
    "systemctl restart docker": DOCKER,
    "docker run --rm --runtime vfio --ulimit memlock=-1 IMAGE PROGRAM": DOCKER,
    "docker run --rm --runtime vfio --annotation io.katacontainers.x.vfio.devices=auto --ulimit memlock=-1"
    " IMAGE PROGRAM": DOCKER,
    "docker run --rm --device oci-vfio-hooks/hook=guest-bind --annotation io.katacontainers.x.vfio.devices=auto"
    " IMAGE PROGRAM": f"{ENGINES}::test_docker_by_cdi",
    "install -D -m 644 /usr/share/doc/oci-vfio-hooks/examples/cdi/oci-vfio-hooks.json /etc/cdi/oci-vfio-hooks.json": (
        f"{ENGINES}::test_podman_by_cdi"
    ),
    "podman run --device oci-vfio-hooks/hook=guest-bind --annotation io.katacontainers.x.vfio.devices=auto"
    " IMAGE PROGRAM": f"{ENGINES}::test_podman_by_cdi",
    "podman run --annotation io.katacontainers.x.vfio.devices=auto --annotation run.oci.hooks.stderr=/run/hook.log"
    " IMAGE PROGRAM": f"{ENGINES}::test_podman_by_annotation",
    "cat /run/hook.log": f"{ENGINES}::test_podman_by_annotation",
    "cd /usr/share/doc/oci-vfio-hooks/examples": f"{ENGINES}::test_ctr_run_config",
    "ctr oci spec | containerd/add-hooks config.json/guest.json > /etc/containerd/vfio-spec.json": CLASS,
    "containerd/add-runtime vfio containerd/vfio.toml": CLASS,
    "systemctl restart containerd": CLASS,
    "containerd/add-runtime vfio containerd/vfio.toml && systemctl restart containerd": CLASS,
    "containerd/add-runtime kata containerd/kata.toml": (
        "tests/packaging/test_containerd.py::test_a_class_that_is_there_gets_what_it_lacks"
    ),
    "ctr oci spec | containerd/add-hooks config.json/guest.json --annotations > /run/config.json": (
        f"{ENGINES}::test_ctr_run_config"
    ),
    "ctr run --rm --config /run/config.json NAME": f"{ENGINES}::test_ctr_run_config",
    "crictl run --runtime vfio container.json pod.json": f"{ENGINES}::test_pod_of_two_containers",
    "install -D -m 644 settings/host.toml /etc/oci-vfio-hooks/host.toml": INSTALLS,
    "install -m 0755 vfio-labels /usr/local/sbin/": INSTALLS,
    "install -m 0644 vfio-labels.service vfio-labels.timer /etc/systemd/system/": INSTALLS,
    "vfio-host-check --cdi list": "tests/vm/test_guest_cdi.py::test_podman_takes_a_group_by_its_cdi_name",
    "vfio-host-check --cdi generate --output=/run/cdi/oci-vfio-hooks.yaml": (
        "tests/vm/test_guest_cdi.py::test_podman_takes_a_group_by_its_cdi_name"
    ),
    "podman run --rm --device oci-vfio-hooks/group=13 --ulimit memlock=-1:-1 IMAGE": (
        "tests/vm/test_guest_cdi.py::test_podman_takes_a_group_by_its_cdi_name"
    ),
    "docker run --rm --device oci-vfio-hooks/group=13 --ulimit memlock=-1 IMAGE PROGRAM": (
        "tests/engines/test_cdi.py::test_docker"
    ),
    "ctr run --rm --device oci-vfio-hooks/group=13 IMAGE NAME": "tests/engines/test_cdi.py::test_ctr",
    "crictl run container.json pod.json": "tests/engines/test_cdi.py::test_pod",
    "vfio-kata-image show /opt/kata/share/kata-containers/kata-containers.img": IMAGE,
    "vfio-kata-image add /opt/kata/share/kata-containers/kata-containers.img --output kata-vfio.img"
    " --settings guest.toml": IMAGE,
    "vfio-kata-image remove kata-vfio.img --output kata-original.img": IMAGE,
    'mkdir -p "$ROOTFS_DIR/etc/oci-vfio-hooks"': TYPED,
    'echo \'on_failure = "kill"\' > "$ROOTFS_DIR/etc/oci-vfio-hooks/guest.toml"': TYPED,
    './add-to-rootfs "$ROOTFS_DIR" dist/python3-oci-vfio-hooks_*.deb dist/oci-vfio-hooks-guest_*.deb': (
        "tests/packaging/test_install.py::test_examples_kata_guest_image"
    ),
    "packaging/guest-addon": "tests/packaging/test_addon.py::test_addon_is_reproducible",
    'tar -C "$ROOTFS_DIR" -xf dist/oci-vfio-hooks-guest-addon_*_amd64.tar.xz': (
        "tests/packaging/test_addon.py::test_addon_archive_is_tree"
    ),
    "ctr oci spec | containerd/add-hooks config.json/host.json > /etc/containerd/vfio-spec.json": (
        "tests/packaging/test_examples.py::test_examples_containerd_base_spec"
    ),
}
OSBUILDER = "needs kata-containers' osbuilder, which is not here; add-to-rootfs itself is run"
SELF = "is how these tests are run: inside one of them it would run itself"
DIRECTORY = "needs a directory of another program"
DNF = "needs Fedora's dnf; the names that the shell makes of it are tested"
NOT_RUN = {
    "dnf install ~/rpmbuild/RPMS/noarch/{python3-,}oci-vfio-hooks-[0-9]*.rpm": DNF,
    "dnf install ~/rpmbuild/RPMS/noarch/{python3-oci-vfio-hooks,oci-vfio-hooks-guest}-[0-9]*.rpm": DNF,
    "tests/bench/run": "takes a quiet machine and ten minutes, and fails by no time",
    "tests/bench/run plain --compare main": "takes a quiet machine, and fails by no time",
    "tests/bench/run plain --compare main --band 15": "takes a quiet machine; tests/unit/test_bench.py has its verdict",
    "tests/bench/run guest --go-hook FILE": "takes the predecessor's hook, which is not in this repository",
    "~/.cache/oci-vfio-hooks/venv-tests-*/bin/pytest tests/unit/test_x.py": SELF,
    "tests/run --vm tests/vm/test_x.py -k word": SELF,
    "tests/run lint": SELF,
    "tests/run lint unit": SELF,
    "apt install pre-commit && pre-commit install": "changes the clone's git; its linters are those of tests/run lint",
    "tests/run packaging": SELF,
    "KATA_AGENT=/mnt/usr/bin/kata-agent tests/run kata": SELF,
    "KATA_AGENT=/mnt/usr/bin/kata-agent KATA_SHIM=/opt/kata/bin/containerd-shim-kata-v2 tests/run kata-chain": SELF,
    "tests/run newcomer": SELF,
    "install -m 0644 node-problem-detector.json /etc/node-problem-detector/vfio.json": f"{DIRECTORY}: the detector",
    "docker build -t registry.example/oci-vfio-hooks:0.1.0 -f install-hooks/Dockerfile .": (
        "needs an image from a registry; what its program does is tested"
    ),
    "kubectl apply -f install-hooks/daemonset.yaml": "needs a cluster",
    "systemctl enable --now vfio-labels.timer": "needs systemd as init",
    "systemctl enable --now oci-vfio-cdi.path oci-vfio-cdi.timer": "needs systemd as init; the units are verified",
    "systemctl enable --now vfio-nri.service": "needs systemd as init; the unit is verified",
    'export EXTRA_PKGS="python3 python3-jsonschema python3-pyudev python3-tenacity"': OSBUILDER,
    'sudo -E ROOTFS_DIR="$PWD/rootfs" ./rootfs-builder/rootfs.sh debian': OSBUILDER,
    'sudo ./add-to-rootfs "$PWD/rootfs" python3-oci-vfio-hooks_*.deb oci-vfio-hooks-guest_*.deb': OSBUILDER,
    'sudo ./image-builder/image_builder.sh "$PWD/rootfs"': OSBUILDER,
}
# Blocks that nobody types, by document and first line.
NOT_TYPED = {
    (
        "docs/howto/configure.md",
        '"hooks": {"prestart": [{"path": "/usr/libexec/oci/hooks.d/vfio-host-check"}]}',
    ): "part of config.json",
    ("docs/howto/configure.md", '"hooks": {'): "part of config.json",
    (
        "docs/troubleshooting.md",
        "vfio-guest-bind: error: [in-use] 0000:00:0e.0 (1b36:0010, nvme): holds /dev/nvme0n1, mounted on /mnt;"
        " stop using it first",
    ): "what a hook prints",
    (
        "docs/howto/debug.md",
        "GROUP  STATE         DEVICE        ID         CLASS    DRIVER      NOT TAKEN BY AUTO BECAUSE",
    ): "what the survey prints",
    ("docs/reference/exit-codes.md", "vfio-guest-bind: LEVEL: [CODE] OBJECT: PROBLEM; WHAT TO DO"): "a hook's output",
    ("docs/architecture.md", "state → spec → request → inventory → plan → apply → verify"): "the way of the data",
    ("docs/reference/codes-host.md", 'mode = "enforce"        # or "warn"'): "host.toml",
    ("docs/reference/privileges.md", "CAP_SYS_ADMIN CAP_NET_ADMIN CAP_MKNOD CAP_SYS_PTRACE"): "capabilities",
    ("docs/reference/privileges.md", "CAP_CHOWN CAP_DAC_OVERRIDE CAP_SETUID CAP_SETGID"): "capabilities",
    ("docs/howto/kata.md", "cdi.k8s.io/vfio: oci-vfio-hooks/bind=all"): "annotations",
    ("docs/reference/privileges.md", "NoNewPrivileges=yes"): "a unit, which tests/vm/guests takes from there",
    (
        "docs/reference/privileges.md",
        "profile vfio-guest-bind flags=(attach_disconnected) {",
    ): "an AppArmor profile, which tests/vm/guests takes from there",
    ("docs/reference/privileges.md", "CAP_CHOWN CAP_DAC_OVERRIDE CAP_SYS_CHROOT CAP_SETUID CAP_SETGID"): "capabilities",
    ("docs/reference/privileges.md", "CAP_SYS_PTRACE CAP_DAC_READ_SEARCH"): "capabilities",
    ("docs/howto/containerd.md", "enable_cdi = true"): "config.toml",
    ("docs/howto/nri.md", '[plugins."io.containerd.nri.v1.nri"]'): "config.toml",
    (
        "docs/howto/nri.md",
        "vfio-nri: error: [group-not-viable] group 12: 0000:03:00.1 is bound to ixgbe; ...",
    ): "what is printed",
    ("docs/howto/kubernetes.md", "metadata:"): "a manifest",
    ("examples/kata-guest-image/README.md", "[hypervisor.qemu]"): "configuration.toml",
    ("docs/man/vfio-guest-bind.1.rst", "vfio-guest-bind: LEVEL: [CODE] OBJECT: PROBLEM; WHAT TO DO"): "a hook's output",
    ("docs/man/vfio-host-check.1.rst", "vfio-host-check: LEVEL: [CODE] OBJECT: PROBLEM; WHAT TO DO"): "a hook's output",
}
# A block of system calls: words, of which none is followed by a path or an option.
SYSTEM_CALLS = re.compile(r"access( [a-z0-9_]+){8,}$")


def list_blocks() -> dict[tuple[str, int], list[str]]:
    """Return the lines of each code block of each document, by document and number."""
    blocks: dict[tuple[str, int], list[str]] = {}
    for document in lines.list_documents():
        for line in lines.read_lines(document):
            blocks.setdefault((line.document, line.block), []).append(line.text)
    return blocks


def list_typed() -> list[tuple[str, str]]:
    """Return document and text of every line that is typed, remarks left out."""
    return [
        (document, lines.strip_remark(text))
        for (document, _), block in list_blocks().items()
        if (document, block[0]) not in NOT_TYPED and not SYSTEM_CALLS.match(block[0])
        for text in block
    ]


def test_typed_lines_have_test_or_reason() -> None:
    new = [f"{document}: {text}" for document, text in list_typed() if text not in RUN and text not in NOT_RUN]
    assert new == [], "name the test that runs the line in RUN, or the reason why none does in NOT_RUN"


def test_typed_lines_entries_still_documented() -> None:
    typed = {text for _, text in list_typed()}
    assert sorted({*RUN, *NOT_RUN} - typed) == []
    assert sorted(RUN.keys() & NOT_RUN.keys()) == []
    firsts = {(document, block[0]) for (document, _), block in list_blocks().items()}
    assert sorted(NOT_TYPED.keys() - firsts) == []


@pytest.mark.parametrize("test", sorted(set(RUN.values())))
def test_typed_lines_tests_exist(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((REPOSITORY / file).read_text())
    assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_typed_lines_documents_found() -> None:
    """The list is not empty by accident: each kind of document and of block is in it."""
    found = {document for document, _ in list_typed()}
    assert {"README.md", "CONTRIBUTING.md", "docs/howto/install.md", "examples/kubernetes/README.md"} <= found
    assert any(document.endswith(".rst") for document, _ in list_blocks())


TEXT = """Words:

    first      # a remark
    second \\
      and on

* item

      in an item
      echo '#' > file
  more of it

  not code

~~~ sh
fenced
~~~
    no block: no empty line before
"""


def test_typed_lines_markdown_blocks() -> None:
    blocks = [lines.join_lines(block) for block in lines.find_code_blocks(TEXT)]
    assert blocks == [["first      # a remark", "second  and on"], ["in an item", "echo '#' > file"], ["fenced"]]
    assert lines.strip_remark("first      # a remark") == "first"


def test_typed_lines_rst_blocks() -> None:
    assert lines.find_literal_blocks("Words::\n\n    one\n\n    two\n\nNot this:\n\n    three\n") == [["one", "two"]]
