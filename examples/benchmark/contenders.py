"""What is measured: YAN, the naive YAN and the models people would use instead, all of equal size.

Letters of the shape comments: B batch, S prompt length, L new tokens.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from naive import WASTES, naive_generate
from torch import nn
from transformers.generation.configuration_utils import CompileConfig

from modeling_yan import YanConfig, YanForFlowGeneration
from modeling_yan.baselines import make_baseline
from modeling_yan.decoding_yan import YanTransitions
from modeling_yan.export import with_int8_weights, with_packed_weights

PRESETS = Path(__file__).parents[2] / "configuration"
VARIANTS = ("transformer", "mamba")
YAN_STEPS = (1, 2, 3, 4)
NAIVE_STEPS = 3
DIFFUSION_STEPS = (16, 64, None)  # None: as many as there are tokens
EAGER = "-eager"  # ends the name of a model that is not compiled where it is otherwise
CRF_RANK = 32  # of the presets that have chains


def with_transitions(model):
    """A copy that reads its canvas off as a chain, of fresh transitions: the same tokens, the cost of trained ones."""
    model = copy.deepcopy(model)
    model.config.crf_rank = CRF_RANK
    model.transitions = YanTransitions(model.config).to(model.device, model.dtype)
    model.transitions.apply(model._init_weights)
    return model


FORMS = {
    "int8": with_int8_weights,
    "packed": with_packed_weights,
    "chains": with_transitions,
}


@dataclass(frozen=True)
class Contender:
    """A model and a way to write with it.

    Args:
        name: Of the figures. model: Key of `make_models`. write: From the models, the prompt (B, S) and L to the L
            new tokens (B, L).
        growth, batch_growth: The powers of L and B that its time grows with at least, for predictions.
    """

    name: str
    model: str
    write: Callable[[nn.Module, torch.LongTensor, int], torch.LongTensor]
    growth: int = 1
    batch_growth: int = 1


def write_with_yan(model, prompt, length, num_steps, **options):
    """One canvas, as long as the text."""
    sequences = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        canvas_length=length,
        max_new_tokens=length,
        min_new_tokens=length,
        num_flow_steps=num_steps,
        **options,
    )
    return sequences[:, prompt.shape[1] :]


def write_naively(model, prompt, length, wastes):
    return naive_generate(model, prompt, length, NAIVE_STEPS, wastes)


def write_token_by_token(model, prompt, length):
    """Greedy decoding with a cache of keys and values: on a GPU a static one, with which transformers compiles."""
    is_gpu = prompt.device.type == "cuda"
    options = {"cache_implementation": "static"} if is_gpu else {}
    sequences = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        use_cache=True,
        **options,
    )
    return sequences[:, -length:]


def compiled_step(function):
    """The function as a CUDA graph that every call replays from its beginning, not from the last call's end."""
    compiled = torch.compile(function, mode="reduce-overhead", dynamic=False)

    def step(*arguments):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*arguments)

    return step


def write_by_unmasking(model, prompt, length, num_steps):
    sequences = model.generate(
        prompt, max_new_tokens=length, min_new_tokens=length, num_diffusion_steps=num_steps or length
    )
    return sequences[:, prompt.shape[1] :]


def optional_contenders(with_compiled: bool, with_int8: bool, with_packed: bool) -> list[Contender]:
    """YAN at three steps as one compiled program, on a GPU also recorded without a compiler, and in forms for a CPU.

    The decoder, too, has its weights packed. Masked diffusion, whose steps a GPU compiles, is also there as it is.
    """
    compiled = partial(write_with_yan, num_steps=NAIVE_STEPS, compile_config=CompileConfig())
    recorded = partial(compiled, compile_config=CompileConfig(backend="eager"))
    writers = {"compiled": compiled, "recorded": recorded} if with_compiled else {}
    contenders = [
        Contender(f"yan-{v}-3-{name}", f"yan-{v}", write) for v in VARIANTS for name, write in writers.items()
    ]
    if with_compiled:
        name, write = f"masked_diffusion{EAGER}", partial(write_by_unmasking, num_steps=None)
        contenders.append(Contender(f"{name}-T", name, write, growth=2))
    plain = partial(write_with_yan, num_steps=NAIVE_STEPS)
    forms = (["int8"] if with_int8 else []) + (["packed"] if with_packed else [])
    contenders += [Contender(f"yan-{v}-3-{form}", f"yan-{v}-{form}", plain) for v in VARIANTS for form in forms]
    if with_packed:
        contenders.append(Contender("decoder-packed", "decoder-packed", write_token_by_token, batch_growth=0))
    return contenders


def all_contenders() -> list[Contender]:
    """Every contender but the optional ones, the fast ones first."""
    contenders = [
        Contender(f"yan-{variant}-{steps}", f"yan-{variant}", partial(write_with_yan, num_steps=steps))
        for variant in VARIANTS
        for steps in YAN_STEPS
    ]
    plain = partial(write_with_yan, num_steps=NAIVE_STEPS)
    contenders.append(Contender("chains-transformer-3", "yan-transformer-chains", plain))
    named_wastes = {**{waste: (waste,) for waste in WASTES}, "all": tuple(WASTES)}
    contenders += [
        Contender(f"naive-{variant}-{name}", f"yan-{variant}", partial(write_naively, wastes=wastes))
        for variant in VARIANTS
        for name, wastes in named_wastes.items()
    ]
    contenders += [
        Contender(kind, kind, write_token_by_token, batch_growth=0) for kind in ("decoder", "encoder_decoder")
    ]
    contenders += [
        Contender(
            f"masked_diffusion-{steps or 'T'}",
            "masked_diffusion",
            partial(write_by_unmasking, num_steps=steps),
            growth=1 if steps else 2,
        )
        for steps in DIFFUSION_STEPS
    ]
    return contenders


def choose_contenders(patterns: list[str], with_compiled=False, with_int8=False, with_packed=False) -> list[Contender]:
    """The contenders whose names begin with one of the patterns; all without any.

    Raises:
        ValueError: A pattern that no name begins with.
    """
    contenders = all_contenders() + optional_contenders(with_compiled, with_int8, with_packed)
    for pattern in patterns:
        if not any(contender.name.startswith(pattern) for contender in contenders):
            names = ", ".join(contender.name for contender in contenders)
            raise ValueError(f"models={pattern!r}: must be the beginning of one of {names}")
    return [c for c in contenders if not patterns or any(c.name.startswith(pattern) for pattern in patterns)]


class Models:
    """The models by name, built when they are first asked for, with room for a prompt and a text."""

    def __init__(self, preset: str, prompt_length: int, longest: int, device: torch.device, dtype: torch.dtype):
        self.preset, self.device, self.dtype = preset, device, dtype
        self.prompt_length, self.longest = prompt_length, longest
        self.get = cache(self._make)

    def config(self, variant: str) -> YanConfig:
        """The preset's config, with a canvas as long as the longest text."""
        config = YanConfig.from_pretrained(PRESETS / f"yan-{variant}-{self.preset}")
        room = max(config.max_position_embeddings, self.longest, self.prompt_length)
        config.max_position_embeddings = room
        config.canvas_length = max(config.canvas_length, self.longest)
        return config

    @torch.no_grad()
    def _make(self, name):
        plain, _, form = name.rpartition("-")
        if form in FORMS:
            return FORMS[form](self.get(plain))
        torch.manual_seed(0)
        variant = name.removeprefix("yan-")
        if variant in VARIANTS:
            model = YanForFlowGeneration(self.config(variant))
            for parameter in model.flow.modulation.proj.parameters():  # they start at zero, trained ones are not
                nn.init.normal_(parameter, std=0.02)
        else:
            model = make_baseline(name.removesuffix(EAGER), self.config("transformer"))
        if name == "masked_diffusion" and self.device.type == "cuda":  # decoders are compiled by transformers
            model.canvas_logits = compiled_step(model.canvas_logits)
        return model.to(self.device, self.dtype).eval()


def random_prompt(models: Models, batch: int, length: int) -> torch.LongTensor:
    """Token ids (B, S) without special ones, the same for every contender."""
    torch.manual_seed(1)
    return torch.randint(4, models.config("transformer").vocab_size, (batch, length)).to(models.device)
