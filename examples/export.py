"""Export the generation of one canvas, from prompt ids to token ids, as a program that runs without this package.

    python examples/export.py --model examples/checkpoints/yan-transformer-tiny --output yan.pt2
    python examples/export.py --model examples/checkpoints/yan-transformer-tiny --format native --output yan-native.pt2
    python examples/export.py --model examples/checkpoints/yan-transformer-tiny --format onnx --output yan.onnx

`graph` runs with `torch.export.load("yan.pt2").module()(ids, mask)`. `native` is machine code for this kind of
processor, takes minutes to make and runs with `torch._inductor.aoti_load_package("yan-native.pt2")(ids, mask)`. `onnx`
needs the packages of the extra "onnx" to be made and runs without torch, with
`onnxruntime.InferenceSession("yan.onnx").run(None, {"input_ids": ids, "attention_mask": mask})`. Ids and mask are
int64, of the exported shape; `--batch_size any --prompt_length any` leave it open.
"""

import argparse

from modeling_yan.commands.export import add_export_options, export


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a YanForFlowGeneration")
    add_export_options(parser)
    export(parser.parse_args(arguments, argparse.Namespace(debug=True)))


if __name__ == "__main__":
    main()
