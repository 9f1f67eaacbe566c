"""The study on a few images: what it writes agrees, and a killed run loses nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from typer import BadParameter

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("cv2", reason="needs the extra: pip install vqfast[studies]")
from studies import data, paradox, paradox_report, units
from studies.codecs import CODECS
from studies.degradations import DEGRADATIONS, LEVELS, degrade
from studies.metrics import accuracy, paired_test

ROOT = Path(__file__).parents[2]
UNTUNED = "untuned"


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The study sets its own number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(folder, **options):
    paradox.main(**{"seed": 0, "images": 10, "out": folder, "dataset": "digits", "split": "validation"} | options)
    return json.loads((folder / "summary.json").read_text())


def rows_of(folder):
    """Without their times, in any order."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()[1:]]
    return sorted(({k: v for k, v in row.items() if k != "seconds"} for row in rows), key=lambda row: row["key"])


# Of the run that is killed and of the one that is not. Two chunks, five conditions, three methods: 30 rows.
JPEG = CODECS["jpeg"][3:5]
SMALL = dict(
    degradations=["fog:3", *(f"codec:jpeg:{level:g}" for level in JPEG), "snow:5"],
    methods=["one_step", "filter:stretch"],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("paradox")


@pytest.fixture(scope="module")
def summary(folder):
    return run(folder, **SMALL)


def test_rows_say_what_was_answered(folder, summary):
    rows = rows_of(folder)
    assert len({row["key"] for row in rows}) == len(rows) == 30
    drawn = {item.name: item for item in data.load("digits", "validation", 10, 0).items}
    for row in rows:
        assert {len(row[name]) for name in ("image", "question", "answer", "right", "confidence", "entropy")} == {
            {0: 24, 8: 6}[row["start"]]
        }
        for image, question, answer, right in zip(*map(row.get, ("image", "question", "answer", "right")), strict=True):
            assert right == (answer in dict(drawn[image].questions)[question])
        assert (row["bits_per_pixel"] is not None) == row["condition"].startswith("codec:")
    assert sum(row["right"].count(True) for row in rows if row["condition"] == "clean") == 90


def test_every_row_of_a_codec_has_the_rate_of_the_whole_sheet(folder, summary):
    images = [item.image() for item in data.load("digits", "validation", 10, 0).items]
    for level in JPEG:
        rates = {
            row["bits_per_pixel"] for row in rows_of(folder) if row["severity"] == level and "jpeg" in row["condition"]
        }
        assert rates == {units.compress_digits(images, "jpeg", level)[1]}


def test_summary_is_that_of_the_rows(folder, summary):
    rows = rows_of(folder)

    def right(condition, method):
        own = sorted(
            (r for r in rows if (r["condition"], r["method"]) == (condition, method)), key=lambda r: r["start"]
        )
        return np.concatenate([r["right"] for r in own]).reshape(10, 3)

    assert len(summary["rows"]) == 15
    row = next(r for r in summary["rows"] if (r["condition"], r["method"]) == ("fog", "filter:stretch"))
    tuned, plain = right("fog", "filter:stretch"), right("fog", UNTUNED)
    assert (row["images"], row["questions"], row["severity"]) == (10, 30, 3)
    assert [row["accuracy"], row["low"], row["high"]] == pytest.approx(list(accuracy(tuned)))
    assert row["lift"] == pytest.approx(tuned.mean() - plain.mean())
    assert row["lift_low"] < row["lift"] < row["lift_high"]
    assert row["p"] == paired_test(tuned, plain) < 0.1
    plain_row = next(r for r in summary["rows"] if (r["condition"], r["method"]) == ("fog", UNTUNED))
    assert plain_row["over_clean"]["lift"] == pytest.approx(plain.mean() - right("clean", UNTUNED).mean())
    assert plain_row["lift"] is None


def test_the_order_of_rows_does_not_matter(folder, summary):
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()[1:]]
    again = paradox_report.summarise(reversed(rows), summary["configuration"])
    assert json.loads(json.dumps(again)) == {name: summary[name] for name in again}


def test_page_is_self_contained(folder, summary):
    page = (folder / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!#)([^"]*)"', page) == []
    assert page.count("<svg") == 2
    for text in ("JPEG codec", "fog", "filter: stretch", "bits per pixel", "No: of no degradation"):
        assert text in page


def test_a_killed_run_is_continued(folder, summary, tmp_path):
    """By SIGKILL in the middle; then half a line is left behind as well."""
    options = [f"--{name}={value}" for name, values in SMALL.items() for value in values]
    options += ["--images=10", "--split=validation", f"--out={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "studies.paradox", *options], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    file, lines = tmp_path / "rows.jsonl", 0
    while lines < 4:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
        lines = file.read_bytes().count(b"\n") if file.exists() else 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = file.read_bytes()
    assert 3 <= before.count(b"\n") - 1 < 30, "killed too late to say anything"
    file.write_bytes(before + b'{"key": "ha')
    run(tmp_path, **SMALL)
    assert file.read_bytes().startswith(before[: before.rindex(b"\n") + 1])  # rows that were there stay
    assert rows_of(tmp_path) == rows_of(folder)


def test_a_finished_run_makes_nothing_anew(folder, summary, monkeypatch):
    monkeypatch.setattr(units, "rows", None)
    assert run(folder, **SMALL)["rows"] == summary["rows"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (dict(seed=1), "seed is 0 there and 1 here"),
        (dict(images=9), "images is 10 there and 9 here"),
        (dict(methods=["one_step"]), "methods is"),
        (dict(split="test"), "data is"),
    ],
)
def test_another_configuration_is_refused(folder, summary, changed, named):
    before = (folder / "rows.jsonl").read_bytes()
    with pytest.raises(BadParameter, match=named):
        run(folder, **{**SMALL, **changed})
    assert (folder / "rows.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "known"),
    [
        (dict(degradations=["mist"]), r"gaussian_noise.*codec:jpeg2000; got 'mist'"),
        (dict(degradations=["fog:6"]), r"severity of fog must be one of 1, 2, 3, 4, 5; got '6'"),
        (dict(severities=[0]), r"must be one of 1, 2, 3, 4, 5; got 0"),
        (dict(degradations=["codec:jpeg:7"]), r"level of codec:jpeg must be one of .*; got '7'"),
        (dict(methods=["best"]), r"untuned, .*search.*; got 'best'"),
        (dict(models=["nowhere"]), r"digits, or a transformers folder.*; got 'nowhere'"),
        (dict(dataset="letters"), r"digits, or a JSONL file.*; got 'letters'"),
        (dict(split="train"), r"validation, test; got 'train'"),
    ],
)
def test_unknown_names_list_the_known(tmp_path, wrong, known):
    with pytest.raises(BadParameter, match=known):
        run(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_conditions():
    everything = units.conditions(["*"], [1, 5], "digits")
    assert len(everything) == 1 + 2 * len(DEGRADATIONS) + sum(map(len, CODECS.values()))
    assert everything[0] == units.CLEAN
    found = units.conditions(["codec:webp", "fog", "fog:5"], [2], "photographs")
    assert found[1:] == [*(("codec:webp", level) for level in CODECS["webp"]), ("fog", 2), ("fog", 5)]
    assert [c.codec for c in found[:2]] == [None, f"webp:{CODECS['webp'][0]:g}"]


def test_images_are_degraded_the_same_however_many_are_drawn():
    def degraded(count):
        dataset = data.load("digits", "validation", count, 0)
        plan = units.Plan(dataset, (), (), (), 3, 1, 1, "")
        return dataset, units.Worker(plan)._degrade(units.Condition("snow", 2), 0).images

    (few, first), (many, second) = degraded(2), degraded(8)
    place = next(i for i, item in enumerate(many.items) if item.name == few.items[1].name)
    assert first[1].tobytes() == second[place].tobytes()
    strength, item = LEVELS["digits"]["snow"][1], few.items[1]
    assert first[1].tobytes() == degrade(item.image(), "snow", strength, units.noise_seed(3, item.number)).tobytes()


def test_no_two_seeds_share_noise():
    assert len({units.noise_seed(seed, number) for seed in range(3) for number in range(1500)}) == 4500


def test_a_folder_with_images_that_cannot_be_decoded(tmp_path, capsys):
    """The run goes on; they are counted and named, once. Two questions about one image, one about the other."""
    items = data.load("digits", "validation", 2, 0).items
    lines = [{"image": "broken.png", "question": "which digit?", "answer": "nine"}]
    for number, item in enumerate(items):
        item.image().resize((64, 64)).save(tmp_path / f"{number}.png")
        for question, accepted in item.questions[: 1 + number]:
            lines.append({"image": f"{number}.png", "question": question, "answer": [*accepted, "other"]})
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    quality = CODECS["webp"][-1]
    names = dict(degradations=["gamma:1", f"codec:webp:{quality:g}"], methods=["search"])
    out = run(tmp_path / "out", dataset=str(tmp_path / "questions.jsonl"), answer_tokens=2, **names)
    assert list(out["undecodable"]) == ["broken.png"]
    assert "broken.png" in out["undecodable"]["broken.png"]
    assert capsys.readouterr().err.count("left out: ") == 1
    assert [(row["images"], row["questions"]) for row in out["rows"]] == 6 * [(2, 3)]
    assert [row["accuracy"] for row in out["rows"] if row["condition"] == "clean"] == [1, 1]
    rates = {row["bits_per_pixel"] for row in out["rows"] if row["condition"] == "codec:webp"}
    bits = sum(units.compress(Image.open(tmp_path / f"{i}.png"), "webp", quality)[1] for i in range(2))
    assert rates == {bits / (2 * 64 * 64)}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<p>2 images of" in page
    assert "1 of the images" in page
    assert "broken.png" in page


@pytest.mark.parametrize("name", ["summary.json", "report.html"])
def test_a_killed_run_leaves_no_half_a_report(folder, summary, monkeypatch, name):
    """Written beside it and renamed, and only while no other run has the folder."""
    seen = []

    def replace(part, path):
        assert Path(part).read_text().endswith("\n")
        with pytest.raises(ValueError, match="another run writes"):
            paradox.Records(folder / "rows.jsonl", summary["configuration"])
        seen.append(path.name)

    monkeypatch.setattr(paradox.os, "replace", replace)
    before = (folder / name).read_bytes()
    run(folder, **SMALL)
    assert name in seen
    assert (folder / name).read_bytes() == before


def test_what_a_run_depends_on(monkeypatch):
    """Compiled kernels and the device as well; a model that is named twice is one."""
    assert any(file.suffix == ".so" for file in paradox.CODE)
    drawn, values = data.load("digits", "validation", 1, 0), dict(seed=0, answer_tokens=1, threads=1)

    def configured():
        return paradox.configured(drawn, ["digits", "digits"], ["fog:1"], [1], ["untuned"], **values)

    plan, before = configured()
    assert plan.models == ("digits",)
    monkeypatch.setenv("VQFAST_CPU_TARGET", "portable")
    monkeypatch.setattr(paradox, "device", lambda: "another")
    after = configured()[1]
    assert {name for name in after if after[name] != before[name]} == {"device", "cpu_target"}


def made(right, condition, severity, method, bits=None, confidence=0.9, names=None):
    """A row of many images with one question each."""
    names = names or [f"i{i}" for i in range(len(right))]
    return dict(
        model="digits", condition=condition, severity=severity, method=method, start=0, image=names, right=right,
        confidence=[confidence] * len(right), bits_per_pixel=bits, pixels=1, undecodable={}, seconds=1.0,
    )  # fmt: skip


def share(count):
    return [i < count for i in range(40)]


def report_of(rows, tokens=1):
    order = {(row["condition"], row["severity"]): None for row in rows}
    methods = {row["method"]: "" for row in rows}
    about = dict(models={"digits": ""}, conditions=list(order), methods=methods, dataset="made", seed=0, versions={})
    about["answer_tokens"] = tokens
    report = paradox_report.summarise(reversed(rows), about)
    return report | dict(configuration=about, images=40, date="today", machine="none")


def test_degraded_that_beats_clean_stands_out():
    rows = [
        made(share(20), "clean", 0, UNTUNED),
        made(share(30), "fog", 1, UNTUNED),
        made(share(20), "fog", 3, UNTUNED),
    ]
    report = report_of(rows)
    gains = [row["over_clean"] for row in report["rows"][1:]]
    assert gains[0]["lift"] == 0.25
    assert gains[0]["lift_low"] > 0
    assert gains[0]["p"] < 0.01
    assert (gains[1]["lift"], gains[1]["p"]) == (0, 1)
    page = paradox_report.page(report)
    assert "answers 1 of the degraded sets better" in page


def test_one_image_is_no_evidence():
    """Its interval has no width."""
    rows = [made([False], "clean", 0, UNTUNED), made([True], "fog", 1, UNTUNED)]
    rows += [made([True], "clean", 0, "restore:median"), made([False], "fog", 1, "restore:median")]
    report = report_of(rows)
    gain = report["rows"][2]["over_clean"]
    assert (gain["lift"], gain["lift_low"], gain["p"]) == (1, 1, 1)
    page = " ".join(paradox_report.page(report).split())
    assert "No: of no degradation" in page
    assert "in 0 of its cases" in page


def test_images_stay_whole_where_they_have_different_numbers_of_questions():
    """Against tables: images with as many questions each give what scipy gives; copies of an answer add nothing."""
    rng = np.random.default_rng(0)
    once, other = rng.random(40) < 0.5, rng.random(40) < 0.8

    def gain(sizes):
        index = np.repeat(np.arange(40), sizes)
        names = [f"i{i}" for i in index]
        rows = [
            made(right[index].tolist(), name, severity, UNTUNED, names=names)
            for right, name, severity in ((once, "clean", 0), (other, "fog", 1))
        ]
        row = report_of(rows)["rows"][1]
        assert (row["images"], row["questions"]) == (40, len(index))
        return row["over_clean"]

    each = other.astype(int) - once
    low, high = stats.ttest_1samp(each, 0).confidence_interval()
    for sizes in (1, 3):
        found = gain(sizes)
        assert (found["lift"], found["lift_low"], found["lift_high"]) == pytest.approx((each.mean(), low, high))
        assert found["p"] == paired_test(once, other)
    sizes = np.repeat([1, 5], 20)
    found, lift = gain(sizes), (sizes * each).sum() / sizes.sum()
    error = (40 / 39 * ((sizes * (each - lift)) ** 2).sum()) ** 0.5 / sizes.sum()
    assert found["lift"] == pytest.approx(lift)
    assert found["lift_high"] - lift == pytest.approx(stats.t.ppf(0.975, 39) * error)
    assert found["p"] > gain(5)["p"]


def test_shades_follow_the_severity():
    def rows(condition, *severities):
        return [dict(condition=condition, severity=severity) for severity in severities]

    shades = paradox_report.SHADES
    found = [(row["severity"], shade) for row, shade in paradox_report.shaded(rows("fog", 5, 2))]
    assert found == [(2, shades[1]), (5, shades[4])]
    found = [(row["severity"], shade) for row, shade in paradox_report.shaded(rows("codec:jpeg", 5, 30))]
    assert found == [(30, shades[0]), (5, shades[4])]


def test_every_method_has_a_curve_of_its_own():
    kinds = [UNTUNED, *(f"codec_adaptor:{i}" for i in range(9))]
    rows = [made(share(40), "clean", 0, kind) for kind in kinds]
    rows += [made(share(20), "codec:webp", level, kind, bits) for kind in kinds for level, bits in ((5, 1.0), (9, 0.5))]
    report = report_of(rows)
    assert paradox_report.curve(report["rows"], "digits", "codec:webp", UNTUNED)[0] == [0.5, 1.0]
    picture = paradox_report.page(report).split("<svg")[2].partition("</svg>")[0]
    assert all(f">{kind}<" in picture for kind in kinds)


def test_longer_answers_have_no_calibration_error():
    """The confidence is that of their first token."""
    rows = [made(share(30), "clean", 0, UNTUNED), made(share(20), "fog", 1, UNTUNED)]
    report = report_of(rows, tokens=2)
    assert {row["calibration_error"] for row in (*report["rows"], *report["pooled"])} == {None}
    assert "expected calibration error" in paradox_report.page(report)


def test_restoration_that_hurts_is_counted():
    rows = [made(share(30), "clean", 0, UNTUNED), made(share(10), "clean", 0, "restore:median")]
    page = paradox_report.page(report_of(rows))
    assert "below zero and p &lt; 0.05, in 1 of its cases" in " ".join(page.split())


def test_codecs_have_curves_and_gaps():
    rows = [made(share(40), "clean", 0, UNTUNED), made(share(40), "clean", 0, "codec_adaptor:a")]
    for level, bits, plain, adapted in ((5, 0.5, 10, 20), (10, 1.0, 20, 30), (20, 2.0, 30, 40)):
        rows += [
            made(share(plain), "codec:webp", level, UNTUNED, bits),
            made(share(adapted), "codec:webp", level, "codec_adaptor:a", bits),
        ]
    report = report_of(rows)
    assert {r["method"]: r["bd_accuracy"] for r in report["rates"]} == pytest.approx(
        {UNTUNED: 0, "codec_adaptor:a": 0.25}
    )
    assert report["gaps"][0] == {
        "model": "digits", "condition": "codec:webp", "severity": 5, "method": "codec_adaptor:a",
        "total": 0.75, "information": 0.5, "generalisation": 0.25,
    }  # fmt: skip
    assert "Generalisation" in paradox_report.page(report)
    pooled = {(r["condition"], r["method"]): r for r in report["pooled"]}
    assert pooled["all degradations", "codec_adaptor:a"]["accuracy"] == 0.75
    assert pooled["all degradations", "codec_adaptor:a"]["questions"] == 120
    assert pooled["codec:webp", UNTUNED]["calibration_error"] == pytest.approx(0.4)


def test_bits_per_pixel_are_bits_over_pixels():
    one, other = (made(share(20), "codec:webp", 5, UNTUNED, bits) for bits in (1.0, 2.0))
    other |= dict(start=8, pixels=3, image=[f"other {name}" for name in other["image"]])
    clean = made(share(20) * 2, "clean", 0, UNTUNED)
    assert report_of([clean, one, other])["rows"][1]["bits_per_pixel"] == 1.75


def test_confidence_that_is_not_finite_is_left_out():
    row = made(share(20), "clean", 0, UNTUNED)
    row["confidence"][:20] = [None] * 20
    assert report_of([row])["rows"][0]["calibration_error"] == pytest.approx(0.9)
