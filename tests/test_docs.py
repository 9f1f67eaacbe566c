"""What the documentation shows is what the results say."""

import json
from pathlib import Path

from benchmarks import report, results
from studies import readme

ROOT = Path(__file__).parents[1]


def test_readme_table_is_the_one_of_its_results_file():
    report = json.loads((ROOT / "docs" / "demo" / "report.json").read_text())
    text = (ROOT / "README.md").read_text()
    assert readme.spliced(text, report) == text
    report["rows"][0]["search"] += 0.01
    assert readme.spliced(text, report) != text


def test_readme_benchmark_table_is_the_one_of_the_results_it_names():
    """Between the markers stands nothing while no results are committed."""
    text = (ROOT / "README.md").read_text()
    shown = report.section(text)
    if not shown:
        assert not any(results.FOLDER.glob("*/*.jsonl")), "results without a table: python -m benchmarks.report"
        return
    folder = results.FOLDER / shown.split("benchmarks/results/")[1].split(".")[0]
    assert report.spliced(text, folder) == text


def test_pages_that_are_linked_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in page.read_text().split("](")[1:]:
            link = target.split(")")[0]
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_support_table_names_the_kernels_that_the_cases_name():
    from vqfast.testing.cases import all_operators

    lines = {
        line.split("`")[1]: line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `ops.")
    }
    for op in all_operators():
        cells = [cell.strip() for cell in lines[f"ops.{op.name}"].strip(" |").split("|")]
        kernels = dict(zip(("cpu", "triton", "cuda"), cells[-3:], strict=True))
        assert {name for name, cell in kernels.items() if cell != "-"} == set(op.kernels)
