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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from amphista import provenance
from amphista.engine.params import SamplingParams
from amphista.errors import AmphistaError, ConfigError, RequestError, first_line
from amphista.evaluation.lossless import first_divergence
from amphista.evaluation.methods import HF, NONE, Method, MethodSettings, MethodSpec, Ours, build_method, costs_of
from amphista.evaluation.questions import Question, QuestionSet
from amphista.evaluation.records import Record, RecordFile, read_groups
from amphista.evaluation.stock import StockGenerate
from amphista.evaluation.summary import RECORDS, RUN, SUMMARY, build_summary, take_samples
from amphista.files import Lock, check_same_run, read_json, write_json
from amphista.target.target import Target

Report = Callable[[int, int, str], None]
Conversation = list[dict[str, str]] | None  # None once a turn has failed
Asked = tuple[Question, dict[str, Conversation]]  # with the conversation of each method
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
    settings: MethodSettings = field(default_factory=MethodSettings)
    repeats: int = 1
    system: str | None = None
    batch_size: int = 1  # questions answered together; of more than one, only our own engine is measured

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size is {self.batch_size}: expected at least 1")
        if self.batch_size > 1 and any(spec.kind.startswith(HF) for spec in self.methods):
            raise ConfigError("stock decoding answers one question at a time: leave out --batch-size or the hf methods")
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
        environment = provenance.record() | {
            "costs": {name: known for name, known in costs.items() if known},
            "drafters": {
                s.name: provenance.shortened(str(s.drafter))
                for s in self.config.methods
                if s.drafter not in (None, s.name)
            },
        }
        if (out / RUN).exists():
            self.run_record = read_json(out / RUN)
            for form in (_asked, dict):  # what a user set before all that follows from it
                check_same_run(f"{out} holds another run", form(self.run_record.get("settings", {})), form(settings))
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
            "batch_size": self.config.batch_size,
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
            self._answers(name, [(question, conversation)], 0, [params])

    def _most_rows(self) -> int:
        """Of the longest conversation, its answers as long as they may be, and what a template writes around each."""
        longest = 0
        for question in self.questions.questions:
            texts = [message["content"] for message in question.history] + list(question.turns)
            tokens = sum(len(self.text.encode(text)) + TEMPLATE_TOKENS for text in texts)
            longest = max(longest, tokens + len(question.turns) * self.config.params.max_new_tokens)
        return longest

    def _groups(self, done: set[tuple[int, str, int]]) -> Iterator[list[Record]]:
        questions, size = self.questions.questions, self.config.batch_size
        for repeat in range(self.config.repeats):
            for start in range(0, len(questions), size):
                together = [(one, self._new_conversations(one)) for one in questions[start : start + size]]
                for turn in range(max(len(one.turns) for one, _ in together)):
                    asked = [(one, said) for one, said in together if turn < len(one.turns)]
                    missing = [pair for pair in asked if (repeat, str(pair[0].id), turn) not in done]
                    for question, conversations in asked:
                        if (repeat, str(question.id), turn) in done:
                            self._restore(conversations, repeat, question, turn)
                    if missing:
                        yield from self._measure(missing, repeat, turn)

    def _new_conversations(self, question: Question) -> dict[str, Conversation]:
        system = [] if self.config.system is None else [{"role": "system", "content": self.config.system}]
        return {name: [*system, *question.history] for name in self.names}

    def _restore(self, conversations: dict[str, Any], repeat: int, question: Question, turn: int) -> None:
        """Put the recorded answers of a turn that need not be measured again into the conversations."""
        for record in self.records:
            if record.group == (repeat, str(question.id), turn):
                conversations[record.method] = _next(conversations[record.method], question, turn, record)

    def _measure(self, asked: Sequence[Asked], repeat: int, turn: int) -> Iterator[list[Record]]:
        """One turn of some questions, by each method in turn; a group of records for each question."""
        first = self.questions.questions.index(asked[0][0]) + turn + repeat  # each method leads in its turn
        order = [self.names[(first + i) % len(self.names)] for i in range(len(self.names))]
        seeds = [answer_seed(self.config.params.seed or 0, question.id, turn, repeat) for question, _ in asked]
        params = [replace(self.config.params, seed=seed) for seed in seeds]
        found: list[dict[str, Record]] = [{} for _ in asked]
        prompts: list[dict[str, list[int]]] = [{} for _ in asked]
        for name in order:
            answers = self._answers(name, [(one, said[name]) for one, said in asked], turn, params)
            for place, (outcome, prompt_ids) in enumerate(answers):
                question, conversations = asked[place]
                prompts[place][name] = prompt_ids
                found[place][name] = Record(
                    id=str(question.id),
                    category=question.category,
                    task=question.task,
                    turn=turn,
                    repeat=repeat,
                    method=name,
                    seed=seeds[place],
                    num_prompt_tokens=len(prompt_ids),
                    **outcome,
                )
                conversations[name] = _next(conversations[name], question, turn, found[place][name])
        for records, ids, one in zip(found, prompts, params, strict=True):
            yield [self._compared(records[name], records[NONE], ids, one) for name in self.names]

    def _answers(
        self, name: str, asked: Sequence[tuple[Question, Conversation]], turn: int, params: Sequence[SamplingParams]
    ) -> list[tuple[dict[str, Any], list[int]]]:
        """The measured fields and the prompt of each; what a method raises becomes the field `error`."""
        prompts = [self._prompt_of(question, turn, conversation) for question, conversation in asked]
        able = [place for place, prompt in enumerate(prompts) if not isinstance(prompt, Exception)]
        outcomes: dict[int, Any] = {place: prompt for place, prompt in enumerate(prompts) if place not in able}
        jobs = [(prompt, params[place]) for place in able if not isinstance(prompt := prompts[place], Exception)]
        try:
            method = self.methods[name]
            if self.config.batch_size == 1 or not isinstance(method, Ours):
                ran: Sequence[Any] = [method.run(*job) for job in jobs]
            else:
                ran = method.run_together(jobs, self.config.batch_size)
        except Exception as error:  # whatever a method raises is its result; interrupts still end the run
            ran = [error] * len(jobs)
        outcomes |= dict(zip(able, ran, strict=True))
        found = []
        for place, prompt in enumerate(prompts):
            outcome = outcomes[place]
            if isinstance(outcome, BaseException):
                outcome = {"error": _described(outcome)}
            found.append((outcome, [] if isinstance(prompt, Exception) else prompt))
        return found

    def _prompt_of(self, question: Question, turn: int, conversation: Conversation) -> list[int] | Exception:
        try:
            if conversation is None:
                raise RequestError("the turn before failed")
            return self._prompt_ids([*conversation, {"role": "user", "content": question.turns[turn]}])
        except Exception as error:
            return error

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


def _next(conversation: Conversation, question: Question, turn: int, record: Record) -> Conversation:
    """The conversation behind an answered turn; None once a turn failed: nothing can follow."""
    if conversation is None or record.failed:
        return None
    return [
        *conversation,
        {"role": "user", "content": question.turns[turn]},
        {"role": "assistant", "content": record.text},
    ]


def _asked(settings: dict[str, Any]) -> dict[str, Any]:
    """What a user set of a run, each in a word or two."""
    questions, methods = settings.get("questions", {}), settings.get("methods", {})
    return {name: settings.get(name) for name in ("target", "dtype", "params", "repeats", "system", "batch_size")} | {
        "questions": " of ".join(str(questions.get(name)) for name in ("count", "full_size", "name")),
        "methods": ", ".join(f"{name} ({settings.get('tree', '')})" for name, settings in methods.items()),
    }


def answer_seed(seed: int, question_id: str | int, turn: int, repeat: int) -> int:
    """64 bits for one answer, the same for every method, unrelated between answers and independent of their order."""
    key = f"{seed}\n{question_id}\n{turn}\n{repeat}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def _described(error: BaseException) -> str:
    """One line: what was raised, and where if it is not one of our own sentences."""
    sentence = first_line(error) if str(error).strip() else ""
    if isinstance(error, AmphistaError):
        return sentence
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {sentence}{place}"
