"""Random configurations, inputs and operator arguments: a right answer or an error that names what is wrong."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from helpers import assert_unchanged, fingerprint, noisy
from vqfast import Preset, TestTimeTuner, TuningConfig, ops, zoo
from vqfast.testing.cases import all_operators
from vqfast.testing.here import on_cpu
from vqfast.testing.tolerances import BAND, assert_close_to_exact, error
from vqfast.tuning.state import EpisodeState

pytestmark = pytest.mark.usefixtures("one_openmp_thread")
PLAIN = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # nats: the same sums in another order, on logits up to about 10
# Of a tensor's largest: by so much gradients of two backends may differ, and signs of smaller ones. By dtype of the
# pixels, which a filter rounds its result to.
GRADIENT = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
AFTER = 5e-3  # nats between backends after steps that moved every parameter the same way
SOME_FLIPPED = 0.1  # nats, where LoRA parameters of tiny gradients moved opposite ways


def sure(output, valid):
    """Minus the probability of the most likely token, averaged over the valid positions."""
    likely = output.logits.float().softmax(-1).amax(-1)
    return -(likely.masked_fill(~valid, 0).sum(-1) / valid.sum(-1))


def one_number(output, valid):
    return output.logits.sum()


def nothing(output, valid):
    return None


PRESETS = st.lists(st.builds(Preset, st.just("own"), st.floats(0.3, 4), st.floats(-1, 1), st.booleans()), max_size=3)
TARGETS = [("q_proj", "v_proj"), ("k_proj",), ("out_proj", "fc1"), ("q_proj", "k_proj", "fc2")]
OPTIONS = {  # values that are accepted, and that are not
    "filter": (["gaussian", "lowrank", "lowrank", None], ["box"]),
    "taps": ([3, 5, 7, 9, 15, 31], [6, 33, 7.0]),
    "rank": ([1, 2, 3], [0, 9]),
    "lora_rank": ([1, 2, 3, 8, 17, 33, 64], [0, 65, True]),
    "lora_blocks": ([0, 1, 2, 3, 4], [5, -1]),
    "lora_targets": (TARGETS, [("query",), "q_proj", ()]),
    "steps": ([1, 1, 2], [0]),
    "objective": (["answer_entropy", "marginal_entropy", sure], ["loss", one_number, nothing]),
    "views": ([2, 3, 5], [1]),
    "confident_fraction": ([0.1, 0.5, 1.0, 1], [0.0, float("nan")]),
    "answer_tokens": ([1, 2, 3], [0]),
    "train_tone": ([False, True], ["yes"]),
    "candidates": ([None, "default", "own"], ["best"]),
    "max_candidates": ([None, 3, 5, 20], [1, 2.5]),
    "search_scope": (["sample", "stream"], ["all"]),
    "search_resolution": ([None, 8, 16, 32, 64], [10, 0, "half"]),
    "guard": ([True, False], [None]),
}
USUAL = {"views": 3}  # half of a step's time otherwise


@st.composite
def configurations(draw):
    """A few options; in one of four draws one of them is beyond its range. What only a search takes comes with one."""
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS)), unique=True, min_size=1, max_size=8))
    wrong = draw(st.sampled_from([None, None, None, draw(st.sampled_from(names))]))
    options = USUAL | {name: draw(st.sampled_from(OPTIONS[name][name == wrong])) for name in names}
    searched = {"max_candidates", "search_scope", "search_resolution"}.intersection(names)
    if searched and options.get("candidates") is None:
        options["candidates"] = "default"
    if options.get("candidates") == "own":
        options["candidates"] = draw(PRESETS)
    return options


@st.composite
def drawn_inputs(draw):
    return dict(
        rows=draw(st.lists(st.integers(0, 11), min_size=1, max_size=4)),
        noise=draw(st.floats(0, 2)),
        seed=draw(st.integers(0, 99)),
        padding=draw(st.sampled_from([0, 0, 1, 7, 40])),
        layout=draw(st.sampled_from(["contiguous", "channels last", "every second column", "expanded", "grey"])),
        precision=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
    )


@functools.cache  # no fixtures: hypothesis prints the arguments of a failure
def model_of(dtype):
    """The embedded model, used once: transformers adds its hooks then."""
    model, processor = zoo.load()
    model.to(dtype)(**noisy(processor, zoo.questions("validation")[:1]))
    return model


@functools.cache
def clean_inputs():
    processor, drawn = zoo.load()[1], zoo.questions("validation")[::7][:12]
    images, texts, _ = zip(*drawn, strict=True)
    return dict(processor(images=list(images), text=list(texts), return_tensors="pt", padding=True))


def inputs_of(rows, noise, seed, padding, layout, precision) -> dict:
    clean = clean_inputs()
    pixels = clean["pixel_values"][rows]
    pixels = pixels + noise * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    pixels = pixels.clamp(-1, 1).to(precision)
    if layout == "channels last":
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    elif layout == "every second column":
        pixels = pixels.repeat_interleave(2, -1)[..., ::2]
    elif layout == "expanded":
        pixels = pixels[:1].expand(len(rows), -1, -1, -1)
    elif layout == "grey":
        pixels = pixels[:, :1].expand(-1, 3, -1, -1)
    prompt = {
        name: torch.cat([torch.zeros(len(rows), padding, dtype=torch.long), clean[name][rows]], 1)
        for name in ("input_ids", "attention_mask")
    }
    return {**prompt, "pixel_values": pixels}


@torch.no_grad()
def plain_entropy(model, inputs, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean entropy over the greedy answer's first `tokens` positions, a forward for each; the smallest margin."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    alive, total, count = (torch.full((len(ids),), value, dtype=torch.float64) for value in (1, 0, 0))
    margin = torch.full_like(total, torch.inf)
    for position in range(tokens):
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[:, -1].double()
        total += alive * torch.distributions.Categorical(logits=logits).entropy()
        count += alive
        top = logits.topk(2)
        if position + 1 < tokens:
            margin = torch.where(alive > 0, margin.minimum(top.values[:, 0] - top.values[:, 1]), margin)
        token = top.indices[:, :1]
        alive = alive * (token[:, 0] != model.generation_config.eos_token_id)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return total / count, margin


def tune(model, config, inputs):
    """The result, and of every step the gradients it took and the parameters it came to."""
    recorded, step = [], EpisodeState.step

    def recording(state, gradients):
        step(state, gradients)
        named = zip(state.trained(), gradients, strict=True)
        recorded.append({name: (gradient.clone(), p.detach().clone()) for (name, p), gradient in named})

    before = fingerprint(model)
    try:
        with pytest.MonkeyPatch.context() as patch, TestTimeTuner(model, config) as tuner:
            patch.setattr(EpisodeState, "step", recording)
            return tuner.tune(**inputs), recorded
    finally:
        assert_unchanged(model, before)


def per_sample(tensor):
    return tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]


def moved_alike(ours, theirs, rates, tolerance) -> torch.Tensor:
    """Of each sample: 2 where all parameters moved alike, 1 where some of LoRA did not, 0 where one of the filter.

    Gradients of the first step must agree; those that move opposite ways must be tiny.
    """
    alike = torch.full((len(next(iter(ours[0].values()))[0]),), 2)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for name, (gradient, value) in mine.items():
            gradient, expected, value, wanted = map(per_sample, (gradient, other[name][0], value, other[name][1]))
            largest = expected.abs().amax(1, keepdim=True)
            flipped = (value - wanted).abs() > 0.1 * rates(name)
            if step == 0:
                allowed = tolerance * largest + 1e-5
                assert bool(((gradient - expected).abs() <= allowed).all()), f"gradient of {name}"
                assert bool((expected.abs() <= 2 * allowed)[flipped].all()), f"{name} moved another way"
            alike = torch.where(flipped.any(1), alike.clamp_max(1 if "lora" in name else 0), alike)
    return alike


@given(
    options=configurations(),
    drawn=drawn_inputs(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)
def test_a_right_answer_or_a_clear_error(options, drawn, dtype):
    model, inputs = model_of(dtype), inputs_of(**drawn)
    try:
        config = TuningConfig(**options)
        result, ours = tune(model, config, inputs)
    except (ValueError, TypeError) as refusal:
        named = [name for name in options if name in str(refusal)]
        assert named, f"names no argument: {refusal}"  # noqa: PT017
        event("refused")
        return
    event("tuned")
    assert (len(result), len(ours)) == (len(drawn["rows"]), config.steps)
    assert not any(s.failed for s in result.samples)
    expected, margin = plain_entropy(model, inputs, config.answer_tokens)
    for sample, entropy, sure_by in zip(result.samples, expected.tolist(), margin.tolist(), strict=True):
        if sure_by > PLAIN[dtype]:  # else the greedy answer may be another
            assert abs(sample.entropy_before - entropy) <= PLAIN[dtype]
        if config.guard and not callable(config.objective):
            assert sample.entropy_after <= sample.entropy_start
        if config.candidates is None:
            assert sample.entropy_start == sample.entropy_before
        if not config.guard:
            assert sample.tuned
        if not sample.tuned:
            assert sample.entropy_after == sample.entropy_start
    if dtype == torch.float32:
        compare_with_the_reference(model, config, inputs, result, ours)


def compare_with_the_reference(model, config, inputs, result, ours):
    expected, theirs = tune(model, replace(config, backend="reference"), inputs)
    if [s.preset for s in result.samples] != [s.preset for s in expected.samples]:
        event("another preset")
        return
    state_rate = lambda name: config.lr_lora if "lora" in name else 0.02 * config.filter_rate  # noqa: E731
    alike = moved_alike(ours, theirs, state_rate, GRADIENT[inputs["pixel_values"].dtype]).tolist()
    for ours_, theirs_, level in zip(result.samples, expected.samples, alike, strict=True):
        assert abs(ours_.entropy_before - theirs_.entropy_before) <= PLAIN[torch.float32]
        assert abs(ours_.entropy_start - theirs_.entropy_start) <= 10 * PLAIN[torch.float32]
        if callable(config.objective) and ours_.tuned != theirs_.tuned:
            level = 0
        event(("a filter's parameter moved another way", "some of LoRA moved another way", "moved alike")[level])
        if level:
            difference = abs(ours_.entropy_after - theirs_.entropy_after)
            assert difference <= (AFTER if level == 2 else SOME_FLIPPED)


def test_a_filter_refuses_images_without_channels():
    with pytest.raises(ValueError, match="image must have at least one channel"):
        ops.lowrank_filter2d(torch.ones(2, 0, 8, 8), torch.ones(1, 3), torch.ones(1, 3), 0.5)


def test_an_objective_without_a_gradient_is_named():
    with pytest.raises(ValueError, match="objective"):
        tune(model_of(torch.float32), TuningConfig(objective=lambda output, valid: sure(output, valid).detach()), one())


def test_pixels_in_float64_are_named():
    with pytest.raises(TypeError) as caught:
        tune(model_of(torch.float32), TuningConfig(), one(torch.float64))
    assert "pixel_values" in str(caught.value)


def one(precision=torch.float32):
    return inputs_of([0], noise=1.0, seed=0, padding=0, layout="contiguous", precision=precision)


SIZES = st.sampled_from([1, 2, 3, 5, 8, 17, 31, 33, 40, 64])


@st.composite
def filter_arguments(draw):
    batch, channels = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    taps, rank = draw(st.sampled_from([1, 3, 5, 7, 15, 31])), draw(st.integers(1, 8))
    own = (batch,) if draw(st.booleans()) else ()
    tone = {"scalar": (), "sample": (batch,), "channel": (batch, channels)}
    shapes = {
        "image": (batch, channels, draw(SIZES), draw(SIZES)),
        "taps_y": (*own, rank, taps),
        "taps_x": (*own, rank, taps),
        "mix": draw(st.sampled_from([(), (batch,)])),
    }
    shapes |= {name: tone[draw(st.sampled_from(sorted(tone)))] for name in ("gain", "bias") if draw(st.booleans())}
    return shapes, {"padding": draw(st.sampled_from(["reflect", "replicate", "zeros"]))}


@st.composite
def gain_arguments(draw):
    batch, height, width = draw(st.integers(0, 3)), draw(SIZES), draw(SIZES)
    own, rank = (batch,) if draw(st.booleans()) else (), draw(st.integers(1, 8))
    image = (batch, draw(st.integers(0, 3)), height, width)
    return {"image": image, "gain_y": (*own, rank, height), "gain_x": (*own, rank, width)}, {}


@st.composite
def lora_arguments(draw):
    inputs, outputs, rank = draw(SIZES), draw(SIZES), draw(st.integers(1, 64))
    kind = draw(st.sampled_from(["shared", "own", "packed"]))
    lead, own, others = (
        draw(st.lists(st.integers(0, 20), max_size=2)),
        (),
        {"scaling": draw(st.sampled_from([0.0, 1e-3, 0.5, 2.0, -3.0]))},
    )
    if kind != "shared":
        counts = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
        own, lead = (len(counts),), [len(counts), counts[0]]
        if kind == "packed":
            lead, offsets = [sum(counts)], torch.tensor([0, *counts]).cumsum(0).int()
            others["row_offsets"] = offsets
    shapes = {"x": (*lead, inputs), "weight": (outputs, inputs), "bias": (outputs,) if draw(st.booleans()) else None}
    return shapes | {"lora_a": (*own, rank, inputs), "lora_b": (*own, outputs, rank)}, others


@st.composite
def entropy_arguments(draw):
    return {"logits": (*draw(st.lists(st.integers(0, 5), max_size=2)), draw(st.integers(1, 2100)))}, {}


@st.composite
def head_arguments(draw):
    rows, width, classes = draw(st.integers(0, 40)), draw(SIZES), draw(st.integers(1, 1100))
    bias = (classes,) if draw(st.booleans()) else None
    return {"hidden": (rows, width), "weight": (classes, width), "bias": bias}, {}


@st.composite
def adapter_arguments(draw):
    width, rank = draw(SIZES), draw(st.integers(1, 128))
    lead, own = draw(st.lists(st.integers(0, 20), max_size=3)), ()
    if draw(st.booleans()):
        lead = [draw(st.integers(0, 3)), draw(st.integers(0, 40))]
        own = (lead[0],)
    shapes = {"x": (*lead, width), "down": (rank, width), "up": (width, rank)}
    activation = draw(st.sampled_from(["gelu", "silu", "relu"]))
    return shapes | {"scale": (*own, rank), "shift": (*own, rank)}, {"activation": activation}


@st.composite
def row_arguments(draw):
    # Of a few numbers the gradient may be all rounding, and is over their length: of one it is exactly 0.
    shape = (*draw(st.lists(st.integers(0, 5), max_size=2)), draw(st.integers(8, 2100)))
    return {"prediction": shape, "target": shape}, {}


ARGUMENTS = {
    "lowrank_filter2d": filter_arguments(),
    "spectral_gain2d": gain_arguments(),
    "lora_linear": lora_arguments(),
    "softmax_entropy": entropy_arguments(),
    "linear_softmax_entropy": head_arguments(),
    "film_adapter": adapter_arguments(),
    "cosine_alignment": row_arguments(),
}
LAYOUT = st.sampled_from(["contiguous", "every second", "transposed", "expanded"])


def laid_out(tensor, layout):
    """The same values in other strides; expanded: the first row's everywhere."""
    if layout == "every second" and tensor.dim():
        return torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0]
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "expanded" and tensor.dim() and tensor.numel():
        return tensor[:1].expand_as(tensor)
    return tensor


def result_and_gradients(op, inputs, names, backend, weights):
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    result = op.function(**inputs | leaves, backend=backend)
    grads = torch.autograd.grad(result, list(leaves.values()), weights.to(result))
    return result.detach(), dict(zip(names, grads, strict=True))


def largest(tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@pytest.mark.parametrize("op", all_operators(), ids=str)
def test_operators_against_float64(op, data, dtype):
    shapes, others = data.draw(ARGUMENTS[op.name])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    inputs = dict(others)
    for name, shape in shapes.items():
        scale = max(shape[-1], 1) ** -0.5 if shape and name not in ("image", "x", "hidden", "logits") else 1.0
        value = None if shape is None else scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        if value is not None:
            value = laid_out(value.to(dtype if name in op.activations else torch.float32), data.draw(LAYOUT))
        inputs[name] = value
    names = [name for name in op.differentiable if isinstance(inputs.get(name), torch.Tensor)]
    exact_inputs = {
        name: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for name, v in inputs.items()
    }
    try:
        weights = 1 + op.function(**exact_inputs, backend="reference")
    except ValueError as refusal:
        assert (op.name, "padding" in str(refusal)) == ("lowrank_filter2d", True)  # noqa: PT017
        with pytest.raises(ValueError, match="padding"):
            op.function(**inputs)
        event("refused")
        return
    exact, exact_grads = result_and_gradients(op, exact_inputs, names, "reference", weights)
    eager, eager_grads = result_and_gradients(op, inputs, names, "reference", weights)
    # A sum over pixels or rows may cancel to less than the roundings of its terms.
    cancelled = BAND * torch.finfo(torch.float32).eps * max(weights.numel(), 1) ** 0.5 * (1 + largest(weights))
    for backend in on_cpu(op.name, op.kernels):
        actual, grads = result_and_gradients(op, inputs, names, backend, weights)
        assert actual.dtype == eager.dtype
        if op.name != "cosine_alignment" or error(actual, exact) > cancelled:  # rows at right angles cancel, too
            assert_close_to_exact("result", actual, eager, exact, dtype)
        for name, grad in grads.items():
            assert grad.dtype == inputs[name].dtype
            if error(grad, exact_grads[name]) > cancelled:
                assert_close_to_exact(f"d{name}", grad, eager_grads[name], exact_grads[name], dtype)
