"""Export the generation of one canvas, from prompt ids to token ids, as a program that runs without this package.

    python examples/export.py --model examples/checkpoints/yan-transformer-tiny --output yan.pt2
    python examples/export.py --model examples/checkpoints/yan-transformer-tiny --format native --output yan-native.pt2
    python examples/export.py --model examples/checkpoints/yan-transformer-tiny --format onnx --output yan.onnx

`graph` runs with `torch.export.load("yan.pt2").module()(ids, mask)`. `native` is machine code for this kind of
processor, takes minutes to make and runs with `torch._inductor.aoti_load_package("yan-native.pt2")(ids, mask)`. `onnx`
needs the packages of the extra "onnx" to be made and runs without torch, with
`onnxruntime.InferenceSession("yan.onnx").run(None, {"input_ids": ids, "attention_mask": mask})`. Ids and mask are
int64, of the exported shape.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from modeling_yan.export import export_generation


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a YanForFlowGeneration")
    parser.add_argument("--output", type=Path, required=True, help="file that ends in .pt2, or .onnx for onnx")
    parser.add_argument("--format", default="graph", choices=("graph", "native", "onnx"), help="native: AOTInductor")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--prompt_length", type=int, default=64, help="tokens; shorter prompts are padded")
    parser.add_argument("--canvas_length", type=int, help="tokens; the model's if not given")
    parser.add_argument("--num_flow_steps", type=int, help="the model's if not given")
    options = parser.parse_args(arguments)
    suffix = ".onnx" if options.format == "onnx" else ".pt2"
    if options.output.suffix != suffix:
        parser.error(f"output={options.output}: must end in {suffix}")
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    sizes = (options.batch_size, options.prompt_length, options.canvas_length, options.num_flow_steps)
    program = export_generation(model, *sizes)
    if options.format == "native":
        torch._inductor.aoti_compile_and_package(program, package_path=str(options.output))
    elif options.format == "onnx":
        torch.onnx.export(program, f=options.output, external_data=False, verbose=False)
    else:
        torch.export.save(program, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
