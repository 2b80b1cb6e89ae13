import io
import sys
from types import SimpleNamespace

import pytest

from stages.core import jsonl
from stages.core.errors import InputError


def test_what_is_written_is_read_back_with_line_numbers(tmp_path):
    records = [{"a": 1, "text": "é\n{}\u2028"}, {"a": [None, 0.5, True]}]
    path = tmp_path / "sub" / "file.jsonl"
    assert jsonl.write(path, records) == 2
    assert list(jsonl.read(path)) == list(enumerate(records, 1))


def test_a_last_line_without_its_end_is_read(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert [record["a"] for _, record in jsonl.read(path)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"a": 1, "b', "not valid JSON"),
        (b"", "the line is blank"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b"3", "expected a JSON object, found int"),
        (b"null", "expected a JSON object, found NoneType"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": "\x00"}', "not valid JSON"),
        (b'{"a":' * 5000, "not valid JSON"),
        (b'{"a": 1} {"a": 2}', "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "begins with a byte order mark"),
    ],
)
def test_a_line_that_is_not_one_object_is_an_error_that_names_file_and_line(tmp_path, line, fault):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    with pytest.raises(InputError) as caught:
        list(jsonl.read(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert fault in str(caught.value)


def test_a_line_of_the_greatest_length_is_read_and_one_byte_more_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 20)
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"a": "0123456789"}\n')
    assert next(jsonl.read(path)) == (1, {"a": "0123456789"})
    path.write_bytes(b'{"a": "0123456789"}' + b" \n")
    with pytest.raises(InputError, match=r"file.jsonl:1: the line is longer than 20 bytes"):
        list(jsonl.read(path))


def test_an_endless_line_is_refused_after_its_first_part():
    read = []

    class Endless:
        def readline(self, limit):
            read.append(limit)
            return b"x" * limit

    with pytest.raises(InputError, match="endless:1: the line is longer"):
        next(jsonl.scan(Endless(), "endless"))
    assert read == [jsonl.MAX_LINE_BYTES + 1]


def test_scan_tells_where_each_line_begins(tmp_path):
    data = b'{"a": "\xc3\xa9"}\n{"a": 2}\n{"a": 3}'
    offsets = [offset for _, offset, _ in jsonl.scan(io.BytesIO(data), "data")]
    assert [data[offset:].split(b"\n")[0] for offset in offsets] == data.split(b"\n")


@pytest.mark.parametrize(
    ("name", "fault"), [("missing", "no such file"), ("empty", "is empty: expected"), ("folder", "is a directory")]
)
def test_a_path_that_holds_no_lines_is_named(tmp_path, name, fault):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=f"{name}.*{fault}"):
        list(jsonl.read(tmp_path / name))


def test_a_dash_is_stdin_and_stdout(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"a": 1}\n[]\n')))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=out))
    records = jsonl.read("-")
    assert next(records) == (1, {"a": 1})
    with pytest.raises(InputError, match=r"^stdin:2: expected a JSON object"):
        next(records)
    jsonl.write("-", [{"b": 2}])
    assert out.getvalue() == b'{"b":2}\n'


def test_nothing_is_left_where_the_records_to_write_break_off(tmp_path):
    def records():
        yield {"a": 1}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        jsonl.write(tmp_path / "file.jsonl", records())
    assert list(tmp_path.iterdir()) == []
