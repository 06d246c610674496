"""Names of transformers that the package overrides or reads: a release that renames one is told here, by that name."""

import inspect
from importlib import import_module

import pytest

# what is overridden would be called no longer, and what is set would be read no longer, without any error
NAMES = {
    "transformers.PreTrainedModel": (
        "_init_weights post_init from_pretrained save_pretrained get_input_embeddings set_input_embeddings "
        "_tied_weights_keys _keys_to_ignore_on_load_unexpected _no_split_modules _supports_sdpa _supports_flash_attn "
        "_supports_flex_attn _supports_attention_backend _auto_class base_model_prefix main_input_name "
        "supports_gradient_checkpointing warn_if_padding_and_no_attention_mask get_expanded_tied_weights_keys"
    ),
    "transformers.PreTrainedConfig": "from_dict to_dict __post_init__ model_type sub_configs attribute_map",
    "transformers.GenerationConfig": "_get_default_generation_params from_dict to_dict to_diff_dict validate update",
    "transformers.GenerationMixin": (
        "generate adjust_generation_fn init_continuous_batching generate_batch continuous_batching_context_manager "
        "_validate_model_kwargs _prepare_generation_config prepare_inputs_for_generation"
    ),
    "transformers.TrainerCallback": (
        "on_init_end on_train_begin on_epoch_begin on_substep_end on_step_end on_prediction_step on_log on_predict"
    ),
    "transformers.trainer": "DEFAULT_CALLBACKS",
    "transformers.generation.streamers.BaseStreamer": "put end",
    "transformers.modeling_layers": "GradientCheckpointingLayer",
    "transformers.initialization": "zeros_ ones_ copy_ orthogonal_ kaiming_uniform_ no_init_weights",
}
READ_IN_SOURCES = {  # names that transformers reads from a model without declaring them
    "transformers.modeling_utils": "_can_record_outputs _hf_peft_config_loaded all_tied_weights_keys",
    "transformers.trainer": "accepts_loss_kwargs num_items_in_batch",
    "transformers.trainer_seq2seq": "_gen_kwargs generation_config",
    "transformers.utils.output_capturing": "_can_record_outputs",
}


def find(path: str):
    """A module, or something in it."""
    try:
        return import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(find(module), name)


@pytest.mark.parametrize(
    ("place", "name"), [(place, name) for place, names in NAMES.items() for name in names.split()]
)
def test_transformers_has_it(place, name):
    assert hasattr(find(place), name), f"{place} of this transformers has no {name}: look for the new one"


@pytest.mark.parametrize(
    ("place", "name"), [(place, name) for place, names in READ_IN_SOURCES.items() for name in names.split()]
)
def test_transformers_reads_it(place, name):
    assert name in inspect.getsource(find(place)), (
        f"{place} of this transformers reads no {name}: look for the new one"
    )
