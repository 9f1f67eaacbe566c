"""Frozen weights in 8 bits: gradients pass through them, and LoRA goes on top."""

import copy

import pytest
import torch
from torch import nn

from test_models import CONFIG, gradients, start_values
from vqfast import zoo


@pytest.fixture(scope="module")
def batch():
    _, processor = zoo.load()
    drawn = zoo.questions("validation")[:2]
    return processor(
        images=[image for image, _, _ in drawn], text=[text for _, text, _ in drawn], return_tensors="pt", padding=True
    )


def torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return lambda layer: layer.weight.dequantize()


def bitsandbytes(model):
    layers = pytest.importorskip("bitsandbytes.nn")
    functional = pytest.importorskip("bitsandbytes.functional")
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and "vision_tower" in path:
            quantised = layers.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
            quantised.load_state_dict(layer.state_dict())
            model.set_submodule(path, quantised.to("cpu"))
    return lambda layer: functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)


@pytest.mark.parametrize("library", [torchao, bitsandbytes], ids=lambda library: library.__name__)
def test_step_is_that_of_the_weights_they_stand_for(library, batch):
    """Against the same model with the 8-bit weights written out as float32."""
    model, _ = zoo.load()
    written = copy.deepcopy(model)
    dequantised = library(model)
    quantised = dict(model.named_modules())
    count = 0
    for path, layer in written.named_modules():
        if isinstance(layer, nn.Linear) and type(quantised[path].weight) is not nn.Parameter:
            with torch.no_grad():
                layer.weight.copy_(dequantised(quantised[path]))
            count += 1
    assert count > 10
    values = start_values(written, None)
    result, found = gradients(model, batch, None, values)
    expected, wanted = gradients(written, batch, None, values)
    assert CONFIG.lora_blocks == 2
    # bitsandbytes rounds the layer's input to 8 bits, too.
    tolerance = 1e-3 if library is torchao else 5e-2
    for one, other in zip(result.samples, expected.samples, strict=True):
        assert one.entropy_before == pytest.approx(other.entropy_before, rel=tolerance, abs=tolerance)
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * scale)
