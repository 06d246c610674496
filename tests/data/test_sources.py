import gzip
import json
import logging
import pickle
import random
from dataclasses import replace

import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from modeling_yan.data import REGISTRY, generate_stories, load_rows, read_rows, readers, split_sentences, write_rows
from modeling_yan.data.sources import STREAM_BATCH, main
from modeling_yan.data.tasks import infilling

TEXTS = [f"Story {number} has a bird in it. The bird sang {number} songs to the old king." for number in range(40)]
TEXT_ROWS = [{"text": text} for text in TEXTS]
PAIR_ROWS = [{"source": f"question {number}", "target": f"answer {number}"} for number in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """An own cache for every test, so that nothing is found that was not made in it."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    return folder


def write_file(path, rows):
    """Write rows in the format of the name."""
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(row["text"] for row in rows))
    else:
        write_rows(path, rows)
    return path


def both(*arguments, **options):
    """The rows of a stored and of a streamed data set, which must be the same."""
    stored, streamed = load_rows(*arguments, **options), load_rows(*arguments, streaming=True, **options)
    assert isinstance(stored, Dataset)
    assert isinstance(streamed, IterableDataset)
    assert stored.features == streamed.features
    assert list(stored) == list(streamed)
    return list(stored)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "txt", "parquet"])
def test_texts_of_every_format(tmp_path, ending):
    path = write_file(tmp_path / f"rows.{ending}", TEXT_ROWS)
    assert both(path) == TEXT_ROWS
    assert [child.name for child in tmp_path.iterdir()] == [path.name]  # nothing beside the user's data


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_pairs_of_every_format(tmp_path, ending):
    rows = [{**row, "number": number} for number, row in enumerate(PAIR_ROWS)]
    assert both(str(write_file(tmp_path / f"rows.{ending}", rows))) == PAIR_ROWS


def test_several_files_and_patterns(tmp_path):
    paths = [write_file(tmp_path / f"{name}.jsonl", TEXT_ROWS[start::3]) for start, name in enumerate("cab")]
    assert both(paths) == [row for start in range(3) for row in TEXT_ROWS[start::3]]
    assert both(tmp_path / "*.jsonl") == [row for start in (1, 2, 0) for row in TEXT_ROWS[start::3]]


def test_paragraphs(tmp_path):
    (tmp_path / "book.txt").write_text("One line\nand another.\n\nA second paragraph.")
    rows = both(tmp_path / "book.txt", sample_by="paragraph")
    assert rows == [{"text": "One line\nand another."}, {"text": "A second paragraph."}]
    with pytest.raises(ValueError, match="sample_by is 'page', but must be 'line' or 'paragraph'"):
        load_rows(tmp_path / "book.txt", sample_by="page")


def test_columns_are_renamed(tmp_path):
    rows = [{"in": {"body": f"q {number}"}, "out": f"a {number}", "text": "unused"} for number in range(3)]
    path = write_file(tmp_path / "rows.jsonl", rows)
    pairs = [{"source": f"q {number}", "target": f"a {number}"} for number in range(3)]
    assert both(path, columns={"source": "in.body", "target": "out"}) == pairs
    assert both(path, columns={"text": "out"}) == [{"text": f"a {number}"} for number in range(3)]
    with pytest.raises(ValueError, match=r"columns has \['label', 'text'\], but must have 'text', or"):
        load_rows(path, columns={"text": "out", "label": "in"})
    with pytest.raises(ValueError, match=r"line 1: .*the column 'on' is missing; there are 'in', 'out', 'text'"):
        load_rows(path, columns={"text": "on"})


def test_row_i_is_drawn_from_the_seed_and_i(tmp_path):
    path = write_file(tmp_path / "rows.jsonl", [{"text": TEXTS[0]}] * 40)
    pairs = both(path, task="infilling", seed=3)
    assert pairs == [infilling(TEXTS[0], random.Random(f"3 0 {number}"), "<mask>") for number in range(40)]
    assert len({pair["source"] for pair in pairs}) > 5
    assert both(path, task="infilling", seed=4) != pairs


def test_other_rows_and_other_workers_change_nothing(tmp_path):
    paths = [write_file(tmp_path / f"{name}.jsonl", TEXT_ROWS[start::2]) for start, name in enumerate("ab")]
    pairs = both(paths, task="last_word", answer_slot="<mask> ")
    streamed = load_rows(paths, task="last_word", answer_slot="<mask> ", streaming=True)
    assert streamed.num_shards == 2
    assert list(pickle.loads(pickle.dumps(streamed))) == pairs
    assert [row for index in range(2) for row in streamed.shard(2, index)] == pairs
    write_file(paths[0], [{"text": "changed"}, *TEXT_ROWS[0::2][1:]])
    assert both(paths, task="last_word", answer_slot="<mask> ") == pairs[1:]  # the changed row is no sentence


def test_a_stopped_stream_goes_on_at_the_same_row(sst2_folder, tmp_path):
    for source in (sst2_folder, [write_file(tmp_path / f"{name}.jsonl", TEXT_ROWS) for name in "ab"]):
        options = {"columns": {"text": "sentence" if source == sst2_folder else "text"}, "task": "infilling"}
        rows = iter(stopped := load_rows(source, streaming=True, **options))
        first = [next(rows) for _ in range(27)]
        resumed = load_rows(source, streaming=True, **options)
        resumed.load_state_dict(stopped.state_dict())
        assert first + list(resumed) == list(load_rows(source, **options))


def test_details_reach_the_task(tmp_path):
    path = write_file(tmp_path / "rows.jsonl", TEXT_ROWS)
    options = {"task": "infilling", "mask_token": "[M]", "max_words": 8, "count_tokens": len, "mask_ratio": 0.5}
    for pair in both(path, **options):
        assert pair["target"] in split_sentences(TEXTS[int(pair["target"].split()[1])])[:1]
        assert pair["source"].count("[M]") == sum(map(len, pair["masked"]))


def test_streaming_reads_no_more_than_it_needs(tmp_path, monkeypatch):
    lines = []
    read_lines = readers.numbered_lines

    def count_lines(path):
        for line in read_lines(path):
            lines.append(line)
            yield line

    path = write_file(tmp_path / "rows.jsonl", TEXT_ROWS)
    monkeypatch.setattr(readers, "numbered_lines", count_lines)
    streamed = load_rows(path, columns={"text": "text"}, streaming=True)
    assert not lines
    rows = iter(streamed)
    assert [next(rows), next(rows)] == TEXT_ROWS[:2]
    assert len(lines) <= 3


def test_skipped_rows_are_counted(tmp_path, caplog):
    rows = [{"source": "a", "target": ["b", " ", ""][number % 3]} for number in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(load_rows(path)) == rows[::3]
    assert [record.message for record in caplog.records] == [f"{path}: skipped 20 of 30 rows (empty target: 20)"]
    caplog.clear()
    assert list(load_rows(path, streaming=True)) == rows[::3]
    assert [record.message for record in caplog.records] == [
        f"{path}: skipped 1 of 2 rows (empty target: 1) so far",
        f"{path}: skipped 10 of 15 rows (empty target: 10) so far",
    ]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


BAD_ROWS = {
    "not JSON": ("{text: 1}", "line 3: not JSON"),
    "list": ("[1]", "line 3: .*list, not an object"),
    "other kind": ('{"source": "a", "target": "b"}', "line 3: .*'text' is missing; there are 'source', 'target'"),
    "null": ('{"text": null}', 'line 3: "text" is NoneType, not a string'),
    "number": ('{"text": 5}', 'line 3: "text" is int, not a string'),
    "half a surrogate pair": ('{"text": "\\ud800"}', "line 3: .*not valid Unicode"),
}


@pytest.mark.parametrize(("line", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_is_named(tmp_path, line, message, streaming):
    (tmp_path / "bad.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=rf"bad\.jsonl, {message}"):
        list(load_rows(tmp_path / "bad.jsonl", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_cut_shard_among_others_is_named(tmp_path, streaming):
    good = write_file(tmp_path / "good.jsonl.gz", TEXT_ROWS)
    noise = random.Random(0)
    rows = [{"text": f"{noise.random()}"} for _ in range(3000)]
    bad = tmp_path / "bad.jsonl.gz"
    bad.write_bytes(gzip.compress(json.dumps(rows[0]).encode() + b"\n" + json.dumps(rows).encode())[:-20])
    with pytest.raises(ValueError, match=r"bad\.jsonl\.gz, after line 1: the gzip file is cut off or damaged"):
        list(load_rows([good, bad], streaming=streaming))


def test_nothing_to_load(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match=r"empty\.jsonl: the file holds no rows"):
        load_rows(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"no rows are left: .*skipped 1 of 1 rows \(empty text: 1\)"):
        load_rows(tmp_path / "blank.jsonl")
    with pytest.raises(ValueError, match=r"no rows are left: .*blank\.jsonl"):
        load_rows(tmp_path / "blank.jsonl")
    with pytest.raises(ValueError, match="there are no files"):
        load_rows([])
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: no such file"):
        load_rows(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match=r"row 1: the columns are \['body'\], but 'text', or 'source' and 'target'"):
        load_rows(write_file(tmp_path / "other.json", [{"body": "a"}]))


def test_options_that_do_not_fit(tmp_path):
    path = write_file(tmp_path / "rows.jsonl", TEXT_ROWS)
    with pytest.raises(ValueError, match="files have no split"):
        load_rows(path, split="train")
    with pytest.raises(ValueError, match=r"path is for names of the registry \(narrativeqa, .*but source is 'sqaud'"):
        load_rows("sqaud", path=path)
    with pytest.raises(ValueError, match="squad: the registry knows the columns"):
        load_rows("squad", columns={"text": "context"})
    with pytest.raises(ValueError, match="text_infilling: path must be given"):
        load_rows("text_infilling")
    with pytest.raises(ValueError, match="num_rows is 0, but must be at least 1"):
        load_rows(path, num_rows=0)
    with pytest.raises(ValueError, match="task is 'poem', but must be 'text' or 'infilling'"):
        load_rows(path, task="poem", streaming=True)
    with pytest.raises(ValueError, match="its rows are pairs already"):
        load_rows(write_file(tmp_path / "pairs.jsonl", PAIR_ROWS), task="infilling")


def test_num_rows(tmp_path):
    path = write_file(tmp_path / "rows.jsonl", TEXT_ROWS)
    assert both(path, num_rows=7) == TEXT_ROWS[:7]
    assert both(path, num_rows=700) == TEXT_ROWS


def test_the_cache_is_used_until_something_changes(tmp_path, cache, monkeypatch):
    path = write_file(tmp_path / "rows.jsonl", TEXT_ROWS)
    options = {"columns": {"text": "text"}, "task": "infilling", "cache_dir": tmp_path / "own"}
    first = load_rows(path, **options)
    assert first.cache_files[0]["filename"].startswith(str(tmp_path / "own"))
    assert not list(cache.iterdir())
    monkeypatch.setattr("modeling_yan.data.sources.read_file", None)  # reading again would fail
    assert list(load_rows(path, **options)) == list(first)
    with pytest.raises(Exception, match="generating the dataset"):
        load_rows(path, seed=1, **options)
    monkeypatch.undo()
    write_file(path, TEXT_ROWS[1:])
    assert [row["target"] for row in load_rows(path, **options)] == TEXTS[1:]


# Data sets of the registry, end to end, from folders in the layout of the hub.


def sst2_features(names=("negative", "positive")):
    return Features({"idx": Value("int32"), "sentence": Value("string"), "label": ClassLabel(names=list(names))})


@pytest.fixture
def sst2_folder(tmp_path):
    """Two shards of train and one of validation, whose labels are missing in part."""
    (tmp_path / "data").mkdir()
    rows = [{"idx": number, "sentence": f"film {number} ", "label": number % 2} for number in range(50)]
    shards = {"train-00000-of-00002": rows[:20], "train-00001-of-00002": rows[20:], "validation-00000-of-00001": rows}
    for name, shard in shards.items():
        shard = [{**row, "label": -1} if name.startswith("v") and row["idx"] > 2 else row for row in shard]
        Dataset.from_list(shard, features=sst2_features()).to_parquet(tmp_path / "data" / f"{name}.parquet")
    return tmp_path


def test_registry_from_a_parquet_folder(sst2_folder, caplog):
    files = sorted(sst2_folder.rglob("*"))
    rows = both("sst2", path=sst2_folder)
    assert [row["source"] for row in rows] == [f"film {number} Sentiment?" for number in range(50)]
    assert [row["target"] for row in rows] == ["negative", "positive"] * 25
    assert not caplog.records
    assert len(both("sst2", path=sst2_folder, split="validation")) == 3
    assert caplog.records[0].message == "sst2: skipped 47 of 50 rows (no label: 47)"
    assert sorted(sst2_folder.rglob("*")) == files
    streamed = load_rows("sst2", path=sst2_folder, streaming=True)
    assert streamed.num_shards == 2
    assert list(pickle.loads(pickle.dumps(streamed))) == rows  # as sent to the workers of a data loader
    with pytest.raises(ValueError, match="split"):
        load_rows("sst2", path=sst2_folder, split="dev")


def test_streaming_formats_no_more_than_it_needs(sst2_folder, monkeypatch):
    formatted = []

    def count_rows(sentence, label):
        formatted.append(sentence)
        return {"source": sentence, "target": str(label), "task": "counted"}

    monkeypatch.setitem(REGISTRY, "sst2", replace(REGISTRY["sst2"], formatter=count_rows))
    streamed = load_rows("sst2", path=sst2_folder, streaming=True)
    assert not formatted
    next(iter(streamed))
    assert 1 <= len(formatted) <= STREAM_BATCH


def test_labels_in_another_order_are_refused(tmp_path):
    rows = [{"idx": 0, "sentence": "a", "label": 0}]
    Dataset.from_list(rows, features=sst2_features(("positive", "negative"))).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"sst2: the labels are \['positive', 'negative'\], but \['negative', "):
        load_rows("sst2", path=tmp_path)


def test_registry_from_a_folder_of_json_lines(tmp_path):
    row = {"passage": "Mary is here.\n", "question": "Where is Mary?", "answer": "here", "task": 20}
    for split in ("train", "valid", "test"):
        (tmp_path / f"babi_{split}.jsonl").write_text(json.dumps(row) + "\n")
    pair = {"source": "Mary is here. Question: Where is Mary?", "target": "here", "task": "question_answering"}
    for split in REGISTRY["babi"].splits:
        assert both("babi", path=tmp_path, split=split) == [{**pair, "kind": "qa20"}]


def test_registry_from_a_folder_of_texts(tmp_path):
    for split in REGISTRY["rocstories"].splits:
        (tmp_path / f"{split}.txt").write_text("\n".join(TEXTS))
    pairs = both("rocstories", path=str(tmp_path), split="test", seed=5)
    assert {row["task"] for row in pairs} == {"last_word"}
    assert {row["target"] for row in pairs} == {"it", "king"}
    assert both("rocstories", path=tmp_path, split="test", seed=6) != pairs
    assert both("rocstories", path=tmp_path, task="text") == TEXT_ROWS


def test_nested_columns_from_a_folder(tmp_path):
    answers = {"text": ["a bird", "bird"], "answer_start": [12, 14]}
    rows = [{"id": "1", "title": "T", "context": TEXTS[0], "question": "What?", "answers": answers}]
    rows.append({**rows[0], "answers": {"text": [], "answer_start": []}})
    Dataset.from_list(rows).to_parquet(tmp_path / "validation.parquet")
    (row,) = both("squad", path=tmp_path, split="validation")
    assert row["answers"] == ["a bird", "bird"]
    Dataset.from_list([{"document": {"summary": {"text": TEXTS[0]}}}]).to_parquet(tmp_path / "train.parquet")
    (row,) = both("narrativeqa", path=tmp_path / "train.parquet", max_words=8)
    assert row["target"] == "Story 0 has a bird in it."


def test_a_missing_column_of_a_hub_data_set_is_named(sst2_folder):
    for streaming in (False, True):
        with pytest.raises(
            ValueError, match="squad: the column 'context' is missing; there are 'idx', 'sentence', 'label'"
        ):
            list(load_rows("squad", path=sst2_folder, streaming=streaming))


def test_other_hub_data_sets(sst2_folder):
    rows = both(sst2_folder, columns={"text": "sentence"}, split="validation")
    assert rows == [{"text": f"film {number} "} for number in range(50)]
    with pytest.raises(ValueError, match=r"the columns are \['idx', 'label', 'sentence'\], but 'text', or"):
        load_rows(sst2_folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_and_empty_folders(tmp_path, streaming):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="arquet"):
        load_rows("sst2", path=tmp_path, streaming=streaming)
    Dataset.from_dict({"idx": [], "sentence": [], "label": []}, features=sst2_features()).to_parquet(
        tmp_path / "train.parquet"
    )
    with pytest.raises(ValueError, match=r"no rows|no data"):
        load_rows("sst2", path=tmp_path, streaming=streaming)
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="must be a file here, in the registry"):
        load_rows("sst2", path=tmp_path, streaming=streaming)


def test_an_unknown_name():
    with pytest.raises(FileNotFoundError, match=r"'squat': must be a file here, in the registry \(narrativeqa, "):
        load_rows("squat")


def test_stories():
    rows = both("stories", num_rows=30, answer_slot="<mask> ")
    assert all(row["source"].startswith("<mask> ") and row["target"] for row in rows)
    assert len({row["source"] for row in rows}) == 30
    assert both("stories", num_rows=10, answer_slot="<mask> ") == rows[:10]
    with pytest.raises(ValueError, match="num_rows must be given"):
        load_rows("stories")
    with pytest.raises(ValueError, match="split is 'dev', but must be one of train, validation, test"):
        load_rows("stories", num_rows=3, split="dev")


def test_splits_of_stories_have_nothing_in_common():
    splits = {split: load_rows("stories", num_rows=100, split=split, seed=1) for split in REGISTRY["stories"].splits}
    sources = {split: set(rows["source"]) for split, rows in splits.items()}
    other_seed = set(load_rows("stories", num_rows=300, seed=2)["source"])
    assert not sources["train"] & sources["validation"]
    assert not (sources["train"] | other_seed) & sources["test"]
    assert not (sources["validation"] | other_seed) & sources["test"]
    assert {row["kind"] for row in splits["train"]} == {row["kind"] for row in generate_stories(50, seed=0)}


def test_command_lists_the_registry(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "family", "hub", "name", "splits", "columns"]
    assert [line.split()[0] for line in lines[1:]] == list(REGISTRY)
    assert "rajpurkar/squad" in lines[4]
    assert lines[4].endswith("context, question, answers.text")


def test_command_writes_pairs(sst2_folder, tmp_path, capsys):
    output = tmp_path / "pairs.jsonl.gz"
    arguments = ["--name", "sst2", "--split", "train", "--num_rows", "12", "--path", str(sst2_folder)]
    main([*arguments, "--answer_slot", "<mask> ", "--output", str(output)])
    assert read_rows(output) == list(load_rows("sst2", path=sst2_folder, num_rows=12, answer_slot="<mask> "))
    assert "12 rows of sst2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--name", "sst2"])


def test_command_makes_pairs_of_local_texts(tmp_path):
    path = write_file(tmp_path / "texts.txt", TEXT_ROWS)
    files = ["--path", str(path), "--output", str(tmp_path / "pairs.jsonl")]
    main(["--name", "text_infilling", "--max_words", "9", "--seed", "5", *files])
    assert read_rows(tmp_path / "pairs.jsonl") == both(path, task="infilling", max_words=9, seed=5)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_pair_keeps_where_it_is_learned(tmp_path, suffix, streaming):
    rows = [
        {"source": "<mask> Who?", "target": "Ann", "answer_slot": "<mask> ", "in_place": False, "other": "x"},
        {"source": "<mask> sat.", "target": "Ann sat.", "answer_slot": None, "in_place": True, "other": "x"},
    ]
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        write_rows(path, rows)
    loaded = list(load_rows(path, streaming=streaming))
    assert loaded == [{name: row[name] for name in row if name != "other"} for row in rows]
    chosen = load_rows(path, columns={"source": "source", "target": "target"}, streaming=streaming)
    assert list(chosen) == [{name: row[name] for name in ("source", "target")} for row in rows]
    slots = [row["answer_slot"] for row in load_rows(path, answer_slot="<mask><mask> ", streaming=streaming)]
    assert slots == ["<mask><mask> <mask> ", None]  # a target in its source's positions needs none


def test_a_later_row_that_alone_says_where_it_is_learned_is_refused(tmp_path):
    rows = [{"source": "Who?", "target": "Ann"}, {"source": "<mask> sat.", "target": "Ann sat.", "in_place": True}]
    write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(ValueError, match=r"pairs\.jsonl.*2: has in_place, which the first row of its file has not"):
        list(load_rows(tmp_path / "pairs.jsonl", streaming=True))
    for number, row in enumerate(rows):
        write_rows(tmp_path / f"{number}.jsonl", [row])
    loaded = load_rows([tmp_path / "0.jsonl", tmp_path / "1.jsonl"])
    assert list(loaded) == [{**rows[0], "in_place": None}, rows[1]]


@pytest.mark.parametrize(("name", "value"), [("in_place", "false"), ("in_place", 1), ("answer_slot", 3)])
def test_where_a_pair_is_learned_is_of_its_type(tmp_path, name, value):
    write_rows(tmp_path / "pairs.jsonl", [{"source": "Who?", "target": "Ann", name: value}])
    with pytest.raises(ValueError, match=rf'pairs\.jsonl.*1: "{name}" is {type(value).__name__}, not a (bool|str)'):
        list(load_rows(tmp_path / "pairs.jsonl"))
