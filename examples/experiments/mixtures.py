"""Where experts pay: mixtures of eight Gaussians in 2 and 16 dimensions, by number of experts, sigma, expert choice.

    python examples/experiments/mixtures.py experts --output results/mixtures
    python examples/experiments/mixtures.py sigma --output results/mixtures
    python examples/experiments/mixtures.py choice --output results/mixtures

Small networks of equal size are trained with the package's own likelihood, path and solver; one expert is plain flow
matching. Error is the share of samples that belong to no Gaussian (further from every centre than 999 of 1,000 of its
own points), and how unevenly the others fall on the Gaussians (total variation from an equal share). Each setting is
trained with several seeds. Writes NAME.json and NAME.png.
"""

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from modeling_yan.experts_yan import choose_experts
from modeling_yan.flow_matching_yan import interpolate, load_balance, mixture_nll, sample_times, solve_flow
from modeling_yan.training import expand_recipe
from modeling_yan.visualization import saved_figure

NUM_MODES, SPREAD = 8, 0.15
RADIUS = {2: 2.0, 16: 4.0}  # of the centres, about where the noise is
STEPS = (1, 2, 3, 4, 8, 32)


@dataclass(frozen=True)
class Setting:
    """One network to train: number of experts, standard deviation of their Gaussians, expert choice at t = 0."""

    dimension: int
    num_experts: int = 8
    sigma: float = 0.5
    choice: str = "sample"


EXPERIMENTS = {
    "experts": [{"num_experts": count} for count in (1, 2, 4, 8)],
    "sigma": [{"sigma": sigma} for sigma in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)],
    "choice": [{"choice": choice} for choice in ("sample", "argmax", "mixture")],
}
LABELS = {"num_experts": "K = ", "sigma": "sigma = ", "choice": ""}


class VelocityNet(nn.Module):
    """K velocity experts and their gate; the experts share out one width, so that every K has about one size."""

    def __init__(self, dimension: int, num_experts: int, width: int = 64, expert_width: int = 256):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(dimension + 3, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.gate = nn.Linear(width, num_experts)
        self.up = nn.Linear(width, expert_width)
        hidden = expert_width // num_experts
        self.down = nn.Parameter(torch.randn(num_experts, hidden, dimension) / math.sqrt(hidden))

    def forward(self, x, time):
        """Velocities (B, 1, K, D) and log gate (B, 1, K) at points (B, 1, D) and times (B,) or (1,)."""
        time = time.view(-1, 1, 1).expand(len(x), 1, 1)
        states = self.trunk(torch.cat([x, time, torch.cos(math.pi * time), torch.sin(math.pi * time)], dim=-1))
        hidden = nn.functional.gelu(self.up(states)).unflatten(-1, (len(self.down), -1))
        return torch.einsum("blkh,khd->blkd", hidden, self.down), self.gate(states).log_softmax(-1)


def centres(dimension: int) -> torch.Tensor:
    """Centres (8, D): evenly on a circle, or along eight axes."""
    if dimension == 2:
        angles = 2 * math.pi * torch.arange(NUM_MODES) / NUM_MODES
        return RADIUS[2] * torch.stack([angles.cos(), angles.sin()], dim=-1)
    return RADIUS[dimension] * torch.eye(dimension)[:NUM_MODES]


def sample_target(num_samples: int, dimension: int) -> torch.Tensor:
    """Points (N, D)."""
    chosen = centres(dimension)[torch.randint(NUM_MODES, (num_samples,))]
    return chosen + SPREAD * torch.randn(num_samples, dimension)


def train(setting: Setting, num_updates: int, batch_size: int = 512) -> VelocityNet:
    """A network fitted by the mixture likelihood, which counts per dimension as the model's does."""
    net = VelocityNet(setting.dimension, setting.num_experts)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_updates)
    scale = min(1.0, setting.sigma**2)  # a narrow likelihood has large gradients
    for _ in range(num_updates):
        x_1 = sample_target(batch_size, setting.dimension).unsqueeze(1)
        x_0, time = torch.randn_like(x_1), sample_times(batch_size, 1, 1)
        velocities, gate_log_probs = net(interpolate(x_0, x_1, time), time)
        nll = mixture_nll(x_1 - x_0, velocities, gate_log_probs, setting.sigma)
        loss = scale * nll / setting.dimension + 0.1 * load_balance(gate_log_probs)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def sample(net: VelocityNet, x_0: torch.Tensor, num_steps: int, choice: str) -> torch.Tensor:
    """Points (N, D) reached from x_0 (N, 1, D), each by the expert chosen for it at t = 0, or by their mixture."""
    chosen = choose_experts(net(x_0, torch.zeros(1))[1], choice)

    def velocity(x, time):
        velocities, gate_log_probs = net(x, torch.tensor([time]))
        if chosen is None:
            return (velocities * gate_log_probs.exp().unsqueeze(-1)).sum(2)
        return velocities.gather(2, chosen[..., None, None].expand(-1, -1, 1, x.shape[-1])).squeeze(2)

    return solve_flow(velocity, x_0, num_steps).squeeze(1)


def errors(points: torch.Tensor) -> dict[str, float]:
    """Share of points (N, D) that belong to no Gaussian, and how unevenly the others are spread over them."""
    dimension = points.shape[1]
    distances, modes = torch.cdist(points, centres(dimension)).min(-1)
    # 99.9% of a Gaussian's own points are nearer (Wilson and Hilferty's approximation of chi-square)
    limit = SPREAD * math.sqrt(dimension) * (1 - 2 / (9 * dimension) + 3.09 * math.sqrt(2 / (9 * dimension))) ** 1.5
    belongs = distances <= limit
    shares = modes[belongs].bincount(minlength=NUM_MODES) / belongs.sum().clamp(min=1)
    return {
        "astray": 1 - belongs.float().mean().item(),
        "unevenness": 0.5 * (shares - 1 / NUM_MODES).abs().sum().item(),
    }


def run(setting: Setting, seed: int, num_updates: int, num_samples: int) -> dict[int, dict[str, float]]:
    """Errors after each number of steps."""
    torch.manual_seed(seed)
    net = train(setting, num_updates)
    x_0, found = torch.randn(num_samples, 1, setting.dimension), {}
    for num_steps in STEPS:
        torch.manual_seed(seed)  # the same experts for every number of steps
        found[num_steps] = errors(sample(net, x_0, num_steps, setting.choice))
    return found


def over_seeds(runs: list[dict]) -> dict:
    """For each number of steps and error: mean and range over the seeds."""
    return {
        steps: {
            name: {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
            for name in ("astray", "unevenness")
            for values in [[result[steps][name] for result in runs]]
        }
        for steps in STEPS
    }


def draw(results: list[dict], title: str, path: Path):
    """Share astray against the number of steps, a panel per dimension, a line per setting."""
    dimensions = sorted({entry["dimension"] for entry in results})
    with saved_figure(path, 6 * len(dimensions), 4) as figure:
        axes = figure.subplots(1, len(dimensions), squeeze=False)[0]
        for axis, dimension in zip(axes, dimensions):
            for entry in (entry for entry in results if entry["dimension"] == dimension):
                means = [entry["errors"][steps]["astray"]["mean"] for steps in STEPS]
                ends = [
                    [abs(entry["errors"][steps]["astray"][end] - mean) for steps, mean in zip(STEPS, means)]
                    for end in ("low", "high")
                ]
                axis.errorbar(STEPS, means, ends, marker="o", capsize=3, label=entry["label"])
            axis.set_xscale("log", base=2)
            axis.set_xticks(STEPS, STEPS)
            axis.minorticks_off()
            axis.set(xlabel="Euler steps", ylim=(-0.03, 1.03), title=f"{dimension} dimensions")
            axis.grid(alpha=0.3)
            axis.legend()
        figure.suptitle(title)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 16], choices=list(RADIUS))
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--num_updates", type=int, default=800)
    parser.add_argument("--num_samples", type=int, default=2000)
    parser.add_argument("--output", type=Path, required=True, help="folder for NAME.json and NAME.png")
    options = parser.parse_args(expand_recipe(parser, arguments))
    torch.set_num_threads(1)  # the networks are too small to share out
    results, sizes = [], (options.num_updates, options.num_samples)
    for dimension in options.dimensions:
        for change in EXPERIMENTS[options.name]:
            setting = replace(Setting(dimension), **change)
            found = over_seeds([run(setting, seed, *sizes) for seed in range(options.num_seeds)])
            ((name, value),) = change.items()
            label = f"{LABELS[name]}{value}"
            results.append({"dimension": dimension, "label": label, "errors": found})
            cells = "  ".join(f"{steps}: {error['astray']['mean']:.3f}" for steps, error in found.items())
            print(f"D = {dimension:2}, {label:14} astray after steps {cells}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    record = {"num_seeds": options.num_seeds, "num_updates": options.num_updates, "results": results}
    (options.output / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(results, "share of samples that belong to no Gaussian", options.output / f"{options.name}.png")


if __name__ == "__main__":
    main()
