"""Slow and obvious: decode without a cache, one full forward of the stock model per token, plain Python choices."""

from __future__ import annotations

import math

import torch

from amphista.accept.draw import gumbel_noise


@torch.no_grad()
def decode_plainly(model, prompt_ids, params, eos_ids=()):
    """The output ids of an autoregressive decoding, end token included."""
    ids = list(prompt_ids)
    for _ in range(params.max_new_tokens):
        if len(ids) > model.config.max_position_embeddings:
            break
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().tolist()
        ids.append(choose_plainly(logits, ids, params, len(prompt_ids), eos_ids))
        if ids[-1] in eos_ids:
            break
    return ids[len(prompt_ids) :]


def choose_plainly(logits, ids, params, num_prompt=0, end_ids=()):
    """Bias, penalties, bans, temperature, top-k, top-p, min-p, noise: one token, with lists and loops."""
    scores = list(logits)
    for token, added in params.logit_bias.items():
        scores[token] += added
    if params.repetition_penalty != 1:
        for token in set(ids):
            scores[token] = (
                scores[token] * params.repetition_penalty
                if scores[token] < 0
                else scores[token] / params.repetition_penalty
            )
    for token in ids[num_prompt:]:
        scores[token] -= params.frequency_penalty
    for token in set(ids[num_prompt:]):
        scores[token] -= params.presence_penalty
    kept_back = end_ids if len(ids) - num_prompt < params.min_tokens else ()
    for token in (*params.suppress_tokens, *kept_back):
        scores[token] = -math.inf
    if params.temperature == 0:
        return max(range(len(scores)), key=lambda token: scores[token])
    scores = [score / params.temperature for score in scores]
    alive = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if params.top_k:
        limit = scores[alive[min(params.top_k, len(alive)) - 1]]
        alive = [token for token in alive if scores[token] >= limit]
    if params.top_p < 1:
        total, kept, before = sum(math.exp(scores[t] - scores[alive[0]]) for t in alive), [], 0.0
        for token in alive:
            if before >= params.top_p * total:
                break
            kept.append(token)
            before += math.exp(scores[token] - scores[alive[0]])
        alive = kept
    if params.min_p > 0:
        alive = [t for t in alive if math.exp(scores[t] - scores[alive[0]]) >= params.min_p]
    noise = gumbel_noise(params.seed, len(ids), len(scores))
    return max(alive, key=lambda token: scores[token] + noise[token])
