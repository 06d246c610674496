"""Train YAN from scratch, in two stages.

    accelerate launch examples/pretrain.py --stage autoencoder --config configuration/yan-transformer-tiny \
        --tokenizer TOKENIZER --train_file text.jsonl.gz --output_dir stage-one
    accelerate launch examples/pretrain.py --stage flow --config stage-one \
        --tokenizer TOKENIZER --train_file text.jsonl.gz --output_dir stage-two

The same command with `--resume` goes on after the run was killed; `--recipe FILE.yaml` gives settings by file.
"""

import sys

from modeling_yan.training import parse_arguments, pretrain

if __name__ == "__main__":
    pretrain(parse_arguments(sys.argv[1:]))
