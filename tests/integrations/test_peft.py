"""Layers of peft through vqfast's operator, and checkpoints of peft written and begun from."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vqfast.ops
from vqfast import TestTimeTuner, TuningConfig, zoo
from vqfast.integrations.peft import CONFIG_FILE, PICKLE_FILE, PREFIX, WEIGHTS_FILE, accelerate, load, save
from vqfast.integrations.transformers import register_vision_tower

peft = pytest.importorskip("peft")
transformers_utils = pytest.importorskip("transformers.pytorch_utils")
LORA_ONLY = TuningConfig(filter=None, guard=False, lora_rank=4, lora_alpha=6.0, lora_targets=("q_proj", "fc1"))
FLOAT32 = dict(rtol=1e-4, atol=1e-5)
BFLOAT16 = dict(rtol=4e-2, atol=4e-2)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 16, bias=False)

    def forward(self, x):
        return self.second(torch.nn.functional.gelu(self.first(x)))


def adapted(model=None, *, other=None, **options):
    """With adapters "default" of rank 4 and "other" of rank 3, both far from zero; "default" is active."""
    torch.manual_seed(0)
    names = ["first", "second"] if model is None else ["q_proj", "v_proj"]
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": names, **options})
    model = peft.get_peft_model(model or Layers(), config)
    model.add_adapter("other", peft.LoraConfig(**{"r": 3, "lora_alpha": 9, "target_modules": names, **(other or {})}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def outcome(model, x=None, **inputs):
    """The output and every gradient there is, by name."""
    torch.manual_seed(1)  # of dropout
    if x is None:
        x = torch.randn(5, 7, 12, dtype=next(model.parameters()).dtype)
    x = x.detach().requires_grad_()
    y = model(x, **inputs)
    y.float().square().sum().backward()
    found = {"output": y.detach(), "x": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1).item()
        torch.testing.assert_close(
            found[name] / scale, value / scale, **(tolerance or FLOAT32), msg=lambda m, n=name: n + m
        )


def fingerprint(model):
    """Everything close() promises to leave alone."""
    tensors = {n: (t.clone(), t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()}
    return tensors, {n: (id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()}


@pytest.fixture
def calls(monkeypatch):
    """Arguments of every call of the operator."""
    seen = []
    operator = vqfast.ops.lora_linear

    def spy(*args, **kwargs):
        seen.append(args)
        return operator(*args, **kwargs)

    monkeypatch.setattr(vqfast.ops, "lora_linear", spy)
    return seen


@pytest.fixture(scope="module")
def loaded():
    return zoo.load()


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def batch(loaded):
    questions = [zoo.questions("validation")[i] for i in (0, 4, 8)]
    images, texts, _ = zip(*questions, strict=True)
    inputs = dict(loaded[1](images=list(images), text=list(texts), return_tensors="pt", padding=True))
    noise = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    return inputs | {"pixel_values": (inputs["pixel_values"] + noise).clamp(-1, 1)}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch, logits_to_keep=1).logits[:, 0]


def entropy(rows):
    return torch.distributions.Categorical(logits=rows.double()).entropy()


# Taking over.


def test_outputs_gradients_and_giving_back(calls):
    model = adapted()
    before, expected = fingerprint(model), outcome(model)
    assert expected.keys() == {"output", "x", *(n for n, p in model.named_parameters() if ".default." in n)}
    with accelerate(model) as accelerated:
        assert accelerated.layers == (f"{PREFIX}first", f"{PREFIX}second")
        assert accelerated.skipped == {}
        assert model.state_dict().keys() == before[0].keys()
        found = outcome(model)
    assert_same(found, expected)
    assert len(calls) == 2
    after = fingerprint(model)
    assert after[1] == before[1]
    for name, (tensor, requires_grad) in before[0].items():
        assert torch.equal(after[0][name][0], tensor)
        assert after[0][name][1] == requires_grad
    assert_same(outcome(model), expected, rtol=0, atol=0)
    assert len(calls) == 2
    accelerated.close()  # again: nothing


def base(model, name="first"):
    return model.get_submodule(f"{PREFIX}{name}")


def each(function):
    return lambda model: [function(base(model, name)) for name in ("first", "second")]


def merged_and_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


def tensor_scaling(layer):
    layer.scaling["default"] = torch.tensor(1.5)


def without_casting(layer):
    layer.cast_input_dtype_enabled = False


# What is done to the model after accelerate(), the calls of the operator in a forward then, the reason that is given.
STATES = {
    "nothing": (lambda m: None, 2, None),
    "several": (lambda m: m.base_model.set_adapter(["default", "other"]), 2, None),
    "the other": (lambda m: m.set_adapter("other"), 2, None),
    "disabled": (lambda m: m.base_model.disable_adapter_layers(), 0, "disabled"),
    "enabled again": (lambda m: (m.base_model.disable_adapter_layers(), m.base_model.enable_adapter_layers()), 2, None),
    "merged": (lambda m: m.merge_adapter(), 0, "merged"),
    "merged, then disabled": (lambda m: (m.merge_adapter(), m.base_model.disable_adapter_layers()), 0, "disabled"),
    "merged and back": (merged_and_back, 2, None),
    "scaled": (each(lambda layer: layer.set_scale("default", 3)), 2, None),
    "scaled by a tensor": (each(tensor_scaling), 0, "no Python number"),
    "deleted": (lambda m: (m.set_adapter("other"), m.delete_adapter("default")), 2, None),
    "weight trained": (each(lambda layer: layer.base_layer.weight.requires_grad_()), 0, "trained"),
    "bias trained": (lambda m: base(m).base_layer.bias.requires_grad_(), 1, "trained"),
    "training": (lambda m: m.train(), 2, None),
    "without casting": (each(without_casting), 0, "disable_input_dtype_casting"),
    "hook on lora_A": (
        lambda m: base(m).lora_A["default"].register_forward_hook(lambda _, x, y: 2 * y) and None,
        1,
        "hooks",
    ),
    "hook on the base": (lambda m: base(m).base_layer.register_forward_pre_hook(lambda _, x: (-x[0],)), 1, "hooks"),
    "hook on the layer": (lambda m: base(m).register_forward_hook(lambda _, x, y: -y), 2, None),
}


@pytest.mark.parametrize("state", STATES)
def test_state_is_looked_up_at_every_call(state, calls):
    change, count, reason = STATES[state]
    model, plain = adapted(), adapted()
    with accelerate(model) as accelerated:
        outcome(model)
        calls.clear()
        change(model)
        change(plain)
        assert_same(outcome(model), outcome(plain))
        assert len(calls) == count
        assert len(accelerated.skipped) == 2 - count
        assert all(reason in why for why in accelerated.skipped.values())


ADAPTERS = {
    "dropout": (dict(lora_dropout=0.4), lambda m: m.train(), 0, "dropout"),
    "dropout in evaluation": (dict(lora_dropout=0.4), lambda m: m.train().eval(), 2, None),
    "rslora": (dict(use_rslora=True), lambda m: None, 2, None),
    "dora": (dict(use_dora=True), lambda m: None, 0, "DoraLinearVariant"),
    "lora_bias": (dict(lora_bias=True), lambda m: None, 0, "lora_bias"),
    "rank 64": (dict(r=64), lambda m: None, 2, None),
    "rank 65": (dict(r=65), lambda m: None, 0, "64 ranks"),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_features_of_an_adapter(kind, calls):
    options, change, count, reason = ADAPTERS[kind]
    model, plain = adapted(**options), adapted(**options)
    change(model)
    change(plain)
    with accelerate(model) as accelerated:
        assert_same(outcome(model), outcome(plain))
        assert len(calls) == count
        assert len(accelerated.skipped) == len(accelerated.layers) - count
        assert all(reason in why for why in accelerated.skipped.values())


def test_a_variant_beside_a_plain_adapter(calls):
    model, plain = (adapted(other=dict(use_dora=True)) for _ in range(2))
    with accelerate(model):
        assert_same(outcome(model), outcome(plain))
        assert len(calls) == 2
        for each_model in (model, plain):
            each_model.base_model.set_adapter(["default", "other"])
        assert_same(outcome(model), outcome(plain))
        assert len(calls) == 2


def test_more_ranks_together_than_the_operator_takes(calls):
    model, plain = (adapted(r=40, other=dict(r=30)) for _ in range(2))
    for each_model in (model, plain):
        each_model.base_model.set_adapter(["default", "other"])
    with accelerate(model) as accelerated:
        assert_same(outcome(model), outcome(plain))
        assert len(accelerated.skipped) == 2
    assert not calls


def test_an_adapter_that_one_layer_has(calls):
    model, plain = (adapted(other=dict(target_modules=["first"])) for _ in range(2))
    for each_model in (model, plain):
        each_model.set_adapter("other")
    with accelerate(model) as accelerated:
        assert_same(outcome(model), outcome(plain))
        assert accelerated.skipped == {f"{PREFIX}second": "none of its adapters is active"}
    assert len(calls) == 1


def test_disable_adapter_and_mixed_batches(calls):
    model, plain = adapted(), adapted()
    with accelerate(model):
        with model.disable_adapter(), plain.disable_adapter():
            assert_same({"y": model(torch.ones(3, 12))}, {"y": plain(torch.ones(3, 12))})
        names = ["default", "other", "__base__"]
        x = torch.randn(3, 12)
        mixed, expected = (m(x, adapter_names=names) for m in (model, plain))
        assert_same({"y": mixed}, {"y": expected})
        assert not calls
        assert (mixed[0] - mixed[2]).abs().max() > 0.1


DTYPES = {
    "float64": (lambda m: m.double(), FLOAT32),
    "bfloat16": (lambda m: m.bfloat16(), BFLOAT16),
    "bfloat16 beside float32 adapters": (
        lambda m: [layer.base_layer.bfloat16() for layer in (base(m), base(m, "second"))],
        BFLOAT16,
    ),
    "bfloat16 adapters": (
        lambda m: [part.bfloat16() for layer in (base(m), base(m, "second")) for part in (layer.lora_A, layer.lora_B)],
        BFLOAT16,
    ),
}


@pytest.mark.parametrize("kind", DTYPES)
def test_dtypes(kind, calls):
    convert, tolerance = DTYPES[kind]
    model, plain = adapted(), adapted()
    convert(model)
    convert(plain)
    x = torch.randn(5, 12).to(base(model).base_layer.weight.dtype)
    expected = outcome(plain, x)
    with accelerate(model):
        found = outcome(model, x)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert_same(found, expected, **tolerance)
    assert len(calls) == 2


def test_autocast_and_no_grad(calls):
    model, plain = adapted(), adapted()
    x = torch.randn(5, 12)
    with accelerate(model), torch.autocast("cpu", torch.bfloat16):
        found, expected = outcome(model, x), outcome(plain, x)
        assert found["output"].dtype == expected["output"].dtype == torch.bfloat16
        assert_same(found, expected, **BFLOAT16)
    base(model).base_layer.weight.requires_grad_()  # harmless where no gradient is asked for
    with accelerate(model), torch.inference_mode():
        assert_same({"y": model(x)}, {"y": plain(x)})
    assert len(calls) == 4


def test_copies(calls):
    model = adapted()
    expected = outcome(model)
    with accelerate(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            base(twin).lora_B["default"].weight.zero_()
        assert_same(outcome(model), expected)
        assert (outcome(twin)["output"] - expected["output"]).abs().max() > 0.1
    assert len(calls) == 4


def test_compiles():
    model, x = adapted(), torch.randn(5, 12)
    expected = model(x)
    with accelerate(model):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_same({"y": compiled(x)}, {"y": expected})
        model.base_model.set_adapter(["default", "other"])
        assert_same({"y": compiled(x)}, {"y": model(x)})


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x).round()


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.quantised = nn.Linear(4, 4), Quantised(4, 4)
        self.transposed, self.conv = transformers_utils.Conv1D(4, 4), nn.Conv1d(4, 4, 1)

    def forward(self, x):
        return self.conv(self.transposed(self.quantised(self.plain(x)))[..., None])[..., 0]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_layers_that_are_left_to_peft_say_why(calls, caplog):
    model = peft.get_peft_model(Mixed(), peft.LoraConfig(target_modules=["plain", "quantised", "transposed", "conv"]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter) if parameter.dim() > 1 else None
    model.eval()
    x = torch.randn(3, 4)
    expected = model(x)
    with accelerate(model) as accelerated:
        assert accelerated.layers == (f"{PREFIX}plain",)
        reasons = {path.removeprefix(PREFIX): why for path, why in accelerated.skipped.items()}
        assert reasons.keys() == {"quantised", "transposed", "conv"}
        assert "Quantised, is no plain nn.Linear" in reasons["quantised"]
        assert "Conv1D, is no plain nn.Linear" in reasons["transposed"]
        assert "Conv1d of peft is no lora.Linear" in reasons["conv"]
        assert_same({"y": model(x)}, {"y": expected})
    assert len(calls) == 1
    assert "3 LoRA layers are left to peft" in caplog.text


def test_errors_of_accelerate():
    with pytest.raises(ValueError, match="no LoRA layer of peft in this Layers"):
        accelerate(Layers())
    with pytest.raises(TypeError, match=r"torch\.nn\.Module; got str"):
        accelerate("model")
    model = adapted()
    with accelerate(model), pytest.raises(ValueError, match="first is accelerated already"):
        accelerate(model)
    accelerate(model).close()


def test_close_under_another_forward():
    model = adapted()
    accelerated = accelerate(model)
    layer = base(model, "second")
    ours = vars(layer)["forward"]
    layer.forward = lambda x: ours(x)
    with pytest.raises(RuntimeError, match=r"second was replaced after accelerate\(\)"):
        accelerated.close()
    assert "forward" in vars(base(model))
    layer.forward = ours
    accelerated.close()
    assert "forward" not in vars(layer)
    layer.forward = lambda x: type(layer).forward(layer, x)  # a forward that was there before stays
    with accelerate(model) as again:
        assert again.skipped == {f"{PREFIX}second": "its forward is replaced already"}
    assert "forward" in vars(layer)


def test_vision_tower_of_the_embedded_model(model, batch, calls):
    adapted_model = adapted(copy.deepcopy(model))
    with accelerate(adapted_model) as accelerated:
        assert sum("vision_tower" in path for path in accelerated.layers) == 8
        result = adapted_model(**batch)
        result.logits.square().sum().backward()
        count = len(calls)
        tuned_inside = tuned_entropies(adapted_model.get_base_model(), batch)
    assert count == len(accelerated.layers)
    calls.clear()
    gradients = {n: p.grad for n, p in adapted_model.named_parameters() if p.grad is not None}
    adapted_model.zero_grad()
    plain = adapted_model(**batch)
    plain.logits.square().sum().backward()
    expected = {n: p.grad for n, p in adapted_model.named_parameters() if p.grad is not None}
    assert len(expected) == 2 * len(accelerated.layers)
    assert_same({**gradients, "y": result.logits}, {**expected, "y": plain.logits})
    assert not calls
    torch.testing.assert_close(tuned_inside, tuned_entropies(adapted_model.get_base_model(), batch), **FLOAT32)


def tuned_entropies(model, batch):
    with TestTimeTuner(model, TuningConfig(lora_blocks=1)) as tuner:
        return torch.tensor([[s.entropy_before, s.entropy_after] for s in tuner.tune(**batch).samples])


# Saving.


@pytest.fixture(scope="module")
def tuned(model, batch):
    """A result of LoRA alone, and the logits of the model with it."""
    with TestTimeTuner(model, LORA_ONLY) as tuner:
        result = tuner.tune(**batch)
        with tuner.applied(result):
            return result, logits(model, batch)


@pytest.mark.parametrize("sample", [0, 2])
def test_plain_peft_loads_what_save_wrote(model, batch, tuned, sample, tmp_path):
    result, expected = tuned
    save(result, tmp_path / "new" / "folder", sample, base_model_name_or_path="embedded")
    folder = tmp_path / "new" / "folder"
    assert {file.name for file in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    told = json.loads((folder / CONFIG_FILE).read_text())
    assert (told["r"], told["lora_alpha"], told["base_model_name_or_path"]) == (4, 6, "embedded")
    assert told["target_modules"] == list(result.adapters())
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    one = {name: value[[sample]] for name, value in batch.items()}
    found = logits(plain, one)[0]
    torch.testing.assert_close(found, expected[sample], rtol=1e-4, atol=1e-4)
    assert (found - logits(model, one)[0]).abs().max() > 1e-2


def test_saving_again_gives_the_same_files(tuned, tmp_path):
    for name in ("a", "b", "b"):  # the last over the second
        save(tuned[0], tmp_path / name)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_many_layers_and_a_scaling_that_is_no_integer(model, batch, tmp_path):
    """peft shortens lists of twenty target modules and more."""
    targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    config = dataclasses.replace(LORA_ONLY, lora_blocks=4, lora_targets=targets, lora_rank=3, lora_alpha=5.5)
    with TestTimeTuner(model, config) as tuner:
        result = tuner.tune(**batch)
        with tuner.applied(result):
            expected = logits(model, batch)[0]
    assert len(result.adapters()) == 24
    save(result, tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["lora_alpha"] == 5.5
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    one = {name: value[:1] for name, value in batch.items()}
    torch.testing.assert_close(logits(plain, one)[0], expected, rtol=1e-4, atol=1e-4)


def test_layers_of_different_rank(tmp_path):
    """A fused layer with two adapters beside a plain one."""
    torch.manual_seed(0)
    adapters = {"first": (torch.randn(4, 12), torch.randn(20, 4)), "second": (torch.randn(8, 20), torch.randn(16, 8))}
    config = SimpleNamespace(lora_rank=4, lora_alpha=10.0)
    save(SimpleNamespace(adapters=lambda sample: adapters, config=config), tmp_path)
    layers, x = Layers(), torch.randn(3, 12)
    expected = copy.deepcopy(layers)
    with torch.no_grad():
        for path, (lora_a, lora_b) in adapters.items():
            expected.get_submodule(path).weight += 2.5 * lora_b @ lora_a
    found = peft.PeftModel.from_pretrained(layers, tmp_path)(x)
    torch.testing.assert_close(found, expected(x), rtol=1e-4, atol=1e-3)


def test_a_peft_model_is_refused_and_says_what_to_pass(model):
    with pytest.raises(ValueError, match=r"pass model.get_base_model\(\)"):
        TestTimeTuner(adapted(copy.deepcopy(model)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((4, 96), torch.nan), "has values that are not finite"),
        (torch.zeros(3, 96), r"must be a tensor \[4, 96\]; got \[3, 96\]"),
        ([0.0], r"must be a tensor \[4, 96\]; got list"),
    ],
)
def test_values_that_cannot_be_begun_from_are_refused(model, value, message):
    path = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match=message):
        TestTimeTuner(model, LORA_ONLY, begin_from={f"{path}.lora_a": value})
    with pytest.raises(ValueError, match=r"'q_proj.lora_a' is not tuned here; there are filter|'q_proj.lora_a' is not"):
        TestTimeTuner(model, LORA_ONLY, begin_from={"q_proj.lora_a": torch.zeros(4, 96)})


def test_errors_of_save(model, batch, tuned, tmp_path):
    with pytest.raises(IndexError, match="sample must be 0 to 2; got 3"):
        save(tuned[0], tmp_path, 3)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file"):
        save(tuned[0], tmp_path / "file")
    with TestTimeTuner(model, TuningConfig(lora_blocks=0)) as tuner:
        result = tuner.tune(**batch)
    with pytest.raises(ValueError, match="tuned no LoRA"):
        save(result, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"file"}


# Beginning from a checkpoint.


def trained(model, folder, **options):
    """A checkpoint of peft's own making, and the model that it gives."""
    torch.manual_seed(3)
    targets = r".*vision_tower.*layers\.[01]\..*(q_proj|fc1)"
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **options})
    adapted_model = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in adapted_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted_model.save_pretrained(folder)
    return adapted_model.eval()


@pytest.mark.parametrize("options", [{}, dict(use_rslora=True), dict(lora_dropout=0.5), dict(lora_alpha=7.25)])
def test_tuning_begins_from_a_checkpoint(model, batch, options, tmp_path):
    adapted_model = trained(model, tmp_path, **options)
    config, values = load(tmp_path, model, TuningConfig(taps=5))
    assert (config.taps, config.lora_rank, config.lora_blocks) == (5, 4, 2)
    assert sorted(config.lora_targets) == ["fc1", "q_proj"]
    alpha = options.get("lora_alpha", 6)
    assert config.lora_alpha == pytest.approx(2 * alpha if "use_rslora" in options else alpha)
    with TestTimeTuner(model, config, begin_from=values) as tuner:
        assert {f"{path}.{kind}" for path in tuner.layers for kind in ("lora_a", "lora_b")} == values.keys()
        found = torch.tensor([sample.entropy_before for sample in tuner.tune(**batch).samples])
    expected = entropy(logits(adapted_model, batch)).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - entropy(logits(model, batch)).float()).abs().max() > 1e-3


def test_what_was_saved_is_what_is_loaded(model, batch, tuned, tmp_path):
    """And saving it once more, unchanged, gives the same files."""
    save(tuned[0], tmp_path / "first", 1)
    config, values = load(tmp_path / "first", model, LORA_ONLY)
    assert dataclasses.replace(config, lora_targets=LORA_ONLY.lora_targets) == LORA_ONLY
    for path, (lora_a, lora_b) in tuned[0].adapters(1).items():
        assert torch.equal(values[f"{path}.lora_a"], lora_a)
        assert torch.equal(values[f"{path}.lora_b"], lora_b)
    unchanged = dataclasses.replace(config, lr_lora=1e-30)
    with TestTimeTuner(model, unchanged, begin_from=values) as tuner:
        save(tuner.tune(**batch), tmp_path / "second", 0)
    first, second = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    told = [json.loads((tmp_path / name / CONFIG_FILE).read_text()) for name in ("first", "second")]
    assert {**told[0], "target_modules": sorted(told[0]["target_modules"])} == {
        **told[1],
        "target_modules": sorted(told[1]["target_modules"]),
    }


def rewritten(folder, *, config=None, keys=None, tensors=None):
    """The checkpoint with entries of its configuration changed, its keys renamed, its tensors changed."""
    if config is not None:
        told = json.loads((folder / CONFIG_FILE).read_text()) | config
        (folder / CONFIG_FILE).write_text(json.dumps(told))
    content = load_file(folder / WEIGHTS_FILE)
    if keys is not None:
        content = {keys(key): value for key, value in content.items()}
    if tensors is not None:
        content = tensors(content)
    save_file(content, folder / WEIGHTS_FILE)


@pytest.mark.parametrize("theirs", ["vision_tower.vision_model.encoder", "vision_tower.encoder"])
def test_paths_that_moved_between_releases(model, theirs, tmp_path):
    trained(model, tmp_path)
    _, expected = load(tmp_path, model, TuningConfig())
    rewritten(tmp_path, keys=lambda key: key.replace("model.vision_tower.encoder", theirs))
    _, found = load(tmp_path, model, TuningConfig())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_float16_checkpoints_become_float32(model, tmp_path):
    trained(model, tmp_path)
    rewritten(tmp_path, tensors=lambda content: {key: value.half() for key, value in content.items()})
    _, values = load(tmp_path, model, TuningConfig())
    assert {value.dtype for value in values.values()} == {torch.float32}


REFUSED_OPTIONS = {
    "use_dora": (dict(use_dora=True), "use_dora = True.* plain LoRA alone: DoRA rescales"),
    "lora_bias": (dict(lora_bias=True), "lora_bias = True.*adapters have a bias"),
    "bias": (dict(bias="lora_only"), "bias = 'lora_only'.*biases of the base"),
    "modules_to_save": (dict(modules_to_save=["lm_head"]), r"modules_to_save = \['lm_head'\].*whole modules"),
    "rank_pattern": (dict(rank_pattern={"fc1": 2}), "rank_pattern = {'fc1': 2}.*one lora_rank"),
    "alpha_pattern": (dict(alpha_pattern={"fc1": 2}), "alpha_pattern = {'fc1': 2}.*one lora_alpha"),
    "pissa": (dict(init_lora_weights="pissa"), "init_lora_weights = 'pissa'.*changes the base's weights"),
    "alora": (dict(alora_invocation_tokens=[1]), r"alora_invocation_tokens = \[1\].*not known"),
    "rank above 64": (dict(r=65), "lora_rank must be an integer of at least 1 and at most 64; got 65"),
    "beyond the tower": (
        dict(target_modules=r".*(language_model|vision_tower).*layers\.0\..*q_proj"),
        "language_model.*q_proj has an adapter, but a tuner's are in the blocks of the vision tower",
    ),
    "blocks with a gap": (
        dict(target_modules=r".*vision_tower.*layers\.[02]\..*q_proj"),
        r"no adapter on .*layers\.1\.self_attn\.q_proj\. A tuner's .*first n blocks \(here 3\)",
    ),
    "not the first": (dict(target_modules=r".*vision_tower.*layers\.1\..*q_proj"), r"no adapter on .*layers\.0"),
    "other targets in each block": (
        dict(target_modules=r".*vision_tower.*layers\.(0\..*q_proj|1\..*fc1)"),
        r"no adapter on .*layers\.0\.mlp\.fc1, .*layers\.1\.self_attn\.q_proj",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED_OPTIONS)
def test_checkpoints_that_a_tuner_cannot_hold(model, kind, tmp_path):
    options, message = REFUSED_OPTIONS[kind]
    trained(model, tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, model, TuningConfig())


def damaged(folder):
    file = folder / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:100])


def pickled(folder):
    """A pickle that would be noticed if it were read."""
    (folder / WEIGHTS_FILE).unlink()
    (folder / PICKLE_FILE).write_bytes(pickle.dumps(Noticed()))


def pickled_under_the_other_name(folder):
    (folder / WEIGHTS_FILE).write_bytes(pickle.dumps(Noticed()))


class Noticed:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def first_changed(kind, change):
    def tensors(content):
        key = next(key for key in content if f"lora_{kind}" in key)
        return content | {key: change(content[key])}

    return lambda folder: rewritten(folder, tensors=tensors)


def dropped(end):
    return lambda folder: rewritten(folder, tensors=lambda c: {k: v for k, v in c.items() if not k.endswith(end)})


def with_nan(tensor):
    tensor = tensor.clone()
    tensor[0, 0] = float("nan")
    return tensor


BAD = {
    "no configuration": (lambda f: (f / CONFIG_FILE).unlink(), FileNotFoundError, f"no {CONFIG_FILE} in "),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), FileNotFoundError, f"no {WEIGHTS_FILE} in "),
    "pickle": (pickled, ValueError, f"{PICKLE_FILE}, a pickle, which can run code and is not read"),
    "pickle as safetensors": (pickled_under_the_other_name, ValueError, "is no safetensors file, or damaged"),
    "damaged": (damaged, ValueError, "is no safetensors file, or damaged"),
    "no JSON": (lambda f: (f / CONFIG_FILE).write_text("{"), ValueError, "is no JSON"),
    "a list": (lambda f: (f / CONFIG_FILE).write_text("[]"), ValueError, r"must be 'LORA'; got \[\]"),
    "other method": (lambda f: rewritten(f, config={"peft_type": "LOHA"}), ValueError, "must be 'LORA'; got 'LOHA'"),
    "no method": (lambda f: rewritten(f, config={"peft_type": None}), ValueError, "must be 'LORA'; got None"),
    "transposed": (lambda f: rewritten(f, config={"fan_in_fan_out": True}), ValueError, "fan_in_fan_out = True"),
    "of the future": (lambda f: rewritten(f, config={"use_new": 1}), ValueError, "use_new = 1, but .*not known"),
    "rank in words": (lambda f: rewritten(f, config={"r": "4"}), ValueError, "must be numbers.*got 4, 6"),
    "no alpha": (lambda f: rewritten(f, config={"lora_alpha": None}), ValueError, "must be numbers.*got 4, None"),
    "alpha 0": (lambda f: rewritten(f, config={"lora_alpha": 0}), ValueError, "lora_alpha must be a positive"),
    "other rank": (lambda f: rewritten(f, config={"r": 5}), ValueError, r"lora_A of .* must be \[5, .*got \[4, "),
    "other inputs": (first_changed("A", lambda a: a[:, 1:].clone()), ValueError, r"lora_A of .* must be \[4, "),
    "other outputs": (first_changed("B", lambda b: b[1:].clone()), ValueError, r"lora_B of .* must be \["),
    "nan": (first_changed("B", with_nan), ValueError, "lora_B of .* has values that are not finite"),
    "inf": (first_changed("A", lambda a: a * float("inf")), ValueError, "lora_A of .* not finite"),
    "no B": (dropped("layers.0.mlp.fc1.lora_B.weight"), ValueError, "lora_B of .*fc1 must be .*; got nothing"),
    "nothing": (dropped(""), ValueError, "holds no adapter"),
    "other keys": (
        lambda f: rewritten(f, keys=lambda key: key.replace(".weight", ".default.weight")),
        ValueError,
        "default.weight is no matrix of plain LoRA on a linear layer",
    ),
    "other model": (
        lambda f: rewritten(f, keys=lambda key: key.replace(".layers.", ".stages.")),
        ValueError,
        "is not in the model, nor is a layer of its vision tower that ends like it",
    ),
    "a tower of language": (
        lambda f: rewritten(f, keys=lambda key: key.replace("model.vision_tower.encoder", "text.encoder")),
        ValueError,
        "text.encoder.layers.0.* is not in the model, nor is a layer of its vision tower",
    ),
    "which tower": (
        lambda f: rewritten(f, keys=lambda key: key.replace("model.vision_tower.encoder", "vision_tower")),
        ValueError,
        "vision_tower.layers.0.self_attn.q_proj may be any of .*encoder.*language_model",
    ),
    "no linear layer": (
        lambda f: rewritten(f, keys=lambda key: key.replace("mlp.fc1", "layer_norm1")),
        ValueError,
        "LayerNorm is no linear layer",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoints(model, kind, tmp_path):
    spoil, error, message = BAD[kind]
    trained(model, tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        load(tmp_path, model, TuningConfig())


def test_folders_that_are_none(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing"):
        load(tmp_path / "missing", model, TuningConfig())
    adapted(copy.deepcopy(model)).save_pretrained(tmp_path, selected_adapters=["other"])
    with pytest.raises(FileNotFoundError, match="there are checkpoints in its folders other"):
        load(tmp_path, model, TuningConfig())


def test_two_layers_of_a_checkpoint_for_one_of_the_model(model, tmp_path):
    trained(model, tmp_path)

    def doubled(content):
        moved = {k.replace("model.vision_tower.encoder", "vision_tower.old.encoder"): v for k, v in content.items()}
        return content | {key: value.clone() for key, value in moved.items()}

    rewritten(tmp_path, tensors=doubled)
    with pytest.raises(ValueError, match=r"both .* and .* would be the model's"):
        load(tmp_path, model, TuningConfig())


# Fused layers.


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.eyes = nn.ModuleDict({"stages": nn.ModuleList([Attention(), Attention()])})


def test_a_registered_tower(tmp_path):
    register_vision_tower(Classifier, tower="eyes", blocks="stages", normalisation=((0.5,), (0.5,)))
    torch.manual_seed(0)
    adapters = {"eyes.stages.0.qkv": (torch.randn(6, 8), torch.randn(24, 6))}
    result = SimpleNamespace(adapters=lambda sample: adapters, config=SimpleNamespace(lora_rank=3, lora_alpha=3.0))
    save(result, tmp_path)
    config, values = load(tmp_path, Classifier(), TuningConfig())
    assert (config.lora_rank, config.lora_alpha, config.lora_blocks) == (6, 6, 1)
    assert config.lora_targets == ("qkv",)
    assert torch.equal(values["eyes.stages.0.qkv.lora_b"], adapters["eyes.stages.0.qkv"][1])


def test_thirds_of_a_fused_layer(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "models"))
    families = pytest.importorskip("families")
    model = families.qwen2_vl()
    batch = families.qwen_inputs(1, families.CLIP)
    config = dataclasses.replace(LORA_ONLY, lora_targets=("q_proj", "v_proj"))
    with TestTimeTuner(model, config) as tuner:
        result = tuner.tune(**batch)
        with tuner.applied(result):
            expected = logits(model, batch)
    assert all(path.endswith(".qkv") for path in result.adapters())
    save(result, tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["r"] == 8
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(logits(plain, batch), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(model, batch)).abs().max() > 1e-2
    again, values = load(tmp_path, model, LORA_ONLY)
    assert (again.lora_targets, again.lora_rank, again.lora_alpha) == (("qkv",), 8, 12)
    with TestTimeTuner(model, again, begin_from=values) as tuner:
        found = tuner.tune(**batch).samples[0].entropy_before
    assert found == pytest.approx(entropy(expected).item(), abs=1e-4)
