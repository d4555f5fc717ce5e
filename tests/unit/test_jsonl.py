from __future__ import annotations

import gzip

import pytest

from amphista.errors import DataError
from amphista.jsonl import read_lines

TEXT = '{"a": "\u00e9"}\n\n  \n{"b": 2}\n'


def test_lines_keep_their_numbers(tmp_path):
    plain, zipped = tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz"
    plain.write_text(TEXT, encoding="utf-8")
    zipped.write_bytes(gzip.compress(TEXT.encode()))
    assert list(read_lines(plain)) == list(read_lines(zipped)) == [(1, {"a": "\u00e9"}), (4, {"b": 2})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a":\n', "line 2 is not JSON"),
        ('{"a": 1}\n\n[1]\n', "line 3 is a JSON list"),
        ("3\n", "line 1 is a JSON int"),
    ],
)
def test_the_first_bad_line_is_named(tmp_path, text, message):
    file = tmp_path / "x.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_lines(file))


def _truncated(data):
    return data[:-12]


def _altered(data):
    """Bytes in the middle of the compressed stream are zeroed: not a bad header, but a stream that makes no sense."""
    return data[:200] + bytes(40) + data[240:]


@pytest.mark.parametrize("damage", [_truncated, _altered, lambda data: b"not gzip at all"])
def test_a_damaged_gzip_file_is_refused(tmp_path, damage):
    file = tmp_path / "x.jsonl.gz"
    lines = "".join(f'{{"number": {i * 7919 % 10007}}}\n' for i in range(2000))
    file.write_bytes(damage(gzip.compress(lines.encode())))
    with pytest.raises(DataError, match=r"x\.jsonl\.gz"):
        list(read_lines(file))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_lines(file))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        list(read_lines(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "raw",
    [
        b'\xef\xbb\xbf{"a": 1}\n{"b": 2}\n',
        b'\xef\xbb\xbf\r\n{"a": 1}\r\n\r\n{"b": 2}',
        b'\n{"a": 1}\n \n{"b": 2}\n\n',
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_files_as_editors_write_them(tmp_path, raw, zipped):
    file = tmp_path / ("x.jsonl.gz" if zipped else "x.jsonl")
    file.write_bytes(gzip.compress(raw) if zipped else raw)
    assert [record for _, record in read_lines(file)] == [{"a": 1}, {"b": 2}]
