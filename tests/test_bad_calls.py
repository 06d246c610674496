"""Generated calls that no one should make: each is refused by a documented error that names the culprit, or is right.

The first word of a test's id is the kind that `examples/reliability/page.py` counts it under.
"""

import math

import numpy as np
import pytest
import torch
from transformers import pipeline

from modeling_yan import YanConfig, YanForAutoencoding, YanForFlowGeneration, YanModel
from modeling_yan.data import train_tokenizer

VOCABULARY, POSITIONS, WIDTH = 64, 48, 32
ERRORS = (ValueError, TypeError, OSError)
NAN, INF = math.nan, math.inf
IDS = torch.randint(4, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))
JUNK = {"text": "many", "digits": "4", "list": ["a"], "mapping": {"a": 1}, "object": object(), "complex": 1j}

COUNTS = ("vocab_size", "hidden_size", "num_encoder_layers", "num_attention_heads", "max_position_embeddings")
COUNTS += ("num_experts", "canvas_length", "num_flow_steps", "state_size", "conv_kernel")
NUMBERS = ("layer_norm_eps", "flow_sigma", "gate_temperature", "hidden_dropout", "nll_weight")
CHOICES = ("encoder_mixer", "flow_mixer", "expert_scope", "train_expert_choice")
SWITCHES = ("tie_word_embeddings", "freeze_encoder")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")


def config_cases():
    junk = {**JUNK, "NaN": NAN, "infinity": INF, "none": None}
    for names, values in (
        (COUNTS, {**junk, "true": True, "zero": 0, "negative": -1, "fraction": 2.5, "huge": 10**30}),
        (NUMBERS, {**junk, "true": True, "negative": -1}),
        (CHOICES, {**junk, "unknown": "conv"}),
        (SWITCHES, {**junk, "one": 1}),
        (TOKENS, {**JUNK, "true": True, "negative": -1, "beyond": VOCABULARY, "huge": 10**30}),
    ):
        for name in names:
            for kind, value in values.items():
                yield pytest.param(name, value, id=f"config-{name}-{kind}")


@pytest.mark.parametrize(("name", "value"), list(config_cases()))
def test_config(name, value):
    small = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_attention_heads": 4}
    with pytest.raises(ERRORS, match=name):
        YanConfig(**{**small, name: value})


@pytest.fixture(scope="module")
def models():
    """A tiny seeded model of each class; nothing here changes them."""
    torch.manual_seed(0)
    sizes = {"num_encoder_layers": 1, "num_flow_layers": 1, "num_decoder_layers": 1, "num_attention_heads": 4}
    config = YanConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        max_position_embeddings=POSITIONS,
        canvas_length=8,
        initializer_range=0.3,
        **sizes,
    )
    classes = {"flow": YanForFlowGeneration, "autoencoder": YanForAutoencoding, "encoder": YanModel}
    return {name: model_class(config).eval() for name, model_class in classes.items()}


PROMPTS = {
    "floats": IDS.float(),
    "half": IDS.half(),
    "truths": IDS > 9,
    "complex": IDS.to(torch.complex64),
    "uint8": IDS.to(torch.uint8),
    "int8": IDS.to(torch.int8),
    "int16": IDS.short(),
    "meta": IDS.to("meta"),
    "1d": IDS[0],
    "3d": IDS[None],
    "scalar": torch.tensor(5),
    "no-rows": IDS[:0],
    "negative": torch.where(IDS > 20, -1, IDS),
    "vocabulary": IDS * 0 + VOCABULARY,
    "huge": IDS + 10**12,
    "list": IDS.tolist(),
    "text": "hello",
    "array": IDS.numpy(),
    "mapping": {"a": 1},
    "number": 5,
    "sparse": IDS.to_sparse(),
    "nested": torch.nested.nested_tensor([IDS[0], IDS[1][:3]]),
    "quantised": torch.quantize_per_tensor(IDS.float(), 1.0, 0, torch.qint8),
    "long": IDS.repeat(1, 9),
    "very-long": IDS.repeat(1, 5000),
}
MASKS = {
    "NaN": torch.full((3, 6), NAN),
    "negative": -torch.ones(3, 6),
    "two": 2 * torch.ones(3, 6, dtype=torch.long),
    "half": torch.full((3, 6), 0.5),
    "additive": torch.tensor([[0, 0, 0, 0, -1e9, -1e9]] * 3),
    "list": [[1] * 6] * 3,
    "text": "x",
    "array": np.ones((3, 6)),
    "1d": torch.ones(6),
    "4d": torch.ones(3, 1, 6, 6),
    "other": torch.ones(3, 5),
    "complex": torch.ones(3, 6, dtype=torch.complex64),
    "meta": torch.ones(3, 6, device="meta"),
}
LABELS = {name: PROMPTS[name] for name in ("floats", "truths", "complex", "int8", "meta", "1d", "3d", "scalar")}
LABELS |= {name: PROMPTS[name] for name in ("no-rows", "negative", "vocabulary", "list", "text", "array")}
LABELS |= {"minus-101": IDS * 0 - 101, "other-rows": IDS[:2], "one-hot": torch.nn.functional.one_hot(IDS, VOCABULARY)}
EMBEDS = torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(0))
EMBEDDINGS = {
    "ids": IDS,
    "2d": EMBEDS[0],
    "4d": EMBEDS[None],
    "other-width": EMBEDS[..., 1:],
    "list": EMBEDS.tolist(),
    "meta": EMBEDS.to("meta"),
    "no-rows": EMBEDS[:0],
    "no-tokens": EMBEDS[:, :0],
    "complex": EMBEDS + 0j,
    "long": EMBEDS.repeat(1, 9, 1),
}
PLACES = {
    "negative": -torch.ones(3, 6, dtype=torch.long),
    "beyond": torch.full((3, 6), POSITIONS),
    "floats": torch.zeros(3, 6),
    "truths": torch.zeros(3, 6, dtype=torch.bool),
    "1d": torch.arange(6),
    "other": torch.zeros(3, 5, dtype=torch.long),
    "two-rows": torch.arange(6).expand(2, 6),
    "list": [[0] * 6] * 3,
}
FORWARD = {"input_ids": PROMPTS, "attention_mask": MASKS, "inputs_embeds": EMBEDDINGS, "position_ids": PLACES}


def forward_cases():
    for argument, values in {**FORWARD, "labels": LABELS}.items():
        classes = ("flow", "autoencoder") if argument == "labels" else ("flow", "autoencoder", "encoder")
        for number, (kind, value) in enumerate(
            values.items()
        ):  # every value meets one class, and each class all kinds
            name = classes[number % len(classes)]
            yield pytest.param(name, argument, value, id=f"forward-{name}-{argument}-{kind}")
    for argument in ("canvas_length", "num_flow_steps"):
        values = {**JUNK, "NaN": NAN, "infinity": INF, "negative": -1, "fraction": 2.5, "true": True, "whole": 2.0}
        for kind, value in values.items():
            yield pytest.param("flow", argument, value, id=f"forward-flow-{argument}-{kind}")


@pytest.mark.parametrize(("name", "argument", "value"), list(forward_cases()))
def test_forward(models, name, argument, value):
    given = {argument: value} if argument in ("input_ids", "inputs_embeds") else {"input_ids": IDS, argument: value}
    words = {"input_ids": "input_ids|the input|token", "canvas_length": "canvas", "inputs_embeds": "embeds|the input"}
    with pytest.raises(ERRORS, match=words.get(argument, argument)):
        models[name](**given)


@pytest.mark.parametrize("kind", ["prompt", "mask"])
def test_generate_is_as_strict(models, kind):
    for value in (PROMPTS if kind == "prompt" else MASKS).values():
        given = {"input_ids": value} if kind == "prompt" else {"input_ids": IDS, "attention_mask": value}
        with pytest.raises(ERRORS, match=r"the prompt|attention_mask|token ids"):
            models["flow"].generate(**given)


OPTIONS = {
    "do_sample return_dict_in_generate return_prompt crf_decoding": {"one": 1},
    "max_new_tokens max_length": {"zero": 0, "true": True, "fraction": 2.5},
    "min_new_tokens min_length seed": {"true": True, "fraction": 2.5},
    "canvas_length num_return_sequences": {"zero": 0, "true": True, "beyond": POSITIONS + 1},
    "temperature": {"negative": -1, "true": True, "NaN": NAN, "infinity": INF},
    "num_flow_steps": {"negative": -1, "true": True},
    "pad_token_id bos_token_id": {"negative": -1, "beyond": VOCABULARY, "true": True},
    "eos_token_id": {"negative": -1, "beyond": VOCABULARY, "list-beyond": [2, VOCABULARY], "nested": [[2]]},
    "suppress_tokens": {"negative": [-1], "beyond": [VOCABULARY], "floats": [2.0], "all": list(range(VOCABULARY))},
    "streamer generator generation_config": {"one": 1, "true": True},
    "expert_choice eos_strategy compile_config": {"number": 7},
    "lenght": {"typo": 3},
}


def option_cases():
    for names, values in OPTIONS.items():
        junk = {} if names == "lenght" else {kind: JUNK[kind] for kind in ("text", "mapping", "object")}
        for name in names.split():
            for kind, value in {**junk, **values}.items():
                yield pytest.param(name, value, id=f"generate-{name}-{kind}")


@pytest.mark.parametrize(("name", "value"), list(option_cases()))
def test_generate(models, name, value):
    with pytest.raises(ERRORS, match=name.removesuffix("_length") if name == "canvas_length" else name):
        models["flow"].generate(IDS, **{name: value})


RIGHT = {
    "int32": {"input_ids": IDS.int()},
    "not-contiguous": {"input_ids": IDS.T.contiguous().T},
    "mask-of-truths": {"input_ids": IDS, "attention_mask": torch.ones(3, 6, dtype=torch.bool)},
    "mask-of-floats": {"input_ids": IDS, "attention_mask": torch.ones(3, 6)},
    "huge-seed": {"input_ids": IDS, "seed": 2**32 * 5},
    "eos-in-a-tensor": {"input_ids": IDS, "eos_token_id": torch.tensor(2)},
    "beyond-uint64": {"input_ids": IDS, "seed": -(2**70)},
}


@pytest.mark.parametrize("given", [pytest.param(given, id=f"generate-right-{kind}") for kind, given in RIGHT.items()])
def test_generate_is_right(models, given):
    """Unusual, but there is one thing that it can mean."""
    assert torch.equal(models["flow"].generate(**given), models["flow"].generate(IDS))


def test_forward_of_labels_in_int32_and_of_embeddings_in_double(models):
    for name in ("flow", "autoencoder"):
        assert models[name](IDS, labels=IDS.flip(1).int()).loss == models[name](IDS, labels=IDS.flip(1)).loss
    right = models["encoder"](inputs_embeds=EMBEDS).last_hidden_state
    assert torch.equal(models["encoder"](inputs_embeds=EMBEDS.double()).last_hidden_state, right)


WEIGHTS = ("model.norm", "flow.gate", "flow.experts", "flow.modulation", "decoder", "lm_head.bias", "word_embed")


@pytest.mark.parametrize("part", [pytest.param(part, id=f"weights-{part}") for part in WEIGHTS])
@pytest.mark.parametrize("do_sample", [False, True], ids=["likeliest", "drawn"])
def test_weights(make_model, part, do_sample):
    """One row of one weight is NaN, as after a training that diverged: no text, and the error names the weight."""
    model = make_model(initializer_range=0.3)
    name, weight = next((name, weight) for name, weight in model.named_parameters() if part in name)
    with torch.no_grad():
        weight[..., 0] = NAN
    with pytest.raises(FloatingPointError, match=name.replace(".", r"\.")):
        model.generate(IDS, do_sample=do_sample, seed=1, max_new_tokens=20)


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """A pipeline of a tiny model."""
    tokenizer = train_tokenizer(["The cat sat on the mat."] * 4, vocab_size=300)
    torch.manual_seed(0)
    sizes = {"num_encoder_layers": 1, "num_flow_layers": 1, "num_decoder_layers": 1, "num_attention_heads": 4}
    config = YanConfig(
        vocab_size=300, hidden_size=WIDTH, max_position_embeddings=POSITIONS, canvas_length=8, mask_token_id=3, **sizes
    )
    return pipeline("text-generation", model=YanForFlowGeneration(config).eval(), tokenizer=tokenizer)


PIPELINE = {
    "number": ((5,), {}),
    "none": ((None,), {}),
    "bytes": ((b"The cat",), {}),
    "list-of-numbers": (([1, 2],), {}),
    "too-long": (("cat " * 500,), {}),
    "steps": (("The cat",), {"num_flow_steps": -1}),
    "beams": (("The cat",), {"num_beams": 4}),
    "typo": (("The cat",), {"max_new_tokns": 4}),
    "tokens": (("The cat",), {"max_new_tokens": 0}),
    "temperature": (("The cat",), {"do_sample": True, "temperature": NAN}),
    "expert": (("The cat",), {"expert_choice": "magic"}),
    "eos": (("The cat",), {"eos_token_id": 10**6}),
}


@pytest.mark.parametrize(
    ("words", "options"), [pytest.param(*case, id=f"pipeline-{kind}") for kind, case in PIPELINE.items()]
)
def test_pipeline(write, words, options):
    with pytest.raises(ERRORS) as error:
        write(*words, **options)
    assert str(error.value)
