"""vqfast: fast test-time tuning of vision-language models."""

from vqfast import nn, ops
from vqfast.backends import BackendUnavailableError, backend, build_info, installed_version
from vqfast.integrations.codec_adapters import CodecAdapters, insert_codec_adapters
from vqfast.integrations.transformers import register_vision_tower
from vqfast.tuning.candidates import Preset
from vqfast.tuning.config import TuningConfig
from vqfast.tuning.result import TuningResult
from vqfast.tuning.tuner import TestTimeTuner, TuningError

__version__ = installed_version()

__all__ = [
    "BackendUnavailableError",
    "CodecAdapters",
    "Preset",
    "TestTimeTuner",
    "TuningConfig",
    "TuningError",
    "TuningResult",
    "__version__",
    "backend",
    "build_info",
    "insert_codec_adapters",
    "nn",
    "ops",
    "register_vision_tower",
]
