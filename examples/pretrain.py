"""Train YAN from scratch, in two stages.

    accelerate launch examples/pretrain.py --stage autoencoder --config configuration/yan-transformer-tiny \
        --tokenizer TOKENIZER --train_file text.jsonl.gz --output_dir stage-one
    accelerate launch examples/pretrain.py --stage flow --config stage-one \
        --tokenizer TOKENIZER --train_file text.jsonl.gz --output_dir stage-two
"""

from transformers import HfArgumentParser

from modeling_yan.training import PretrainingArguments, pretrain

if __name__ == "__main__":
    pretrain(*HfArgumentParser(PretrainingArguments).parse_args_into_dataclasses())
