# SPDX-License-Identifier: Apache-2.0
"""Any configuration without a VFIO request that runc or crun runs without the hooks, it runs with both, too.

The kinds are those of tests/support/odd_configs.py, which break the specification in one place each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import guest_calls
from tests.support.odd_configs import KINDS, REFUSED
from tests.vm import bundles
from tests.vm.bundles import Containers, Done

MACHINE = "single"
HOST = [bundles.make_hook(bundles.find_hook(bundles.HOST_HOOK))]
GUEST = [bundles.make_hook(bundles.find_hook(bundles.GUEST_HOOK))]
RELEASE = [bundles.make_hook(bundles.find_hook(bundles.GUEST_HOOK), "poststop")]
# No poststop: it does not read config.json.
HOOKS: dict[str, list[dict[str, Any]]] = {"prestart": HOST, "createRuntime": GUEST}


# All are 260 containers. Without OCI_VFIO_FULL one runtime runs each kind, by turns, and every second kind asks.
RUNTIMES = ("runc", "crun")
IS_FULL = "OCI_VFIO_FULL" in os.environ


def list_runs() -> list[tuple[str, str]]:
    """Return each kind with the runtimes that it is tried with."""
    turns = enumerate(KINDS)
    return [(kind, name) for number, kind in turns for name in (RUNTIMES if IS_FULL else RUNTIMES[number % 2 :][:1])]


def run(containers: Containers, kind: str, **options: Any) -> Done:
    """Run a container whose config.json is of this kind, to its end."""
    container = containers.make("/bin/true", **options)
    (container.bundle / "config.json").write_bytes(KINDS[kind](container.config))
    return container.run()


@pytest.mark.parametrize(("kind", "containers"), list_runs(), indirect=["containers"])
def test_odd_configs_run_with_hooks(containers: Containers, kind: str) -> None:
    done = run(containers, kind, hooks=HOOKS)
    if done.code == 0:
        assert "error: [" not in done.stderr
        return
    # The runtime's own result, without the hooks.
    assert "error: [" not in done.stderr, done.stderr
    assert kind in REFUSED[containers.runtime], done.stderr
    bare = run(containers, kind, hooks={})
    assert bare.code != 0, done.stderr


# In a user namespace runc mounts the host's node, which a guest does not have, before it runs a hook.
ONLY_CRUN = {"mapping without containerID", "mapping with a null"}


def list_pairs() -> Iterator[tuple[str, str]]:
    """Yield each kind that a runtime runs, with one that does."""
    for number, kind in enumerate(KINDS):
        takers = [name for name in RUNTIMES if kind not in REFUSED[name] and (name == "crun" or kind not in ONLY_CRUN)]
        if takers:
            yield kind, takers[number % len(takers)]


NOT_HEARD = {
    "annotations null",
    "annotations list",
    "annotations by the thousand",
    "annotation twice",
    "a member in another case",
}


@pytest.mark.parametrize(("kind", "containers"), list(list_pairs())[:: 1 if IS_FULL else 2], indirect=["containers"])
def test_odd_configs_with_vfio_work_or_refused(containers: Containers, kind: str) -> None:
    """No kind is passed by in silence where it asks, and none leaves anything behind."""
    options: dict[str, Any] = {"annotations": guest_calls.ask("auto"), "devices": bundles.vfio_devices("77")}
    hooks = {"createRuntime": GUEST, "poststop": RELEASE}
    done = run(containers, kind, hooks=hooks, **options)
    # crun shows a hook's output only if the annotation for that is kept.
    if containers.runtime == "runc" or kind not in NOT_HEARD:
        assert done.code == 0 or "vfio-guest-bind: error: [" in done.stderr, done.stderr
    assert "[internal]" not in done.stderr
    assert "Traceback" not in done.stderr
    containers.destroy_all()
    assert guest_calls.list_claims() == []
