"""Processor of the digits model; imports ``transformers``."""

from __future__ import annotations

from typing import Any

from transformers import BatchFeature, LlavaProcessor

from vqfast.zoo import QUESTIONS


class DigitsProcessor(LlavaProcessor):
    """``LlavaProcessor`` that rejects words outside the vocabulary instead of encoding them as ``<unk>``."""

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        """As ``LlavaProcessor.__call__``; raises ``ValueError`` on a word outside the vocabulary."""
        for sentence in [text] if isinstance(text, str) else text or []:
            encoding = self.tokenizer(sentence, return_offsets_mapping=True)
            for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
                if token == self.tokenizer.unk_token_id:
                    raise ValueError(
                        f"the digits model does not know the word {sentence[start:end]!r}; it answers "
                        f"{', '.join(map(repr, QUESTIONS))}: ask one of these (vqfast.zoo.prompt makes the text)"
                    )
        inputs: BatchFeature = super().__call__(images=images, text=text, **kwargs)
        return inputs


DigitsProcessor.__name__ = LlavaProcessor.__name__  # the name save_pretrained writes: one that transformers can load
