"""The file of results: continued, never mixed, never half a line."""

import json

import pytest

from studies.records import Records

CONFIGURATION = {"seed": 0, "methods": {"search": ""}, "conditions": [("fog", 3)]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "rows.jsonl"


def written(path, *keys, configuration=CONFIGURATION):
    with Records(path, configuration) as records:
        for key in keys:
            records.append({"key": key, "value": 0.5})
    return [json.loads(line).get("key") for line in path.read_text().splitlines()]


def test_a_row_is_on_the_disk_when_append_returns(path):
    with Records(path, CONFIGURATION) as records:
        records.append({"key": "a"})
        assert path.read_bytes().endswith(b'{"key": "a"}\n')
        assert list(records.rows()) == [{"key": "a"}]


def test_a_file_is_continued_and_a_key_is_written_once(path):
    assert written(path, "a", "b") == [None, "a", "b"]
    assert written(path, "b", "c") == [None, "a", "b", "c"]


@pytest.mark.parametrize("cut", [1, 3, 10])
def test_half_a_last_line_is_dropped(path, cut):
    written(path, "a", "b")
    path.write_bytes(path.read_bytes()[:-cut])
    with Records(path, CONFIGURATION) as records:
        assert records.done == {"a"}
        records.append({"key": "b"})
        assert [row["key"] for row in records.rows()] == ["a", "b"]


@pytest.mark.parametrize("left", [5, 30])
def test_half_a_configuration_is_dropped(path, left):
    written(path)
    path.write_bytes(path.read_bytes()[:left])
    assert written(path, "a") == [None, "a"]


def test_another_configuration_is_refused_with_what_differs(path):
    written(path, "a")
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"another configuration: images is null there and 4 here; seed is 0 there and 1"
    ):
        Records(path, {**CONFIGURATION, "seed": 1, "images": 4})
    assert path.read_bytes() == before


@pytest.mark.parametrize(("line", "where"), [(b"[]\n", "line 1"), (b"{\n", "line 1"), (None, "line 2")])
def test_a_file_of_something_else_is_refused(path, line, where):
    written(path)
    path.write_bytes(line or path.read_bytes() + b'{"no": "key"}\n')
    with pytest.raises(ValueError, match=where):
        Records(path, CONFIGURATION)


@pytest.mark.parametrize("content", [b"my notes", b'{"rows": 3', b"\xff\xfe\n", b"\xff\xfe"])
def test_a_foreign_file_is_refused_and_stays(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}, line 1 is not the configuration"):
        Records(path, CONFIGURATION)
    assert path.read_bytes() == content


def test_two_runs_do_not_write_into_one_file(path):
    with Records(path, CONFIGURATION), pytest.raises(ValueError, match="another run writes"):
        Records(path, CONFIGURATION)
    assert written(path, "a") == [None, "a"]


def test_what_json_has_no_number_for_is_refused(path):
    with Records(path, CONFIGURATION) as records, pytest.raises(ValueError, match="JSON"):
        records.append({"key": "a", "value": float("nan")})
