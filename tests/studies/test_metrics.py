"""Metrics beside values from elsewhere: tables, hand calculation, other tests of the same hypothesis."""

import numpy as np
import pytest

pytest.importorskip("bjontegaard")
pytest.importorskip("torchmetrics")
from scipy import stats

from studies.metrics import accuracy, bd_metric, calibration_error, gaps, paired_test


def answers(right, wrong):
    return np.arange(right + wrong) < right


def drawn(share, shape, seed=0):
    return np.random.default_rng(seed).random(shape) < share


def test_wilson():
    """81 of 263: R. G. Newcombe, Statistics in Medicine 17, 1998, table I, gives 0.2553 to 0.3662."""
    assert accuracy(answers(81, 182)) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    assert accuracy(answers(0, 20)) == pytest.approx((0, 0, 0.1611), abs=5e-5)
    assert accuracy(answers(81, 182)[:, None]) == accuracy(answers(81, 182))


def test_bootstrap_of_images():
    """Independent answers: as wide as Wilson's. The same answer to every question of an image: as if asked once."""
    independent = drawn(0.7, (200, 3))
    width = np.ptp(accuracy(independent)[1:])
    assert width == pytest.approx(np.ptp(accuracy(independent.ravel())[1:]), rel=0.12)
    correlated = np.repeat(drawn(0.7, (200, 1)), 3, 1)
    assert np.ptp(accuracy(correlated)[1:]) == pytest.approx(np.ptp(accuracy(correlated[:, 0])[1:]), rel=0.05)
    assert np.ptp(accuracy(correlated)[1:]) > 1.6 * np.ptp(accuracy(correlated.ravel())[1:])  # 3 ** 0.5
    mean, low, high = accuracy(independent)
    assert mean == independent.mean()
    assert low < mean < high
    many = drawn(0.7, (300, 11))
    assert len({accuracy(many) for _ in range(4)}) == 1


def test_interval_has_a_width_where_images_agree():
    assert accuracy(np.ones((20, 3), bool)) == pytest.approx((1, 1 - 0.1611, 1), abs=5e-5)
    mean, low, high = accuracy(np.array([[True, False, True]]))
    assert (mean, low < mean < high) == (2 / 3, True)


def test_paired_test():
    a = drawn(0.7, (300, 3))
    assert paired_test(a, a) == 1
    assert paired_test(a, a | drawn(0.3, a.shape, 1)) < 0.001
    assert paired_test(a, drawn(0.7, a.shape, 2)) > 0.05
    b = drawn(0.75, a.shape, 3)
    assert paired_test(a, b) == paired_test(b, a) == paired_test(a, b)
    assert paired_test(np.zeros(1, bool), np.ones(1, bool)) == 1  # nothing can follow from one image


def test_images_with_different_numbers_of_questions():
    """As the same answers in a table; then 40 images once and 20 three times: copies are no more evidence."""
    a, b = drawn(0.6, (50, 3)), drawn(0.75, (50, 3), 1)
    images = np.repeat(np.arange(50), 3)
    assert accuracy(a.ravel(), images) == accuracy(a)
    assert paired_test(a.ravel(), b.ravel(), images) == paired_test(a, b)
    sizes = np.repeat([1, 3], [40, 20])
    once, other = drawn(0.5, 60), drawn(0.7, 60, 1)
    index = np.repeat(np.arange(60), sizes)
    mean, low, high = accuracy(once[index], index)
    assert mean == once[index].mean()
    each = sizes * (once - mean)  # of a ratio of sums
    width = 2 * 1.96 * (each**2).sum() ** 0.5 / sizes.sum()
    assert high - low == pytest.approx(width, rel=0.06)
    assert high - low > 1.2 * np.ptp(accuracy(once[index])[1:])
    naive, p = (paired_test(once[index], other[index], images) for images in (None, index))
    gain = sizes * (other.astype(int) - once)
    swapped = np.random.default_rng(0).choice([-1, 1], (20000, 60)) @ gain
    assert p == pytest.approx((abs(swapped) >= abs(gain.sum())).mean(), abs=0.02)
    assert naive < p


@pytest.mark.parametrize(("won", "lost"), [(6, 0), (9, 2), (30, 14)])
def test_one_question_is_mcnemar(won, lost):
    a = answers(40 + lost, won)
    b = np.concatenate([np.ones(40, bool), np.zeros(lost, bool), np.ones(won, bool)])
    assert paired_test(a, b) == pytest.approx(stats.binomtest(won, won + lost).pvalue, abs=0.004)


def test_paired_test_counts_images_not_answers():
    """Three copies of each answer are no more evidence than one."""
    a, b = drawn(0.5, (60, 1)), drawn(0.7, (60, 1), 1)
    assert paired_test(np.repeat(a, 3, 1), np.repeat(b, 3, 1)) == pytest.approx(paired_test(a, b), abs=0.01)


def test_calibration_error():
    """Two bins: |1/2 - 0.9| weighs 2/3, |1 - 0.3| weighs 1/3."""
    assert calibration_error([0.9, 0.9, 0.3], [True, False, True]) == pytest.approx(0.4 * 2 / 3 + 0.7 / 3)
    assert calibration_error([[0.9, 0.9], [0.3, 0.3]], np.ones((2, 2), bool)) == pytest.approx(0.4)
    # of 15 bins the tenth, 0.6 to 0.6667, holds 0.61 and 0.65, so that right and wrong average out; 0.69 lies outside
    assert calibration_error([0.61, 0.65], [True, False]) == pytest.approx(0.13)
    assert calibration_error([0.61, 0.69], [True, False]) == pytest.approx((0.39 + 0.69) / 2)
    # a confidence of 1 is in the last bin, not in one of its own
    certain = np.repeat([0.95, 1.0], 10)
    assert calibration_error(certain, np.arange(20) != 19) == pytest.approx(0.025, abs=1e-5)
    confidence = np.random.default_rng(0).random(20000)
    assert calibration_error(confidence, drawn(confidence, 20000, 1)) < 0.02


def test_bd_metric_of_a_shift():
    rates, heights = np.array([0.05, 0.1, 0.3, 0.9]), np.array([0.4, 0.55, 0.7, 0.72])
    assert bd_metric(rates, heights, rates, heights + 0.125) == pytest.approx(0.125, abs=1e-12)
    assert bd_metric(rates, heights + 0.125, rates, heights) == pytest.approx(-0.125, abs=1e-12)
    assert bd_metric(rates[::-1], heights[::-1], rates, heights + 0.125) == pytest.approx(0.125, abs=1e-12)


def test_bd_metric_in_log_rate():
    """Lines in log rate: twice the bits for the same accuracy costs slope * log 2, over the rates that both reach."""
    rates = np.array([0.1, 0.2, 0.4, 0.8])
    line = 0.1 * np.log2(rates)
    assert bd_metric(rates, line, 2 * rates[:3], line[:3]) == pytest.approx(-0.1, abs=1e-12)


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (([0.1], [0.5]), "curve b must have at least two points"),
        (([0.1, 0.2], [0.5]), r"curve b .*got shapes \(2,\) and \(1,\)"),
        (([0.1, 0.1], [0.5, 0.6]), r"distinct; got \[0\.1, 0\.1\]"),
        (([0, 0.1], [0.5, 0.6]), "positive"),
        (([0.1, 0.2], [0.5, float("nan")]), "finite"),
        (([2, 3], [0.5, 0.6]), r"share no range of bits per pixel.* a has 0\.1 to 1, b 2 to 3"),
    ],
)
def test_bd_metric_errors(curve, message):
    with pytest.raises(ValueError, match=message):
        bd_metric([0.1, 1], [0.4, 0.6], *curve)


def test_gaps():
    total, information, generalisation = gaps(original=0.9, compressed=0.5, adapted=0.75)
    assert (total, information, generalisation) == pytest.approx((0.4, 0.15, 0.25))
    assert total == pytest.approx(information + generalisation)


def test_errors():
    with pytest.raises(ValueError, match=r"right must be bool.*got float64 \[2\]"):
        accuracy([0.5, 1.0])
    with pytest.raises(ValueError, match=r"got bool \[0\]"):
        accuracy(np.zeros(0, bool))
    with pytest.raises(ValueError, match=r"image of every answer, \[2\]; got \[3\]"):
        accuracy([True, False], [0, 0, 1])
    with pytest.raises(ValueError, match=r"same shape.*\(2,\) and \(3,\)"):
        paired_test([True, False], [True, False, True])
    with pytest.raises(ValueError, match=r"probability, 0 to 1; got 0\.5 to 1\.5"):
        calibration_error([0.5, 1.5], [True, True])
    with pytest.raises(ValueError, match="one shape"):
        calibration_error([0.5], [True, True])
    with pytest.raises(ValueError, match="must be bool"):
        calibration_error([0.5], [1])
