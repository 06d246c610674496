"""How the fields of a config are checked, and what became of those that are gone."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)
MOST = 2**31 - 1  # of everything that is counted
KNOWN_EXTRAS = {"auto_map", "custom_pipelines", "quantization_config"}  # attributes that transformers adds to a config

LAST_VERSION = "0.1"  # that had the fields and options below, but for those with a version of their own
LAST_VERSIONS = {"solver": "0.2", "gate_rank": "0.2"}
# What is gone, with the value that asked for nothing, and whether no other one can change what a model generates.
REMOVED = {
    "self_conditioning": (False, False),
    "start_point": ("noise", False),
    "use_bias": (False, False),
    "use_conv_bias": (True, False),
    "time_step_min": (0.001, True),
    "time_step_max": (0.1, True),
    "time_step_floor": (1e-4, True),
    "source_mask_ratio": (0.0, True),
    "detach_transitions": (False, True),
    "expert_exploration": (0.15, True),
    "gate_weight": (1.0, True),
    "gate_rank": (64, True),
    # of generation
    "commit_threshold": ("off", True),  # without effect but in a model with self_conditioning
    "solver": ("euler", False),
}
REMOVED_CHOICES = {"train_expert_choice": ("likeliest", "mixture")}  # training alone knows them

Config = TypeVar("Config", bound=PreTrainedConfig)


class YanFieldTypeError(StrictDataclassFieldValidationError, TypeError):
    """A field of a config has a value of a type that it cannot have."""


def with_plain_errors(cls: type[Config]) -> type[Config]:
    """Let a field of a wrong type raise a TypeError, which everyone expects, too."""
    assign = cls.__setattr__

    def __setattr__(self: PreTrainedConfig, name: str, value: Any) -> None:
        try:
            assign(self, name, value)
        except StrictDataclassFieldValidationError as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise YanFieldTypeError(name, cause) from error

    cls.__setattr__ = __setattr__  # type: ignore[method-assign]
    return cls


def require(config: PreTrainedConfig, name: str, is_allowed: Callable[[Any], bool], allowed: str) -> None:
    """Raise ValueError, with what is allowed, if a field of the config is not."""
    value = getattr(config, name)
    if not is_allowed(value):
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def require_ranges(
    config: PreTrainedConfig, positive: Iterable[str], non_negative: Iterable[str], probabilities: Iterable[str]
) -> None:
    """Check every number of a config against the range of its kind."""
    for name in positive:
        require(config, name, lambda value: 0 < value <= MOST, f"greater than 0 and at most {MOST}")
    for name in non_negative:
        require(config, name, lambda value: 0 <= value <= MOST, f"at least 0 and at most {MOST}")
    for name in probabilities:
        require(config, name, lambda value: 0 <= value < 1, "in [0, 1)")


def warn_of_unknown(config: PreTrainedConfig, given: Iterable[str], known: set[str]) -> None:
    """Tell which of the names `given` the config has kept without knowing them."""
    unknown = sorted((set(given) & set(vars(config))) - known - KNOWN_EXTRAS)
    unknown = [name for name in unknown if not name.startswith("_")]
    if unknown:
        kept = f"has no field {', '.join(unknown)}; kept as plain attributes without effect."
        logger.warning(f"{type(config).__name__} {kept}")


def drop_removed(fields: dict[str, Any]) -> None:
    """Take out of the fields of a config what this version no longer has.

    Raises:
        ValueError: One of them has a value with which the model would generate something else.
    """
    for name in [name for name in REMOVED if name in fields]:
        value, (harmless, is_ignored) = fields.pop(name), REMOVED[name]
        if value is None or value == harmless:
            continue
        version = LAST_VERSIONS.get(name, LAST_VERSION)
        if not is_ignored:
            allowed = f"{harmless!r}, or left out; version {version} was the last that had others"
            raise ValueError(f"{name}={value!r}: must be {allowed}")
        logger.warning_once(f"{name}={value!r}: ignored, version {version} was the last that had it.")


def replace_removed_choices(config: PreTrainedConfig) -> None:
    """Give a config its default where it has a choice that this version no longer has."""
    for name, choices in REMOVED_CHOICES.items():
        value, default = getattr(config, name), getattr(type(config), name)
        if value in choices:
            logger.warning_once(
                f"{name}={value!r}: replaced by {default!r}, version {LAST_VERSION} was the last that had it."
            )
            setattr(config, name, default)
