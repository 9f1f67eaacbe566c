"""The step on every model family, beside plain PyTorch written for this test, and the table in docs/models.md.

The reference filters the pixels before the model sees them and adds LoRA by hooks, with one set of values for all
samples of the batch: it needs to know nothing of tiles, packed rows or whose they are. A tuned batch must come to the
same outputs, and its samples' gradients to the same sums; sample 0's are those of a batch without the others.
"""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from families import FAMILIES
from helpers import assert_unchanged, fingerprint, waits
from vqfast import TestTimeTuner, TuningConfig
from vqfast.integrations.transformers import KNOWN_NORMALISATION
from vqfast.tuning import step
from vqfast.tuning.inputs import checked
from vqfast.tuning.state import EpisodeState

TAPS, BLOCKS = 7, 2
CONFIG = TuningConfig(taps=TAPS, lora_blocks=BLOCKS, lora_rank=4, guard=False)
ROWS = {}  # of the table, by family, of those whose step was compared in this run
TABLE = Path(__file__).parents[2] / "docs" / "models.md"
CONTRASTIVE = ("CLIP", "SigLIP")
NORMALISATION = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5,) * 3, (0.5,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# Where it is not known without a processor; elsewhere the tuner must find it.
GIVEN = {"Qwen3-VL": "half", "InternVL": "imagenet", "Janus": "clip", "Mllama": "clip"}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    model = family.build()
    if family.name not in CONTRASTIVE:
        model.generation_config.max_new_tokens = 3
        model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def normalisation(family):
    return NORMALISATION[GIVEN[family.name]] if family.name in GIVEN else None


def start_values(model, normalisation):
    """Values of all parameters for one sample: a filter at work and a LoRA whose B is not zero."""
    with TestTimeTuner(model, CONFIG, normalisation=normalisation) as tuner:
        state = tuner._new_state(tuner._subject, 1)
        values = {name: value[0].clone() for name, value in state.snapshot().items()}
    generator = torch.Generator().manual_seed(1)
    for name, value in values.items():
        if name.endswith("lora_b"):
            value.normal_(std=0.1, generator=generator)
    values["filter.mix"].fill_(0.4)
    values["filter.log_sigma"].fill_(0.1)
    return values


def gradients(model, inputs, normalisation, values):
    """Result of one step begun from `values`, and the gradient of every parameter, [B, ...] each."""
    found = {}
    original = EpisodeState.step

    def spy(state, grads):
        found.update({n: g.clone() for (n, _), g in zip(state.trained(), grads, strict=True)})
        original(state, grads)

    spying = mock.patch.object(EpisodeState, "step", spy)
    with spying, TestTimeTuner(model, CONFIG, normalisation=normalisation, begin_from=values) as tuner:
        result = tuner.tune(**inputs)
    return result, found


def blurred(image, mix, log_sigma):
    """x + mix (G * x - x) of raw pixels [..., H, W]; reflected borders."""
    t = torch.arange(TAPS) - TAPS // 2
    taps = torch.softmax(-(t**2) / (2 * torch.exp(2 * log_sigma)), 0)
    flat = image.reshape(-1, 1, *image.shape[-2:])
    wide = F.pad(flat, (TAPS // 2,) * 4, mode="reflect")
    smooth = F.conv2d(F.conv2d(wide, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1)).view(image.shape)
    return image + mix * (smooth - image)


def filtered_pixels(inputs, tower, normalisation, mix, log_sigma):
    """`pixel_values` of the filtered images, as the family lays them out."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation)
    pixels = inputs["pixel_values"]

    def through(image):  # normalised, [..., 3, H, W]
        return (blurred(image * std + mean, mix, log_sigma) - mean) / std

    if "image_grid_thw" in inputs:
        side, merge, rows, done = 8, tower.spatial_merge_size, [], 0
        for frames, high, wide in inputs["image_grid_thw"].tolist():
            assert frames == 1
            # Patches come merged block by merged block, inside it row by row.
            places = [
                (y + dy, x + dx)
                for y in range(0, high, merge)
                for x in range(0, wide, merge)
                for dy in range(merge)
                for dx in range(merge)
            ]
            patches = pixels[done : done + len(places)].view(-1, 3, 2, side, side)
            done += len(places)
            films = []
            for film in range(2):
                image = torch.zeros(3, high * side, wide * side)
                for patch, (y, x) in zip(patches, places, strict=True):
                    image[:, y * side : (y + 1) * side, x * side : (x + 1) * side] = patch[:, film]
                films.append(through(image))
            rows += [
                torch.stack([i[:, y * side : (y + 1) * side, x * side : (x + 1) * side] for i in films], 1).flatten()
                for y, x in places
            ]
        return torch.stack(rows)
    if "image_sizes" in inputs and pixels.dim() == 4:
        sizes = inputs["image_sizes"].tolist()
    elif "pixel_attention_mask" in inputs and pixels.shape[1] == 1:
        mask = inputs["pixel_attention_mask"][:, 0]
        sizes = [(int(m.any(1).sum()), int(m.any(0).sum())) for m in mask]
    else:
        there = (pixels != 0).flatten(-3).any(-1)[..., None, None, None]  # padding tiles stay zero
        return torch.where(there, through(pixels), pixels)
    padded = []
    for image, (high, wide) in zip(pixels.reshape(-1, *pixels.shape[-3:]), sizes, strict=True):
        inner = through(image[:, :high, :wide])
        padded.append(F.pad(inner, (0, image.shape[2] - wide, 0, image.shape[1] - high)))
    return torch.stack(padded).view(pixels.shape)


def reference(model, inputs, normalisation, values):
    """Entropies and logits [B, V], and gradients of the summed entropy by `values`, shared by all samples."""
    values = {name: value.clone().requires_grad_() for name, value in values.items()}
    modules, handles = dict(model.named_modules()), []
    scaling = CONFIG.lora_alpha / CONFIG.lora_rank
    for path in {name.rpartition(".")[0] for name in values if ".lora_" in name}:
        a, b = values[f"{path}.lora_a"], values[f"{path}.lora_b"]

        def add(layer, args, output, a=a, b=b):
            if len(b) == layer.out_features:
                return output + scaling * (args[0] @ a.T) @ b.T
            query, key, value = output.chunk(3, -1)  # adapters of query and value, one after the other
            (a_q, a_v), (b_q, b_v) = a.chunk(2), b.chunk(2)
            query, value = (y + scaling * (args[0] @ m.T) @ n.T for y, m, n in ((query, a_q, b_q), (value, a_v, b_v)))
            return torch.cat([query, key, value], -1)

        handles.append(modules[path].register_forward_hook(add))
    with TestTimeTuner(model, CONFIG, normalisation=normalisation) as tuner:
        tower = tuner._subject.tower
    pixels = filtered_pixels(
        inputs, tower.module, (tower.mean, tower.std), values["filter.mix"], values["filter.log_sigma"]
    )
    try:
        output = model(**{**inputs, "pixel_values": pixels})
    finally:
        for handle in handles:
            handle.remove()
    logits = output.logits_per_image if hasattr(output, "logits_per_image") else output.logits[:, -1]
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    trained = {name: value for name, value in values.items() if name not in ("filter.gain", "filter.bias")}
    return entropy, logits, dict(zip(trained, torch.autograd.grad(entropy.sum(), trained.values()), strict=True))


def test_step_is_that_of_plain_pytorch(family, model, normalisation):
    inputs, values = family.inputs(2), start_values(model, normalisation)
    result, found = gradients(model, inputs, normalisation, values)
    entropy, _, expected = reference(model, inputs, normalisation, values)
    before = torch.tensor([sample.entropy_before for sample in result.samples])
    torch.testing.assert_close(before, entropy.detach(), rtol=1e-4, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 1e-6, f"{name}: nothing to compare"
        torch.testing.assert_close(
            found[name].sum(0), gradient, rtol=1e-3, atol=2e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    alone, own = gradients(model, family.inputs(1), normalisation, values)
    for name, gradient in own.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name][:1], gradient, rtol=1e-3, atol=2e-4 * scale)
    torch.testing.assert_close(result.logits[:1], alone.logits, rtol=1e-3, atol=1e-3)
    # The answer behind the step is that of its parameters.
    tuned = {name: value[0] for name, value in alone.parameters.items()}
    _, logits, _ = reference(model, family.inputs(1), normalisation, tuned)
    torch.testing.assert_close(alone.logits, logits.detach(), rtol=1e-3, atol=1e-3)
    ROWS[family.name] = row(family, model, normalisation, len(expected))


def row(family, model, normalisation, compared):
    with TestTimeTuner(model, CONFIG, normalisation=normalisation) as tuner:
        subject = tuner._subject
        tower, linears = subject.tower, {path.rpartition(".")[2] for path in tuner.layers}
        trained = sum(value.numel() for _, value in tuner._new_state(subject, 1).trained())
        alone, both = (step.prepare(subject, *checked(subject, family.inputs(n))) for n in (1, 2))
        waiting = waits(tuner, family.inputs(1)) if alone.fixed else {}
    graph = "no: its input is laid out by values"
    if alone.fixed:
        words = {"lift_fresh": "copies Python values to the device"}
        doing = ", ".join(words.get(name, f"waits for {name}") for name in sorted(waiting))
        graph = f"no: {doing}" if waiting else "yes"
        graph += "" if both.fixed or waiting else ", one tile per sample"
    cells = [
        family.name,
        f"`{type(model).__name__}`",
        f"`{tower.path}`",
        list(family.inputs(2)["pixel_values"].shape),
        f"{len(tuner.layers)}: {', '.join(sorted(linears))}",
        trained,
        compared,
        graph,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def test_every_trained_tensor_is_reached_and_close_leaves_nothing(family, model, normalisation):
    inputs = family.inputs(2)
    call = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        plain = model(**call)[0]
    before = fingerprint(model)
    seen = []
    original = EpisodeState.step

    def spy(state, grads):
        seen.append({n: g.view(len(g), -1).abs().amax(1) for (n, _), g in zip(state.trained(), grads, strict=True)})
        original(state, grads)

    config = TuningConfig(taps=TAPS, lora_blocks=BLOCKS, lr_filter=0.05, steps=2, guard=False)
    with (
        mock.patch.object(EpisodeState, "step", spy),
        TestTimeTuner(model, config, normalisation=normalisation) as tuner,
    ):
        result = tuner.tune(**inputs)
        begun = tuner._new_state(tuner._subject, 2).snapshot()
        with tuner.applied(result), torch.no_grad():
            assert not torch.equal(model(**call)[0], plain)
    assert all(bool((reached > 0).all()) for reached in seen[1].values()), seen[1]
    changed = {name for name, value in result.parameters.items() if not torch.equal(value, begun[name])}
    assert changed == seen[1].keys()
    assert_unchanged(model, before)
    with torch.no_grad():
        assert torch.equal(model(**call)[0], plain)


def test_generation_is_that_of_the_tuned_model(family, model, normalisation):
    if family.name in CONTRASTIVE:
        with TestTimeTuner(model, CONFIG) as tuner, pytest.raises(TypeError, match="writes no answer"):
            tuner.generate(**family.inputs(2))
        return
    inputs = {name: value for name, value in family.inputs(2).items() if name != "labels"}
    for config in (CONFIG, TuningConfig(taps=TAPS, answer_tokens=3)):
        with TestTimeTuner(model, config, normalisation=normalisation) as tuner:
            result = tuner.tune(**inputs)
            with tuner.applied(result), torch.no_grad():
                expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            assert torch.equal(tuner.generate(**inputs, max_new_tokens=3), expected)


def test_positions_of_an_answer_see_what_generation_saw(family, model, normalisation):
    """Entropies over three answer positions are those of the logits that generate itself computes."""
    if family.name in CONTRASTIVE:
        return
    inputs = {name: value for name, value in family.inputs(2).items() if name != "labels"}
    with TestTimeTuner(model, TuningConfig(taps=TAPS, answer_tokens=3), normalisation=normalisation) as tuner:
        result = tuner.tune(**inputs)
    with torch.no_grad():
        options = dict(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
        logits = torch.stack(model.generate(**inputs, **options).logits, 1)
    log_p = logits.log_softmax(-1)
    expected = -(log_p.exp() * log_p).sum(-1).mean(1)
    before = torch.tensor([sample.entropy_before for sample in result.samples])
    torch.testing.assert_close(before, expected, rtol=1e-3, atol=1e-4)


def test_search_takes_each_sample_by_itself(family, model, normalisation):
    config = TuningConfig(taps=TAPS, candidates="default", guard=False)
    with TestTimeTuner(model, config, normalisation=normalisation) as tuner:
        both, alone = tuner.tune(**family.inputs(2)), tuner.tune(**family.inputs(1))
    assert both.evaluations == alone.evaluations == 9
    one, other = both.samples[0], alone.samples[0]
    assert one.preset == other.preset
    assert one.entropy_start == pytest.approx(other.entropy_start, rel=1e-3)
    for name, value in one.filter.items():
        assert value == pytest.approx(other.filter[name], abs=0.35 * 0.3 if name in ("mix", "sigma") else 1e-4), name


def test_known_normalisation_is_that_of_the_families(family, model):
    """Found without a processor where it can be; else the error says what to pass."""
    if family.name not in GIVEN:
        with TestTimeTuner(model) as tuner:
            tower = tuner._subject.tower
        assert (tower.mean, tower.std) in KNOWN_NORMALISATION.values()
        return
    with pytest.raises(ValueError, match=r"pixel normalisation of .* is not known.*Pass normalisation=processor"):
        TestTimeTuner(model)


INTRODUCTION = """# Models

`TestTimeTuner(model)` finds the vision tower of these by the names of its modules. The table is written by tests, on a
tiny model of each class with random weights, a filter of 7 taps and LoRA of rank 4 on two blocks. Outputs and every
gradient are compared with plain PyTorch in float32, for two samples at once, of different sizes or numbers of tiles.

"""
HEADER = (
    "family",
    "class",
    "vision tower",
    "pixels of two samples",
    "layers patched",
    "parameters per sample",
    "gradients compared",
    "CUDA graph",
)


def test_table():
    """docs/models.md is what this run found; VQFAST_WRITE_DOCS=1 writes it."""
    if len(ROWS) < len(FAMILIES):
        pytest.skip(f"compared {len(ROWS)} of {len(FAMILIES)} families in this run")
    _, after = TABLE.read_text().split("<!-- families: end -->") if TABLE.exists() else ("", "\n")
    table = "\n".join(ROWS[family.name] for family in FAMILIES)
    header = f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}\n"
    text = f"{INTRODUCTION}<!-- families: begin -->\n{header}{table}\n<!-- families: end -->{after}"
    if os.environ.get("VQFAST_WRITE_DOCS"):
        TABLE.write_text(text)
    assert TABLE.read_text() == text, "run VQFAST_WRITE_DOCS=1 pytest tests/models"
