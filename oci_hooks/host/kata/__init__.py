# SPDX-License-Identifier: Apache-2.0
"""What Kata makes of its configuration, read as its two runtimes read it."""
