# SPDX-License-Identifier: Apache-2.0
"""Implementation of tests/run: set up, run the requested kinds of tests, count.

    tests/run                                          lint, unit, runtime, packaging, newcomer, chain, vm
    tests/run lint unit                                these kinds
    tests/run engines                                  podman, Docker, containerd; not in the above
    tests/run iommus                                   IOMMUs other than Intel's; not in the above
    tests/run arm64                                    an emulated arm64 machine with SMMUv3; not in the above
    tests/run guests                                   a Debian that systemd booted: AppArmor, SELinux; not in the above
    tests/run kata                                     Kata's genuine agent (KATA_AGENT=PATH); not in the above
    tests/run kata-chain                               containerd, Kata's genuine shim, QEMU, agent; not in the above
    tests/run --list [KIND...]                         installs what they need, and names their tests
    tests/run --vm tests/vm/test_x.py -k word          these files (else all) in the machines they ask for
    tests/run --in MACHINE [--kernel NAME] COMMAND...  any command in a machine, on a kernel of tests/kernels.py

Exits with 0 when all passed, 1 when something failed or a test of the machine was skipped (with CI=true: any test that
tests/skips.py does not know), 3 when something is missing.
"""

from __future__ import annotations

import ast
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable
from xml.etree import ElementTree

from tests import kernels, packages, provision
from tests.chain import image
from tests.engines import roots as engine_roots
from tests.kata import genuine as kata_agent
from tests.kata.chain import image as kata_image
from tests.newcomer import bare
from tests.provision import REPOSITORY, MissingError, say
from tests.skips import Skip, find_unknown
from tests.vm import machines, rig, systems

KINDS = ("lint", "unit", "runtime", "packaging", "newcomer", "chain", "vm")
# Kinds that are run only on request.
ON_REQUEST = ("arm64", "engines", "guests", "iommus", "kata", "kata-chain")
# Where a kind's files are, if not in a directory of its name.
DIRECTORIES = {"arm64": "vm/arm64", "guests": "vm/guests", "iommus": "vm/iommus", "kata-chain": "kata/chain"}
# Run in the rig's machines, where nothing may be skipped.
IN_MACHINES = ("chain", "vm", *ON_REQUEST)
# The long ones: side by side, as many jobs at a time as there are processors.
TOGETHER = ("unit", "packaging", "newcomer", *IN_MACHINES)
# Packages that apt must have installed for a kind, in addition to provision.TEST_PACKAGES.
PACKAGES = {
    "packaging": packages.PACKAGES,
    "newcomer": bare.PACKAGES,
    "chain": image.PACKAGES,
    "kata-chain": kata_image.PACKAGES,
}
# One boot serves many files; all of them together must end in this time.
VM_LIMIT = 2400.0
# A directory for the records that tests of the machine make (tests/support/kept_recordings.py).
KEEP_RECORDS = "OCI_VFIO_KEEP_RECORDS"
# What tests ask their environment, in the machine too: which hooks to run, and whether to leave nothing out.
HANDED_ON = ("OCI_VFIO_HOOKS_DIR", "OCI_VFIO_FULL")
# More files than this that ask for the same machine are shared by several.
FILES_PER_BOOT = 6
# Files that take as long as so many others: what is longest begins first.
LONG_FILES = {"test_odd_configs.py": 8, "test_guest_kill.py": 4, "test_addon.py": 3}
# Lines printed for each failure at the end; the whole output is where it happened.
LINES_TOLD = 20
# Tests that failed are tried once more alone, unless they are more than this.
TRIED_AGAIN = 5
# How long, in seconds, one test may take: it then fails, and the others go on. The slowest takes a fifth of it.
TEST_LIMIT = 600
# One in this machine starts one of Kata's guests, and once more where that fails.
MACHINE_TEST_LIMITS = {"kata-chain": 1200}
# One of packaging is all unit tests on Debian 11.
PACKAGING_TEST_LIMIT = 2000
# One of a newcomer's tests is a whole first run of the demo: apt, debootstrap, a boot.
NEWCOMER_TEST_LIMIT = 1500
# How long pytest as a whole may take outside the machines.
HERE_LIMIT = 3000


@dataclass(frozen=True)
class Failure:
    """A failure. tests: arguments for pytest to retry it, if any; words: the report, some lines."""

    tests: tuple[str, ...]
    words: str


@dataclass(frozen=True)
class Count:
    """Numbers of tests that passed, failed and were skipped.

    failures: what failed; again: what passed the second time; skips: what was skipped, and why.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: tuple[Failure, ...] = field(default=(), compare=False)
    again: tuple[Failure, ...] = field(default=(), compare=False)
    skips: tuple[Skip, ...] = field(default=(), compare=False)

    def __add__(self, other: Count) -> Count:
        """Return the sums."""
        numbers = self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped
        return Count(*numbers, self.failures + other.failures, self.again + other.again, self.skips + other.skips)

    def __str__(self) -> str:
        """Return the line that programs read."""
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"

    def print_failures(self) -> None:
        """Print what failed, once more: of a long run, many see the end only."""
        reported = [("FAILED, PASSED WHEN TRIED AGAIN", failure) for failure in self.again]
        for what, failure in [*reported, *(("FAILED", failure) for failure in self.failures)]:
            first, *rest = failure.words.splitlines()
            print("\n".join(["", f"{what} {first}", *(f"    {line}" for line in rest[-LINES_TOLD:])]))
        for skip in self.skips:
            print(skip)


LINTERS = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))
# Of the documents; what the last one makes is looked at by nobody, and goes to the cache.
DOCUMENT_LINTERS = (("codespell",), ("mkdocs", "build", "--strict", "--site-dir"))
# Runs tests: all of a job's, or those with these node ids.
Job = Callable[[Sequence[str]], Count]


def main(arguments: list[str]) -> int:
    """Run what the command line asks for and return the exit code."""
    # A program that reads our output through a pipe sees each line when it is printed.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        if arguments[:1] == ["--vm"]:
            return run_selected(arguments[1:])
        if arguments[:1] == ["--in"]:
            return run_command(arguments[1:])
        if arguments[:1] == ["--list"] and set(arguments[1:]) <= {*KINDS, *ON_REQUEST}:
            return list_kinds(arguments[1:] or list(KINDS))
        if any(argument not in (*KINDS, *ON_REQUEST) for argument in arguments):
            print(__doc__)
            return 0 if arguments in (["-h"], ["--help"]) else 2
        return run_kinds(arguments or list(KINDS))
    except MissingError as error:
        return provision.die(error)


def run_kinds(kinds: list[str]) -> int:
    """Run these kinds of tests and print how many there were of each."""
    started = time.monotonic()
    kinds = leave_out_missing(kinds)
    install_packages(kinds)
    provision.compile_hooks()
    counts: dict[str, Count] = {}
    for kind in kinds:
        if kind not in TOGETHER:
            say(f"== {kind}")
            counts[kind] = run_lint() if kind == "lint" else run_here(REPOSITORY / "tests" / kind)
    together = [kind for kind in TOGETHER if kind in kinds]
    if together:
        say(f"== {', '.join(together)}")
        counts |= run_together(together)
    total = sum(counts.values(), Count())
    total.print_failures()
    print()
    for kind, count in counts.items():
        print(f"{kind + ':':10} {count}")
    print(f"{'time:':10} {time.monotonic() - started:.0f} s")
    code = judge(total, *(counts[kind] for kind in kinds if kind in IN_MACHINES))
    print(total)
    return code


def leave_out_missing(kinds: list[str]) -> list[str]:
    """Return the kinds without those whose genuine parts of Kata are missing, and print the reasons.

    Raises MissingError if none would be left.
    """
    left = []
    for kind in kinds:
        try:
            for find in kata_agent.NEEDED.get(kind, ()):
                find()
            left.append(kind)
        except MissingError as error:
            if kinds == [kind]:
                raise
            say(f"-- {kind}: skipped: {error}")
    return left


def install_packages(kinds: Sequence[str]) -> None:
    """Install what these kinds need, all at once, before the first test is at work.

    All of them see this machine, the emulated ones as their root.
    """
    wanted = dict(provision.TEST_PACKAGES)
    for kind in kinds:
        wanted |= PACKAGES.get(kind, {})
    provision.ensure_packages(wanted)


def list_kinds(kinds: Sequence[str]) -> int:
    """Install what these kinds need, print the names of their tests, and return the exit code."""
    install_packages(kinds)
    for kind in kinds:
        say(f"== {kind}")
        directory = REPOSITORY / "tests" / DIRECTORIES.get(kind, kind)
        if kind == "lint":
            say("\n".join(map(" ".join, (*LINTERS, *DOCUMENT_LINTERS))))
        elif directory.is_dir():
            command = [find_tool("python"), "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
            done = subprocess.run([*command, str(directory)], cwd=REPOSITORY, timeout=TEST_LIMIT, check=False)
            if done.returncode:
                return 1
    return 0


def judge(total: Count, *inside: Count) -> int:
    """Return the exit code: a test of a machine (inside) that did not run is as bad as one that failed."""
    if total.failed:
        return 1
    unknown = find_unknown(total.skips)
    if unknown:
        print(f"tests/run: {len(unknown)} skips are not in tests/skips.py: with CI=true that is a failure")
        return 1
    for count in inside:
        if count.skipped or not count.passed:
            print(f"tests/run: {count.skipped} tests in a machine were skipped, {count.passed} ran: that is a failure")
            return 1
    return 0


def run_together(kinds: list[str]) -> dict[str, Count]:
    """Run kinds of tests that consist of long jobs and return how many there were of each."""
    counts = dict.fromkeys(kinds, Count())
    for kind, job, count in run_jobs(make_jobs(kinds)):
        counts[kind] += try_again(job, count)
    return counts


def make_jobs(kinds: list[str]) -> Iterator[tuple[str, Job]]:
    """Yield the jobs of these kinds, each with its kind, the longest first.

    What building the packages installs comes first, too. Kernels and Debian roots are made ready while the unit tests
    are at work.
    """
    if "packaging" in kinds:
        packages.ensure_dist()
    if "unit" in kinds:
        yield "unit", partial(run_here, REPOSITORY / "tests/unit", prefix="unit: " if len(kinds) > 1 else "")
    packages.ensure_roots(
        [*(packages.ROOTS if "packaging" in kinds else ()), *(packages.BARE_ROOTS if "newcomer" in kinds else ())]
    )
    if "packaging" in kinds:
        here = partial(run_here, REPOSITORY / "tests/packaging", prefix="packaging: ", limit=PACKAGING_TEST_LIMIT)
        yield "packaging", here
    for kind in (kind for kind in IN_MACHINES if kind in kinds):
        for boot in plan_boots(find_machine_tests(kind)):
            yield kind, make_boot_job(boot, [])
    if "newcomer" in kinds:
        yield from (("newcomer", job) for job in make_newcomer_jobs())


def make_newcomer_jobs() -> Iterator[partial[Count]]:
    """Yield a job for each file of a newcomer's tests: each has machines of its own."""
    for file in find_machine_tests("newcomer"):
        prefix = f"newcomer {file.stem.partition('_')[2]}: "
        yield partial(run_here, file, prefix=prefix, limit=NEWCOMER_TEST_LIMIT)


def try_again(job: Job, first: Count) -> Count:
    """Return what a job comes to when what failed of it is run once more, alone.

    A test that other work (of this machine, or of the one it is a guest of) starved into some time limit passes then,
    and is reported with its output; a defect fails twice. Many failures are no accident.
    """
    if not all(failure.tests for failure in first.failures) or not 0 < len(first.failures) <= TRIED_AGAIN:
        return first
    tests = [test for failure in first.failures for test in failure.tests]
    say(f"-- once more, alone: {' '.join(tests)}")
    second = job(tests)
    failed = {test for failure in second.failures for test in failure.tests or tests}
    again = tuple(failure for failure in first.failures if failed.isdisjoint(failure.tests))
    numbers = first.passed + second.passed, second.failed, first.skipped + second.skipped
    return Count(*numbers, second.failures, again, first.skips + second.skips)


def run_jobs(jobs: Iterable[tuple[str, Job]]) -> list[tuple[str, Job, Count]]:
    """Run jobs of some kinds, as many at a time as there are processors, and return each with what it counted.

    An emulated machine keeps one processor busy: a test does one thing after another. Building packages does, too.
    """
    candidates = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)))
    try:
        futures = [(kind, job, candidates.submit(job, ())) for kind, job in jobs]
        return [(kind, job, future.result()) for kind, job, future in futures]
    except KeyboardInterrupt:
        # At once, without waiting for the threads: the leashes take the machines down.
        os._exit(130)


def find_machine_tests(kind: str = "vm") -> list[Path]:
    """Return all files of tests of a kind that runs in a machine."""
    return sorted((REPOSITORY / "tests" / DIRECTORIES.get(kind, kind)).glob("test_*.py"))


def find_tool(name: str) -> str:
    """Return the path of a program in the tests' virtual environment."""
    return str(provision.ensure_venv("tests", provision.TEST_REQUIREMENTS) / "bin" / name)


def list_lint_commands() -> Iterator[list[str]]:
    """Yield the linters' command lines."""
    for program, *arguments in LINTERS:
        yield [find_tool(program), *arguments]
    programs = provision.ensure_venv("documents", provision.DOCUMENT_REQUIREMENTS) / "bin"
    for program, *arguments in DOCUMENT_LINTERS:
        site = [str(provision.find_cache() / "site")] if "--site-dir" in arguments else []
        yield [str(programs / program), *arguments, *site]


def run_lint() -> Count:
    """Run the linters: each counts as one test."""
    count = Count()
    # Material for MkDocs advertises its successor.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    for command in list_lint_commands():
        line = " ".join([Path(command[0]).name, *command[1:]])
        say(f"$ {line}")
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False)
        count += Count(failed=1, failures=(Failure((), line),)) if done.returncode else Count(passed=1)
    return count


def run_here(place: Path, tests: Sequence[str] = (), prefix: str = "", limit: int | None = None) -> Count:
    """Run a directory of tests on this machine, or a file, or some of them by node id.

    prefix: put before each line, where others talk at the same time; limit: seconds that a test may take, if not
    TEST_LIMIT.
    """
    if not place.is_file() and not list(place.glob("test_*.py")):
        say(f"no tests in {place.relative_to(REPOSITORY)}")
        return Count()
    with tempfile.TemporaryDirectory(prefix="tests-") as scratch:
        report = Path(scratch) / "junit.xml"
        command = [find_tool("python"), "-m", "pytest", "-q", f"--junitxml={report}", *limit_tests(limit)]
        command += tests or [str(place)]
        # In the foreground: Ctrl-C reaches what it runs.
        command = ["timeout", "--foreground", "--kill-after=20", str(HERE_LIMIT), *hide_records(), *command]
        output = subprocess.PIPE if prefix else None
        with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=output) as process:
            for line in process.stdout or ():
                say(f"{prefix}{line.decode(errors='replace').rstrip()}")
        return read_report(report, process.returncode)


def limit_tests(limit: int | None = None) -> list[str]:
    """Return pytest's options that end a test which hangs, unless nothing is left out: some then take very long.

    limit: seconds, if not TEST_LIMIT.
    """
    return [] if "OCI_VFIO_FULL" in os.environ else ["-p", "timeout", f"--timeout={limit or TEST_LIMIT}"]


def hide_records() -> list[str]:
    """Return what a command begins with to leave the machine's own records alone: the hooks that tests start make many.

    Only the newest are kept, so those of a developer's real failures would be gone.
    """
    if os.geteuid():
        return []
    location = "/var/lib/oci-vfio-hooks"
    script = f'mkdir -p {location} && mount -t tmpfs -o mode=0755 none {location} && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]


@dataclass(frozen=True)
class Boot:
    """One machine to boot, and the files of tests to run in it."""

    machine: str
    kernel: str
    files: tuple[Path, ...]


def make_boot_job(boot: Boot, options: list[str]) -> Job:
    """Return the job that boots a machine and runs its files of tests, all made ready that these will need."""
    kernels.ensure_kernel(boot.kernel)
    return partial(run_boot, boot, options, make_environment(boot.files))


def plan_boots(files: list[Path]) -> list[Boot]:
    """Return the boots that serve these files, the longest first. One boot serves files that ask for the same."""
    wishes: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        machine, wanted = read_wishes(file)
        ready = [kernel for kernel in wanted if kernel not in kernels.OWN_KERNELS or kernels.are_built()]
        if not ready:
            say(f"-- {file.name}: not run, needs a kernel of our own: tests/vm/kernel compiles it")
        for kernel in ready:
            wishes.setdefault((machine, kernel), []).append(file)
    boots: list[Boot] = []
    for (machine, kernel), together in wishes.items():
        parts = math.ceil(len(together) / FILES_PER_BOOT)
        boots += [Boot(machine, kernel, tuple(together[part::parts])) for part in range(parts)]
    return sorted(boots, key=lambda boot: sum(LONG_FILES.get(file.name, 1) for file in boot.files), reverse=True)


def read_wishes(file: Path) -> tuple[str, tuple[str, ...]]:
    """Return the machine and the kernels that a file of tests asks for at its top: MACHINE and, if it will, KERNELS."""
    values: dict[str, object] = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("MACHINE", "KERNELS"):
                values[name] = ast.literal_eval(node.value)
    machine, wanted = values.get("MACHINE"), values.get("KERNELS", (kernels.find_fast_kernel(),))
    if machine not in machines.MACHINES:
        raise MissingError(f"{file}: MACHINE is {machine!r}; there are {', '.join(machines.MACHINES)}")
    if not isinstance(wanted, tuple) or not set(wanted) <= set(kernels.KERNELS):
        raise MissingError(f"{file}: KERNELS is {wanted!r}; a tuple of {', '.join(kernels.KERNELS)} is wanted")
    return str(machine), wanted


def run_boot(boot: Boot, options: list[str], environment: dict[str, str], tests: Sequence[str] = ()) -> Count:
    """Boot once and run the files' tests inside, or those of them with these node ids.

    Each line bears the machine's name: others may talk as well.
    """
    label = f"{boot.machine} {boot.kernel}"
    files = tuple(tests) or tuple(map(str, boot.files))
    say(f"-- {label}: {' '.join(file.name for file in boot.files)}")
    printer = LinePrinter(f"{label}: ")
    with tempfile.TemporaryDirectory(prefix="rig-share-") as directory:
        share = Path(directory)
        report = rig.SHARE / "junit.xml"
        command = [find_tool("python"), "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += [*limit_tests(MACHINE_TEST_LIMITS.get(boot.machine)), *options, *files]
        job = rig.Job(tuple(command), share, VM_LIMIT, environment, repeatable=True)
        try:
            kernel = kernels.ensure_kernel(boot.kernel)
            outcome = rig.run_in_vm(machines.MACHINES[boot.machine], kernel, job, printer.write)
        except rig.BootError as error:
            say(f"rig: {label}: {error}")
            return Count(failed=1, failures=(Failure(files, f"{label}: after {printer.last!r}: {error}"),))
        say(f"-- {label}: up after {outcome.boot_seconds:.0f} s, off after {outcome.seconds:.0f} s")
        printer.write(b"\n" if printer.rest else b"")
        if KEEP_RECORDS in os.environ:
            for record in share.glob("*.tar.gz"):
                shutil.copy(record, os.environ[KEEP_RECORDS])
        return read_report(share / report.name, outcome.exit_code)


class LinePrinter:
    """Prints whole lines only, each after its prefix, so that two machines can talk at the same time."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.rest = self.last = ""

    def write(self, data: bytes) -> None:
        """Take some output; print the lines that are complete."""
        *lines, self.rest = (self.rest + data.decode(errors="replace")).split("\n")
        for line in lines:
            say(f"{self.prefix}{line}")
            self.last = line.strip() or self.last


def make_environment(files: Sequence[Path]) -> dict[str, str]:
    """Return what these files of tests find in their environment inside the machine; it is made where it is missing."""
    return {
        "OCI_VFIO_ROOTFS": str(provision.ensure_rootfs()),
        # Each import is expensive in there, and no file can be written next to the sources.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        **{name: value for name, value in os.environ.items() if name in HANDED_ON},
        **({KEEP_RECORDS: str(rig.SHARE)} if KEEP_RECORDS in os.environ else {}),
        **packages.make_environment(files),
        **engine_roots.make_environment(files),
        **kata_agent.make_environment(files),
        **image.make_environment(files),
        **systems.make_environment(files),
        **kata_image.make_environment(files),
    }


def read_report(report: Path, code: int) -> Count:
    """Count a junit report. A pytest that ended badly without a failed test counts as one failure."""
    if not report.exists():
        problem = f"tests/run: no report was written (exit code {code})"
        print(problem, flush=True)
        return Count(failed=1, failures=(Failure((), problem),))
    count = Count()
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 - we wrote it ourselves
        problems = [*case.iter("failure"), *case.iter("error")]
        if problems:
            test = name_test(case)
            words = "\n".join([test, *(problem.text or "" for problem in problems)])
            count += Count(failed=1, failures=(Failure((test,), words),))
        elif (skipped := case.find("skipped")) is not None:
            count += Count(skipped=1, skips=(Skip(name_test(case), skipped.get("message", "")),))
        else:
            count += Count(passed=1)
    # 5: no test was collected, which is the caller's to judge.
    if code in (0, 5) or (code == 1 and count.failed):
        return count
    return count + Count(failed=1, failures=(Failure((), f"pytest ended with {code}"),))


def name_test(case: ElementTree.Element) -> str:
    """Return the node id of a test case of a report."""
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


def run_selected(arguments: list[str]) -> int:
    """Run some files of tests in their machines: what a developer does all day."""
    files = [Path(word).resolve() for word in arguments if word.partition("::")[0].endswith(".py")]
    options = [word for word in arguments if not word.partition("::")[0].endswith(".py")]
    for file in files:
        if not file.is_file():
            raise MissingError(f"{file}: no such file; to choose tests of a file: -k WORD")
    provision.ensure_packages(provision.TEST_PACKAGES)
    provision.compile_hooks()
    jobs = [make_boot_job(boot, options) for boot in plan_boots(files or find_machine_tests())]
    count = sum((count for _, _, count in run_jobs(("vm", job) for job in jobs)), Count())
    count.print_failures()
    code = judge(count, count)
    print(count)
    return code


def run_command(arguments: list[str]) -> int:
    """Run any command in a machine and return its exit code."""
    name, *command = arguments or [""]
    if name not in machines.MACHINES:
        raise MissingError(f"no machine {name!r}; there are {', '.join(machines.MACHINES)}")
    kernel = kernels.find_fast_kernel()
    if command[:1] == ["--kernel"]:
        kernel, command = "".join(command[1:2]), command[2:]
    if kernel not in kernels.KERNELS:
        raise MissingError(f"no kernel {kernel!r}; there are {', '.join(kernels.KERNELS)}")
    provision.ensure_packages(provision.TEST_PACKAGES)
    with tempfile.TemporaryDirectory(prefix="rig-share-") as share:
        job = rig.Job(tuple(command), Path(share), VM_LIMIT, make_environment([]))
        try:
            return rig.run_in_vm(
                machines.MACHINES[name], kernels.ensure_kernel(kernel), job, rig.write_output
            ).exit_code
        except rig.BootError as error:
            print(f"rig: {name}: {error}", flush=True)
            return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
