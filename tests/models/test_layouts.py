"""The filter acts on the images, however the processor has laid them out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from families import FAMILIES
from test_models import blurred
from vqfast import Preset, TestTimeTuner, TuningConfig
from vqfast.integrations.layouts import layout_of, stacked
from vqfast.nn import GaussianFilter
from vqfast.tuning.candidates import apply_presets

QWEN = next(family for family in FAMILIES if family.name == "Qwen2-VL")


@pytest.fixture(scope="module")
def tower():
    return QWEN.build().model.visual


def patches(images):
    """What Qwen's processor makes of raw images [3, H, W]."""
    processor = Qwen2VLImageProcessorPil(do_resize=False, do_rescale=False, patch_size=8)
    arrays = [image.numpy().astype(np.float32) for image in images]
    return processor(images=arrays, input_data_format="channels_first", return_tensors="pt")


def test_filtered_patches_are_the_patches_of_the_filtered_image(tower):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 32, 48, generator=generator), torch.rand(3, 48, 64, generator=generator)]
    plain = patches(images)
    mix, log_sigma = torch.tensor([0.4, -0.3]), torch.tensor([0.1, 0.5])
    expected = patches([blurred(*each) for each in zip(images, mix, log_sigma, strict=True)])["pixel_values"]
    config = TuningConfig(taps=7, lora_blocks=0)
    with TestTimeTuner(QWEN.build(), config) as tuner:
        state = tuner._new_state(tuner._subject, 2)
        assert isinstance(state.filter, GaussianFilter)
        state.filter.mix.data.copy_(mix)
        state.filter.log_sigma.data.copy_(log_sigma)
        arguments = {"grid_thw": plain["image_grid_thw"]}
        found = state.filtered(layout_of(tower, plain["pixel_values"], arguments, (1, 1)), plain["pixel_values"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [(2,), (1, 1), (2, 1)])
def test_patches_go_apart_and_together_bit_for_bit(tower, counts):
    grids = torch.tensor([[1, 4, 6], [1, 4, 6], [2, 2, 4]])[: sum(counts)]
    pixels = torch.randn(int(grids.prod(-1).sum()), 3 * 2 * 8 * 8)
    layout = layout_of(tower, pixels, {"grid_thw": grids}, counts)
    assert torch.equal(layout.restore([group.images for group in layout.groups]), pixels)
    assert layout.row_offsets(len(pixels), pixels.device).tolist() == [
        int(grids.prod(-1)[: sum(counts[:i])].sum()) for i in range(len(counts) + 1)
    ]


def test_another_number_of_images_is_an_error(tower):
    with pytest.raises(ValueError, match=r"got 3 images for 2 tuned samples of \[3, 1\]"):
        stacked(torch.zeros(3, 3, 8, 8), (3, 1))
    layout = stacked(torch.zeros(4, 3, 8, 8), (3, 1))
    with pytest.raises(ValueError, match=r"has 7 rows for images of 4 patches"):
        layout.row_offsets(7, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Qwen2-VL", lambda i: i.update(pixel_values=i["pixel_values"][:-1]), r"\[71, 384\] for \[\[1, 4, 6\]"),
        ("Qwen2-VL", lambda i: i.update(input_ids=i["input_ids"].flip(0)), r"image tokens \[12, 6\] cannot be shared"),
        ("InternVL", lambda i: i.update(pixel_values=i["pixel_values"][:3]), "cannot be shared out among 3 images"),
        (
            "LLaVA-NeXT",
            lambda i: i.update(image_sizes=i["image_sizes"][:1]),
            "image_sizes must have a row per sample, 2",
        ),
        ("Idefics 3", lambda i: i.update(pixel_values=i["pixel_values"][:1]), "must have a row per sample, 2"),
        ("Idefics 3", lambda i: i["pixel_values"][1].zero_(), "sample 1 has no image"),
        ("LLaVA-1.5", lambda i: i["input_ids"][1].clamp_(min=20), "one image each must have as many image tokens"),
        ("Qwen2-VL", lambda i: i.pop("image_grid_thw"), "image_grid_thw is missing"),
        ("Qwen2-VL", lambda i: i["image_grid_thw"][:, 0].mul_(2), "1 frame, height and width in multiples of 2"),
        ("Qwen2-VL", lambda i: i["image_grid_thw"][:, 1:].sub_(1), "1 frame, height and width in multiples of 2"),
        ("Qwen2-VL", lambda i: i.update(position_ids=torch.zeros(3, 2, 18).long()), r"position_ids must be \[B, L\]"),
        ("Qwen2-VL", lambda i: i.update(pixel_values_videos=i["pixel_values"]), "tune takes no pixel_values_videos"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, change, message):
    family = next(f for f in FAMILIES if f.name == name)
    inputs = dict(family.inputs(2))
    change(inputs)
    half = ((0.5,) * 3, (0.5,) * 3)
    with TestTimeTuner(family.build(), normalisation=half) as tuner, pytest.raises(ValueError, match=message):
        tuner.tune(**inputs)


def test_several_images_of_a_sample_share_its_filter():
    """LLaVA with two images per prompt: the prompts' image tokens say whose they are."""
    family = FAMILIES[0]
    one = family.inputs(2)
    ids = torch.cat([one["input_ids"], one["input_ids"]], 1)
    ids = ids[:, (ids[0] >= 0).nonzero()[:, 0]]
    inputs = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=one["pixel_values"].repeat(2, 1, 1, 1)
    )
    with TestTimeTuner(family.build(), TuningConfig(guard=False)) as tuner:
        result = tuner.tune(**inputs)
        assert result.images == (2, 2)
        assert len(result) == 2


def test_padding_tiles_stay_zero():
    pixels = torch.rand(2, 1, 3, 3, 8, 8)
    real = torch.tensor([[[1, 1, 0]], [[1, 0, 0]]])
    pixels[real == 0] = 0
    layout = stacked(pixels, (1, 1), real)
    changed = layout.restore([group.images + 1 for group in layout.groups])
    assert torch.equal(changed, torch.where(real[..., None, None, None] == 0, pixels, pixels + 1))


@pytest.mark.parametrize("counts", [(1, 1), (2, 1)])
def test_a_preset_stretches_each_sample_by_its_own_images(tower, counts):
    """Of different sizes, so that every image is a group of its own."""
    grids = torch.tensor([[1, 4, 6], [1, 2, 4], [1, 6, 8]])[: sum(counts)]
    rows = grids.prod(-1).tolist()
    pixels = torch.cat([torch.randn(n, 384) * (i + 1) for i, n in enumerate(rows)])
    presets = (Preset("stretch", stretch=True), Preset("blur, stretch", 1.0, 0.5, stretch=True))

    def applied(chosen, first, last, counts):
        part = pixels.split(rows)[first:last]
        arguments = {"grid_thw": grids[first:last]}
        layout = layout_of(tower, torch.cat(part), arguments, counts)
        return apply_presets(chosen, layout, torch.cat(part), 7, *(torch.full((3,), 0.5),) * 2)

    both = applied(presets, 0, sum(counts), counts)
    parts = [applied(presets[:1], 0, counts[0], counts[:1]), applied(presets[1:], counts[0], sum(counts), counts[1:])]
    torch.testing.assert_close(both.pixels, torch.cat([part.pixels for part in parts]))
    torch.testing.assert_close(both.gain, torch.cat([part.gain for part in parts]))
    torch.testing.assert_close(both.bias, torch.cat([part.bias for part in parts]))
    assert both.gain[0] != both.gain[1]


def test_image_sizes_may_be_a_list():
    family = next(f for f in FAMILIES if f.name == "Mistral 3")
    inputs = family.inputs(2)
    with TestTimeTuner(family.build(), TuningConfig(guard=False)) as tuner:
        expected = tuner.tune(**inputs)
        listed = tuner.tune(**{**inputs, "image_sizes": inputs["image_sizes"].tolist()})
    assert torch.equal(listed.logits, expected.logits)


def test_idefics_keeps_padding_images():
    """Two images and one, and as many for every sample."""
    family = next(f for f in FAMILIES if f.name == "Idefics 1")
    inputs = family.inputs(2)
    pixels = torch.cat([inputs["pixel_values"], inputs["pixel_values"]], 1)
    pixels[1, 1] = 0
    mask = torch.cat([inputs["image_attention_mask"], torch.zeros_like(inputs["image_attention_mask"])], -1)
    with TestTimeTuner(family.build(), TuningConfig(guard=False)) as tuner:
        result = tuner.tune(**{**inputs, "pixel_values": pixels, "image_attention_mask": mask})
        expected = tuner.tune(**inputs)
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-3, atol=1e-3)


def test_a_stretch_leaves_out_what_pads_a_tile():
    """A picture between 0.4 and 0.6 in a black letterbox, and a tile of nothing."""
    half = torch.full((3,), 0.5)
    picture = 0.4 + 0.2 * torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(0))
    tiles = torch.zeros(1, 2, 3, 32, 32)
    tiles[0, 0, :, 8:24] = picture
    normalised = (tiles - 0.5) / 0.5
    normalised[0, 1] = 0
    preset = (Preset("stretch", stretch=True),)
    found = apply_presets(preset, stacked(normalised, (2,)), normalised, 7, half, half)
    assert found.gain.item() == pytest.approx(1 / (0.96 * 0.2), rel=0.03)
    assert found.bias.item() == pytest.approx(-0.404 * found.gain.item(), rel=0.03)


def test_shortcuts_stay_out_of_a_connector_that_is_deeper_than_the_language_model():
    family = next(f for f in FAMILIES if f.name == "Idefics 2")
    model = family.build()
    config = model.config
    config.perceiver_config.resampler_depth = 3
    model = type(model)(config).eval()
    inputs = family.inputs(2)
    with torch.no_grad():
        log_p = model(**inputs).logits[:, -1].log_softmax(-1)
    with TestTimeTuner(model) as tuner:
        before = [sample.entropy_before for sample in tuner.tune(**inputs).samples]
        assert all("text_model" in dict_of(model)[m] for m in tuner._subject.shortcuts.last_rows)
    torch.testing.assert_close(torch.tensor(before), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-6)


def dict_of(model):
    return {module: path for path, module in model.named_modules()}


@pytest.mark.parametrize("options", [{"candidates": "default"}, {"answer_tokens": 3}])
def test_values_that_are_begun_from_hold_for_search_and_answer(options):
    """LoRA of an earlier result: the untuned answer is the one with it, in a search and over several tokens, too."""
    family = FAMILIES[0]
    model, inputs = family.build(), family.inputs(2)
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)
    with TestTimeTuner(model, TuningConfig(**options)) as tuner:
        shapes = tuner._new_state(tuner._subject, 1).shapes()
        values = {n: 0.3 * torch.randn(s[1:], generator=generator) for n, s in shapes.items() if "lora" in n}
        plain = [sample.entropy_before for sample in tuner.tune(**inputs).samples]
    with TestTimeTuner(model, TuningConfig(**options), begin_from=values) as tuner:
        result = tuner.tune(**inputs)
        begun = tuner._new_state(tuner._subject, 2).snapshot()
        with tuner.applied(replace(result, parameters=begun)), torch.no_grad():
            options = dict(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
            logits = torch.stack(model.generate(**inputs, **options).logits, 1)[:, : tuner.config.answer_tokens]
    log_p = logits.log_softmax(-1)
    before = torch.tensor([sample.entropy_before for sample in result.samples])
    torch.testing.assert_close(before, -(log_p.exp() * log_p).sum(-1).mean(1), rtol=1e-4, atol=1e-5)
    assert (before - torch.tensor(plain)).abs().min() > 1e-3
    if result.evaluations:
        with pytest.raises(ValueError, match=r"filter\.mix is set by the search"):
            TestTimeTuner(model, TuningConfig(candidates="default"), begin_from={"filter.mix": torch.tensor(0.5)})
