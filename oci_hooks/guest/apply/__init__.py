# SPDX-License-Identifier: Apache-2.0
"""Change the machine. The undo log records each change first; no other folder changes anything."""
