"""amphista chat: a conversation on kept caches, streamed; Ctrl-C ends the answer, not the chat.

amphista chat
amphista chat --temperature 0.7 --system "You answer in one sentence."
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from amphista.cli import options

if TYPE_CHECKING:
    from amphista.engine.stream import Stream

HELP = "/reset starts over, /quit or Ctrl-D leaves, Ctrl-C ends an answer."
MAX_NEW_TOKENS = 512


@options.with_records
def chat(
    model: options.ModelOptions,
    sampling: options.SamplingOptions,
    system: options.System = None,
    template_arg: options.TemplateArgs = None,
) -> None:
    """Talk to the target; each answer shows its speed and tokens per forward."""
    from amphista.errors import RequestError

    checked = sampling.params()  # before minutes of loading
    template = options.template_kwargs(template_arg)
    llm = model.load(checked)
    params = llm.params(
        "model" if sampling.model_defaults else None, **{"max_new_tokens": MAX_NEW_TOKENS, **sampling.settings()}
    )
    conversation = llm.conversation(system, chat_template_kwargs=template)
    print(f"{llm.target.name} with drafter {llm.drafter.name}. {HELP}", file=sys.stderr)
    for line in _lines():
        if line == "/reset":
            conversation = llm.conversation(system, chat_template_kwargs=template)
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line.strip():
            try:
                _show(conversation.stream(line, params=params))
            except RequestError as error:  # a full context ends the turn, not the chat
                print(f"amphista: {error} (/reset starts over)", file=sys.stderr)


def _lines() -> Iterator[str]:
    """What the user types, until Ctrl-D or /quit; Ctrl-C at the prompt leaves as well."""
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt, RuntimeError):  # the last: standard input is closed
            print(file=sys.stderr)
            return
        if line.strip() in ("/quit", "/exit"):
            return
        yield line


def _show(stream: Stream) -> None:
    """Print an answer as it comes, whole or up to Ctrl-C: what had come then is the answer."""
    note = ""
    try:
        for piece in stream:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        note = ", interrupted"
    stream.close()
    stats = stream.stats
    tau = "" if stats.tau is None else f", {stats.tau:.2f} tokens per forward"
    speed = f"{stats.tokens_per_second:.1f} tokens/s" if stats.tokens_per_second else ""
    print()
    print(f"  [{stats.num_tokens} tokens, {speed}{tau}{note}]", file=sys.stderr)
