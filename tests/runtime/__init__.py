# SPDX-License-Identifier: Apache-2.0
"""Tests that need other programs on this machine: file systems' own, QEMU."""
