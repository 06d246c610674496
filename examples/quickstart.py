"""Two small YAN models, Transformer and Mamba, answer questions, complete and fill in English in three steps, offline.

python examples/quickstart.py
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_yan  # noqa: F401  registers the classes
from modeling_yan.data import generate_stories

CHECKPOINTS = Path(__file__).parent / "checkpoints"
# Sentences of documents that training left out. One mask stands for the last word, or for a gap of any length.
LAST_WORDS = [
    ("Last word: And the name thereof is called Bamah unto this <mask>.", "day"),
    ("Last word: Lady Middleton proposed a rubber of Casino to the <mask>.", "others"),
    ("Last word: I the LORD have spoken it, and will do <mask>.", "it"),
]
GAPS = [
    ("God would <mask> do that, Kate thought stubbornly.", "not"),
    ("""In <mask> end, he said: "I'm not enchanted by the proposition, sir.""", "the"),
    ("You are lucky in having <mask> a master.", "such"),
]
ANSWER_LENGTH = 8  # tokens that an answer has room for


class Drafts:
    """A streamer that keeps what the model would write after each solver step."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts = tokenizer, []

    def put(self, value):
        """The prompt, or a finished canvas: nothing to do."""

    def put_draft(self, value):
        self.texts.append(self.tokenizer.decode(cut_at_eos(value[0], self.tokenizer), skip_special_tokens=True))

    def end(self):
        """The end of the text: nothing to do."""


def cut_at_eos(tokens, tokenizer):
    ends = (tokens == tokenizer.eos_token_id).nonzero()
    return tokens[: int(ends[0])] if len(ends) else tokens


def show(model, tokenizer, title, pairs, **options):
    """Write the answer to every prompt, with the drafts on the way to it."""
    print(f"\n  {title}")
    for prompt, expected in pairs:
        inputs = tokenizer(prompt, return_tensors="pt")
        drafts = Drafts(tokenizer)
        model.generate(**inputs, streamer=drafts, **options)
        seconds = min(timed(model.generate, **inputs, **options) for _ in range(5))
        print(f"    {prompt}")
        for step, text in enumerate(drafts.texts, start=1):
            print(f"      step {step}    {text}")
        print(f"      original  {expected}")
        print(f"      {1000 * seconds:.1f} ms without the drafts\n")


def timed(function, **arguments):
    start = time.perf_counter()
    function(**arguments)
    return time.perf_counter() - start


def fill_gaps(model, tokenizer, num_flow_steps):
    """Write every text with its gaps filled."""
    print("\n  Infilling")
    for text, word in GAPS:
        filled = model.fill(tokenizer, text, num_flow_steps=num_flow_steps)
        seconds = min(timed(model.fill, tokenizer=tokenizer, text=text) for _ in range(3))
        print(f"    {text}")
        print(f"      filled    {filled.text}")
        print(f"      original  {text.replace('<mask>', word)}")
        print(f"      {1000 * seconds:.1f} ms for all candidates\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_flow_steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="of the stories; 1 gives stories that training left out")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the models are too small to share out
    for folder in sorted(CHECKPOINTS.iterdir(), reverse=True):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        print(f"\n{folder.name}: {model.num_parameters() / 1e6:.1f} million parameters")
        stories = generate_stories(3, options.seed, max_sentences=6, varied_wording=True)
        questions = [(row["source"], row["target"]) for row in stories]
        settings = {"num_flow_steps": options.num_flow_steps, "canvas_length": ANSWER_LENGTH}
        show(model, tokenizer, "Question answering", questions, **settings)
        show(model, tokenizer, "Last word", LAST_WORDS, **settings)
        fill_gaps(model, tokenizer, options.num_flow_steps)


if __name__ == "__main__":
    main()
