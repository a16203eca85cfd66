# SPDX-License-Identifier: Apache-2.0
"""Cases of Kata's configuration with the answers of its genuine readers: where they are, how one is laid out."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

SAMPLE = Path(__file__).parents[1] / "data/kata/sample.jsonl.gz"
# The whole, where it is at hand (README there).
CORPORA = (Path("/work/shared/corpus/kata-config.jsonl.gz"),)

Case = dict[str, Any]
# A mark before the text, escapes, numbers not in decimal, inline tables, long strings, dotted and quoted keys.
DIALECT = re.compile(
    r"""\ufeff|\\[ex]|=\s*[+-]?\d+_\d|=\s*0[xob]|=\s*\{|\"\"\"|'''|\r|^\s*[\w"']+\.[\w"'.]+\s*=|^\s*["']\w+["']\s*=""",
    re.MULTILINE,
)


def load_cases(path: Path) -> list[Case]:
    """Return the cases of a file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def name_class(case: Case) -> str:
    """Return the class of a case: the number of a row of issue 18's table, by what it holds; the first that fits."""
    texts = "\n".join(str(text) for text in case["files"].values())
    names = [key.rpartition(".")[2] for key in case["annotations"] if ".config." in key]
    rules = (
        ("6 links and odd files", any(not isinstance(text, str) for text in case["files"].values())),
        ("3 dialects", bool(re.search(DIALECT, texts))),
        ("2 case", bool(re.search(r"(?m)^\s*\[?[\"']?[a-z._]*[A-Z]\w*[\"']?\s*(=|\.|\])", texts))),
        ("4 expressions", bool(re.search(r"enable_annotations\W*=.*[\\^$(*?+{|\[]{2}", texts)) and bool(names)),
        ("7 hypervisors", "[hypervisor.qemu]" not in texts),
        ("9 ports", any("plug_vfio" in name or "port" in name for name in names)),
        ("10 kernel_params", "kernel_params" in names),
        ("5 annotations", bool(names)),
        ("6 drop-ins", len(case["files"]) > 1),
        ("1 vfio_mode", "vfio_mode" not in texts),
    )
    return next((name for name, fits in rules if fits), "11 fields")


def lay_out(case: Case, top: Path) -> Path:
    """Write a case's files below a directory and return the main one. /KATA becomes a directory whose files exist."""
    kata = top.parent / "KATA"
    for name, content in case["files"].items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict) and "link" in content:
            path.symlink_to(content["link"])
            continue
        data = content.encode("utf-8") if isinstance(content, str) else base64.b64decode(content["base64"])
        for word in set(re.findall(rb"/KATA/([A-Za-z0-9_./+-]*[A-Za-z0-9_+-])", data)):
            location = kata / word.decode()
            if not location.exists():
                location.parent.mkdir(parents=True, exist_ok=True)
                location.write_bytes(b"content")
        path.write_bytes(data.replace(b"/KATA/", f"{kata}/".encode()))
    return top / str(case["main"])
