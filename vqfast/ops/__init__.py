"""The operators. One folder each: contract, reference, public function; kernels in csrc/ (see CONTRIBUTING.md)."""

from vqfast import _native
from vqfast.ops.cosine_alignment.api import cosine_alignment
from vqfast.ops.film_adapter.api import film_adapter
from vqfast.ops.linear_softmax_entropy.api import linear_softmax_entropy
from vqfast.ops.lora_linear.api import lora_linear
from vqfast.ops.lowrank_filter2d.api import lowrank_filter2d
from vqfast.ops.softmax_entropy.api import softmax_entropy
from vqfast.ops.spectral_gain2d.api import dct2, spectral_gain2d

_native.load("cpu")

__all__ = [
    "cosine_alignment",
    "dct2",
    "film_adapter",
    "linear_softmax_entropy",
    "lora_linear",
    "lowrank_filter2d",
    "softmax_entropy",
    "spectral_gain2d",
]
