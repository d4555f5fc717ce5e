"""The table of `docs/drafters.md`: trained drafters side by side, from their plan's folder and two evaluations.

    python -m benchmarks.lab ablate recipes/drafters.toml --dtype bfloat16 --data runs/answers --out runs/drafters
    amphista evaluate mt_bench --dtype int8 --out greedy --methods none,eagle=runs/drafters/eagle-seed0/last,\
eagle=runs/drafters/eagle-seed0/last@4, ... and @8, @16; the same with --temperature 0.7 --out sampled
    python -m benchmarks.lab.drafters_table runs/drafters greedy/summary.json [sampled/summary.json]

Cost of a draft: of its first round and of a further one, in forwards of one row, as measured in the first evaluation.
Possible: the highest of tau / (forward of n rows, and of n groups of probes, + draft) over the fixed sizes n whose
forwards were measured, greedy; realised: decoding under `auto` over plain decoding. 7B: tau at 16 nodes over 1 +
(weights that K rounds read / weights of a target of Llama 7B's shape), where rows cost nothing and a drafter built for
that shape accepts as much as this one: a bound, not a promise.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from amphista.config import build
from amphista.drafter.checkpoint import DRAFTERS, make_drafter
from amphista.files import read_json
from amphista.target import DEFAULT_TARGET
from amphista.target.loading import load_target
from amphista.target.spec import SharedWeights, TargetSpec
from benchmarks.lab.shapes import SHAPES

SIZES = (4, 8, 16)
AGAIN = {
    "eagle": ("stage.",),
    "falcon": ("stage.", "recurrence."),
    "tandem": ("layers.", "widen."),
    "early-exit": ("",),
}  # what every round reads, all else is read once
PROBED = {"bita"}  # each node of a fixed tree has a row for each depth below it
HEADERS = ["", "weights", "positions", "rate", "draft", "tau at 4 / 8 / 16", "sampled", "possible", "realised", "7B"]


def projected(
    kind: str, model: dict[str, Any], tau: float, spec: TargetSpec, shared: SharedWeights
) -> tuple[float, int]:
    """Speedup where a forward costs what reading its weights does; and the rounds of a whole draft."""
    shape = SHAPES["llama-7b"]
    wide = replace(
        spec,
        hidden_size=shape.hidden_size,
        embedding_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_size=shape.hidden_size // shape.num_attention_heads,
        intermediate_size=shape.intermediate_size,
    )
    config = build(DRAFTERS[kind][0], model, kind)
    with torch.device("meta"):
        drafter = make_drafter(kind, config, wide, shared)
    sizes = {name: parameter.numel() for name, parameter in drafter.named_parameters()}
    again = sum(size for name, size in sizes.items() if name.startswith(AGAIN.get(kind, ())))
    rounds = -(-drafter.num_heads // drafter.heads_a_round)
    head = (config.draft_vocab or spec.vocab_size) * shape.hidden_size
    read = sum(sizes.values()) + (rounds - 1) * again + rounds * head
    lent = rounds * drafter.num_early / spec.num_layers  # of the target itself
    return tau / (1 + read / shape.num_parameters() + lent), rounds


def cells(result: dict[str, Any], records: list[dict[str, Any]], seven_b: float, rounds: int) -> list[str]:
    """One row."""
    name = result["run"]
    costs = records[0]["run"]["costs"][f"{name}@auto"]
    found = [record["measures"]["all"] for record in records]
    one = costs["verify_ms"][0]
    taus = [[measures[f"{name}@{size}"]["tau"] for size in SIZES] for measures in found]
    depths = result["identity"]["config"]["model"]["num_heads"]
    rows = 1 + depths if result["identity"]["config"]["drafter"] in PROBED else 1  # of each node
    draft = costs["draft_ms"] + costs["round_ms"] * (rounds - 1)
    verify = dict(enumerate(costs["verify_ms"], 1))
    known = [(tau, verify[n * rows]) for n, tau in zip(SIZES, taus[0], strict=True) if n * rows in verify]
    possible = max(tau * one / (milliseconds + draft) for tau, milliseconds in known)
    asked = f"{costs['draft_ms'] / one:.2f}" + (f" + {costs['round_ms'] / one:.2f}" if costs["round_ms"] else "")
    measured = found[0][f"{name}@auto"]
    low, high = measured["decode_speedup_interval"]
    return [
        name,
        f"{result['parameters'] / 1e6:.1f} M",
        f"{result['progress']['positions'] / 1e6:.2f} M",
        f"{result['identity']['config']['optimizer']['learning_rate']:g}",
        asked,
        *(" / ".join(f"{tau:.2f}" for tau in row) for row in taus),
        f"{possible:.2f}",
        f"{measured['decode_speedup']:.2f} ({low:.2f} to {high:.2f})",
        f"{seven_b:.2f}",
    ]


def main() -> None:
    folder, *places = map(Path, sys.argv[1:])
    records = list(map(read_json, places))
    greedy, headers = records[0], [header for header in HEADERS if len(records) > 1 or header != "sampled"]
    target = load_target(DEFAULT_TARGET)
    print("| " + " | ".join(headers) + " |\n" + "|---" * len(headers) + "|")
    for place in sorted(folder.glob("*-seed0/result.json")):
        result = read_json(place)
        config, name = result["identity"]["config"], result["run"]
        if f"{name}@16" in greedy["measures"]["all"]:
            tau = greedy["measures"]["all"][f"{name}@16"]["tau"]
            bound = projected(config["drafter"], config["model"], tau, target.spec, target.shared)
            print("| " + " | ".join(cells(result, records, *bound)) + " |")


if __name__ == "__main__":
    main()
