# SPDX-License-Identifier: Apache-2.0
"""Load the hooks' own modules from their bytecode, by four system calls each in place of twelve.

A run that binds a device loads fifty of them, and Python's own finder and loader take a sixth of the processor's time
for that. It is left everything that is not plain: no bytecode, bytecode of another time, size or version of the source,
or such that has to be compared with the source's hash. Used by the executables alone.

Sources: importlib/_bootstrap_external.py (SourceLoader.get_code, _classify_pyc); PEP 552 for the first 16 bytes.
"""

from __future__ import annotations

import marshal
import posix
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import MAGIC_NUMBER
from _imp import _fix_co_filename  # type: ignore[attr-defined]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, ModuleType

PACKAGE = "oci_hooks"
# The longest module's has a third of it.
LIMIT = 1 << 16
# Kinds of bytecode, in its second word: to be compared with time and size of the source, to be used as it is.
BY_TIME, UNCHECKED = 0, 1


class Loader:
    """Loader of modules whose code the finder has read already."""

    @staticmethod
    def create_module(_spec: ModuleSpec) -> None:
        """Have Python make the module."""

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Execute a module's code."""
        exec(module.__spec__.loader_state, module.__dict__)  # type: ignore[union-attr] # noqa: S102


class Finder:
    """Finder of this package's modules, for sys.meta_path."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, _target: object = None) -> ModuleSpec | None:
        """Return a module's spec with its code; None for one that Python's own finder has to find."""
        if not path or not name.startswith(PACKAGE):
            return None
        base = f"{path[0]}/{name.rpartition('.')[2]}"
        for source in (f"{base}.py", f"{base}/__init__.py"):
            code = read_code(source)
            if code:
                is_package = source.endswith("/__init__.py")
                spec = ModuleSpec(name, Loader, origin=source, loader_state=code, is_package=is_package)  # type: ignore[arg-type]
                # Then Python sets __file__ to it.
                spec.has_location = True
                if is_package:
                    spec.submodule_search_locations = [base]
                return spec
        return None


def load_hook(name: str) -> ModuleType:
    """Return a hook's module, loaded by this finder as all that it imports is.

    Bytecode of another level of optimization has other names: then the finder stays out.
    """
    if not sys.flags.optimize:
        sys.meta_path.insert(0, Finder)
    return __import__(name, fromlist=("main",))


def read_code(source: str) -> CodeType | None:
    """Return a module's code from its bytecode, None unless that is as plain as can be. source: path of the source."""
    directory, _, name = source.rpartition("/")
    try:
        fd = posix.open(
            f"{directory}/__pycache__/{name[:-3]}.{sys.implementation.cache_tag}.pyc", posix.O_RDONLY | posix.O_CLOEXEC
        )
        try:
            data = posix.read(fd, LIMIT)
        finally:
            posix.close(fd)
        kind, time, size = (int.from_bytes(data[start : start + 4], "little") for start in (4, 8, 12))
        if data[:4] != MAGIC_NUMBER or len(data) == LIMIT or kind not in (BY_TIME, UNCHECKED):
            return None
        if kind == BY_TIME:
            found = posix.stat(source)
            if (int(found.st_mtime) & 0xFFFFFFFF, found.st_size & 0xFFFFFFFF) != (time, size):
                return None
        # As trusted as the source, which has the same owner and place.
        code: CodeType = marshal.loads(memoryview(data)[16:])  # noqa: S302
    except (OSError, ValueError, EOFError, TypeError):
        # Python's own loader finds the same, and reports or repairs it.
        return None
    _fix_co_filename(code, source)
    return code
