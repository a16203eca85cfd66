# SPDX-License-Identifier: Apache-2.0
"""The only folder that changes the machine, each change noted in the undo log first."""
