"""Every method on the embedded model, as itself and as a folder."""

import contextlib
import json
import shutil
import sys

import pytest
import torch
from PIL import ImageOps

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("cv2", reason="needs the extra: pip install vqfast[studies]")
import vqfast
from studies import data, methods
from studies.degradations import degrade
from studies.demo import Condition as Drawn
from studies.demo import filtered_right
from vqfast import TestTimeTuner, zoo
from vqfast.tuning.candidates import DEFAULT_PRESETS

pytestmark = pytest.mark.usefixtures("one_openmp_thread")


@pytest.fixture(scope="module")
def model():
    return methods.load_model("digits", 1)


@pytest.fixture(scope="module")
def samples():
    """Ten noisy images with all their questions: images, questions, accepted answers."""
    items = data.load("digits", "validation", 10, 0).items
    noisy = [degrade(item.image(), "gaussian_noise", 0.5, item.number) for item in items]
    rows = [
        (image, question, accepted)
        for image, item in zip(noisy, items, strict=True)
        for question, accepted in item.questions
    ]
    return tuple(map(list, zip(*rows, strict=True)))


def given(model, method, samples, codec=None):
    images, questions, _ = samples
    return methods.answer(model, method, images, questions, codec)


@pytest.mark.parametrize("method", methods.METHODS)
def test_answers_of_a_method(model, samples, method):
    answers = given(model, method, samples)
    assert [len(column) for column in answers] == [30, 30, 30]
    assert all(0 < p <= 1 for p in answers.confidence)
    assert all(h >= 0 for h in answers.entropy)
    words = set(model.processor.tokenizer.get_vocab())
    assert set(answers.text) <= words
    right = sum(data.is_right(t, accepted) for t, accepted in zip(answers.text, samples[2], strict=True))
    assert right >= 12


def test_untuned_is_the_plain_model(model, samples):
    inputs = model.inputs(*samples[:2])
    with torch.no_grad():
        probability = model.network(**inputs, logits_to_keep=1).logits[:, -1].double().softmax(-1)
    answers = given(model, "untuned", samples)
    assert answers.confidence == pytest.approx(probability.amax(-1).tolist(), abs=1e-5)
    assert answers.entropy == pytest.approx(torch.special.entr(probability).sum(-1).tolist(), abs=1e-5)
    words = model.processor.batch_decode(probability.argmax(-1, keepdim=True))
    assert answers.text == words


@pytest.mark.parametrize(("method", "config"), methods.TUNERS.items())
def test_tuned_is_the_tuner(model, samples, method, config):
    answers = given(model, method, samples)
    inputs = model.inputs(*(column[:24] for column in samples[:2]))
    with TestTimeTuner(model.network, config) as tuner:
        result = tuner.tune(**inputs)
    assert answers.confidence[:24] == pytest.approx([s.confidence_after for s in result.samples], abs=1e-5)
    assert answers.entropy[:24] == pytest.approx([s.entropy_after for s in result.samples], abs=1e-5)


def test_filters_are_those_of_the_demo(model, samples):
    images, questions, accepted = samples
    ids = torch.tensor(model.processor.tokenizer.convert_tokens_to_ids([first for first, *_ in accepted]))
    expected = filtered_right(
        model.network, model.processor, DEFAULT_PRESETS[1:], Drawn(images, model.inputs(images, questions), ids)
    )
    for preset, right in zip(DEFAULT_PRESETS[1:], expected.tolist(), strict=True):
        text = given(model, f"filter:{preset.name}", samples).text
        assert [t == first for t, (first, *_) in zip(text, accepted, strict=True)] == right


def test_a_filter_refuses_tiles(model):
    tiles = {"pixel_values": torch.zeros(2, 3, 3, 32, 32), "input_ids": torch.zeros(2, 5, dtype=torch.long)}
    with (
        methods.behind_filter(model, "stretch", None) as run,
        pytest.raises(ValueError, match="leave such methods out"),
    ):
        run(tiles)


def test_a_folder_answers_as_the_embedded_model(model, samples):
    folder = methods.load_model(str(zoo.FOLDER), 1)
    for method in ("untuned", "one_step"):
        assert given(folder, method, samples) == given(model, method, samples)


@pytest.fixture
def edited(tmp_path):
    """The embedded model's folder with a JSON file changed."""

    def edit(file, **values):
        shutil.copytree(zoo.FOLDER, tmp_path, dirs_exist_ok=True)
        (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | values))
        return str(tmp_path)

    return edit


def test_answers_are_greedy_whatever_the_folder_asks_for(model, samples, edited):
    asked = dict(num_beams=2, num_return_sequences=2, repetition_penalty=5.0, suppress_tokens=[5, 6, 7])
    other = methods.load_model(edited("generation_config.json", **asked), 3)
    plain = methods.VisionLanguageModel(model.network, model.processor, 3)
    assert given(other, "untuned", samples) == given(plain, "untuned", samples)


def test_an_encoder_decoder_is_refused(edited):
    """Its answers do not start behind the prompt."""
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        methods.load_model(edited("config.json", is_encoder_decoder=True), 1)


def test_a_filter_works_on_pixels_that_are_not_normalised(model, samples, monkeypatch):
    tones = []
    monkeypatch.setattr(methods, "render", lambda chosen, pixels, taps, *tone: tones.append(tone) or 1 / 0)
    monkeypatch.setattr(model.processor.image_processor, "do_normalize", False)
    with pytest.raises(ZeroDivisionError):
        given(model, "filter:stretch", samples)
    assert [value.tolist() for value in tones[0]] == [[0, 0, 0], [1, 1, 1]]


def test_longer_answers(model, samples):
    """The tuned model writes on: the digits' answers end after one word, their first tokens are the same."""
    longer = methods.VisionLanguageModel(model.network, model.processor, 3)
    for method in ("untuned", "search"):
        one, more = given(model, method, samples), given(longer, method, samples)
        assert more.confidence == pytest.approx(one.confidence, abs=1e-5)
        assert [text.split()[0] for text in more.text] == one.text


def test_a_restorer_of_ones_own(model, samples, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from PIL import ImageOps\ncalls = []\ndef invert(image):\n"
        "    calls.append(image)\n    return ImageOps.invert(image)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    before = methods.identity("restore:mine:invert")
    answers = given(model, "restore:mine:invert", samples)
    assert len(sys.modules["mine"].calls) == 10  # once per image, not per question
    inverted = {id(image): ImageOps.invert(image) for image in samples[0]}
    assert answers == given(model, "untuned", ([inverted[id(image)] for image in samples[0]], *samples[1:]))
    with (tmp_path / "mine.py").open("a") as file:
        file.write("# changed\n")
    assert methods.identity("restore:mine:invert") != before


def test_a_decorated_restorer_is_known_by_its_own_file(tmp_path, monkeypatch):
    (tmp_path / "decorator.py").write_text(
        "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def g(image): return f(f(image))\n    return g\n"
    )
    own = tmp_path / "decorated.py"
    own.write_text(
        "from decorator import twice\nclass Mine:\n    @staticmethod\n    @twice\n    def same(image): return image\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert methods.identity("restore:decorated:Mine.same") == methods.digest(own)


def test_an_adaptor_is_told_the_codec_where_it_knows_it(model, samples, tmp_path, monkeypatch):
    class Adapters:
        conditions = ("unknown", "jpeg:5")
        told, removed = [], 0

        @contextlib.contextmanager
        def condition(self, names):
            Adapters.told.append(names)
            yield

        def remove(self):
            Adapters.removed += 1

    monkeypatch.setattr(vqfast, "insert_codec_adapters", lambda network, path: Adapters(), raising=False)
    file = tmp_path / "adapters.safetensors"
    file.write_bytes(b"weights")
    assert methods.identity(f"codec_adaptor:{file}") == methods.digest(file)
    for codec in ("jpeg:5", "webp:5", None):
        assert given(model, f"codec_adaptor:{file}", samples, codec) == given(model, "untuned", samples)
    assert Adapters.told == ["jpeg:5", None, None]
    assert Adapters.removed == 3


@pytest.mark.parametrize(
    "method", ["tuned", "restore:best", "restore:os:missing", "restore:nowhere:f", "filter:blur", "codec_adaptor:none"]
)
def test_unknown_methods_list_the_known(method):
    with pytest.raises(ValueError, match=r"untuned, restore:median.*search|no function that can be imported"):
        methods.identity(method)


def test_unknown_models(tmp_path):
    with pytest.raises(ValueError, match="digits, or a transformers folder"):
        methods.load_model(str(tmp_path), 1)


def test_a_folder_is_known_by_its_weights_and_its_configuration(tmp_path):
    digests = []
    for name, content in {"a.safetensors": b"1", "config.json": b"{}", "README.md": b"text"}.items():
        (tmp_path / name).write_bytes(content)
        digests.append(methods.digest(tmp_path))
    assert digests[0] != digests[1] == digests[2]
