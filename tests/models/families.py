"""A tiny model of every vision-language family, with random weights, and inputs as its processor gives them.

No files are read: a family is the class of transformers with a small config. Sample i depends on i alone, so that
inputs(1) is sample 0 of inputs(2) without the padding of the batch; even and odd samples differ in size or tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

PAD, BOS, EOS, IMAGE, START, END, BREAK, NEWLINE, GLOBAL, VIDEO = range(10)
ROW_COL = {(1, 1): 10, (1, 2): 11, (2, 1): 12, (2, 2): 13}  # "<row_1_col_1>", ...
WORDS = range(16, 128)  # ids of plain text

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean, std
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
)
TEXT = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]


def tiny(model_class, config):
    """Weights of unit gain and open gates: what transformers starts with hides the image from the answer."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config).float().eval()
        for name, parameter in model.named_parameters():
            if parameter.numel() == 1 or "lambda_" in name:  # gates, logit_scale; layer scales of InternVL
                parameter.fill_(0.5)
            elif parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


def pixels(seed, height, width, normalisation, tiles=1):
    """[tiles, 3, height, width], smooth, raw values in [0, 1] before the normalisation."""
    mean, std = torch.tensor(normalisation).view(2, 3, 1, 1)
    coarse = torch.rand(tiles, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True) - mean) / std


def prompt(blocks, before=(BOS, 20, 21), after=()):
    """input_ids and attention_mask, padded on the left: before, the block of the image, a question, after."""
    rows = [
        torch.tensor([*before, *block, *(WORDS[(11 * i + j) % len(WORDS)] for j in range(5 + 2 * (i % 2))), *after])
        for i, block in enumerate(blocks)
    ]
    return dict(
        input_ids=pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side="left"),
        attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"),
    )


def fixed(batch, normalisation, block, size=32, **text):
    """One image of one size per sample."""
    images = torch.cat([pixels(i, size, size, normalisation) for i in range(batch)])
    return dict(**prompt([block] * batch, **text), pixel_values=images)


def llava():
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-2,
    )
    return tiny(tf.LlavaForConditionalGeneration, config)


def vip_llava():
    config = tf.VipLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layers=[-2, -3, 3],
    )
    return tiny(tf.VipLlavaForConditionalGeneration, config)


def llava_next():
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=16,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    return tiny(tf.LlavaNextForConditionalGeneration, config)


def llava_onevision():
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64]],
    )
    return tiny(tf.LlavaOnevisionForConditionalGeneration, config)


def any_resolution(batch, normalisation):
    """Size of the image, tiles with the one of the whole image, patches without the padding of the tiles."""
    kinds = [((30, 64), 3, (4, 8)), ((40, 60), 5, (6, 8))]
    samples = [kinds[i % 2] for i in range(batch)]
    blocks = [[IMAGE] * (16 + rows * (columns + 1)) for _, _, (rows, columns) in samples]  # a newline after each row
    tiles = [pixels(i, 32, 32, normalisation, tiles) for i, (_, tiles, _) in enumerate(samples)]
    return dict(
        **prompt(blocks),
        pixel_values=pad_sequence(tiles, batch_first=True),
        image_sizes=torch.tensor([size for size, _, _ in samples]),
    )


def llava_onevision_inputs(batch):
    return dict(**any_resolution(batch, HALF), batch_num_images=torch.ones(batch, dtype=torch.long))


def idefics():
    config = tf.IdeficsConfig(
        **{key: value for key, value in TEXT.items() if key != "num_key_value_heads"},
        vision_config=dict(**{("embed_dim" if key == "hidden_size" else key): value for key, value in VISION.items()}),
        perceiver_config=dict(
            use_resampler=True,
            resampler_n_latents=4,
            resampler_depth=1,
            resampler_n_heads=2,
            resampler_head_dim=16,
            qk_layer_norms_perceiver=True,
        ),
        use_resampler=True,
        qk_layer_norms=True,
        cross_layer_interval=2,
    )
    return tiny(tf.IdeficsForVisionText2Text, config)


def idefics_inputs(batch):
    inputs = fixed(batch, CLIP, [START, IMAGE, START])
    seen = (inputs["input_ids"] == IMAGE).long().cumsum(1)  # from the image on
    return dict(inputs, pixel_values=inputs["pixel_values"][:, None], image_attention_mask=seen[..., None])


def idefics2():
    config = tf.Idefics2Config(
        vision_config=dict(VISION, image_size=64),
        perceiver_config=dict(
            hidden_size=32,
            resampler_n_latents=4,
            resampler_depth=1,
            resampler_n_heads=4,
            resampler_head_dim=8,
            num_key_value_heads=2,
        ),
        text_config=tf.MistralConfig(**TEXT),
        image_token_id=IMAGE,
    )
    return tiny(tf.Idefics2ForConditionalGeneration, config)


def padded(images):
    """Images [3, H, W] in the top left corner of the largest, and 1 where there is an image."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    canvas = torch.zeros(len(images), 3, height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.long)
    for i, image in enumerate(images):
        canvas[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = 1
    return canvas, mask


def idefics2_inputs(batch):
    sizes = [(40, 48), (48, 64)]
    images, mask = padded([pixels(i, *sizes[i % 2], HALF)[0] for i in range(batch)])
    text = prompt([[START, *[IMAGE] * 4, START]] * batch)
    return dict(**text, pixel_values=images[:, None], pixel_attention_mask=mask[:, None])


def idefics3(config_class, model_class):
    config = config_class(vision_config=VISION, text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE)
    return tiny(model_class, config)


def idefics3_inputs(batch):
    """Tiles of 1 x 2 or 2 x 2, then the whole image; each is 16 patches, 4 tokens."""
    grids = [(1 + i % 2, 2) for i in range(batch)]
    blocks = []
    for rows, columns in grids:
        block = []
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                block += [START, ROW_COL[row, column], *[IMAGE] * 4]
            block.append(NEWLINE)
        blocks.append([*block, NEWLINE, START, GLOBAL, *[IMAGE] * 4, START])
    tiles = [pixels(i, 32, 32, HALF, rows * columns + 1) for i, (rows, columns) in enumerate(grids)]
    mask = [torch.ones(len(tile), 32, 32, dtype=torch.long) for tile in tiles]
    return dict(
        **prompt(blocks),
        pixel_values=pad_sequence(tiles, batch_first=True),
        pixel_attention_mask=pad_sequence(mask, batch_first=True),
    )


def paligemma():
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.GemmaConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return tiny(tf.PaliGemmaForConditionalGeneration, config)


def paligemma_inputs(batch):
    """Without an answer to learn there are labels all the same, none of which count."""
    inputs = fixed(batch, HALF, [*[IMAGE] * 16, BOS], before=(), after=[NEWLINE])
    ids = inputs["input_ids"]
    return dict(inputs, token_type_ids=torch.zeros_like(ids), labels=torch.full_like(ids, -100))


def gemma3():
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**dict(VISION, image_size=64), vision_use_head=False),
        text_config=tf.Gemma3TextConfig(
            **dict(TEXT, num_hidden_layers=3),
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=12,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=16,
        boi_token_index=START,
        eoi_token_index=END,
        image_token_index=IMAGE,
    )
    return tiny(tf.Gemma3ForConditionalGeneration, config)


def gemma3_inputs(batch):
    inputs = fixed(batch, HALF, [NEWLINE, NEWLINE, START, *[IMAGE] * 16, END, NEWLINE, NEWLINE], size=64)
    return dict(inputs, token_type_ids=(inputs["input_ids"] == IMAGE).long())


QWEN_TEXT = dict(TEXT, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2]))
QWEN_VISION = dict(depth=3, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=8, out_hidden_size=32)
QWEN_TOKENS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)


def qwen2_vl():
    config = tf.Qwen2VLConfig(
        vision_config=dict(depth=3, embed_dim=32, hidden_size=32, num_heads=4, patch_size=8),
        text_config=QWEN_TEXT,
        **QWEN_TOKENS,
    )
    return tiny(tf.Qwen2VLForConditionalGeneration, config)


def qwen2_5_vl():
    config = tf.Qwen2_5_VLConfig(
        vision_config=dict(**QWEN_VISION, window_size=32, fullatt_block_indexes=[1]),
        text_config=QWEN_TEXT,
        **QWEN_TOKENS,
    )
    return tiny(tf.Qwen2_5_VLForConditionalGeneration, config)


def qwen3_vl():
    config = tf.Qwen3VLConfig(
        vision_config=dict(**QWEN_VISION, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        text_config=dict(QWEN_TEXT, head_dim=8),
        **QWEN_TOKENS,
    )
    return tiny(tf.Qwen3VLForConditionalGeneration, config)


def qwen_inputs(batch, normalisation):
    """Patches in the order of the merger: the four of a token one after the other; the frame twice."""
    grids = [((4, 6), (6, 8))[i % 2] for i in range(batch)]
    patches = []
    for i, (rows, columns) in enumerate(grids):
        image = pixels(i, 8 * rows, 8 * columns, normalisation)[0].view(3, rows // 2, 2, 8, columns // 2, 2, 8)
        frame = image.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, 3, 1, 8, 8)
        patches.append(frame.expand(-1, -1, 2, -1, -1).flatten(1))
    text = prompt([[START, *[IMAGE] * (rows * columns // 4), END] for rows, columns in grids])
    return dict(
        **text,
        mm_token_type_ids=(text["input_ids"] == IMAGE).long(),
        pixel_values=torch.cat(patches),
        image_grid_thw=torch.tensor([(1, *grid) for grid in grids]),
    )


def internvl():
    config = tf.InternVLConfig(
        vision_config=VISION, text_config=tf.Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=4
    )
    return tiny(tf.InternVLForConditionalGeneration, config)


def internvl_inputs(batch):
    """One tile, or two and the whole image."""
    tiles = [(1, 3)[i % 2] for i in range(batch)]
    return dict(
        **prompt([[START, *[IMAGE] * 4 * n, END] for n in tiles]),
        pixel_values=torch.cat([pixels(i, 32, 32, IMAGENET, n) for i, n in enumerate(tiles)]),
    )


def janus():
    config = tf.JanusConfig(
        vision_config=dict(VISION, projection_dim=32, num_image_tokens=16, mlp_ratio=2.0),
        vq_config=dict(
            embed_dim=8,
            num_embeddings=16,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            projection_dim=32,
            image_token_embed_dim=32,
        ),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
    )
    return tiny(tf.JanusForConditionalGeneration, config)


def mistral3():
    config = tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**dict(VISION, image_size=64)),
        text_config=tf.MistralConfig(**TEXT, head_dim=8, sliding_window=None),
        image_token_index=IMAGE,
    )
    return tiny(tf.Mistral3ForConditionalGeneration, config)


def mistral3_inputs(batch):
    sizes = [((32, 48), (48, 64))[i % 2] for i in range(batch)]
    blocks = []
    for height, width in sizes:
        block = [*[IMAGE] * (width // 16), BREAK] * (height // 16)
        blocks.append([*block[:-1], END])
    return dict(
        **prompt(blocks),
        pixel_values=padded([pixels(i, *size, CLIP)[0] for i, size in enumerate(sizes)])[0],
        image_sizes=torch.tensor(sizes),
    )


def mllama():
    config = tf.MllamaConfig(
        vision_config=dict(**VISION, num_global_layers=2, intermediate_layers_indices=[0, 2], vision_output_dim=96),
        text_config=dict(TEXT, num_hidden_layers=3, cross_attention_layers=[1]),
        image_token_index=IMAGE,
    )
    return tiny(tf.MllamaForConditionalGeneration, config)


def mllama_inputs(batch):
    """Two tiles side by side or four; always room for four."""
    tiles = [(2, 4)[i % 2] for i in range(batch)]
    text = prompt([[IMAGE, BOS]] * batch, before=())
    there = torch.tensor([[n > tile for tile in range(4)] for n in tiles]).long()
    seen = (text["input_ids"] == IMAGE).long().cumsum(1)  # from the image on
    images = torch.stack([F.pad(pixels(i, 32, 32, CLIP, n), (0,) * 7 + (4 - n,)) for i, n in enumerate(tiles)])
    return dict(
        **text,
        pixel_values=images[:, None],
        aspect_ratio_ids=torch.tensor([[{2: 2, 4: 6}[n]] for n in tiles]),  # 1 x 2, 2 x 2
        aspect_ratio_mask=there[:, None],
        cross_attention_mask=(seen[:, :, None] * there[:, None])[:, :, None],
    )


CONTRASTIVE_TEXT = {key: value for key, value in TEXT.items() if key not in {"num_key_value_heads"}}


def clip():
    config = tf.CLIPConfig(
        vision_config=dict(VISION, projection_dim=32),
        text_config=dict(CONTRASTIVE_TEXT, projection_dim=32, pad_token_id=127, bos_token_id=126, eos_token_id=127),
        projection_dim=32,
    )
    return tiny(tf.CLIPModel, config)


def clip_inputs(batch):
    """Five classes; the end of a text is also its padding."""
    rows = [torch.tensor([126, 20, *WORDS[7 * i : 7 * i + 1 + i % 3], 127]) for i in range(5)]
    return dict(
        input_ids=pad_sequence(rows, batch_first=True, padding_value=127),
        attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        pixel_values=torch.cat([pixels(i, 32, 32, CLIP) for i in range(batch)]),
    )


def siglip():
    text = dict(CONTRASTIVE_TEXT, max_position_embeddings=8, pad_token_id=1, eos_token_id=1)
    return tiny(tf.SiglipModel, tf.SiglipConfig(vision_config=VISION, text_config=text))


def siglip_inputs(batch):
    """Five classes, each padded to the longest text there can be; no attention_mask."""
    rows = [torch.tensor([20, *WORDS[7 * i : 7 * i + 1 + i % 3]]) for i in range(5)]
    return dict(
        input_ids=torch.stack([F.pad(row, (0, 8 - len(row)), value=1) for row in rows]),
        pixel_values=torch.cat([pixels(i, 32, 32, HALF) for i in range(batch)]),
    )


FAMILIES = (
    Family("LLaVA-1.5", llava, partial(fixed, normalisation=CLIP, block=[IMAGE] * 16)),
    Family("LLaVA-NeXT", llava_next, partial(any_resolution, normalisation=CLIP)),
    Family("LLaVA-OneVision", llava_onevision, llava_onevision_inputs),
    Family("VipLlava", vip_llava, partial(fixed, normalisation=CLIP, block=[IMAGE] * 16)),
    Family("Idefics 1", idefics, idefics_inputs),
    Family("Idefics 2", idefics2, idefics2_inputs),
    Family("Idefics 3", partial(idefics3, tf.Idefics3Config, tf.Idefics3ForConditionalGeneration), idefics3_inputs),
    Family("SmolVLM", partial(idefics3, tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration), idefics3_inputs),
    Family("PaliGemma", paligemma, paligemma_inputs),
    Family("Gemma 3", gemma3, gemma3_inputs),
    Family("Qwen2-VL", qwen2_vl, partial(qwen_inputs, normalisation=CLIP)),
    Family("Qwen2.5-VL", qwen2_5_vl, partial(qwen_inputs, normalisation=CLIP)),
    Family("Qwen3-VL", qwen3_vl, partial(qwen_inputs, normalisation=HALF)),
    Family("InternVL", internvl, internvl_inputs),
    Family("Janus", janus, partial(fixed, normalisation=HALF, block=[START, *[IMAGE] * 16, END])),
    Family("Mistral 3", mistral3, mistral3_inputs),
    Family("Mllama", mllama, mllama_inputs),
    Family("CLIP", clip, clip_inputs),
    Family("SigLIP", siglip, siglip_inputs),
)
