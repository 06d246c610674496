"""Why a mixture of experts needs few steps: flow matching with one and with eight experts on a ring of Gaussians.

Trains small networks with the package's own likelihood, path and solver, measures how far their samples are from the
target after 1 to 32 Euler steps, prints a table and draws a figure. About half a minute on one CPU core.

    python examples/mixture_2d.py --output docs/figures/mixture_2d.png
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from modeling_yan.experts_yan import choose_experts
from modeling_yan.flow_matching_yan import interpolate, load_balance, mixture_nll, sample_times, solve_flow

NUM_MODES = 8
RADIUS, SPREAD = 2.0, 0.15
SIGMA = 0.5  # of each expert's Gaussian in the likelihood
STEPS = (1, 2, 3, 4, 8, 32)


class VelocityNet(nn.Module):
    """K velocity experts and their gate on points of the plane.

    The experts share `expert_width` hidden units among them, so that every K has about as many parameters.
    """

    def __init__(self, num_experts: int, width: int = 64, expert_width: int = 256):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        hidden = expert_width // num_experts
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 2)) for _ in range(num_experts)
        )
        self.gate = nn.Linear(width, num_experts)

    def forward(self, x, time):
        """Velocities (B, 1, K, 2) and log gate (B, 1, K) at points (B, 1, 2) and times (B,)."""
        time = time.view(-1, 1, 1).expand(len(x), 1, 1)
        states = self.trunk(torch.cat([x, time, torch.cos(math.pi * time), torch.sin(math.pi * time)], dim=-1))
        return torch.stack([head(states) for head in self.heads], dim=-2), self.gate(states).log_softmax(-1)


@dataclass
class Result:
    """A trained network's samples (N, 2) for each number of steps, and the expert (N,) that moved each of them."""

    num_parameters: int
    samples: dict[int, torch.Tensor]
    experts: torch.Tensor


def sample_target(num_samples: int) -> torch.Tensor:
    """Points (N, 2) of the ring of Gaussians."""
    angles = 2 * math.pi * torch.randint(NUM_MODES, (num_samples,)) / NUM_MODES
    centres = RADIUS * torch.stack([angles.cos(), angles.sin()], dim=-1)
    return centres + SPREAD * torch.randn(num_samples, 2)


def train(num_experts: int, num_updates: int, batch_size: int = 512) -> VelocityNet:
    """A network fitted to the target by the mixture likelihood."""
    net = VelocityNet(num_experts)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_updates)
    for _ in range(num_updates):
        x_1 = sample_target(batch_size).unsqueeze(1)
        x_0, time = torch.randn_like(x_1), sample_times(batch_size, 1, 1)
        velocities, log_gate = net(interpolate(x_0, x_1, time), time)
        loss = mixture_nll(x_1 - x_0, velocities, log_gate, SIGMA) + load_balance(log_gate)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def sample(net: VelocityNet, x_0: torch.Tensor, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (N, 2) reached from x_0 (N, 1, 2), each moved by one expert, drawn from its gate at t = 0 and kept."""
    chosen = choose_experts(net(x_0, torch.zeros(1))[1], "sample")

    def velocity(x, time):
        return net(x, torch.tensor([time]))[0].gather(2, chosen[..., None, None].expand(-1, -1, 1, 2)).squeeze(2)

    return solve_flow(velocity, x_0, num_steps).squeeze(1), chosen.squeeze(1)


def train_and_sample(num_experts: int, seed: int, num_updates=1500, num_samples=2000, steps=STEPS) -> Result:
    """Train from `seed` and draw samples with each number of steps."""
    torch.manual_seed(seed)
    net = train(num_experts, num_updates)
    x_0 = torch.randn(num_samples, 1, 2)
    drawn = {}
    for num_steps in steps:
        torch.manual_seed(seed)  # the same experts for every number of steps
        drawn[num_steps], experts = sample(net, x_0, num_steps)
    return Result(sum(parameter.numel() for parameter in net.parameters()), drawn, experts)


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, num_directions: int = 128) -> float:
    """Sliced 2-Wasserstein distance of two samples (N, 2), over evenly spread directions."""
    angles = math.pi * torch.arange(num_directions) / num_directions
    directions = torch.stack([angles.cos(), angles.sin()])
    difference = (a @ directions).sort(0).values - (b @ directions).sort(0).values
    return difference.square().mean().sqrt().item()


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Energy distance of two samples (N, 2): 2 E|a - b| - E|a - a'| - E|b - b'|."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


METRICS = {"sliced 2-Wasserstein distance": sliced_wasserstein, "energy distance": energy_distance}


def measure(results: dict[int, list[Result]], metric, target) -> dict[str, list[torch.Tensor]]:
    """Distances to the target: label to one tensor of seeds for each entry of STEPS."""
    return {
        label_of(num_experts): [torch.tensor([metric(run.samples[step], target) for run in runs]) for step in STEPS]
        for num_experts, runs in results.items()
    }


def label_of(num_experts: int) -> str:
    return f"K = {num_experts}"


def print_table(title: str, distances: dict[str, list[torch.Tensor]], floor: float):
    print(f"\n{title}, mean ± standard deviation over seeds; two samples of the target are {floor:.3f} apart")
    print("steps " + "".join(f"{step:>16}" for step in STEPS))
    for label, row in distances.items():
        print(f"{label:6}" + "".join(f"{values.mean():>8.3f} ± {values.std(correction=0):.3f}" for values in row))


def draw(path: Path, target, results: dict[int, list[Result]], distances: dict[str, list[torch.Tensor]], floor: float):
    """The figure: target, three-step samples of the first seed by expert, and distance against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2 + len(results), figsize=(4 * (2 + len(results)), 4.3), layout="constrained")
    draw_points(axes[0], target, "0.35", "target: 8 Gaussians")
    colours = matplotlib.colormaps["tab10"]
    for axis, (num_experts, runs) in zip(axes[1:], results.items()):
        experts = "1 expert" if num_experts == 1 else f"{num_experts} experts, one colour each"
        draw_points(axis, runs[0].samples[3], colours(runs[0].experts % 10), f"3 steps, {experts}")
    axis = axes[-1]
    for label, row, colour in zip(distances, distances.values(), ("tab:red", "tab:blue")):
        means = torch.stack([values.mean() for values in row])
        errors = torch.stack([values.std(correction=0) for values in row])
        axis.errorbar(STEPS, means, errors, marker="o", capsize=3, color=colour, label=label)
    axis.axhline(floor, color="0.35", linestyle="--", label="two target samples")
    axis.set_xscale("log", base=2)
    axis.set_xticks(STEPS, STEPS)
    axis.set(xlabel="Euler steps", ylabel="sliced 2-Wasserstein distance", title="distance to the target")
    axis.set_ylim(bottom=0)
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_points(axis, points, colour, title: str):
    axis.scatter(*points.T, s=4, c=colour, linewidths=0, alpha=0.7)
    axis.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", title=title)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="where to draw the figure; none is drawn without it")
    parser.add_argument("--num_experts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--num_updates", type=int, default=1500)
    parser.add_argument("--num_samples", type=int, default=2000)
    options = parser.parse_args(arguments)
    results = {
        num_experts: [
            train_and_sample(num_experts, seed, options.num_updates, options.num_samples)
            for seed in range(options.num_seeds)
        ]
        for num_experts in options.num_experts
    }
    torch.manual_seed(options.num_seeds)
    target, other = sample_target(options.num_samples), sample_target(options.num_samples)
    for num_experts, runs in results.items():
        print(f"{label_of(num_experts)}: {runs[0].num_parameters:,} parameters")
    for title, metric in METRICS.items():
        print_table(title, measure(results, metric, target), metric(other, target))
    if options.output is not None:
        distances = measure(results, sliced_wasserstein, target)
        draw(options.output, target, results, distances, sliced_wasserstein(other, target))


if __name__ == "__main__":
    main()
