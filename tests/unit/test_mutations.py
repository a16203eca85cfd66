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
    ("mounts", "nodes", "            check_mount(dev, directory, place)", "", "test_hostile_container.py -k mounted"),
    (
        "names of members are left out",
        "privacy",
        'kept[name if known else f"{LEFT_OUT} {index}"]',
        "kept[name]",
        "test_privacy.py -k no_string_of",
    ),
    (
        "members without a rule are left out",
        "privacy",
        "rules.get(name, shape)(item)",
        "rules.get(name, whole)(item)",
        "test_privacy.py -k no_string_of",
    ),
    (
        "annotations are left out",
        "privacy",
        'kept[f"{prefix}{LEFT_OUT} {index}"] = shape(item)',
        "kept[name] = item",
        "test_privacy.py -k no_string_of",
    ),
    (
        "variables are left out",
        "privacy",
        'return f"{shape(name)}{equals}{shape(value)}"',
        "return word",
        "test_privacy.py",
    ),
    (
        "quotes of a document",
        "privacy",
        'problem=f"{head}{found}{LEFT_OUT}"',
        "problem=finding.problem",
        "test_privacy.py",
    ),
    (
        "a defect's values",
        "privacy",
        "finding.replace(problem=hide_quoted(finding.problem))",
        "finding",
        "test_privacy.py -k quotes",
    ),
    (
        "a defect's values in its traceback",
        "record",
        "error if full else privacy.",
        "str(error) or privacy.",
        "test_privacy.py",
    ),
    (
        "the hook's environment",
        "record",
        "sorted(os.environ) if full else name_variables()",
        "sorted(os.environ)",
        "test_privacy.py",
    ),
    (
        "files that nobody knows",
        "hidehost",
        "text and LEFT_OUT\n        if path in",
        "text\n        if path in",
        "test_privacy.py",
    ),
    (
        "answers that nobody knows",
        "hidehost",
        "answer if question in QUESTIONS else LEFT_OUT",
        "answer",
        "test_privacy.py",
    ),
    (
        "properties of a device",
        "hidehost",
        "key in OPTIONS.get(option, ()) and (equals or not index)",
        "True",
        "test_privacy.py -k kata_host",
    ),
    (
        "options of a hypervisor",
        "hidehost",
        "option = name if name in OPTIONS else",
        "option = name if True else",
        "test_privacy.py",
    ),
    ("options of a mount", "hidehost", "if word in MOUNT_OPTIONS", "if word", "test_privacy.py -k form"),
    (
        "sources of mounts",
        "hidehost",
        "source = types[1] if of_device else NOWHERE",
        "source = types[1]",
        "test_privacy.py -k form",
    ),
    ("kernel parameters", "hidetext", "if KERNEL_WORD.fullmatch(word)", "if word", "test_privacy.py"),
    (
        "settings of Kata",
        "hidetext",
        "if () in rests:",
        "if () in rests or isinstance(value, str):",
        "test_privacy.py -k kata_host",
    ),
    (
        "a text that is no JSON",
        "hidetext",
        'return piece if piece == "vfio" else mask(piece)',
        "return piece",
        "test_privacy.py",
    ),
    ("escapes in it", "hidetext", 'return "\\\\u0078"', "return piece", "test_privacy.py"),
    (
        "in linear time",
        "hidetext",
        """([^"\\\\]*(?:\\\\.[^"\\\\]*)*)("|\\\\?\\Z)""",
        """((?:[^"\\\\]|\\\\.)*)("|$)""",
        "test_privacy.py -k mebibyte",
    ),
    (
        "proxies in a finding",
        "kata_checks",
        "kernel.replace(value=refusal) if",
        "kernel if",
        "test_privacy.py -k without_a_running",
    ),
    ("bound of bytes unpacked", "recordfile", 'check_bound(len(data), "BYTES")', "", "test_odd_records.py -k bomb"),
    (
        "bound of bytes packed",
        "recordfile",
        'check_bound(len(packed), "PACKED_BYTES")',
        "",
        "test_odd_records.py -k packed",
    ),
    (
        "bound of a member",
        "recordfile",
        "        check_bound(size, MEMBERS[name], name)",
        "",
        "test_odd_records.py -k bytes",
    ),
    (
        "bound of members",
        "recordfile",
        'check_bound(len(members) + 1, "MEMBERS")',
        "",
        "test_odd_records.py -k members",
    ),
    (
        "bound of events",
        "recordfile",
        'check_bound(data.count(b"\\n"), "EVENTS", "events.jsonl")',
        "",
        "test_odd_records.py -k events",
    ),
    ("bound of a line", "recordfile", 'check_bound(len(line), "LINE_BYTES", where)', "", "test_odd_records.py -k line"),
    ("bound of values", "recordfile", 'check_bound(values, "VALUES", where)', "", "test_odd_records.py -k values"),
    (
        "bound of values of a document",
        "recordfile",
        'check_bound(bounds.estimate_values(data), "VALUES", name)',
        "pass",
        "test_odd_records.py -k values",
    ),
    (
        "bound of values of the summary",
        "recordfile",
        'check_bound(check_value(about, "record.json"), "SUMMARY_VALUES", "record.json")',
        "",
        "test_odd_records.py -k findings",
    ),
    ("bound of depth", "bounds", 'check_bound(depth, "DEPTH", where)', "", "test_odd_records.py -k depth"),
    ("bound of numbers", "bounds", 'check_bound(abs(item), "NUMBER", where)', "pass", "test_odd_records.py -k number"),
    ("numbers of many digits", "recordfile", "> LONGEST_NUMBER:", "> 1 << 40:", "test_odd_records.py -k digits"),
    ("numbers that are none", "recordfile", "if value - value != 0:", "if False:", "test_odd_records.py -k no_hook"),
    (
        "bound of errno",
        "recordfile",
        '0 <= event.get("errno", 0) <= bounds.MOST_ERRNO',
        "True",
        "test_odd_records.py -k no_hook",
    ),
    (
        "bound of seconds",
        "bounds",
        "signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)",
        "",
        "test_odd_records.py -k seconds_are",
    ),
    (
        "out of time is no Exception",
        "bounds",
        "class OutOfTime(BaseException)",
        "class OutOfTime(Exception)",
        "test_odd_records.py -k seconds_are",
    ),
    (
        "bound of memory",
        "bounds",
        "resource.setrlimit(resource.RLIMIT_AS, (most, self.limits[1]))",
        "pass",
        "test_odd_records.py -k memory_is",
    ),
    (
        "a hook keeps to the bounds",
        "record",
        "len(lines) == bounds.MOST_EVENTS or",
        "",
        "test_odd_records.py -k can_be_read",
    ),
    (
        "mistakes that are collected",
        "schema",
        "islice(validator.iter_errors(document), MOST_ERRORS)",
        "validator.iter_errors(document)",
        "test_odd_records.py -k mistakes",
    ),
    (
        "plain files in a tar",
        "recordfile",
        "header[TYPE] not in PLAIN_FILES or size < 0",
        "size < 0",
        "test_replay.py -k hostile",
    ),
    ("names in a tar", "recordfile", "if name not in MEMBERS or header", "if header", "test_replay.py -k hostile"),
    (
        "regular files",
        "recordfile",
        "if not stat.S_ISREG(os.fstat(fd).st_mode):",
        "if False:",
        "test_odd_records.py -k regular",
    ),
    (
        "regular files on this machine",
        "rerun",
        "not stat.S_ISREG(os.stat(path).st_mode)",
        "False",
        "test_odd_records.py -k only_files",
    ),
    ("a replay opens only code", "rerun", "or not self.is_code(path)", "", "test_odd_records.py -k nothing_but_code"),
    ("only code is code", "rerun", "name.endswith(CODE) and name", "name", "test_odd_records.py -k nothing_but_code"),
    (
        "names in the list",
        "replay",
        '(make_one_line(os.path.basename(path)), "-", "-", "-", f"unusable: {error.strerror}")',
        '(os.path.basename(path), "-", "-", "-", "")',
        "test_odd_records.py -k among",
    ),
    (
        "names of bad records in the list",
        "replay",
        "            name = make_one_line(os.path.basename(path))",
        "            name = os.path.basename(path)",
        "test_odd_records.py -k file_name",
    ),
    (
        "names in the list of good ones",
        "account",
        "name, when = make_one_line(os.path.basename(record.path)),",
        "name, when = os.path.basename(record.path),",
        "test_odd_records.py -k no_string_of",
    ),
    (
        "lines of a timeline",
        "account",
        'return "".join(f"{make_one_line(line)}\\n" for line in lines)\n\n\ndef format_head',
        'return "".join(f"{line}\\n" for line in lines)\n\n\ndef format_head',
        "test_odd_records.py -k no_string_of",
    ),
    ("lines of a traceback", "account", '*(f"| {line}" for', '*(f"{line}" for', "test_odd_records.py -k forges"),
    (
        "words that argparse quotes",
        "replay",
        'sys.exit(fail(f"{message}; see {PROGRAM} --help"))',
        "super().error(message)",
        "test_odd_records.py -k argparse",
    ),
    (
        "damage is a line",
        "replay",
        "(ArithmeticError, AttributeError, LookupError, NotationError, RecursionError, TypeError, ValueError)",
        "(NotationError,)",
        "test_odd_records.py -k odd_record",
    ),
    (
        "numbers of errors",
        "account",
        "if type(number) is int and 0 <= number <= MOST_ERRNO else",
        "if number else",
        "test_odd_records.py -k of_no_error",
    ),
]


@pytest.fixture(name="copy", scope="module")
def make_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the hooks and their tests."""
    copy = tmp_path_factory.mktemp("copy")
    leave = shutil.ignore_patterns("__pycache__")
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
