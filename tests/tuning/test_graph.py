"""The step as a CUDA graph: what it may not do, and the graphs that are kept. A real capture, at the end, needs a GPU.

Without one, `run_again` stands for a capture: its replay runs the step anew on the graph's static inputs.
"""

from dataclasses import replace

import pytest
import torch

from helpers import SEARCH, assert_unchanged, fingerprint, rows, waits
from vqfast import TestTimeTuner, TuningConfig, zoo
from vqfast.tuning import graph


@pytest.mark.parametrize(
    "config",
    [
        TuningConfig(),
        TuningConfig(steps=2, guard=False),
        TuningConfig(filter="lowrank", train_tone=True),
        SEARCH,
        TuningConfig(filter="spectral"),
        TuningConfig(objective="marginal_entropy", views=2),
        TuningConfig(objective=lambda output, valid: output.logits.logsumexp(-1)[:, 0]),
    ],
    ids=["paper", "two-steps", "lowrank", "search", "spectral", "marginal", "callable"],
)
@pytest.mark.parametrize("keep_cache", [False, True])
def test_a_step_never_waits_for_the_device(model, batch, config, keep_cache):
    with TestTimeTuner(model, config) as tuner:
        assert waits(tuner, batch, keep_cache=keep_cache) == {}


def test_a_wait_would_be_seen(model, batch):
    def reads_a_value(output, valid):
        return output.logits.logsumexp(-1)[:, 0] * output.logits.amax().item()

    with TestTimeTuner(model, TuningConfig(objective=reads_a_value)) as tuner:
        assert waits(tuner, batch) == {"_local_scalar_dense": 1, "item": 1}
        tuner.tune(**batch)


def run_again(body, pool):
    body()
    return body, pool, 0


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(graph, "unavailable", lambda device: None)
    monkeypatch.setattr(graph, "capture", run_again)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("config", [TuningConfig(), SEARCH], ids=["paper", "search"])
def test_a_replay_answers_to_its_own_inputs(model, wide_batch, config):
    batches = [rows(wide_batch, *range(start, start + 5)) for start in (0, 5, 10, 0)]
    with TestTimeTuner(model, TuningConfig(mode="eager", candidates=config.candidates)) as tuner:
        expected = [tuner.tune(**batch) for batch in batches]
        texts = [tuner.generate(**batch, max_new_tokens=2) for batch in batches]
    with TestTimeTuner(model, replace(config, mode="graph")) as tuner:
        for batch, eager in zip(batches, expected, strict=True):
            result = tuner.tune(**batch)
            assert torch.equal(result.logits, eager.logits)
            assert result.samples == eager.samples
            assert "step" in result.timings_ms
        assert (tuner.graphs.misses, tuner.graphs.hits) == (1, 3)
        for batch, text in zip(batches, texts, strict=True):
            assert torch.equal(tuner.generate(**batch, max_new_tokens=2), text)
        assert (tuner.graphs.misses, tuner.graphs.hits) == (2, 6)  # with a key-value cache it is another graph


@pytest.mark.usefixtures("without_gpu")
def test_graphs_are_bounded_and_the_one_used_longest_ago_goes(model, batch):
    with TestTimeTuner(model, TuningConfig(mode="graph")) as tuner:
        tuner.graphs.capacity = 2
        for size in (1, 2, 1, 3, 1, 2):  # 3 drives out 2, and 2 then 3
            tuner.tune(**rows(batch, *range(size)))
        assert len(tuner.graphs) == 2
        assert (tuner.graphs.misses, tuner.graphs.hits) == (4, 2)
        assert repr(tuner.graphs) == "StepGraphs(2 of at most 2, 0 MB, 2 hits, 4 misses)"
    assert len(tuner.graphs) == 0


@pytest.mark.usefixtures("without_gpu")
def test_a_model_with_new_weights_is_captured_anew(batch):
    model, _ = zoo.load()
    with TestTimeTuner(model, TuningConfig(mode="graph")) as tuner:
        tuner.tune(**batch)
        tuner.tune(**batch)
        model.lm_head.weight.data = 2 * model.lm_head.weight.data
        tuner.tune(**batch)
        assert (tuner.graphs.misses, tuner.graphs.hits) == (2, 1)


@pytest.mark.usefixtures("without_gpu")
def test_auto_captures_a_shape_that_keeps_coming(model, batch):
    with TestTimeTuner(model) as tuner:
        for _ in range(graph.SEEN + 2):
            tuner.tune(**batch)
            if len(tuner.graphs) == 0:
                tuner.tune(**rows(batch, 0))
        assert (tuner.graphs.misses, tuner.graphs.hits) == (1, 2)


@pytest.mark.usefixtures("without_gpu")
def test_a_replay_refuses_what_a_step_refuses(model, batch):
    with TestTimeTuner(model, TuningConfig(mode="graph")) as tuner:
        expected = tuner.tune(**batch)
        with pytest.raises(ValueError, match="the pixels contain NaN"):
            tuner.tune(**{**batch, "pixel_values": batch["pixel_values"] * torch.nan})
        with pytest.raises(ValueError, match="padded on the left"):
            tuner.tune(**{**batch, "attention_mask": batch["attention_mask"] * 0})
        assert torch.equal(tuner.tune(**batch).logits, expected.logits)
        assert tuner.graphs.misses == 1


@pytest.mark.usefixtures("without_gpu")
def test_prompts_of_one_length_with_other_answer_lengths_are_other_graphs(model, batch):
    with TestTimeTuner(model, TuningConfig(mode="graph", answer_tokens=2)) as tuner:
        subject = tuner._subject
        keys = {graph._key(batch, positions, False) for positions in (1, 2)}
        assert len(keys) == 2
        assert subject is not None
        assert torch.equal(tuner.tune(**batch).logits, tuner.tune(**batch).logits)


def test_a_model_that_cannot_be_captured_runs_eagerly_or_says_so(model, batch, monkeypatch):
    def refuse(body, pool):
        body()
        raise graph.CaptureError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "unavailable", lambda device: None)
    monkeypatch.setattr(graph, "capture", refuse)
    before = fingerprint(model)
    with TestTimeTuner(model, TuningConfig(mode="eager")) as tuner:
        expected = tuner.tune(**batch)
    with TestTimeTuner(model) as tuner:
        for _ in range(graph.SEEN):
            assert tuner.mode[0] == "graph"
            assert torch.equal(tuner.tune(**batch).logits, expected.logits)
        assert tuner.mode[0] == "eager"
        assert "not permitted" in tuner.mode[1]
        assert torch.equal(tuner.tune(**batch).logits, expected.logits)
        assert len(tuner.graphs) == 0
    with TestTimeTuner(model, TuningConfig(mode="graph")) as tuner:
        with pytest.raises(graph.CaptureError, match="not permitted"):
            tuner.tune(**batch)
        assert len(tuner.graphs) == 0
    assert_unchanged(model, before)


def test_graph_by_name_on_the_cpu_is_refused(model, batch):
    with (
        TestTimeTuner(model, TuningConfig(mode="graph")) as tuner,
        pytest.raises(ValueError, match=r"mode='graph' cannot run: the model is on cpu"),
    ):
        tuner.tune(**batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("config", [TuningConfig(), SEARCH], ids=["paper", "search"])
def test_captured_steps_equal_eager_ones(wide_batch, config):
    model = zoo.load()[0].cuda()
    batches = [{n: v[i : i + 5].cuda() for n, v in wide_batch.items()} for i in (0, 5, 10, 0)]
    with TestTimeTuner(model, TuningConfig(mode="eager", candidates=config.candidates)) as tuner:
        expected = [tuner.tune(**batch).logits for batch in batches]
        texts = [tuner.generate(**batch, max_new_tokens=3) for batch in batches]
    with TestTimeTuner(model, TuningConfig(mode="graph", candidates=config.candidates)) as tuner:
        for batch, logits in zip(batches, expected, strict=True):
            torch.testing.assert_close(tuner.tune(**batch).logits, logits, rtol=1e-3, atol=1e-3)
        assert (tuner.graphs.misses, tuner.graphs.hits) == (1, 3)
        for batch, text in zip(batches, texts, strict=True):
            assert torch.equal(tuner.generate(**batch, max_new_tokens=3), text)
        assert tuner.graphs.reserved_bytes > 0
