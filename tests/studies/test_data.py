"""Datasets: the digits, and a folder of a user's own with whatever may be wrong in it."""

import json
import os
import signal

import pytest
from PIL import Image

pytest.importorskip("sklearn")
from studies import data
from vqfast import zoo
from vqfast.images import ImageError

GOOD = {"image": "a.png", "question": "what?", "answer": "one"}


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate("abc"):
        Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    return tmp_path


def write(folder, *lines):
    file = folder / "questions.jsonl"
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return file


def test_digits_are_the_zoos():
    whole = data.load("digits", "validation", None, 0)
    rows = zoo.questions("validation")
    assert (whole.kind, len(whole.items)) == ("digits", 200)
    for item, image, (_, prompt, answer) in zip(whole.items, rows[1::3], rows[1::3], strict=True):
        assert item.image().tobytes() == image[0].tobytes()
        question, accepted = item.questions[1]
        assert zoo.prompt(question) == prompt
        assert accepted == (answer,)


def test_a_seed_draws_the_same_images():
    names = [[item.name for item in data.load("digits", "test", 5, seed).items] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert len(set(names[0])) == 5


def test_questions_are_gathered_by_image(folder):
    more = {"image": "b.png", "question": "who?", "answer": ["two", "2"], "source": "kept by nobody"}
    items = data.load(str(write(folder, GOOD, b"", more, {**GOOD, "question": "why?"})), "test", None, 0).items
    assert [item.name for item in items] == ["a.png", "b.png"]
    assert items[0].questions == (("what?", ("one",)), ("why?", ("one",)))
    assert items[1].questions == (("who?", ("two", "2")),)
    assert items[1].image().getpixel((0, 0)) == (50, 0, 0)
    assert items[0].digest != items[1].digest


def test_images_are_not_decoded_while_reading(folder):
    """So that one that is damaged or missing does not end a run."""
    lines = [{**GOOD, "image": name} for name in ("broken.png", "missing.png")]
    for item in data.read_questions(write(folder, *lines)):
        with pytest.raises(ImageError, match=item.name):
            item.image()


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "pipe.png")
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for the pipe"))
    signal.alarm(5)
    try:
        (item,) = data.read_questions(write(folder, {**GOOD, "image": "pipe.png"}))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ImageError, match=r"pipe.png is not a regular file"):
        item.image()


def test_an_image_is_one_however_it_is_written(folder):
    (folder / "link.png").symlink_to(folder / "a.png")
    names = ("a.png", "./a.png", "x/../a.png", "link.png")
    (item,) = data.read_questions(write(folder, *({**GOOD, "image": name} for name in names)))
    assert (item.name, len(item.questions)) == ("a.png", 4)


def test_an_image_that_a_codec_refuses_is_left_out(folder):
    """As one that cannot be decoded, so that every condition has the same images."""
    for name, width in (("wide.png", data.MAX_SIDE + 1), ("widest.png", data.MAX_SIDE)):
        Image.new("RGB", (width, 2)).save(folder / name)
    wide, widest = data.read_questions(write(folder, *({**GOOD, "image": f"{w}.png"} for w in ("wide", "widest"))))
    with pytest.raises(ImageError, match=r"wide.png has 16384 x 2 pixels, at most 16,383 a side"):
        wide.image()
    assert widest.image().size == (data.MAX_SIDE, 2)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "Expecting property name"),
        (b"\xff", "can't decode"),
        (b"[" * 100_000, "recursion"),
        (b"[1]", "no JSON object"),
        ({"question": "what?", "answer": "one"}, "'image' must be a text"),
        ({**GOOD, "question": " "}, "'question' must be a text"),
        ({**GOOD, "answer": []}, "'answer' must be a text that is not empty or a list of such; got \\[\\]"),
        ({**GOOD, "answer": ["one", 1]}, "'answer' must be a text"),
        ({**GOOD, "image": "\ud800"}, "surrogates"),
        ({**GOOD, "image": "../a.png"}, "leaves the folder"),
        ({**GOOD, "image": "/etc/passwd"}, "leaves the folder"),
        ({**GOOD, "image": "a\0.png"}, "null byte"),
    ],
)
def test_a_bad_line_is_named(folder, line, problem):
    with pytest.raises(ValueError, match=f"questions.jsonl, line 2: .*{problem}"):
        data.read_questions(write(folder, GOOD, line))


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    (folder / "a.png").rename(outside)
    (folder / "a.png").symlink_to(outside)
    with pytest.raises(ValueError, match=r"line 1: .*leaves the folder"):
        data.read_questions(write(folder, GOOD))


@pytest.mark.parametrize(("name", "split"), [("letters", "test"), ("digits", "train")])
def test_unknown_names_list_the_known(name, split):
    with pytest.raises(ValueError, match=r"digits, or a JSONL file|validation, test"):
        data.load(name, split, 1, 0)


def test_no_question(folder):
    with pytest.raises(ValueError, match="holds no question"):
        data.read_questions(write(folder, b""))


@pytest.mark.parametrize(
    ("answer", "right"), [("Cat", True), (" a cat.\n", True), ("cats", False), ("", False), ("a  cat", False)]
)
def test_answers_are_compared_normalised(answer, right):
    assert data.is_right(answer, ("cat.", "A cat")) is right
