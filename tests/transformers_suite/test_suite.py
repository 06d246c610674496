"""transformers' own common tests, run on our three model classes in both variants."""

import os
import unittest
from unittest import mock

import pytest
import torch
from fetch import SuiteUnavailable
from load import load_suite
from transformers import set_seed
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device
from yan_model_tester import YanModelTester

from modeling_yan.configuration_yan import YanConfig
from modeling_yan.modeling_yan import YanForAutoencoding, YanForFlowGeneration, YanModel

try:
    suite, unavailable = load_suite(), None
except SuiteUnavailable as error:
    suite, unavailable = None, str(error)


def test_the_suite_is_available():
    if unavailable and os.environ.get("YAN_SUITE_OPTIONAL") == "1":
        pytest.skip(unavailable)
    assert suite is not None, unavailable


if suite is not None:

    class YanSuite(suite.ModelTesterMixin):
        """One model class in one variant; the sub-classes say which."""

        mixer = "attention"
        # ours is younger than 2023, but its files carry no copyright line for the suite to see it by
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self):
            self.model_tester = YanModelTester(self.mixer)
            # transformers knows its own base classes by name; for the time of a test it knows ours
            known = mock.patch.dict(MODEL_MAPPING_NAMES, {"yan": "YanModel"})
            known.start()
            self.addCleanup(known.stop)

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class)
            if return_labels and model_class is YanForAutoencoding:
                inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            if return_labels and model_class is YanForFlowGeneration:
                inputs["labels"] = self.model_tester.target_labels().to(torch_device)
            return inputs

    class Mamba:
        """The variant without self-attention."""

        mixer = "mamba"
        has_attentions = False  # its cross-attention reads the prompt; no token attends to its own sequence

    class ForYanModel(YanSuite):
        all_model_classes = (YanModel,)

        def test_config(self):
            tester = suite.ConfigTester(self, config_class=YanConfig, hidden_size=36, encoder_mixer=self.mixer)
            tester.run_common_tests()

    class ForAutoencoding(YanSuite, suite.TrainingTesterMixin):
        all_model_classes = (YanForAutoencoding,)

        @pytest.mark.slow
        def test_training_overfit(self):
            super().test_training_overfit()

    class ForFlowGeneration(YanSuite, suite.TrainingTesterMixin):
        all_model_classes = (YanForFlowGeneration,)

        @unittest.skip("GenerationTesterMixin tests token-by-token decoding; tests/test_generation.py tests ours")
        def test_generation_tester_mixin_inheritance(self):
            pass

        @pytest.mark.slow
        def test_training_overfit(self):
            """Not the suite's: it expects the rest of a text after a prefix of it, we learn a target from a prompt.

            The mixture's negative log likelihood has a floor, so it is the cross-entropy that has to fall by 90%.
            """
            set_seed(42)
            model = YanForFlowGeneration(self.model_tester.get_config(num_encoder_layers=1, num_flow_layers=1))
            prompt = torch.full((8, 1), self.model_tester.first_ordinary_id)
            target = prompt + 1 + torch.arange(self.model_tester.canvas_length)
            optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
            initial = cross_entropy = self._cross_entropy(model, prompt, target)
            for step in range(1, 1001):
                self._update(model.train(), optimizer, prompt, target)
                if step % 50 == 0:
                    cross_entropy = self._cross_entropy(model, prompt, target)
                if cross_entropy < 0.001 * initial:  # at a hundredth a token may still be wrong
                    break
            self.assertLess(cross_entropy, (1 - self.training_loss_reduction_threshold) * initial)
            written = model.eval().generate(prompt, max_new_tokens=target.shape[1], do_sample=False)
            self.assertEqual(written.tolist(), torch.cat([prompt, target], dim=1).tolist())

        @torch.no_grad()
        def _cross_entropy(self, model, prompt, target) -> float:
            return model.eval()(input_ids=prompt, labels=target).ce_loss.item()

        def _update(self, model, optimizer, prompt, target):
            optimizer.zero_grad()
            model(input_ids=prompt, labels=target).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()

    class TestYanModel(ForYanModel, unittest.TestCase):
        pass

    class TestYanModelMamba(Mamba, ForYanModel, unittest.TestCase):
        pass

    class TestYanForAutoencoding(ForAutoencoding, unittest.TestCase):
        pass

    class TestYanForAutoencodingMamba(Mamba, ForAutoencoding, unittest.TestCase):
        pass

    class TestYanForFlowGeneration(ForFlowGeneration, unittest.TestCase):
        pass

    class TestYanForFlowGenerationMamba(Mamba, ForFlowGeneration, unittest.TestCase):
        pass
