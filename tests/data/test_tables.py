"""Pairs out of any columns: files as people have them, folders of data sets, and what is refused."""

import csv
import datetime
import gzip
import json
import logging
import re

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from modeling_yan.data.tables import PairColumns, has_split, hold_out, load_file, load_split, make_pairs

COLUMNS = PairColumns("question", "answer")
PAIRS = [{"source": "Who?", "target": "Ann"}, {"source": "Where, then?", "target": "007"}]
TABLE = [{"question": row["source"], "answer": row["target"]} for row in PAIRS]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """Not the user's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path, content):
    """A file of text or bytes; of rows, as its name ends."""
    if isinstance(content, list) and path.suffix == ".parquet":
        Dataset.from_list(content).to_parquet(path)
        return path
    if isinstance(content, list) and path.suffix == ".json":
        content = json.dumps(content)
    elif isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


CSV = 'question,answer\nWho?,Ann\n"Where, then?",007\n'


@pytest.mark.parametrize("columns", [("a", "a"), ("a", "b", "{c} {b}"), ("a", "b", "{b[0]}")])
def test_a_source_that_holds_the_target(columns):
    with pytest.raises(ValueError, match=rf"target_column='{columns[1]}': must be no part of the source, '"):
        PairColumns(*columns)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", TABLE),
        ("rows.jsonl.gz", TABLE),
        ("rows.json", TABLE),
        ("rows.parquet", TABLE),
        ("rows.csv", CSV),
        ("rows.csv.gz", CSV),
        ("mark.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("german.csv", "question;answer\nWho?;Ann\nWhere, then?;007\n"),
        ("lines.csv", CSV.replace("\n", "\r\n")),
        ("rows.tsv", "question\tanswer\nWho?\tAnn\nWhere, then?\t007\n"),
        ("more.csv", "id;answer;question\n1;Ann;Who?\n2;007;Where, then?\n"),
    ],
)
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, name, content):
    assert make_pairs(load_file(write(tmp_path / name, content)), COLUMNS, name) == PAIRS


def test_a_field_is_text_as_it_stands_there(tmp_path):
    answers = ["NA", "null", "None", "1.50", "1e3", "True", "2020-01-02", " x "]
    table = write(tmp_path / "rows.csv", "question,answer\n" + "".join(f"q,{answer}\n" for answer in answers))
    assert [pair["target"] for pair in make_pairs(load_file(table), COLUMNS, "rows")] == answers
    lines = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": answer} for answer in answers])
    assert [pair["target"] for pair in make_pairs(load_file(lines), COLUMNS, "rows")] == answers


def test_quotes_of_a_table_between_tabs(tmp_path):
    """They are the text's own where they can't be those of a field."""
    texts = ["Where is the cup? he said.", '"Who?" he said', "three"]
    plain = "question\tanswer\n" + "".join(f'{text}\t"cellar\n' for text in ['"Where', *texts])
    pairs = make_pairs(load_file(write(tmp_path / "plain.tsv", plain)), COLUMNS, "plain.tsv")
    assert pairs == [{"source": text, "target": '"cellar'} for text in ['"Where', *texts]]
    quoted = 'question\tanswer\n"Who?\nHe ""said""."\tcellar\n'
    pairs = make_pairs(load_file(write(tmp_path / "quoted.tsv", quoted)), COLUMNS, "quoted.tsv")
    assert pairs == [{"source": 'Who?\nHe "said".', "target": "cellar"}]


def test_lines_between_tabs_that_are_whole_rows_stay_apart(tmp_path):
    """Of what someone says, one quote may stand in one line and the next in another."""
    lines = ['"I am here.\tA1', 'I said it."\tA2', "x\tA3"]
    pairs = make_pairs(load_file(write(tmp_path / "talk.tsv", "\n".join(["question\tanswer", *lines]))), COLUMNS, "x")
    assert [(pair["source"], pair["target"]) for pair in pairs] == [tuple(line.split("\t")) for line in lines]


@pytest.mark.parametrize("name", ["data[1].csv", "star*.csv", "what?.csv", "folder[ab]/x.csv", "UPPER.CSV"])
def test_a_name_is_no_pattern(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for other in ("data1.csv", "starlight.csv", "whats.csv"):
        write(tmp_path / other, "question,answer\nother,file\n")
    assert make_pairs(load_file(write(path, CSV)), COLUMNS, name) == PAIRS


def test_a_field_may_be_long(tmp_path):
    limit, long = csv.field_size_limit(), "word " * 40_000
    rows = load_file(write(tmp_path / "long.csv", f"question,answer\n{long},x\n"))
    assert rows[0]["question"] == long
    assert csv.field_size_limit() == limit


def test_a_changed_file_is_read_anew(tmp_path):
    load_file(write(tmp_path / "rows.csv", CSV))
    changed = load_file(write(tmp_path / "rows.csv", CSV.replace("Ann", "Anna")))
    assert changed[0]["answer"] == "Anna"


def test_a_template_makes_a_source_of_several_columns():
    columns = PairColumns(target="answer", template="question: {question} context: {context[0]} {{x}}")
    table = [{"question": "Who?", "context": ["Ann sings."], "answer": 1.5, "id": 3}]
    assert columns.needed == ["question", "context", "answer"]
    made = make_pairs(table, columns, "rows")
    assert made == [{"source": "question: Who? context: Ann sings. {x}", "target": "1.5"}]


def test_labels_become_their_names_and_rows_without_one_are_left_out(caplog):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    table = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, -1, 0]}, features=features)
    with caplog.at_level(logging.WARNING):
        made = make_pairs(table, PairColumns("text", "label"), "reviews")
    assert made == [{"source": "a", "target": "good"}, {"source": "c", "target": "bad"}]
    assert "reviews: left out 1 of 3 rows, whose target is empty" in caplog.text
    pair = make_pairs(table, PairColumns(target="text", template="a {label} one"), "reviews")[0]
    assert pair == {"source": "a good one", "target": "a"}


def test_numbers_and_nothing_beside_text():
    table = [{"question": 1, "answer": "x"}, {"question": None, "answer": 2}, {"question": "a", "answer": None}]
    table.append({"question": "a", "answer": float("nan")})
    assert make_pairs(table, COLUMNS, "rows") == [{"source": "1", "target": "x"}, {"source": "", "target": "2"}]


def test_rows_with_an_empty_source_are_counted(caplog):
    table = [{"question": "Who?", "answer": "x"}, {"question": "", "answer": "x"}, {"answer": "x"}]
    for columns, form in ((COLUMNS, "{question}"), (PairColumns(target="answer", template="q: {question}"), "q: {qu")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(make_pairs(table, columns, "rows")) == 3
        assert f"rows: 2 of 3 rows have nothing in a column of '{form}" in caplog.text
        assert "such as row 2" in caplog.text


def test_what_a_template_may_hold():
    columns = PairColumns(target="answer", template="{question[a]}|{question[b]:.1f}")
    assert make_pairs([{"question": {"a": None, "b": 2}, "answer": "x"}], columns, "rows")[0]["source"] == "|2.0"
    for value, kind in ((["a", "b"], "list"), (datetime.date(2020, 1, 2), "date")):
        with pytest.raises(ValueError, match=f"row 1: template=.*: does not fit the row .*found {kind}, must be text"):
            make_pairs([{"question": {"a": value, "b": 2}, "answer": "x"}], columns, "rows")


@pytest.fixture
def folder(tmp_path):
    """A data set as a folder."""
    for split in ("train", "test"):
        write(tmp_path / f"{split}.csv", CSV)
    return str(tmp_path)


def test_a_field_of_a_folder_is_text_as_it_stands_there(tmp_path):
    answers = ["000", "NA", "None", "null", "1.50", "2020-01-02"]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.csv", "question,answer\n" + "".join(f"q,{answer}\n" for answer in answers))
    pairs = make_pairs(load_split(str(tmp_path), split="train[:2]+test"), COLUMNS, "folder")
    assert [pair["target"] for pair in pairs] == answers[:2] + answers


def test_names_of_data_sets_that_are_none(tmp_path):
    with pytest.raises(
        ValueError, match=r"--dataset .*rows.csv': must be a folder or a name on the hub; give a file as"
    ):
        load_split(str(write(tmp_path / "rows.csv", CSV)))
    with pytest.raises(FileNotFoundError, match=r"'./none': must be a folder of data files or a name on the hub"):
        load_split("./none")


def test_a_folder_has_splits(folder):
    assert make_pairs(load_split(folder, split="test"), COLUMNS, folder)[0] == PAIRS[0]
    assert len(load_split(folder, split="train[:1]")) == 1
    assert has_split(folder, None, "test")
    assert not has_split(folder, None, "validation")
    with pytest.raises(ValueError, match=r'Unknown split "dev". Should be one of .*train'):
        load_split(folder, split="dev")
    with pytest.raises(ValueError, match="'other' not found"):
        load_split(folder, "other")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", "", "empty.csv: the first line must name the columns"),
        ("empty.jsonl", "", "empty.jsonl: the file holds no rows"),
        ("header.csv", "question,answer\n", "header.csv: the file holds no rows"),
        ("twice.csv", "answer,answer\nx,y\n", "twice.csv: .* every column once, and has 'answer' twice"),
        ("wide.csv", "question,answer\nx,y\nx,y,z\n", "wide.csv, line 3: 3 fields for 2 names; put .* in quotes"),
        ("first.csv", "question,answer\nx, y,z\nx,y\n", "first.csv, line 2: 3 fields for 2 names; put .* in quotes"),
        ("first.tsv", "question\tanswer\nx\ty\tz\n", "first.tsv, line 2: 3 fields for 2 names"),
        ("quoted.csv", 'question,answer\n"x" y,z\n', "quoted.csv, line 2: .* a quote in it is doubled"),
        ("open.csv", 'question,answer\n"x,y\na,b\n', "open.csv, line 3: unexpected end of data"),
        ("mac.csv", "question,answer\rx,y\r", "mac.csv, line 1: new-line character seen"),
        ("latin.csv", "question,ánswer\n".encode("latin-1"), "latin.csv: must be in UTF-8"),
        ("latin2.csv", "question,answer\nx,á\n".encode("latin-1"), "latin2.csv: must be in UTF-8"),
        ("cut.parquet", b"PAR1", "cut.parquet: "),
        ("line.jsonl", '{"question": 1}\n[]\n', "line.jsonl, line 2: found list, and a row must be an object"),
        ("rows.txt", "x", r"rows.txt: the name of a file must end in .jsonl, .json, .csv, .tsv, .parquet or"),
        ("rows.parquet.gz", "x", "rows.parquet.gz: the name of a file must end in"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_file(write(tmp_path / name, content))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file"):
        load_file(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "rows: source_column='source': must name one of its columns, 'question', 'answer', 'parts'"),
        ({"source": "question"}, "rows: target_column='target': must name one of its columns, 'question'"),
        ({"template": "{question} {text}"}, "rows: {text} of the template: must name one of its columns, 'question'"),
        ({"source": "question", "target": "parts"}, "rows, row 1: the column 'parts' is list: must be text or a numb"),
        ({"target": "answer", "template": "{parts[3]}"}, "rows, row 1: template='{parts[3]}': does not fit the row"),
    ],
)
def test_columns_that_are_not_there_or_no_text(columns, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_pairs([{"question": "Who?", "answer": "Ann", "parts": ["a"]}], PairColumns(**columns), "rows")


def test_no_target_at_all():
    with pytest.raises(ValueError, match="rows: target_column='answer': must not be empty in all 1 rows"):
        make_pairs([{"question": "x", "answer": " "}], COLUMNS, "rows")


@pytest.mark.parametrize("template", ["{", "{}", "{0} {question}", "no column"])
def test_templates_that_are_none(template):
    with pytest.raises(ValueError, match=r"template='.*': must be text with columns in braces, such as 'context: {"):
        PairColumns(template=template)


def test_what_is_held_out_shares_no_source_with_the_rest():
    rows = [{"source": f"{number // 2}", "target": f"{number}"} for number in range(40)]
    train, held_out = hold_out(rows, 0.1, seed=3)
    assert len(held_out) == 4
    assert not {row["source"] for row in train} & {row["source"] for row in held_out}
    assert sorted(map(str, train + held_out)) == sorted(map(str, rows))
    assert hold_out(rows, 0.1, seed=3) == (train, held_out)
    assert hold_out(rows, 0.1, seed=4)[1] != held_out
    assert [len(part) for part in hold_out(rows[:4], 0.01, seed=3)] == [2, 2]


@pytest.mark.parametrize(
    ("share", "number", "message"),
    [(0.0, 9, "must be between 0 and 1"), (1.0, 9, "between 0 and 1"), (0.1, 1, "rows of two sources or more")],
)
def test_what_cannot_be_held_out(share, number, message):
    with pytest.raises(ValueError, match=f"validation_share={share}: .*{message}"):
        hold_out([{"source": str(index), "target": "x"} for index in range(number)], share, seed=0)
