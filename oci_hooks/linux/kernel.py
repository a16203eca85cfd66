# SPDX-License-Identifier: Apache-2.0
"""Read what this kernel has for VFIO: its options, and modules that can be loaded. Reads only, loads nothing.

Sources: Kconfig of drivers/vfio and drivers/iommu; /proc/config.gz (CONFIG_IKCONFIG_PROC), else the copies that
distributions keep; modules.dep(5).
"""

from __future__ import annotations

from oci_hooks.frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.system import Root

RELEASE = "/proc/sys/kernel/osrelease"
CONFIGS = ("/proc/config.gz", "/boot/config-{}", "/lib/modules/{}/config", "/usr/lib/modules/{}/config")
MODULES = ("/lib/modules/{}/modules.dep", "/usr/lib/modules/{}/modules.dep")
# Bytes of a configuration: Debian's has 300 KB.
CONFIG_LIMIT = 4 << 20
# One of each row is enough. The first ones of a row are what is suggested.
NEEDED = (
    ("CONFIG_VFIO",),
    ("CONFIG_VFIO_PCI",),
    # With the devices' own nodes (iommufd) type 1 is not needed.
    ("CONFIG_VFIO_IOMMU_TYPE1", "CONFIG_VFIO_DEVICE_CDEV"),
    ("CONFIG_INTEL_IOMMU", "CONFIG_VIRTIO_IOMMU", "CONFIG_AMD_IOMMU", "CONFIG_ARM_SMMU", "CONFIG_ARM_SMMU_V3"),
)


class KernelConfig(Frozen):
    """The options a kernel was built with. path: of the file, "" where none can be read; options: name -> value."""

    path: str
    options: dict[str, str]

    def has(self, name: str) -> bool:
        """Return whether an option is known to be set, built in or as a module."""
        return self.options.get(name) in ("y", "m")

    @property
    def missing(self) -> tuple[str, ...]:
        """What VFIO needs in a guest and this kernel does not have, in words: "CONFIG_VFIO", "CONFIG_A or CONFIG_B"."""
        rows = [row for row in NEEDED if self.path and not any(self.has(name) for name in row)]
        return tuple(" or ".join(row[:2]) for row in rows)


def read_release(root: Root) -> str:
    """Return the release of the running kernel, as uname -r prints it; "" if it cannot be read."""
    release = root.read_text_or(RELEASE, "")
    # It becomes a part of a path.
    return "" if "/" in release or "\0" in release else release


def read_config(root: Root, release: str) -> KernelConfig:
    """Return the options of the running kernel, from the first file that can be read. release: of that kernel."""
    for path in (name.format(release) for name in CONFIGS):
        try:
            data = root.read_bytes(path, CONFIG_LIMIT)
        except OSError:
            continue
        text = decompress(data) if path.endswith(".gz") else data
        options = parse_config(text.decode("utf-8", "replace"))
        if options:
            return KernelConfig(path, options)
    return KernelConfig("", {})


def decompress(data: bytes) -> bytes:
    """Return what a gzip file contains, b"" if it is damaged or this Python cannot read it."""
    try:
        import zlib
    except ImportError:
        return b""
    # 16: with the header of gzip (zlib.h, inflateInit2).
    stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        text = stream.decompress(data, CONFIG_LIMIT)
    except zlib.error:
        return b""
    # Of a part nobody knows what the rest has.
    return text if stream.eof else b""


def parse_config(text: str) -> dict[str, str]:
    """Return the values of the options in a kernel's configuration by name, "n" where one "is not set"."""
    options = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if line.startswith("CONFIG_") and equals:
            options[name] = value
        elif line.startswith("# CONFIG_") and line.endswith(" is not set"):
            options[line.split()[1]] = "n"
    return options


def find_module(root: Root, release: str, name: str) -> str:
    """Return the file of a module that can be loaded into the running kernel, "" if there is none.

    name: as modprobe takes it; a hyphen is the same as an underscore.
    """
    wanted = name.replace("-", "_")
    for path in (place.format(release) for place in MODULES):
        for line in root.read_text_or(path, "").splitlines():
            file = line.partition(":")[0]
            if file.rpartition("/")[2].partition(".ko")[0].replace("-", "_") == wanted:
                return file
    return ""
