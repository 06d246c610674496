"""Why a mixture of experts needs few steps: flow matching with one and with eight experts on a ring of Gaussians.

Trains small networks with the package's own likelihood, path and solver, measures how far their samples are from the
target after 1 to 32 Euler steps, prints a table and draws a figure. Takes less than a minute on one CPU core.

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
from modeling_yan.visualization import saved_figure

NUM_MODES = 8
RADIUS, SPREAD = 2.0, 0.15
SIGMA = 0.5  # of each expert's Gaussian in the likelihood
STEPS = (1, 2, 3, 4, 8, 32)


class VelocityNet(nn.Module):
    """K velocity experts and their gate on points of the plane.

    The experts divide `expert_width` hidden units among them, so that every K has about as many parameters.
    """

    def __init__(self, num_experts: int, width: int = 64, expert_width: int = 256):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.gate = nn.Linear(width, num_experts)
        self.up = nn.Linear(width, expert_width)
        hidden = expert_width // num_experts
        self.down = nn.Parameter(torch.randn(num_experts, hidden, 2) / math.sqrt(hidden))

    def forward(self, x, time):
        """Velocities (B, 1, K, 2) and log gate (B, 1, K) at points (B, 1, 2) and times (B,) or (1,)."""
        time = time.view(-1, 1, 1).expand(len(x), 1, 1)
        states = self.trunk(torch.cat([x, time, torch.cos(math.pi * time), torch.sin(math.pi * time)], dim=-1))
        hidden = nn.functional.gelu(self.up(states)).unflatten(-1, (len(self.down), -1))
        velocities = torch.einsum("blkh,khd->blkd", hidden, self.down)
        return velocities, self.gate(states).log_softmax(-1)


@dataclass
class Result:
    """A trained network's samples (N, 2) for each number of steps, and the expert (N,) that moved each of them."""

    num_parameters: int
    samples: dict[int, torch.Tensor]
    experts: torch.Tensor


def sample_target(num_samples: int, evenly: bool = False) -> torch.Tensor:
    """Points (N, 2) of the ring of Gaussians; `evenly`: equally many of each."""
    modes = torch.arange(num_samples) % NUM_MODES if evenly else torch.randint(NUM_MODES, (num_samples,))
    angles = 2 * math.pi * modes / NUM_MODES
    return RADIUS * directions(angles) + SPREAD * torch.randn(num_samples, 2)


def directions(angles: torch.Tensor) -> torch.Tensor:
    """Unit vectors (N, 2) at angles (N,)."""
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def train(num_experts: int, num_updates: int, batch_size: int = 512) -> VelocityNet:
    """A network fitted to the target by the mixture likelihood."""
    net = VelocityNet(num_experts)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_updates)
    for _ in range(num_updates):
        x_1 = sample_target(batch_size).unsqueeze(1)
        x_0, time = torch.randn_like(x_1), sample_times(batch_size, 1, 1)
        velocities, gate_log_probs = net(interpolate(x_0, x_1, time), time)
        loss = mixture_nll(x_1 - x_0, velocities, gate_log_probs, SIGMA) + load_balance(gate_log_probs)
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


def train_and_sample(num_experts: int, seed: int, num_updates=800, num_samples=2000, steps=STEPS) -> Result:
    """Train from `seed` and draw samples with each number of steps."""
    torch.manual_seed(seed)
    net = train(num_experts, num_updates)
    x_0 = torch.randn(num_samples, 1, 2)
    drawn = {}
    for num_steps in steps:
        torch.manual_seed(seed)  # the same experts for every number of steps
        drawn[num_steps], experts = sample(net, x_0, num_steps)
    return Result(sum(parameter.numel() for parameter in net.parameters()), drawn, experts)


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, num_directions: int = 64) -> float:
    """Sliced 2-Wasserstein distance of two samples (N, 2), over evenly spread directions."""
    lines = directions(math.pi * torch.arange(num_directions) / num_directions).T
    difference = (a @ lines).sort(0).values - (b @ lines).sort(0).values
    return difference.square().mean().sqrt().item()


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Energy distance of two samples (N, 2): 2 E|a - b| - E|a - a'| - E|b - b'|."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def share_astray(a: torch.Tensor, b: torch.Tensor | None = None) -> float:
    """Share of points (N, 2) that are more than three standard deviations from the centre of every Gaussian."""
    centres = RADIUS * directions(2 * math.pi * torch.arange(NUM_MODES) / NUM_MODES)
    return (torch.cdist(a, centres).amin(-1) > 3 * SPREAD).float().mean().item()


METRICS = {
    "sliced 2-Wasserstein distance to the target": sliced_wasserstein,
    "energy distance to the target": energy_distance,
    "share of samples that belong to no Gaussian": share_astray,
}


@dataclass
class Distances:
    """One metric of all results: for each K, its (mean, standard deviation) over seeds after each of STEPS.

    `perfect` is its mean for as many fresh samples of the target itself.
    """

    by_experts: dict[int, list[tuple[float, float]]]
    perfect: float


def measure(results: dict[int, list[Result]], metric, target, fresh: list[torch.Tensor]) -> Distances:
    """The metric of all results, and of the samples in `fresh`, against `target`."""

    def over_seeds(runs, num_steps):
        values = torch.tensor([metric(run.samples[num_steps], target) for run in runs])
        return values.mean().item(), values.std(correction=0).item()

    by_experts = {num: [over_seeds(runs, num_steps) for num_steps in STEPS] for num, runs in results.items()}
    return Distances(by_experts, sum(metric(points, target) for points in fresh) / len(fresh))


def print_table(title: str, distances: Distances):
    print(f"\n{title}, mean ± standard deviation over seeds (fresh samples of the target: {distances.perfect:.3f})")
    print(f"{'steps':8}" + "".join(f"{num_steps:<16}" for num_steps in STEPS))
    for num_experts, row in distances.by_experts.items():
        cells = (f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in row)
        print(f"{f'K = {num_experts}':8}" + "".join(f"{cell:<16}" for cell in cells))


def draw(path: Path, target, results: dict[int, list[Result]], distances: Distances):
    """The figure: target, three-step samples of the first seed by expert, and share astray against steps."""
    from matplotlib import colormaps

    num_panels = 2 + len(results)
    with saved_figure(path, 4 * num_panels, 4.3) as figure:
        axes = figure.subplots(1, num_panels)
        draw_points(axes[0], target, "0.35", "target: eight Gaussians")
        for axis, (num_experts, runs) in zip(axes[1:], results.items()):
            colours = "tab:red" if num_experts == 1 else colormaps["Dark2"](runs[0].experts.numpy() % 8)
            title = "one expert" if num_experts == 1 else f"{num_experts} experts, one colour each"
            draw_points(axis, runs[0].samples[3], colours, f"3 steps, {title}")
        draw_shares(axes[-1], distances)


def draw_points(axis, points, colour, title: str):
    axis.scatter(*points.T, s=5, c=colour, linewidths=0, alpha=0.7)
    axis.set(xlim=(-2.9, 2.9), ylim=(-2.9, 2.9), xticks=range(-2, 3), yticks=range(-2, 3), aspect="equal", title=title)


def draw_shares(axis, distances: Distances):
    colours = ("tab:red", "tab:blue", "tab:green", "tab:purple")
    for (num_experts, row), colour in zip(distances.by_experts.items(), colours):
        means, deviations = zip(*row)
        axis.errorbar(STEPS, means, deviations, marker="o", capsize=3, color=colour, label=f"K = {num_experts}")
    axis.axhline(distances.perfect, color="0.35", linestyle="--", label="fresh samples of the target")
    axis.set_xscale("log", base=2)
    axis.set_xticks(STEPS, STEPS)
    axis.minorticks_off()
    axis.set(xlabel="Euler steps", title="share of samples that belong to no Gaussian")
    axis.set_ylim(-0.03, 1.05)
    axis.grid(alpha=0.3)
    axis.legend()


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="where to draw the figure; without it none is drawn")
    parser.add_argument("--num_experts", type=int, nargs="+", default=[1, 8], help="numbers of experts to compare")
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--num_updates", type=int, default=800)
    parser.add_argument("--num_samples", type=int, default=2000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the networks are too small to share out
    results = {}
    for num_experts in options.num_experts:
        seeds = range(options.num_seeds)
        sizes = options.num_updates, options.num_samples
        results[num_experts] = [train_and_sample(num_experts, seed, *sizes) for seed in seeds]
        print(f"K = {num_experts}: {results[num_experts][0].num_parameters:,} parameters", flush=True)
    torch.manual_seed(options.num_seeds)
    target = sample_target(options.num_samples, evenly=True)
    fresh = [sample_target(options.num_samples) for _ in range(5)]
    distances = {title: measure(results, metric, target, fresh) for title, metric in METRICS.items()}
    for title, table in distances.items():
        print_table(title, table)
    if options.output is not None:
        draw(options.output, target, results, distances["share of samples that belong to no Gaussian"])


if __name__ == "__main__":
    main()
