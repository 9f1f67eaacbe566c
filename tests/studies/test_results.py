"""docs/results.md is what `python -m studies.results` makes of the reports that lie beside it."""

import json

import pytest

pytest.importorskip("bjontegaard", reason="needs the extra: pip install vqfast[studies]")
from studies import paradox_report, results


def test_the_page_is_made_of_the_reports():
    assert results.PAGE.read_text() == results.page(results.read(results.RESULTS))


def test_published_figures_are_marked_as_such():
    sections = results.PAGE.read_text().split("\n## ")[1:]
    assert len(sections) == 3
    assert all(section.count(results.PUBLISHED) == 1 for section in sections)


@pytest.mark.parametrize(("images", "counted"), [(1, 0), (40, 1)])
def test_a_difference_counts_with_its_interval_and_p(images, counted):
    """All images gain or lose the same, so that the interval has no width; one image is no evidence."""
    rows = [
        dict(
            model="digits", condition=condition, severity=severity, method=method, start=0,
            image=[f"i{i}" for i in range(images)],
            right=[(condition == "fog") != method.startswith("restore")] * images,
            confidence=[0.9] * images, bits_per_pixel=None, pixels=1, undecodable={}, seconds=1.0,
        )
        for condition, severity in (("clean", 0), ("fog", 1))
        for method in ("untuned", "restore:median", "filter:stretch", "one_step", "search")
    ]  # fmt: skip
    configuration = dict(
        models={"digits": ""}, conditions=[("clean", 0), ("fog", 1)], methods=[row["method"] for row in rows[:5]],
        answer_tokens=1, seed=0, versions={},
    )  # fmt: skip
    summary = paradox_report.summarise(rows, configuration)
    summary |= dict(images=images, date="today", machine="none", configuration=configuration)
    report = json.loads(json.dumps(results.quoted(summary)))
    text = " ".join(results.degradations(report, report))
    assert f"Of 1 degraded conditions (each at one severity or level) {counted} are answered" in text
    assert f"hurts in {counted} of 1 cases" in text
