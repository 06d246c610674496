"""What the commands that generate text share: their options, and a model with them."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from .loading import load_model, load_tokenizer, prepare_library
from .parsing import Parser, add_device, whole_number

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def add_writing_options(parser: Parser) -> None:
    """Add the options of generation."""
    parser.add_argument("--steps", type=whole_number(0), help="solver steps a canvas; the model's if not given")
    parser.add_argument("--num", type=whole_number(1), default=1, help="texts for each prompt")
    parser.add_argument("--seed", type=int, help="draw with this seed; the same one draws the same texts again")
    parser.add_argument("--temperature", type=float, help="draw, at this temperature; 1 is the model's own spread")
    parser.add_argument("--max_new_tokens", type=whole_number(1), help="longest text; the model's if not given")
    parser.add_argument("--stream", action="store_true", help="show the text after each step on stderr")
    add_device(parser)


class Writer:
    """A model that generates texts for a prompt as the options of a command say."""

    def __init__(self, options: argparse.Namespace) -> None:
        prepare_library(is_quiet=not options.debug)
        self.model, self.tokenizer = load_model(options.model, options.device), load_tokenizer(options.model)
        self.streams = options.stream
        self.options = {"return_prompt": False, "num_return_sequences": options.num, "seed": options.seed}
        self.options |= {"num_flow_steps": options.steps, "max_new_tokens": options.max_new_tokens}
        draws = options.num > 1 or options.seed is not None or options.temperature is not None
        temperature = 1.0 if options.temperature is None else options.temperature
        self.options |= {"do_sample": True, "temperature": temperature} if draws else {"do_sample": False}

    def __call__(self, prompt: str, add_special_tokens: bool = True) -> list[str]:
        """The texts for a prompt; one from a chat template has its special tokens already."""
        settings = {"add_special_tokens": add_special_tokens, "return_token_type_ids": False, "return_tensors": "pt"}
        inputs = self.tokenizer(prompt, **settings).to(self.model.device)
        streamer = Drafts(self.tokenizer, self.model.generation_config.eos_token_id) if self.streams else None
        sequences: Any = self.model.generate(**inputs, **self.options, streamer=streamer)
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=True)


class Drafts:
    """A streamer that shows on stderr what the text would be if the flow ended after each of its steps."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", eos_token_id: int | list[int] | None) -> None:
        self.tokenizer, self.eos_token_id, self.step = tokenizer, eos_token_id, 0

    def put(self, tokens: "torch.Tensor") -> None:
        """The prompt, or a finished canvas: the count of steps restarts."""
        self.step = 0

    def put_draft(self, tokens: "torch.Tensor") -> None:
        """Drafts (B, L), of which all up to the EOS is shown."""
        from ..evaluation.speed import num_new_tokens

        self.step += 1
        for row, length in zip(tokens, num_new_tokens(tokens, self.eos_token_id), strict=True):
            text = self.tokenizer.decode(row[:length], skip_special_tokens=True)
            print(f"step {self.step}  {text}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The end of the text: nothing to do."""
