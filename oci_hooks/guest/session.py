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
    """The context of one run of the hook. owner: the container, as its claim names it, without its cgroups."""

    run: Run
    state: State
    spec: Spec
    request: Request
    settings: GuestSettings
    directory: ClaimDirectory
    owner: Owner

    @property
    def root(self) -> Root:
        """Return the run's access to the system."""
        return self.run.root

    @property
    def claim_path(self) -> str:
        """Return the path of this container's claim, whether or not it exists."""
        return self.directory.undo_log_path(self.owner.container)
