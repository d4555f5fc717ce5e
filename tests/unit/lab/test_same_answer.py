"""The README's picture is drawn from its record, and the record counts one forward a step."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.lab.same_answer import COLOURS, RECORD, draw

ROOT = Path(__file__).parents[3]


def test_the_picture_is_that_of_the_record():
    found = json.loads((ROOT / RECORD).read_text(encoding="utf-8"))
    picture = (ROOT / "docs" / "same-answer.svg").read_text(encoding="utf-8")
    assert picture == draw(found)
    pieces = [piece for step in found["steps"] for piece in step["pieces"]]
    assert found["identical"] and found["plain_forwards"] == len(pieces) > found["forwards"] == len(found["steps"])
    boxes = [node.get("fill") for node in ElementTree.fromstring(picture).iter() if node.tag.endswith("rect")]
    assert boxes.count(COLOURS["lookup"]) == 1 + sum(step["by"].count("lookup") for step in found["steps"])
    assert boxes.count(COLOURS["heads"]) == 1 + sum(step["by"].count("heads") for step in found["steps"])
