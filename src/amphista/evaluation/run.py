"""Questions x methods x repeats -> records. Methods are interleaved turn by turn, so that a drifting machine hits all.

A method that raises leaves a failed record and the run goes on. A killed run goes on where it stopped when its command
is given again; a folder that holds another run, or that another process writes to, is refused. Each method's second
turn follows its own first answer.
"""

from __future__ import annotations

import hashlib
import json
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from amphista import provenance
from amphista.engine.params import SamplingParams
from amphista.errors import AmphistaError, ConfigError, RequestError
from amphista.evaluation.lossless import first_divergence
from amphista.evaluation.methods import NONE, Method, MethodSpec, Ours, Settings, build_method, costs_of
from amphista.evaluation.questions import Question, QuestionSet
from amphista.evaluation.records import Record, RecordFile, read_groups
from amphista.evaluation.stock import StockGenerate
from amphista.evaluation.summary import RECORDS, RUN, SUMMARY, build_summary, take_samples
from amphista.files import Lock, check_same_run, read_json, write_json
from amphista.target.target import Target

Report = Callable[[int, int, str], None]
LOCK = ".lock"
WARM_UP_TOKENS = 8
TEMPLATE_TOKENS = 32  # around a message, more than those of the templates we know


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured and how. `params.seed` is the run's seed, 0 where it is None: the same run, the same answers.

    Each answer has a seed of its own made from it.
    """

    methods: tuple[MethodSpec, ...]
    params: SamplingParams
    settings: Settings = field(default_factory=Settings)
    repeats: int = 1
    system: str | None = None

    def __post_init__(self) -> None:
        if self.params.seed is None:
            object.__setattr__(self, "params", replace(self.params, seed=0))
        if self.repeats < 1:
            raise ConfigError(f"--repeats is {self.repeats}: expected at least 1")


class Evaluation:
    """One run in one folder, which it locks until `close` or the end of its `with` block.

    `records` are all of it once `run` has ended.
    """

    def __init__(self, target: Target, questions: QuestionSet, config: EvaluationConfig, out: Path) -> None:
        if target.text is None:
            raise ConfigError("this target was loaded without a tokenizer: questions cannot be asked")
        self.target, self.text, self.questions, self.config = target, target.text, questions, config
        self.names = [spec.name for spec in config.methods]
        self.methods: dict[str, Method] = {
            spec.name: build_method(spec, target, config.settings) for spec in config.methods
        }
        self.records: list[Record] = []
        self._out = out
        busy = f"another process is evaluating into {out}: wait for its end or give another --out"
        self._lock = Lock(out / LOCK, busy)
        try:
            self._open(out)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.release()

    def __enter__(self) -> Evaluation:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    # -- the run's folder -----------------------------------------------------------------------------------------

    def _open(self, out: Path) -> None:
        """Begin a run, or take up what one with the very same settings has left."""
        settings = json.loads(json.dumps(self._settings()))  # as it will be read back: tuples are lists there
        costs = {name: costs_of(method) for name, method in self.methods.items()}
        environment = provenance.record() | {"costs": {name: known for name, known in costs.items() if known}}
        if (out / RUN).exists():
            self.run_record = read_json(out / RUN)
            check_same_run(f"{out} holds another run", self.run_record.get("settings", {}), settings)
            if (out / RECORDS).exists():
                self.records = read_groups(out / RECORDS, self.names)
            if self.records and len(self.records) < self.num_records:
                self.run_record.setdefault("resumed", []).append(environment | {"after": len(self.records)})
        elif (out / RECORDS).exists():
            raise ConfigError(f"{out} holds {RECORDS} but no {RUN}: give another --out")
        else:
            self.run_record = {"settings": settings, **environment}
        write_json(out / RUN, self.run_record)
        self._file = RecordFile(out / RECORDS, self.records)

    def _settings(self) -> dict[str, Any]:
        """Everything that decides tokens or counting; two runs with equal settings may share a folder."""
        return {
            "target": self.target.name,
            "target_fingerprint": asdict(self.target.fingerprint),
            "dtype": self.target.type_name,
            "device": str(self.target.device),
            "path": self.target.path,
            "questions": {
                "name": self.questions.name,
                "count": len(self.questions.questions),
                "full_size": self.questions.full_size,
                "sha256": self.questions.sha256,
            },
            "methods": {name: method.settings for name, method in self.methods.items()},
            "params": asdict(self.config.params),
            "repeats": self.config.repeats,
            "system": self.config.system,
        }

    @property
    def num_records(self) -> int:
        """Records of a whole run."""
        turns = sum(len(question.turns) for question in self.questions.questions)
        return turns * len(self.methods) * self.config.repeats

    # -- measuring ------------------------------------------------------------------------------------------------

    def run(self, report: Report | None = None) -> list[Record]:
        """Measure what is missing; every group of records is on disk before the next one begins."""
        done = {record.group for record in self.records}
        if len(self.records) < self.num_records:
            self._warm_up()
        for group in self._groups(done):
            self._file.append(group)
            self.records += group
            if report is not None:
                failed = sum(record.failed for record in self.records)
                text = f"{group[0].category} {group[0].id}" + (f", {failed} failed" if failed else "")
                report(len(self.records), self.num_records, text)
        return self.records

    def finish(self) -> dict[str, Any]:
        """The summary of the whole run, written to its folder."""
        samples = take_samples(self.records, self.names, self.text)
        summary = build_summary(self.run_record, self.records, samples)
        write_json(self._out / SUMMARY, summary)
        return summary

    def _warm_up(self) -> None:
        """Unmeasured. A method that crashes here will crash again where it counts."""
        if self.target.is_static:
            num_rows = self._most_rows()
            for method in self.methods.values():
                if isinstance(method, Ours):
                    method.prepare(num_rows)
        question = self.questions.questions[0]
        params = replace(self.config.params, max_new_tokens=min(WARM_UP_TOKENS, self.config.params.max_new_tokens))
        for name, conversation in self._new_conversations(question).items():
            self._answer(name, question, 0, conversation, params)

    def _most_rows(self) -> int:
        """Of the longest conversation, its answers as long as they may be, and what a template writes around each."""
        longest = 0
        for question in self.questions.questions:
            said = [message["content"] for message in question.history] + list(question.turns)
            tokens = sum(len(self.text.encode(text)) + TEMPLATE_TOKENS for text in said)
            longest = max(longest, tokens + len(question.turns) * self.config.params.max_new_tokens)
        return longest

    def _groups(self, done: set[tuple[int, str, int]]) -> Iterator[list[Record]]:
        for repeat in range(self.config.repeats):
            for question in self.questions.questions:
                conversations = self._new_conversations(question)
                for turn in range(len(question.turns)):
                    if (repeat, str(question.id), turn) in done:
                        self._recall(conversations, repeat, question, turn)
                    else:
                        yield self._measure(question, repeat, turn, conversations)

    def _new_conversations(self, question: Question) -> dict[str, list[dict[str, str]] | None]:
        system = [] if self.config.system is None else [{"role": "system", "content": self.config.system}]
        return {name: [*system, *question.history] for name in self.names}

    def _recall(self, conversations: dict[str, Any], repeat: int, question: Question, turn: int) -> None:
        """Put the recorded answers of a turn that need not be measured again into the conversations."""
        for record in self.records:
            if record.group == (repeat, str(question.id), turn):
                conversations[record.method] = _next(conversations[record.method], question, turn, record)

    def _measure(self, question: Question, repeat: int, turn: int, conversations: dict[str, Any]) -> list[Record]:
        seed = answer_seed(self.config.params.seed or 0, question.id, turn, repeat)
        params = replace(self.config.params, seed=seed)
        first = self.questions.questions.index(question) + turn + repeat  # each method leads in its turn
        order = [self.names[(first + i) % len(self.names)] for i in range(len(self.names))]
        found: dict[str, Record] = {}
        prompts: dict[str, list[int]] = {}
        for name in order:
            outcome, prompts[name] = self._answer(name, question, turn, conversations[name], params)
            found[name] = Record(
                id=str(question.id),
                category=question.category,
                task=question.task,
                turn=turn,
                repeat=repeat,
                method=name,
                seed=seed,
                num_prompt_tokens=len(prompts[name]),
                **outcome,
            )
            conversations[name] = _next(conversations[name], question, turn, found[name])
        return [self._compared(found[name], found[NONE], prompts, params) for name in self.names]

    def _answer(
        self,
        name: str,
        question: Question,
        turn: int,
        conversation: list[dict[str, str]] | None,
        params: SamplingParams,
    ) -> tuple[dict[str, Any], list[int]]:
        """The measured fields and the prompt; what a method raises becomes the field `error`."""
        prompt_ids: list[int] = []
        try:
            if conversation is None:
                raise RequestError("the turn before failed")
            prompt_ids = self._prompt_ids([*conversation, {"role": "user", "content": question.turns[turn]}])
            outcome = self.methods[name].run(prompt_ids, params)
        except Exception as error:  # whatever a method raises is its result; interrupts still end the run
            return {"error": _described(error)}, prompt_ids
        return outcome, prompt_ids

    def _prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        if self.text.has_chat_template:
            prompt_ids = self.text.render(messages)
        elif len(messages) == 1:
            prompt_ids = self.text.encode(messages[0]["content"])
        else:
            raise RequestError("this question needs a conversation, but the target has no chat template")
        limit = self.target.spec.max_positions
        if len(prompt_ids) > limit:
            raise RequestError(f"the prompt has {len(prompt_ids)} tokens, but the target's context holds {limit}")
        return prompt_ids

    def _compared(self, record: Record, plain: Record, prompts: dict[str, list[int]], params: SamplingParams) -> Record:
        """Same tokens as `none`? A failed answer has none. Stock sampling draws its own noise, so only its greedy
        answers can be compared."""
        own_noise = isinstance(self.methods[record.method], StockGenerate) and not params.is_greedy
        if plain.failed or record.method == NONE or own_noise:
            return record
        if record.failed:
            return replace(record, matches=False)
        prompt_ids = prompts[record.method]
        if prompt_ids != prompts[NONE]:
            return replace(record, matches=False, divergence={"position": 0, "margin": None, "earlier_turn": True})
        found = first_divergence(self.target, prompt_ids, params, record.token_ids, plain.token_ids)
        if found is None:
            return replace(record, matches=True)
        margin = found.margin if math.isfinite(found.margin) else None
        return replace(record, matches=False, divergence={"position": found.position, "margin": margin})


def _next(
    conversation: list[dict[str, str]] | None, question: Question, turn: int, record: Record
) -> list[dict[str, str]] | None:
    """The conversation behind an answered turn; None once a turn failed: nothing can follow."""
    if conversation is None or record.failed:
        return None
    return [
        *conversation,
        {"role": "user", "content": question.turns[turn]},
        {"role": "assistant", "content": record.text},
    ]


def answer_seed(seed: int, question_id: str | int, turn: int, repeat: int) -> int:
    """64 bits for one answer, the same for every method, unrelated between answers and independent of their order."""
    key = f"{seed}\n{question_id}\n{turn}\n{repeat}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def _described(error: Exception) -> str:
    """One line: what was raised, and where if it is not one of our own sentences."""
    sentence = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, AmphistaError):
        return sentence
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {sentence}{place}"
