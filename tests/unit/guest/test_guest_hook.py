# SPDX-License-Identifier: Apache-2.0
"""The real executable as a subprocess, as runtimes start it: bad input, odd surroundings, and what nobody pays for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from oci_hooks import oci
from oci_hooks.findings import HookError
from oci_hooks.guest import hook as guest_hook
from oci_hooks.program import Arguments, Run
from oci_hooks.system import Deadline
from tests.support.fake_guest import NIC, Machine
from tests.unit.guest.test_claims import STAT

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[3]
HOOK = REPOSITORY / "hooks/vfio-guest-bind"
# A process that is not there: the highest pid there can be.
NO_PID = 4194304
HEAVY = [
    "json",
    "typing",
    "re",
    "enum",
    "argparse",
    "dataclasses",
    "logging",
    "ctypes",
    "_ctypes",
    "subprocess",
    "tomllib",
    "site",
] + ["jsonschema", "pyudev", "tenacity", "signal", "hashlib", "collections", "inspect", "pathlib", "shutil", "ast"]


def run(data: bytes | None, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the hook as a runtime does: nothing in its environment."""
    return subprocess.run(
        [str(HOOK), *arguments], input=data, capture_output=True, timeout=60, check=False, **{"env": {}, **options}
    )


def make_state(bundle: Path | str, **changes: Any) -> bytes:
    """Return a state."""
    return json.dumps({"ociVersion": "1.0.2", "id": "c1", "pid": NO_PID, "bundle": str(bundle), **changes}).encode()


def make_bundle(top: Path, config: object) -> Path:
    """Return a bundle with this config.json: bytes as they are, all else as JSON."""
    bundle = top / "bundle"
    bundle.mkdir()
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    (bundle / "config.json").write_bytes(data)
    return bundle


def list_system() -> list[str]:
    """Return what the hook may leave on a machine when it binds: claims, and their directory."""
    top = Path("/run/oci-vfio-hooks")
    return sorted(str(path) for path in top.rglob("*") if "records" not in path.parts) if top.exists() else []


def check_refusal(done: subprocess.CompletedProcess[bytes], code: int, *words: str, count: int = 1) -> list[str]:
    """Check that a run was refused with one line a finding and no traceback, and return the lines."""
    lines = done.stderr.decode().splitlines()
    assert done.returncode == code, lines
    assert done.stdout == b""
    assert len(lines) == count, lines
    assert all(line.startswith("vfio-guest-bind: error: [") for line in lines)
    # The remedy follows the problem.
    assert all("; " in line for line in lines)
    for word in words:
        assert word in done.stderr.decode()
    return lines


# Nothing asked for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("prestart",), ("createRuntime",)])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {
            "process": {"env": ["A=1"]},
            "linux": {"devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]},
        },
        {"linux": {"devices": [{"path": "/dev/vfio/vfio", "type": "c", "major": 10, "minor": 196}]}},
        {
            "annotations": {oci.DEVICES_ANNOTATION: "auto", "io.kubernetes.cri.container-type": "sandbox"},
            "linux": {"devices": [{"path": "/dev/vfio/12", "type": "c", "major": 244, "minor": 0}]},
        },
    ],
)
def test_hook_without_vfio_silent(tmp_path: Path, config: object, arguments: tuple[str, ...]) -> None:
    done = run(make_state(make_bundle(tmp_path, config)), *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    "annotations",
    [
        {"a": "b"},
        {f"{oci.DEVICES_ANNOTATION}.web": "auto", oci.CONTAINER_NAME_ANNOTATIONS[0]: "sidecar"},
        {oci.DEVICES_ANNOTATION: "auto", "io.kubernetes.cri.container-type": "sandbox"},
    ],
    ids=["none", "another container's", "sandbox"],
)
def test_hook_without_vfio_imports_only_fast_path(tmp_path: Path, annotations: dict[str, str]) -> None:
    document = {"linux": {"devices": [{"path": "/dev/fuse", "type": "c"}]}, "annotations": annotations}
    bundle = make_bundle(tmp_path, document)
    command = ["/usr/bin/python3", "-ISX", "importtime", str(HOOK)]
    done = subprocess.run(command, input=make_state(bundle), capture_output=True, check=True, env={})
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.decode().splitlines()}
    # The measure works: the hook's own modules are in the list.
    assert {"oci_hooks.guest.hook", "oci_hooks.oci"} <= modules
    assert [name for name in HEAVY if name in modules] == []
    needless = ("guest.binding", "log", "record", "guest.request", "schema", "settings")
    assert not {f"oci_hooks.{name}" for name in needless} & modules


def test_release_without_claim_silent_without_bundle() -> None:
    for data, arguments in (
        (make_state("/nowhere", status="stopped"), ()),
        (make_state("/nowhere"), ("poststop",)),
        (make_state("/nowhere", id="../x"), ("poststop",)),
        (make_state("/nowhere", id="x" * 300), ("poststop",)),
        (make_state("/nowhere", id="a\nb"), ("poststop",)),
    ):
        before = list_system()
        done = run(data, *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert list_system() == before


# Bad input -----------------------------------------------------------------------------------------------------------

STATES: list[tuple[bytes, tuple[str, ...], int]] = [
    (b"", ("[bad-json] state on stdin: is empty",), 1),
    (b" \n\n", ("is empty",), 1),
    (b"hello", ("line 1 column 1",), 1),
    (b"{", ("line 1 column 2",), 1),
    (b"\xff\xfe{}", ("line 1 column 1",), 1),
    (b'{"id": "\xe9", "bundle": "/\xe9"}', ("[bundle-unreadable] /\\udce9/config.json",), 1),
    (b"[]", ("expected object, found []",), 1),
    (b"null", ("expected object, found null",), 1),
    (b"NaN", ("expected object, found NaN",), 1),
    (b"{}", ("missing required key id, bundle",), 1),
    (b'{"id": "c1"}', ("missing required key bundle",), 1),
    (b'{"id": 5, "bundle": "/b"}', ("id: expected string, found 5",), 1),
    (b'{"id": "", "bundle": "b", "pid": -1}', ("id: ", "bundle: expected an absolute path", "pid: "), 3),
    (b'{"id": "c", "bundle": "/b", "pid": NaN}', ("pid: expected integer, found NaN",), 1),
    (b'{"id": "c", "bundle": "/b", "pid": "7"}', ('pid: expected integer, found "7"',), 1),
    (b'{"id": "c", "bundle": "/b\\u0000"}', ("bundle: expected an absolute path",), 1),
    (b'{"id": "\\ud800", "bundle": "/b"}', ("id: expected a name",), 1),
    (
        f'{{"id": "c", "bundle": "/b", "annotations": {{"a": 1, "{oci.DEVICES_ANNOTATION}": 1}}}}'.encode(),
        ("annotations.a: expected string, found 1", f"annotations.{oci.DEVICES_ANNOTATION}: expected string, found 1"),
        2,
    ),
    (b'{"id": "c", "bundle": "/b", "annotations": [1]}', ("annotations: expected object, found [1]",), 1),
    (b'{"id": "c", "id": "", "bundle": "/b"}', ("id: expected a name",), 1),
    (b"[" * 200_000, ("is nested too deeply",), 1),
    (b'{"id": ' + b"[" * 950 + b"]" * 950 + b', "bundle": "/b"}', ("id: ",), 1),
    (b'{"id": "c", "bundle": "/b", "x": "' + b"y" * (65 << 20) + b'"}', ("is longer than",), 1),
    (
        b'{"id": "c\\n\\u001b[31m", "bundle": "/no/such/bundle"}',
        ("[bundle-unreadable] /no/such/bundle/config.json",),
        1,
    ),
]


@pytest.mark.parametrize(("data", "words", "count"), STATES, ids=lambda value: repr(value)[:32])
def test_hook_bad_state_refused(data: bytes, words: tuple[str, ...], count: int) -> None:
    before = list_system()
    check_refusal(run(data), 2, *words, count=count)
    assert list_system() == before


def one_device(**changes: Any) -> dict[str, Any]:
    """Return a config.json with one device."""
    return {"linux": {"devices": [{"path": "/dev/vfio/12", "type": "c", "major": 244, "minor": 0, **changes}]}}


CONFIGS: list[tuple[object, str]] = [
    (b"", "config.json: is empty"),
    (b'{"linux": {"devices": [{"path": "/dev/vfio/12"', "line 1 column 47"),
    (b'\xff"/dev/vfio/12"', "line 1 column 1"),
    ({"linux": {"devices": "/dev/vfio/12"}}, 'linux.devices: expected array, found "/dev/vfio/12"'),
    ({"linux": {"devices": ["/dev/vfio/12"]}}, 'linux.devices[0]: expected object, found "/dev/vfio/12"'),
    (one_device(type="x"), 'linux.devices[0].type: expected one of c, b, u, p, found "x"'),
    (one_device(major="244"), 'linux.devices[0].major: expected integer, found "244"'),
    (one_device(path="dev/vfio/1"), "linux.devices[0].path: expected an absolute path"),
    (one_device(path="/dev/vfio/1\0"), "linux.devices[0].path: expected an absolute path"),
    (one_device(fileMode=-1), "linux.devices[0].fileMode: expected a number not below 0, found -1"),
    ({**one_device(), "process": {"env": "A=1"}}, "process.env: expected array"),
    ({"annotations": {oci.DEVICES_ANNOTATION: ""}}, "invalid device selector ''"),
    ({"annotations": {oci.DEVICES_ANNOTATION: "0000:02:00.9"}}, "invalid device selector '0000:02:00.9'"),
    ({"annotations": {oci.DEVICES_ANNOTATION: "x\n\x1b[31m" + "y" * 9000}}, "expected a comma-separated list"),
    ({"annotations": {oci.DEVICES_ANNOTATION: 5}}, f"annotations.{oci.DEVICES_ANNOTATION}: expected string"),
    ({"annotations": {oci.MAP_ANNOTATION: "{}"}}, "expected array, found object"),
    ({"annotations": {oci.MAP_ANNOTATION: "[" * 9000}}, "nested too deeply"),
]


@pytest.mark.parametrize(("config", "words"), CONFIGS, ids=lambda value: repr(value)[:60])
def test_hook_bad_config_refused(tmp_path: Path, config: object, words: str) -> None:
    before = list_system()
    check_refusal(run(make_state(make_bundle(tmp_path, config))), 2, words)
    assert list_system() == before


def test_bind_without_process_refused(tmp_path: Path) -> None:
    before = list_system()
    bundle = make_bundle(tmp_path, {"annotations": {oci.DEVICES_ANNOTATION: "auto"}})
    check_refusal(run(make_state(bundle)), 1, "[no-process]", "createRuntime")
    check_refusal(run(make_state(bundle, pid=0)), 1, "[no-process]")
    assert list_system() == before


def test_dry_run_unmatched_selector_refused(tmp_path: Path) -> None:
    before = list_system()
    bundle = make_bundle(tmp_path, {"annotations": {oci.DEVICES_ANNOTATION: "fffe:ff:1f.7"}})
    for data, arguments in ((make_state(bundle), ("--dry-run",)), (None, ("--dry-run", "--bundle", str(bundle)))):
        check_refusal(run(data, *arguments), 1, "[no-such-device]", "fffe:ff:1f.7")
    assert list_system() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nonsense",), "--nonsense"),
        (("start",), "unknown hook type 'start'"),
        (("--pid", "x"), "--pid"),
        (("--bundle", "/b"), "needs the process id of the container's init"),
        (("--settings", "/no/such.toml"), "/no/such.toml"),
        (("prestart", "poststop"), "poststop"),
    ],
)
def test_hook_bad_arguments_refused(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    bundle = make_bundle(tmp_path, {"annotations": {oci.DEVICES_ANNOTATION: "auto"}})
    check_refusal(run(make_state(bundle), *arguments), 2, words)


def test_hook_json_output() -> None:
    done = run(b"[]", "--json")
    reported = json.loads(done.stdout)
    assert (done.returncode, reported["exit"], reported["program"]) == (2, 2, "vfio-guest-bind")
    assert [finding["code"] for finding in reported["findings"]] == ["bad-state"]


def test_hook_help_and_version() -> None:
    for argument in ("--help", "--version"):
        done = run(b"", argument)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"vfio-guest-bind" in done.stdout


# Odd surroundings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2), (1, 2), (0, 2)], ids=str)
def test_hook_closed_descriptors(tmp_path: Path, closed: tuple[int, ...]) -> None:
    redirections = " ".join(f"{fd}{'<' if fd == 0 else '>'}&-" for fd in closed)
    bundle = make_bundle(tmp_path, {})
    for data, code in ((make_state(bundle), 2 if 0 in closed else 0), (b"[]", 2)):
        done = run_shell(f"{HOOK} {redirections}", data)
        assert done.returncode == code
        assert b"Traceback" not in done.stderr
        assert done.stdout == b""
        if 2 not in closed:
            assert (done.stderr != b"") == (code != 0)


def run_shell(command: str, data: bytes) -> subprocess.CompletedProcess[bytes]:
    """Run a shell command with an empty environment."""
    return subprocess.run(
        ["/bin/sh", "-c", f"exec {command}"], input=data, capture_output=True, timeout=60, check=False, env={}
    )


def test_hook_any_umask_and_directory(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, {})
    gone = tmp_path / "gone"
    gone.mkdir()
    done = run_shell(f"sh -c 'cd {gone} && rmdir {gone} && umask 777 && exec {HOOK}'", make_state(bundle))
    assert (done.returncode, done.stderr) == (0, b"")


def test_hook_ignores_environment(tmp_path: Path) -> None:
    # A tenant's variables reach a hook in some runtimes (CVE-2025-23266).
    for name in ("json", "os", "oci_hooks", "jsonschema", "sitecustomize", "usercustomize", "_json"):
        (tmp_path / f"{name}.py").write_text(f"import sys; sys.stderr.write('loaded {name}'); sys.exit(77)")
    environment = {
        "PYTHONPATH": str(tmp_path),
        "PYTHONHOME": str(tmp_path),
        "PYTHONSTARTUP": str(tmp_path / "os.py"),
        "PYTHONINSPECT": "1",
        "PYTHONWARNINGS": "error",
        "PYTHONIOENCODING": "utf-16",
        "PATH": str(tmp_path),
        "LC_ALL": "tr_TR.ISO-8859-9",
        "HOME": str(tmp_path),
    }
    config = {"annotations": {"a": "\u00e9\u4e2d"}}
    done = run(make_state(make_bundle(tmp_path, config)), env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    check_refusal(run(b'{"id": 5}', env=environment, cwd=tmp_path), 2, "[bad-state]", count=2)


def test_hook_inherited_signal_state_reset(tmp_path: Path) -> None:
    def spoil() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM})

    bundle = make_bundle(tmp_path, {"annotations": {oci.DEVICES_ANNOTATION: "auto"}})
    check_refusal(run(make_state(bundle), preexec_fn=spoil), 1, "[no-process]")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_hook_early_signal_without_traceback(number: signal.Signals) -> None:
    with subprocess.Popen([HOOK], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env={}) as process:
        time.sleep(0.7)
        process.send_signal(number)
        assert process.stderr is not None
        output = process.stderr.read()
        assert process.wait(timeout=30) != 0
    assert b"Traceback" not in output


def test_hook_missing_state_ends_at_deadline(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from oci_hooks.guest import hook as guest_hook
guest_hook.SECONDS = 0.3
sys.exit(guest_hook.main([]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("{")
        process.stdin.flush()
        # The pipe stays open.
        line = process.stderr.readline()
        assert process.wait(timeout=30) == 2
    assert "[no-state] stdin: was not closed before the deadline; " in line


def test_hook_executable_under_20_lines() -> None:
    for hook in (REPOSITORY / "hooks").iterdir():
        text = hook.read_text()
        assert text.startswith("#!/usr/bin/python3 -I")
        assert os.access(hook, os.X_OK)
        # The words before its first import are no code.
        lines = [line.strip() for line in text[text.index("\nimport ") :].splitlines()]
        assert len([line for line in lines if line and not line.startswith("#")]) < 20


# on_failure ----------------------------------------------------------------------------------------------------------


def work_on(machine: Machine, monkeypatch: pytest.MonkeyPatch, annotation: str, settings: str, pid: int) -> HookError:
    """Run the hook's work on a made machine, where it fails, and return the error."""
    if settings:
        machine.write("/etc/oci-vfio-hooks/guest.toml", settings)
    machine.write("/b/config.json", json.dumps({"annotations": {oci.DEVICES_ANNOTATION: annotation}}))
    machine.write(f"/proc/{pid}/stat", STAT.format(pid=pid, state="S", start=70))
    (machine.top / "run").mkdir(exist_ok=True)
    machine.write("/proc/self/mountinfo", "22 1 0:21 / / rw - 9p root rw\n")
    run = Run("vfio-guest-bind", Arguments(), Deadline(5), machine.root)
    monkeypatch.setattr(guest_hook, "read_state", lambda _: oci.State("c1", "/b", pid, "created", {}))
    with pytest.raises(HookError) as caught:
        guest_hook.work(run)
    if run.when_reported:
        # As run_hook does.
        run.when_reported()
    return caught.value


@pytest.mark.parametrize(
    ("settings", "annotation", "code", "ends"),
    [
        ("", NIC, "viommu-off", False),
        ('on_failure = "report"\n', NIC, "viommu-off", False),
        ('on_failure = "kill"\n', NIC, "viommu-off", True),
        # Kata's agent starts the container all the same when the annotation can't be read.
        ('on_failure = "kill"\n', "nonsense", "bad-annotation", True),
        ("", "nonsense", "bad-annotation", False),
        ('on_failure = "kil"\n', "nonsense", "bad-annotation", False),
        ('on_failure = "kil"\n', NIC, "bad-settings", False),
    ],
)
def test_hook_failure_kills_container_with_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, annotation: str, code: str, ends: bool
) -> None:
    machine = Machine(tmp_path)
    machine.add(NIC)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as container:
        error = work_on(machine, monkeypatch, annotation, settings, container.pid)
        if ends:
            assert container.wait(timeout=20) == -signal.SIGKILL
        else:
            time.sleep(0.1)
            assert container.poll() is None
        container.kill()
    assert error.findings[0].code == code
