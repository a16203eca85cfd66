# SPDX-License-Identifier: Apache-2.0
"""Change the machine. Each change is in the undo log first; no other folder makes any."""
