"""Self-distillation: the frozen target answers prompts, and its answers become training rows.

    amphista distill --prompts prompts.jsonl.gz --out runs/answers

Each conversation is greedy or sampled by a coin of its own; all chance is keyed by (run seed, conversation id, turn),
so no answer's chance depends on the batch, on how processes share the work, or on where a killed run was resumed.
The target answers each user turn in order, its own earlier answers before its eyes; a conversation ends with the first
answer that did not end by itself (token limit, loop), because no one would go on from there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amphista import provenance
from amphista.accept.sampling import Sampling
from amphista.drafter.proposer import Proposer
from amphista.engine.batch import Batch, Finished, Job
from amphista.engine.costs import costs_for
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.slot_batch import SlotBatch
from amphista.engine.slots import has_slots
from amphista.engine.step import Engine
from amphista.errors import ConfigError, RequestError, TargetError
from amphista.files import write_json
from amphista.target.target import Target
from amphista.target.text import Text
from amphista.train.conversations import PromptSet
from amphista.train.distilled import Answered, AnswerFile, read_answered, token_rows
from amphista.tree.grow import AutoGrower

WINDOW_BATCHES = 16  # conversations of this many batches are sorted by prompt length together
REPORT_SECONDS = 5.0
ANSWERABLE = ("system", "developer", "user")

OnStep = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """One distillation. `prompts`: files or data sets. `limit`: only the first so many conversations.

    max_len: a prompt (all turns before an answer) and `max_new_tokens` must fit into it, and into the target's context.
    sampled_share: of the conversations, at `temperature`; the others are greedy.
    """

    prompts: tuple[str, ...] = ()
    limit: int | None = None
    max_new_tokens: int = 512
    max_len: int = 2048
    temperature: float = 0.7
    sampled_share: float = 0.5
    cut_loops: bool = True
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        Sampling(temperature=self.temperature, seed=self.seed)
        if not 0 <= self.sampled_share <= 1:
            raise ConfigError(f"sampled_share is {self.sampled_share}: expected a number from 0 to 1")
        if self.sampled_share > 0 and self.temperature == 0:
            raise ConfigError("temperature is 0, which is greedy: give a higher one, or a sampled_share of 0")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ConfigError("max_new_tokens and batch_size must be at least 1")
        if self.max_len <= self.max_new_tokens:
            raise ConfigError(f"max_len is {self.max_len}: expected more than max_new_tokens ({self.max_new_tokens})")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}: expected at least 1")

    def answers_alike(self) -> dict[str, Any]:
        """The settings that decide what is answered; a resumed run must share them."""
        names = ("max_new_tokens", "max_len", "temperature", "sampled_share", "cut_loops", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Share:
    """Which of `count` processes this one is: it takes every count-th conversation."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """`i/n`, i from 0; raises ConfigError."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ConfigError(f"--shard {text!r}: expected i/n with i from 0 to n - 1, for example 0/4")
        return cls(int(index), int(count))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Share:
        """What `torchrun` and `accelerate launch` tell each process (RANK of WORLD_SIZE); alone without them."""
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return cls()
        return cls.parse(f"{environment['RANK']}/{environment['WORLD_SIZE']}")


def chance(seed: int, *parts: str | int) -> int:
    """64 bits that depend on nothing but the run's seed and what they are for."""
    key = json.dumps([seed, *parts])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


class Dialogue:
    """One conversation while the target answers it."""

    def __init__(
        self, name: str, messages: Sequence[dict[str, str]], text: Text, config: DistillConfig, max_prompt_len: int
    ) -> None:
        """messages: what people say, in order."""
        self.id = name
        self._text, self._config, self._max_prompt_len = text, config, max_prompt_len
        self._to_come = list(messages)
        self._history: list[dict[str, str]] = []
        self._rows: list[tuple[list[int], list[int]]] = []
        self._finish: list[str] = []
        self._skipped: str | None = None
        is_sampled = chance(config.seed, self.id, "sampled?") / 2**64 < config.sampled_share
        self._temperature = config.temperature if is_sampled else 0.0

    def next_job(self) -> Job[Dialogue] | None:
        """The next user turn, ready to be answered; None when the conversation has ended."""
        if self._finish and self._finish[-1] != FinishReason.STOP:
            return None
        if not self._listen():
            return None
        try:
            prompt_ids = self._text.render(self._history)
        except RequestError as error:
            self._stop(str(error))
            return None
        if len(prompt_ids) > self._max_prompt_len:
            self._stop(f"longer than {self._max_prompt_len} tokens")
            return None
        params = SamplingParams(
            temperature=self._temperature,
            max_new_tokens=self._config.max_new_tokens,
            seed=chance(self._config.seed, self.id, len(self._finish)),
        )
        return Job(prompt_ids, params, self, cut_loops=self._config.cut_loops, namespace=self.id)

    def _listen(self) -> bool:
        """Take what is said up to the next user turn into the history; whether there is one that can be answered."""
        while self._to_come:
            message = self._to_come.pop(0)
            if message["role"] not in ANSWERABLE:
                self._stop(f"has a turn of the role {message['role']!r}")
                return False
            self._history.append(message)
            if message["role"] == "user":
                return True
        return False

    def _stop(self, reason: str) -> None:
        """End here; a conversation without any answer is skipped."""
        if not self._finish:
            self._skipped = reason

    def take(self, prompt_ids: list[int], output_ids: list[int], reason: FinishReason) -> None:
        """Add an answer to the row it continues; where the template has rewritten what came before, to a new one."""
        ids, marks = self._rows.pop() if self._rows else ([], [])
        if prompt_ids[: len(ids)] != ids:
            self._rows.append((ids, marks))
            ids, marks = [], []
        number = max(marks, default=0) + 1
        unmarked = [0] * (len(prompt_ids) - len(ids))
        self._rows.append((prompt_ids + output_ids, marks + unmarked + [number] * len(output_ids)))
        self._finish.append(reason.value)
        self._history.append({"role": "assistant", "content": self._text.decode(output_ids)})

    def answered(self) -> Answered:
        """What is kept of it; rows are named as `prompts.read_rows` would name them."""
        rows = token_rows(self.id, self._rows, self._temperature)
        return Answered(self.id, tuple(rows), tuple(self._finish), self._skipped)


class Distiller:
    """One process of a run: made from a target, a config and prompts, writes into a folder."""

    def __init__(
        self,
        target: Target,
        config: DistillConfig,
        prompts: PromptSet,
        out: Path,
        *,
        proposer: Proposer | None = None,
        share: Share | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        """proposer: what drafts answers, where that pays; it changes none of them."""
        if target.text is None or not target.text.has_chat_template:
            raise TargetError(f"{target.name} has no chat template: conversations cannot be held with it")
        self.target, self.config, self.out, self.on_step = target, config, out, on_step
        self._text, self._prompts, self._share = target.text, prompts, share or Share()
        self._max_prompt_len = min(config.max_len, target.spec.max_positions) - config.max_new_tokens
        if self._max_prompt_len < 1:
            raise ConfigError(
                f"max_new_tokens is {config.max_new_tokens}, but the target's context holds "
                f"{target.spec.max_positions} tokens: give fewer"
            )
        self._mine = list(prompts.conversations.items())[self._share.index :: self._share.count]
        self._batch = self._make_batch(proposer or Proposer())

    def _make_batch(self, proposer: Proposer) -> Batch[Dialogue] | SlotBatch[Dialogue]:
        """On a GPU slots, which decode plainly; elsewhere the engine, with drafts where they pay."""
        target, config = self.target, self.config
        if target.lean is not None and has_slots(target.lean):
            longest = min(config.max_len, target.spec.max_positions)
            return SlotBatch(target.lean, target.eos_ids, config.batch_size, longest)
        if proposer.heads is not None:
            proposer.heads.freeze(native=target.is_native)
        return Batch(Engine(target, proposer, AutoGrower(costs_for(target, proposer))), config.batch_size)

    def _answer(self, jobs: Iterator[Job[Dialogue]]) -> Iterator[object]:
        if isinstance(self._batch, SlotBatch):
            return self._batch.run(jobs, self._next)
        return self._batch.run(jobs, self._follow)

    def run(self) -> dict[str, Any]:
        """Answer what is not yet answered; returns the summary, also written to OUT/summary-<process>.json."""
        self._started = self._reported = time.perf_counter()
        with AnswerFile(self.out, self._share.index, self._run_record()) as self._file:
            to_do = [(name, messages) for name, messages in self._mine if name not in self._file.done]
            self._num_done = self._num_before = len(self._mine) - len(to_do)
            for _ in self._answer(self._jobs(to_do)):
                self._report()
        summary = self._summary()
        write_json(self.out / f"summary-{self._share.index}.json", summary)
        return summary

    def _jobs(self, to_do: Sequence[tuple[str, list[dict[str, str]]]]) -> Iterator[Job[Dialogue]]:
        """First turns, near-equal lengths together: a forward is as wide as its longest row. Slots read prompts of one
        length together by themselves, and wait for none that is not due."""
        window = 1 if isinstance(self._batch, SlotBatch) else self.config.batch_size * WINDOW_BATCHES
        for number, start in enumerate(range(0, len(to_do), window)):
            opened = []
            for name, messages in to_do[start : start + window]:
                dialogue = Dialogue(name, messages, self._text, self.config, self._max_prompt_len)
                job = dialogue.next_job()
                if job is None:
                    self._keep(dialogue)
                else:
                    opened.append(job)
            yield from sorted(opened, key=lambda one: len(one.prompt_ids), reverse=number % 2 == 1)

    def _follow(self, finished: Finished[Dialogue]) -> Job[Dialogue] | None:
        if finished.error is not None:
            raise finished.error
        assert finished.sequence.finish_reason is not None
        return self._next(finished.job, finished.sequence.output_ids, finished.sequence.finish_reason)

    def _next(self, job: Job[Dialogue], output_ids: list[int], reason: FinishReason) -> Job[Dialogue] | None:
        """Keep an answer; the next turn of its conversation."""
        dialogue = job.tag
        dialogue.take(job.prompt_ids, output_ids, reason)
        following = dialogue.next_job()
        if following is None:
            self._keep(dialogue)
        return following

    def _keep(self, dialogue: Dialogue) -> None:
        self._file.add(dialogue.answered())
        self._num_done += 1

    # -- what is said about a run ---------------------------------------------------------------------------------

    def _run_record(self) -> dict[str, Any]:
        template = self._text.tokenizer.chat_template
        config = asdict(self.config)
        config["prompts"] = list(self._prompts.sources)  # no one's folders
        identity = {
            **self.config.answers_alike(),
            "prompts": self._prompts.sources,
            "processes": self._share.count,
            "chat_template_sha256": hashlib.sha256(json.dumps(template).encode()).hexdigest(),
            "target": self.target.identity,
        }
        return {
            "identity": identity,
            "config": config,
            "target": Path(self.target.name).name,
            "path": self.target.path,
            "chat_template": template,
            "provenance": provenance.record(),
        }

    def _report(self) -> None:
        now = time.perf_counter()
        if self.on_step is None or now - self._reported < REPORT_SECONDS:
            return
        self._reported = now
        spent, left = now - self._started, len(self._mine) - self._num_done
        newly = self._num_done - self._num_before
        remaining = f", {left * spent / newly / 60:.0f} min left" if newly else ""
        self.on_step(self._num_done, len(self._mine), f"{self._batch.num_tokens / spent:.0f} tokens/s{remaining}")

    def _summary(self) -> dict[str, Any]:
        """All of this process's answers, and the pace of this call (prefills included, loading not)."""
        seconds = time.perf_counter() - self._started
        return totals(read_answered(self.out, self._share.index)) | {
            "left_out": self._prompts.left_out.record(),
            "decoded_tokens": self._batch.num_tokens,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(self._batch.num_tokens / seconds, 1),
        }


def totals(conversations: Sequence[Answered]) -> dict[str, Any]:
    """Counts over finished conversations."""
    answered = [one for one in conversations if one.skipped is None]
    return {
        "conversations": len(answered),
        "sampled": sum(1 for one in answered if one.temperature),
        "rows": sum(len(one.rows) for one in answered),
        "answers": sum(len(one.finish) for one in answered),
        "answer_tokens": sum(one.num_answer_tokens for one in answered),
        "finish": dict(sorted(Counter(reason for one in answered for reason in one.finish).items())),
        "skipped": dict(Counter(one.skipped for one in conversations if one.skipped is not None).most_common()),
    }
