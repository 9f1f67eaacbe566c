"""docs/results.md is what `python -m studies.results` makes of the reports that lie beside it."""

import pytest

pytest.importorskip("bjontegaard", reason="needs the extra: pip install vqfast[studies]")
from studies import results


def test_the_page_is_made_of_the_reports():
    assert results.PAGE.read_text() == results.page(results.read(results.RESULTS))


def test_published_figures_are_marked_as_such():
    sections = results.PAGE.read_text().split("\n## ")[1:]
    assert len(sections) == 3
    assert all(section.count(results.PUBLISHED) == 1 for section in sections)
