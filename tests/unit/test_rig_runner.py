# SPDX-License-Identifier: Apache-2.0
"""Counts and failures of tests/run, and the installer's messages about missing parts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import kernels, provision, runner, skips
from tests.provision import REPOSITORY
from tests.runner import Boot, Count, Failure
from tests.skips import Skip

REPORT = """<testsuites><testsuite>
<testcase name="a"/><testcase classname="tests.unit.t" name="b[x.y]"><failure>assert 1 == 2</failure></testcase>
<testcase name="c"><error/></testcase>
<testcase name="d"><skipped/></testcase>
</testsuite></testsuites>"""


def test_runner_counts_report(tmp_path: Path) -> None:
    """An error is a failure."""
    report = tmp_path / "junit.xml"
    report.write_text(REPORT)
    assert runner.read_report(report, 1) == Count(1, 2, 1)


@pytest.mark.parametrize("code", [1, 2, 3, 4, 255])
def test_runner_bad_exit_counts_as_failure(tmp_path: Path, code: int) -> None:
    """A pytest that was interrupted, or could not collect, has not passed."""
    report = tmp_path / "junit.xml"
    report.write_text('<testsuites><testsuite><testcase name="a"/></testsuite></testsuites>')
    assert runner.read_report(report, code) == Count(1, 1, 0)


def test_runner_missing_report_fails(tmp_path: Path) -> None:
    """The machine went down before pytest could write it."""
    assert runner.read_report(tmp_path / "junit.xml", 0) == Count(failed=1)


@pytest.mark.parametrize(
    ("total", "inside", "code"),
    [
        (Count(5), (), 0),
        (Count(5), (Count(2),), 0),
        (Count(5), (Count(2), Count(3)), 0),
        (Count(5, 0, 1), (), 0),
        (Count(5, 1), (), 1),
        (Count(5, 0, 1), (Count(2, 0, 1),), 1),
        (Count(5), (Count(),), 1),
        (Count(5), (Count(2), Count()), 1),
    ],
)
def test_runner_exit_code(total: Count, inside: tuple[Count, ...], code: int) -> None:
    """A test of a machine that was skipped, or none at all, is a failure."""
    assert runner.judge(total, *inside) == code


KNOWN = Skip("tests/unit/test_fuzz.py::test_fuzz_with_atheris", "no atheris for this interpreter: pip")
UNKNOWN = Skip("tests/unit/test_x.py::test_y", "the author was in a hurry")


@pytest.mark.parametrize(
    ("skips", "environment", "code"),
    [
        ((), "true", 0),
        ((KNOWN,), "true", 0),
        ((UNKNOWN,), "", 0),
        ((KNOWN, UNKNOWN), "true", 1),
        ((UNKNOWN,), "1", 1),
        ((Skip(KNOWN.test, "another reason"),), "true", 1),
    ],
)
def test_runner_unknown_skip_fails_in_ci(
    skips: tuple[Skip, ...], environment: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known is a test with its reason: the same test skipped for another one is not."""
    monkeypatch.setenv("CI", environment)
    assert runner.judge(Count(5, 0, len(skips), skips=skips)) == code


def test_runner_lists_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By name, with its reason; also where nothing failed."""
    report = tmp_path / "junit.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.unit.test_x" name="y"><skipped message="no x"/></testcase>'
        '<testcase classname="tests.unit.test_fuzz" name="test_fuzz_with_atheris">'
        '<skipped message="no atheris for this interpreter"/></testcase></testsuite></testsuites>'
    )
    (runner.read_report(report, 0) + Count(1)).print_failures()
    out = capsys.readouterr().out
    assert "SKIPPED tests/unit/test_x.py::y: no x (NOT KNOWN)\n" in out
    assert "SKIPPED tests/unit/test_fuzz.py::test_fuzz_with_atheris: no atheris for this interpreter (known: " in out


def test_runner_retry_keeps_skips() -> None:
    first = Count(1, 1, 1, make_failures("a"), skips=(UNKNOWN,))
    assert runner.try_again(lambda _: Count(1), first).skips == (UNKNOWN,)


@pytest.mark.parametrize("known", skips.KNOWN, ids=lambda known: known.test)
def test_known_skips_match_tests(known: skips.Known) -> None:
    """Else it would excuse what is not there any more."""
    file, _, name = known.test.partition("::")
    text = (REPOSITORY / file).read_text()
    assert known.reason in text
    assert f"def {name}" in text


def test_runner_installs_packages_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, and no kind's packages for another."""
    asked: list[set[str]] = []
    monkeypatch.setattr(provision, "ensure_packages", lambda packages: asked.append(set(packages)))
    runner.install_packages(["unit"])
    runner.install_packages(runner.KINDS)
    few, all_ = asked
    assert few == set(provision.TEST_PACKAGES)
    assert all_ >= {*few, "git", "debootstrap", "lintian", "dpdk-dev"}


def test_runner_newcomer_files_separate_jobs() -> None:
    """Side by side, each with its name before its lines."""
    jobs = list(runner.make_newcomer_jobs())
    assert [job.keywords["prefix"] for job in jobs] == ["newcomer demo: ", "newcomer install: ", "newcomer tests: "]
    assert {job.keywords["limit"] for job in jobs} == {runner.NEWCOMER_TEST_LIMIT}
    assert {"newcomer"} <= set(runner.KINDS) & set(runner.TOGETHER)


def test_runner_lists_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its name and the end of its traceback."""
    report = tmp_path / "junit.xml"
    report.write_text(REPORT)
    runner.read_report(report, 1).print_failures()
    assert "FAILED tests/unit/t.py::b[x.y]\n    assert 1 == 2\n" in capsys.readouterr().out


def make_failures(*tests: str) -> tuple[Failure, ...]:
    """Return a failure of each of these tests."""
    return tuple(Failure((test,) if test else (), f"{test}\nassert") for test in tests)


def test_runner_retries_failures_once(capsys: pytest.CaptureFixture[str]) -> None:
    """One passes alone, which is reported; the other fails for good."""
    asked: list[str] = []

    def run(tests: Sequence[str]) -> Count:
        asked.extend(tests)
        return Count(1, 1, 0, make_failures("b"))

    count = runner.try_again(run, Count(7, 2, 1, make_failures("a", "b")))
    assert (asked, str(count)) == (["a", "b"], "8 passed, 1 failed, 1 skipped")
    count.print_failures()
    out = capsys.readouterr().out
    assert "FAILED, PASSED WHEN TRIED AGAIN a\n    assert\n" in out
    assert "FAILED b\n    assert\n" in out


@pytest.mark.parametrize(
    "failures",
    [(), make_failures("a", ""), make_failures(*"abcdefgh")],
    ids=["none failed", "no test failed", "too many for an accident"],
)
def test_runner_no_retry_cases(failures: tuple[Failure, ...]) -> None:
    first = Count(1, len(failures), 0, failures)
    assert runner.try_again(lambda _: pytest.fail("was tried"), first) is first


def test_runner_failed_machine_reruns_all_files() -> None:
    """They now fail by themselves, and the machine's output does not excuse that."""
    first = Count(0, 1, 0, (Failure(("x.py", "y.py"), "the hard limit was reached"),))
    asked: list[str] = []

    def run(tests: Sequence[str]) -> Count:
        asked.extend(tests)
        return Count(5)

    assert (str(runner.try_again(run, first)), asked) == ("5 passed, 0 failed, 0 skipped", ["x.py", "y.py"])


def test_runner_failed_retry_counts() -> None:
    """The machine does not come up: what failed has not passed."""
    count = runner.try_again(lambda _: Count(0, 1, 0, make_failures("")), Count(7, 2, 0, make_failures("a", "b")))
    assert (count.again, runner.judge(count)) == ((), 1)


def test_runner_last_line_machine_readable() -> None:
    """As .ci reads it."""
    assert str(Count(3, 2, 1) + Count(1)) == "4 passed, 2 failed, 1 skipped"


def test_read_wishes_machine_and_kernels(tmp_path: Path) -> None:
    """Read, not imported: outside the machine an import might fail."""
    file = tmp_path / "test_x.py"
    file.write_text('import nothing_there\nMACHINE = "single"\n')
    assert runner.read_wishes(file) == ("single", (kernels.find_fast_kernel(),))
    file.write_text('MACHINE = "many"\nKERNELS = ("6.1", "6.12")\n')
    assert runner.read_wishes(file) == ("many", ("6.1", "6.12"))


@pytest.mark.parametrize("text", ["", 'MACHINE = "big"', 'MACHINE = "many"\nKERNELS = "6.1"'])
def test_read_wishes_unknown_machine_refused(tmp_path: Path, text: str) -> None:
    """It would run nowhere."""
    file = tmp_path / "test_x.py"
    file.write_text(text)
    with pytest.raises(provision.MissingError, match=r"test_x\.py"):
        runner.read_wishes(file)


def make_file(directory: Path, name: str, machine: str, *kernels: str) -> Path:
    """Return a file of tests that asks for this."""
    file = directory / name
    file.write_text(f'MACHINE = "{machine}"\n' + (f"KERNELS = {kernels!r}\n" if kernels else ""))
    return file


def test_runner_groups_files_by_machine(tmp_path: Path) -> None:
    """By machine and kernel, the longest first."""
    single = make_file(tmp_path, "test_single.py", "single")
    first = make_file(tmp_path, "test_first.py", "standard", "6.1", "6.12")
    second = make_file(tmp_path, "test_second.py", "standard", "6.1")
    assert runner.plan_boots([single, first, second]) == [
        Boot("standard", "6.1", (first, second)),
        Boot("single", kernels.find_fast_kernel(), (single,)),
        Boot("standard", "6.12", (first,)),
    ]


def test_runner_boots_long_files_first(tmp_path: Path) -> None:
    """A machine that begins last and takes longest leaves a processor without work."""
    others = [make_file(tmp_path, f"test_{number}.py", "standard") for number in range(3)]
    slow = make_file(tmp_path, "test_odd_configs.py", "single")
    assert [boot.files for boot in runner.plan_boots([*others, slow])] == [(slow,), tuple(others)]
    assert set(runner.LONG_FILES) <= {file.name for file in runner.find_machine_tests()}


@pytest.mark.parametrize(("more", "wanted"), [(0, 1), (1, 2), (runner.FILES_PER_BOOT + 1, 3)])
def test_runner_splits_many_files(tmp_path: Path, more: int, wanted: int) -> None:
    """Each file once."""
    files = [make_file(tmp_path, f"test_{number:02}.py", "standard") for number in range(runner.FILES_PER_BOOT + more)]
    boots = runner.plan_boots(files)
    assert len(boots) == wanted
    assert sorted(sum((boot.files for boot in boots), ())) == files


def test_runner_hanging_test_fails_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is reported by its name, instead of blocking the run until it is ended from outside."""
    directory = tmp_path / "tests"
    directory.mkdir()
    (directory / "test_x.py").write_text(
        f"import os\ndef test_hangs(): open({str(tmp_path / 'pipe')!r})\ndef test_goes_on(): pass\n"
    )
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(runner, "REPOSITORY", tmp_path)
    monkeypatch.setattr(runner, "find_tool", lambda _: sys.executable)
    monkeypatch.setattr(runner, "TEST_LIMIT", 4)
    count = runner.run_here(directory, prefix="x: ")
    assert str(count) == "1 passed, 1 failed, 0 skipped"
    count.print_failures()
    assert "FAILED tests/test_x.py::test_hangs" in capsys.readouterr().out


def test_runner_hanging_pytest_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before its first test: no report, which is a failure."""
    directory = tmp_path / "tests"
    directory.mkdir()
    (directory / "test_x.py").write_text("import time\ntime.sleep(100)\n")
    monkeypatch.setattr(runner, "REPOSITORY", tmp_path)
    monkeypatch.setattr(runner, "find_tool", lambda _: sys.executable)
    monkeypatch.setattr(runner, "HERE_LIMIT", 3)
    count = runner.run_here(directory, prefix="x: ")
    assert (count.failed, "exit code 124" in capsys.readouterr().out) == (1, True)


def test_runner_output_lines_not_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    """A line is printed when it is whole."""
    first, second = runner.LinePrinter("a: "), runner.LinePrinter("b: ")
    first.write(b"one ")
    second.write(b"two\n")
    first.write(b"three\nfour")
    assert capsys.readouterr().out == "b: two\na: one three\n"


def test_provision_failed_command_shows_output() -> None:
    """The tail of its output is in the message."""
    with pytest.raises(provision.MissingError, match="no network"):
        provision.run(["sh", "-c", "echo no network >&2; exit 100"])
    with pytest.raises(provision.MissingError, match="not found"):
        provision.run(["/nowhere/at-all"])


def test_provision_without_root_lists_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with what it is for."""
    monkeypatch.setattr(provision, "find_missing_packages", list)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(provision.MissingError) as caught:
        provision.ensure_packages({"qemu-system-x86": "the virtual machine"})
    assert "qemu-system-x86: the virtual machine" in str(caught.value)
    assert "apt-get install -y --no-install-recommends qemu-system-x86" in str(caught.value)


def test_runner_leaves_out_kind_without_genuine_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With others it is skipped, and the reason printed; alone it is what is missing."""
    monkeypatch.setenv("KATA_AGENT", sys.executable)
    monkeypatch.setenv("KATA_SHIM", "/nowhere/shim")
    assert runner.leave_out_missing(["lint", "kata", "kata-chain"]) == ["lint", "kata"]
    assert "-- kata-chain: skipped: /nowhere/shim: no such program; set KATA_SHIM" in capsys.readouterr().out
    with pytest.raises(provision.MissingError, match="KATA_SHIM"):
        runner.leave_out_missing(["kata-chain"])
