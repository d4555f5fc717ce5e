"""amphista info: versions, machine, targets, drafters, and a self-check.

amphista info
amphista info --check
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from amphista.cli import options
from amphista.target import DEFAULT_TARGET

CHECK_PROMPT = "Write one sentence about the sea."
CHECK_TOKENS = 32


def info(
    target: options.Target = DEFAULT_TARGET,
    drafter: options.Drafter = None,
    allow_other_target: options.AllowOtherTarget = False,
    check: Annotated[
        bool, typer.Option("--check", help="Load target and drafter, decode a little, compare with plain decoding.")
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    fast: options.Fast = True,
    native: options.Native = True,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what is installed and where it stands; --check decodes and compares."""
    from amphista import provenance
    from amphista.drafter.checkpoint import shipped_checkpoints
    from amphista.target.gguf import cache_folder
    from amphista.target.loading import describe_target
    from amphista.tree.grow import DEFAULT_TREE

    report: dict[str, Any] = {
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "cache_folder": str(cache_folder()),
        "default_tree": DEFAULT_TREE,
        "target": describe_target(target),
        "drafters": [_describe(c) for found in shipped_checkpoints().values() for c in found],
    }
    if check:
        report["check"] = _check(
            target,
            drafter,
            device=device,
            dtype=dtype,
            fast=fast,
            native=native,
            allow_other_target=allow_other_target,
        )
    print(json.dumps(report) if json_lines else _text(report))
    if check and not report["check"]["identical"]:
        raise typer.Exit(1)


def _describe(checkpoint: Any) -> dict[str, Any]:
    weights = checkpoint.folder / "model.safetensors"
    return {
        "name": checkpoint.kind,
        "folder": checkpoint.folder.name,
        "target_family": checkpoint.fingerprint.family,
        "hidden_size": checkpoint.fingerprint.hidden_size,
        "num_heads": checkpoint.config.num_heads,
        "draft_vocab": checkpoint.config.draft_vocab,
        "megabytes": round(weights.stat().st_size / 1e6, 1) if weights.is_file() else 0.0,
    }


def _check(target: str, drafter: str | None, **settings: Any) -> dict[str, Any]:
    from dataclasses import asdict

    from amphista.cli.answers import compare
    from amphista.llm import load

    llm = load(target, drafter, **settings)
    raw = llm.target.text is not None and not llm.target.text.has_chat_template
    ours = llm.generate(CHECK_PROMPT, max_new_tokens=CHECK_TOKENS, raw=raw)
    compared = compare(llm, ours, llm.baseline.generate(CHECK_PROMPT, max_new_tokens=CHECK_TOKENS, raw=raw))
    return {
        "target": asdict(llm.target.spec),
        "path": llm.target.path,
        "why_stock": llm.target.why_stock if llm.target.path == "stock" else None,
        "why_not_native": llm.target.why_not_native if llm.target.path.startswith("fast") else None,
        "why_not_captured": llm.target.why_not_captured,
        "drafter": llm.drafter.name,
        "drafter_path": _drafter_path(llm.drafter.heads),
        "tau": ours.stats.tau,
        "identical": compared["identical"],
        "divergence": compared["divergence"],
    }


def _drafter_path(heads: Any) -> str | None:
    """Where heads draft: in C, or in torch and why; None without heads."""
    if heads is None:
        return None
    return "native" if heads.why_not_native is None else f"torch: {heads.why_not_native}"


def _target_line(target: dict[str, Any]) -> str:
    if not target["ready"]:
        return f"{target['name']}: fetched at first use"
    return (
        f"{target['name']}: {target['family']}, {target['num_layers']} layers, hidden size {target['hidden_size']}, "
        f"{target['vocab_size']} tokens, context {target['max_positions']}, {target['megabytes']} MB"
    )


def _text(report: dict[str, Any]) -> str:
    lines = ["versions    " + ", ".join(f"{name} {version}" for name, version in report["versions"].items())]
    machine = report["machine"]
    lines.append(
        f"machine     {machine['processor']} ({machine['instruction_set']}), {machine['torch_threads']} threads"
    )
    if "accelerator" in machine:
        lines.append(f"            {machine['accelerator']}")
    lines.append(f"cache       {report['cache_folder']}")
    lines.append("target      " + _target_line(report["target"]))
    for drafter in report["drafters"]:
        lines.append(
            f"drafter     {drafter['name']} ({drafter['folder']}): {drafter['num_heads']} heads, draft vocabulary "
            f"{drafter['draft_vocab'] or 'full'}, {drafter['megabytes']} MB"
        )
    if not report["drafters"]:
        lines.append("drafter     none shipped")
    lines.append(f"tree        {report['default_tree']} by default")
    if "check" in report:
        check = report["check"]
        verdict = "the same tokens as plain decoding" if check["identical"] else f"DIFFERENT: {check['divergence']}"
        tau = "" if check["tau"] is None else f", {check['tau']:.2f} tokens per target forward"
        lines.append(f"check       {check['drafter']}: {verdict}{tau}")
        why = check["why_stock"] or check["why_not_captured"] or check["why_not_native"]
        reason = f": {why}" if why else ""
        lines.append(f"path        {check['path']}{reason}")
        if check["drafter_path"]:
            lines.append(f"drafting    {check['drafter_path']}")
    return "\n".join(lines)
