"""The draw of training pairs: evenly from sources, with their classes."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from conftest import ROOT

sys.path.append(str(ROOT / "recipes"))
import choose_pairs


def test_pairs_are_drawn_evenly_from_sources_and_short(tmp_path, monkeypatch):
    def write(name: str, source: str, count: int, length: int = 10) -> None:
        same = {"pos": ["p"], "neg": ["n"], "source": source, "instruction": "i"}
        rows = [{"query": f"{i}" * length, **same} for i in range(1, count + 1)]
        path = tmp_path / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))

    write("a.jsonl.gz", "few", 3)
    write("b.jsonl.gz", "snips", 9)
    write("c.jsonl.gz", "many", 9)
    write("d.jsonl.gz", "long", 9, length=99)
    write(choose_pairs.UNLICENSED, "unlicensed", 9)

    def drawn(count: int, *more: object, longest: int = 20, seed: int = 0) -> list[dict]:
        where = ("--data", tmp_path, "--output", tmp_path / "pairs.jsonl")
        arguments = (*where, "--pairs", count, "--longest", longest, "--seed", seed, *more)
        monkeypatch.setattr(sys, "argv", ["choose_pairs.py", *map(str, arguments)])
        choose_pairs.main()
        return [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]

    rows = drawn(13)
    assert [row["source"] for row in rows] == ["few"] * 3 + ["classes"] * 5 + ["many"] * 5
    assert len({(row["source"], row["query"]) for row in rows}) == 13
    assert drawn(13) == rows and drawn(13, seed=1) != rows
    assert len(drawn(30, longest=99)) == 30
    assert drawn(13, "--twice", "few") == rows + rows[:3]
    assert [row["source"] for row in drawn(6, "--sources", "many", "few")] == ["few"] * 3 + ["many"] * 3
    same = {"pos": ["p"], "neg": [], "source": "bare", "instruction": "i", "query": "q"}
    (tmp_path / "train/e.jsonl.gz").write_bytes(gzip.compress(json.dumps(same).encode()))
    assert [row["source"] for row in drawn(2, "--sources", "few", "bare")] == ["bare", "few"]
    assert [row["source"] for row in drawn(2, "--sources", "few", "bare", "--with_negatives")] == ["few"] * 2
    (tmp_path / "train/e.jsonl.gz").unlink()
    with pytest.raises(ValueError, match="--sources lots, some: there are only few, many, snips"):
        drawn(2, "--sources", "lots", "many", "some")
    with pytest.raises(ValueError, match="pairs=22, but there are 21 of that length"):
        drawn(22)


def test_classes_are_told_by_the_pairs():
    def pair(query: str, pos: str, neg: str = "x") -> dict:
        return {"query": query, "pos": [pos], "neg": [neg]}

    sources = {
        "banking77": [pair("a", "b"), pair("c", "d"), pair("b", "e"), pair("f", "d")],
        "clinc150_intent": [pair("on", "on!"), pair("off", "off!"), pair("rain", "rain!")],
        "clinc150_domain": [pair("on", "off", "rain"), pair("rain", "sun", "on")],
        "cad_imdb_sentiment": [pair("good", "fine", "bad"), pair("bad", "poor", "good"), pair("poor", "dull", "rich")],
        "stsb": [pair("a", "b")],
    }
    labelled = choose_pairs.label(sources)
    labels = {name: [row.get("label") for row in rows] for name, rows in labelled.items()}
    assert labels["banking77"] == [f"banking77 {number}" for number in (0, 1, 0, 1)]
    assert labels["clinc150_intent"] == [f"clinc150_intent {number}" for number in (0, 1, 2)]
    assert labels["clinc150_domain"] == ["clinc150_domain 0", "clinc150_domain 1"]
    good, bad, poor = labels["cad_imdb_sentiment"]
    assert bad == poor != good
    assert labels["stsb"] == [None]
    assert [{**row, "label": 0} for row in labelled["banking77"]] == [{**r, "label": 0} for r in sources["banking77"]]
