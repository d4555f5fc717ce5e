"""train/prompts.py: ids of several files, lines that cannot be used, and answers whose tokens meet their prompt's."""

from __future__ import annotations

import json
import logging

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from amphista.errors import DataError
from amphista.target.text import Text
from amphista.train.left_out import LeftOut
from amphista.train.prompts import mark_answers, read_rows
from tests.tiny import EOS, byte_tokenizer


def write(path, names):
    rows = [{"id": name, "prompt_ids": [1, 2], "answer_ids": [3, i]} for i, name in enumerate(names)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_ids_of_several_files_are_told_apart(tmp_path):
    one = write(tmp_path / "one.jsonl", ["a", "a#2", "b"])
    two = write(tmp_path / "two.jsonl", ["a", "b", "a#2", "c"])
    rows = read_rows([one, two, one], None, {9}, vocab_size=20, max_len=10)
    names = [row.id for row in rows]
    assert len(set(names)) == len(names) == 10
    assert names[:3] == ["a", "a#2", "b"] and names[3:5] == ["a#3", "b#2"] and names[6] == "c"
    assert [row.group for row in rows] == ["a", "a", "b", "a", "b", "a", "c", "a", "a", "b"]


GOOD = {"id": "a", "prompt_ids": [1], "answer_ids": [2, 3]}
BAD = {
    '{"id": "x", "prompt_ids": [1], "answer_ids": []}': "line 2 has no answer tokens",
    '{"id": "x", "prompt_ids": [1, 1, 1, 1, 1, 1, 1, 1], "answer_ids": [2]}': "has no answer tokens within its first 8",
    '{"prompt_ids": [], "answer_ids": [1]}': "line 2 has no answer tokens .* or but the very first",
    '{"id": "x", "text": "hello"}': "line 2 has neither",
    "{}": "line 2 has neither .*none",
    "{broken": "line 2 is not JSON",
    "[1, 2]": "line 2 is a JSON list",
    "null": "line 2 is a JSON null",
    '{"prompt_ids": null, "answer_ids": [1]}': "line 2 has other things than lists of token ids",
    '{"prompt_ids": [1], "answer_ids": [1.5]}': "line 2 has other things than lists of token ids",
    '{"prompt_ids": [1], "answer_ids": [1], "temperature": "hot"}': "line 2 has the temperature 'hot'",
    '{"prompt_ids": [1], "answer_ids": [1], "temperature": true}': "line 2 has the temperature True",
    '{"prompt_ids": [1], "answer_ids": [1], "temperature": -0.7}': "line 2 has the temperature -0.7",
    '{"prompt_ids": [1], "answer_ids": [1], "temperature": NaN}': "line 2 has the temperature nan",
    '{"prompt_ids": [1], "answer_ids": [1], "temperature": 1e999}': "line 2 has the temperature inf",
    '{"messages": []}': "line 2 has other things than objects",
    '{"messages": [{"role": "user", "content": 3}]}': "line 2 has other things than objects",
    '{"messages": [{"role": "user", "content": "Hi"}]}': "line 2 has no answer tokens",
    '{"messages": [{"role": "nobody", "content": "Hi"}, {"role": "assistant", "content": "a"}]}': "line 2 .*refuses",
    '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}': "line 2 has other",
}
FUSSY = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('who is that?') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("line", BAD)
def test_a_line_that_cannot_be_used_is_left_out_and_named(tmp_path, line, caplog):
    """It stops nothing: the lines before and behind it are read. Alone in its file it is an error, with its reason."""
    text = Text(byte_tokenizer())
    text.tokenizer.chat_template = FUSSY
    options = dict(vocab_size=300, max_len=8)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n" + json.dumps({**GOOD, "id": "b"}) + "\n")
    left_out = LeftOut()
    rows = read_rows([path], text, [EOS], left_out=left_out, **options)
    assert [row.id for row in rows] == ["a", "b"] and left_out.count == 1
    ((where, reason),) = left_out.first
    assert where == path and str(path) in reason and not caplog.records
    assert str(tmp_path) not in json.dumps(left_out.record()) and left_out.record()["lines"] == 1
    with caplog.at_level(logging.WARNING, "amphista"):
        read_rows([path], text, [EOS], **options)
    assert reason in caplog.text
    path.write_text("\n" + line + "\n")
    with pytest.raises(DataError, match=BAD[line]):
        read_rows([path], text, [EOS], **options)


def test_many_lines_left_out_are_counted_and_the_first_ones_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe\n{\n\n" + json.dumps(GOOD).encode() + b"\n" + b"[]\n" * 40)
    left_out = LeftOut()
    assert len(read_rows([path], None, [EOS], vocab_size=300, max_len=8, left_out=left_out)) == 1
    assert left_out.count == 42 and left_out.sentence().startswith("42 lines left out: ")
    assert left_out.sentence().endswith("line 5 is a JSON list: expected an object; and 39 more")


@pytest.mark.parametrize("token", [300, -1])
def test_a_token_beyond_the_vocabulary_is_the_fault_of_the_file(tmp_path, token):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "answer_ids": [2, token]}) + "\n")
    with pytest.raises(DataError, match=f"line 2 holds token id {token}, .*made for another target"):
        read_rows([path], None, [EOS], vocab_size=300, max_len=100)


def merging_tokenizer(template):
    """Characters, and runs of line breaks as one token: what byte-pair tokenizers do with blank lines."""
    characters = sorted({*map(chr, range(32, 127)), "\n", "\n\n", "\n\n\n"})
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n{1,3}|."), "isolated")
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in ("<s>", "</s>")])
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = template
    return fast


CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def joined(fast, ids):
    return "".join(fast.convert_ids_to_tokens(ids))


def test_an_answer_s_tokens_are_the_ones_behind_the_generation_prompt():
    """Rendered at once, the answer's blank line and the prompt's line break are one token, which nobody can answer."""
    fast = merging_tokenizer(CHAT)
    text, end = Text(fast), fast.eos_token_id
    said = ["\n\n1. salt", "fine", "\nyes"]
    messages = []
    for number, answer in enumerate(said):
        messages += [{"role": "user", "content": f"ask {number}"}, {"role": "assistant", "content": answer}]
    assert "\n\n\n" in fast.convert_ids_to_tokens(text.render(messages)), "nothing merges: the test would be vacuous"
    rows = mark_answers(messages, text, {end})
    found = []
    for ids, marks in rows:
        for number in range(1, max(marks) + 1):
            first = marks.index(number)
            answer = [token for token, mark in zip(ids, marks, strict=True) if mark == number]
            found.append(joined(fast, answer))
            turn = 2 * (len(found) - 1) + 1
            assert ids[:first] == text.render(messages[:turn]), "the prompt is not what decoding would read"
    assert found == [answer + "</s>" for answer in said]
    assert len(rows) == 2, "the next prompt has the merged tokens, as it has in decoding: a row of its own"


def test_an_answer_behind_another_prompt_than_the_template_s_is_refused():
    """The generation prompt opens a thought, finished answers are written without one."""
    fast = merging_tokenizer(CHAT.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    with pytest.raises(DataError, match="generation prompt"):
        mark_answers(messages, Text(fast), {fast.eos_token_id})
