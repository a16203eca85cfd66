# SPDX-License-Identifier: Apache-2.0
"""The guest add-on: the guest hook, and all of Debian's Python that it uses, for a root file system of any kind.

    debs      gets Debian's packages, and unpacks them
    closure   which modules the hook can import
    tree      lays the files out as they are in the guest
    archive   the manifest, and the archive
    root/     files that are in the guest as they are here

Standard library only. What is compiled is compiled by the Python that will load it.
"""
