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
    (
        "what can't be read is looked at",
        "oci",
        "if is_sandbox(state, nothing) or (asks is False and not is_asked(state, nothing)):",
        "if not is_asked(state, nothing):",
        "test_oci.py -k could_ask",
    ),
    (
        "a container that asks for nothing is let through",
        "oci",
        "if is_sandbox(state, nothing) or (asks is False and not is_asked(state, nothing)):",
        "if False:",
        "test_oci.py -k could_ask",
    ),
    (
        "the state's annotation counts",
        "oci",
        "(asks is False and not is_asked(state, nothing))",
        "asks is False",
        "test_oci.py -k could_ask",
    ),
    ("escaped letters", "traces", "not any(escape in data for escape in ESCAPES)", "True", "test_traces.py"),
    ("one more escape", "traces", ', b"\\\\u006F")', ")", "test_traces.py -k free"),
    ("words across pieces", "traces", "OVERLAP = 5", "OVERLAP = 4", "test_traces.py -k pieces"),
    ("an escaped quote", "traces", "if (end - before) % 2 == 0:", "if True:", "test_traces.py"),
    (
        "what can't be followed",
        "traces",
        "    if traces is None:\n        return None",
        "    if traces is None:\n        return False",
        "test_traces.py",
    ),
    (
        "a bound for what is followed",
        "traces",
        "read_file(path, LARGEST_TEXT)",
        "read_file(path, 1 << 40)",
        "test_traces.py -k large",
    ),
    (
        "bytes that are not UTF-8",
        "jsontext",
        'data.decode("utf-8", "surrogateescape")',
        'data.decode("utf-8", "replace")',
        "test_jsontext.py -k utf_8",
    ),
    ("bytes of a name", "oci", 'text.encode("utf-8", "surrogateescape")', "text.encode()", "test_oci.py -k by_hand"),
    (
        "annotations of others",
        "oci",
        "return make_state(drop_annotations(document))",
        "raise",
        "test_oci.py -k annotations",
    ),
    (
        "annotations of ours",
        "oci",
        "isinstance(v, str) or k.startswith(MAP_ANNOTATION)",
        "isinstance(v, str)",
        "test_oci.py -k of_ours",
    ),
    (
        "a byte that runc lost",
        "oci",
        'if state.bundle != "/" and LOST_BYTE not in state.bundle:',
        'if state.bundle != "/":',
        "test_mend_bundle.py",
    ),
    (
        "whose option it is",
        "commandline",
        ' if words[0].rpartition("/")[2] == "crun" else ""',
        "",
        "test_mend_bundle.py",
    ),
    (
        "no sitecustomize",
        "schema",
        "        # A virtual environment's",
        "        site.main()\n        # A virtual environment's",
        "test_executables.py -k programs",
    ),
    (
        "names in any locale",
        "../hooks/vfio-guest-bind",
        "#!/usr/bin/python3 -ISXutf8",
        "#!/usr/bin/python3 -IS",
        "test_executables.py -k any_locale",
    ),
    (
        "Python's warnings",
        "../hooks/vfio-guest-bind",
        "_warnings.filters[:] =",
        "_ =",
        "test_executables.py -k warning",
    ),
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
    path = copy / "oci_hooks" / (module if "/" in module else f"{module}.py")
    whole = path.read_text()
    assert whole.count(line) == 1, "the line is not there, or not once: write this mutation anew"
    path.write_text(whole.replace(line, instead))
    try:
        words = options[0].split(" ", 1) if options else []
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/unit/{file}", *words]
        done = subprocess.run(
            command, cwd=copy, capture_output=True, text=True, errors="replace", timeout=300, check=False
        )
    finally:
        path.write_text(whole)
    # 1: a test failed. Anything else is no verdict.
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "1 failed" in done.stdout
