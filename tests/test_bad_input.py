"""Wrong input meets a clear error, or a behaviour that is written down; nothing goes wrong in silence."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig, BertModel

from modeling_yan import YanConfig, YanForAutoencoding, YanForFlowGeneration, YanModel

PAD, BOS, EOS = 0, 1, 2
VOCABULARY, POSITIONS = 64, 48


@pytest.fixture
def model(make_model) -> YanForFlowGeneration:
    return make_model(initializer_range=0.3)


@pytest.fixture
def prompts() -> torch.LongTensor:
    return torch.randint(4, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


class TestEmptyPrompts:
    """An empty prompt stands for one BOS."""

    @pytest.fixture
    def from_bos(self, model) -> list[int]:
        return model.generate(torch.tensor([[BOS]]), return_prompt=False)[0].tolist()

    def test_none_at_all(self, model, from_bos):
        assert model.generate().tolist() == [[BOS, *from_bos]]

    @pytest.mark.parametrize("num_rows", [1, 3])
    def test_no_tokens(self, model, from_bos, num_rows):
        empty = torch.empty(num_rows, 0, dtype=torch.long)
        output = model.generate(empty, attention_mask=empty)
        assert output.tolist() == [[BOS, *from_bos]] * num_rows

    def test_a_row_of_padding_in_a_batch(self, model, prompts, from_bos):
        whole = model.generate(prompts, return_prompt=False)
        prompts[1] = PAD
        output = model.generate(prompts, return_prompt=False)
        assert output.tolist() == [whole[0].tolist(), from_bos, whole[2].tolist()]

    def test_a_row_that_is_masked_whole(self, model, prompts, from_bos):
        mask = torch.ones_like(prompts)
        mask[1] = 0
        output = model.generate(prompts, attention_mask=mask, return_prompt=False)
        assert output[1].tolist() == from_bos

    def test_without_a_bos_token_it_is_an_error(self, make_model, prompts):
        model = make_model(bos_token_id=None)
        prompts[1] = PAD
        for prompt in (None, prompts[:, :0], prompts):
            with pytest.raises(ValueError, match="bos_token_id"):
                model.generate(prompt)


class TestPrompts:
    def test_longer_than_the_positions(self, model):
        too_long = torch.full((1, POSITIONS + 1), 5)
        for call in (model.generate, model, model.model):
            with pytest.raises(ValueError, match=f"{POSITIONS + 1} tokens: must be 1 to .*={POSITIONS}"):
                call(too_long)

    def test_padding_does_not_count_as_length(self, model, prompts):
        padded = torch.nn.functional.pad(prompts, (POSITIONS, 0), value=PAD)
        assert torch.equal(model.generate(padded, return_prompt=False), model.generate(prompts, return_prompt=False))

    @pytest.mark.parametrize("wrong_id", [-1, VOCABULARY])
    def test_ids_outside_the_vocabulary(self, model, prompts, wrong_id):
        prompts[1, 2] = wrong_id
        for call in (model.generate, model, model.model):
            with pytest.raises(ValueError, match=rf"{wrong_id}.*\[0, vocab_size={VOCABULARY}\)"):
                call(prompts)

    @pytest.mark.parametrize("wrong_id", [-1, VOCABULARY])
    def test_labels_outside_the_vocabulary(self, model, prompts, wrong_id):
        labels = prompts.clone()
        labels[1, 2] = wrong_id
        with pytest.raises(ValueError, match=rf"{wrong_id}.*\[0, vocab_size={VOCABULARY}\)"):
            model(prompts, labels=labels)

    @pytest.mark.parametrize("wrong_id", [-1, VOCABULARY])
    def test_autoencoder_labels_outside_the_vocabulary(self, make_model, prompts, wrong_id):
        labels = prompts.clone()
        labels[1, 2] = wrong_id
        with pytest.raises(ValueError, match=rf"{wrong_id}.*\[0, vocab_size={VOCABULARY}\)"):
            make_model(YanForAutoencoding)(prompts, labels=labels)

    def test_pad_tokens_without_a_mask_are_masked(self, model, prompts):
        padded = torch.cat([torch.full((3, 4), PAD), prompts], dim=1)
        output = model.generate(padded)
        assert torch.equal(output[:, 10:], model.generate(prompts, return_prompt=False))
        assert torch.equal(output[:, :10], padded)

    def test_pad_tokens_within_a_text_that_are_an_eos_too_are_none(self, model, prompts):
        options = {"pad_token_id": EOS, "return_prompt": False, "num_flow_steps": 2, "max_new_tokens": 20}
        prompts[:, 3] = EOS
        expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        assert torch.equal(model.generate(prompts, **options), expected)
        padding = torch.full((3, 2), EOS)
        for padded in (torch.cat([padding, prompts], dim=1), torch.cat([prompts, padding], dim=1)):
            assert torch.equal(model.generate(padded, **options), expected)

    def test_of_floats(self, model, prompts):
        with pytest.raises(ValueError, match=r"float32.*integers"):
            model.generate(prompts.float())

    @pytest.mark.parametrize("shape", [(6,), (1, 2, 3), ()])
    def test_not_of_two_dimensions(self, model, shape):
        with pytest.raises(ValueError, match=r"must be a tensor of integers \(B, S\)"):
            model.generate(torch.full(shape, 5))

    def test_a_batch_of_none(self, model, prompts):
        with pytest.raises(ValueError, match="B at least 1"):
            model.generate(prompts[:0])

    def test_a_list_instead_of_a_tensor(self, model, prompts):
        with pytest.raises(ValueError, match=r"list .*must be a tensor"):
            model.generate(prompts.tolist())

    @pytest.mark.parametrize("shape", [(3, 5), (3, 7), (2, 6), (6,)])
    def test_a_mask_of_another_shape(self, model, prompts, shape):
        mask = torch.ones(shape, dtype=torch.long)
        for call in (model.generate, model, model.model):
            with pytest.raises(ValueError, match="attention_mask"):
                call(prompts, attention_mask=mask)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
    def test_a_mask_of_any_type_works(self, model, prompts, dtype):
        mask = torch.ones_like(prompts)
        mask[0, :3] = 0
        expected = model.generate(prompts, attention_mask=mask, max_new_tokens=20)
        assert torch.equal(model.generate(prompts, attention_mask=mask.to(dtype), max_new_tokens=20), expected)


class TestOptions:
    @pytest.mark.parametrize("num_steps", [0, -1])
    def test_no_solver_steps(self, model, prompts, num_steps):
        for call in (model.generate, model, lambda *args, **kwargs: model(*args, labels=prompts.flip(1), **kwargs)):
            with pytest.raises(ValueError, match=f"num_flow_steps={num_steps}: must be (an integer of )?at least"):
                call(prompts, num_flow_steps=num_steps)

    @pytest.mark.parametrize("length", [0, -3])
    def test_no_new_tokens(self, model, prompts, length):
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.generate(prompts, max_new_tokens=length)

    @pytest.mark.parametrize("wrong_id", [-1, VOCABULARY])
    def test_suppressed_tokens_outside_the_vocabulary(self, model, prompts, wrong_id):
        with pytest.raises(ValueError, match="suppress_tokens"):
            model.generate(prompts, suppress_tokens=[wrong_id])

    def test_more_tokens_at_least_than_at_most(self, model, prompts):
        with pytest.raises(ValueError, match="min_new_tokens"):
            model.generate(prompts, min_new_tokens=9, max_new_tokens=4)

    @pytest.mark.parametrize("width", [9, 20])
    def test_labels_wider_than_the_canvas(self, model, prompts, width):
        with pytest.raises(ValueError, match=f"labels are {width} tokens wide"):
            model(prompts, labels=torch.full((3, width), 5))

    def test_labels_without_an_eos_token_to_end_them(self, make_model, prompts):
        with pytest.raises(ValueError, match="eos_token_id"):
            make_model(eos_token_id=None)(prompts, labels=prompts.flip(1))


class TestCheckpoints:
    @pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
    def test_a_truncated_file_of_weights(self, folder, kept):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content))])
        with pytest.raises((SafetensorError, OSError)):
            YanForFlowGeneration.from_pretrained(folder)

    def test_a_file_of_something_else(self, folder):
        (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 50)
        with pytest.raises((SafetensorError, OSError)):
            YanForFlowGeneration.from_pretrained(folder)

    def test_no_weights_at_all(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(OSError, match=r"model\.safetensors"):
            YanForFlowGeneration.from_pretrained(folder)

    def test_a_missing_tensor_is_reported(self, folder):
        weights = load_file(folder / "model.safetensors")
        del weights["flow.gate.expert_proj.bias"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        _, info = YanForFlowGeneration.from_pretrained(folder, output_loading_info=True)
        assert info["missing_keys"] == {"flow.gate.expert_proj.bias"}

    def test_weights_of_another_size(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": VOCABULARY + 1}))
        with pytest.raises(RuntimeError, match=r"mismatch"):
            YanForFlowGeneration.from_pretrained(folder)

    def test_a_config_that_is_no_json(self, folder):
        (folder / "config.json").write_text("{")
        with pytest.raises(OSError, match="JSON"):
            YanForFlowGeneration.from_pretrained(folder)

    def test_a_config_with_a_wrong_value(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "flow_mixer": "conv"}))
        with pytest.raises(ValueError, match="flow_mixer='conv'"):
            YanForFlowGeneration.from_pretrained(folder)


class TestOtherModels:
    @pytest.fixture
    def bert(self, tmp_path):
        """A folder with a tiny model of another kind."""
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        BertModel(BertConfig(intermediate_size=64, **sizes)).save_pretrained(tmp_path)
        return tmp_path

    def test_its_config_is_refused(self, bert):
        with pytest.raises(ValueError, match="bert"):
            YanConfig.from_pretrained(bert)

    @pytest.mark.parametrize("model_class", [YanModel, YanForAutoencoding, YanForFlowGeneration])
    def test_its_checkpoint_is_refused(self, bert, model_class):
        with pytest.raises(ValueError, match="bert"):
            model_class.from_pretrained(bert)

    @pytest.mark.parametrize("model_class", [YanModel, YanForAutoencoding, YanForFlowGeneration])
    def test_its_config_object_is_refused(self, model_class):
        with pytest.raises((ValueError, TypeError), match=r"(?i)bert"):
            model_class(BertConfig())

    def test_a_config_without_model_type_is_taken_for_ours(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 99}))
        assert YanConfig.from_pretrained(tmp_path).vocab_size == 99
        with pytest.raises(ValueError, match="model_type"):
            AutoConfig.from_pretrained(tmp_path)
