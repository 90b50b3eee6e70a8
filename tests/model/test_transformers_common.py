"""transformers' own common tests, against tiny models. CONTRIBUTING has the table of what is skipped, and why."""

import sys
import unittest
import warnings

import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, OPTConfig

from modeling_fromage import FromageConfig, FromageForConditionalGeneration, FromageProcessor
from tests.helpers.backbones import PARITY
from tests.helpers.fetch_transformers_tests import ROOT as FETCHED

if FETCHED.is_dir():
    sys.path.insert(0, str(FETCHED))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers_tests.test_configuration_common import ConfigTester
        from transformers_tests.test_modeling_common import ModelTesterMixin
        from transformers_tests.test_processing_common import ProcessorTesterMixin
else:  # nothing is fetched while tests are collected

    def ConfigTester(*args, **kwargs):
        raise AssertionError(
            f"There is no {FETCHED}. Run `python -m tests.helpers.fetch_transformers_tests`, as `make` does."
        )

    class ModelTesterMixin:
        test_fetched = ConfigTester

    ProcessorTesterMixin = ModelTesterMixin

pytestmark = pytest.mark.filterwarnings("ignore")
VOCAB, IMAGE, K = 97, 97, 2


class FromageTester:
    """The sizes that the common tests ask for, with one image in every row."""

    batch_size, seq_length, num_hidden_layers, num_attention_heads, hidden_size = 3, 9, 2, 4, 32
    is_training = True

    def __init__(self, text_config):
        self.text_config = text_config
        self.vision_config = CLIPVisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                                              num_attention_heads=4, image_size=16, patch_size=8)  # fmt: skip

    def get_config(self) -> FromageConfig:
        return FromageConfig.from_vision_text_configs(
            self.vision_config, self.text_config, image_token_id=IMAGE, num_image_tokens=K, projection_dim=8
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, VOCAB, (self.batch_size, self.seq_length))
        ids[:, 1 : 1 + K] = IMAGE
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.rand(self.batch_size, 3, 16, 16),
        }
        return self.get_config(), inputs


class _CommonTests(ModelTesterMixin):
    all_model_classes = (FromageForConditionalGeneration,)
    additional_model_inputs = ["pixel_values"]
    test_resize_embeddings = False  # the language model's matrices are frozen
    test_all_params_have_gradient = False  # nor have they a gradient
    _is_composite = True
    text_config: OPTConfig | LlamaConfig

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = FromageTester(self.text_config)
        self.config_tester = ConfigTester(self, config_class=FromageConfig, has_text_modality=False)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if "pixel_values" in inputs:  # some tests add rows without images, and images
            count = int((inputs["input_ids"] == IMAGE).sum()) // K
            inputs["pixel_values"] = inputs["pixel_values"][:count]
        if return_labels:
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip("There is no base model: AutoModel, too, gives FromageForConditionalGeneration.")
    def test_model_base_model_prefix(self):
        pass

    @unittest.skip(
        "Gives embeddings of placeholders with images, which FROMAGe refuses; test_backbones.py has its own."
    )
    def test_inputs_embeds(self):
        pass

    @unittest.skip("The source distribution lacks GenerationTesterMixin; test_generation.py stands for it.")
    def test_generation_tester_mixin_inheritance(self):
        pass

    @unittest.skip("Loads a checkpoint without its weights, which FROMAGe refuses (test_checkpoints.py).")
    def test_model_weights_reload_no_missing_tied_weights(self):
        pass


class FromageOPTTest(_CommonTests, unittest.TestCase):
    text_config = OPTConfig(vocab_size=VOCAB + 5, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
                            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)  # fmt: skip


class FromageLlamaTest(_CommonTests, unittest.TestCase):
    text_config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                              tie_word_embeddings=False)  # fmt: skip


class FromageProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = FromageProcessor

    @classmethod
    def setUpClass(cls):
        cls.auto_class = FromageProcessor._auto_class
        FromageProcessor._auto_class = None  # as a class inside transformers: no `auto_map` in what is saved
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        FromageProcessor._auto_class = cls.auto_class

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})

    @classmethod
    def _setup_tokenizer(cls):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(PARITY / "case_a_opt_tied" / "language_model")

    @unittest.skip(
        "The processor keeps `max_length`, of captions in training, under the name that the collator has for it."
    )
    def test_init_arguments_not_in_processor_kwargs(self):
        pass

    @staticmethod
    def prepare_processor_dict():
        return {"num_image_tokens": K}
