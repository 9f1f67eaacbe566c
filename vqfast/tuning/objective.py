"""What a step minimises."""

from __future__ import annotations

from torch import Tensor

from vqfast import ops


def answer_entropy(logits: Tensor, valid: Tensor) -> Tensor:
    """Entropy of the answer-token distributions, averaged over the valid positions of each sample, in nats.

    Args:
        logits: [B, n, V] at the answer positions. valid: [B, n], bool; at least one per sample.

    Returns:
        [B], float32.

    Source: VQ-TTT, arXiv 2506.15645.
    """
    entropy = ops.softmax_entropy(logits)
    return entropy.masked_fill(~valid, 0).sum(-1) / valid.sum(-1)
