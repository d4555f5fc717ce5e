"""The command line as users meet it, on a tiny saved target: the contract of `generate`, chat, train, info, errors."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import typer
from rich.text import Text
from tokenizers import decoders

import amphista as amphista_package
from amphista import __version__
from amphista.cli import chat
from amphista.cli.app import app, main
from amphista.engine import costs
from amphista.engine import step as engine_step
from amphista.engine.step import Engine
from amphista.engine.timing import Asking, ForwardSeconds
from tests.tiny import byte_tokenizer, tiny_model

FIELDS = {
    "id",
    "turn",
    "target",
    "drafter",
    "prompt_tokens",
    "token_ids",
    "text",
    "num_tokens",
    "num_steps",
    "tau",
    "expected_tau",
    "seconds",
    "prefill_seconds",
    "tokens_per_second",
    "finish_reason",
    "seed",
}

LETTER_A = byte_tokenizer()("A")["input_ids"][0]


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def amphista(*arguments, stdin: str | None = ""):
    """Run the program's own `main` in this process (importing torch anew for each case would take minutes)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["amphista", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", None if stdin is None else io.StringIO(stdin)),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def records(*arguments, **options):
    result = amphista("generate", *arguments, "--json", **options)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def trained(target_folder, tmp_path_factory):
    """Amphista and Medusa, trained for a few steps through the command line."""
    folder = tmp_path_factory.mktemp("trained")
    rows = folder / "rows.jsonl"
    conversations = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}?"},
                {"role": "assistant", "content": f"Answer number {i} is good."},
            ]
        }
        for i in range(24)
    ]
    rows.write_text("".join(json.dumps(c) + "\n" for c in conversations))
    for kind in ("amphista", "medusa"):
        result = amphista(
            "train", "--target", target_folder, "--drafter", kind, "--data", rows, "--out", folder / kind,
            "--set", "optimizer.epochs=2", "--set", "data.validation_share=0.3", "--set", "model.num_heads=3", "--json",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["out"] == str(folder / kind / "last")
    return folder


def test_json_contract(target_folder, trained):
    one, two = records("Hi", "Ho", "--target", target_folder, "--drafter", trained / "amphista" / "last",
                       "--max-new-tokens", 9, "--seed", 7)  # fmt: skip
    assert set(one) == FIELDS
    assert (one["id"], two["id"], one["turn"]) == (0, 1, 0)
    assert one["drafter"] == "amphista" and one["seed"] == 7
    assert one["num_tokens"] == len(one["token_ids"]) <= 9
    assert one["tau"] == pytest.approx((one["num_tokens"] - 1) / one["num_steps"])
    assert 0 < one["prefill_seconds"] < one["seconds"]
    assert one["tokens_per_second"] == pytest.approx(one["num_tokens"] / one["seconds"])
    assert one["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("tree", [6, "auto"])
@pytest.mark.parametrize("drafter", ["amphista", "medusa", "none", "lookup", "amphista+lookup"])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_compare_says_identical(target_folder, trained, drafter, temperature, tree):
    kind, plus, beside = drafter.partition("+")
    path = drafter if drafter in ("none", "lookup") else f"{trained / kind / 'best'}{plus}{beside}"
    settings = ["--compare", "--temperature", temperature, "--max-new-tokens", 24, "--tree", tree]
    (record,) = records("Hello", "--target", target_folder, "--drafter", path, *settings)
    assert record["drafter"] == drafter and record["expected_tau"] >= 1
    assert set(record) == FIELDS | {"baseline", "identical", "speedup", "decode_speedup", "divergence"}
    assert record["identical"] is True and record["divergence"] is None
    assert record["baseline"]["token_ids"] == record["token_ids"] and record["baseline"]["drafter"] == "none"
    ratio = record["tokens_per_second"] / record["baseline"]["tokens_per_second"]
    assert record["speedup"] == pytest.approx(ratio)


def test_one_token_has_no_tau(target_folder):
    (record,) = records("Hello", "--target", target_folder, "--drafter", "none", "--max-new-tokens", 1)
    assert record["num_steps"] == 0 and record["num_tokens"] == 1
    assert record["tau"] is None and record["expected_tau"] is None


def test_standard_input_and_turns_and_output(target_folder, tmp_path):
    questions = tmp_path / "questions.jsonl"
    lines = [
        {"question_id": 81, "category": "x", "turns": ["First?", "Second?"]},
        {"id": "m", "messages": [{"role": "user", "content": "Hey"}]},
        {"prompt": "Plain"},
    ]
    questions.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out = tmp_path / "out.jsonl"
    got = records("-", "--prompts", questions, "--target", target_folder, "--max-new-tokens", 5, "--output", out,
                  stdin="From standard input")  # fmt: skip
    assert [(r["id"], r["turn"]) for r in got] == [(0, 0), (81, 0), (81, 1), ("m", 0), (3, 0)]
    assert [json.loads(line) for line in out.read_text().splitlines()] == got
    assert got[2]["prompt_tokens"] > got[1]["prompt_tokens"] + 5


def test_prompts_answered_together_have_the_tokens_of_each_alone(target_folder, tmp_path):
    questions, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": n, "turns": ["First?", "Second?"][: 1 + n % 2]} for n in range(4)]
    lines.append({"id": "long", "turns": ["x" * 300, "y" * 300]})  # its second turn does not fit any more
    questions.write_text("\n".join(map(json.dumps, lines)))
    settings = ["--prompts", questions, "--target", target_folder, "--max-new-tokens", 12, "--seed", 3,
                "--temperature", 1]  # fmt: skip
    alone = amphista("generate", *settings, "--json")
    result = amphista("generate", *settings, "--json", "--batch-size", 3, "--output", out)
    assert result.returncode == alone.returncode != 0 and "prompt long, turn 2" in result.stderr
    got, expected = ([json.loads(line) for line in one.stdout.splitlines()] for one in (result, alone))
    assert [(r["id"], r["turn"], r["token_ids"]) for r in got] == [
        (r["id"], r["turn"], r["token_ids"]) for r in expected
    ]
    assert len(got) == 7 and all(record["batch_size"] == 3 for record in got)
    assert [r["seed"] for r in got] == [r["seed"] for r in expected] == [3, 4, 4, 5, 6, 6, 7]  # a noise for each prompt
    assert len({tuple(r["token_ids"]) for r in got}) == 7
    refused = amphista("generate", *settings, "--batch-size", 2, "--compare")
    assert refused.returncode == 2 and "--compare" in refused.stderr


def test_stop_string_ends_the_text_before_and_the_tokens_behind_it(target_folder):
    settings = ["Hello", "--target", target_folder, "--max-new-tokens", 60, "--temperature", 1, "--seed", 3]
    (free,) = records(*settings)
    stop = next(char for char in free["text"][4:] if char.isascii() and char not in free["text"][:4])
    (stopped,) = records(*settings, "--stop", stop, "--stop", "never appears")
    assert stopped["text"] == free["text"][: free["text"].index(stop)]
    assert stopped["finish_reason"] == "stop"
    assert stopped["token_ids"] == free["token_ids"][: stopped["num_tokens"]]
    assert stopped["num_tokens"] < free["num_tokens"]


def test_trees_give_the_same_tokens(target_folder, trained, tmp_path):
    template = tmp_path / "tree.json"
    template.write_text('{"paths": [[0], [1], [0, 0], [0, 0, 0]]}')
    outputs = [
        records("Hello", "--target", target_folder, "--drafter", trained / "amphista" / "best", "--tree", tree,
                "--max-new-tokens", 16)[0]["token_ids"]
        for tree in ("chain", "1", "12", "static:9", template, "auto")
    ]  # fmt: skip
    assert outputs == [outputs[0]] * 6


def test_human_output_has_text_on_stdout_and_numbers_on_stderr(target_folder):
    result = amphista("generate", "Hello", "--target", target_folder, "--max-new-tokens", 6, "--compare")
    assert result.returncode == 0
    assert "tokens/s" in result.stderr and "the same tokens" in result.stderr
    assert "tokens/s" not in result.stdout and "1 of 1" not in result.stderr


def test_several_compared_answers_end_with_a_line_about_all(target_folder, tmp_path):
    settings = ["A", "Two", "Three", "--target", target_folder, "--max-new-tokens", 6, "--compare"]
    result = amphista("generate", *settings, "--output", tmp_path / "answers.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    took = [sum(one["seconds"] for one in some) for some in (answers, [one["baseline"] for one in answers])]
    last = result.stderr.strip().splitlines()[-1].strip()
    assert last == f"all 3 of 3 answers have the same tokens, {took[1] / took[0]:.2f}x the speed"
    assert "of 3 answers" not in amphista("generate", *settings, "--json").stderr


def test_missing_drafter_is_said(target_folder):
    result = amphista("generate", "Hello", "--target", target_folder, "--max-new-tokens", 2, "--json")
    assert "no drafter is shipped" in result.stderr
    assert json.loads(result.stdout)["drafter"] == "lookup"


BAD = {
    "empty prompt": (["generate", ""], "prompt 0 is empty"),
    "blank prompt": (["generate", "ok", "  "], "prompt 1 is empty"),
    "unknown target": (["generate", "x", "--target", "no-such-model"], "unknown target 'no-such-model'"),
    "unknown folder": (["generate", "x", "--target", "./nowhere"], "there is no folder './nowhere'"),
    "unknown path": (["generate", "x", "--target", "/nope/model"], "there is no folder '/nope/model'"),
    "unknown drafter": (
        ["generate", "x", "--target", "FOLDER", "--drafter", "nothing"],
        "unknown drafter 'nothing': expected none, lookup, a folder",
    ),
    "unknown drafter's folder": (
        ["generate", "x", "--target", "FOLDER", "--drafter", "./nope"],
        "there is no folder './nope'",
    ),
    "closed standard input": (["generate", "-"], "standard input is closed"),
    "bias of words": (["generate", "x", "--logit-bias", "foo"], "expected ID=NUMBER"),
    "bias of none": (["generate", "x", "--target", "FOLDER", "--logit-bias", "99999999=1"], "token id 99999999"),
    "no memory": (["serve", "--kv-gib", "0"], "--kv-gib is 0: expected GiB above 0"),
    "unknown drafter to train": (["train", "--out", "OUT", "--drafter", "nope"], "unknown drafter 'nope'"),
    "unknown setting of heads": (["train", "--out", "OUT", "--set", "model.num_head=3"], "did you mean 'num_heads'"),
    "heads in words": (["train", "--out", "OUT", "--set", "model.num_heads=three"], "model.num_heads is 'three'"),
    "on from another kind": (["train", "--out", "OUT", "--init", "medusa"], "give --drafter medusa"),
    "on from nothing": (["train", "--out", "OUT", "--init", "./nope"], "there is no folder './nope'"),
    "export of no drafter": (["dev", "export", "transformers", "OUT", "--drafter", "./nope"], "there is no folder"),
    "export of a word": (["dev", "export", "vllm", "OUT", "--drafter", "nothing"], "unknown drafter 'nothing'"),
    "export without heads": (["dev", "export", "vllm", "OUT", "--drafter", "lookup"], "vLLM takes heads alone"),
    "export of both": (["dev", "export", "vllm", "OUT", "--drafter", "amphista+lookup"], "vLLM takes heads alone"),
    "export of none shipped": (["dev", "export", "vllm", "OUT", "--drafter", "eagle"], "no eagle drafter is shipped"),
    "not shipped": (["generate", "x", "--target", "FOLDER", "--drafter", "amphista"], "no amphista drafter is shipped"),
    "tree of none": (["generate", "x", "--tree", "0"], "a tree of 0 nodes"),
    "tree of words": (["generate", "x", "--tree", "big"], "neither auto, chain"),
    "uncalibrated static tree": (
        ["generate", "x", "--target", "FOLDER", "--tree", "static:8"],
        "calibrated accuracies",
    ),
    "no tokens": (["generate", "x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    "top-p above 1": (["generate", "x", "--top-p", "1.5"], "top_p is 1.5"),
    "top-p of 0": (["generate", "x", "--top-p", "0"], "top_p is 0"),
    "min-p below 0": (["generate", "x", "--min-p", "-1"], "min_p is -1"),
    "top-k below -1": (["generate", "x", "--top-k", "-2"], "top_k is -2"),
    "negative temperature": (["generate", "x", "--temperature", "-1"], "temperature is -1"),
    "penalty of 0": (["generate", "x", "--repetition-penalty", "0"], "repetition_penalty is 0"),
    "negative seed": (["generate", "x", "--seed", "-1"], "seed is -1"),
    "empty stop": (["generate", "x", "--stop", ""], "empty stop string"),
    "unknown device": (["generate", "x", "--target", "FOLDER", "--device", "gpu9"], "unknown device"),
    "unknown dtype": (["generate", "x", "--target", "FOLDER", "--dtype", "int3"], "unknown dtype"),
    "no such file": (["generate", "--prompts", "nowhere.jsonl"], "there is no file"),
    "long prompt": (["generate", "word " * 200, "--target", "FOLDER"], "the target's context holds 512"),
    "raw with system": (["generate", "x", "--target", "FOLDER", "--raw", "--system", "s"], "leave out --raw"),
    "train without data": (["train", "--out", "OUT", "--target", "FOLDER"], "no training data"),
    "unknown setting": (["train", "--out", "OUT", "--set", "optimizer.learningrate=1"], "did you mean 'learning_rate'"),
    "no recipe": (["train", "--out", "OUT", "--recipe", "nowhere.toml"], "cannot read recipe"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(name, target_folder, tmp_path):
    arguments, message = BAD[name]
    places = {"FOLDER": str(target_folder), "OUT": str(tmp_path / "out")}
    result = amphista(*[places.get(word, word) for word in arguments], stdin=None)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2, result.stderr
    assert message in last and last.startswith("amphista: ")
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_what_can_be_refused_is_refused_before_the_machine_is_measured(target_folder, monkeypatch):
    monkeypatch.setattr("amphista.llm.costs_for", None)
    result = amphista("generate", "x", "--target", target_folder, "--logit-bias", "99999999=1")
    assert result.returncode == 2 and "token id 99999999" in result.stderr


def test_no_help_text_loses_its_brackets():
    """Rich takes words in them for marks."""
    commands = [typer.main.get_command(app)]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        for text in (command.help, *(getattr(one, "help", None) for one in command.params)):
            assert Text.from_markup(text or "").plain == (text or "").replace("\\[", "[")
    assert len(commands) > 12 and "amphista[ray]" in re.sub(r"\s", "", amphista("serve", "-h").stdout)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_full_disk_is_one_sentence(target_folder, tmp_path, monkeypatch, number):
    """In a run that can be resumed, and elsewhere."""

    def full(*_, **__):
        raise OSError(number, "the disk is full")

    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"id": "q", "prompt": "Why?"}))
    short = ("--target", target_folder, "--max-new-tokens", 4)
    runs = {
        "evaluate": ("amphista.evaluation.run.RecordFile.append", [questions, "--methods", "none"]),
        "distill": ("amphista.train.distill.Distiller.run", ["--prompts", questions]),
    }
    for name, (place, arguments) in runs.items():
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            result = amphista(name, *arguments, "--out", tmp_path / name, *short)
        assert result.returncode == 2 and f"cannot write to {tmp_path / name}: the disk is full" in result.stderr
        assert "the same command again" in result.stderr
    monkeypatch.setattr("amphista.cli.answers.run_job", full)
    result = amphista("generate", "x", *short)
    assert result.returncode == 2 and result.stderr.endswith(
        "cannot write: the disk is full; free some space and try again\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_answers_that_cannot_be_written_are_said(target_folder, tmp_path):
    (tmp_path / "o.jsonl.partial").symlink_to("/dev/full")
    arguments = ("--target", target_folder, "--max-new-tokens", 4, "--output", tmp_path / "o.jsonl")
    result = amphista("generate", "x", *arguments)
    assert result.returncode == 2 and "o.jsonl.partial: No space left on device" in result.stderr.splitlines()[-1]


def test_nothing_to_do_is_exit_code_2():
    result = amphista("generate")
    assert result.returncode == 2 and "give at least one PROMPT" in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"turns": ["ok"]', "line 2 is not JSON"),
        ('{"turns": []}', "line 2: 'turns' must be"),
        ('{"turns": ["a", ""]}', "line 2: 'turns' must be"),
        ('{"messages": [{"role": "user"}]}', "line 2: 'messages' must be"),
        ('{"prompt": ""}', "line 2: 'prompt' must be"),
        ('{"question": "?"}', "line 2 has none of"),
        ("[]", "line 2 is a JSON list"),
    ],
)
def test_a_malformed_line_is_named_before_anything_is_decoded(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    result = amphista("generate", "--prompts", path, "--json")
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and "Traceback" not in result.stderr


def test_drafters_of_other_targets_and_damaged_ones_are_refused(trained, target_folder, tmp_path):
    import shutil

    from tests.tiny import SIZES

    other, twin = tmp_path / "other", tmp_path / "twin"
    for folder, model in ((other, tiny_model("qwen3")), (twin, tiny_model(seed=9))):
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    assert SIZES["hidden_size"] == 32
    good = trained / "amphista" / "best"
    broken = tmp_path / "broken"
    shutil.copytree(good, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for target, drafter, message in (
        (other, good, "trained for another target"),
        (twin, good, "--allow-other-target"),
        (target_folder, broken, "is missing or damaged"),
    ):
        result = amphista("generate", "x", "--target", target, "--drafter", drafter)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    (record,) = records("x", "--target", twin, "--drafter", good, "--allow-other-target", "--compare",
                        "--max-new-tokens", 8)  # fmt: skip
    assert record["identical"] is True


def test_version_and_short_help():
    assert amphista("--version").stdout == f"amphista {__version__}\n"
    front = amphista("-h").stdout
    assert all(f" {name} " in front for name in ("generate", "chat", "train", "distill", "evaluate", "convert", "info"))
    assert " ablate " not in front
    assert all(f" {name} " in amphista("dev", "-h").stdout for name in ("calibrate", "latency", "tune"))
    assert "--model-defaults" in amphista("generate", "-h").stdout
    assert amphista("tune").returncode == 2


def test_a_seed_is_fresh_and_told(target_folder):
    settings = ["Hello", "--target", target_folder, "--max-tokens", 12, "--temperature", 1.5]
    (one,), (two,) = records(*settings), records(*settings)
    assert one["seed"] != two["seed"] and one["token_ids"] != two["token_ids"]
    (again,) = records(*settings, "--seed", one["seed"])
    assert again["token_ids"] == one["token_ids"]


def test_settings_as_others_have_them(target_folder):
    settings = ["Hello", "--target", target_folder, "--max-tokens", 20, "--ignore-eos", "--top-k", -1]
    (free,) = records(*settings)
    (stopped,) = records(*settings, "--stop-token-id", free["token_ids"][3])
    assert stopped["token_ids"] == free["token_ids"][: free["token_ids"].index(free["token_ids"][3]) + 1]
    (biased,) = records(*settings, "--logit-bias", f"{LETTER_A}=1000", "--logprobs", 2, "--compare")
    assert biased["text"] == "A" * 20 and biased["identical"] and len(biased["logprobs"]) == 20
    assert len(biased["logprobs"][0]["top"]) == 2
    (varied,) = records(
        *settings, "--logit-bias", f"{LETTER_A}=1000", "--frequency-penalty", 999, "--presence-penalty", 5
    )
    assert varied["text"].count("A") < 3
    bad = amphista("generate", "x", "--logit-bias", "65")
    assert bad.returncode == 2 and "expected ID=NUMBER" in bad.stderr


def test_the_models_own_settings_are_said_or_taken(tmp_path):
    model = tiny_model()
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    settings = ["Hello", "--target", tmp_path, "--max-new-tokens", 12, "--json", "--tree", "chain"]
    plain, taken = amphista("generate", *settings), amphista("generate", *settings, "--model-defaults")
    assert "repetition_penalty=1.5: not applied" in plain.stderr
    (asked,) = records(*settings[:-3], "--repetition-penalty", 1.5)
    assert json.loads(taken.stdout)["token_ids"] == asked["token_ids"] != json.loads(plain.stdout)["token_ids"]


def test_template_variables(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template += "{% if loud is defined and loud %}{{ '!' * 30 }}{% endif %}"
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = ["Hello", "--target", tmp_path, "--max-new-tokens", 2]
    (loud,) = records(*settings, "--template-arg", "loud=true")
    (quiet,), (plain,) = records(*settings, "--template-arg", "loud=false"), records(*settings)
    assert loud["prompt_tokens"] == quiet["prompt_tokens"] + 30 == plain["prompt_tokens"] + 30
    assert loud["template"] == {"loud": True} and "template" not in plain


def test_a_prompt_is_read_once(target_folder, monkeypatch):
    """The first answer is not decoded, nor its prompt read, for practice."""
    started, chunk = [], engine_step._chunk

    def counted(sequence):
        span = chunk(sequence)
        started.append(span.tree.num_nodes)
        return span

    monkeypatch.setattr(engine_step, "_chunk", counted)
    settings = ["--target", target_folder, "--max-new-tokens", 2, "--tree", "chain"]
    found = records("Hello there", "Again", *settings)
    assert started == [record["prompt_tokens"] for record in found]


def broken_at_the_second_prompt(monkeypatch, error):
    step, seen = Engine.step, []

    def breaks(engine, batch):
        seen.extend(sequence for sequence in batch if sequence not in seen)
        if len(seen) == 2:
            raise error
        return step(engine, batch)

    monkeypatch.setattr(Engine, "step", breaks)


def test_an_interrupt_keeps_what_was_answered(target_folder, tmp_path, monkeypatch):
    broken_at_the_second_prompt(monkeypatch, KeyboardInterrupt())
    out = tmp_path / "out.jsonl"
    arguments = ("--target", target_folder, "--max-new-tokens", 3, "--tree", "chain", "--output", out)
    result = amphista("generate", "one", "two", *arguments)
    assert result.returncode == 130 and f"{out}.partial" in result.stderr
    assert [json.loads(line)["id"] for line in Path(f"{out}.partial").read_text().splitlines()] == [0]
    assert not out.exists()


def test_an_error_in_decoding_is_not_one_of_writing(target_folder, tmp_path, monkeypatch):
    broken_at_the_second_prompt(monkeypatch, OSError("the device is gone"))
    arguments = ("--target", target_folder, "--max-new-tokens", 3, "--tree", "chain", "--output", tmp_path / "out")
    with pytest.raises(OSError, match="the device is gone"):
        amphista("generate", "one", "two", *arguments)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("as_json", [True, False])
def test_any_output_encoding_will_do(target_folder, tmp_path, encoding, as_json):
    """A model that says what no code page knows, asked in words that none knows."""
    tiny_model().save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.decoder = decoders.Replace("A", "\u6f22")
    tokenizer.save_pretrained(tmp_path)
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    arguments = [
        "generate",
        "gr\u00f6\u00dfe \u6f22",
        "--target",
        str(tmp_path),
        "--max-new-tokens",
        "4",
        "--logit-bias",
        f"{LETTER_A}=999",
    ]
    with (
        mock.patch.object(sys, "argv", ["amphista", *arguments, *(["--json"] if as_json else [])]),
        redirect_stdout(out),
        redirect_stderr(err),
        contextlib.suppress(SystemExit),
    ):
        main()
    out.flush()
    written = out.buffer.getvalue().decode(encoding)
    assert "Traceback" not in written and written
    if as_json:
        assert json.loads(written)["text"] == "\u6f22" * 4
    else:
        assert ("\u6f22" if encoding == "utf-8" else "\\u6f22") in written


def test_refused_family_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bloom", "architectures": ["BloomForCausalLM"]}')
    result = amphista("generate", "x", "--target", tmp_path)
    assert result.returncode == 2 and "bloom models cannot be verified as a tree" in result.stderr


def test_chat_keeps_the_conversation(target_folder, trained):
    result = amphista(
        "chat", "--target", target_folder, "--drafter", trained / "amphista" / "best", "--max-new-tokens", 6,
        stdin="Hello\nAgain\n/reset\n/help\n/quit\n",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("tokens/s") == 2 and "/reset starts over" in result.stderr


def test_chat_interrupt_ends_the_answer_not_the_chat(target_folder, monkeypatch, capsys):
    """Ctrl-C while an answer is shown; the chat then still answers."""
    conversation, shown = amphista_package.load(str(target_folder), "lookup", tree="chain").conversation(), []

    def interrupted(text="", **settings):
        if "file" in settings:
            settings["file"].write(f"{text}\n")
            return
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat, "print", interrupted, raising=False)
        chat._show(conversation.stream("Tell me a long story", max_new_tokens=200))
    assert ", interrupted]" in capsys.readouterr().err
    assert conversation.messages[-1]["role"] == "assistant"
    chat._show(conversation.stream("And then?", max_new_tokens=4))
    assert "[4 tokens" in capsys.readouterr().err and len(conversation.messages) == 4


def test_tune_shows_the_curve_and_refreshes_it(target_folder, trained, tmp_path, monkeypatch):
    """With seconds made up: whether real ones are kept depends on how quiet the machine is."""
    monkeypatch.setenv("AMPHISTA_CACHE", str(tmp_path))
    first = itertools.count(1)

    def made_up(target):
        return ForwardSeconds({1: 0.01 * next(first), 2: 0.02, 4: 0.04}, 256, 0.001, 1e-6, 1.1)

    monkeypatch.setattr(costs, "verify_seconds", made_up)
    monkeypatch.setattr(costs, "draft_ratio", lambda target, drafter: Asking(0.5, 0.1, 0.0, 1.1))
    arguments = ("dev", "tune", "--target", target_folder, "--drafter", f"{trained / 'medusa' / 'best'}+lookup")
    result = amphista(*arguments, "--json")
    record = json.loads(result.stdout)
    assert (
        record["drafter"] == "medusa+lookup" and record["path"] in ("fast", "native") and record["dtype"] == "float32"
    )
    assert [(row["nodes"], row["ms"], row["forwards"]) for row in record["verify"]] == [
        (1, 10, 1),
        (2, 20, 2),
        (4, 40, 4),
    ]
    assert [row["pays_above_with_heads"] for row in record["verify"]] == [1.5, 2.5, 4.5]
    assert record["sequence_ms"] == 1 and record["thousand_cached_rows_ms"] == 1
    assert record["draft_ms"] == 5 and record["draft_forwards"] == 0.5 and record["spread"] == 1.1
    told = amphista(*arguments)
    assert "measuring" in result.stderr and told.stderr == "", "kept"
    assert "| 10.0 " in told.stdout and "asking medusa+lookup: 5.0 ms" in told.stdout
    refreshed = amphista(*arguments, "--json", "--refresh")
    assert "measuring" in refreshed.stderr and json.loads(refreshed.stdout)["verify"][0]["ms"] == 20


def test_info_shows_versions_and_checks(target_folder, trained):
    result = amphista("info", "--json")
    report = json.loads(result.stdout)
    assert {"python", "torch", "transformers", "amphista"} <= set(report["versions"])
    assert report["target"]["name"] == "smollm2-135m-instruct" and report["default_tree"] == "auto"
    checked = amphista("info", "--target", target_folder, "--drafter", trained / "medusa" / "best", "--check")
    assert checked.returncode == 0 and "the same tokens as plain decoding" in checked.stdout


def test_the_program_itself_starts_fast_without_torch():
    """As a process of its own: help imports neither torch nor transformers; errors leave no trace."""
    program = """
import sys
from amphista.cli.app import main
sys.argv = ["amphista", "--help"]
try:
    main()
except SystemExit:
    assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0
    bad = subprocess.run([sys.executable, "-m", "amphista", "generate", ""], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr == "amphista: prompt 0 is empty: give some text\n"
