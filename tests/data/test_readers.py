import gzip
import json
from itertools import islice

import pyarrow
import pyarrow.parquet
import pytest

from modeling_yan.data import readers
from modeling_yan.data.readers import find_files, is_file_name, read_file

ROWS = [{"text": f"Row {number} ☃.", "more": [number]} for number in range(5)]
LINES = "".join(f"{json.dumps(row)}\n\n" for row in ROWS).encode()


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", LINES, "line 1, line 3, line 5, line 7, line 9"),
        ("a.jsonl.gz", LINES, "line 1, line 3, line 5, line 7, line 9"),
        ("a.json", LINES, "line 1, line 3, line 5, line 7, line 9"),
        ("a.json", json.dumps(ROWS).encode(), "row 1, row 2, row 3, row 4, row 5"),
        ("a.json.gz", json.dumps(ROWS, indent=1).encode(), "row 1, row 2, row 3, row 4, row 5"),
    ],
)
def test_json(tmp_path, name, content, places):
    path = write(tmp_path / name, content)
    assert list(read_file(path)) == [(f"{path}, {place}", row) for place, row in zip(places.split(", "), ROWS)]


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PARQUET_BATCH", 2)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert list(read_file(path)) == [(f"{path}, row {number}", row) for number, row in enumerate(ROWS, start=1)]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_by_line_and_by_paragraph(tmp_path, name):
    path = write(tmp_path / name, "One.\r\n two \n\n \n\nThrée\n".encode())
    by_line = [(f"{path}, line {number}", {"text": text}) for number, text in [(1, "One."), (2, "two"), (6, "Thrée")]]
    assert list(read_file(path)) == by_line
    by_paragraph = [(f"{path}, line 1", {"text": "One.\n two"}), (f"{path}, line 6", {"text": "Thrée"})]
    assert list(read_file(path, sample_by="paragraph")) == by_paragraph


DAMAGED = {
    "cut.jsonl.gz": (gzip.compress(LINES * 500)[:-20], "cut off or damaged"),
    "not-packed.jsonl.gz": (LINES, "cut off or damaged"),
    "cut.jsonl": (LINES + b'{"text": "one', "line 11: not JSON"),
    "cut.json": (json.dumps(ROWS).encode()[:-3], "not JSON"),
    "bytes.txt": (b"fine\n\xff\n", "line 2: not UTF-8"),
    "no.parquet": (b"PAR1 not really", "parquet file is cut off or damaged"),
    "empty.jsonl": (b"", "holds no rows"),
    "blank.txt": (b"\n \n", "holds no rows"),
    "empty.json": (b"[]", "holds no rows"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_and_empty_files_are_named(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_file(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


def test_a_cut_parquet_file_is_named(tmp_path):
    path = tmp_path / "cut.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 1000), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"cut\.parquet: the parquet file is cut off or damaged"):
        list(read_file(path))


def test_an_empty_table_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="holds no rows"):
        list(read_file(tmp_path / "a.parquet"))


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES + b"not JSON\n")
    assert [row for _, row in islice(read_file(path), 5)] == ROWS
    with pytest.raises(ValueError, match="line 11"):
        list(read_file(path))


def test_find_files(tmp_path):
    paths = [write(tmp_path / name, LINES) for name in ("b.jsonl", "a.jsonl", "c.txt")]
    assert find_files([paths[0], str(paths[1])]) == paths[:2]
    assert find_files([tmp_path / "*.jsonl", paths[2]]) == [paths[1], paths[0], paths[2]]
    for missing in ("*.parquet", "d.jsonl"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            find_files([tmp_path / missing])
    for ending in (".csv", ".parquet.gz", ".gz"):
        with pytest.raises(ValueError, match=r"ends in \.jsonl, \.json, \.txt, \.parquet"):
            find_files([write(tmp_path / f"a{ending}", LINES)])


def test_file_names_and_hub_names_are_told_apart(tmp_path):
    write(tmp_path / "a.csv", LINES)
    assert all(map(is_file_name, ["a.jsonl.gz", "b/*", "c.parquet", str(tmp_path / "a.csv")]))
    assert not any(map(is_file_name, ["owner/name", "squad", str(tmp_path)]))


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_files_of_other_systems_are_read_alike(tmp_path, ending):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffFirst line.\nSecond line.\n\nThird line.\n".replace("\n", ending).encode())
    texts = {by: [row["text"] for _, row in read_file(path, by)] for by in ("line", "paragraph")}
    assert texts["line"] == ["First line.", "Second line.", "Third line."]
    assert texts["paragraph"] == ["First line.\nSecond line.", "Third line."]


def test_json_may_have_a_byte_order_mark(tmp_path):
    for name, content in (("a.jsonl", '{"text": "One."}\r\n{"text": "Two."}\r\n'), ("b.json", '[{"text": "One."}]')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert next(read_file(tmp_path / name))[1] == {"text": "One."}


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    for name in ("rows[1].jsonl", "rows1.jsonl", "rows2.JSONL"):
        write(tmp_path / name, LINES)
    assert find_files([tmp_path / "rows[1].jsonl"]) == [tmp_path / "rows[1].jsonl"]
    assert find_files([tmp_path / "rows[12].jsonl"]) == [tmp_path / "rows1.jsonl"]
    assert find_files([tmp_path / "rows2.JSONL"]) == [tmp_path / "rows2.JSONL"]
