# SPDX-License-Identifier: Apache-2.0
"""What holds for the unit tests: property tests have no time limit an example, a busy machine is no defect."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("unit", deadline=None)
settings.load_profile("unit")
