# SPDX-License-Identifier: Apache-2.0
"""Compile modules. Run by the add-on's own interpreter; on stdin, as JSON, a list of [source, target, name to report].

Without docstrings: a third of the size. The modules have no assert that the hook needs (tests/packaging/test_addon.py).
"""

import json
import py_compile
import sys

for source, target, name in json.load(sys.stdin):
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(source, target, name, doraise=True, optimize=2, invalidation_mode=mode)
