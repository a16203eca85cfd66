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
        '        journal.note("device", rebind.address, rebind.driver, rebind.override, *identity)',
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
    ("owner of an id", "ownership", "(claim.pid, claim.start) != (owner.pid, owner.start)", "False", "test_binding.py"),
    (
        "the device that was bound",
        "apply",
        "before.get((address, found))",
        "next(known for (at, _), known in before.items() if at == address)",
        "test_ownership.py -k another_device",
    ),
    (
        "an override of the hook's",
        "apply",
        "elif is_ours(known, override):",
        "elif True:",
        "test_ownership.py -k override_of",
    ),
    (
        "the device that was looked at",
        "workers",
        "if os.fstat(fd).st_ino != job.inode:",
        "if False:",
        "test_ownership.py -k before_the_first_write",
    ),
    (
        "writes by a descriptor",
        "workers",
        'return path[len(job.directory) + 1 :] if job.directory and path.startswith(f"{job.directory}/") else path',
        "return path",
        "test_ownership.py -k between_two_writes",
    ),
    (
        "the device at the address",
        "workers",
        "if job.directory and os.stat(job.directory).st_ino != job.inode:",
        "if False:",
        "test_ownership.py -k between_two_writes",
    ),
    (
        "a living container's claim",
        "ownership",
        "if claim.done and claim.is_alive(root):",
        "if False:",
        "test_ownership.py -k living",
    ),
    (
        "what is left of a container",
        "claims",
        "(self.is_alive(root) or is_occupied(root, self.home))",
        "self.is_alive(root)",
        "test_ownership.py -k what_is_left",
    ),
    (
        "a path is not a cgroup",
        "homes",
        "if inode not in (0, found):",
        "if False:",
        "test_ownership.py -k counts_itself",
    ),
    (
        "no more than is read",
        "journal",
        "if self.size + len(line) > JOURNAL_LIMIT:",
        "if False:",
        "test_ownership.py -k nobody_writes_more",
    ),
    (
        "a claim that can't be read",
        "claims",
        "if self.at_work or self.problem:",
        "if self.at_work:",
        "test_ownership.py -k stops_its_own",
    ),
    (
        "what it may have",
        "ownership",
        "if device.address in named or (device.owned_by_vfio and device.group not in known):",
        "if False:",
        "test_ownership.py -k not_given_to_others",
    ),
    (
        "the id in a claim",
        "claims",
        "if self.journal_path(claim.container) != claim.path:",
        "if False:",
        "test_ownership.py -k names_another",
    ),
    (
        "a file for each id",
        "claims",
        'if name.startswith((".", HASHED)):',
        'if name.startswith("."):',
        "test_ownership.py -k long_id",
    ),
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
    ("mounts", "nodes", "            check_mount(dev, directory, place)", "", "test_hostile_container.py -k mounted"),
    (
        "permission ends with the claim",
        "binding",
        "findings = permits.revoke_claim(directory, claim)",
        "findings: list[Finding] = []",
        "test_permits.py",
    ),
    (
        "who keeps permission keeps the device",
        "binding",
        "if not is_unfinished(findings):\n            findings += apply.undo(root, claim",
        "if True:\n            findings += apply.undo(root, claim",
        "test_permits.py",
    ),
    (
        "what another claim needs",
        "permission",
        "if access and not any(other.find_given(widening.path, numbers) for other in others):",
        "if access:",
        "test_permits.py",
    ),
    (
        "what another claim was given",
        "permission",
        'given.append(max(shared, default="") or missing)',
        "given.append(missing)",
        "test_permits.py",
    ),
    (
        "what a device list had",
        "device_list",
        'return remove_letters(ACCESS, "".join(own))',
        "return ACCESS",
        "test_permits.py",
    ),
    (
        "the cgroup that was widened",
        "permits",
        "gone = sysfs.read_inode(root, home.devices) not in (0, home.devices_inode)",
        "gone = False",
        "test_permits.py",
    ),
    (
        "dead numbers, before",
        "binding",
        "permits.revoke_dead(work.directory, claims, but=own_path(work))",
        "pass",
        "test_permits.py",
    ),
    ("numbers given out anew", "permits", "revoke_from(claims, claim, numbers, others)", "pass", "test_permits.py"),
    ("a number that was lost", "permits", "        check_kept(claims, journal, denied)", "", "test_permits.py"),
    (
        "a device that was lost",
        "permits",
        "check_own(claims.root, claims.read_entries(journal), taken.values())",
        "pass",
        "test_permits.py",
    ),
    (
        "a node that opens twice",
        "permits",
        "if taken[pair].name.startswith(CDEV_DIRECTORY):",
        "if False:",
        "test_permits.py",
    ),
    (
        "ready before it is noted",
        "permission",
        "            swaps.prepare(path, grant.nodes)\n        note()",
        "            note()\n            swaps.prepare(path, grant.nodes)",
        "test_permits.py",
    ),
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
