# SPDX-License-Identifier: Apache-2.0
"""Decide whether the add-on may go into a guest, before anything is written."""

from __future__ import annotations

from oci_hooks.findings import InputError, Refusal
from oci_hooks.kata_image.model import HOME, RECORD, SETTINGS, AddonFile, list_parents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.kata_image.model import Addon
    from oci_hooks.kata_image.trees import Tree


def check_guest(path: str, tree: Tree, files: tuple[AddonFile, ...]) -> list[str]:
    """Return the directories to make for files, a parent before what is in it. path: of the image, for messages.

    Raises Refusal [already-added], or [foreign-file] for anything that is in the way: nothing is ever replaced.
    """
    if tree.look_up(RECORD) is not None:
        hint = "remove it first: vfio-kata-image remove IMAGE --output NEW"
        raise Refusal("already-added", path, "has the add-on", hint)
    missing: list[str] = []
    for parent in list_parents(tuple(file.path for file in files)):
        # What is below a directory that is not there is not there either.
        if parent.rpartition("/")[0] in missing or tree.look_up(parent) is None:
            missing.append(parent)
            continue
        # With a name behind it, a link is followed.
        node = tree.look_up(f"{parent}/.")
        if node is None or node.kind != "directory":
            hint = "a directory of that name is needed"
            raise Refusal("foreign-file", path, f"has /{parent}, which is no directory and leads to none", hint)
    for each in (HOME, *(file.path for file in files)):
        if each.rpartition("/")[0] not in missing and tree.look_up(each) is not None:
            hint = "the add-on is not for images that have the hook from a package; take that out, or use it as it is"
            raise Refusal("foreign-file", path, f"has /{each}, which this tool has not put there", hint)
    return missing


def make_settings_file(path: str, text: bytes, addon: Addon) -> AddonFile:
    """Return guest.toml as a file for the guest. path: of the file that was named; its content was checked.

    Raises InputError if the add-on brings one of its own.
    """
    if any(file.path == SETTINGS for file in addon.files):
        raise InputError("bad-arguments", "--settings", f"the add-on has {SETTINGS} itself", f"leave out {path}")
    return AddonFile(SETTINGS, 0o644, addon.mtime, text)
