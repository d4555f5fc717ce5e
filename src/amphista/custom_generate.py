"""`model.generate(..., custom_generate=FOLDER)` of transformers, on the user's own loaded model.

`amphista dev export transformers FOLDER` writes the folder; its one line of code calls `generate` below. The tokens are
those of plain decoding: greedy as transformers' own, sampled by our keyed noise.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amphista.engine.batch import Batch, Job
from amphista.engine.model_defaults import ids_of, settings_of
from amphista.engine.params import SamplingParams
from amphista.errors import RequestError, TargetError
from amphista.llm import LLM, choose_drafter
from amphista.target.exactness import check_exactness
from amphista.target.loading import ModelSource, load_text
from amphista.target.target import Target
from amphista.target.text import Text

KEPT = "_amphista"  # the attribute of a model that holds what was made for it
UNSUPPORTED = (  # settings of a generation configuration that `settings_of` does not look at
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_hidden_states",
    "output_attentions",
    "max_time",
    "token_healing",
)
DEFAULT_MAX_LENGTH = 20  # new tokens, where nothing is said: as in transformers


def generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    streamer: Any = None,
    *,
    drafter: str | None = None,
    tree: str | int | None = None,
    fast: bool = True,
    seed: int | None = None,
    tokenizer: Any = None,
    **settings: Any,
) -> Tensor:
    """Decode prompts [B, T]; returns them with their answers [B, T + new], padded on the right.

    settings: those of a generation configuration, with its defaults, and attention_mask. drafter, tree: as for `load`.
    fast: decode on a prepared copy of the weights where the model qualifies. seed: of the first prompt's noise, those
    of the others follow; by default drawn from torch's generator. The model is put in evaluation mode and frozen.
    raises RequestError for whatever would change an answer and is not supported.
    """
    config = copy.deepcopy(model.generation_config)
    given = {} if generation_config is None else generation_config.to_dict()
    config.update(**{name: value for name, value in given.items() if value is not None})
    settings = config.update(**settings)
    ids, mask = settings.pop("input_ids", inputs), settings.pop("attention_mask", None)
    settings.pop("synced_gpus", None)
    _refuse(config, ids, settings)
    llm = _llm_of(model, drafter, tree, fast=fast, tokenizer=tokenizer)
    prompts = _without_padding(ids, mask, config)
    params = _params(config, ids.shape[1], llm.target, seed)
    answers = _streamed(llm, prompts, params, streamer) if streamer is not None else _batch(llm, prompts, params)
    return _with_padding(ids, answers, config)


def _refuse(config: Any, ids: Tensor | None, settings: dict[str, Any]) -> None:
    """Raise RequestError for arguments that are no settings, and for settings that ask for more than token ids."""
    names = [name for name, value in settings.items() if value is not None and value is not False and value != []]
    names += [name for name in UNSUPPORTED if getattr(config, name, None)]
    if names:
        raise _unsupported(names)
    if ids is None or ids.dim() != 2 or not ids.shape[1]:
        raise RequestError("expected input_ids of shape (prompts, tokens)")


def _unsupported(names: Sequence[str]) -> RequestError:
    return RequestError(f"not supported by amphista's generate: {', '.join(names)}; leave it out")


def _llm_of(model: Any, drafter: str | None, tree: str | int | None, *, fast: bool, tokenizer: Any) -> LLM:
    """What was made for this model, anew where its weights have changed since."""
    weights = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
    key = (drafter, tree, fast, id(tokenizer), weights)
    kept = model.__dict__.get(KEPT)
    if kept is None or kept[0] != key:
        name = model.config._name_or_path
        target = Target(model, _text(name, tokenizer), name=name or "the model")
        check_exactness(target)
        if fast:
            target.speed_up(native=True)
        kept = (key, LLM(target, choose_drafter(target, drafter), tree=tree))
        model.__dict__[KEPT] = kept
    llm: LLM = kept[1]
    return llm


def _text(name: str, tokenizer: Any) -> Text | None:
    """The tokenizer, or the one beside the model where that was loaded from: drafters know their target by it, too."""
    if tokenizer is not None or not name:
        return None if tokenizer is None else Text(tokenizer)
    try:
        return load_text(ModelSource(name, name, {"local_files_only": True}))
    except TargetError:
        return None


def _params(config: Any, num_columns: int, target: Target, seed: int | None) -> SamplingParams:
    """The settings of a generation configuration, end tokens and lengths included."""
    settings, left_out = settings_of(config)
    left_out = [name for name in left_out if name != "min_length"]  # of prompt and answer: worked out below
    if left_out:
        raise _unsupported(left_out)
    if "max_new_tokens" not in settings:
        longest = config.max_length
        settings["max_new_tokens"] = DEFAULT_MAX_LENGTH if longest is None else longest - num_columns
    if config.min_new_tokens is None:
        settings["min_tokens"] = max(0, (config.min_length or 0) - num_columns)
    if settings.get("stop") and settings.get("min_tokens"):
        raise _unsupported(["stop_strings with a least length"])  # there they may end an answer before it, here not
    ends = [end for end in ids_of(config.eos_token_id) if end >= 0]  # -1: none
    if set(ends) != target.eos_ids:
        settings |= {"ignore_eos": True, "stop_token_ids": ends}
    return SamplingParams(**settings, seed=int(torch.randint(2**53, ())) if seed is None else seed)


def _without_padding(ids: Tensor, mask: Tensor | None, config: Any) -> list[list[int]]:
    """Token ids of each prompt; without a mask, pad tokens that end nothing are padding, as in transformers."""
    pad = config.pad_token_id
    if mask is None:
        is_padding = pad is not None and pad not in ids_of(config.eos_token_id)
        mask = ids != pad if is_padding else torch.ones_like(ids)
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


def _with_padding(ids: Tensor, answers: Sequence[list[int]], config: Any) -> Tensor:
    pad = config.pad_token_id
    if pad is None:
        pad = 0 if config.eos_token_id is None else ids_of(config.eos_token_id)[0]
    longest = max(map(len, answers))
    return torch.cat([ids, ids.new_tensor([answer + [pad] * (longest - len(answer)) for answer in answers])], dim=1)


def _streamed(llm: LLM, prompts: list[list[int]], params: SamplingParams, streamer: Any) -> list[list[int]]:
    if len(prompts) > 1:
        raise RequestError("a streamer takes one prompt")
    streamer.put(torch.tensor(prompts[0]))
    stream = llm.stream_ids(prompts[0], params)
    for step in stream.steps():
        streamer.put(torch.tensor(step.token_ids))
    streamer.end()
    return [stream.answer.token_ids]


def _batch(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """All prompts together, each with a seed of its own."""
    jobs = [Job(ids, replace(params, seed=(params.seed or 0) + row), row) for row, ids in enumerate(prompts)]
    for job in jobs:
        llm.engine.check(job.prompt_ids, job.params)
    answers: dict[int, list[int]] = {}
    for finished in Batch[int](llm.engine, len(jobs)).run(jobs):
        if finished.error is not None:
            raise finished.error
        answers[finished.job.tag] = finished.sequence.output_ids
    return [answers[row] for row in range(len(jobs))]
