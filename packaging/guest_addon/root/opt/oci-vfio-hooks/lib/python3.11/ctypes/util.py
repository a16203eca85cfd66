# SPDX-License-Identifier: Apache-2.0
"""In place of Python's own ctypes.util, which starts ldconfig, gcc and ld: the add-on has its libraries beside it."""

import os
import sys


def find_library(name: str) -> "str | None":
    """Return the path of one of the add-on's own shared libraries, None if it has none of that name."""
    place = f"{sys.prefix}/lib"
    return next((f"{place}/{each}" for each in os.listdir(place) if each.startswith(f"lib{name}.so.")), None)
