"""Export the generation of one canvas, from prompt ids to token ids, as a program that needs torch alone.

    python examples/export.py --model examples/checkpoints/yan-transformer-tiny --output yan.pt2
    python examples/export.py --model examples/checkpoints/yan-transformer-tiny --output yan-native.pt2 --native

The first kind is a graph and runs with `torch.export.load("yan.pt2").module()(ids, mask)`; the second one is machine
code for this kind of processor, takes minutes to make and runs with
`torch._inductor.aoti_load_package("yan-native.pt2")(ids, mask)`. Ids and mask are int64, of the exported shape.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from modeling_yan.export import export_generation


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a YanForFlowGeneration")
    parser.add_argument("--output", type=Path, required=True, help="file that ends in .pt2")
    parser.add_argument("--native", action="store_true", help="compile to machine code with AOTInductor")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--prompt_length", type=int, default=64, help="tokens; shorter prompts are padded")
    parser.add_argument("--canvas_length", type=int, help="tokens; the model's if not given")
    parser.add_argument("--num_flow_steps", type=int, help="the model's if not given")
    options = parser.parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    sizes = (options.batch_size, options.prompt_length, options.canvas_length, options.num_flow_steps)
    program = export_generation(model, *sizes)
    if options.native:
        torch._inductor.aoti_compile_and_package(program, package_path=str(options.output))
    else:
        torch.export.save(program, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
