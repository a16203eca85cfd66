# SPDX-License-Identifier: Apache-2.0
"""Draw the documents' pictures: `python3 -m docs.pictures`, from the repository's top. Standard library only.

Below docs/images: overview.svg shows what each hook does, architecture.svg the way of the data through the guest hook,
performance.svg the figures of the table in docs/performance.md that have a target, costs.svg what the kernel alone and
the hook take for each number of groups. A browser that prefers dark colours
gets them: one file serves both. tests/unit/test_pictures.py fails where a committed picture is not what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images"
PERFORMANCE = DOCS / "performance.md"

COLOURS = """
text { fill: #1f2328 } .faint { fill: #59636e } .hook { fill: #0a58ca } rect { fill: #f4f6f8; stroke: #b7bfc8 }
.paper { fill: #ffffff } .guest { fill: #e8f1fb } .inner { fill: #e6f5ea } .frame, .arrow { stroke: #0a58ca }
.line { stroke: #b7bfc8 } .head { fill: #0a58ca } .met { fill: #2da44e } .missed { fill: #d9822b }
.whisker, .target { stroke: #1f2328 } .kernel { fill: #8c959f } .whole { fill: #0a58ca }
"""
DARK = """
text { fill: #e6edf3 } .faint { fill: #9aa4af } .hook { fill: #79b8ff } rect { fill: #161b22; stroke: #444c56 }
.paper { fill: #0d1117 } .guest { fill: #14243a } .inner { fill: #12291a } .frame, .arrow { stroke: #79b8ff }
.line { stroke: #444c56 } .head { fill: #79b8ff } .met { fill: #3fb950 } .missed { fill: #d9822b }
.whisker, .target { stroke: #e6edf3 } .kernel { fill: #6e7781 } .whole { fill: #79b8ff }
"""
STYLE = f"""{COLOURS}@media (prefers-color-scheme: dark) {{{DARK}}}
text {{ font: 14px system-ui, "Segoe UI", "DejaVu Sans", sans-serif }}
.title {{ font-weight: 600; font-size: 16px }} .small {{ font-size: 12.5px }} .hook {{ font-weight: 600 }}
.code {{ font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px }}
.end {{ text-anchor: end }} .middle {{ text-anchor: middle }} .line, .arrow, .frame {{ fill: none }}
.paper, .met, .missed, .kernel, .whole {{ stroke: none }}
.frame, .whisker {{ stroke-width: 1.5 }} .arrow {{ stroke-width: 2 }}
.target {{ stroke-dasharray: 4 3 }}
"""


class Picture:
    """An SVG of a width and a height, in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="paper" width="{width}" height="{height}"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, kind: str = "") -> None:
        """Add a rectangle. kind: a class of STYLE."""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>')

    def bar(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """Add a rectangle without rounded corners."""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}"/>')

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """Add one line of text. kind: classes of STYLE."""
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>')

    def lines(self, x: float, y: float, words: list[str], kind: str = "small") -> None:
        """Add lines of text below each other."""
        for number, line in enumerate(words):
            self.text(x, y + 20 * number, line, kind)

    def line(self, x: float, y: float, to_x: float, to_y: float, kind: str = "line") -> None:
        """Add a straight line."""
        self.parts.append(f'<path class="{kind}" d="M{x:.1f} {y:g}L{to_x:.1f} {to_y:g}"/>')

    def arrow(self, x: float, y: float, to_x: float) -> None:
        """Add a level arrow that points to the right."""
        self.line(x, y, to_x - 9, y, "arrow")
        self.parts.append(f'<path class="head" d="M{to_x:g} {y:g}l-11 -6v12z"/>')

    def finish(self) -> str:
        """Return the file's text."""
        return "\n".join([*self.parts, "</svg>", ""])


def draw_overview() -> str:
    """Return the picture of the way from the host's IOMMU group to the program in the container."""
    inventory = Picture(1000, 430, "From the host's IOMMU group to a program in a container in a virtual machine")
    inventory.box(12, 12, 324, 406)
    inventory.text(28, 40, "Host", "title")
    inventory.lines(28, 68, ["PCI device 0000:03:00.0", "bound to vfio-pci", "IOMMU group 12", "/dev/vfio/12"], "code")
    inventory.box(24, 168, 300, 238, "frame")
    inventory.text(38, 194, "vfio-host-check", "code hook")
    inventory.text(38, 214, "before the container starts; changes nothing", "small faint")
    checks = ["does the group exist, with these numbers?", "is each member on a VFIO driver?"]
    checks += ["does another process hold the group?", "may the program map memory for DMA?"]
    checks += ["Kata: does the guest get a virtual IOMMU?", "Kata: is there a port for the device?"]
    inventory.lines(38, 244, [f"• {check}" for check in checks])
    inventory.text(38, 384, "one line per problem, with the remedy", "small hook")

    inventory.arrow(336, 92, 424)
    inventory.text(380, 78, "hypervisor", "small middle")

    inventory.box(428, 12, 560, 406, "guest")
    inventory.text(444, 40, "Virtual machine", "title")
    device = ["PCI device 0000:02:00.0", "e1000e → vfio-pci", "IOMMU group 18", "/dev/vfio/18"]
    inventory.lines(444, 68, device, "code")
    inventory.box(440, 168, 304, 238, "frame")
    inventory.text(454, 194, "vfio-guest-bind", "code hook")
    inventory.text(454, 214, "createRuntime; poststop restores everything", "small faint")
    steps = [
        "choose the container's groups",
        "refuse what is in use or claimed",
        "write the undo log, then bind to vfio-pci",
    ]
    steps += [
        "create the nodes in the container",
        "allow them in its device cgroup",
        "verify from its cgroup that they open",
    ]
    inventory.lines(454, 244, [f"{number}. {step}" for number, step in enumerate(steps, 1)])
    inventory.text(454, 384, "on failure: all restored before it exits", "small hook")

    inventory.arrow(744, 290, 776)
    inventory.box(780, 168, 196, 238, "inner")
    inventory.text(794, 194, "Container", "title")
    inventory.lines(794, 226, ["/dev/vfio/vfio", "/dev/vfio/18"], "code")
    inventory.lines(794, 282, ["A DPDK program opens", "the group and drives", "the device from", "user space."])
    return inventory.finish()


# The steps of the guest hook: name, file below oci_hooks/, what it does.
WAY = (
    ("input", "program.py, oci.py", ["state, config.json;", "exit if no VFIO"]),
    ("request", "guest/request.py", ["what the container", "asks for"]),
    ("inventory", "linux/", ["devices, groups,", "what is in use"]),
    ("plan", "guest/plan.py", ["which groups,", "writes and nodes"]),
    ("apply", "guest/apply/", ["bind, create nodes,", "allow them"]),
    ("verify", "guest/apply/proof.py", ["each node opens", "in its cgroup"]),
)


def draw_architecture() -> str:
    """Return the picture of the way of the data through the guest hook."""
    width, step = 148, 164
    inventory = Picture(1000, 330, "The way of the data through the guest hook")
    for number, (name, file, words) in enumerate(WAY):
        x = 14 + step * number
        inventory.box(x, 40, width, 112, "inner" if name == "apply" else "guest")
        inventory.text(x + 10, 64, name, "title")
        inventory.text(x + 10, 86, file, "code" if len(file) < 18 else "small faint")
        inventory.lines(x + 10, 112, words)
        if number < len(WAY) - 1:
            inventory.arrow(x + width, 96, x + step)
    inventory.text(14, 26, "reads only", "small faint")
    inventory.line(14, 32, 14 + step * 3 + width, 32)
    inventory.text(14 + step * 4, 26, "changes the machine", "small faint")
    inventory.line(14 + step * 4, 32, 14 + step * 4 + width, 32)
    inventory.box(14 + step * 3, 170, step + width, 44)
    inventory.text(24 + step * 3, 197, "claim, undo log: before each change", "small")
    inventory.box(14, 232, 972, 84, "frame")
    inventory.text(28, 258, "Root", "code hook")
    inventory.text(76, 258, "(system.py): each read and each step goes through it", "small")
    roots = ("the live system", "a constructed file tree, in a test", "a recording, in a replay")
    for number, root in enumerate(roots):
        inventory.box(28 + 318 * number, 270, 304, 34)
        inventory.text(42 + 318 * number, 292, root, "small")
    return inventory.finish()


@dataclass(frozen=True)
class Measured:
    """A row of the table in docs/performance.md. low, high: its middle half; target: 0.0 without one."""

    about: str
    target: float
    ratio: float
    low: float
    high: float


def read_table(text: str) -> list[Measured]:
    """Return the rows of the first table of a document whose cells are those of tests/bench/figures.py."""
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 6 and " to " in cells[3]:
            low, _, high = cells[3].partition(" to ")
            target = float(cells[1].lstrip("≤ ") or 0)
            rows.append(Measured(cells[0], target, float(cells[2]), float(low), float(high)))
    return rows


def draw_performance(rows: list[Measured]) -> str:
    """Return the plot of the figures with a target: how much of its target each one takes."""
    rows = [row for row in rows if row.target]
    top, height, left = 66, 30, 430
    bottom = top + height * len(rows)
    # The longest bar leaves room for its figure.
    highest = max(max(row.ratio, row.high) / row.target for row in rows)
    unit = min(130, int(380 / highest))
    inventory = Picture(960, bottom + 44, "Measured figures beside their targets")
    inventory.text(20, 30, "Measured, as a share of the target (shorter is faster)", "title")
    inventory.text(20, 50, "thin line: the middle half of the runs", "small faint")
    for share in range(max(4, int(highest) + 1)):
        x = left + unit * share
        inventory.line(x, top - 8, x, bottom, "target" if share == 1 else "line")
        inventory.text(x, bottom + 20, f"{share}", "small middle faint")
    inventory.text(left + unit, top - 14, "target", "small middle")
    for number, row in enumerate(rows):
        y = top + height * number
        met = row.ratio <= row.target
        inventory.text(left - 10, y + 19, row.about.replace("`", ""), "small end")
        inventory.bar(left, y + 6, unit * row.ratio / row.target, 17, "met" if met else "missed")
        inventory.line(
            left + unit * row.low / row.target, y + 14.5, left + unit * row.high / row.target, y + 14.5, "whisker"
        )
        end = left + unit * max(row.ratio, row.high) / row.target
        inventory.text(round(end + 8), y + 19, f"{row.ratio:.2f} (≤ {row.target:g}){'' if met else ' missed'}", "small")
    return inventory.finish()


@dataclass(frozen=True)
class Cost:
    """A row of the second table: what so many groups take, in starts of a bare interpreter."""

    groups: int
    kernel: float
    hook: float


def read_costs(text: str) -> list[Cost]:
    """Return the rows of the table of costs in docs/performance.md."""
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3 and cells[0].isdigit():
            rows.append(Cost(int(cells[0]), float(cells[1]), float(cells[2])))
    return rows


def draw_costs(rows: list[Cost]) -> str:
    """Return the plot of the costs: a bar for the kernel's share, written by a shell, and one for the hook."""
    top, height, left = 84, 58, 130
    bottom = top + height * len(rows)
    highest = max(max(row.kernel, row.hook) for row in rows)
    unit = 720 / highest
    inventory = Picture(960, bottom + 44, "What each number of groups costs: the kernel alone, and the guest hook")
    inventory.text(20, 30, "Time to bind, in starts of a bare interpreter (shorter is faster)", "title")
    inventory.bar(20, 44, 14, 12, "kernel")
    inventory.text(42, 55, "the kernel alone: a shell writes the same files, one device after another", "small")
    inventory.bar(520, 44, 14, 12, "whole")
    inventory.text(542, 55, "guest hook: with its interpreter, nodes, permission and proof", "small")
    for mark in range(int(highest) + 1):
        inventory.line(left + unit * mark, top - 8, left + unit * mark, bottom)
        inventory.text(left + unit * mark, bottom + 20, f"{mark}", "small middle faint")
    for number, row in enumerate(rows):
        y = top + height * number
        inventory.text(left - 10, y + 26, f"{row.groups} group{'s' * (row.groups != 1)}", "small end")
        for offset, value, kind in ((4, row.kernel, "kernel"), (25, row.hook, "whole")):
            inventory.bar(left, y + offset, unit * value, 17, kind)
            inventory.text(round(left + unit * value + 8), y + offset + 13, f"{value:.2f}", "small")
    return inventory.finish()


def draw_all() -> dict[Path, str]:
    """Return the text of each picture, by its path."""
    return {
        IMAGES / "overview.svg": draw_overview(),
        IMAGES / "architecture.svg": draw_architecture(),
        IMAGES / "performance.svg": draw_performance(read_table(PERFORMANCE.read_text())),
        IMAGES / "costs.svg": draw_costs(read_costs(PERFORMANCE.read_text())),
    }


def write_all() -> None:
    """Write all pictures."""
    IMAGES.mkdir(exist_ok=True)
    for path, text in draw_all().items():
        path.write_text(text)


if __name__ == "__main__":
    write_all()
