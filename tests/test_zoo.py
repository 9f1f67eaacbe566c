"""The embedded digits model: files, API, accuracy on the test split, reproducible training."""

import re
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vqfast import zoo

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": zoo.QUESTIONS[0]}]}]


@pytest.fixture(scope="module")
def digits():
    return zoo.load()


@pytest.fixture(scope="module")
def rows():
    return zoo.questions("test")


def encode(processor, rows):
    return processor(
        images=[image for image, _, _ in rows], text=[text for _, text, _ in rows], padding=True, return_tensors="pt"
    )


def test_folder():
    weights = zoo.FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 6e6
    assert {path.suffix for path in zoo.FOLDER.iterdir()} == {".safetensors", ".json", ".jinja"}
    for path in set(zoo.FOLDER.iterdir()) - {weights}:
        assert not re.search(r"_name_or_path|/(home|root|tmp|work)\b", path.read_text())


def test_load(digits):
    model, _ = digits
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(model.model.vision_tower.encoder.layers) >= 4
    assert len(model.model.language_model.layers) >= 2


def test_accuracy(digits, rows):
    model, processor = digits
    inputs = encode(processor, rows)
    with torch.inference_mode():
        predicted = torch.cat(
            [
                model(**{name: value[start : start + 100] for name, value in inputs.items()}, logits_to_keep=1)
                .logits[:, -1]
                .argmax(-1)
                for start in range(0, len(rows), 100)
            ]
        )
    words = processor.tokenizer.convert_ids_to_tokens(predicted)
    correct = [word == answer for word, (_, _, answer) in zip(words, rows, strict=True)]
    assert sum(correct) / len(rows) >= 0.97


def test_plain_transformers(digits, rows):
    model, processor = digits
    plain = LlavaForConditionalGeneration.from_pretrained(zoo.FOLDER).eval()
    inputs = encode(AutoProcessor.from_pretrained(zoo.FOLDER), rows[:6])
    with torch.inference_mode():
        torch.testing.assert_close(plain(**inputs).logits, model(**encode(processor, rows[:6])).logits, rtol=0, atol=0)


def test_generate(digits, rows):
    model, processor = digits
    inputs = encode(processor, rows[:30])
    new = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    assert new.shape == (30, 2)
    assert (new[:, 1] == processor.tokenizer.eos_token_id).all()
    answers = processor.batch_decode(new, skip_special_tokens=True)
    assert sum(a == b for a, (_, _, b) in zip(answers, rows, strict=False)) >= 27


def test_padding_does_not_matter(digits, rows):
    """Prompts are 69 or 70 tokens long: in a batch, the shorter one is padded on the left."""
    model, processor = digits
    batch = model(**encode(processor, rows[:3])).logits[:, -1]
    single = torch.cat([model(**encode(processor, [row])).logits[:, -1] for row in rows[:3]])
    torch.testing.assert_close(batch, single, rtol=1e-4, atol=1e-4)


def test_chat_template(digits):
    _, processor = digits
    assert processor.apply_chat_template(CHAT, add_generation_prompt=True) == zoo.prompt(zoo.QUESTIONS[0])


def test_image_of_any_size(digits, rows):
    _, processor = digits
    image, text, _ = rows[0]
    inputs = processor(images=image.resize((100, 50)).convert("L"), text=text, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)


def test_unknown_word(digits, rows):
    _, processor = digits
    with pytest.raises(ValueError, match=r"'letter'.*'which digit\?'.*vqfast\.zoo\.prompt"):
        processor(images=rows[0][0], text=zoo.prompt("which letter?"), return_tensors="pt")


def test_splits():
    """1797 images, none in two splits (the handwritten digits have no two equal images)."""
    images = {split: [image.tobytes() for image, _, _ in zoo.questions(split)[::3]] for split in zoo.SPLITS}
    assert {split: len(group) for split, group in images.items()} == {"train": 1097, "validation": 200, "test": 500}
    assert len(set().union(*images.values())) == 1797


def test_questions(rows):
    assert [text for _, text, _ in rows[:3]] == [zoo.prompt(question) for question in zoo.QUESTIONS]
    image, _, _ = rows[0]
    assert (image.mode, image.size) == ("RGB", (32, 32))
    parity = zoo.questions("test", ["odd or even?"])
    assert [(text, answer) for _, text, answer in parity] == [row[1:] for row in rows[1::3]]


def test_questions_errors(monkeypatch):
    with pytest.raises(ValueError, match="train, validation, test"):
        zoo.questions("dev")
    with pytest.raises(ValueError, match="which digit"):
        zoo.questions("test", ["which letter?"])
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install vqfast\[demo\]"):
        zoo.questions("test")


def test_training_is_reproducible():
    from vqfast.zoo.train import train

    first, second = train(3).state_dict(), train(3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_packed_questions_equal_separate_ones(digits, rows):
    """Training lays the three questions behind one image; logits are those of three separate prompts."""
    from vqfast.zoo.train import pack

    model, processor = digits
    ids, mask, positions, gaps = pack(processor)
    inputs = encode(processor, rows[:3])
    packed = model(
        input_ids=ids[None],
        pixel_values=inputs["pixel_values"][:1],
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=gaps - 1,
    ).logits[0]
    torch.testing.assert_close(packed, model(**inputs).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_saved_again_it_loads_with_plain_transformers(tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

    model, processor = zoo.load()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path, backend="pil"), LlavaProcessor)
    LlavaForConditionalGeneration.from_pretrained(tmp_path)
