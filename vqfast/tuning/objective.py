"""What a step minimises."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast import ops

VIEW_AREA = (0.5, 1.0)  # of the image; smaller crops lose what a question asks about
VIEW_SEED = 0  # one fixed draw: a result does not depend on what was tuned before


def answer_entropy(logits: Tensor, valid: Tensor) -> Tensor:
    """Entropy of the answer-token distributions, averaged over the valid positions of each sample, in nats.

    Args:
        logits: [B, n, V] at the answer positions. valid: [B, n], bool; at least one per sample.

    Returns:
        [B], float32.

    Source: VQ-TTT, arXiv 2506.15645.
    """
    return over_positions(ops.softmax_entropy(logits), valid)


def over_positions(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of `values` [..., B, n] over the valid positions: [..., B]. An answer's first position is always valid."""
    if values.shape[-1] == 1:
        return values[..., 0]
    return values.masked_fill(~valid, 0).sum(-1) / valid.sum(-1)


def marginal_entropy(logits: Tensor, valid: Tensor, views: int, confident_fraction: float) -> Tensor:
    """Entropy of the mean distribution over a sample's most confident views, in nats.

        H(mean_v p_v) over the ceil(confident_fraction V) views of lowest entropy

    Args:
        logits: [B V, n, K] at the answer positions, sample by sample. valid: [B V, n], bool.
        views: V. confident_fraction: above 0, at most 1.

    Returns:
        [B], float32.

    Source: TPT, arXiv 2209.07511.
    """
    log_p = logits.float().log_softmax(-1).unflatten(0, (-1, views))  # [B, V, n, K]
    valid = valid.unflatten(0, (-1, views))
    entropy = over_positions(-(log_p.exp() * log_p).sum(-1), valid).detach()  # [B, V]
    confident = entropy.topk(math.ceil(confident_fraction * views), 1, largest=False).indices
    chosen = log_p.gather(1, confident[..., None, None].expand(-1, -1, *log_p.shape[2:]))
    mean = chosen.logsumexp(1) - math.log(chosen.shape[1])  # [B, n, K], of the logarithm
    return over_positions(-(mean.exp() * mean).sum(-1), valid[:, 0])


def views_of(pixels: Tensor, count: int) -> Tensor:
    """`count` views of each image [B, C, H, W]: [B count, C, H, W], image by image; the first is the image itself.

    The others are random crops of half to all of its area, in its own proportions, resized to its size.
    """
    images = pixels.float().repeat_interleave(count, 0)
    crops = _crops(count, pixels.device).repeat(len(pixels), 1, 1)
    grid = F.affine_grid(crops, list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, padding_mode="border", align_corners=False).to(pixels.dtype)
    views[::count] = pixels
    return views


@functools.cache
def _crops(count: int, device: torch.device) -> Tensor:
    """Affine maps to `count` crops, [count, 2, 3]. Kept: a CUDA graph may not copy them from the host."""
    draw = torch.rand(count, 3, generator=torch.Generator().manual_seed(VIEW_SEED))
    side = (VIEW_AREA[0] + (VIEW_AREA[1] - VIEW_AREA[0]) * draw[:, 0]).sqrt()
    crops = torch.zeros(count, 2, 3)
    crops[:, 0, 0] = crops[:, 1, 1] = side
    crops[:, :, 2] = (2 * draw[:, 1:] - 1) * (1 - side[:, None])  # centre
    return crops.to(device)
