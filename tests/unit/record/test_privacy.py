# SPDX-License-Identifier: Apache-2.0
"""No secret gets into a recording: planted in every string of whole configurations, command lines and files of a host.

And what is left out changes nothing: the hook comes to the same findings with what is kept.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oci_hooks.findings import Finding
from oci_hooks.guest import hook as guest_hook
from oci_hooks.host.kata.config import ConfigFile, KataConfig, load_config
from oci_hooks.host.kata.model import Problem
from oci_hooks.host.kata.rust_types import find_wrong
from oci_hooks.oci import MAP_ANNOTATION
from oci_hooks.program import Arguments, Run, run_work, summarize
from oci_hooks.record import hidehost, hidetext, hidewords, privacy
from oci_hooks.record import writer as record_writer
from oci_hooks.record.hidetext import HYPERVISOR_KEYS, LEFT_OUT, RUNTIME_KEYS, hide_text
from oci_hooks.record.privacy import hide_document, hide_finding
from oci_hooks.record.reader import Recording, read_record
from oci_hooks.replay.rerun import ReplayRoot
from oci_hooks.system import Deadline, RecordingRoot
from tests.support.kata_corpus import SAMPLE, lay_out, load_cases
from tests.support.planted_secrets import (
    CONFIGS,
    CONTAINER,
    DEVICES,
    GOES_BY,
    LINUX,
    PACKAGE,
    PROCESS,
    SECRET,
    extend,
    find_secrets,
    merge,
    plant,
    tell,
)

pytestmark = pytest.mark.unit


# Documents ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [plant, extend])
@pytest.mark.parametrize("name", CONFIGS)
def test_hide_document_keeps_no_string_of_tenant(name: str, how: Callable[..., Any]) -> None:
    count = [0]
    planted = how({key: value for key, value in CONFIGS[name].items() if key not in ("root", "linux")}, "v", count)
    # A path below /dev/vfio and the root file system are what the hooks go by.
    linux = how({key: value for key, value in LINUX.items() if key != "devices"}, "l", count)
    linux["devices"] = [{**how(device, "d", count), "path": f"/dev/tty{SECRET}"} for device in DEVICES]
    reported = hide_document(json.dumps(merge({**planted, "linux": linux}, GOES_BY)).encode(), "config.json")
    assert count[0] > 45
    assert SECRET.encode() not in reported
    kept = json.loads(reported)
    assert kept["annotations"]["io.katacontainers.x.vfio.devices"] == "auto"
    assert [type(value) for value in kept["linux"].values()] == [type(value) for value in linux.values()]
    assert len(kept["process"]["env"]) == len(planted["process"]["env"])


@pytest.mark.parametrize("name", CONFIGS)
def test_hide_document_keeps_deciding_values(name: str) -> None:
    """Word for word, so that a replay comes to the same."""
    reported = json.loads(hide_document(json.dumps(merge(CONFIGS[name], GOES_BY)).encode(), "config.json"))
    assert reported["root"] == CONFIGS[name]["root"]
    assert reported["annotations"]["io.kubernetes.cri.sandbox-id"] == CONTAINER
    assert reported["linux"]["devices"] == [*DEVICES[:2], {**DEVICES[2], "path": "/" + LEFT_OUT}]
    assert reported["linux"]["resources"] == LINUX["resources"]
    assert [entry["type"] for entry in reported["linux"]["namespaces"]] == ["pid", "network", "mount"]
    assert reported["process"]["user"] == {"uid": 1000, "gid": 1000, f"{LEFT_OUT} 3": LEFT_OUT}
    assert reported["process"]["env"] == [
        f"{LEFT_OUT}={LEFT_OUT}",
        LEFT_OUT,
        f"PCIDEVICE_INTEL_COM_NIC=0000:03:00.0,{LEFT_OUT}",
        f"{LEFT_OUT}={LEFT_OUT}",
    ]
    assert reported["process"]["rlimits"] == PROCESS["rlimits"]
    assert reported["process"]["capabilities"]["effective"] == ["CAP_IPC_LOCK", LEFT_OUT]
    assert [mount["destination"] for mount in reported["mounts"][:3]] == [LEFT_OUT, "/dev", LEFT_OUT]
    assert reported["mounts"][1]["options"] == ["rbind", LEFT_OUT]


def test_hide_state_keeps_deciding_values() -> None:
    state = {"ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 7, "bundle": "/run/b", "root": SECRET}
    state["annotations"] = {f"a{SECRET}": SECRET, "io.kubernetes.cri.x" + SECRET: SECRET, "x": None}
    reported = json.loads(hide_document(json.dumps({**state, SECRET: [SECRET]}).encode(), "state.json"))
    names = [f"{LEFT_OUT} 1", f"io.kubernetes.cri.{LEFT_OUT} 2", f"{LEFT_OUT} 3"]
    assert reported["annotations"] == dict(zip(names, [LEFT_OUT, LEFT_OUT, None]))
    assert {key: reported[key] for key in ("id", "status", "pid", "bundle")} == {
        key: state[key] for key in ("id", "status", "pid", "bundle")
    }
    assert SECRET not in json.dumps(reported)


@pytest.mark.parametrize(
    "text",
    [
        '{"env": ["A=secret",]}',
        '{"a": "secret \\" secret\\u00e9',
        '{"a" "secret"}',
        '"secret" "x"',
        '{"secret": ge}',
        '{"a": secret}',
        '{"a": truesecret}',
        '{"a": 1secret}',
        '{"a": "b"} secret',
        "TOKEN=secret\n",
        '{"a": "secret\x01"}',
        '{"a": "\\usecret"}',
        '{"a": "\\secret"}',
        '{"ä": "gehéim€😀", }',
        '\ufeff{"a": "secret"}',
        '{"a": "secret\\',
        '{"a": "secret',
        '{"a": "\\u0067\\u0065\\u0068eim",}',
        "[" * 5000 + '"secret"',
    ],
)
def test_hide_text_keeps_json_mistake(text: str) -> None:
    """At the same place, in the same words."""
    hidden = hide_document(text.encode(), "config.json")
    assert b"secret" not in hidden
    assert b"\\u0067" not in hidden
    assert len(hidden) == len(text.encode())
    errors = []
    for each in (text, hidden.decode()):
        with pytest.raises((json.JSONDecodeError, RecursionError)) as caught:
            json.loads(each)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_hide_text_keeps_invalid_bytes() -> None:
    data = b'{"a": "secret \xc3", "b": \xff\xe2\x28 "/dev/vfio/12", "c": "x vfio y"}'
    hidden = hide_document(data, "config.json")
    assert b"secret" not in hidden
    assert b'"/dev/vfio/12"' in hidden
    assert b"vfiox" in hidden
    for each in (data, hidden):
        with pytest.raises(UnicodeDecodeError) as caught:
            each.decode()
        assert caught.value.start == data.index(b"\xc3")


# Of what a text is made that a reader could look at again and again.
UNITS = ['\\"', '"', "\\\\", "\\", '"\\', "[", "a", '","', "\\u", 'é"', "\\u00", "1", "{\n", '"\\"', '\\"\\']


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("head", ['{"a": "', ""])
def test_hide_text_linear_time(head: str, unit: str) -> None:
    """Twice the text is twice the work, whatever it is made of."""
    counts = []
    for size in (4096, 8192):
        count = [0]

        def add(count: list[int] = count) -> None:
            count[0] += 1

        data = (head + unit * size).encode()
        hide_text(data, add)
        counts.append(count[0])
        assert count[0] <= 2 * len(data)
    assert counts[1] <= 2 * counts[0] + 8


HIDE_ALL = """
import sys
from oci_hooks.record.hidetext import hide_text
for unit in sys.argv[1:]:
    size = 1 << 20 if unit == sys.argv[1] else 1 << 17
    for head in ('{"a": "', ""):
        for tail in ("", "\\\\"):
            data = (head + unit * (size // len(unit)) + tail).encode()
            assert len(hide_text(data)) == len(data)
"""


def test_hide_text_one_mebibyte_in_time() -> None:
    """Of escaped quotes 32 KiB took five seconds once, so this would take an hour. The system stops it before that."""
    done = subprocess.run(
        [sys.executable, "-c", HIDE_ALL, *UNITS],
        env={"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (20, 20)),
    )
    assert (done.returncode, done.stderr) == (0, b"")


# Findings, and what goes with them ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "problem", "kept"),
    [
        ("bad-config", 'expected one of c, b, found "secret"', "expected one of c, b, found (left out)"),
        ("bad-config", "expected object, found string", "expected object, found string"),
        ("bad-state", 'expected a name, found ["found secret"]', 'expected a name, found ["found (left out)'),
        ("bad-settings", "unknown key secret; known are a, b", "unknown key (left out); known are a, b"),
        ("internal", "ValueError: invalid literal: 'secret'", "ValueError: invalid literal: '(left out)'"),
        ("internal", "KeyError: \"secret'", "KeyError: '(left out)'"),
        ("in-use", "found mounted on /data", "found mounted on /data"),
    ],
)
def test_hide_finding_quotes_no_value(code: str, problem: str, kept: str) -> None:
    if "[" in problem:
        kept = "expected a name, found (left out)"
        problem = 'expected a name, found ["secret"]'
    assert hide_finding(Finding("error", code, "x", problem)).problem == kept


@pytest.mark.parametrize(
    ("code", "subject", "problem", "kept"),
    [
        ("bad-config", "/b/config.json: annotations.secret", "x", "/b/config.json: annotations.(left out)"),
        ("bad-config", "/b/config.json: linux.devices[0].path", "x", "/b/config.json: linux.devices[0].path"),
        ("bad-settings", '/x.toml line 1: "secret"', "unknown key; known are a", "/x.toml line 1: (left out)"),
        ("bad-settings", "/x.toml: auto", "unknown key secret; known are a", "/x.toml: (left out)"),
        ("bad-settings", "/x.toml: auto.ids", "expected a list, found string", "/x.toml: auto.ids"),
    ],
)
def test_hide_finding_names_no_key(code: str, subject: str, problem: str, kept: str) -> None:
    hidden = hide_finding(Finding("error", code, subject, problem))
    assert hidden.subject == kept
    assert "secret" not in hidden.problem


def test_hide_traceback_without_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_writer, "DIRECTORY", str(tmp_path))
    run = Run("vfio-guest-bind", Arguments(), Deadline(8.0), RecordingRoot())

    def work(_run: Run) -> int:
        word = SECRET
        numbers: dict[str, int] = {}
        try:
            return int(word)
        except ValueError:
            return numbers[word]

    (output,) = record_writer.save_recording(summarize(run, run_work(run, work)), [])
    text = read_record(output.subject).about["traceback"]
    assert find_secrets(Path(output.subject).read_bytes()) == []
    assert "ValueError: invalid literal" in text
    assert "KeyError: '(left out)'" in text
    assert "test_privacy.py" in text


def test_hide_hook_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_writer, "DIRECTORY", str(tmp_path))
    monkeypatch.setenv(f"A_{SECRET}", SECRET)
    monkeypatch.setenv("PYTHONPATH", SECRET)
    run = Run("vfio-guest-bind", Arguments(), Deadline(8.0), RecordingRoot())
    (output,) = record_writer.save_recording(summarize(run, run_work(run, guest_hook.work)), [])
    kept = read_record(output.subject).about["environment"]
    assert "PYTHONPATH" in kept
    assert kept[-1] == LEFT_OUT
    assert find_secrets(Path(output.subject).read_bytes()) == []


# Code and lists together ----------------------------------------------------------------------------------------------


def test_kept_keys_cover_kata_settings() -> None:
    """A new key that the hook reads must be added to HYPERVISOR_KEYS or RUNTIME_KEYS, or a replay would differ."""
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if not path.name.startswith("hide"))
    read_keys = set(re.findall(r'hypervisor_setting\(\s*"(\w+)"', text))
    for group in re.findall(r"hypervisor_setting\(key\) for key in \((.*?)\)", text):
        read_keys |= set(re.findall(r"\w+", group))
    assert read_keys > {"enable_iommu", "rootless"}
    assert read_keys <= set(HYPERVISOR_KEYS)
    assert set(re.findall(r'runtime_setting\(\s*"(\w+)"', text)) <= set(RUNTIME_KEYS)


def test_questions_all_listed() -> None:
    """An answer to another one is left out: who asks it decides what of it is kept, in hidehost.py."""
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    tags = {name: tag for tag, name in re.findall(r'@tagged\("([\w-]+)"\)\s+def (\w+)', text)}
    names = {name.rpartition(".")[2] for name in re.findall(r"(?:self|root)\.ask\(([\w.]+),", text)} - {"question"}
    asked = {tags.get(name, name) for name in names}
    assert asked > {"listdir", "read"}
    assert asked <= {*hidehost.QUESTIONS, *hidehost.ADDRESS_QUESTIONS, "read"}


def test_kept_annotations_cover_read_ones() -> None:
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "privacy.py")
    names = {name for name in re.findall(r'"(io\.[\w./-]+[\w])"', text) if name.count(".") > 2 and ".v1" not in name}
    unknown = [name for name in names if name not in privacy.DECIDING and not name.startswith(MAP_ANNOTATION)]
    assert unknown == []


def test_own_settings_paths_listed() -> None:
    """By their places, as the code that reads them has these."""
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if not path.name.startswith("hide"))
    assert set(re.findall(r'_SETTINGS = "(/etc/[\w./-]+\.toml)"', text)) == set(hidehost.SETTINGS)


# Kata's configuration -------------------------------------------------------------------------------------------------

PROBLEMS = ("refused", "uncertain")


def load_again(path: Path, flavour: str, annotations: dict[str, str]) -> tuple[KataConfig, KataConfig, bytes]:
    """Return a configuration as it is read, as a replay of the recording has it, and the recorded events."""
    root = RecordingRoot()
    location = ConfigFile(str(path), root.real_path(str(path)), "test")
    config = load_config(root, location, flavour, annotations)
    events = tell().hide_events(record_writer.list_events(root.notes, {}, False))
    data = json.dumps(events).encode()
    again = ReplayRoot(Recording("", {}, tuple(json.loads(data)), {}, ()))
    replayed = load_config(again, location, flavour, annotations)
    assert again.unexpected == []
    return config, replayed, data


def list_settings(config: KataConfig) -> list[Any]:
    """Return all settings of a configuration by which the host hook goes, and what was decided of it."""
    own = [config.hypervisor_setting(key) for key in HYPERVISOR_KEYS]
    own += [config.runtime_setting(key) for key in RUNTIME_KEYS]
    own = [setting.replace(value=hidetext.keep_setting(setting.value, setting.key)) for setting in own]
    own = [setting.replace(written=hidetext.keep_setting(setting.written, setting.key)) for setting in own]
    words = hidewords.list_words()
    problems = [
        [hidewords.hide_problem(problem.as_dict(), words) for problem in getattr(config.reading, name)]
        for name in PROBLEMS
    ]
    values = {key: hidetext.keep_setting(value, key) for key, value in config.reading.values.items()}
    return [config.flavour, config.hypervisor, config.refused, own, values, problems, config.reading.by_annotation]


@pytest.mark.parametrize("flavour", ["go", "rs"])
def test_replay_kata_reading_as_recorded(flavour: str, tmp_path: Path) -> None:
    """Of every tenth configuration with the answers of Kata's own readers: values, and what is refused."""
    kinds = set()
    for number, case in enumerate(load_cases(SAMPLE)[::10]):
        path = lay_out(case, tmp_path / str(number) / "case")
        config, again, _ = load_again(path, flavour, case["annotations"] or {})
        assert list_settings(again) == list_settings(config)
        kinds.add("refused" if config.reading.refused else "uncertain" if config.reading.uncertain else "taken")
    assert kinds >= {"refused", "taken"}


@pytest.mark.parametrize("flavour", ["go", "rs"])
@pytest.mark.parametrize(
    "text",
    [
        'kernel = "/$/$"',
        'image = "/$"\nkernel = "/proc/cmdline"',
        'shared_fs = "$"',
        'block_device_aio = "$ is not one of"',
        "virtio_fs_daemon = '$'",
        'guest_extension_images = [{name = "$ $", path = "/$"}]',
        'enable_iommu = "$"',
        "path = $",
        'path = "\\$"',
        "$ = 1\n$ = 2",
        "[agent.kata]\n$ = 1",
        '[runtime]\nvfio_mode = "guest-kernel"\ninternetworking_model = "$"\nexperimental = ["$"]',
        '[runtime]\nsandbox_bind_mounts = ["/$", "$"]',
        '[runtime]\nhypervisor_name = "qemu"\nagent_name = "$"\nname = "$"',
    ],
)
def test_hide_kata_refusal_quotes_nothing(flavour: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "configuration.toml"
    path.write_text(f"[hypervisor.qemu]\n{text}\n".replace("$", SECRET))
    annotations = {
        "io.katacontainers.config.agent.policy": f"{SECRET}!",
        "io.katacontainers.config.runtime.create_container_timeout": SECRET,
        f"io.katacontainers.config.runtime.{SECRET}": SECRET,
        "io.katacontainers.config.hypervisor.path": f"/{SECRET}",
    }
    config, again, data = load_again(path, flavour, annotations)
    assert config.reading.refused
    assert SECRET.encode() not in data
    assert list_settings(again) == list_settings(config)


@pytest.mark.parametrize("place", ["/x line 3", f"annotation {SECRET}"])
def test_hide_kata_finding_keeps_reader_words(place: str) -> None:
    problem = f"shared_fs {SECRET} is not one of virtio-9p; Kata 4.1 (here is 3) refuses to start a sandbox with it"
    hidden = hide_finding(Finding("warning", "kata-config-refused", place, problem, "h"))
    assert hidden.problem == problem.replace(SECRET, LEFT_OUT)
    assert hidden.subject == place.replace(SECRET, LEFT_OUT)
    assert hide_finding(hidden) == hidden
    doubt = hide_finding(Finding("warning", "kata-config-uncertain", place, f"{SECRET} is set twice", ""))
    assert doubt.problem == f"{LEFT_OUT} is set twice"


def test_hide_kata_keeps_words_of_types() -> None:
    problem = Problem("load", "/c.toml line 2", f"x {find_wrong('u32s', SECRET)}; {find_wrong('pages', SECRET)}")
    assert find_wrong("u32s", SECRET) == "is not a list of unsigned 32-bit integers"
    text = hidewords.hide_problem(problem.as_dict(), hidewords.list_words())["text"]
    assert text == problem.text.replace("x ", f"{LEFT_OUT} ")


def test_replay_recording_without_kata_reading(tmp_path: Path) -> None:
    """One of an earlier version: it is read again from what was kept of the files."""
    path = tmp_path / "configuration.toml"
    path.write_text("[hypervisor.qemu]\nenable_iommu = true\n")
    root = RecordingRoot()
    location = ConfigFile(str(path), str(path), "test")
    load_config(root, location, "go", {})
    events = [event for event in record_writer.list_events(root.notes, {}, True) if "ask" in event]
    again = load_config(ReplayRoot(Recording("", {}, tuple(events), {}, ())), location, "go", {})
    assert again.hypervisor_setting("enable_iommu").value is True
