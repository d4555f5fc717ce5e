"""The picture of how a token flows is drawn from its record: the tree, the mask and the path that stand there."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

from amphista.tree.token_tree import TokenTree
from benchmarks.lab.one_step import RECORD, SHOWN, draw

ROOT = Path(__file__).parents[3]


def test_the_picture_is_that_of_the_record():
    found = json.loads((ROOT / RECORD).read_text(encoding="utf-8"))
    picture = (ROOT / "docs" / "one-step.svg").read_text(encoding="utf-8")
    assert picture == draw(found)
    path, parents, size = found["path"], found["parents"], len(found["parents"])
    assert path[0] == 0 and all(parents[node] == above for above, node in pairwise(path))
    shapes = [(node.tag.rpartition("}")[2], node.get("class")) for node in ElementTree.fromstring(picture).iter()]
    assert shapes.count(("path", "taken")) == len(path) - 1 and shapes.count(("path", "edge")) == size - len(path)
    seen = int(TokenTree(list(range(size)), parents).ancestor_mask().sum())
    assert shapes.count(("rect", "unseen")) == size**2 - seen
    texts = [node.text or "" for node in ElementTree.fromstring(picture).iter() if node.tag.endswith("text")]
    assert texts.count("cached rows") == size and f"{len(path) - 1} drafted tokens" in " ".join(texts)
    assert len(found["before"]) > SHOWN
