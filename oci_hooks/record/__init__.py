# SPDX-License-Identifier: Apache-2.0
"""Recordings of runs: what a hook saw and did, without what is private."""
