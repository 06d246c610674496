"""Train a baseline of YAN's size on YAN's batches, with the best of several learning rates.

    python examples/train_baseline.py --stage decoder --config configuration/yan-transformer-tiny \
        --tokenizer TOKENIZER --train_file pairs.jsonl.gz --validation_file held-out.jsonl.gz --output_dir decoder \
        --max_steps 8000 --learning_rates 3e-4 1e-3 3e-3

Stages: decoder (autoregressive), encoder_decoder (autoregressive), masked_diffusion; decoder_conv and so on, whose
self-attention sees the preset's short convolution (`attention_conv_kernel`), as YAN's does; and YAN's own two,
autoencoder and flow, so that it gets the same choice. Plain flow matching is a YAN whose preset has one expert and the
same size:

    python -m modeling_yan.baselines.sizes --config configuration/yan-transformer-tiny --num_experts 1 --output preset

Every rate is tried for a share of the updates and the one with the lowest validation loss goes on from there;
learning_rates.json in the output folder says which. All other options are those of pretrain.py. The rows and their
order are a function of the seed alone. The same command with `--resume True` goes on after the run was killed.
"""

import argparse
import sys

from modeling_yan.training import parse_arguments, pretrain_with_best_rate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument(
        "--trial_share", type=float, default=0.2, help="share of max_steps that each rate is tried for"
    )
    options, words = parser.parse_known_args()
    rate = pretrain_with_best_rate(parse_arguments(words), options.learning_rates, options.trial_share)
    print(f"learning rate {rate:g}", file=sys.stderr)


if __name__ == "__main__":
    main()
