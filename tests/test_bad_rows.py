"""Bad rows of training data are left out and listed, if that is asked for and they are few."""

from __future__ import annotations

import json
import logging

import pytest

from gircse.training.pairs import load_pairs
from helpers import write_rows
from training_helpers import PAIR, make_pairs, spoil

pytestmark = pytest.mark.usefixtures("own_cache")

# Leaving bad rows out

MIXED = [PAIR, '{"query": "cut', {**PAIR, "query": "q2"}, "", {"query": "q3", "pos": []}, {**PAIR, "query": "q4"}]


def test_bad_rows_are_left_out_and_listed(tmp_path, caplog):
    path, listed = write_rows(tmp_path / "x.jsonl", MIXED), tmp_path / "bad_rows.jsonl"
    with caplog.at_level(logging.WARNING, "gircse"):
        pairs = load_pairs(path, max_bad_share=0.4, bad_rows_file=listed)
    assert pairs["query"][:] == ["q", "q2", "q4"] and pairs.column_names == list(make_pairs([PAIR]).column_names)
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(row["file"], row["row"]) for row in rows] == [(path, 2), (path, 5)]
    assert rows[0]["reason"].startswith("broken JSON (Invalid control character at: line 1")
    assert rows[1]["reason"].startswith("field 'pos' is missing or empty; a row needs")
    (record,) = caplog.records
    assert (
        f"{path}: left out 2 of 5 rows, which are wrong (all of them in {listed}): {path}, row 2: bro" in record.message
    )


def test_bad_rows_are_left_out_of_what_the_cache_has(tmp_path):
    path, listed = write_rows(tmp_path / "x.jsonl", MIXED), tmp_path / "bad_rows.jsonl"
    first = load_pairs(path, max_bad_share=0.4)
    spoil(path)
    assert list(load_pairs(path, max_bad_share=0.5, bad_rows_file=listed)) == list(first)
    assert len(listed.read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="2 of 5 rows are wrong"):
        load_pairs(path, max_bad_share=0.39)


def test_too_many_bad_rows(tmp_path):
    path, listed = write_rows(tmp_path / "x.jsonl", MIXED), tmp_path / "bad_rows.jsonl"
    reasons = rf"\(all of them in {listed}\): {path}, row 2: broken JSON .*; {path}, row 5: field 'pos' is missing"
    for share in (0, 0.1, 0.39):
        with pytest.raises(
            ValueError, match=rf"2 of 5 rows are wrong, more than max_bad_share={share} .* more {reasons}"
        ):
            load_pairs(path, max_bad_share=share, bad_rows_file=listed)
        assert len(listed.read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="1 of 2 rows are wrong"):  # of the rows that are read
        load_pairs(path, max_bad_share=0.4, limit=2)
    with pytest.raises(ValueError, match=r"x\.jsonl:2: broken JSON"):
        load_pairs(path)
    everything = write_rows(tmp_path / "y.jsonl", ["no JSON"] * 9)
    with pytest.raises(ValueError, match=r"y\.jsonl: 9 of 9 rows are wrong"):
        load_pairs(everything, max_bad_share=0.99)


def test_without_bad_rows_none_are_listed(tmp_path):
    path, listed = write_rows(tmp_path / "x.jsonl", [PAIR]), tmp_path / "bad_rows.jsonl"
    listed.write_text("of an earlier run")
    assert list(load_pairs(path, max_bad_share=0, bad_rows_file=listed)) == list(load_pairs(path))
    assert not listed.exists()


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, True, "0.1", float("nan")])
def test_max_bad_share_is_a_share(tmp_path, share):
    with pytest.raises(ValueError, match="max_bad_share must be a share of the rows, 0 <= share < 1, not "):
        load_pairs(write_rows(tmp_path / "x.jsonl", [PAIR]), max_bad_share=share)
