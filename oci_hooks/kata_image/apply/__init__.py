# SPDX-License-Identifier: Apache-2.0
"""Write a changed copy of an image. Nothing here writes to the image that was given."""
