"""The model card of a drafter: what it is, what it saw, what was measured, in the hub's form."""

from __future__ import annotations

from typing import Any

from amphista.drafter.base import ParallelHeads

OPEN_NOTE = {
    "amphista": (
        "The method is that of arXiv 2406.13170, of which no code was published. Certain: a bi-directional block over "
        "the heads, and staged adaptation of the target's states. Likely: two causal layers as the stages, the shared "
        "frozen LM head, the stage split. Open, and chosen here: the number of heads, the norms, the layer sizes, the "
        "loss weights."
    ),
    "medusa": "Medusa-1 heads (arXiv 2401.10774), the baseline of the family.",
}

LITTLE_TOKENS = 5_000_000
LITTLE_DATA = (
    " This is very little data: published drafters of this family are trained on some 70 thousand conversations "
    "(ShareGPT). Expect a drafter trained on more to accept more."
)


def write_card(drafter: ParallelHeads, target_name: str, training: dict[str, Any]) -> str:
    """Markdown with the front matter that model hubs read."""
    data, progress = training["data"], training["progress"]
    weights = sum(p.numel() for p in drafter.parameters()) / 1e6
    lines = [
        "---",
        "library_name: amphista",
        f"base_model: {target_name}",
        "tags: [speculative-decoding, drafter]",
        "---",
        f"# {drafter.name} drafter for {target_name}",
        "",
        f"{weights:.1f} M weights (stored in bfloat16), {drafter.num_heads} heads, draft vocabulary of "
        f"{drafter.draft_vocab} tokens covering {data['validation_coverage']:.1%} of held-out answer tokens. The "
        "target is frozen and decides every token: the drafter changes speed, never output.",
        "",
        OPEN_NOTE.get(drafter.name, ""),
        "",
        "## Training",
        "",
        f"{data['rows']} training rows, {data['answer_tokens']} answer tokens, seen as "
        f"{progress['positions']} positions in {progress['step']} steps ({progress['seconds'] / 60:.0f} minutes)."
        + (LITTLE_DATA if data["answer_tokens"] < LITTLE_TOKENS else ""),
        "",
        "## Measured on held-out answers",
        "",
        f"{data['validation_rows']} answers, {data['validation_answer_tokens']} tokens, replayed against the dynamic "
        "tree. tau = tokens committed per target forward. The same answers set the calibration and chose the best "
        "checkpoint, so these figures lean a little to the kind side.",
        "",
    ]
    lines += _table(training["validation"])
    lines += ["", "Settings, versions and machine are in `config.json` under `training`.", ""]
    return "\n".join(lines)


def _table(measured: dict[str, Any]) -> list[str]:
    sizes = list(next(iter(measured.values()))["tau"])
    rows = ["| answers | positions | " + " | ".join(f"tau at {size}" for size in sizes) + " | top-1 by head |"]
    rows.append("|---" * (len(sizes) + 3) + "|")
    for name, part in measured.items():
        taus = " | ".join(f"{part['tau'][size]:.2f}" for size in sizes)
        first = " ".join(f"{ranks[0]:.3f}" for ranks in part["top"])
        rows.append(f"| {name} | {part['positions']} | {taus} | {first} |")
    return rows
