# SPDX-License-Identifier: Apache-2.0
"""vfio-host-check --kata-config: print the effective values of a Kata configuration.

The answer has one object per runtime: the values with their sources, or Kata's refusals, or uncertain points.
"""

from __future__ import annotations

from oci_hooks.findings import EXIT_BAD_INPUT, EXIT_DONE, EXIT_REFUSED, InputError, make_one_line
from oci_hooks.host.kata.config import RELEASE, ConfigFile, find_default_files, load_config

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.host.kata.model import Problem, Reading
    from oci_hooks.program import Run
    from oci_hooks.system import Root

RUNTIMES = {"go": "go", "rust": "rs"}
# The kernel parameters that affect a virtual IOMMU.
IOMMU_WORDS = ("intel_iommu", "amd_iommu", "iommu", "iommu.passthrough", "iommu.strict")


def print_kata_config(run: Run) -> int:
    """Print the answer and return the exit code: 0 readable, 1 refused by Kata, 2 uncertain.

    Without --runtime the exit code is that of the runtime that the file is for.
    """
    import json

    from oci_hooks.log import write_stdout

    annotations = read_annotations(run.arguments.annotations)
    wanted = run.arguments.runtime
    answers = {}
    for name in [wanted] if wanted else list(RUNTIMES):
        answers[name] = make_answer(run.root, run.arguments.kata_config or "", RUNTIMES[name], annotations)
    if run.arguments.json:
        shown: Any = answers[wanted] if wanted else answers
        write_stdout(json.dumps(shown, indent=2) + "\n")
    else:
        write_stdout("".join(format_answer(name, found) for name, found in answers.items()))
    run.is_answered = True
    return choose_exit_code(answers[wanted or choose_runtime(run.root, run.arguments.kata_config or "", answers)])


def read_annotations(words: tuple[str, ...] | list[str]) -> dict[str, str]:
    """Return the annotations in KEY=VALUE words. Raises InputError."""
    annotations = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise InputError("bad-arguments", "arguments", f"{word!r} is not KEY=VALUE", "run vfio-host-check --help")
        annotations[key] = value
    return annotations


def make_answer(root: Root, file: str, flavour: str, annotations: dict[str, str]) -> dict[str, Any]:
    """Return one runtime's answer. file: "" for Kata's own lookup."""
    location = find_config_file(root, file, flavour)
    if location is None:
        return {"refused": "load: none of Kata's default locations has a configuration.toml"}
    reading = load_config(root, location, flavour, annotations).reading
    if reading.refused:
        return {"refused": format_problem(reading.refused[0])}
    if reading.uncertain:
        return {"uncertain": format_problem(reading.uncertain[0])}
    return {**reading.values, "decided": {key: find_decision(reading, key) for key in reading.values}}


def find_config_file(root: Root, file: str, flavour: str) -> ConfigFile | None:
    """Return the named file, else the first of Kata's default files; None without one."""
    if not file:
        return next(iter(find_default_files(root, flavour, "")), None)
    import os

    path = os.path.abspath(file)
    return ConfigFile(path, root.real_path(path), "named")


def format_problem(problem: Problem) -> str:
    """Return a problem on one line: stage, place and text."""
    return make_one_line(f"{problem.stage}: {problem.describe()}")


def find_decision(reading: Reading, key: str) -> str:
    """Return the source of a value: "annotation NAME", "FILE:LINE", or "default"."""
    if key in reading.by_annotation:
        return f"annotation {reading.by_annotation[key]}"
    keys: tuple[str, ...] = ("hypervisor", reading.hypervisor, key)
    if key == "vfio_mode":
        keys = ("runtime", key)
    elif key == "hypervisor":
        keys = ("runtime", "hypervisor_name") if reading.flavour == "rs" else find_table(reading)
    locations = reading.marks.get(keys, ())
    if not locations:
        return "default"
    file, line, number = locations[-1].rpartition(" line ")
    return f"{file}:{number}" if line else locations[-1]


def find_table(reading: Reading) -> tuple[str, ...]:
    """Return the first key of the hypervisor's table that a file sets: Go uses the table that exists."""
    wanted = ("hypervisor", reading.hypervisor)
    return next((keys for keys in reading.marks if keys[:2] == wanted), wanted)


def format_answer(name: str, found: dict[str, Any]) -> str:
    """Return an answer as text."""
    lines = [f"Kata's {name} runtime, as of release {RELEASE}:"]
    for key in ("refused", "uncertain"):
        if key in found:
            lines.append(f"  {key}: {found[key]}")
    for key, location in found.get("decided", {}).items():
        value = find_iommu_words(found[key]) if key == "kernel_params" else found[key]
        shown = value if isinstance(value, str) else str(value).lower()
        label = "kernel_params (IOMMU)" if key == "kernel_params" else key
        lines.append(make_one_line(f"  {label:22} {shown or '-':14} {location}"))
    return "\n".join(lines) + "\n"


def find_iommu_words(parameters: str) -> str:
    """Return the kernel parameters that affect a virtual IOMMU, in order: the last one of a name counts."""
    return " ".join(word for word in parameters.split() if word.partition("=")[0] in IOMMU_WORDS)


def choose_runtime(root: Root, file: str, answers: dict[str, dict[str, Any]]) -> str:
    """Return the runtime that a file is for, judged by its tables."""
    location = find_config_file(root, file, "go") or find_config_file(root, file, "rs")
    flavour = load_config(root, location, "", {}).flavour if location else "go"
    return next(name for name in answers if RUNTIMES[name] == flavour)


def choose_exit_code(found: dict[str, Any]) -> int:
    """Return the exit code of an answer."""
    if "refused" in found:
        return EXIT_REFUSED
    return EXIT_BAD_INPUT if "uncertain" in found else EXIT_DONE
