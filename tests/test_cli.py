"""The command line: what it prints, what it writes, and its one-line errors."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
import safetensors.torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from typer.testing import CliRunner

import vqfast
from vqfast import cli, images, zoo

pytestmark = pytest.mark.usefixtures("one_openmp_thread")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A "3" that fills its height, white on black, as the digits of the training data."""
    image = Image.new("L", (128, 128))
    font = ImageFont.load_default(size=120)
    ImageDraw.Draw(image).text((64, 64), "3", fill=255, font=font, anchor="mm", stroke_width=4)
    image.save(path := tmp_path_factory.mktemp("image") / "three.png")
    return path


@pytest.fixture
def pale(three, tmp_path):
    """The 3 in light grey on grey, which the plain model takes for another digit."""
    Image.open(three).point(lambda level: 100 + level * 30 // 255).save(tmp_path / "pale.png")
    return tmp_path / "pale.png"


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def report(*arguments):
    result = run("tune", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def error(*arguments):
    """The one line that a command ends with."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("vqfast: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_tune_prints_both_answers(three):
    result = run("tune", three)
    assert (result.exit_code, result.stderr) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line.strip())
    assert rows["answer"].split() == ["three", "three"]
    assert all(float(value) > 0.9 for value in rows["confidence"].split())
    assert rows["start"].endswith(", chosen by the search")
    assert rows["filter"].startswith("sigma ")
    assert "search " in rows["ms"]
    assert "backward " in rows["ms"]


def test_search_is_on_unless_told(pale):
    searched, plain = report(pale), report(pale, "--no-search")
    assert searched["search"] is True
    assert plain["search"] is False
    assert searched["answer_before"] == plain["answer_before"] != "three"
    assert searched["answer_after"] == "three"
    assert "stretch" in searched["preset"]
    assert plain["preset"] == "identity"
    assert "search" not in plain["timings_ms"]
    text = run("tune", pale, "--no-search").stdout
    assert "start   identity, no search, the paper's method" in text


def test_json_is_the_tuners_result(pale):
    torch.manual_seed(0)
    got = report(pale, "--no-search", "--steps", "2")
    model, processor = zoo.load()
    inputs = processor(images=images.read_image(pale), text=zoo.prompt("which digit?"), return_tensors="pt")
    sample = vqfast.TestTimeTuner(model, vqfast.TuningConfig(steps=2)).tune(**inputs).samples[0]
    words = [processor.tokenizer.decode(token) for token in (sample.token_before, sample.token_after)]
    assert [got["answer_before"], got["answer_after"]] == words
    assert got["steps"] == 2
    assert got["question"] == "which digit?"
    assert (got["image"], got["model"], got["saved_image"]) == (str(pale), "embedded", None)
    for name in ("entropy_before", "entropy_after", "confidence_before", "confidence_after"):
        assert got[name] == pytest.approx(getattr(sample, name), rel=1e-4)
    assert got["filter"] == pytest.approx(sample.filter, rel=1e-4)


def test_other_question(three):
    assert report(three, "--question", "odd or even?")["answer_after"] == "odd"


def test_folder_answers_as_the_embedded_model(pale):
    folder = report(pale, "--model", zoo.FOLDER, "--question", "which digit?")
    embedded = report(pale)
    assert folder.pop("model") == str(zoo.FOLDER)
    assert embedded.pop("model") == "embedded"
    assert folder.pop("timings_ms").keys() == embedded.pop("timings_ms").keys()
    assert folder == embedded


def test_save_image(pale, tmp_path):
    path = tmp_path / "filtered.png"
    result = run("tune", pale, "--save-image", path)
    assert result.exit_code == 0
    saved = Image.open(path)
    assert (saved.mode, saved.size) == ("L", (128, 128))  # as the original
    low, high = saved.convert("L").getextrema()
    assert high - low > 150  # stretched; the input spans 30 levels
    assert f"saved   {path}, " in result.stdout
    assert "% of its values clipped" in result.stdout
    got = report(pale, "--save-image", path)
    assert got["saved_image"] == str(path)
    assert 0 < got["clipped"] < 0.5


class Scripted:
    """A model whose answers are given."""

    def __init__(self, *answers):
        self.answers, self.calls = list(answers), []

    def generate(self, **options):
        self.calls.append(options)
        return torch.tensor([[7, 7, *self.answers.pop(0)]])


def test_answers_are_greedy_without_prompt_and_special_tokens():
    _, processor = zoo.load()
    words = processor.tokenizer.convert_tokens_to_ids(["three", "odd", "</s>"])
    model, inputs = Scripted(words), {"input_ids": torch.tensor([[7, 7]])}
    assert cli._answer(model, processor, inputs, words[0], 5) == "three odd"
    assert model.calls == [{**inputs, "max_new_tokens": 5, "do_sample": False}]
    assert cli._answer(model, processor, inputs, words[0], 1) == "three"
    assert len(model.calls) == 1  # the first token is known already


def test_second_answer_is_the_tuned_models(pale, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "_answer", lambda model, *_: asked.append("forward" in vars(q_proj(model))) or "answer")
    report(pale)
    assert asked == [False, True]


def test_no_second_answer_where_nothing_was_tuned(three, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "_answer", lambda *_: asked.append(1) or "answer")
    tune = vqfast.TestTimeTuner.tune

    def refused(tuner, **inputs):
        result = tune(tuner, **inputs)
        object.__setattr__(result.samples[0], "tuned", False)
        return result

    monkeypatch.setattr(vqfast.TestTimeTuner, "tune", refused)
    assert report(three, "--no-search")["answer_after"] == "answer"
    assert len(asked) == 1


def q_proj(model):
    return model.model.vision_tower.encoder.layers[0].self_attn.q_proj


def test_prompt_without_a_chat_template():
    assert cli._prompt(SimpleNamespace(chat_template=None), "what?") == "<image>\nwhat?"
    assert cli._prompt(zoo.load()[1], "which digit?") == zoo.prompt("which digit?")


def test_bad_image(tmp_path, three):
    assert "nothing.png does not exist; give an image file" in error("tune", tmp_path / "nothing.png")
    (tmp_path / "half.png").write_bytes(three.read_bytes()[:300])
    assert "damaged, truncated" in error("tune", tmp_path / "half.png", "--json")
    (tmp_path / "two\nlines.txt").write_text("words")
    assert "not an image of a known format" in error("tune", tmp_path / "two\nlines.txt")


def test_bad_question(three):
    line = error("tune", three, "--question", "which letter?")
    assert "does not know the word 'letter'" in line
    assert "'odd or even?'" in line
    assert "give one: --question TEXT" in error("tune", three, "--question", " ")
    assert "give one: --question TEXT" in error("tune", three, "--model", zoo.FOLDER)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/out.png", "there is no folder .*nowhere; make it first"),
        ("out.txt", "give the name of a file that ends in .png, "),
        ("folder.png", "give the name of a file that ends in .png, "),
        ("pale.png", "it is the image that is read; give another name"),
    ],
)
def test_bad_output_is_told_before_any_work(pale, tmp_path, monkeypatch, name, message):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(images, "read_image", lambda _: pytest.fail("work was done"))
    before = pale.read_bytes()
    line = error("tune", pale, "--save-image", tmp_path / name)
    assert re.search(f"cannot save .*{message}", line)
    assert pale.read_bytes() == before


def test_output_that_cannot_be_written(three, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert "No space left on device" in error("tune", three, "--save-image", tmp_path / "out.png")


def change(folder, name, **values):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **values}))


def language_model(folder):
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())["text_config"]))


def more_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    change(folder, "config.json", vision_config={**config["vision_config"], "num_hidden_layers": 5})


def other_width(folder):
    config = json.loads((folder / "config.json").read_text())
    change(folder, "config.json", vision_config={**config["vision_config"], "intermediate_size": 64})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "there is no folder"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "Unrecognized model"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda folder: change(folder, "config.json", model_type="nonesuch"), "model type `nonesuch`"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99), "SafetensorError"),
        (language_model, "LlamaConfig"),
        (more_layers, "do not fit its config.json: 16 missing or misshapen"),
        (other_width, "do not fit its config.json: 12 missing or misshapen"),
        (lambda folder: (folder / "processor_config.json").unlink(), "OSError"),
    ],
)
def test_bad_model_folder(three, tmp_path, damage, message):
    folder = tmp_path / "model"
    shutil.copytree(zoo.FOLDER, folder)
    damage(folder)
    line = error("tune", three, "--model", folder, "--question", "which digit?")
    assert message in line
    assert str(folder) in line


def test_folder_with_a_tokenizer_only(three, monkeypatch):
    tokenizer = zoo.load()[1].tokenizer
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: tokenizer)
    line = error("tune", three, "--model", zoo.FOLDER, "--question", "which digit?")
    assert f"no processor for images and text, only {type(tokenizer).__name__};" in line


def test_folder_with_code_is_refused_without_asking(three, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(zoo.FOLDER, folder)
    auto = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"}
    change(folder, "config.json", model_type="nonesuch", auto_map=auto)
    (folder / "code.py").write_text("raise SystemExit('this ran')")
    assert "custom code" in error("tune", three, "--model", folder, "--question", "which digit?")


def test_model_without_a_vision_tower(three, monkeypatch):
    monkeypatch.setattr("vqfast.integrations.transformers.TOWER_NAMES", ("eye",))
    assert "LlavaForConditionalGeneration has no recognisable vision tower" in error("tune", three)


@pytest.mark.parametrize("package", ["transformers", "PIL"])
def test_missing_package(three, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"{package} is not installed; get it with: pip install 'vqfast[demo]'" in error("tune", three)


@pytest.mark.parametrize("package", ["typer", "rich.console"])
def test_missing_command_line_package(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "vqfast.cli")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("vqfast.cli")
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("is not installed; get it with: pip install 'vqfast[demo]'\n")


def test_unexpected_error_keeps_its_traceback(three, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(vqfast.TestTimeTuner, "tune", broken)
    result = run("tune", three)
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_usage_errors():
    for arguments in (["tune"], ["tune", "x.png", "--steps", "0"], ["tune", "x.png", "--max-new-tokens", "0"], ["fly"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Usage: " in result.stderr


def test_env():
    result = run("env")
    assert (result.exit_code, result.stderr) == (0, "")
    words = result.stdout.split()
    assert words[words.index("torch") + 1] == torch.__version__
    assert {"python", "cuda", "transformers", "triton", *vqfast.ops.__all__} <= set(words)


def test_env_json():
    result = run("env", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    info = json.loads(result.stdout)
    expected = vqfast.build_info()
    assert info["versions"].items() >= expected["versions"].items()
    assert {name: info[name] for name in ("backends", "operators")} == {
        n: expected[n] for n in ("backends", "operators")
    }
    assert {"transformers", "pillow"} <= set(info["versions"])


def test_console_script_and_light_import(three, tmp_path):
    """In processes of their own: the answer is all that is printed, and vqfast itself does not import the CLI."""
    folder = tmp_path / "model"
    shutil.copytree(zoo.FOLDER, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({**weights, "extra": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    Image.open(three).save(tmp_path / "three.png", exif=b"MM\0*\0\0\0\x08\xff\xff")  # of both there would be warnings
    script = "from vqfast.cli import main; main()"
    arguments = ["tune", str(tmp_path / "three.png"), "--json", "--model", str(folder), "--question", "which digit?"]
    code = (
        "import sys, vqfast; print([m for m in ('typer', 'rich', 'vqfast.cli', 'vqfast.images') if m in sys.modules])"
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    with (
        subprocess.Popen([sys.executable, "-c", script, *arguments], **pipes) as first,
        subprocess.Popen([sys.executable, "-c", code], **pipes) as second,
    ):
        answer, light = first.communicate(), second.communicate()
    assert answer[1] == ""
    assert json.loads(answer[0])["answer_after"] == "three"
    assert light == ("[]\n", "")
