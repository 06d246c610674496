"""What commands read: tables of any columns, and tokenizers that lack a token."""

import json
import shutil

from modeling_yan.commands import main

from .conftest import BUNDLED


def test_a_gap_needs_a_mask_token(capsys, tmp_path):
    shutil.copytree(BUNDLED, tmp_path / "without")
    settings = json.loads((tmp_path / "without" / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (tmp_path / "without" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main(["fill", str(tmp_path / "without"), "The <mask> is here."]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "mask_token=None: must be a token, which stands for a gap" in captured.err


def test_evaluate_reads_the_tables_that_finetune_reads(tmp_path):
    (tmp_path / "rows.csv").write_text("place,question,answer\nhere,Where?,yes\nthere,Who?,no\n")
    columns = {"--source_column": "question", "--target_column": "answer", "--template": "Q: {source}"}
    template = columns | {"--template": "{place}: {question}"}
    for options, first in ((columns, "Q: Where?"), (template, "here: Where?")):
        words = [word for option in options.items() for word in option]
        words += ["--data", tmp_path / "rows.csv", "--seeds", 1, "--max_new_tokens", 4, "--metrics", "exact_match"]
        assert main(["evaluate", str(BUNDLED), *map(str, words), "--output", str(tmp_path / first[0])]) == 0
        row = json.loads((tmp_path / first[0] / "predictions.jsonl").read_text().splitlines()[0])
        assert (row["target"], row["source"]) == ("yes", first.removeprefix("Q: "))
    assert main(["evaluate", str(BUNDLED), "--data", str(tmp_path / "rows.csv"), "--output", str(tmp_path / "x")]) == 2
