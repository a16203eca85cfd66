# SPDX-License-Identifier: Apache-2.0
"""Which modules the guest hook can import: its own, Python's and those of the libraries.

Of the hook's own modules every import counts, wherever it is, and every codec that is named. Of Python's library and
the other libraries those imports count that are made when a module is imported. What these import only inside functions
is in NEEDED, or in NOT_REACHED (tests/packaging/test_addon.py looks whether the two are complete).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

OWN = "oci_hooks"
# What the launcher imports.
ROOTS = ("oci_hooks.idle", "oci_hooks.guest.hook")
# What the interpreter itself imports at its start, and what is imported inside functions that the hook does come to:
# collections.Counter.most_common, a traceback, and for a recording tarfile and the versions of the libraries.
NEEDED = (
    *("encodings", "encodings.utf_8", "codecs", "io", "abc", "os", "site"),
    *("heapq", "linecache", "gzip", "email.parser"),
)
NO_LIBRARY = "its importer does without it"
# Modules that are left out although something in the add-on has an import of them, each with the reason.
OMITTED = {
    "_hashlib": f"{NO_LIBRARY}: the interpreter has the sums built in, OpenSSL takes 5 MB",
    "asyncio.windows_events": "Windows",
    "asyncio.windows_utils": "Windows",
    "bz2": NO_LIBRARY,
    "jsonschema": "a wrong state is reported by its first mistake (docs/reference/libraries.md)",
    "lzma": NO_LIBRARY,
    "ssl": f"{NO_LIBRARY}: asyncio, which tenacity imports",
    "tenacity.tornadoweb": "only where tornado is loaded",
    "tomli": "Python has tomllib",
}
# Modules that are imported only inside functions that the hook does not come to, each with its importer.
NOT_REACHED = {
    "_strptime": "datetime.strptime",
    "concurrent.futures.process": "concurrent.futures.ProcessPoolExecutor",
    "concurrent.futures.thread": "concurrent.futures.ThreadPoolExecutor",
    "email.generator": "email.message: a message as text",
    "email.policy": "email.message.EmailMessage",
    "encodings.mbcs": "encodings: on Windows",
    "getopt": "base64, quopri: as programs",
    "importlib.readers": "importlib.resources",
    "pickle": "logging: a configuration from a socket",
    "py_compile": "zipfile.PyZipFile",
    "pydoc": "help() at a prompt",
    "readline": "a prompt",
    "rlcompleter": "a prompt",
    "sitecustomize": "site.main()",
    "statistics": "random: as a program",
    "tracemalloc": "warnings: of an object that was not closed",
}


@dataclass(frozen=True)
class Imports:
    """What a module imports. always: when it is imported; inside: in functions."""

    always: tuple[str, ...]
    inside: tuple[str, ...]


@dataclass(frozen=True)
class Library:
    """Where modules are. places: directories on the path; extensions: the directory of extension modules;
    builtin: names of the interpreter's own.
    """

    places: Sequence[Path]
    extensions: Path
    builtin: frozenset[str]

    def find_source(self, name: str) -> Path | None:
        """Return the source of a module, None if there is none."""
        for place in self.places:
            stem = place / name.replace(".", "/")
            for path in (stem / "__init__.py", stem.with_suffix(".py")):
                if path.is_file():
                    return path
        return None

    def find_extension(self, name: str) -> Path | None:
        """Return the shared object of a module, None if there is none."""
        return next(iter(sorted(self.extensions.glob(f"{name}.*.so"))), None)


@dataclass
class Closure:
    """Modules that the hook can import.

    sources, extensions: by name; inside: what the modules outside of our package import in functions, by name the
    importing modules.
    """

    sources: dict[str, Path] = field(default_factory=dict)
    extensions: dict[str, Path] = field(default_factory=dict)
    inside: dict[str, set[str]] = field(default_factory=dict)


def find_closure(library: Library, roots: Sequence[str] = (*ROOTS, *NEEDED)) -> Closure:
    """Return all that these modules can import."""
    closure = Closure()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in closure.sources or name in closure.extensions or name in library.builtin or name in OMITTED:
            continue
        source = library.find_source(name)
        if source is None:
            extension = library.find_extension(name)
            if extension:
                closure.extensions[name] = extension
            # Else a name inside of a module, or a module of another operating system.
            continue
        closure.sources[name] = source
        waiting += list_parents(name)
        tree = ast.parse(source.read_bytes())
        imports = read_imports(tree, name if source.name == "__init__.py" else name.rpartition(".")[0])
        waiting += imports.always
        if is_own(name):
            waiting += [*imports.inside, *list_codecs(tree)]
        else:
            for each in imports.inside:
                closure.inside.setdefault(each, set()).add(name)
    return closure


def list_left_out(library: Library, closure: Closure) -> dict[str, set[str]]:
    """Return the modules that exist and are imported in functions only, and are not in a closure: their importers."""
    known = {*closure.sources, *closure.extensions, *library.builtin, *OMITTED}
    return {
        name: importers
        for name, importers in sorted(closure.inside.items())
        if name not in known and (library.find_source(name) or library.find_extension(name))
    }


def is_own(name: str) -> bool:
    """Return whether a module is of our package."""
    return name.partition(".")[0] == OWN


def list_parents(name: str) -> list[str]:
    """Return the packages that a module is in."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def read_imports(tree: ast.Module, package: str) -> Imports:
    """Return what a module imports: names of modules, and names that may be modules. package: that it is in."""
    always: list[str] = []
    inside: list[str] = []
    for node, is_inside in walk(tree, False):
        (inside if is_inside else always).extend(list_names(node, package))
    return Imports(tuple(always), tuple(inside))


def list_codecs(tree: ast.Module) -> Iterator[str]:
    """Yield the modules of the codecs that a module names: `data.decode("latin-1")`, `open(encoding="utf-8")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            values = [keyword.value for keyword in node.keywords if keyword.arg == "encoding"]
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("encode", "decode"):
                values += node.args[:1]
            for value in values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield f"encodings.{value.value.replace('-', '_')}"


def walk(node: ast.AST, is_inside: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Yield the nodes that may run, each with whether it is inside of a function."""
    if isinstance(node, ast.If) and is_never_true(node.test):
        children: list[ast.AST] = list(node.orelse)
    else:
        children = list(ast.iter_child_nodes(node))
    is_inside = is_inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    for child in children:
        yield child, is_inside
        yield from walk(child, is_inside)


def is_never_true(test: ast.expr) -> bool:
    """Return whether a condition holds only for a type checker, or for a program of its own."""
    if isinstance(test, ast.Compare):
        return isinstance(test.left, ast.Name) and test.left.id == "__name__"
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def list_names(node: ast.AST, package: str) -> Iterator[str]:
    """Yield the names that an import names. package: what relative names begin in."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        above = parts[: len(parts) - node.level + 1] if node.level else []
        module = ".".join([*above, *([node.module] if node.module else [])])
        yield module
        yield from (f"{module}.{alias.name}" for alias in node.names)
