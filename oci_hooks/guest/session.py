# SPDX-License-Identifier: Apache-2.0
"""The state of one run of the guest hook."""

from __future__ import annotations

from oci_hooks.frozen import Frozen
from oci_hooks.guest.claims import ClaimDirectory, Owner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.guest.request import Request
    from oci_hooks.guest.settings import GuestSettings
    from oci_hooks.oci import Spec, State
    from oci_hooks.program import Run
    from oci_hooks.system import Root


class Session(Frozen):
    """What one run of the hook works with. owner: the container, as its claim notes it, but for its cgroups."""

    run: Run
    state: State
    spec: Spec
    request: Request
    settings: GuestSettings
    directory: ClaimDirectory
    owner: Owner

    @property
    def root(self) -> Root:
        """The door to the system."""
        return self.run.root

    @property
    def claim_path(self) -> str:
        """Where this container's claim is, or would be."""
        return self.directory.undo_log_path(self.owner.container)
