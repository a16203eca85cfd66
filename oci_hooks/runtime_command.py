# SPDX-License-Identifier: Apache-2.0
"""Read the command line of the runtime that runs this hook, where its state is wrong or incomplete.

Read only if the bundle in the state cannot be right, or has no config.json.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.system import Root


def find_bundle(root: Root, named: str) -> str:
    """Return the bundle's directory; the one named in the state if nothing better is known.

    crun reports "/" for a container with a user namespace and devices, because it has changed its working directory
    (containers/crun#2025, seen with 1.8.1). runc replaces each byte of a path that is not UTF-8, as Go's encoder does;
    its working directory is the bundle.
    """
    if named != "/" and root.exists(f"{named}/config.json"):
        return named
    found = find_option(read_runtime_command(root), "--bundle", "-b")
    if not found and named != "/":
        found = root.read_link(f"/proc/{root.do(os.getppid)}/cwd")
    return found or named


def find_config_option(root: Root) -> str:
    """Return the file that crun reads instead of the bundle's config.json (crun(1), --config), "" without one."""
    words = read_runtime_command(root)
    return find_option(words, "--config", "-f") if words[0].rpartition("/")[2] == "crun" else ""


def read_runtime_command(root: Root) -> list[str]:
    """Return the command line of the process that runs this hook."""
    return root.read_text_or(f"/proc/{root.do(os.getppid)}/cmdline", "").split("\0")


def find_option(words: list[str], *names: str) -> str:
    """Return the value of an option if it is an absolute path, else "". names: long and short.

    A relative path is relative to a directory that the runtime may have left.
    """
    for word, following in zip(words, words[1:] + [""]):
        name, _, value = word.partition("=")
        value = following if word in names else value if name in names else ""
        if value.startswith("/"):
            return value
    return ""
