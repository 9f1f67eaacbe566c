"""Adapters to image codecs behind every block of a model's vision tower, put in and taken out with one call each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqfast.integrations.transformers import find_vision_tower
from vqfast.nn import CodecAdapter
from vqfast.ops.film_adapter.contract import MAX_RANK

UNKNOWN = "unknown"  # row 0 of every table


class CodecAdapters(nn.Module):
    """The adapters of a model in `layers`, a `nn.CodecAdapter` per block; `insert_codec_adapters` makes them.

    Their parameters are trainable, in float32 (float64 for a model in that); freeze the model yourself. They are no
    part of the model: its `state_dict` is what it was, and wrappers of it (DistributedDataParallel) do not see them.
    One thread at a time sets conditions. A model with adapters in it is not copied or pickled: remove them first.
    """

    def __init__(self, blocks: Sequence[nn.Module], conditions: Sequence[str], bottleneck: int) -> None:
        super().__init__()
        self.conditions = (UNKNOWN, *conditions)
        self._rows: Tensor | int = 0
        self.layers = nn.ModuleList(
            CodecAdapter(_width(block), bottleneck, len(conditions)).to(weight.device, _parameter_dtype(weight))
            for block in blocks
            for weight in [_first_linear(block).weight]
        )
        # First in line: transformers records hidden states with a hook of its own.
        self._hooks = [
            block.register_forward_hook(_Hook(self, adapter), prepend=True)
            for block, adapter in zip(blocks, self.layers, strict=True)
        ]

    @contextlib.contextmanager
    def condition(self, names: str | Sequence[str | None] | None) -> Iterator[None]:
        """Say how images were compressed while the context lasts: a name of `conditions` for all, or one per image.

        None, as outside of any context, is "unknown". A backward that computes the tower again (activation
        checkpointing around it) belongs into the context, too.

        Raises:
            ValueError: an unknown name; later, in the model's forward, more or fewer names than images, or names per
                image where the tower's blocks do not get these images one by one, [B, M, K]: packed patches, tiles,
                the copies of a candidate search. Give one name for all then.
        """
        previous = self._rows
        if names is None or isinstance(names, str):
            self._rows = self._row(names)
        else:
            device = next(self.parameters()).device
            self._rows = torch.tensor([self._row(name) for name in names], dtype=torch.int64, device=device)
        try:
            yield
        finally:
            self._rows = previous

    def _row(self, name: str | None) -> int:
        if (name or UNKNOWN) not in self.conditions:
            raise ValueError(f"condition must be one of {', '.join(self.conditions)} or None; got {name!r}")
        return self.conditions.index(name or UNKNOWN)

    def remove(self) -> None:
        """Take the adapters out: the model is what it was. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `insert_codec_adapters(model, path)` reads."""
        from safetensors.torch import save_file

        save_file(self.state_dict(), path, metadata={"conditions": json.dumps(self.conditions[1:])})


class _Hook:
    """Puts an adapter behind a block."""

    def __init__(self, adapters: CodecAdapters, adapter: nn.Module) -> None:
        self.adapters, self.adapter = adapters, adapter
        self.rows: Tensor | int = 0  # of the last forward

    def __reduce__(self) -> Any:  # copy.deepcopy, pickle
        raise TypeError("the model has codec adapters, which would not be copied with it; call remove() of them first")

    def __call__(self, block: nn.Module, inputs: Any, output: Any) -> Any:
        x, rows = output[0] if isinstance(output, tuple) else output, self.adapters._rows
        if not torch.compiler.is_compiling():
            if torch._C._current_graph_task_id() != -1 and rows is not self.rows:
                raise ValueError("the vision tower is computed again in backward(): call that inside condition(), too")
            self.rows = rows
        if isinstance(rows, Tensor) and (x.dim() != 3 or len(x) != len(rows)):
            raise ValueError(
                f"{len(rows)} conditions, but the vision blocks get {list(x.shape)}: give one per image where that is "
                "[images, patches, width], else (tiles, packed patches, candidate search) one for all images, as "
                "condition('jpeg:5')"
            )
        y = self.adapter(x, rows)
        return (y, *output[1:]) if isinstance(output, tuple) else y


def insert_codec_adapters(
    model: nn.Module, conditions: Sequence[str] | str | Path, bottleneck: int | None = None
) -> CodecAdapters:
    """Put a `nn.CodecAdapter` behind every block of the model's vision tower; until they are trained nothing changes.

        adapters = vqfast.insert_codec_adapters(model, ("jpeg:5", "webp:0"))
        with adapters.condition(["jpeg:5", None]):          # of two images; None: not known
            model(**inputs)
        adapters.remove()                                    # the model is bit for bit what it was

    Args:
        model: a vision-language model whose tower `TestTimeTuner` would find (`register_vision_tower` for others).
        conditions: names of the known pairs of codec and level, or the path of a file that `CodecAdapters.save` wrote.
        bottleneck: r of every adapter, 1 to 128; None: 16, or the file's.

    Raises:
        ValueError: no tower or blocks found, adapters there already, names repeated, or a file that does not fit.

    Source: universal adaptor of arXiv 2512.20901; see `nn.CodecAdapter`.
    """
    tower = find_vision_tower(model, 0, (), ((0.0,), (1.0,)))  # pixels are not touched
    if not tower.blocks:
        raise ValueError(f"no blocks in the vision tower {tower.path!r}; say where: vqfast.register_vision_tower(...)")
    if any(isinstance(hook, _Hook) for block in tower.blocks for hook in block._forward_hooks.values()):
        raise ValueError("the model has codec adapters already; call remove() of these first")
    state: dict[str, Tensor] = {}
    names: Sequence[str] = () if isinstance(conditions, (str, Path)) else conditions
    if isinstance(conditions, (str, Path)):
        state, names = _read(Path(conditions))
        saved = len(state["layers.0.down"])
        if bottleneck not in (None, saved):
            raise ValueError(f"the file's adapters have a bottleneck of {saved}; got bottleneck={bottleneck}")
        bottleneck = saved
        expected = {f"layers.{i}.down": (saved, _width(block)) for i, block in enumerate(tower.blocks)}
        found = {name: tuple(value.shape) for name, value in state.items() if name.endswith(".down")}
        if found != expected:
            raise ValueError(f"the file's adapters are for other blocks: {found}; this model's would be {expected}")
    if len({UNKNOWN, *names}) != len(names) + 1:
        raise ValueError(f"conditions must be names, none twice, none {UNKNOWN!r}; got {list(names)}")
    if bottleneck is not None and not 1 <= bottleneck <= MAX_RANK:
        raise ValueError(f"bottleneck must be 1 to {MAX_RANK}; got {bottleneck}")
    adapters = CodecAdapters(tower.blocks, names, 16 if bottleneck is None else bottleneck)
    if state:
        try:
            adapters.load_state_dict(state)
        except RuntimeError as error:
            adapters.remove()
            raise ValueError(f"{conditions} does not fit this model: {error}") from error
    return adapters


def _read(path: Path) -> tuple[dict[str, Tensor], Sequence[str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; pass a sequence of conditions for new adapters")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    try:
        conditions = json.loads(metadata["conditions"])
        whole = state["layers.0.down"].dim() == 2 and isinstance(conditions, list)
    except (KeyError, json.JSONDecodeError):
        whole = False
    if not whole or not all(isinstance(name, str) for name in conditions):
        raise ValueError(f"{path} holds no codec adapters: CodecAdapters.save writes such files")
    return state, conditions


def _first_linear(block: nn.Module) -> Any:
    """The layer that the block's attention begins with, quantised as it may be."""
    return next(m for m in block.modules() if isinstance(getattr(m, "in_features", None), int))


def _parameter_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _width(block: nn.Module) -> int:
    return int(_first_linear(block).in_features)
