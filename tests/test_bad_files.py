"""Generated rows, files, checkpoints and commands that are wrong: each is refused with its name, or is right.

The first word of a test's id is the kind that `examples/reliability/page.py` counts it under.
"""

import gzip
import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_yan import YanConfig, YanForAutoencoding, YanForFlowGeneration
from modeling_yan.data import AutoencoderCollator, CompletionCollator, FlowCollator, read_rows, train_tokenizer
from modeling_yan.data.readers import read_file
from modeling_yan.training import PretrainingArguments, parse_arguments

ERRORS = (ValueError, TypeError, OSError)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The cat sat on the mat."] * 4, vocab_size=300)


BAD_TEXTS = {
    "number": 1,
    "none": None,
    "truth": True,
    "bytes": b"abc",
    "mapping": {"a": 1},
    "floats": [1.5, 2.0],
    "nested": [[1], [2]],
    "strings": ["a", "b"],
    "truths": [True, False],
    "NaN": [math.nan],
    "negative": [-1, 4],
    "huge": [10**30],
    "matrix": torch.tensor([[5, 6]]),
    "tensor-of-floats": torch.tensor([5.0]),
    "half-a-surrogate": "\ud800",
}
BAD_ROWS = {"empty": {}, "text": "hello", "none": None, "number": 5, "no-target": {"source": "a"}, "list": ["a"]}
BAD_BATCHES = {"none": None, "text": "abc", "row": {"source": "a", "target": "b"}, "number": 3, "nothing": []}
COLLATORS = {"flow": FlowCollator, "autoencoder": AutoencoderCollator}
SIZES = {"flow": {"max_source_length": 16, "canvas_length": 8}, "autoencoder": {"max_length": 16}}
BAD_SIZES = {"text": "8", "zero": 0, "negative": -1, "fraction": 2.5, "none": None, "NaN": math.nan, "true": True}


def row_cases():
    for stage in COLLATORS:
        for side in ("source", "target"):
            for kind, value in BAD_TEXTS.items():
                if not (kind == "none" and stage == "autoencoder"):  # a row of a data set whose columns are null
                    row = {"source": "a", "target": "b", side: value}
                    yield pytest.param(stage, [row], id=f"collators-{stage}-{side}-{kind}")
        for kind, row in BAD_ROWS.items():
            if not (kind == "no-target" and stage == "autoencoder"):
                yield pytest.param(stage, [row], id=f"collators-{stage}-row-{kind}")
        for kind, batch in BAD_BATCHES.items():
            yield pytest.param(stage, batch, id=f"collators-{stage}-batch-{kind}")


@pytest.mark.parametrize(("stage", "rows"), list(row_cases()))
def test_rows(tokenizer, stage, rows):
    with pytest.raises(ERRORS) as error:
        COLLATORS[stage](tokenizer, **SIZES[stage])(rows)
    assert str(error.value)


def size_cases():
    for stage, names in {
        "flow": ("max_source_length", "canvas_length", "multiple_of"),
        "autoencoder": ("max_length", "max_span_len", "multiple_of", "mask_ratio"),
    }.items():
        for name in names:
            for kind, value in BAD_SIZES.items():
                if not (name == "mask_ratio" and kind == "zero"):
                    yield pytest.param(stage, name, value, id=f"collators-{stage}-{name}-{kind}")


@pytest.mark.parametrize(("stage", "name", "value"), list(size_cases()))
def test_sizes(tokenizer, stage, name, value):
    with pytest.raises(ERRORS, match=name):
        COLLATORS[stage](tokenizer, **{**SIZES[stage], name: value})


COMPLETIONS = {
    "lengths": {"input_ids": [5], "labels": [5, 6]},
    "none": {"input_ids": None, "labels": None},
    "number": {"input_ids": 5, "labels": 5},
    "floats": {"input_ids": [1.5], "labels": [1.5]},
    "row": 3,
}


@pytest.mark.parametrize("row", [pytest.param(row, id=f"collators-trl-{kind}") for kind, row in COMPLETIONS.items()])
def test_completions(tokenizer, row):
    with pytest.raises(ERRORS):
        CompletionCollator(tokenizer, 8, 8)([row])


GOOD = b'{"text": "The cat sat."}\n'
CONTENTS = {
    "utf-16": GOOD.decode().encode("utf-16"),
    "latin-1": '{"text": "Käse"}'.encode("latin-1"),
    "nul-bytes": b"\0" * 50,
    "cut": GOOD + b'{"text": "a',
    "array": b"[1, 2]\n",
    "number": b"5\n",
    "null": b"null\n",
    "string": b'"a"\n',
    "NaN": b'{"text": NaN}\n',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "surrogate": b'{"text": "\\ud800"}\n',
    "html": b"<html></html>",
    "empty": b"",
    "blank": b"\n\n",
    "long-number": b'{"text": ' + b"9" * 5000 + b"}",
    "trailing-comma": b'{"text": "a"},\n',
    "single-quotes": b"{'text': 'a'}\n",
    "two-in-a-line": b'{"text": "a"}{"text": "b"}\n',
    "line-break-in-a-string": b'{"text": "a\nb"}\n',
    "empty-text": b'{"text": ""}\n',
    "list": b'{"text": ["a"]}\n',
    "no-source": b'{"target": "a"}\n',
    "zip": b"PK\x03\x04" + b"\0" * 60,
}


def file_cases():
    for kind, content in CONTENTS.items():
        yield pytest.param("rows.jsonl", content, id=f"files-jsonl-{kind}")
        yield pytest.param("rows.jsonl.gz", gzip.compress(content), id=f"files-gz-{kind}")
        yield pytest.param("rows.parquet", content, id=f"files-parquet-{kind}")
        if kind in ("utf-16", "latin-1", "empty", "blank"):
            yield pytest.param("rows.txt", content, id=f"files-txt-{kind}")
    packed = gzip.compress(GOOD * 100)
    for size in (1, 5, 12, len(packed) - 9, len(packed) - 1):
        yield pytest.param("rows.jsonl.gz", packed[:size], id=f"files-gz-cut-to-{size}")
    for place in (0, 1, 2, len(packed) - 6):
        flipped = bytes(byte ^ (16 if index == place else 0) for index, byte in enumerate(packed))
        yield pytest.param("rows.jsonl.gz", flipped, id=f"files-gz-flipped-{place}")


@pytest.mark.parametrize(("name", "content"), list(file_cases()))
def test_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    read = read_rows if "jsonl" in name else lambda path: list(read_file(path))
    with pytest.raises(ERRORS, match=name.replace(".", r"\.")):
        read(tmp_path / name)


PATHS = {
    "missing": "no.jsonl",
    "folder": "folder.jsonl",
    "nul-byte": "a\0b.jsonl",
    "long-name": "a" * 5000 + ".jsonl",
    "up": "../" * 60 + "nothing.jsonl",
    "no-ending": "rows",
    "other-ending": "rows.csv",
    "ending-alone": ".jsonl/",
}


@pytest.mark.parametrize("name", [pytest.param(name, id=f"paths-{kind}") for kind, name in PATHS.items()])
def test_paths(tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ERRORS):
        read_rows(f"{tmp_path}/{name}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Config, and bytes of the weights, of a tiny model."""
    torch.manual_seed(0)
    sizes = {"num_encoder_layers": 1, "num_flow_layers": 1, "num_decoder_layers": 1, "num_attention_heads": 4}
    config = YanConfig(vocab_size=64, hidden_size=32, max_position_embeddings=48, canvas_length=8, **sizes)
    folder = tmp_path_factory.mktemp("saved")
    YanForFlowGeneration(config).save_pretrained(folder)
    return (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()


@pytest.fixture
def put(saved, tmp_path):
    """Function from config and weights, in place of the right ones, to a folder."""

    def write(config=saved[0], weights=saved[1]):
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "model.safetensors").write_bytes(weights)
        return tmp_path

    return write


@pytest.mark.parametrize("size", [pytest.param(n, id=f"checkpoints-cut-{n}") for n in (0, 1, 7, 8, 9, 100, 5000, -1)])
def test_cut_weights(put, saved, size):
    with pytest.raises(OSError, match="cut off or damaged"):
        YanForFlowGeneration.from_pretrained(put(weights=saved[1][:size]))


@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"checkpoints-flipped-{seed}") for seed in range(24)])
def test_a_flipped_bit_of_the_header(put, saved, seed):
    """It is refused, or what it took away is named in the loading info, or it changed nothing."""
    rng, weights = random.Random(seed), bytearray(saved[1])
    size = 8 + int.from_bytes(weights[:8], "little")
    place = rng.randrange(8) if seed < 8 else rng.randrange(8, size)
    weights[place] ^= 1 << rng.randrange(8)
    folder = put(weights=bytes(weights))
    try:
        model, info = YanForFlowGeneration.from_pretrained(folder, output_loading_info=True)
    except (*ERRORS, RuntimeError):  # the last is transformers' own of a shape
        pass
    else:
        (folder / "model.safetensors").write_bytes(saved[1])
        right = YanForFlowGeneration.from_pretrained(folder).state_dict()
        same = all(torch.equal(weight, right[name]) for name, weight in model.state_dict().items())
        assert same or info["missing_keys"] or info["mismatched_keys"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", [pytest.param(n, id=f"checkpoints-{n}") for n in ("lm_head.weight", "flow.gate", "q_proj")]
)
def test_weights_that_are_not_finite(put, name, value):
    folder = put()
    weights = load_file(folder / "model.safetensors")
    name = next(found for found in weights if name in found)
    weights[name].view(-1)[3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"must be finite.*{name}"):
        YanForFlowGeneration.from_pretrained(folder)


CONFIGS = {
    "no-json": "{",
    "empty": "",
    "html": "<html>",
    "other-model": json.dumps({"model_type": "bert"}),
    "type": {"hidden_size": "32"},
    "null": {"hidden_size": None},
    "NaN": {"flow_sigma": math.nan},
    "choice": {"flow_mixer": "conv"},
    "huge-depth": {"num_flow_layers": 10**9},
    "token": {"eos_token_id": 64},
    "heads": {"num_attention_heads": 5},
    "list": {"cross_attention_layers": [9]},
}


@pytest.mark.parametrize("change", [pytest.param(c, id=f"checkpoints-config-{kind}") for kind, c in CONFIGS.items()])
@pytest.mark.parametrize("model_class", [YanForFlowGeneration, YanForAutoencoding])
def test_configs(put, saved, change, model_class):
    config = change if isinstance(change, str) else json.dumps({**json.loads(saved[0]), **change})
    with pytest.raises(ERRORS) as error:
        model_class.from_pretrained(put(config=config))
    assert str(error.value)


NEEDED = {"stage": "flow", "config": "c", "tokenizer": "t", "output_dir": "o"}
FIELDS = ("max_steps", "save_steps", "per_device_train_batch_size", "learning_rate", "warmup_steps", "weight_decay")
FIELDS += ("max_words", "ema_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "seed")
VALUES = {"text": "many", "none": None, "negative": -1, "NaN": math.nan, "infinity": math.inf, "list": [1]}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [pytest.param(value, id=f"commands-{kind}") for kind, value in VALUES.items()])
def test_arguments(name, value):
    with pytest.raises(ERRORS, match=name):
        PretrainingArguments(**{**NEEDED, name: value})


COMMANDS = {
    "nothing": [],
    "stage": ["--stage", "third"],
    "unknown": ["--lenght", "3"],
    "abbreviated": ["--max_st", "3"],
    "no-number": ["--max_steps", "many"],
    "no-value": ["--max_steps"],
    "schedule": ["--lr_scheduler_type", "zigzag"],
    "precision": ["--mixed_precision", "fp4"],
    "recipe-missing": ["--recipe", "no-such-file.yaml"],
    "negative": ["--max_steps", "-5"],
}


@pytest.mark.parametrize("words", [pytest.param(words, id=f"commands-{kind}") for kind, words in COMMANDS.items()])
def test_commands(capsys, words):
    given = [] if not words else [word for name, value in NEEDED.items() for word in (f"--{name}", value)]
    with pytest.raises((*ERRORS, SystemExit)) as error:
        parse_arguments([*given, *words])
    if isinstance(error.value, SystemExit):
        assert error.value.code == 2
        assert (words or ["--stage"])[0].removeprefix("--") in capsys.readouterr().err
