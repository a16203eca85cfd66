# SPDX-License-Identifier: Apache-2.0
"""Read Kata's configuration as its two runtimes read it, and check it."""
