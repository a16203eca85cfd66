# SPDX-License-Identifier: Apache-2.0
"""The first look at a container: never "surely nothing" where the hooks' own readers find a request or refuse."""

from __future__ import annotations

import json
import os
import subprocess
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oci_hooks import idle, oci
from oci_hooks.findings import InputError
from oci_hooks.guest.claims import STATE_DIRECTORY, ClaimDirectory
from oci_hooks.system import Root
from tests.support.json_strategies import CONFIGS, REQUESTS, STATES, nearly, write_json
from tests.support.odd_configs import KINDS

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
HOOKS = ("vfio-guest-bind", "vfio-host-check")
FILES = sorted((REPOSITORY / "tests/data/configs").glob("*.json"))
REAL: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text()) for path in FILES}
# The annotations that these add to containerd's config.json (containerd: pkg/cri/annotations; CRI-O: pkg/annotations).
CRI = {
    "containerd CRI": {
        "io.kubernetes.cri.container-name": "web",
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": "4f1d",
    },
    "CRI-O": {
        "io.kubernetes.cri-o.Annotations": '{"io.kubernetes.container.hash":"d0c2","a":"\\u003cb\\u003e"}',
        "io.kubernetes.cri-o.ContainerType": "container",
        "io.kubernetes.cri-o.Volumes": '[{"container_path":"/etc/hosts","host_path":"/var/lib/kubelet"}]',
    },
    "Kata": {"io.katacontainers.pkg.oci.bundle_path": "/run/b", "io.katacontainers.pkg.oci.container_type": "x"},
}
REAL.update({name: {**REAL["containerd-1.6.20"], "annotations": added} for name, added in CRI.items()})
# As runc, crun, Kata's shim and Kata's agent write them (runtime-spec, runtime.md).
STATES_OF = {
    "runc": {"ociVersion": "1.0.2-dev", "id": "c1", "status": "creating", "pid": 7, "bundle": "/b"},
    "crun": {"ociVersion": "1.0", "id": "c1", "pid": 7, "root": "rootfs", "bundle": "/b", "status": "created"},
    "Kata's shim": {"ociVersion": "", "id": "c1", "status": "", "pid": 7, "bundle": "/b", "annotations": {"a": "b"}},
    "Kata's agent": {"ociVersion": "1.0.2-dev", "id": "c1", "status": "created", "pid": 7, "bundle": "/b"},
}


@pytest.fixture(name="bundle", scope="module")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory for config.json; its name has not the word in it, as a test's own may have."""
    return tmp_path_factory.mktemp("b")


def looks_idle(state: bytes, is_poststop: bool = False, claims: str = "") -> bool:
    """Return whether the first look ends the process."""
    try:
        return idle.asks_nothing(state, is_poststop, claims)
    except Exception:  # noqa: BLE001 - as idle.look does
        return False


def reads_idle(data: bytes, is_poststop: bool) -> bool:
    """Return whether both hooks' own readers accept the input and find that nothing is to be done."""
    try:
        state = oci.resolve_bundle(Root(), oci.read_state(data))
        if is_poststop or state.status == "stopped":
            return True
        spec = oci.read_spec(Root(), state)
    except InputError:
        return False
    return not oci.asks_for_vfio(state, spec) and not spec.vfio_devices


def place(document: Any, bundle: Path) -> Any:
    """Return a state document with this bundle, if it has the usual one."""
    usual = isinstance(document, dict) and document.get("bundle") == "/b"
    return {**document, "bundle": str(bundle)} if usual else document


# Both answers ---------------------------------------------------------------------------------------------------------

# Half of all that is drawn is without fault, so that both answers are given often.
ASKED = st.sampled_from([{}, {}, {}, *REQUESTS])
# Other nodes of passed-through devices: no request today, and none that the first look would find.
OTHER_NODES = [
    {"path": path, "type": "c", "major": 10, "minor": 126} for path in ("/dev/iommu", "/dev/kvm", "/dev/mem")
]
WHOLE_CONFIGS = st.sampled_from([*REAL.values(), {"linux": {"devices": OTHER_NODES}}])
CONFIG_DOCUMENTS = st.one_of(WHOLE_CONFIGS, WHOLE_CONFIGS, CONFIGS, WHOLE_CONFIGS.flatmap(nearly))
WHOLE_STATES = st.sampled_from(list(STATES_OF.values()))
STATE_DOCUMENTS = st.one_of(WHOLE_STATES, WHOLE_STATES, STATES, WHOLE_STATES.flatmap(nearly))
# What a text has before and after it, and how many bytes it lacks at its end.
FAULTS = [
    (b"\xef\xbb\xbf", b"", 0),
    (b"//vfio\n", b"", 0),
    (b"", b"\0", 0),
    (b"", b"vfio", 0),
    (b"", b"", 1),
    (b"", b"", 7),
]
AROUND = st.sampled_from([*[(b"", b"", 0)] * 8, (b" \n", b"\n", 0), *FAULTS])
# Which of the ways to write a letter is taken: plain, "\\u0076", the last, or each in turn.
SPELLINGS = st.sampled_from([[0], [0], [0], [1], [-1], [0, 1, -1], [0] * 9 + [1]])


def draw_text(data: st.DataObject, document: object) -> bytes:
    """Return a document as JSON or nearly so, its letters spelled in any way."""
    before, after, less = data.draw(AROUND)
    ways_taken = cycle(data.draw(SPELLINGS))
    text = write_json(document, lambda ways: ways[min(next(ways_taken), len(ways) - 1)])
    return before + text[: len(text) - less] + after


@settings(max_examples=300, deadline=None)
@given(STATE_DOCUMENTS, CONFIG_DOCUMENTS, ASKED, ASKED, st.booleans(), st.data())
def test_look_never_ends_what_readers_go_on_with(
    bundle: Path, state: Any, config: Any, in_state: Any, in_config: Any, is_poststop: bool, data: st.DataObject
) -> None:
    added = {"annotations": in_state["annotations"]} if "annotations" in in_state else {}
    state = {**state, **added} if isinstance(state, dict) else state
    config = {**config, **in_config} if isinstance(config, dict) else config
    (bundle / "config.json").write_bytes(draw_text(data, config))
    text = draw_text(data, place(state, bundle))
    if looks_idle(text, is_poststop):
        assert reads_idle(text, is_poststop)


@pytest.mark.parametrize("name", REAL)
def test_look_ends_real_containers(bundle: Path, name: str) -> None:
    for state in STATES_OF.values():
        text = json.dumps(place(state, bundle)).encode()
        (bundle / "config.json").write_text(json.dumps(REAL[name], indent=4))
        assert looks_idle(text)
        assert reads_idle(text, is_poststop=False)
        for request in REQUESTS:
            (bundle / "config.json").write_text(json.dumps({**REAL[name], **request}))
            assert not looks_idle(text)
        (bundle / "config.json").write_text(json.dumps(REAL[name]))
        asking = {**state, "annotations": {oci.DEVICES_ANNOTATION: "auto"}}
        assert not looks_idle(json.dumps(place(asking, bundle)).encode())


@pytest.mark.parametrize("kind", KINDS)
def test_look_at_odd_configs(bundle: Path, kind: str) -> None:
    text = json.dumps(place(STATES_OF["runc"], bundle)).encode()
    for request in ({}, *REQUESTS):
        config = {**REAL["podman-4.3.1"], **request}
        config["linux"] = {"devices": [], "namespaces": [], **config["linux"]}
        (bundle / "config.json").write_bytes(KINDS[kind](config))
        assert not looks_idle(text) or reads_idle(text, is_poststop=False)


@pytest.mark.parametrize("torn", [b"", b"{", b'{"annotations": {"a'])
def test_look_at_torn_config(bundle: Path, torn: bytes) -> None:
    """An empty one is being written by somebody, and may come to ask for anything."""
    (bundle / "config.json").write_bytes(torn)
    text = json.dumps(place(STATES_OF["runc"], bundle)).encode()
    assert looks_idle(text) == reads_idle(text, is_poststop=False) == bool(torn)


def test_look_goes_on_without_config(tmp_path: Path, bundle: Path) -> None:
    (bundle / "config.json").write_text("{}")
    for wrong in (str(tmp_path), "/", "//", "b", f"{bundle}/\ufffd", "/dev/null"):
        assert not looks_idle(json.dumps({**STATES_OF["runc"], "bundle": wrong}).encode())
    (bundle / "config.json").write_bytes(b" " * idle.LIMIT + b'"vfio"')
    assert not looks_idle(json.dumps(place(STATES_OF["runc"], bundle)).encode())


# Claims ---------------------------------------------------------------------------------------------------------------


@given(st.text(st.characters(), min_size=1, max_size=300) | st.from_regex(r"\A(sha256-|\.|)[a-z0-9_.-]{1,220}\Z"))
def test_surely_lacks_claim_never_misses_one(tmp_path_factory: pytest.TempPathFactory, container: str) -> None:
    directory = ClaimDirectory(str(tmp_path_factory.mktemp("c")))
    path = Path(os.fsdecode(directory.undo_log_path(container).encode("utf-8", "surrogateescape")))
    path.parent.mkdir()
    path.touch()
    assert not idle.surely_lacks_claim(f"{directory.path}/claims/", container)


@pytest.mark.parametrize("state", [{"status": "stopped"}, {}])
def test_look_at_ended_container(tmp_path: Path, state: dict[str, str]) -> None:
    """Without its claim there is nothing to do, and with it there is; the bundle may be gone."""
    text = json.dumps({**STATES_OF["runc"], "bundle": "/gone", **state}).encode()
    claims = f"{tmp_path}/claims/"
    assert looks_idle(text, not state, "")
    assert looks_idle(text, not state, claims)
    (tmp_path / "claims").mkdir()
    assert looks_idle(text, not state, claims)
    (tmp_path / "claims/c1").touch()
    assert not looks_idle(text, not state, claims)


def test_executables_name_the_claims_directory() -> None:
    claims = ClaimDirectory().undo_log_path("c1").removesuffix("c1")
    assert claims == f"{STATE_DIRECTORY}/claims/"
    assert f'begin(sys.argv[1:], "{claims}")' in (REPOSITORY / "hooks/vfio-guest-bind").read_text()
    # It keeps nothing.
    assert 'begin(sys.argv[1:], "")' in (REPOSITORY / "hooks/vfio-host-check").read_text()


# Standard input -------------------------------------------------------------------------------------------------------


def test_look_returns_what_it_read(stdin: int, bundle: Path) -> None:
    (bundle / "config.json").write_text("{}")
    text = json.dumps(place(STATES_OF["runc"], bundle)).encode()
    os.write(stdin, text)
    # Not closed: there may be more.
    assert idle.look(["prestart"], "") == text
    os.write(stdin, text)
    os.close(stdin)
    assert idle.look(["--debug"], "") == b""
    assert idle.look(["prestart"], "") is None
    assert idle.look([], "") == b""


def test_look_reads_no_more_than_its_limit(stdin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "LIMIT", 10)
    os.write(stdin, b"x" * 100)
    begun = idle.look([], "")
    assert begun == b"x" * 100
    os.close(stdin)


def test_look_leaves_a_terminal_alone() -> None:
    saved, (master, slave) = os.dup(0), os.openpty()
    os.dup2(slave, 0)
    os.write(master, b"{}\n")
    try:
        assert idle.look([], "") == b""
        assert os.read(0, 10) == b"{}\n"
    finally:
        os.dup2(saved, 0)
        for fd in (saved, master, slave):
            os.close(fd)


@pytest.mark.parametrize("hook", HOOKS)
def test_executable_with_long_state(bundle: Path, hook: str) -> None:
    """More than the first look reads: the hook itself goes on where that has stopped."""
    (bundle / "config.json").write_text(json.dumps({"annotations": {oci.DEVICES_ANNOTATION: 5}}))
    state = place({**STATES_OF["runc"], "annotations": {"a": "x" * (idle.LIMIT + 100000)}}, bundle)
    command = [str(REPOSITORY / "hooks" / hook), "prestart"]
    text = json.dumps(state).encode()
    done = subprocess.run(command, input=text, capture_output=True, timeout=60, check=False, env={})
    assert done.returncode == 2
    assert b"error: [bad-config]" in done.stderr


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("words", [[], ["prestart"], ["createRuntime"], ["poststop"], ["--json"]], ids=str)
def test_executable_idle_silent(bundle: Path, hook: str, words: list[str]) -> None:
    (bundle / "config.json").write_text(json.dumps(REAL["podman-4.3.1"]))
    text = json.dumps(place({**STATES_OF["runc"], "id": "no-such-container"}, bundle)).encode()
    command = [str(REPOSITORY / "hooks" / hook), *words]
    done = subprocess.run(command, input=text, capture_output=True, timeout=60, check=False, env={})
    assert (done.returncode, done.stderr) == (0, b"")
    assert bool(done.stdout) == (words == ["--json"])
    bad = subprocess.run(command, input=text[:-1], capture_output=True, timeout=60, check=False, env={})
    assert bad.returncode == 2
    assert b"error: [bad-json] state on stdin" in bad.stderr
