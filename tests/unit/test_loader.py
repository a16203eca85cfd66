# SPDX-License-Identifier: Apache-2.0
"""The executables' own loader: it loads what Python's would, or leaves it to that."""

from __future__ import annotations

import os
import py_compile
import subprocess
import sys
from pathlib import Path
from types import CodeType

import pytest

from oci_hooks import loader

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKED, UNCHECKED, BY_TIME = (
    py_compile.PycInvalidationMode.CHECKED_HASH,
    py_compile.PycInvalidationMode.UNCHECKED_HASH,
    py_compile.PycInvalidationMode.TIMESTAMP,
)


def compile_module(top: Path, mode: py_compile.PycInvalidationMode = BY_TIME) -> tuple[Path, Path]:
    """Return the source and the bytecode of a module."""
    source = top / "m.py"
    source.write_text("answer = 42\n")
    return source, Path(str(py_compile.compile(str(source), invalidation_mode=mode, doraise=True)))


def run_code(code: CodeType | None) -> object:
    """Return what the module's code sets, None without code."""
    values: dict[str, object] = {}
    if code:
        exec(code, values)  # noqa: S102
    return values.get("answer")


@pytest.mark.parametrize(("mode", "answer"), [(BY_TIME, 42), (UNCHECKED, 42), (CHECKED, None)])
def test_bytecode_of_each_kind(tmp_path: Path, mode: py_compile.PycInvalidationMode, answer: int | None) -> None:
    source, _ = compile_module(tmp_path, mode)
    assert run_code(loader.read_code(str(source))) == answer


def test_bytecode_older_than_the_source_left_alone(tmp_path: Path) -> None:
    source, _ = compile_module(tmp_path)
    status = source.stat()
    os.utime(source, (status.st_mtime, status.st_mtime + 1))
    assert loader.read_code(str(source)) is None
    # The same second, another length: an editor that is quick.
    source.write_text("answer = 142\n")
    os.utime(source, (status.st_mtime, status.st_mtime))
    assert loader.read_code(str(source)) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"\0\0\r\n" + data[4:],
        lambda data: data[:20],
        lambda data: data[:7],
        lambda _: b"",
        lambda data: data + bytes(loader.LIMIT),
        lambda data: data[:4] + b"\4" + data[5:],
    ],
    ids=["another Python's", "torn", "torn head", "empty", "long", "unknown kind"],
)
def test_bytecode_that_is_not_plain_left_alone(tmp_path: Path, damage: object) -> None:
    source, bytecode = compile_module(tmp_path)
    assert callable(damage)
    bytecode.write_bytes(damage(bytecode.read_bytes()))
    assert loader.read_code(str(source)) is None


def test_no_bytecode_left_alone(tmp_path: Path) -> None:
    assert loader.read_code(str(tmp_path / "m.py")) is None


def test_code_names_the_source_where_it_is_now(tmp_path: Path) -> None:
    """A package is compiled in another place than it is installed in: a traceback has to name what is there."""
    compile_module(tmp_path)
    moved = tmp_path.rename(tmp_path.with_name("moved")) / "m.py"
    code = loader.read_code(str(moved))
    assert code
    assert code.co_filename == str(moved)


PROGRAM = """
import sys
sys.path.append({top!r})
from oci_hooks.loader import load_hook
binding = load_hook("oci_hooks.guest.binding")
from oci_hooks import program
from oci_hooks.guest.apply import proof
import oci_hooks.guest.apply as package
print([type(module.__loader__).__name__ + module.__loader__.__name__ for module in (program, binding, proof, package)])
print(proof.__file__, proof.__package__, package.__path__, proof.__name__, binding.access.__spec__.parent)
"""


def test_modules_are_as_usual() -> None:
    """With their package, file and path: schema.py finds its files by them."""
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(REPOSITORY / "oci_hooks")], check=True)
    done = subprocess.run(
        [sys.executable, "-IBS", "-c", PROGRAM.format(top=str(REPOSITORY))], check=True, capture_output=True, text=True
    )
    folder = f"{REPOSITORY}/oci_hooks/guest/apply"
    assert done.stdout.splitlines() == [
        str(["typeLoader"] * 4),
        f"{folder}/proof.py oci_hooks.guest.apply ['{folder}'] oci_hooks.guest.apply.proof oci_hooks.guest",
    ]


def test_modules_without_bytecode_come_from_python(tmp_path: Path) -> None:
    for path in (REPOSITORY / "oci_hooks").rglob("*.py"):
        copy = tmp_path / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    done = subprocess.run(
        [
            sys.executable,
            "-IBS",
            "-c",
            PROGRAM.format(top=str(tmp_path)).partition("print(")[0] + "print(proof.__loader__)",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "SourceFileLoader" in done.stdout
