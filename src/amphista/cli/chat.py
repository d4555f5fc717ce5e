"""amphista chat: a conversation on kept caches, streamed; Ctrl-C ends the answer, not the chat.

amphista chat
amphista chat --temperature 0.7 --system "You answer in one sentence."
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from amphista.cli import options
from amphista.target import DEFAULT_TARGET

if TYPE_CHECKING:
    from amphista.llm import Stream

HELP = "/reset starts over, /quit or Ctrl-D leaves, Ctrl-C ends an answer."


def chat(
    target: options.Target = DEFAULT_TARGET,
    drafter: options.Drafter = None,
    allow_other_target: options.AllowOtherTarget = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    fast: options.Fast = True,
    tree: options.Tree = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    system: options.System = None,
) -> None:
    """Talk to the target; each answer shows its speed and tokens per forward."""
    from amphista.errors import RequestError
    from amphista.llm import load

    params = options.sampling_params(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    llm = load(target, drafter, tree=tree, device=device, dtype=dtype, fast=fast, allow_other_target=allow_other_target)
    conversation = llm.conversation(system)
    print(f"{llm.target.name} with drafter {llm.drafter.name}. {HELP}", file=sys.stderr)
    for line in _lines():
        if line == "/reset":
            conversation = llm.conversation(system)
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line.strip():
            try:
                stream = conversation.stream(line, params=params)
            except RequestError as error:  # a full context ends the turn, not the chat
                print(f"amphista: {error} (/reset starts over)", file=sys.stderr)
                continue
            except KeyboardInterrupt:  # while the prompt was read: what is cached stays whole, the message is dropped
                print("  [interrupted before the answer]", file=sys.stderr)
                continue
            conversation.close_turn(_show(stream))


def _lines() -> Iterator[str]:
    """What the user types, until Ctrl-D or /quit; Ctrl-C at the prompt leaves as well."""
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if line.strip() in ("/quit", "/exit"):
            return
        yield line


def _show(stream: Stream) -> str:
    """Print an answer as it comes; returns its text, whole or up to Ctrl-C."""
    pieces = []
    with _interrupt_flag() as interrupted:
        for result in stream.steps():
            pieces.append(result.text)
            print(result.text, end="", flush=True)
            if interrupted:
                break
    stats = stream.stats
    tau = "" if stats.tau is None else f", {stats.tau:.2f} tokens per forward"
    speed = f"{stats.tokens_per_second:.1f} tokens/s" if stats.tokens_per_second else ""
    print()
    print(f"  [{stats.num_tokens} tokens, {speed}{tau}{', interrupted' if interrupted else ''}]", file=sys.stderr)
    return "".join(pieces)


@contextmanager
def _interrupt_flag() -> Iterator[list[bool]]:
    """Turn Ctrl-C into a flag that is read between steps, so that caches are never left half-written."""
    raised: list[bool] = []

    def remember(signum: int, frame: FrameType | None) -> None:
        raised.append(True)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield raised
    finally:
        signal.signal(signal.SIGINT, before)
