"""Write a checkpoint with its code into a folder that loads where this package is not installed.

    python examples/lm_eval/export.py examples/checkpoints/yan-transformer-tiny my-model

lm-evaluation-harness, and everything else that knows `trust_remote_code`, takes that folder; see stories.yaml.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_yan  # noqa: F401  registers the classes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a hub name")
    parser.add_argument("output", help="a new folder")
    options = parser.parse_args()
    for auto_class in (AutoModelForCausalLM, AutoTokenizer):
        auto_class.from_pretrained(options.model).save_pretrained(options.output)


if __name__ == "__main__":
    main()
