# SPDX-License-Identifier: Apache-2.0
"""Permission in a cgroup: what is planned, allowed and taken back with versions 1 and 2, and what explains its lack."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from oci_hooks.findings import StepError
from oci_hooks.guest.apply import bpf, bpf_program, cgroup, device_list, permission
from oci_hooks.guest.apply.cgroup import Cgroup, MadeNode, NodeCheck
from oci_hooks.guest.apply.permission import Grant, Widening
from oci_hooks.system import Root

pytestmark = pytest.mark.unit

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V2_HYBRID = "31 23 0:27 / /sys/fs/cgroup/unified rw shared:5 - cgroup2 cgroup2 rw"
V1 = "32 23 0:28 / /sys/fs/cgroup/devices rw,nosuid shared:6 - cgroup cgroup rw,devices"
V1_JOINED = "32 23 0:28 / /sys/fs/cgroup/devices,pids rw - cgroup cgroup rw,pids,devices"
V1_OTHER = "33 23 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct"
V2_BOUND = "34 23 0:26 /kubepods /mnt/pods rw - cgroup2 cgroup2 rw"
V2_SPACE = r"35 23 0:26 / /sys/fs/c\040group rw - cgroup2 cgroup2 rw"


# Permitting: what is to be done ---------------------------------------------------------------------------------------

GROUP = MadeNode("12", 243, 0, is_group=True)
CONTROL = MadeNode("vfio", 10, 196)
NUMBERS = ((243, 0), (10, 196))


def widen(*paths: str) -> tuple[Widening, ...]:
    """Return what both nodes are given in some directories, where nothing is listed."""
    return tuple(Widening(path, ("rw", "rw")) for path in paths)


@pytest.mark.parametrize(
    ("place", "grant"),
    [
        (Cgroup(1, "/u/c", "", "/u"), Grant(NUMBERS, "/u/c", ())),
        (Cgroup(1, "", "/d/p/c", "", "/d"), Grant(NUMBERS, "", widen("/d/p/c"))),
        (Cgroup(1, "/u/c", "/d/c", "/u", "/d"), Grant(NUMBERS, "/u/c", widen("/d/c"))),
        # Of two, the one that others are in too is left alone.
        (Cgroup(1, "/u/c", "/d/c", "/u", "/d", ("/u/c",)), Grant(NUMBERS, "", widen("/d/c"))),
        (Cgroup(1, "", ""), Grant(NUMBERS, "", ())),
    ],
)
def test_plan_grant_own_cgroup_only(tmp_path: Path, place: Cgroup, grant: Grant) -> None:
    assert permission.plan_grant(Root(str(tmp_path)), place, [GROUP, CONTROL]) == grant


def test_plan_grant_shared_cgroup_refused(tmp_path: Path) -> None:
    location = Cgroup(1, "/u", "", "/u", "", ("/u",))
    with pytest.raises(StepError, match="shares this cgroup"):
        permission.plan_grant(Root(str(tmp_path)), location, [GROUP])


@pytest.mark.parametrize(
    ("lists", "widened"),
    [
        ({"pods": "a *:* rwm", "pods/p1": "a *:* rwm"}, {}),
        ({"pods": "a *:* rwm", "pods/p1": "c 1:3 rwm"}, {"pods/p1": ("rw", "rw")}),
        # Only what is lacking: with a wildcard nothing, beside an entry of its own the rest.
        ({"pods": "c 10:* rw", "pods/p1": ""}, {"pods": ("rw", ""), "pods/p1": ("rw", "rw")}),
        ({"pods": "c *:* rwm", "pods/p1": "c 243:0 rw\nc 10:196 rwm"}, {}),
        ({"pods": "c *:* rwm", "pods/p1": "c 243:0 r\nc 10:196 rw"}, {"pods/p1": ("w", "")}),
        ({"pods": "c *:* rwm", "pods/p1": "c 243:* r\nc 10:196 wm"}, {"pods/p1": ("rw", "r")}),
        ({"pods": "c *:* rwm", "pods/p1": "b *:* rwm\nc *:* m\nb 243:0 r"}, {"pods/p1": ("rw", "rw")}),
    ],
)
def test_plan_grant_parents_only_with_setting(
    tmp_path: Path, lists: dict[str, str], widened: dict[str, tuple[str, ...]]
) -> None:
    for name, text in lists.items():
        (tmp_path / "d" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name / "devices.list").write_text(text + "\n")
    location = Cgroup(1, "", "/d/pods/p1/c1", "", "/d")
    root = Root(str(tmp_path))
    assert permission.plan_grant(root, location, [GROUP, CONTROL]).devices == widen("/d/pods/p1/c1")
    grant = permission.plan_grant(root, location, [GROUP, CONTROL], widen_parents=True)
    above = tuple(Widening(f"/d/{name}", given) for name, given in widened.items())
    assert grant.devices == (*above, *widen("/d/pods/p1/c1"))


@pytest.mark.parametrize(
    ("listed", "opened", "given"),
    [
        ("c 1:7 rwm\nc 243:0 r", None, ("w", "rw")),
        ("c 243:0 m\nc 10:* r", None, ("rw", "rw")),
        # Permitted already: it is the other hierarchy that denies.
        ("c 243:0 rwm\nc 10:196 w", None, ("", "r")),
        # The list shows nothing of what is denied where all else is permitted: what opens says it.
        ("a *:* rwm", {(243, 0): "r", (10, 196): "rw"}, ("w", "")),
        ("a *:* rwm", {(243, 0): "", (10, 196): "w"}, ("rw", "r")),
    ],
)
def test_plan_grant_adds_only_missing_access(
    tmp_path: Path, listed: str, opened: dict[tuple[int, int], str] | None, given: tuple[str, str]
) -> None:
    (tmp_path / "d/c").mkdir(parents=True)
    (tmp_path / "d/c/devices.list").write_text(listed + "\n")
    root, location = Root(str(tmp_path)), Cgroup(1, "", "/d/c", "", "/d")
    assert permission.is_open_list(root, location) is (opened is not None)
    assert permission.is_open_list(root, location.replace(shared=("/d/c",))) is False
    grant = permission.plan_grant(root, location, [GROUP, CONTROL], opened=opened)
    assert grant.devices == (Widening("/d/c", given),)


def test_plan_grant_parent_rule_of_other_container_counted(tmp_path: Path) -> None:
    """The second one in a pod finds the parent widened: it needs that too, and takes it back if it is the last."""
    (tmp_path / "d/pod/c2").mkdir(parents=True)
    (tmp_path / "d/pod/devices.list").write_text("c 10:196 rw\nc 243:0 rw\n")
    (tmp_path / "d/pod/c2/devices.list").write_text("")
    root, location = Root(str(tmp_path)), Cgroup(1, "", "/d/pod/c2", "", "/d")
    first = Grant(((10, 196),), "", (Widening("/d/pod", ("w",)), Widening("/d/pod/c1", ("rw",))))
    grant = permission.plan_grant(root, location, [GROUP, CONTROL], True, (first,))
    # 243:0 was there before anybody.
    assert grant.devices == (Widening("/d/pod", ("", "w")), *widen("/d/pod/c2"))


# Permitting, version 1 ------------------------------------------------------------------------------------------------

Written = list[tuple[str, str]]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    """Return what is written to the kernel's files from now on, instead of writing it."""
    calls: Written = []
    monkeypatch.setattr(device_list, "write_kernel_file", lambda path, text: calls.append((path, text)))
    return calls


def test_grant_v1_allows_top_down_revokes_bottom_up(written: Written) -> None:
    grant = Grant(NUMBERS, "", widen("/d/p", "/d/p/c"))
    permission.allow(Root("/top"), grant)
    assert written == [
        ("/top/d/p/devices.allow", "c 243:0 rw"),
        ("/top/d/p/devices.allow", "c 10:196 rw"),
        ("/top/d/p/c/devices.allow", "c 243:0 rw"),
        ("/top/d/p/c/devices.allow", "c 10:196 rw"),
    ]
    del written[:]
    permission.disallow(Root("/top"), grant)
    assert [path for path, _ in written] == ["/top/d/p/c/devices.deny"] * 2 + ["/top/d/p/devices.deny"] * 2
    assert {text for _, text in written} == {"c 243:0 rw", "c 10:196 rw"}


def refuse_with(code: int) -> Callable[[str, str], None]:
    """Return a kernel file that can't be written."""

    def write(path: str, _text: str) -> None:
        raise OSError(code, os.strerror(code), path)

    return write


def test_grant_v1_names_denying_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d/p/c").mkdir(parents=True)
    (tmp_path / "d/p/devices.list").write_text("")
    monkeypatch.setattr(device_list, "write_kernel_file", refuse_with(errno.EPERM))
    with pytest.raises(StepError) as caught:
        permission.allow(Root(str(tmp_path)), Grant(((243, 0),), "", (Widening("/d/p/c", ("rw",)),)))
    (finding,) = caught.value.findings
    assert (finding.code, finding.subject) == ("permit-failed", "/d/p/c")
    assert "the parent cgroup /d/p does not allow it" in finding.problem
    rule = '{"allow": true, "type": "c", "major": 243, "minor": 0, "access": "rw"}'
    assert finding.hint == f"add to linux.resources.devices: {rule}"


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENODEV])
def test_revoke_removed_cgroup_is_done(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(device_list, "write_kernel_file", refuse_with(code))
    permission.disallow(Root("/top"), Grant(NUMBERS, "/gone", widen("/d/c")))


def test_revoke_failure_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_list, "write_kernel_file", refuse_with(errno.EIO))
    with pytest.raises(StepError, match="cannot remove the device rule"):
        permission.disallow(Root("/top"), Grant(NUMBERS, "", widen("/d/c")))


# Permitting, version 2, with the kernel's programs played -------------------------------------------------------------

DENY = struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0)
ALLOW = struct.pack("=BBhi", 0xB7, 0, 0, 1) + struct.pack("=BBhi", 0x95, 0, 0, 0)


class Kernel:
    """The device programs of cgroups, by the directory's name. A program's descriptor is a real one, of /dev/null."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, programs: dict[str, list[bytes]]) -> None:
        self.programs = programs
        self.open: dict[int, bytes] = {}
        self.loads = 0
        for name in ("query_programs", "open_program", "dump_program", "load_program", "replace_program"):
            monkeypatch.setattr(bpf, name, getattr(self, name))

    def find(self, fd: int) -> list[bytes]:
        """Return the programs of the cgroup that a descriptor is of."""
        return self.programs.get(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), [])

    def query_programs(self, fd: int) -> tuple[int, list[int]]:
        """Play the system call; a program's id is its place among all."""
        everyone = [code for codes in self.programs.values() for code in codes]
        return bpf.BPF_F_ALLOW_MULTI, [everyone.index(code) for code in self.find(fd)]

    def open_program(self, program: int) -> int:
        """Play the system call."""
        everyone = [code for codes in self.programs.values() for code in codes]
        return self.hold(everyone[program])

    def hold(self, code: bytes) -> int:
        """Return a descriptor that stands for these instructions."""
        fd = os.open("/dev/null", os.O_RDONLY)
        self.open[fd] = code
        return fd

    def dump_program(self, fd: int) -> bytes:
        """Play the system call."""
        return self.open[fd]

    def load_program(self, code: bytes) -> int:
        """Play the system call."""
        self.loads += 1
        return self.hold(code)

    def replace_program(self, fd: int, new: int, old: int, _flags: int) -> None:
        """Play the system call."""
        codes = self.find(fd)
        codes[codes.index(self.open[old])] = self.open[new]


@pytest.fixture
def tree(tmp_path: Path) -> Root:
    """Return a root with a cgroup /u/pod/ctr."""
    (tmp_path / "u/pod/ctr").mkdir(parents=True)
    return Root(str(tmp_path))


GRANT = Grant(NUMBERS, "/u/pod/ctr", ())


def test_grant_changes_every_own_program_only(tree: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, {"pod": [DENY + DENY], "ctr": [DENY, ALLOW]})
    before = os.listdir("/proc/self/fd")
    permission.allow(tree, GRANT)
    prefix = bpf_program.make_prefix(NUMBERS)
    assert kernel.programs == {"pod": [DENY + DENY], "ctr": [prefix + DENY, prefix + ALLOW]}
    permission.disallow(tree, GRANT)
    assert kernel.programs == {"pod": [DENY + DENY], "ctr": [DENY, ALLOW]}
    assert os.listdir("/proc/self/fd") == before


SCOPE = "/u/crun-1.scope"


@pytest.mark.parametrize(
    ("unified", "others", "own"),
    [
        (f"{SCOPE}/container", {}, [f"{SCOPE}/container", SCOPE]),
        (f"{SCOPE}/container/inner", {}, [f"{SCOPE}/container/inner", f"{SCOPE}/container", SCOPE]),
        (SCOPE, {}, [SCOPE]),
        # Somebody's shell, another container, something between.
        (f"{SCOPE}/container", {SCOPE: "77"}, [f"{SCOPE}/container"]),
        (f"{SCOPE}/container", {f"{SCOPE}/other": ""}, [f"{SCOPE}/container"]),
        (f"{SCOPE}/container/inner", {f"{SCOPE}/container": "77"}, [f"{SCOPE}/container/inner"]),
        (f"{SCOPE}/container/inner", {f"{SCOPE}/other": ""}, [f"{SCOPE}/container/inner"]),
        (f"{SCOPE}/a/b/inner", {}, [f"{SCOPE}/a/b/inner"]),
        # A scope below a scope is the nearest one's affair, and a slice or a service is nobody's.
        (f"{SCOPE}/x.scope", {}, [f"{SCOPE}/x.scope"]),
        ("/u/pod.slice/container", {}, ["/u/pod.slice/container"]),
        ("/u/podman.service/container", {}, ["/u/podman.service/container"]),
        ("", {}, []),
    ],
)
def test_scope_with_only_container_is_own(tmp_path: Path, unified: str, others: dict[str, str], own: list[str]) -> None:
    parts = unified.split("/")
    chain = {"/".join(parts[:count]): "" for count in range(2, len(parts) + 1)}
    for path, text in {**chain, unified: "42", **others}.items():
        directory = tmp_path / path.lstrip("/")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cgroup.procs").write_text(text)
        (directory / "cgroup.type").write_text("domain")
    assert cgroup.list_container_cgroups(Root(str(tmp_path)), unified) == own


def test_grant_includes_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "/container"):
        (tmp_path / f"u/1.scope{name}").mkdir(parents=True)
        (tmp_path / f"u/1.scope{name}/cgroup.procs").write_text("")
    root = Root(str(tmp_path))
    kernel = Kernel(monkeypatch, {"u": [DENY + DENY], "1.scope": [DENY], "container": [ALLOW]})
    grant = Grant(NUMBERS, "/u/1.scope/container", ())
    prefix = bpf_program.make_prefix(NUMBERS)
    permission.allow(root, grant)
    assert kernel.programs == {"u": [DENY + DENY], "1.scope": [prefix + DENY], "container": [prefix + ALLOW]}
    # Who else is there now makes no difference to taking it back.
    (tmp_path / "u/1.scope/cgroup.procs").write_text("77")
    permission.disallow(root, grant)
    assert kernel.programs == {"u": [DENY + DENY], "1.scope": [DENY], "container": [ALLOW]}


def test_grant_is_idempotent(tree: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, {"ctr": [DENY]})
    permission.allow(tree, GRANT)
    permission.allow(tree, GRANT)
    assert kernel.programs == {"ctr": [bpf_program.make_prefix(NUMBERS) + DENY]}
    assert kernel.loads == 1


def test_grants_add_up_and_revoke_separately(tree: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, {"ctr": [DENY]})
    other = Grant(((243, 1),), "/u/pod/ctr", ())
    permission.allow(tree, GRANT)
    permission.allow(tree, other)
    assert bpf_program.read_prefix(kernel.programs["ctr"][0]) == [(10, 196), (243, 0), (243, 1)]
    permission.disallow(tree, GRANT)
    assert kernel.programs["ctr"] == [bpf_program.make_prefix([(243, 1)]) + DENY]
    permission.disallow(tree, other)
    assert kernel.programs["ctr"] == [DENY]


def test_revoke_keeps_nodes_of_other_grant(tree: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, {"ctr": [DENY]})
    other = Grant(((10, 196), (243, 1)), "/u/pod/ctr", ())
    permission.allow(tree, GRANT)
    permission.disallow(tree, GRANT, (other,))
    assert bpf_program.read_prefix(kernel.programs["ctr"][0]) == [(10, 196)]
    permission.disallow(tree, GRANT, (Grant(NUMBERS, "/u/pod", ()),))
    assert kernel.programs["ctr"] == [DENY]


def test_revoke_after_partial_grant(tree: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the first of two programs: the next hook that finds the undo log revokes what was allowed."""
    kernel = Kernel(monkeypatch, {"ctr": [bpf_program.make_prefix(NUMBERS) + DENY, ALLOW]})
    permission.disallow(tree, GRANT)
    assert kernel.programs["ctr"] == [DENY, ALLOW]


def test_grant_without_programs_changes_nothing(tree: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, {})
    permission.allow(tree, GRANT)
    assert kernel.loads == 0


@pytest.mark.parametrize(
    ("step", "error", "words"),
    [
        ("query_programs", OSError(errno.EPERM, "played"), "cannot read or replace its device filter: played"),
        ("dump_program", bpf_program.ProgramError("it uses maps"), "cannot change its device filter: it uses maps"),
        ("load_program", bpf_program.ProgramError("no"), "cannot change its device filter: no"),
        ("replace_program", bpf_program.ProgramError("a link"), "cannot change its device filter: a link"),
    ],
)
def test_grant_unchangeable_program_fails_with_rule(
    tree: Root, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception, words: str
) -> None:
    kernel = Kernel(monkeypatch, {"ctr": [DENY]})

    def refuse(*_arguments: object) -> int:
        raise error

    monkeypatch.setattr(bpf, step, refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(StepError) as caught:
        permission.allow(tree, GRANT)
    (finding,) = caught.value.findings
    assert (finding.code, finding.subject) == ("permit-failed", "/u/pod/ctr")
    assert words in finding.problem
    assert '"major": 243, "minor": 0, "access": "rw"}' in finding.hint
    assert '"major": 10, "minor": 196, "access": "rw"}' in finding.hint
    assert kernel.programs == {"ctr": [DENY]}
    assert os.listdir("/proc/self/fd") == before


# Explaining -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("proof", "denied"),
    [
        (NodeCheck(GROUP, 0), False),
        (NodeCheck(GROUP, errno.EPERM, False), True),
        (NodeCheck(GROUP, errno.EACCES, False), False),
        (NodeCheck(GROUP, errno.EBUSY, False), False),
    ],
)
def test_explain_denial_only_eperm_is_device_cgroup(proof: NodeCheck, denied: bool) -> None:
    """A nodev mount is nothing that permission could help."""
    assert proof.is_denied is denied


def test_explain_denial_names_ancestor(tree: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel(monkeypatch, {"pod": [DENY], "ctr": [ALLOW]})
    location = Cgroup(1, "/u/pod/ctr", "", "/u")
    checks = [NodeCheck(GROUP, errno.EPERM, False), NodeCheck(CONTROL, 0)]
    (finding,) = permission.explain_denial(tree, location, checks).findings
    assert "cannot open /dev/12 from this cgroup: denied by the cgroup's device rules" in finding.problem
    assert "parent cgroup /u/pod has a device filter" in finding.problem
    assert "/dev/vfio" not in finding.problem
    assert '"major": 243' in finding.hint
    assert '"minor": 196' not in finding.hint


def test_explain_denial_own_scope_not_ancestor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "/container"):
        (tmp_path / f"u/1.scope{name}").mkdir(parents=True)
        (tmp_path / f"u/1.scope{name}/cgroup.procs").write_text("")
    Kernel(monkeypatch, {"1.scope": [DENY], "container": [ALLOW]})
    location = Cgroup(1, "/u/1.scope/container", "", "/u")
    (finding,) = permission.explain_denial(
        Root(str(tmp_path)), location, [NodeCheck(GROUP, errno.EPERM, False)]
    ).findings
    assert "parent" not in finding.problem


@pytest.mark.parametrize(
    ("proof", "words"),
    [
        (NodeCheck(GROUP, errno.EBUSY, False), "cannot open /dev/12 from this cgroup: another process has it open"),
        (NodeCheck(GROUP, 0, False), "not viable"),
        (NodeCheck(GROUP, errno.EACCES, False), "nodev"),
        (NodeCheck(GROUP, errno.ENOENT, False), "it does not exist"),
        (NodeCheck(GROUP, errno.EIO, False), os.strerror(errno.EIO)),
    ],
)
def test_explain_denial_without_rule_hint(tree: Root, proof: NodeCheck, words: str) -> None:
    (finding,) = permission.explain_denial(tree, Cgroup(1, "/u/pod/ctr", "", "/u"), [proof]).findings
    assert words in finding.problem
    assert finding.hint == ""
