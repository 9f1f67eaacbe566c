"""How the input of a vision tower lays out the images of a batch, and whose rows are whose inside the tower.

Stacks of images or tiles, images padded to the largest of them, and images cut into flattened patches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Group(NamedTuple):
    """Images of equal size, filtered by one call."""

    samples: slice  # whose they are
    images: Tensor  # [s, n C, H, W]: the n images of each of s samples, as channels


@dataclass(frozen=True)
class Layout:
    """The images in a vision tower's input.

    Attributes:
        restore: from as many tensors as groups, in their shapes, the tower's input again.
        counts: images of each sample. rows: of each image in the tower's one sequence of patches; None where every
            image has its own sequence.
    """

    groups: list[Group]
    restore: Callable[[list[Tensor]], Tensor]
    counts: tuple[int, ...]
    rows: tuple[int, ...] | None = None
    _offsets: dict[int, Tensor] = field(default_factory=dict, repr=False)  # every layer asks for the same

    @functools.cached_property
    def alike(self) -> bool:
        """Every sample has as many rows."""
        return len(set(self.counts)) == 1 and len(set(self.rows or ())) <= 1

    def row_offsets(self, rows: int, device: torch.device) -> Tensor:
        """Where each sample's rows of `rows` in all start and end: int32 [B + 1].

        Raises:
            ValueError: the tower does not have that many rows, or not as many for each image.
        """
        if rows in self._offsets:
            return self._offsets[rows]
        images = sum(self.counts)
        of_image = self.rows or (rows // images,) * images
        ends = list(accumulate(of_image, initial=0))
        if ends[-1] != rows:
            raise ValueError(f"a layer in the vision tower has {rows} rows for images of {ends[-1]} patches")
        samples = accumulate(self.counts, initial=0)
        self._offsets[rows] = torch.tensor([ends[image] for image in samples], dtype=torch.int32, device=device)
        return self._offsets[rows]


def layout_of(tower: nn.Module, pixels: Tensor, arguments: dict[str, Any], counts: tuple[int, ...]) -> Layout:
    """Take the input of a vision tower apart.

    Args:
        pixels: the tower's first argument; arguments: the others by name. Laid out as one of

            [..., C, H, W]                     images or tiles, sample by sample
            [N, C, H, W], image_sizes          padded on the right and below (Pixtral)
            [N, C, H, W], patch_attention_mask the same (Idefics)
            [patches, C T P P], grid_thw       flattened patches of P x P pixels and T frames (Qwen)

        counts: images of each sample; a common multiple of them may come.

    Raises:
        ValueError: another number of images.
    """
    grid, sizes, mask = (arguments.get(name) for name in ("grid_thw", "image_sizes", "patch_attention_mask"))
    if grid is not None:
        return _patches(tower, pixels, [tuple(row) for row in grid.tolist()], counts)
    if sizes is not None:
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        patch: Any = tower.patch_size
        rows = tuple((height // patch) * (width // patch) for height, width in sizes)
        return _padded(pixels, sizes, counts, rows)
    if isinstance(mask, Tensor) and not bool(mask.all()):
        side: Any = tower.patch_size if hasattr(tower, "patch_size") else tower.config.patch_size  # type: ignore[union-attr]
        extent = torch.stack([mask.any(-1).sum(-1), mask.any(-2).sum(-1)], -1) * side
        return _padded(pixels, extent.tolist(), counts, None)
    return stacked(pixels, counts, arguments.get("aspect_ratio_mask"))


def stacked(pixels: Tensor, counts: tuple[int, ...], real: Tensor | None = None) -> Layout:
    """Images [..., C, H, W] of one size; those where `real` ([...]) is 0 are padding and stay as they are."""
    images, (channels, height, width) = pixels.shape[:-3].numel(), pixels.shape[-3:]
    if len(set(counts)) == 1 and images % len(counts) == 0:
        parts = pixels.reshape(len(counts), images // len(counts) * channels, height, width)
        groups = [Group(slice(0, len(counts)), parts)]
        counts = (images // len(counts),) * len(counts)
    else:
        _check_count(images, counts)
        runs = pixels.reshape(images, channels, height, width).split(counts)
        groups = [Group(slice(i, i + 1), run.reshape(1, -1, height, width)) for i, run in enumerate(runs)]

    def restore(parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            whole = parts[0].view_as(pixels)
        else:
            whole = torch.cat([part.reshape(-1, channels, height, width) for part in parts]).view_as(pixels)
        return whole if real is None else torch.where(real[..., None, None, None] != 0, whole, pixels)

    return Layout(groups, restore, counts)


def _ragged(
    images: Sequence[Tensor], join: Callable[[list[Tensor]], Tensor], counts: tuple[int, ...], rows: Any
) -> Layout:
    """Images [C, H, W] of sizes of their own; `join` makes the tower's input of them."""
    if len({image.shape for image in images}) == 1 and len(set(counts)) == 1:
        same = stacked(torch.stack(list(images)), counts)
        return Layout(same.groups, lambda parts: join(list(same.restore(parts).unbind())), same.counts, rows)
    _check_count(len(images), counts)
    owners = [sample for sample, count in enumerate(counts) for _ in range(count)]
    groups = [Group(slice(i, i + 1), image[None]) for i, image in zip(owners, images, strict=True)]
    return Layout(groups, lambda parts: join([part[0] for part in parts]), counts, rows)


def _check_count(images: int, counts: tuple[int, ...]) -> None:
    if images != sum(counts):
        raise ValueError(
            f"the vision tower got {images} images for {len(counts)} tuned samples of {list(counts)}; "
            "pass the images that were tuned, in their order. A tower must get them in one call"
        )


def _padded(pixels: Tensor, sizes: Any, counts: tuple[int, ...], rows: Any) -> Layout:
    full = pixels.shape[-2:]
    if all(tuple(size) == tuple(full) for size in sizes):
        same = stacked(pixels, counts)
        return Layout(same.groups, same.restore, same.counts, rows)

    def join(images: list[Tensor]) -> Tensor:
        whole = pixels.clone()
        for i, image in enumerate(images):
            whole[i, :, : image.shape[-2], : image.shape[-1]] = image
        return whole

    images = [image[:, :height, :width] for image, (height, width) in zip(pixels, sizes, strict=True)]
    return _ragged(images, join, counts, rows)


def _patches(tower: nn.Module, pixels: Tensor, grids: list[tuple[int, ...]], counts: tuple[int, ...]) -> Layout:
    embed: Any = tower.patch_embed
    side, frames, channels = embed.patch_size, embed.temporal_patch_size, embed.in_channels
    merge: Any = tower.spatial_merge_size
    rows = tuple(t * h * w for t, h, w in grids)

    def shape(grid: tuple[int, ...]) -> list[int]:
        t, h, w = grid
        return [t, h // merge, w // merge, merge, merge, channels, frames, side, side]

    # Of one patch after the other, those merged later side by side; of one image row after the other.
    to_image, to_patches = (0, 6, 5, 1, 3, 7, 2, 4, 8), (0, 3, 6, 4, 7, 2, 1, 5, 8)
    images = [
        part.view(shape(grid)).permute(to_image).reshape(-1, grid[1] * side, grid[2] * side)
        for part, grid in zip(pixels.split(rows), grids, strict=True)
    ]

    def join(images: list[Tensor]) -> Tensor:
        parts = []
        for image, grid in zip(images, grids, strict=True):
            sizes = shape(grid)
            parts.append(image.reshape([sizes[i] for i in to_image]).permute(to_patches).reshape(-1, pixels.shape[-1]))
        return torch.cat(parts)

    return _ragged(images, join, counts, rows)
