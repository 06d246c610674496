"""The demo of the bundled models, as a page in the browser; also the app of a Space on the hub.

python examples/app.py
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_yan  # noqa: F401  registers the classes
from modeling_yan.demo.page import build_demo, launch

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def load(folder):
    """A model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # it has no options: say so, and do not start
    folders = sorted(CHECKPOINTS.iterdir(), reverse=True)
    launch(build_demo({folder.name: load(folder) for folder in folders}))
