"""Pooling over a stream: which presets are asked for, which is chosen, what is remembered."""

import json

import pytest
import torch

from vqfast.tuning.stream import OPENING, Stream

PRESETS, VALID = 9, torch.ones(1, 1, dtype=torch.bool)


def logits(margins):
    """[E, B, 1, 3] of the margins [E, B]."""
    margins = torch.as_tensor(margins, dtype=torch.float32)
    return torch.stack([margins, torch.zeros_like(margins), torch.full_like(margins, -9.0)], -1)[:, :, None]


def feed(stream, best, images, seed=0, noise=1.0):
    """Images on which preset `best` has the largest margin on average; what was asked and chosen."""
    generator, asked, chosen = torch.Generator().manual_seed(seed), [], []
    for _ in range(images):
        sample = 3 * torch.rand((), generator=generator)  # some samples are easier than others, for every preset
        margins = 2 + sample + noise * torch.randn(PRESETS, generator=generator).clamp(-2, 2)
        margins[best] += 1.5
        asked.append(stream.ask())
        chosen.append(stream.choose(asked[-1], logits(margins[asked[-1], None]), VALID).item())
    return asked, chosen


def test_asks_for_all_presets_first_then_for_the_untouched_image_the_best_and_every_other_in_turn():
    stream = Stream(PRESETS, evaluations=4)
    asked, _ = feed(stream, 5, 100)
    assert asked[:OPENING] == [list(range(PRESETS))] * OPENING
    for indices in asked[OPENING:]:
        assert indices == sorted(set(indices))
        assert len(indices) == 4
        assert indices[0] == 0
    assert all(5 in indices for indices in asked[50:])
    for start in range(50, 96):
        assert {i for indices in asked[start : start + 4] for i in indices} == set(range(PRESETS))
    assert stream.ask() == stream.ask()


def test_asks_for_no_more_presets_than_there_are():
    assert Stream(2, evaluations=4).ask() == [0, 1]


@pytest.mark.parametrize("best", [0, 3, 8])
def test_finds_the_best_preset_of_a_stream_that_single_images_hide(best):
    _, chosen = feed(Stream(PRESETS), best, 200)
    assert chosen[100:].count(best) > 90


def test_follows_a_change_as_fast_after_a_long_stream_as_after_a_short_one():
    for images in (200, 2000):
        stream = Stream(PRESETS)
        feed(stream, 3, images)
        _, chosen = feed(stream, 7, 400, seed=1)
        assert chosen[300:].count(7) > 90


def test_an_image_that_is_harder_for_all_presets_alike_changes_no_mean():
    stream = Stream(PRESETS)
    feed(stream, 3, 50)
    before, asked = stream.means.clone(), stream.ask()
    stream.choose(asked, logits((stream.means[asked] + 20)[:, None]), VALID)
    torch.testing.assert_close(stream.means, before, rtol=0, atol=1e-5)


def test_an_image_on_which_another_preset_is_far_surer_takes_that_one():
    stream = Stream(PRESETS)
    feed(stream, 3, 50)
    asked = stream.ask()
    margins = torch.full((len(asked), 1), 0.1)
    margins[0] = 60
    assert stream.choose(asked, logits(margins), VALID).item() == 0


def test_the_same_images_give_the_same_stream():
    one, other = Stream(PRESETS), Stream(PRESETS)
    torch.manual_seed(1)
    first = feed(one, 3, 60)
    torch.manual_seed(2)
    assert feed(other, 3, 60) == first
    assert one.state_dict() == other.state_dict()


def test_what_is_not_finite_is_not_chosen_and_does_not_stay():
    stream, nan, inf = Stream(PRESETS), float("nan"), float("inf")
    feed(stream, 3, 50)
    asked = stream.ask()
    broken = logits([[2.0]] * len(asked))
    broken[asked.index(3), :, :, 2] = nan
    chosen = stream.choose(asked, broken, VALID).item()
    assert chosen in set(asked) - {3}
    assert stream.means.isfinite().all()

    before = stream.state_dict()
    for value in (nan, inf, -inf):
        assert stream.choose(asked, torch.full((len(asked), 1, 1, 3), value), VALID).item() == 0
    assert stream.choose(asked[::-1], torch.full((len(asked), 1, 1, 3), nan), VALID).item() == 0
    assert stream.state_dict() == {**before, "images": before["images"] + 4}


def test_a_preset_that_is_never_finite_loses_its_place():
    stream = Stream(PRESETS)
    feed(stream, 3, 50)
    for _ in range(100):
        asked = stream.ask()
        broken = logits([[2.0]] * len(asked))
        if 3 in asked:
            broken[asked.index(3)] = float("nan")
        stream.choose(asked, broken, VALID)
    assert stream.means.argmax() != 3


def test_positions_that_do_not_count_are_not_looked_at():
    stream = Stream(3)
    margins = torch.tensor([[1.0], [3.0], [2.0]])
    padded = torch.cat([logits(margins), torch.full((3, 1, 1, 3), float("nan"))], 2)
    assert stream.choose([0, 1, 2], padded, torch.tensor([[True, False]])).item() == 1
    means = stream.means.clone()
    stream.reset()
    stream.choose([0, 1, 2], logits(margins), VALID)
    assert torch.equal(stream.means, means)


def test_a_batch_counts_as_its_images_and_each_sample_chooses_for_itself():
    stream, valid = Stream(3), torch.ones(4, 1, dtype=torch.bool)
    steady = logits(torch.tensor([[1.0], [3.0], [2.0]]))
    stream.choose([0, 1, 2], steady.expand(-1, 100, -1, -1), VALID.expand(100, 1))
    margins = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0], [2.0, 2.0, 20.0, float("nan")]])
    batch = logits(margins)
    batch[:, 1] = float("nan")
    assert stream.choose([0, 1, 2], batch, valid).tolist() == [1, 0, 2, 1]
    assert (stream.images, stream.counts.tolist()) == (104, [103, 103, 103])

    one, other = Stream(3), Stream(3)
    one.choose([0, 1, 2], batch[:, [0, 0, 0]], valid[:3])
    other.choose([0, 1, 2], batch[:, [0, 1, 0, 0]], valid)  # the one without a finite preset teaches nothing
    assert torch.equal(one.means, other.means)

    one, many = Stream(3), Stream(3)
    for _ in range(400):
        one.choose([0, 1, 2], steady, VALID)
    for _ in range(100):
        many.choose([0, 1, 2], steady.expand(-1, 4, -1, -1), valid)
    moved = logits(torch.tensor([[5.0], [3.0], [2.0]]))
    for _ in range(4):
        one.choose([0, 1, 2], moved, VALID)
    many.choose([0, 1, 2], moved.expand(-1, 4, -1, -1), valid)
    torch.testing.assert_close(one.means, many.means)


def test_a_stored_stream_goes_on_as_if_it_had_not_stopped():
    stream, restored = Stream(PRESETS), Stream(PRESETS)
    feed(stream, 3, 37)
    restored.load_state_dict(json.loads(json.dumps(stream.state_dict(), allow_nan=False)))
    assert feed(stream, 5, 60, seed=1) == feed(restored, 5, 60, seed=1)
    assert stream.state_dict() == restored.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": [0.0] * 3}, r"means of a stream of 9 presets must be 9 finite numbers; got \[0.0, 0.0, 0.0\]"),
        ({"means": [float("nan")] * 9}, "9 finite numbers; got"),
        ({"means": "123456789"}, "9 finite numbers; got '123456789'"),
        ({"counts": [-1] * 9}, "counts of a stream of 9 presets must be 9 whole numbers from 0; got"),
        ({"last": [0.5] * 9}, "last of a stream of 9 presets must be 9 whole numbers from 0; got"),
        ({"images": None}, r"images of a stream of 9 presets must be 1 whole numbers from 0; got \[None\]"),
        ({"extra": 1}, "a state has the keys images, means, counts, last; got images, means, counts, last, extra"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    stream = Stream(PRESETS)
    feed(stream, 3, 10)
    before = stream.state_dict()
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict({**Stream(PRESETS).state_dict(), **change})
    assert stream.state_dict() == before


def test_reset_forgets_and_repr_tells():
    stream = Stream(PRESETS)
    feed(stream, 3, 10)
    assert repr(stream).startswith("Stream(10 images, 6.0 of 9 presets each, means [")
    stream.reset()
    assert stream.state_dict() == Stream(PRESETS).state_dict()
    assert stream.ask() == list(range(PRESETS))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"evaluations must be at least 3 .*; got 2"):
        Stream(PRESETS, evaluations=2)
    with pytest.raises(ValueError, match="presets must be at least 1; got 0"):
        Stream(0)
    for indices in ([0, 1], [0, 1, 9], [0, 1, -1]):
        with pytest.raises(ValueError, match=r"indices must be 3 presets from 0 to 8"):
            Stream(PRESETS).choose(indices, logits([[1.0]] * 3), VALID)
