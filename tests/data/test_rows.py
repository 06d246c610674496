import gzip

import pytest

from modeling_yan.data import read_rows, write_rows
from modeling_yan.data.rows import replacing, row_texts, write_whole

ROWS = [{"text": "Ein Käfer ☃.", "source": "a book"}, {"source": "", "target": "yes", "kind": "x"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "new_folder/rows.jsonl"])
def test_round_trip(tmp_path, name):
    write_rows(tmp_path / name, ROWS)
    assert read_rows(str(tmp_path / name)) == ROWS


def test_equal_rows_give_equal_bytes(tmp_path):
    write_rows(tmp_path / "a.jsonl.gz", ROWS)
    write_rows(tmp_path / "b.jsonl.gz", ROWS)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: .*empty"):
        write_rows(path, [{"text": "fine"}, {"text": " "}])
    assert read_rows(path) == ROWS
    assert list(tmp_path.iterdir()) == [path]


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": 2}\n')
    with pytest.raises(ValueError, match="line 3"):
        read_rows(path)
    path.write_text('{"text": "one"}\n\n')
    assert read_rows(path) == [{"text": "one"}]


BAD_LINES = {
    "not json": ("{text: 1}", "not JSON"),
    "cut off": ('{"text": "one', "not JSON"),
    "list": ('["text"]', "list, not an object"),
    "no keys": ("{}", "has only the keys"),
    "source only": ('{"source": "a"}', "has only the keys"),
    "target only": ('{"target": "a"}', "has only the keys"),
    "text is null": ('{"text": null}', '"text" is NoneType, not a string'),
    "target is a number": ('{"source": "a", "target": 1}', '"target" is int, not a string'),
    "pair with a text, without source": ('{"text": "a", "target": "b"}', '"source" is NoneType, not a string'),
    "empty text": ('{"text": ""}', '"text" is empty'),
    "blank target": ('{"source": "a", "target": " \\n"}', '"target" is empty'),
    "half a surrogate pair": ('{"text": "\\ud800"}', "not valid Unicode"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.gz"])
def test_a_bad_line_is_named(tmp_path, name, line, message):
    content = f'{{"text": "fine"}}\n{line}\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match=message) as error:
        read_rows(tmp_path / name)
    assert f"{name}, line 2: " in str(error.value)


def test_broken_utf8_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "\xff"}\n')
    message = r"bad\.jsonl, line 1: not JSON in UTF-8 .*; rows are one JSON object a line, or one array"
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.jsonl.gz"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(tmp_path / name)
    with pytest.raises(ValueError, match="no rows to write"):
        write_rows(tmp_path / name, [])


@pytest.mark.parametrize("damage", [lambda content: content[:-20], lambda content: b"no gzip" + content])
def test_a_damaged_gzip_is_refused(tmp_path, damage):
    write_rows(tmp_path / "rows.jsonl.gz", [{"text": f"row {number}"} for number in range(1000)])
    (tmp_path / "bad.jsonl.gz").write_bytes(damage((tmp_path / "rows.jsonl.gz").read_bytes()))
    with pytest.raises(ValueError, match=r"bad\.jsonl\.gz, after line \d+: .*cut off or damaged"):
        read_rows(tmp_path / "bad.jsonl.gz")


def test_missing_files_and_other_names(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match=r"ends in \.jsonl or \.jsonl\.gz"):
        read_rows(tmp_path / "rows.json")


def test_row_texts():
    assert row_texts(ROWS[0]) == ["Ein Käfer ☃."]
    assert row_texts(ROWS[1]) == ["", "yes"]


def replace_by_half(path, is_folder=False):
    with replacing(path) as aside:
        if is_folder:
            aside.mkdir()
        (aside / "a" if is_folder else aside).write_text("half")
        raise OSError("the disk is full")


@pytest.mark.parametrize("content", ["ä\n", b"\x00\n"])
def test_a_file_is_replaced_whole_or_not_at_all(content, tmp_path):
    path = tmp_path / "folder" / "file.txt"
    write_whole(path, "before")
    with pytest.raises(OSError, match="full"):
        replace_by_half(path)
    assert path.read_text() == "before"
    write_whole(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [each.name for each in path.parent.iterdir()] == ["file.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises(OSError, match="full"):
        replace_by_half(path, is_folder=True)
    assert not list(tmp_path.iterdir())
    with replacing(path) as aside:
        aside.mkdir()
        (aside / "a").write_text("whole")
        assert not path.exists()
    assert sorted(str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")) == ["folder", "folder/a"]
