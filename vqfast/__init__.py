"""vqfast: fast test-time tuning of vision-language models."""

from importlib.metadata import version

from vqfast import nn, ops
from vqfast.backends import BackendUnavailableError, backend, build_info

__version__ = version("vqfast")

__all__ = ["BackendUnavailableError", "__version__", "backend", "build_info", "nn", "ops"]
