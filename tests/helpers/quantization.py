"""A quantizer that needs no library."""

import torch
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


@register_quantization_config("to_fp8")
class ToFp8Config(QuantizationConfigMixin):
    def __init__(self, **kwargs):
        self.quant_method = "to_fp8"
        self.modules_to_not_convert = None


@register_quantizer("to_fp8")
class _ToFp8(HfQuantizer):
    """Rounds the weights of a model's linear layers to 8 bits: a quantizer."""

    requires_calibration = False
    is_trainable = True

    def _process_model_before_weight_loading(self, model, **kwargs):
        pass

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight.data.to(torch.float8_e4m3fn).to(module.weight.dtype)

    def is_serializable(self):
        return False  # it rounds, and has no format of its own
