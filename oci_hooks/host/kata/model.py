# SPDX-License-Identifier: Apache-2.0
"""Shared parts of both Kata readers: the ordered files, and the reading as their result.

A reading has three parts: values, each with its source; Kata's refusals; uncertain points. Values are given in every
case, as far as they can be read.

Sources: kata-containers src/runtime/pkg/katautils/config.go (decodeConfig, decodeDropIns), src/libs/kata-types/src/
config/drop_in.rs.
"""

from __future__ import annotations

import os
import stat

from oci_hooks.frozen import Frozen
from oci_hooks.host.kata.toml import TomlError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from oci_hooks.host.kata.toml import Keys, StrictReader
    from oci_hooks.system import Root

    # Notes a refusal: key, text.
    Refuse = Callable[[str, str], None]

# Bytes of all files together. Kata's own have 40 KB; larger ones would not be read before the deadline.
MAX_BYTES = 2 << 20
MAX_FILES = 10000
SIZES = ("block_device_logical_sector_size", "block_device_physical_sector_size")


class Problem(Frozen):
    """A refusal of Kata, or an uncertain point.

    stage: when Kata refuses: "load", "annotations", "validate"; place: "FILE line N", "annotation NAME", or the file;
    text: the problem; code: "syntax" for errors that every release refuses.
    """

    tag = "problem"

    stage: str
    place: str
    text: str
    code: str = ""

    def describe(self) -> str:
        """Return the problem with its place."""
        return f"{self.place}: {self.text}" if self.place else self.text


class Layer(Frozen):
    """One file: its path, its tables, its keys in order, and the line of each."""

    path: str
    values: dict[str, Any]
    keys: tuple[Keys, ...]
    lines: dict[Keys, int]

    def place(self, keys: Keys) -> str:
        """Return where the file sets a key, as text."""
        line = self.lines.get(keys, 0)
        return f"{self.path} line {line}" if line else self.path


class Reading(Frozen):
    """One Kata runtime's reading of a configuration and of a sandbox's annotations.

    flavour: "go" or "rs"; hypervisor: its name, "" without one; values: in effect, by Kata's names; marks: the places
    that set each table and key, the last one decides; by_annotation: the annotation that set a value; tables: all
    merged tables of the files; unallowed: annotations that enable_annotations does not allow; refused,
    uncertain: problems.
    """

    flavour: str
    hypervisor: str
    values: dict[str, Any]
    marks: dict[Keys, tuple[str, ...]]
    by_annotation: dict[str, str]
    tables: dict[str, Any]
    unallowed: tuple[str, ...]
    refused: tuple[Problem, ...]
    uncertain: tuple[Problem, ...]


class Ledger:
    """A reader's notes.

    missing: problems of missing files; present, lost: how many named files exist and how many do not; ambiguous: keys
    for which Kata itself takes one of several values by chance ("" for whole tables): an error in one value
    need not be refused.
    """

    def __init__(self, root: Root) -> None:
        self.root = root
        self.refused: list[Problem] = []
        self.uncertain: list[Problem] = []
        self.marks: dict[Keys, tuple[str, ...]] = {}
        self.missing: list[Problem] = []
        self.present = 0
        self.lost = 0
        self.ambiguous: set[str] = set()

    def refuse(self, stage: str, location: str, text: str, code: str = "") -> None:
        """Note a refusal of Kata."""
        doubtful = bool(self.ambiguous) and stage == "load" and not code
        doubtful = doubtful or (code == "unallowed" and bool(self.ambiguous & {"", "enable_annotations"}))
        (self.uncertain if doubtful else self.refused).append(Problem(stage, location, text, code))

    def mark_uncertain(self, location: str, text: str) -> None:
        """Note an uncertain point."""
        self.uncertain.append(Problem("load", location, text))

    def mark(self, keys: Keys, location: str) -> None:
        """Note where a key is set."""
        self.marks[keys] = (*self.marks.get(keys, ())[-1:], location)

    def place(self, *keys: str) -> str:
        """Return where a key is set last, "" if it is not set."""
        return self.marks.get(keys, ("",))[-1]

    def need_file(self, path: str, what: str, location: str, named: bool) -> None:
        """Note whether a file that Kata resolves exists. named: by the configuration, and not by default."""
        if not path:
            return
        if is_there(self.root, path):
            self.present += named
        else:
            self.lost += named
            self.missing.append(Problem("load", location, f"{what} {path} is missing"))

    def check_files(self) -> None:
        """Refuse missing files. If all named files are missing, the configuration is for another machine."""
        if self.present or not self.lost:
            for problem in self.missing:
                self.refuse(problem.stage, problem.place, problem.text)

    def make_reading(
        self,
        flavour: str,
        tables: dict[str, Any],
        name: str,
        values: dict[str, Any],
        by_annotation: dict[str, str],
        unallowed: tuple[str, ...],
    ) -> Reading:
        """Return the reading of these notes. name: the hypervisor's; the rest as in Reading."""
        refused, uncertain = tuple(self.refused), tuple(self.uncertain)
        return Reading(flavour, name, values, self.marks, by_annotation, tables, unallowed, refused, uncertain)


def check_sizes(table: dict[str, Any], refuse: Refuse) -> None:
    """Note sector sizes of block devices that both runtimes refuse."""
    for key in SIZES:
        size = table.get(key, 0)
        if size and (not 512 <= size <= 65536 or size & (size - 1)):
            refuse(key, f"{key} {size} is not a power of 2 from 512 to 65536")
    if all(table.get(key, 0) for key in SIZES) and table[SIZES[0]] > table[SIZES[1]]:
        refuse(SIZES[0], "the logical sector size is larger than the physical one")


def is_there(root: Root, path: str) -> bool:
    """Return whether a file exists. A relative path would be resolved below the bundle."""
    return path.startswith("/") and "\0" not in path and root.exists(path)


def read_layers(root: Root, path: str, reader: type[StrictReader], ledger: Ledger, links: bool) -> list[Layer]:
    """Return the main file and its drop-ins, in order. Unreadable ones are noted and left out.

    path: of the main file, links resolved; reader: of this flavour's dialect; links: whether a drop-in may be a link.
    """
    directory = path.rpartition("/")[0] + "/config.d"
    layers = []
    total = 0
    for number, name in enumerate((path, *list_drop_ins(root, directory, ledger, links))):
        data = read_regular(root, name, ledger)
        if data is None:
            continue
        total += len(data)
        if total > MAX_BYTES or number > MAX_FILES:
            ledger.mark_uncertain(name, f"vfio-host-check reads no more than {MAX_BYTES} bytes and {MAX_FILES} files")
            break
        layer = read_layer(name, data, reader, ledger)
        if layer:
            layers.append(layer)
    return layers


def list_drop_ins(root: Root, directory: str, ledger: Ledger, links: bool) -> Iterable[str]:
    """Return the paths of everything in config.d, in byte order of the names, hidden files and backups included."""
    try:
        names: list[str] = root.ask(os.listdir, directory)
    except FileNotFoundError:
        return ()
    except OSError as error:
        ledger.refuse("load", directory, error.strerror or str(error), "syntax")
        return ()
    paths = [f"{directory}/{name}" for name in sorted(names, key=os.fsencode)]
    for path in paths:
        if not links and root.read_link(path):
            ledger.refuse("load", path, "is a symbolic link, but runtime-rs accepts only regular files", "syntax")
    return paths


def read_regular(root: Root, path: str, ledger: Ledger) -> bytes | None:
    """Return a file's content, None (noted) if Kata could not read it either."""
    try:
        mode = root.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            ledger.refuse("load", path, "is not a regular file: Kata would block on it or refuse it", "syntax")
            return None
        return root.read_bytes(path, MAX_BYTES)
    except OSError as error:
        # A file of /proc or a full table of open files does not show whether Kata can read it.
        ledger.refuse("load", path, error.strerror or str(error), "syntax")
    return None


def read_layer(path: str, data: bytes, reader: type[StrictReader], ledger: Ledger) -> Layer | None:
    """Return the layer of one file, None (noted) if it is not TOML."""
    try:
        text = decode(data)
        document = reader(text)
        document.read()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        ledger.refuse("load", f"{path} line {line}", f"is not TOML: byte {error.start} is not UTF-8", "syntax")
    except TomlError as error:
        ledger.refuse("load", f"{path} line {error.line}", f"is not TOML: {error.problem}", "syntax")
    else:
        return Layer(path, document.values, tuple(document.keys), document.lines)
    return None


def decode(data: bytes) -> str:
    """Return a file's text without a byte order mark. Raises UnicodeDecodeError."""
    return data[3:].decode("utf-8") if data.startswith(b"\xef\xbb\xbf") else data.decode("utf-8")


# Values of annotations ------------------------------------------------------------------------------------------------


def read_parameters(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return kernel parameters as pairs of name and value."""
    pairs = []
    for word in words:
        name, _, value = word.partition("=")
        pairs.append((name, value))
    return pairs


def write_parameters(pairs: Iterable[tuple[str, str]]) -> str:
    """Return pairs as a kernel command line."""
    return " ".join(f"{name}={value}" if value else name for name, value in pairs)


def has_wrong_verity(text: str) -> bool:
    """Return whether dm-verity parameters are refused (hypervisor.go, ParseKernelVerityParams; the same in mod.rs)."""
    if not text.strip():
        return False
    fields = [field.strip() for field in text.split(",") if field.strip()]
    if not all("=" in field for field in fields):
        return True
    values = dict(field.split("=", 1) for field in fields)
    sizes = [values.get(name, "") for name in ("data_blocks", "data_block_size", "hash_block_size")]
    if not values.get("root_hash") or not values.get("salt"):
        return True
    if not all(size.isascii() and size.isdigit() and int(size[:30]) for size in sizes):
        return True
    return any(int(size[:30]) % 512 for size in sizes[1:])


def split_parameters(text: str) -> list[str]:
    """Return the parameters in kernel_params: blanks between quotes do not split (KernelParamFields)."""
    words = []
    begun = 0
    quoted = False
    for position, char in enumerate(text):
        if char == '"':
            quoted = not quoted
        elif char == " " and not quoted:
            words.append(text[begun:position].strip())
            begun = position + 1
    words.append(text[begun:].strip())
    return [word for word in words if word]
