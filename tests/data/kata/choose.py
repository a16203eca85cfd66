# SPDX-License-Identifier: Apache-2.0
"""Choose the committed sample of the corpus: choose.py CORPUS.jsonl.gz > is run by hand, and writes sample.jsonl.gz.

The corpus is what Kata's genuine readers made of generated configurations. The choice is seeded, so that it can be
repeated: of each class and answer of both readers a like share, at least two.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

from tests.support.kata_corpus import name_class

SHARE = 0.32


def main(corpus: str) -> None:
    """Write the sample next to this file."""
    with gzip.open(corpus, "rt", encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    by_class: dict[tuple[str, str, str], list[dict[str, object]]] = {}
    for case in cases:
        answers = (case[flavour].get("refused", "values") for flavour in ("go", "rs"))
        by_class.setdefault((name_class(case), *answers), []).append(case)
    chooser = random.Random(18)  # noqa: S311 - a repeatable choice
    sample = []
    for _, members in sorted(by_class.items()):
        sample += chooser.sample(members, min(len(members), max(2, round(len(members) * SHARE))))
    text = "".join(json.dumps(case, sort_keys=True) + "\n" for case in sorted(sample, key=lambda case: str(case["id"])))
    target = Path(__file__).with_name("sample.jsonl.gz")
    with target.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        packed.write(text.encode("utf-8", "surrogatepass"))
    print(f"{len(sample)} of {len(cases)} cases in {len(by_class)} classes: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
