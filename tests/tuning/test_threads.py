"""Several threads: calls of one tuner run one after the other, two models side by side; no bit depends on it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers import SEARCH, plain_logits, rows
from vqfast import TestTimeTuner, TuningConfig, zoo

THREADS = 8
PATIENCE = 60  # seconds until a thread that waits counts as stuck


@pytest.fixture
def pool():
    """Eight threads at work together, with one OpenMP thread each and here: a vendor's product may sum in another order
    on two. A thread takes the number that was set last, anywhere, before it first computes."""
    before, together = torch.get_num_threads(), threading.Barrier(THREADS)
    torch.set_num_threads(1)
    with ThreadPoolExecutor(THREADS, initializer=together.wait, initargs=(PATIENCE,)) as executor:
        for _ in range(THREADS):
            executor.submit(int)
        yield executor
    torch.set_num_threads(before)


def same(result, expected) -> bool:
    values = zip(result.parameters.items(), expected.parameters.items(), strict=True)
    parameters = all(name == other and torch.equal(a, b) for (name, a), (other, b) in values)
    return parameters and torch.equal(result.logits, expected.logits) and result.samples == expected.samples


@pytest.mark.parametrize("config", [TuningConfig(), SEARCH], ids=["paper", "search"])
def test_calls_of_one_tuner_run_one_after_the_other(model, batch, pool, monkeypatch, config):
    inputs = [rows(batch, i) for i in range(5)] + [rows(batch, *range(count)) for count in (2, 3, 5)]
    inside = most = 0
    with TestTimeTuner(model, config) as tuner:
        expected = [tuner.tune(**given) for given in inputs]
        episode = tuner._episode

        def counted(*args, **kwargs):
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            try:
                return episode(*args, **kwargs)
            finally:
                inside -= 1

        monkeypatch.setattr(tuner, "_episode", counted)
        results = list(pool.map(lambda given: tuner.tune(**given), inputs, timeout=PATIENCE))
    assert most == 1
    assert all(map(same, results, expected))


def test_applied_in_one_thread_holds_up_the_others(model, batch):
    plain = plain_logits(model, batch)
    with TestTimeTuner(model) as tuner, ThreadPoolExecutor(1) as other:
        expected = other.submit(tuner.tune, **batch).result(PATIENCE)
        with tuner.applied(expected):
            waiting = other.submit(tuner.tune, **batch)
            with pytest.raises(TimeoutError):
                waiting.result(0.3)
            for use in (tuner.tune, tuner.generate):
                with pytest.raises(RuntimeError, match=r"this thread is inside applied\(\); leave the block first"):
                    use(**batch)
            with pytest.raises(RuntimeError, match=r"this thread is inside applied"), tuner.applied(expected):
                pass
            with pytest.raises(RuntimeError, match="leave the block before closing"):
                tuner.close()
            assert not waiting.done()
            assert not torch.equal(plain_logits(model, batch), plain)
        assert same(waiting.result(PATIENCE), expected)


def test_an_exception_in_one_thread_lets_the_next_in(model, batch, pool):
    wrong = {**batch, "pixel_values": batch["pixel_values"] * torch.nan}
    with TestTimeTuner(model) as tuner:
        expected = tuner.tune(**batch)
        futures = [pool.submit(tuner.tune, **given) for given in (wrong, batch) * 4]
        for bad, good in zip(futures[::2], futures[1::2], strict=True):
            assert isinstance(bad.exception(PATIENCE), ValueError)
            assert same(good.result(PATIENCE), expected)


def test_two_tuners_on_two_models_side_by_side(batch, pool, soak):
    """Configurations that differ in what a thread could share: backend, size of the batch, presets."""
    configs = (TuningConfig(backend="reference"), TuningConfig(candidates="default", max_candidates=3))
    tuners = [TestTimeTuner(zoo.load()[0], config) for config in configs]
    inputs = [rows(batch, i) for i in range(3)] + [rows(batch, 4, 1)]
    cases = [(tuner, given) for given in inputs for tuner in tuners]
    expected = [tuner.tune(**given) for tuner, given in cases]
    order = [i % len(cases) for i in range(200 if soak else 16)]
    results = pool.map(lambda i: cases[i][0].tune(**cases[i][1]), order, timeout=10 * PATIENCE)
    assert all(same(result, expected[i]) for i, result in zip(order, results, strict=True))


def test_the_number_of_openmp_threads_is_each_threads_own(model, batch):
    before = torch.get_num_threads()
    with TestTimeTuner(model) as tuner, ThreadPoolExecutor(1) as other:
        try:
            torch.set_num_threads(2)
            other.submit(torch.set_num_threads, 1).result()
            result = other.submit(tuner.tune, **batch).result(PATIENCE)
            assert (torch.get_num_threads(), other.submit(torch.get_num_threads).result()) == (2, 1)
            torch.set_num_threads(1)
            assert same(result, tuner.tune(**batch))
        finally:
            torch.set_num_threads(before)
