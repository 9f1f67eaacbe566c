"""The adaptor study on a few images: who is trained, what the labels change, what the report says."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")
pytest.importorskip("bjontegaard")
pytest.importorskip("typer")
from studies import adaptor, bootstrap
from vqfast import zoo

pytestmark = pytest.mark.usefixtures("one_openmp_thread")
LABELS = adaptor.LABELS  # as they are, before a test has fewer
IMAGES = {"train": 12, "validation": 6, "test": 8}


@pytest.fixture(scope="module")
def few():
    """A few images of every split, two or three levels of a codec, few resamples."""
    whole = adaptor.tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            adaptor, "tensors", lambda processor, split: tuple(x[: IMAGES[split]] for x in whole(processor, split))
        )
        levels = {"jpeg": (1, 10, 65), "webp": (0, 20), "avif": (5, 30), "jpeg2000": (0.02, 0.05, 0.25, 1)}
        patch.setattr(adaptor, "LEVELS", levels)
        names = tuple(f"{codec}:{level:g}" for codec in adaptor.SEEN for level in levels[codec])
        patch.setattr(adaptor, "LABELS", names)
        patch.setattr("studies.codecs.SCANNED", 32)  # sheets of a few 8x8 are JPEG 2000's smallest file at any level
        patch.setattr(adaptor, "SIZES", (16, 32))
        patch.setattr(bootstrap, "RESAMPLES", 20)
        patch.setattr(adaptor, "SIGNIFICANT", 1.1)  # every level that costs an answer counts
        yield


@pytest.fixture(scope="module")
def images(few):
    return adaptor.tensors(zoo.load()[1], "train")[0]


def test_only_adapters_are_trained(images):
    model, adapters, losses = adaptor.distil(images, 3, 0)
    frozen = zoo.load()[0].state_dict()
    assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(layer.up.abs().max() > 0 and layer.down.grad.abs().max() > 0 for layer in adapters.layers)
    assert len(losses) == 3


def test_labels_are_not_used(images, monkeypatch):
    """Other answers, everywhere that answers come from: the same adapters."""
    first = adaptor.distil(images, 2, 0)[1].state_dict()

    def other(split="test", kinds=None):
        return [(image, text, "three") for image, text, _ in questions(split, kinds)]

    questions = zoo.questions
    monkeypatch.setattr(zoo, "questions", other)
    monkeypatch.setattr("vqfast.zoo.train.questions", other)
    changed = adaptor.tensors(zoo.load()[1], "train")
    assert (changed[1] == changed[1][0, 0]).all()
    second = adaptor.distil(changed[0], 2, 0)[1].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    tuned = [adaptor.fine_tune(images, x, "webp", 2, 0).state_dict() for x in (changed[1], changed[1] + 1)]
    assert any(not torch.equal(tuned[0][name], tuned[1][name]) for name in tuned[0])  # the ceiling does use them


def test_seeds(images):
    first, same, other = (adaptor.distil(images, 2, seed)[1].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["layers.0.down"], other["layers.0.down"])


def test_training_batches(images):
    torch.manual_seed(0)
    labels = ("jpeg:1", "webp:0")
    batches = list(adaptor.training_batches(3, images, labels, clean=0.5))
    assert len(batches) == 3
    names = [name for _, _, told, _ in batches for name in told]
    assert set(names) == {None, *labels}
    for originals, compressed, told, rows in batches:
        assert sorted(rows.tolist()) == list(range(len(images)))
        same = (originals == compressed).flatten(1).all(1)
        assert same.tolist() == [name is None for name in told]
        assert (originals == images[rows]).flatten(1).all(1).any()  # every second one is not augmented
        assert not (originals == images[rows]).all()


def test_training_batches_of_another_size(images):
    """Reduced to a quarter of the pixels per side, less of the originals is left."""
    errors = []
    for size in (8, 32):
        torch.manual_seed(0)
        originals, compressed, _, _ = next(adaptor.training_batches(1, images, ("jpeg:65",), sizes=(size,)))
        errors.append((originals - compressed).abs().mean())
    assert errors[0] > 2 * errors[1]


def test_compress(images):
    mild, strong = (adaptor.compress(images, "jpeg", level) for level in (65, 1))
    assert mild[0].shape == images.shape
    assert (mild[0] - images).abs().mean() < (strong[0] - images).abs().mean() < 0.3
    assert 0 < strong[1] < mild[1]


def test_levels_with_the_same_file_count_once(images):
    found = list(adaptor.conditions(images, "jpeg2000"))
    assert [condition.name for condition in found] == ["jpeg2000:0.02", "jpeg2000:0.25", "jpeg2000:1"]
    assert found[0].bpp < found[1].bpp < found[2].bpp


def test_unseen_codec_has_no_label():
    assert {label.split(":")[0] for label in LABELS} == set(adaptor.SEEN)
    assert adaptor.UNSEEN not in adaptor.SEEN


def test_wrong_labels(few):
    assert {adaptor.wrong(label) for label in adaptor.LABELS} == set(adaptor.LABELS)
    assert all(adaptor.wrong(label).split(":")[0] != label.split(":")[0] for label in adaptor.LABELS[:3])


def test_share_of_the_gap():
    """By hand: 1 of 4 right before, 2 with adapters, 3 with labels, at the real level; the other level is left out."""
    before, after, ceiling = np.eye(4, dtype=bool)[:3].cumsum(0).astype(bool)[..., None]
    rows = [
        (adaptor.Condition("jpeg", level, bpp, torch.empty(0)), {"untuned": before, "known": after, "ceiling": top})
        for level, bpp, top in ((1, 0.5, ceiling), (10, 2.0, before))
    ]
    found = adaptor.summarise("jpeg", rows, [1], clean=1.0)
    assert found["gaps"] == pytest.approx({"total": 0.75, "information": 0.25, "generalisation": 0.5})
    assert found["generalisation_gap_closed"]["known"]["value"] == pytest.approx(0.5)
    assert found["bd_accuracy"]["known"]["value"] == pytest.approx(0.25)
    assert "gaps" not in adaptor.summarise("jpeg", rows, [], clean=1.0)


def test_real_levels(monkeypatch):
    """Of levels that cost 10 of 12 answers, 10 without a ceiling that is better, and 1: the first."""
    counts = {("plain", 0): 12, ("plain", 1): 2, ("plain", 2): 2, ("plain", 3): 11}
    counts |= {("top", 1): 8, ("top", 2): 2, ("top", 3): 12}

    class Bench:
        plain, ceilings, images = "plain", {"jpeg": "top"}, 0

        def right(self, model, images):
            return (np.arange(12) < counts[model, images])[:, None]

    found = [adaptor.Condition("jpeg", level, 1.0, level) for level in (1, 2, 3)]
    monkeypatch.setattr(adaptor, "conditions", lambda images, codec: iter(found))
    monkeypatch.setattr(adaptor, "SIGNIFICANT", 0.05)
    assert adaptor.real_levels(Bench()) == {"jpeg": [1]}


def test_bootstrap(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 999)
    values = np.arange(100.0)
    one = bootstrap.bootstrap(lambda x: values[x].mean(), 100)
    assert one.value == 49.5
    assert one.low == pytest.approx(49.5 - 1.96 * values.std() / 10, abs=1)
    assert one.high == pytest.approx(49.5 + 1.96 * values.std() / 10, abs=1)
    assert bootstrap.bootstrap(lambda x, y: values[x].mean() * len(y), 100, 2).value == 99


def test_study(few, tmp_path, capsys):
    adaptor.main(tmp_path, steps=2, fine_tuning_steps=1)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() >= {"split", "images", "questions", "clean", "rows", "codecs", "conditioning", "targets"}
    assert report.keys() >= {"settings", "seed", "date", "machine", "versions"}
    assert [(row["codec"], row["level"]) for row in report["rows"][:3]] == [("jpeg", 1), ("jpeg", 10), ("jpeg", 65)]
    assert {row["codec"] for row in report["rows"]} == {*adaptor.SEEN, adaptor.UNSEEN} == report["codecs"].keys()
    for row in report["rows"]:
        told = {"known", "wrong"} if row["codec"] in adaptor.SEEN else set()
        assert row.keys() == {"codec", "level", "bpp", "loss", "gaps", "untuned", "unknown", "ceiling", *told}
        assert all(row[way]["low"] <= row[way]["mean"] <= row[way]["high"] for way in {"untuned", "ceiling", *told})
    for codec, summary in report["codecs"].items():
        expected = {"known", "unknown", "ceiling"} if codec in adaptor.SEEN else {"unknown", "ceiling"}
        assert summary["bd_accuracy"].keys() == expected
    assert len(report["targets"]) == 5
    assert adaptor.UNSEEN not in {label.split(":")[0] for label in report["settings"]["labels"]}
    model = zoo.load()[0]
    saved = adaptor.vqfast.insert_codec_adapters(model, tmp_path / "adapters.safetensors")
    assert saved.conditions == ("unknown", *report["settings"]["labels"])
    assert "BD-accuracy" in capsys.readouterr().out


def test_unknown_split():
    with pytest.raises(adaptor.typer.BadParameter, match="validation or test"):
        adaptor.main(split="train")
