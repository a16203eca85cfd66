# SPDX-License-Identifier: Apache-2.0
"""The tests bite: each safeguard is taken out of a copy of the hooks, one at a time, and some test fails for it.

A mutation whose line is no longer there is an error: it has to be written anew with the code.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
MOUNT_BY_STAT = 'number = f"{os.major(os.fstat(dev).st_dev)}:{os.minor(os.fstat(dev).st_dev)}"'
# What is taken out, module, line, what stands there instead, and the tests that have to see it.
MUTATIONS = [
    ("rollback", "binding", "findings = take_back(work, journal)", "findings: list[Finding] = []", "test_binding.py"),
    (
        "rollback of drivers",
        "apply",
        'return findings + restore_drivers(root, [entry for entry in entries if entry.kind == "device"], deadline',
        'return findings + restore_drivers(root, [entry for entry in entries if entry.kind == "x"], deadline',
        "test_binding.py",
    ),
    (
        "last first",
        "apply",
        "for entry in reversed(entries):",
        "for entry in entries:",
        "test_faults.py -k a_release_killed",
    ),
    (
        "noted before it is done",
        "apply",
        '        journal.note("device", rebind.address, rebind.driver, rebind.override)',
        "        pass",
        "test_apply.py",
    ),
    ("machine-wide lock", "claims", 'take_lock(fd, deadline, f"{self.path}/lock")', "pass", "test_claims.py"),
    (
        "lock of a journal",
        "claims",
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n            j",
        "j",
        "test_claims.py",
    ),
    ("O_NOFOLLOW", "container", "os.O_DIRECTORY | os.O_NOFOLLOW |", "os.O_DIRECTORY |", "test_nodes.py"),
    (
        "O_NOFOLLOW in a race",
        "container",
        "os.O_DIRECTORY | os.O_NOFOLLOW |",
        "os.O_DIRECTORY |",
        "test_hostile_container.py -k swapped",
    ),
    (
        "owner of the claims' directory",
        "claims",
        "or found.st_uid != os.geteuid()",
        "",
        "test_claims.py",
    ),
    ("owner of a group", "selection", "    if group.name in pool.claims:", "    if False:", "test_selection.py"),
    ("owner of an id", "binding", "(own.pid, own.start) != (work.state.pid, work.start)", "False", "test_binding.py"),
    (
        "a pid is not a process",
        "claims",
        "read_start_time(root, self.pid) == self.start",
        "read_start_time(root, self.pid) > 0",
        "test_claims.py",
    ),
    (
        "only the hook's own nodes",
        "container",
        'found.kind != "char" or (found.major, found.minor) != numbers',
        'found.kind != "char"',
        "test_nodes.py",
    ),
    # What a use is.
    ("any open node is a use", "guards", "openers.find(device, list_tops(device, usage)) or ", "", "test_openers.py"),
    ("a node goes by its number", "openers", "        status = os.stat(path)", '        return ""', "test_openers.py"),
    ("mappings", "openers", "    if depth >= RESOURCES:\n", "    if False:\n", "test_openers.py"),
    ("resources of sysfs", "openers", "raw = device.driver in RAW_DRIVERS", "raw = False", "test_openers.py"),
    ("consoles", "openers", "            return consoles\n", "            pass\n", "test_openers.py"),
    ("a scan cut short", "openers", "    if looked < total:\n", "    if False:\n", "test_openers.py"),
    ("processes that can't be seen", "openers", "    if hidden:\n", "    if False:\n", "test_openers.py"),
    (
        "files that can't be seen",
        "openers",
        "        os.readlink(path)\n        return",
        "        return",
        "test_openers.py -k may_not",
    ),
    ("the first thread has ended", "openers", "    if not names:\n", "    if False:\n", "test_openers.py -k thread"),
    ("loop devices", "guards", "read_loops(root, usage.blocks) if names else {}", "{}", "test_guards.py"),
    (
        "what is below a loop device",
        "blocks",
        'root.ask(ask_backing, f"/dev/{loop}")',
        "int(root.read_text_or(path, str(1 << 8)))",
        "test_guards.py",
    ),
    ("CAN", "guards", "    if kind not in QUIET_TYPES:\n", "    if False:\n", "test_guards.py"),
    ("every table", "netlink", 'found.routed.add(take("=I", attributes[RTA_OIF])[0])', "pass", "test_netlink.py"),
    (
        "addresses of any label",
        "netlink",
        "found.addresses.setdefault(",
        "dict[int, str]().setdefault(",
        "test_netlink.py",
    ),
    ("too many routes", "netlink", "            found.routed.add(0)", "            pass", "test_netlink.py"),
    # The container's tree, its map, the kernel's log, the search for holders.
    (
        "no link on the way to the proof",
        "cgroup",
        "place = open_path(directory, above)",
        "place = os.open(above or '.', os.O_RDONLY, dir_fd=directory)",
        "test_cgroup.py -k no_link",
    ),
    (
        "mounts by their ids",
        "container",
        "number = find_file_system(dev, pid)",
        MOUNT_BY_STAT,
        "test_hostile_container.py -k btrfs",
    ),
    ("a map is whole", "container", "        while data:\n", "        if data:\n", "test_nodes.py -k map"),
    (
        "a line by bytes",
        "log",
        '", "backslashreplace")[:KMSG_LIMIT].decode("utf-8", "ignore").encode()',
        '", "backslashreplace")',
        "test_log.py",
    ),
    (
        "own hypervisor first",
        "asker",
        "(*list_family(root, state.pid), *list_family(root, shim))",
        "()",
        "test_checks.py",
    ),
    ("a search cut short", "checks", "        if looked < total:\n", "        if False:\n", "test_checks.py"),
    ("mounts", "nodes", "            check_mount(dev, directory, place)", "", "test_hostile_container.py -k mounted"),
]


@pytest.fixture(name="copy", scope="module")
def make_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the hooks and their tests."""
    copy = tmp_path_factory.mktemp("copy")
    leave = shutil.ignore_patterns("__pycache__", "*.tar.gz")
    for name in ("oci_hooks", "hooks", "tests", "docs", "examples"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=leave, symlinks=True)
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    return copy


@pytest.mark.parametrize(
    ("module", "line", "instead", "tests"), [rest for _, *rest in MUTATIONS], ids=[name for name, *_ in MUTATIONS]
)
def test_some_test_fails_without(copy: Path, module: str, line: str, instead: str, tests: str) -> None:
    file, *options = tests.split(" ", 1)
    path = copy / f"oci_hooks/{module}.py"
    whole = path.read_text()
    assert whole.count(line) == 1, "the line is not there, or not once: write this mutation anew"
    path.write_text(whole.replace(line, instead))
    try:
        words = options[0].split(" ", 1) if options else []
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/unit/{file}", *words]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300, check=False)
    finally:
        path.write_text(whole)
    # 1: a test failed. Anything else is no verdict.
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "1 failed" in done.stdout
