"""A small model with the layout of CogVLM, whose own code is not in transformers: `images` in place of pixel_values, a
vision tower with a fused query_key_value and patch_embedding.proj, image tokens in place of the prompt's first ones."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, HEADS, PATCH, SIDE, WORDS = 32, 4, 8, 32, 64


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.dense = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        qkv = self.query_key_value(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.dense(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, HIDDEN))

    def forward(self, x):
        x = x + self.attention(self.input_layernorm(x))
        return x + self.mlp(x)


class PatchEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, HIDDEN, PATCH, stride=PATCH)
        self.position_embedding = nn.Embedding((SIDE // PATCH) ** 2, HIDDEN)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2) + self.position_embedding.weight


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embedding = PatchEmbedding()
        self.transformer = Transformer()

    def forward(self, images):
        return self.transformer(self.patch_embedding(images))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, HIDDEN)
        self.vision = Vision()


class SmallCogVLM(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Body()
        self.mix = Block()
        self.lm_head = nn.Linear(HIDDEN, WORDS, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        self.eval()

    def forward(self, input_ids, images, attention_mask=None, use_cache=None, return_dict=True):
        """images [B, 3, H, W]."""
        seen = torch.cat([self.model.vision(images), self.model.embed_tokens(input_ids)], 1)
        return SimpleNamespace(logits=4 * self.lm_head(self.mix(seen)[:, -input_ids.shape[1] :]))
