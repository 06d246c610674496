"""Train a sharded model for some updates on gloo, in as many processes as torchrun starts.

    torchrun --nproc_per_node 2 shard_model.py CHECKPOINT OUTPUT_DIR

Writes the whole weights to OUTPUT_DIR, and from process 0 a line of JSON about the shards.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from modeling_yan import YanForFlowGeneration

NUM_UPDATES = 3
UNITS = ["YanEncoderLayer", "YanSelfAttentionMixer", "YanMambaMixer", "YanFeedForward"]
UNITS += ["YanExpertHeads", "YanDecoderLayer"]
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def make_batch(number: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """Batch of an update, the same in all processes."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(4, vocab_size, (4, 14), generator=generator)
    return {"input_ids": ids[:, :8], "labels": ids[:, 8:], "num_flow_steps": 1 + number % 3}


def train(model) -> list[float]:
    """A few updates of SGD, each process on the same batches; returns the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for number in range(NUM_UPDATES):
        torch.manual_seed(number)
        loss = model(**make_batch(number, model.config.vocab_size)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def shard(model, mesh):
    """Shard the units of configuration/accelerate/fsdp2.yaml, the inner ones first, then the rest."""
    for module in reversed(list(model.modules())):
        if type(module).__name__ in UNITS:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main(checkpoint: str, output_dir: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = shard(YanForFlowGeneration.from_pretrained(checkpoint).train(), mesh)
    shapes = {name: (list(p.shape), list(p.to_local().shape)) for name, p in model.named_parameters()}
    losses = train(model)
    dcp.save(model.state_dict(), checkpoint_id=Path(output_dir) / "shards")
    weights = get_model_state_dict(model, options=WHOLE)

    fresh = shard(YanForFlowGeneration.from_pretrained(checkpoint), mesh)
    shards = fresh.state_dict()
    dcp.load(shards, checkpoint_id=Path(output_dir) / "shards")
    set_model_state_dict(fresh, shards)
    restored = get_model_state_dict(fresh, options=WHOLE)
    if dist.get_rank() == 0:
        same = all(torch.equal(weights[name], restored[name]) for name in weights)
        YanForFlowGeneration(model.config).save_pretrained(output_dir, state_dict=weights)
        print(json.dumps({"world": dist.get_world_size(), "losses": losses, "shapes": shapes, "restored": same}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
