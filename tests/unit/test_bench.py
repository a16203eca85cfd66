# SPDX-License-Identifier: Apache-2.0
"""Statistics of the benchmarks. Running them shows the measurements."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from docs import pictures
from tests.bench import before, documents, figures, go_hook, lift, main
from tests.bench.figures import Figure, compute
from tests.bench.timing import BenchError, Case, list_imports, take_turns, time_command
from tests.provision import REPOSITORY


def test_figure_is_ratio_of_medians() -> None:
    samples = {"hook": [9.0, 30.0, 12.0], "peer": [3.0, 10.0, 6.0]}
    result = compute(Figure("x", "hook", "peer"), samples)
    assert result
    assert result.ratio == 2.0
    assert (result.low, result.high) == (2.5, 3.0)


def test_figure_subtracts_interpreter_time() -> None:
    samples = {"hook": [5.0, 7.0], "bare": [1.0, 3.0], "peer": [2.0, 2.0]}
    result = compute(Figure("x", "hook", "peer", less="bare"), samples)
    assert result
    assert (result.ratio, result.low, result.high, result.runs) == (2.0, 2.0, 2.0, 2)


def test_figure_adds_two_peers() -> None:
    samples = {"hook": [6.0, 9.0], "bare": [1.0, 2.0], "shell": [2.0, 1.0]}
    result = compute(Figure("x", "hook", "shell", plus="bare"), samples)
    assert result
    assert (result.ratio, result.low, result.high) == (2.5, 2.25, 2.75)
    assert compute(Figure("x", "hook", "shell", plus="bare"), {"hook": [6.0], "shell": [2.0]}) is None


def test_costs_in_starts_of_the_interpreter() -> None:
    samples = {"bare": [2.0], "shell 8": [6.0], "shell 1": [1.0], "guest 1": [3.0], "guest 8": [8.0], "guest 2": [4.0]}
    costs = figures.list_costs(samples)
    assert [(cost.groups, cost.kernel, cost.hook) for cost in costs] == [(1, 0.5, 1.5), (8, 3.0, 4.0)]
    rows = pictures.read_costs(figures.format_costs(costs))
    assert [(row.groups, row.kernel, row.hook) for row in rows] == [(1, 0.5, 1.5), (8, 3.0, 4.0)]


def test_go_hook_gets_its_own_kind_of_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(go_hook, "CONTAINERS", tmp_path)
    state = json.loads(go_hook.make_state("c", ["0000:00:0a.0", "0000:00:0b.0"]))
    config = json.loads((tmp_path / state["id"] / "config.json").read_text())
    (group,) = json.loads(config["annotations"]["io.katacontainers.x.vfio"])
    assert [device["guest-path"] for device in group["devices"]] == [{"Path": ["0a.0"]}, {"Path": ["0b.0"]}]
    monkeypatch.delenv(go_hook.VARIABLE, raising=False)
    assert go_hook.prepare() == ""


def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(go_hook.VARIABLE, raising=False)
    assert main.parse_arguments(["guest", "--runs", "3"]).go_hook == ""
    (tmp_path / "hook").touch()
    monkeypatch.setenv(go_hook.VARIABLE, str(tmp_path / "hook"))
    assert main.parse_arguments([]).go_hook == str(tmp_path / "hook")
    for wrong in (["--go-hook", str(tmp_path)], ["nothing"], ["--runs", "0"], ["--document", "--compare", "x"]):
        with pytest.raises(SystemExit):
            main.parse_arguments(wrong)
    assert "is not a file" in capsys.readouterr().err


def test_figure_missing_case_omitted() -> None:
    assert compute(Figure("x", "hook", "peer"), {"hook": [1.0]}) is None


@pytest.mark.parametrize(("target", "verdict"), [(0.0, ""), (2.0, "met"), (2.5, "met"), (1.6, "missed by 25%")])
def test_figure_shows_target_margin(target: float, verdict: str) -> None:
    result = compute(Figure("x", "hook", "peer", target), {"hook": [4.0], "peer": [2.0]})
    assert result
    assert result.verdict == verdict


def test_figure_memory_uses_memory_samples() -> None:
    memory = {"plain guest none": [12.0], "plain bare": [10.0]}
    (result,) = figures.compute_all({}, memory)
    assert result.figure.about == "peak memory, no VFIO: guest hook / bare interpreter"
    assert "| 1.20 " in figures.format_table([result])


def test_timing_alternates_cases_drops_first() -> None:
    order: list[str] = []

    def record(name: str, seconds: float) -> float:
        order.append(name)
        return seconds if order.count(name) > 1 else 1000.0

    cases = [Case("a", measure=lambda: record("a", 1.0)), Case("b", measure=lambda: record("b", 2.0))]
    assert take_turns(cases, 2, "x") == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert order == ["a", "b", "a", "b", "a", "b"]


def test_timing_feeds_stdin_rejects_failures() -> None:
    assert time_command(("/bin/sh", "-c", 'read word; test "$word" = state'), b"state\n") > 0
    with pytest.raises(BenchError, match="ended with 3: no device"):
        time_command(("/bin/sh", "-c", "echo no device >&2; exit 3"), b"")


def test_timing_lists_imports(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("import json\n")
    rows = list_imports(str(script), (), b"")
    assert next(own <= whole for own, whole, name in rows if name.strip() == "json.decoder")


@pytest.mark.parametrize("place", [documents.WHOLE, documents.SHORT, documents.COSTS])
def test_document_gets_a_new_table_and_keeps_the_rest(place: documents.Place, tmp_path: Path) -> None:
    assert place.begin in (REPOSITORY / place.path).read_text()
    file = tmp_path / "page.md"
    file.write_text(f"before\n{place.begin}\n\nold\n\n{place.end}\nafter\n")
    documents.replace_table(file, place, "new")
    assert file.read_text() == f"before\n{place.begin}\n\nnew\n\n{place.end}\nafter\n"
    file.write_text("no marks\n")
    with pytest.raises(ValueError, match="lacks"):
        documents.replace_table(file, place, "new")


def test_short_table_has_rows_of_the_whole() -> None:
    """README's figures are those of docs/performance.md, and no target that is missed is left out."""
    whole = read_rows(documents.WHOLE)
    short = read_rows(documents.SHORT)
    shown = [about for about, cells in whole.items() if about in documents.SHOWN or "missed" in cells[-1]]
    assert short == {about: whole[about] for about in shown}
    assert set(documents.SHOWN) <= {figure.about for figure in figures.FIGURES}


def read_rows(place: documents.Place) -> dict[str, list[str]]:
    """Return the rows of a table in a document by their first cell."""
    text = (REPOSITORY / place.path).read_text().partition(place.begin)[2].partition(place.end)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return {cells[0]: cells[1:] for cells in rows[2:]}


def test_deadline_lines_exist() -> None:
    """What lift.py replaces in its copy of the hooks."""
    for name, line in lift.DEADLINES.items():
        assert (REPOSITORY / "oci_hooks" / name).read_text().count(line) == 1


def test_double_adds_the_other_revision_after_each_hook() -> None:
    cases = [Case("bare", ("python3",)), Case("none", ("/new/hooks/x", "poststop"), b"state")]
    doubled = before.double(cases, Path("/new"), Path("/old"))
    assert [(case.name, *case.command) for case in doubled] == [
        ("bare", "python3"),
        ("none", "/new/hooks/x", "poststop"),
        ("none before", "/old/hooks/x", "poststop"),
    ]
    assert doubled[2].stdin == b"state"
    assert before.double(cases, Path("/new"), None) == cases


def test_changes_are_ratios_to_the_other_revision() -> None:
    samples = {"bare": [1.0, 1.0], "none": [2.0, 4.0], "none before": [4.0, 4.0]}
    (change,) = before.compute_changes(samples, {"bare": [1.0]}, "v1")
    assert (change.figure.about, change.ratio, change.low, change.high) == (
        "time, none: this tree / v1",
        0.75,
        0.625,
        0.875,
    )
    (change,) = before.compute_changes({}, samples, "v1")
    assert change.figure.about == "memory, none: this tree / v1"


@pytest.mark.parametrize(
    ("name", "samples", "is_slower"),
    [
        ("plain guest none", [1.2, 1.2, 1.2, 1.2], True),
        ("plain host none", [1.2, 1.2, 1.2, 1.2], True),
        # Within the band; faster; a busy moment; a case that is not one of the cheapest.
        ("plain guest none", [1.1, 1.1, 1.1, 1.1], False),
        ("plain guest none", [0.5, 0.5, 0.5, 0.5], False),
        ("plain guest none", [0.9, 0.9, 1.5, 1.5], False),
        ("host 1", [1.2, 1.2, 1.2, 1.2], False),
    ],
)
def test_band_reports_what_became_slower(name: str, samples: list[float], is_slower: bool) -> None:
    measured = {name: samples, f"{name} before": [1.0] * 4}
    lines = before.find_slower(before.compute_changes(measured, {}, "v1"), 0.15)
    assert lines == ([f"time, {name}: this tree / v1: 1.20, above 1.15"] if is_slower else [])
    assert before.find_slower(before.compute_changes({}, measured, "v1"), 0.15) == []


@pytest.mark.parametrize("arguments", [["--band", "15"], ["guest", "--compare", "v1", "--band", "15"]])
def test_band_needs_another_revision(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main.parse_arguments(arguments)


def test_unpack_unknown_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git"):
        with pytest.raises(BenchError, match=r"--compare no-such-revision: .*; name a commit, tag or branch"):
            before.unpack("no-such-revision", tmp_path / "x")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match="--compare v1: git is missing"):
        before.unpack("v1", tmp_path / "y")
