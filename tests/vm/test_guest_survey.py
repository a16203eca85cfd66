# SPDX-License-Identifier: Apache-2.0
"""`vfio-guest-bind --all` on a real guest: it shows what sysfs shows, and a run of `auto` takes what it announced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import guest_calls
from tests.support.guest_calls import ask, one_runtime
from tests.vm import devices, guest
from tests.vm.bundles import Containers, Done

MACHINE = "standard"


@pytest.fixture(autouse=True)
def forget_claims() -> None:
    """Begin without the claims of other tests' containers: those without a poststop hook leave them."""
    for name in guest_calls.list_claims():
        (guest_calls.CLAIMS / name).unlink()


def survey() -> dict[str, Any]:
    """Return the answer of the survey, which has nothing to report."""
    done = guest_calls.call_hook(None, "--all", "--json", env={})
    assert (done.code, done.stderr) == (0, "")
    return read_answer(done)


def read_answer(done: Done) -> dict[str, Any]:
    """Return what --json printed."""
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def list_groups(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the groups of an answer by their names."""
    return {group["group"]: group for group in answer["groups"]}


def load_driver() -> None:
    """Have vfio-pci loaded, as a first run of the hook leaves it: in Debian's kernel it is a module."""
    nic = guest.find_device(devices.NIC_E1000E)
    guest.bind(nic, "vfio-pci")
    guest.bind_native(nic)


@one_runtime
def test_guest_survey_auto_as_announced(containers: Containers) -> None:
    """What is free is what the next run with `auto` takes; meanwhile it is claimed, and free again afterwards."""
    load_driver()
    drivers = guest_calls.look_at_drivers()
    before = survey()
    nic = guest.find_device(devices.NIC_E1000E)
    assert guest.group_of(nic) in before["guest"]["auto"]
    assert guest_calls.look_at_drivers() == drivers

    container, state = guest_calls.make_created(containers, annotations=ask("auto"))
    done = guest_calls.call_hook(state)
    assert (done.code, done.stderr) == (0, "")
    taken = sorted(name for name in guest_calls.list_dev(container) if name.isdigit())
    assert taken == sorted(before["guest"]["auto"])

    during = guest_calls.call_hook(None, "--all", "--json")
    answer = read_answer(during)
    assert during.code == 0
    assert [finding["code"] for finding in answer["findings"] if finding["level"] == "info"] == ["nothing-to-take"]
    groups = list_groups(answer)
    assert {name for name, group in groups.items() if group["container"] == state["id"]} == set(taken)
    assert {groups[name]["state"] for name in taken} == {"claimed"}
    assert [claim["container"] for claim in answer["claims"]] == [state["id"]]

    assert guest_calls.release(state).code == 0
    assert survey() == before


def test_guest_survey_shows_sysfs() -> None:
    """Every group and member with its driver; the reasons of the guards; the options of the running kernel."""
    load_driver()
    answer = survey()
    groups = list_groups(answer)
    assert set(groups) == {path.name for path in guest.GROUPS.iterdir()}
    for name, group in groups.items():
        found = {member["name"]: member["driver"] or "" for member in group["members"]}
        assert found == {address: guest.driver_of(address) for address in guest.members_of(name)}
    assert groups[guest.group_of("0000:00:00.0")]["state"] == "in use"
    type_1 = "loaded" if Path("/sys/module/vfio_iommu_type1").exists() else "loadable"
    assert answer["guest"]["drivers"] == {"vfio-pci": "loaded", "vfio_iommu_type1": type_1}
    # Debian's is not where this machine's root has its own kernel.
    config = "/proc/config.gz"
    assert answer["guest"]["kernel_config"] == (config if Path(config).exists() else None)
    assert answer["guest"]["missing_options"] == []
    assert answer["guest"]["group_nodes"] is True


def test_guest_survey_table() -> None:
    """A line names the NIC, its group and its driver."""
    nic = guest.find_device(devices.NIC_E1000E)
    done = guest_calls.call_hook(None, "--all")
    assert (done.code, done.stderr) == (0, "")
    (line,) = (line for line in done.stdout.splitlines() if nic in line)
    assert line.split() == [guest.group_of(nic), "free", nic, devices.NIC_E1000E, "network", "e1000e", "-"]


def test_guest_survey_without_root() -> None:
    """Another user sees the same devices; what this one may not read is named, and is nobody's gift."""
    expected = [group["group"] for group in survey()["groups"]]
    done = guest_calls.call_hook(None, "--all", "--json", user=65534, group=65534, extra_groups=[], env={})
    answer = read_answer(done)
    assert [group["group"] for group in answer["groups"]] == expected
    warnings = [finding for finding in answer["findings"] if finding["level"] == "warning"]
    assert {finding["code"] for finding in warnings} == {"check-failed"}
    assert "[internal]" not in done.stderr
