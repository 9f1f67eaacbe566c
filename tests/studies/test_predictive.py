"""The predictive regularisation study: diagnostics by hand, same batches in both arms, what the report says."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")
pytest.importorskip("bjontegaard")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")
from transformers import LlavaForConditionalGeneration

from studies import bootstrap, predictive
from vqfast import zoo

pytestmark = pytest.mark.usefixtures("one_openmp_thread")


@pytest.fixture(scope="module")
def few():
    """A few images of every split, few resamples."""
    whole, images = predictive.tensors, {"train": 24, "test": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            predictive, "tensors", lambda processor, split: tuple(x[: images[split]] for x in whole(processor, split))
        )
        patch.setattr("vqfast.zoo.train.BATCH", 8)
        patch.setattr(bootstrap, "RESAMPLES", 20)
        yield


def test_contrast():
    """Two stroke patches 60 degrees apart, a background patch at right angles to one: cosines by hand."""
    a, b, c = [1.0, 0, 0], [0.5, 0.75**0.5, 0], [0, 2.0, 0]
    cohesion, coupling = predictive.contrast(torch.tensor([[a, b, c]]), torch.tensor([[True, True, False]]))
    assert cohesion == pytest.approx([0.5])
    assert coupling == pytest.approx([0.75**0.5 / 2])


def test_effective_dimension():
    """Spread equally along 3 of 4 axes: 3; with variances 2, 1, 0: 9 / 5."""
    axes = torch.eye(4)[:3]
    equal = torch.cat([axes, -axes])[None] + 7
    scale = torch.tensor([2.0, 1, 0]).sqrt()[:, None]
    unequal = torch.cat([axes * scale, -axes * scale])[None]
    found = predictive.effective_dimension(torch.cat([equal, unequal]))
    assert found == pytest.approx([3, 9 / 5])


def test_probe():
    """Classes that the mean patch separates, and classes that it does not."""
    generator = torch.Generator().manual_seed(0)
    tokens, classes = torch.randn(80, 5, 6, generator=generator), torch.arange(80) % 2
    apart = tokens + 10 * classes[:, None, None]
    assert predictive.probe(apart[:40], classes[:40], apart[40:], classes[40:]).all()
    assert 0.2 < predictive.probe(tokens[:40], classes[:40], tokens[40:], classes[40:]).mean() < 0.8


def test_stroke():
    image = torch.full((1, 3, 32, 32), -1.0)
    image[..., 4:8, 8:12] = 1
    assert predictive.stroke(image)[0].nonzero().flatten().tolist() == [8 + 2]


def test_reduction_by_hand():
    """Two images, two seeds: degradation of the dimension 2 and 4 without, 1 and 2 with: reduced by 1.5."""

    def layers(first, second):
        dimension = np.array([[5.0, 5.0], [5.0 - first] * 2, [0, 0]])
        fill = np.ones((3, 2))
        return predictive.Layers(fill, fill, fill, dimension, np.ones((2, 3), bool))

    arms = {"without": [layers(2, 0), layers(4, 0)], "with": [layers(1, 0), layers(2, 0)]}
    found = predictive.diagnose(arms, "dimension")
    assert found["degradation"]["without"]["value"] == 3
    assert found["degradation_by_seed"] == {"without": [2, 4], "with": [1, 2]}
    assert found["reduction"]["value"] == 1.5
    assert found["middle"]["value"] == 1.5
    assert (found["reduction"]["low"], found["reduction"]["high"]) == (1, 2)
    assert predictive.diagnose(arms, "contrast")["reduction"]["value"] == 0


def test_arms(few, monkeypatch):
    """Weight 0 trains as the language loss alone does; both arms see the same batches; the tower stays."""
    seen = []
    ask = predictive.ask
    monkeypatch.setattr(predictive, "ask", lambda *args, **options: seen.append(args[2:]) or ask(*args, **options))
    models = [predictive.fine_tune(weight, 2, seed)[0] for weight, seed in ((0.0, 0), (0.5, 0), (0.5, 0), (0.0, 1))]
    batches = [torch.cat([images for images, _ in seen[i : i + 2]]) for i in (0, 2, 4, 6)]
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])
    assert not torch.equal(batches[0], batches[3])
    start = zoo.load()[0].state_dict()
    without, with_, again = (model.state_dict() for model in models[:3])
    assert all(torch.equal(with_[name], again[name]) for name in start)
    changed = {name for name in start if not torch.equal(with_[name], start[name])}
    assert changed
    assert not any("vision_tower" in name for name in changed)
    assert any(not torch.equal(with_[name], without[name]) for name in changed)


def test_study(few, tmp_path):
    predictive.main(tmp_path, steps=2, seeds=2)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() >= {"split", "images", "diagnostics", "task", "targets", "start", "losses_last_50_steps"}
    assert report.keys() >= {"settings", "date", "machine", "versions"}
    assert report["diagnostics"].keys() == predictive.DIAGNOSTICS.keys()
    for found in report["diagnostics"].values():
        for arm in predictive.ARMS:
            assert len(found["layers"][arm]) == 3
            assert len(found["degradation_by_seed"][arm]) == 2
            drop = found["layers"][arm][0]["value"] - found["layers"][arm][1]["value"]
            assert found["degradation"][arm]["value"] == pytest.approx(drop)
    assert len(report["targets"]) == 4
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    for name in ("with-0", "with-1", "without-0", "without-1"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / name)


def test_unknown_split():
    with pytest.raises(predictive.typer.BadParameter, match="validation or test"):
        predictive.main(split="train")
