"""Optimizer, learning-rate schedule and the moving average of the weights."""

import contextlib
import math

import torch


def make_optimizer(arguments, model):
    """AdamW, and the schedule of its learning rate.

    Only the weights of linear layers and convolutions decay: not biases, norms and embeddings, and not what a Mamba
    has as bare parameters, of which 0 means something else (the rate A = -exp(A_log) at which it forgets).
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    is_decayed = {
        name: name.endswith("weight") and parameter.dim() > 1 and id(parameter) not in embeddings
        for name, parameter in trained
    }
    groups = [
        {"params": [p for name, p in trained if is_decayed[name]], "weight_decay": arguments.weight_decay},
        {"params": [p for name, p in trained if not is_decayed[name]], "weight_decay": 0.0},
    ]
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=betas)
    factor = {"constant_with_warmup": _constant, "cosine": _cosine}[arguments.lr_scheduler_type]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, arguments))


def follow_schedule(scheduler):
    """Set the learning rate that the schedule has at its place: that of a longer run is another than the saved one."""
    groups = scheduler.optimizer.param_groups
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)


def _constant(step, arguments):
    """Linear warm-up, constant, linear decay at the end."""
    warm = (step + 1) / max(1, arguments.warmup_steps)
    left = (arguments.max_steps - step) / max(1, arguments.decay_steps)
    return min(1.0, warm, left)


def _cosine(step, arguments):
    """Linear warm-up, then half a cosine to 0."""
    done = (step - arguments.warmup_steps) / max(1, arguments.max_steps - arguments.warmup_steps)
    return min((step + 1) / max(1, arguments.warmup_steps), (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2)


class MovingAverage:
    """Exponential moving average of a model's trained weights, w' <- decay w' + (1 - decay) w after every update.

    The decay grows from 0 as (1 + n) / (10 + n) with the number n of updates, so that the random start is soon
    forgotten. The average has the parameters' own layout, so sharded ones stay sharded.
    """

    def __init__(self, model, decay: float):
        self.decay, self.num_updates = decay, 0
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self):
        """Take the present weights into the average."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    @contextlib.contextmanager
    def applied(self):
        """Inside, the model has the averaged weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self):
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict:
        """What a checkpoint needs."""
        return {"num_updates": self.num_updates, "averages": self.averages}

    def load_state_dict(self, state: dict):
        """Go on from `state_dict()`."""
        self.num_updates = state["num_updates"]
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)
