"""Forms of Mamba's selective scan against each other: seconds forward, and forward and backward.

    python examples/benchmark/scan.py --lengths 64 512 --output outputs/scan.json
    python examples/benchmark/scan.py --device cuda --recorded --lengths 128 1024 8192

`stored`: the package's scan, which keeps the state at chunk borders and recomputes the rest (on a GPU mamba-ssm's
kernel where it is installed, else the package's Triton kernels). `recurrence`: step by step with autograd's own
backward. `chunked`: doubling inside chunks of 32 steps, which are then joined one after the other. `associative`:
doubling over the whole length. `transformers`: the scan of transformers' own Mamba. A form that is predicted to exceed
`--budget_s` is left out. On a GPU `--recorded` times the forward passes as CUDA graphs, which need no host.
"""

import argparse

import torch
from timing import interleave, num_repeats, parse_settings, recorded, seconds_of, summary, write_json

from modeling_yan.mamba_yan import doubling_scan, selective_scan

try:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan
except ImportError:  # versions that have it inside of their mixer only
    mamba_selective_scan = None

CHUNK = 32


def recurrence(x, dt, a_matrix, b, c):
    """h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t), y_t = C_t h_t.

    x, dt and y are (G, B, L, E), A is (G, E, N), B and C are (G, B, L, N).
    """
    decay, added = _decay(dt, a_matrix), _added(x, dt, b)
    state, outputs = torch.zeros_like(added[:, :, 0]), []
    for step_decay, step_added, step_c in zip(decay.unbind(2), added.unbind(2), c.unbind(2)):
        state = step_decay * state + step_added
        outputs.append((state * step_c.unsqueeze(-2)).sum(-1))
    return torch.stack(outputs, 2)


def _decay(dt, a_matrix):
    return torch.exp(dt.unsqueeze(-1) * a_matrix[:, None, None])


def _added(x, dt, b):
    return (dt * x).unsqueeze(-1) * b.unsqueeze(-2)


def transformers_loop(x, dt, a_matrix, b, c):
    """The function of transformers itself, one direction after the other."""
    x, dt, b, c = (tensor.transpose(2, 3) for tensor in (x, dt, b, c))
    scans = [mamba_selective_scan(*scan) for scan in zip(x, dt, a_matrix, b, c, strict=True)]
    return torch.stack(scans).transpose(2, 3)


def chunked(x, dt, a_matrix, b, c):
    """All chunks by doubling at once, then the state handed on from chunk to chunk."""
    length = x.shape[2]
    padding = -length % CHUNK  # padded steps have dt = 0: they keep the state
    x, dt, b, c = (torch.nn.functional.pad(t, (0, 0, 0, padding)).unflatten(2, (-1, CHUNK)) for t in (x, dt, b, c))
    decay = torch.exp(dt.unsqueeze(-1) * a_matrix[:, None, None, None])
    states = (dt * x).unsqueeze(-1) * b.unsqueeze(-2)
    shift = 1
    while shift < CHUNK:
        later = states[:, :, :, shift:] + decay[:, :, :, shift:] * states[:, :, :, :-shift]
        states = torch.cat([states[:, :, :, :shift], later], 3)
        decay = torch.cat([decay[:, :, :, :shift], decay[:, :, :, shift:] * decay[:, :, :, :-shift]], 3)
        shift *= 2
    state, before = torch.zeros_like(states[:, :, 0, 0]), []
    for last_decay, last_state in zip(decay[:, :, :, -1].unbind(2), states[:, :, :, -1].unbind(2)):
        before.append(state)
        state = last_decay * state + last_state
    states = states + decay * torch.stack(before, 2).unsqueeze(3)
    return torch.matmul(states, c.unsqueeze(-1)).squeeze(-1).flatten(2, 3)[:, :, :length]


def associative(x, dt, a_matrix, b, c):
    """The package's exported form, on its time-major tensors."""
    x, dt, b, c = (tensor.permute(2, 0, 1, 3) for tensor in (x, dt, b, c))
    return doubling_scan(x, dt, a_matrix.transpose(1, 2), b, c).permute(1, 2, 0, 3)


FORMS = {
    "stored": selective_scan,
    "recurrence": recurrence,
    "chunked": chunked,
    "associative": associative,
}
if mamba_selective_scan is not None:
    FORMS["transformers"] = transformers_loop
GROWTH = {"transformers": {"forward": 1, "both": 2}}  # powers of the length that a form's time grows with


def scan_arguments(length, batch, inner, state, device):
    """Arguments of one scan ahead and one back, float32, that take gradients."""
    torch.manual_seed(0)
    x, dt = torch.randn(2, batch, length, inner), 0.1 * torch.rand(2, batch, length, inner)
    a_matrix = -torch.arange(1.0, state + 1).expand(2, inner, state)
    b, c = torch.randn(2, batch, length, state), torch.randn(2, batch, length, state)
    return [tensor.to(device).contiguous().requires_grad_() for tensor in (x, dt, a_matrix, b, c)]


def forward(form, arguments):
    with torch.no_grad():
        return form(*arguments)


def both(form, arguments):
    return torch.autograd.grad(form(*arguments).sum(), arguments, materialize_grads=True)


DIRECTIONS = {"forward": forward, "both": both}


def measure(length: int, last: dict, options) -> dict:
    """Seconds of each form and direction; `last` has (length, seconds) of the one before and is brought up to date."""
    device = torch.device(options.device)
    arguments = scan_arguments(length, options.batch_size, options.inner, options.state_size, device)
    calls, repeats = {}, {}
    for name, form in FORMS.items():
        for direction, run in DIRECTIONS.items():
            key = f"{name} {direction}"
            last_length, seconds = last.get(key, (length, 0.0))
            if seconds * (length / last_length) ** GROWTH.get(name, {}).get(direction, 1) > options.budget_s:
                continue
            calls[key] = lambda run=run, form=form: run(form, arguments)
            calls[key]()
            if options.recorded and direction == "forward":
                calls[key] = recorded(calls[key])
            seconds = seconds_of(calls[key], device)
            last[key], repeats[key] = (length, seconds), num_repeats(seconds, options.repeats, options.budget_s)
    return {key: summary(seconds) for key, seconds in interleave(calls, repeats, device).items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 512])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--inner", type=int, default=768, help="channels; 768 in the base preset")
    parser.add_argument("--state_size", type=int, default=16)
    parser.add_argument("--recorded", action="store_true", help="time forward passes as CUDA graphs")
    parser.add_argument("--budget_s", type=float, default=10)
    options, content = parse_settings(parser, arguments, "outputs/scan.json", repeats=7)
    content["lengths"] = {}
    if options.recorded and options.device == "cpu":
        parser.error("--recorded needs a GPU: give --device cuda")
    last = {}
    for length in sorted(options.lengths):
        content["lengths"][str(length)] = results = measure(length, last, options)
        write_json(options.output, content)
        for key, seconds in results.items():
            spread = f"({1000 * seconds['low']:.1f} to {1000 * seconds['high']:.1f})"
            print(f"{length:6} {key:24} {1000 * seconds['median']:10.1f} ms {spread}", flush=True)


if __name__ == "__main__":
    main()
