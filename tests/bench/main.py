# SPDX-License-Identifier: Apache-2.0
"""Compare the hooks with the usual tools, on this machine and in a virtual machine on it.

Sets up what it needs like tests/run, and for itself dpdk-devbind and GNU time. Prints ratios; writes all samples to a
JSON file. Never passes or fails by a time: only when something that is measured did not do its work.

parts: plain (containers without VFIO, here), host (the host check on a made host with 500 devices, here), guest (the
guest hook and its peers, in the VM), hotplug, runc. Without one: all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import provision
from tests.bench import before, documents, figures, go_hook
from tests.bench.timing import BenchError, say
from tests.provision import PYTHON, REPOSITORY, MissingError
from tests.vm import machines, rig

PACKAGES = {
    **provision.TEST_PACKAGES,
    "dpdk": "dpdk-devbind.py, a peer",
    "time": "peak memory",
    "strace": "which files the peers open",
    "util-linux": "unshare, for the made host",
}
HERE = ("plain", "host")
INSIDE = ("guest", "hotplug", "runc")
# A busy machine takes several times the usual.
LIMIT = 1800.0
Report = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Measure what the command line asks for and return the exit code: 0 done, 1 something did not work, 3 missing."""
    options = parse_arguments(arguments)
    parts = options.parts or [*HERE, *INSIDE]
    started = time.monotonic()
    try:
        provision.ensure_packages(PACKAGES)
        provision.ensure_rig()
        provision.compile_hooks()
        report = describe_machine(options.runs)
        report |= measure(parts, options)
    except MissingError as error:
        return provision.die(error)
    except (BenchError, rig.BootError) as error:
        say(f"bench: {error}")
        return 1
    report["seconds"] = round(time.monotonic() - started)
    tell(report, options)
    return 0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="tests/bench/run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join([*HERE, *INSIDE])}; default: all")
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="turns in the VM (10); ten times that here")
    default = provision.find_cache() / "bench.json"
    parser.add_argument("--json", type=Path, default=default, metavar="FILE", help=f"where all samples go ({default})")
    parser.add_argument("--document", action="store_true", help="put the figures into README.md and docs")
    parser.add_argument(
        "--compare", default="", metavar="REV", help="measure the hooks of a git revision, too, by turns"
    )
    parser.add_argument(
        "--go-hook",
        default=os.environ.get(go_hook.VARIABLE, ""),
        metavar="FILE",
        help="the predecessor's hook as a peer, built by you (tests/bench/go_hook.py)",
    )
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in (*HERE, *INSIDE)]
    if options.go_hook and not Path(options.go_hook).is_file():
        parser.error(f"--go-hook: {options.go_hook} is not a file")
    if options.document and options.compare:
        parser.error("--document needs a run without --compare")
    if unknown or options.runs < 1:
        parser.error(f"no part {', '.join(unknown)}" if unknown else "--runs: one at least")
    return options


def measure(parts: Sequence[str], options: argparse.Namespace) -> Report:
    """Return samples of these parts, measured here and in the VM, with the other revision and hook of the options."""
    measured: list[Report] = []
    here = [part for part in parts if part in HERE]
    inside = [part for part in parts if part in INSIDE]
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        share = Path(directory)
        if options.compare:
            before.unpack(options.compare, share / "before")
        if options.go_hook:
            shutil.copy(options.go_hook, share / "go-hook")
        if here:
            measured.append(measure_here(here, options.runs, share / "here.json"))
        if inside:
            measured.append(measure_inside(inside, options.runs, share))
    keys = ("samples", "memory", "imports")
    return {key: {name: value for part in measured for name, value in part[key].items()} for key in keys}


def measure_here(parts: Sequence[str], runs: int, result: Path) -> Report:
    """Return what was measured on this machine, in a mount namespace of its own."""
    command = ["unshare", "--mount", PYTHON, "-m", "tests.bench.plain", str(result), str(runs), *parts]
    environment = {**os.environ, **name_other(result.parent, result.parent)}
    if subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode:
        raise BenchError("the part on this machine failed; it needs root for a mount namespace")
    report: Report = json.loads(result.read_text())
    return report


def measure_inside(parts: Sequence[str], runs: int, share: Path) -> Report:
    """Return what was measured in the virtual machine."""
    result = share / "inside.json"
    # The helpers of the tests import pytest.
    python = provision.ensure_venv("tests", provision.TEST_REQUIREMENTS) / "bin/python"
    command = [str(python), "-m", "tests.bench.inside", str(rig.SHARE / result.name), str(runs), *parts]
    environment = {"OCI_VFIO_ROOTFS": str(provision.ensure_rootfs()), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= name_other(share, rig.SHARE)
    if (share / "go-hook").exists():
        environment[go_hook.VARIABLE] = str(rig.SHARE / "go-hook")
    job = rig.Job(tuple(command), share, LIMIT, environment)
    outcome = rig.run_in_vm(machines.MACHINES["bench"], provision.ensure_kernel(), job, rig.write_output)
    if outcome.exit_code or not result.exists():
        raise BenchError("the part in the virtual machine failed")
    report: Report = json.loads(result.read_text())
    return report


def name_other(share: Path, seen: Path) -> dict[str, str]:
    """Return the variable that names the other revision's tree; none without one. seen: where a part sees `share`."""
    return {before.VARIABLE: str(seen / "before")} if (share / "before").exists() else {}


def describe_machine(runs: int) -> Report:
    """Return on what and of what the figures are."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.strip()
    version = provision.run([PYTHON, "--version"]).strip()
    qemu = provision.run(["qemu-system-x86_64", "--version"]).split("\n", 1)[0].partition("version ")[2].split(" ")[0]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "revision": revision,
        "machine": f"{len(os.sched_getaffinity(0))} processors, {models[0] if models else platform.machine()}",
        "software": f"{version}, Linux {platform.release()}; in the VM: QEMU {qemu} without KVM, Linux "
        f"{provision.ensure_kernel().release}",
        # Above a half or so, something else was at work.
        "load": round(os.getloadavg()[0], 2),
        "runs": runs,
    }


def tell(report: Report, options: argparse.Namespace) -> None:
    """Print the figures and keep them."""
    results = figures.compute_all(report["samples"], report["memory"])
    if options.compare:
        results = before.compute_changes(report["samples"], report["memory"], options.compare)
    report["figures"] = [
        {
            "about": r.figure.about,
            "ratio": r.ratio,
            "low": r.low,
            "high": r.high,
            "runs": r.runs,
            "target": r.figure.target,
        }
        for r in results
    ]
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    for name, rows in report["imports"].items():
        say(f"\nimports of {name}: microseconds by itself, with what it imports")
        for own, whole, module in rows:
            say(f"  {own:8} {whole:8}  {module}")
    say("\nmedians on this machine")
    say(figures.format_medians(report["samples"], "ms", 1000))
    say(figures.format_medians(report["memory"], "MiB", 1 / 1024))
    about = describe(report)
    say(f"\n{figures.format_table(results)}\n\n{about}\n\nall samples: {options.json}")
    if options.document:
        documents.write_documents(results, figures.list_costs(report["samples"]), about)


def describe(report: Report) -> str:
    """Return the line under the table."""
    return (
        f"{report['date']}, revision {report['revision']}, {report['machine']}, {report['software']}; "
        f"load at the start {report['load']}, {report['seconds']} s."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
