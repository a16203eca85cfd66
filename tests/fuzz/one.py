# SPDX-License-Identifier: Apache-2.0
"""One target under atheris, which is libFuzzer for Python: `python -m tests.fuzz.one TARGET [libFuzzer's options]`."""

from __future__ import annotations

import sys

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

with atheris.instrument_imports(include=["oci_hooks", "tomllib", "tomli"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
