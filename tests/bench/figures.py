# SPDX-License-Identifier: Apache-2.0
"""From samples to figures: ratios of medians, how far they spread, and what they should be. Pure.

Ratios, because seconds mean nothing on another machine. The spread is that of the single turns: each ratio made of what
was measured in the same turn, the lowest and the highest quarter left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from tests.bench.timing import Samples

TIMES = "times"
MEMORY = "memory"


@dataclass(frozen=True)
class Figure:
    """A ratio to report: over / under, (over - less) / under, or over / (under + plus).

    about: what it is, in words; over, under, less, plus: names of cases; target: what it should be at most, 0 for a
    figure that is only reported; kind: TIMES or MEMORY.
    """

    about: str
    over: str
    under: str
    target: float = 0.0
    less: str = ""
    kind: str = TIMES
    plus: str = ""


FIGURES = (
    Figure("container without VFIO: guest hook / bare interpreter", "plain guest none", "plain bare", 1.15),
    Figure("container without VFIO: host check / bare interpreter", "plain host none", "plain bare", 1.15),
    Figure(
        "guest hook with guest.toml / without (dry run, nothing free)", "settings guest", "settings guest none", 1.2
    ),
    Figure("host check with host.toml / without", "settings host", "settings host none", 1.2),
    Figure("the same with TOML that is not plain: guest hook", "settings guest any", "settings guest none"),
    Figure("the same with TOML that is not plain: host check", "settings host any", "settings host none"),
    Figure("the same in the VM: guest hook / bare interpreter", "guest none", "bare", 1.15),
    Figure("the same in the VM: host check / bare interpreter", "host none", "bare", 1.15),
    Figure("guest hook, 1 device / driverctl, 1 device", "guest 1", "driverctl 1", 0.85),
    Figure("guest hook, 8 groups / 8 times driverctl in a row", "guest 8", "driverctl 8", 0.3),
    Figure("guest hook, 8 groups / dpdk-devbind with 8 addresses", "guest 8", "devbind 8", 0.28),
    Figure("guest hook, 1 device / dpdk-devbind, 1 device", "guest 1", "devbind 1"),
    Figure("guest hook, 16 groups / 1 group", "guest 16", "guest 1", 3.5),
    Figure("over the bare interpreter, 8 groups / shell, one after another", "guest 8", "shell 8", 1.3, less="bare"),
    Figure("over the bare interpreter, 1 device / shell", "guest 1", "shell 1", 2.5, less="bare"),
    Figure("guest hook, 8 groups / bare interpreter and shell", "guest 8", "shell 8", 1.35, plus="bare"),
    Figure("guest hook, 1 device / bare interpreter and shell", "guest 1", "shell 1", 1.35, plus="bare"),
    Figure("guest hook, 8 groups / predecessor's Go hook, which only binds", "guest 8", "go 8", 1.4),
    Figure("guest hook, 1 device / predecessor's Go hook, which only binds", "guest 1", "go 1"),
    Figure("predecessor's Go hook, 1 device / shell", "go 1", "shell 1"),
    Figure("guest hook, 2 groups / 1 group", "guest 2", "guest 1"),
    Figure("guest hook, 4 groups / 1 group", "guest 4", "guest 1"),
    Figure("guest hook, 8 groups / 1 group", "guest 8", "guest 1"),
    Figure("guest hook, 8 devices in one group / in 8 groups", "guest 8 in one group", "guest 8"),
    Figure("guest hook, device bound already / 1 device", "guest bound", "guest 1"),
    Figure("uevent to node in the container / bare interpreter's start", "hotplug", "hotplug bare"),
    Figure("the same without the native driver's time", "hotplug", "hotplug bare", 1.15, less="hotplug native"),
    Figure("uevent to node in the container / the kernel's own time to make the group", "hotplug", "hotplug kernel"),
    Figure("uevent to the native driver's bind, no hook at all / the same", "hotplug native", "hotplug bare"),
    Figure("shell, 8 devices one after another / 1 device", "shell 8", "shell 1"),
    Figure("host check, 64 groups on 500 devices / 1 group", "host 64", "host 1", 3.0),
    Figure("host check, 1 group on 500 devices / bare interpreter", "host 1", "plain bare"),
    Figure("host check, 1 free group: busy large host / small idle one", "scale busy", "scale idle", 1.5),
    Figure("the same in the VM, 300 processes / few", "scale vm busy", "scale vm idle", 1.5),
    Figure(
        "in the VM, group in use by the own hypervisor, 300 processes / free, few",
        "scale vm busy own",
        "scale vm idle own",
        1.5,
    ),
    Figure("`vfio-host-check --all`, 4,000 processes / `ls -l /proc/*/fd`", "scale all", "scale ls", 1.0),
    Figure("`vfio-host-check --all`, 4,000 processes / fuser with one group", "scale all", "scale fuser"),
    Figure("`vfio-host-check --all`, 4,000 processes / lsof with one group", "scale all", "scale lsof"),
    Figure("the same in the VM, 300 processes / `ls -l /proc/*/fd`", "scale vm all", "scale vm ls"),
    Figure("`runc run`, both hooks, no VFIO / without hooks", "runc hooks", "runc", 1.7),
    Figure("`runc run`, 1 device and back / without hooks", "runc device", "runc"),
    Figure("peak memory, no VFIO: guest hook / bare interpreter", "plain guest none", "plain bare", 1.1, kind=MEMORY),
    Figure("peak memory, no VFIO: host check / bare interpreter", "plain host none", "plain bare", 1.1, kind=MEMORY),
    Figure("peak memory, 8 groups: guest hook / bare interpreter", "guest 8", "bare", 1.35, kind=MEMORY),
    Figure("peak memory, 64 groups: host check / bare interpreter", "host 64", "plain bare", kind=MEMORY),
)


@dataclass(frozen=True)
class Result:
    """A measured figure. low, high: the middle half of the single turns is between these; runs: of each."""

    figure: Figure
    ratio: float
    low: float
    high: float
    runs: int

    @property
    def verdict(self) -> str:
        """Return the result for its target: "met" or by how much not; "" without a target."""
        target = self.figure.target
        if not target:
            return ""
        return "met" if self.ratio <= target else f"missed by {self.ratio / target - 1:.0%}"


def compute(figure: Figure, samples: Samples) -> Result | None:
    """Return what a figure came to; None where one of its cases was not measured."""
    names = [name for name in (figure.over, figure.under, figure.less, figure.plus) if name]
    if not all(samples.get(name) for name in names):
        return None
    over, under = samples[figure.over], samples[figure.under]
    nothing = [0.0] * len(over)
    less, plus = samples.get(figure.less, nothing), samples.get(figure.plus, nothing)
    singles = [(top - base) / (bottom + more) for top, base, bottom, more in zip(over, less, under, plus)]
    ratio = (median(over) - median(less)) / (median(under) + median(plus))
    low, high = find_middle_half(singles)
    return Result(figure, ratio, low, high, len(singles))


def find_middle_half(values: Sequence[float]) -> tuple[float, float]:
    """Return the bounds of the middle half of the values."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def compute_all(samples: Samples, memory: Samples) -> list[Result]:
    """Return every figure whose cases were measured."""
    results = (compute(figure, memory if figure.kind == MEMORY else samples) for figure in FIGURES)
    return [result for result in results if result is not None]


def format_table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table."""
    rows = [("what", "target", "measured", "middle half", "runs", "")]
    rows += [
        (
            result.figure.about,
            f"≤ {result.figure.target:.2f}" if result.figure.target else "",
            f"{result.ratio:.2f}",
            f"{result.low:.2f} to {result.high:.2f}",
            str(result.runs),
            result.verdict,
        )
        for result in results
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def format_medians(samples: Samples, unit: str, factor: float) -> str:
    """Return the medians themselves, one line each: of this machine only."""
    width = max(map(len, samples), default=0)
    return "\n".join(f"  {name:{width}} {median(values) * factor:9.1f} {unit}" for name, values in samples.items())


# The cost of each number of groups ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What so many groups take, in starts of a bare interpreter.

    kernel: the writes to sysfs alone, by a shell, one after another; hook: the guest hook, its interpreter included.
    """

    groups: int
    kernel: float
    hook: float


def list_costs(samples: Samples) -> list[Cost]:
    """Return the cost of each number of groups that was measured."""
    counts = [int(name.split()[1]) for name in samples if name.startswith("shell ")]
    return [
        Cost(count, *(median(samples[f"{who} {count}"]) / median(samples["bare"]) for who in ("shell", "guest")))
        for count in sorted(counts)
        if samples.get(f"guest {count}") and samples.get("bare")
    ]


def format_costs(costs: Sequence[Cost]) -> str:
    """Return the costs as a Markdown table."""
    rows = [f"| {cost.groups:6} | {cost.kernel:24.2f} | {cost.hook:10.2f} |" for cost in costs]
    return "\n".join(["| groups | kernel alone (the shell's) | guest hook |", "|---|---|---|", *rows])
