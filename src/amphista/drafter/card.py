"""The model card of a drafter: what it is, what it saw, what was measured, under the front matter that the hub reads.

Front matter: base_model, license, library_name, pipeline_tag, tags, datasets (hub ids only), model-index with one tau
per tree size; and, for people, `training_data` with files and counts. Fields as in the hub's
model card specification (huggingface.co/docs/hub/model-cards); they are written and read by the hub's own client.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amphista.drafter.scoring import ScoringDrafter
from amphista.errors import DrafterError

OPEN_NOTE = {
    "amphista": (
        "The method is that of arXiv 2406.13170, of which no code was published. Certain: a bi-directional block over "
        "the heads, and staged adaptation of the target's states. Likely: two causal layers as the stages, the shared "
        "frozen LM head, the stage split. Open, and chosen here: the number of heads, the norms, the layer sizes, the "
        "loss weights."
    ),
    "bita": (
        "The method is BiTA's (arXiv 2401.12522): trained mask embeddings ride on the target's verify forward in place "
        "of tokens to come and see a trained prefix in each layer; the target's states of them are the draft. Certain: "
        "the equations, distinct masks, the unrotated prefix. Chosen here: the start, the objectives, the tree, where "
        "probes stand."
    ),
    "medusa": "Medusa-1 heads (arXiv 2401.10774), the baseline of the family.",
    "hydra": (
        "The method is that of arXiv 2402.05109, asked in rounds: each head reads the tokens drafted above its own. "
        "Certain, from the published code: the heads, states of the target (`base = hidden`) or of a causal layer over "
        "them (`prefix`) as their context, LM heads of their own. Chosen here: `base = staged` (a layer that reads the "
        "tokens, too, with norms), the shared LM head, the draft vocabulary, the start and the objective; no dropout."
    ),
    "eagle": (
        "After arXiv 2401.15077 and 2406.16858, asked in rounds: one layer over fused states and tokens that goes on "
        "from its own output. Certain: these, and trees chosen by the drafter's own confidence. All steps are trained "
        "on the drafter's own states, as in arXiv 2503.01840. Chosen here: norms, start, draft vocabulary, objectives "
        "on tokens alone. It is not the published EAGLE of any version, and its figures are not theirs."
    ),
    "falcon": (
        "After arXiv 2412.12639, asked in rounds: one layer that gives a block of tokens a pass and goes on from its "
        "own states; rows of a block see each other, its tokens know nothing of each other. Certain, from the "
        "published code: that, and training that shows a share of what would be missed. Not from there: how states and "
        "tokens are fused (an LSTM whose output cannot be used as written). Chosen here: that, norms, start, draft "
        "vocabulary, objectives, all passes trained on the drafter's own states."
    ),
    "tandem": (
        "After arXiv 2402.08644, asked in rounds: a small model whose layers attend to projected states of the target "
        "for the text, and to their own for what is drafted. Likely, from the abstract and a summary: that. Chosen: "
        "one layer a source, sizes, norms, the random start (the published one is pretrained), objectives. The small "
        "model never decodes by itself: its tokens would not be the target's."
    ),
    "early-exit": (
        "Early-exit self-drafting after M2R2 (arXiv 2502.02040), asked in rounds: drafted tokens go through the first "
        "layers of the target itself, on its own keys and values, and a second stream of residuals runs ahead of them "
        "to an exit. Known, from the abstract: that. Chosen here: adapters of low rank, norms, one exit for all depths "
        "and its start at plain early exit, objectives; no router, and the verification does not go on from what was "
        "drafted with. Each round pays for the first layers anew, which is slow beside a drafter of one layer."
    ),
}
TAPS_NOTE = " It also reads the target's states after layers {taps} (cf. EAGLE-3, arXiv 2503.01840)."
PATH_NOTE = (
    " A path correction stands on top, which is not in that paper: heads behind the first weigh their best tokens anew "
    "given the token above (cf. arXiv 2606.03819, 2607.05147)."
)
ARXIV = {
    "amphista": "2406.13170",
    "bita": "2401.12522",
    "medusa": "2401.10774",
    "hydra": "2402.05109",
    "eagle": "2401.15077",
    "falcon": "2412.12639",
    "tandem": "2402.08644",
    "early-exit": "2502.02040",
}

LITTLE_TOKENS = 5_000_000
LITTLE_DATA = (
    " This is very little data: published drafters of this family are trained on some 70 thousand conversations "
    "(ShareGPT). Expect a drafter trained on more to accept more."
)


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """What a card says that no run can know; None and () leave a field out.

    `license`: an identifier of the hub, such as apache-2.0. `base_model`: the target's hub id, where its name is a
    folder. `datasets`: hub ids of the data.
    """

    license: str | None = None
    base_model: str | None = None
    datasets: tuple[str, ...] = ()


def write_card(
    drafter: ScoringDrafter,
    base_model: str,
    training: dict[str, Any],
    config: CardConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """Markdown under front matter. `training` is what config.json holds under that name; `dtype` is the stored one."""
    config = config or CardConfig()
    base_model = config.base_model or base_model
    weights = sum(p.numel() for p in drafter.parameters()) / 1e6
    coverage = training.get("data", {}).get("validation_coverage")
    covering = "" if coverage is None else f" covering {coverage:.1%} of held-out answer tokens"
    lines = [
        "---",
        front_matter(drafter.name, base_model, training, config),
        "---",
        f"# {drafter.name} drafter for {base_model}",
        "",
        f"{weights:.1f} M weights (stored in {str(dtype).removeprefix('torch.')}), {drafter.num_heads} heads, draft "
        f"vocabulary of {drafter.draft_vocab} tokens{covering}. The target is frozen and decides every token: the "
        "drafter changes speed, never output.",
        "",
        OPEN_NOTE.get(drafter.name, "") + _taps_note(drafter) + ("" if drafter.path is None else PATH_NOTE),
        "",
    ]
    if "converted" in training:
        lines += _converted(training)
    elif "progress" in training:
        lines += _trained(training)
    if "validation" in training:
        lines += _measured(training)
    lines += ["Settings, versions and machine are in `config.json` under `training`.", ""]
    return "\n".join(lines)


def _taps_note(drafter: ScoringDrafter) -> str:
    return TAPS_NOTE.format(taps=", ".join(map(str, drafter.taps))) if drafter.taps else ""


def front_matter(kind: str, base_model: str, training: dict[str, Any], config: CardConfig) -> str:
    """The YAML between the dashes."""
    from huggingface_hub import EvalResult, ModelCardData

    name = f"{base_model.rsplit('/', 1)[-1]}-{kind}"
    results = [EvalResult(**values) for values in _results(training, config)]
    card = ModelCardData(
        base_model=base_model,
        base_model_relation="adapter",
        license=config.license,
        library_name="amphista",
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "drafter", kind, *([f"arxiv:{ARXIV[kind]}"] if kind in ARXIV else [])],
        datasets=list(config.datasets) or None,
        training_data=_training_data(training),
        model_name=name if results else None,
        eval_results=results or None,
    )
    return str(card.to_yaml())


def _training_data(training: dict[str, Any]) -> dict[str, Any]:
    if "converted" in training:
        return {"published_by": training["converted"].get("source")}
    data = training.get("data", {})
    return {name: data[name] for name in ("files", "rows", "answer_tokens") if name in data}


def _results(training: dict[str, Any], config: CardConfig) -> list[dict[str, Any]]:
    """One result per kind of answers and tree size, in the hub's words."""
    files = training.get("data", {}).get("files", [])
    return [
        {
            "task_type": "text-generation",
            "dataset_type": config.datasets[0] if config.datasets else "custom",
            "dataset_name": f"held-out answers ({', '.join(files)})",
            "dataset_config": part,
            "metric_type": "tau",
            "metric_name": f"tokens per target forward, {measured.get('trees', 'dynamic')} tree of {size} nodes",
            "metric_value": round(value, 3),
        }
        for part, measured in training.get("validation", {}).items()
        for size, value in measured["tau"].items()
    ]


def _trained(training: dict[str, Any]) -> list[str]:
    data, progress = training["data"], training["progress"]
    minutes = round(progress["seconds"] / 60)
    left_out = data.get("left_out")
    return [
        "## Training",
        "",
        f"{data['rows']} training rows, {data['answer_tokens']} answer tokens, seen as "
        f"{progress['positions']} positions in {progress['step']} steps ({minutes} minute{'s' * (minutes != 1)})."
        + _before(training.get("before"))
        + (LITTLE_DATA if data["answer_tokens"] < LITTLE_TOKENS else "")
        + (f" {left_out['lines']} lines of the data could not be used." if left_out else ""),
        "",
    ]


def _before(before: dict[str, Any] | None) -> str:
    if not before:
        return ""
    return f" It went on from a drafter that had seen {before['positions']} positions in {before['step']} steps."


def _converted(training: dict[str, Any]) -> list[str]:
    source = training["converted"]
    named = f", which names {source['base_model']} as its target" if source.get("base_model") else ""
    lines = [
        "## Origin",
        "",
        f"Converted from {source.get('source')}{named}; the weights of `{source.get('file')}` are unchanged.",
        "",
    ]
    if "validation" not in training:
        lines += ["Not calibrated and not measured: convert again with `--data` for that.", ""]
    return lines


def _measured(training: dict[str, Any]) -> list[str]:
    data = training["data"]
    trees = next(iter(training["validation"].values())).get("trees", "dynamic")
    chose = "" if "converted" in training or "calibration" in training else " and chose the best checkpoint"
    return [
        "## Measured on held-out answers",
        "",
        f"{data['validation_rows']} answers, {data['validation_answer_tokens']} tokens, replayed against {trees} "
        f"trees{' fitted to them' if trees == 'static' else ''}. tau = tokens committed per target forward. The same "
        f"answers set the calibration{chose}, so these figures "
        "lean a little to the kind side. Of sampled answers decoding accepts more: it knows their noise.",
        "",
        *_table(training["validation"]),
        "",
    ]


def _table(measured: dict[str, Any]) -> list[str]:
    sizes = list(next(iter(measured.values()))["tau"])
    rows = ["| answers | positions | " + " | ".join(f"tau at {size}" for size in sizes) + " | top-1 by head |"]
    rows.append("|---" * (len(sizes) + 3) + "|")
    for name, part in measured.items():
        taus = " | ".join(f"{part['tau'][size]:.2f}" for size in sizes)
        first = " ".join(f"{ranks[0]:.3f}" for ranks in part["top"])
        rows.append(f"| {name} | {part['positions']} | {taus} | {first} |")
    return rows


def read_front_matter(card: Path) -> dict[str, Any]:
    """The front matter of a card, {} where there is none; raises DrafterError if it is missing or no YAML."""
    from huggingface_hub import metadata_load

    if not card.is_file():
        raise DrafterError(f"{card.parent} holds no {card.name}: expected a model card")
    try:
        return metadata_load(card) or {}
    except Exception as error:  # YAML's errors, or the client's own for a block that is no mapping
        reason = " ".join(str(error).split())
        raise DrafterError(f"the front matter of {card} cannot be read: {reason}") from error
