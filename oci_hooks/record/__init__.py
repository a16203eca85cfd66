# SPDX-License-Identifier: Apache-2.0
"""Write, redact and read recordings of runs: the reads and steps of a hook, without private data."""
