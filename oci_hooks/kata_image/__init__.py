# SPDX-License-Identifier: Apache-2.0
"""vfio-kata-image: put the guest add-on into a copy of Kata's guest image or initrd, and take it out again."""
