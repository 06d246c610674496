"""Updates with DeepSpeed's ZeRO through Accelerate on CPUs; every process has the same rows, so the losses are of one.

    DS_ACCELERATOR=cpu ACCELERATE_USE_DEEPSPEED=true torchrun --nproc_per_node 2 examples/reliability/zero.py \
        MODEL OUTPUT STAGE FIRST LAST

STAGE is 2 or 3, or 0 for one process without DeepSpeed. Where FIRST is not 0, it goes on from what a run up to FIRST
saved in OUTPUT. DeepSpeed has to be installed first.
"""

import sys

import torch
from accelerate import Accelerator, DeepSpeedPlugin

from modeling_yan import YanForFlowGeneration

ROWS = 4


def make_accelerator(stage: int) -> Accelerator:
    if stage == 0:
        return Accelerator(cpu=True)
    plugin = DeepSpeedPlugin(zero_stage=stage, gradient_clipping=1.0)
    sizes = {"train_micro_batch_size_per_gpu": ROWS // 2, "train_batch_size": ROWS}
    plugin.deepspeed_config.update(sizes, zero_force_ds_cpu_optimizer=False)  # which needs a compiler
    return Accelerator(deepspeed_plugin=plugin)


def main(folder: str, output: str, stage: int, first: int, last: int):
    torch.set_num_threads(1)
    accelerator = make_accelerator(stage)
    model = YanForFlowGeneration.from_pretrained(folder).train()
    vocab_size = model.config.vocab_size
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    if first:
        accelerator.load_state(output)
    for step in range(first, last):
        ids = torch.randint(4, vocab_size, (ROWS, 14), generator=torch.Generator().manual_seed(step))
        torch.manual_seed(step)
        loss = model(input_ids=ids[:, :8], labels=ids[:, 8:], num_flow_steps=1 + step % 3).loss
        accelerator.backward(loss)
        if stage == 0:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.6f}", flush=True)
    accelerator.save_state(output)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
