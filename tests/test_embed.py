"""Bulk embedding: the vectors of `generate_embedding`, ids kept, bad rows set aside, and what is shown meanwhile."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray.data")
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
import torch.nn.functional as F

import embed_gircse
import embed_helpers
from embed_gircse import EXIT_BAD_ROWS, main, parse, what_actors_share
from embed_helpers import TEXTS, arguments, expected, machine, read, stamps, write_lines
from gircse import command_line, loading, rows
from gircse.command_line import progress
from gircse.embedding import actors, shards
from gircse.embedding import plan as plans
from gircse.embedding.plan import make_plan
from gircse.embedding.shards import BAD_ROWS
from helpers import ROOT, export_tiny

INSTRUCTION = "Given a question, retrieve an answer."
# Of an embedder without Ray: nobody is told how far it is.
ALONE = {"device": "cpu", "tally": SimpleNamespace(tell=SimpleNamespace(remote=lambda *_: None))}


@pytest.fixture(scope="module", autouse=True)
def model(gircse, tmp_path_factory) -> Iterator[Path]:
    """A tiny one, where a test doesn't name another."""
    embed_helpers.MODEL = export_tiny(gircse, tmp_path_factory.mktemp("embedder") / "model")
    yield embed_helpers.MODEL
    embed_helpers.MODEL = None


def bad_rows(output: Path) -> list[tuple[str, int]]:
    lines = (output / BAD_ROWS).read_text(encoding="utf-8").splitlines()
    return [(row["file"], row["row"], row["reason"]) for row in map(json.loads, lines)]


# What comes out ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kind_of_input_keeps_ids_and_sets_bad_rows_aside(cluster, tmp_path, capsys):
    """Parquet, JSONL and JSONL.gz in one run; shards of 7 rows, so that files and row groups are cut."""
    parts = [TEXTS[:20], [*TEXTS[20:32], "", "x " * 2000], TEXTS[32:45]]
    (tmp_path / "in" / "deep").mkdir(parents=True)
    table = pa.table({"key": range(100, 121), "other": ["-"] * 21, "text": [*parts[0], None]})
    pq.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=6)
    lines = [{"key": 200 + i, "text": text} for i, text in enumerate(parts[1])]
    bad = [b'{"key": 1, "text": "half', b'{"key": 2}', b"[3]", b'{"key": 4, "text": 5}', b'{"key": 5, "text": "\xff"}']
    bad += [b'{"key": "six", "text": "x"}', b'{"text": "no id"}', b'{"key": 8, "text": "\\ud83d"}']
    lines[3:3] = [b"", *bad]
    write_lines(tmp_path / "in" / "b.jsonl", lines)
    lines = [{"key": 300 + i, "text": text} for i, text in enumerate(parts[2])]
    write_lines(tmp_path / "in" / "deep" / "c.jsonl.gz", lines)
    output = tmp_path / "out"
    call = arguments(tmp_path / "in" / "**" / "*.*", output, "--id_column", "key", "--k", "2", "--rows_per_shard", "7")
    call += ["--instruction", INSTRUCTION, "--batch_size", "4"]
    assert main(call) == EXIT_BAD_ROWS

    found = read(output)
    ids = [*range(100, 120), *range(200, 214), *range(300, 313)]
    assert list(found) == ids  # in the order of the input, too
    vectors = torch.stack(list(found.values()))
    assert vectors.dtype == torch.float32
    texts = [text for part in parts for text in part]
    assert F.cosine_similarity(vectors, expected(texts, 2, instruction=INSTRUCTION)).min() > 0.9999
    kind = pq.read_schema(output / "000000.parquet").field("embedding").type
    assert kind == pa.list_(pa.float32(), vectors.shape[1])

    reported = bad_rows(output)
    assert [row[:2] for row in reported] == [("a.parquet", 21), *(("b.jsonl", line) for line in range(5, 13))]
    reasons = [
        "None",
        "JSON",
        "no field 'text'",
        "must be a JSON object",
        "5 (int)",
        "JSON",
        "'six' (str)",
        "'key'",
        "surr",
    ]
    assert [word in reason for word, (*_, reason) in zip(reasons, reported, strict=True)] == [True] * len(reasons)
    printed = capsys.readouterr()
    assert "47 rows embedded" in printed.out and "9 bad rows" in printed.out
    for wait in ("reading model and input", "counting rows", "2 actors load the model", "reading what was set aside"):
        assert wait in printed.err

    assert b"_text_rows" in ray.cloudpickle.dumps(rows.RowFile)  # the code itself, for nodes without this repo

    before = stamps(output)
    assert main(call) == EXIT_BAD_ROWS and stamps(output) == before  # all there, nothing done again
    assert bad_rows(output) == reported


@pytest.mark.slow
def test_the_model_of_this_repo_default_ids_and_status_0(cluster, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "same.jsonl", [{"text": f"{name} {i}"} for i in range(3)])
    output = tmp_path / "out"
    files = str(tmp_path / "?" / "same.jsonl")
    call = ["--input", files, "--output", str(output), "--num_actors", "1"]  # two are in the test above
    assert main(call) == 0
    found = read(output)
    assert list(found) == [f"{name}/same.jsonl:{row}" for name in "xy" for row in (1, 2, 3)]
    texts = [f"{name} {i}" for name in "xy" for i in range(3)]  # k is that of the config
    assert F.cosine_similarity(torch.stack(list(found.values())), expected(texts, 5, ROOT)).min() > 0.9999
    assert bad_rows(output) == []


def test_vectors_that_are_no_numbers_are_an_error(tmp_path, monkeypatch):
    options = parse(arguments(write_lines(tmp_path / "a.jsonl", [{"text": "x"}]), tmp_path / "out"))
    plan = make_plan(options)
    embedder = actors.Embedder(**what_actors_share(options, plan), **ALONE)
    monkeypatch.setattr(embedder.model, "generate_embedding", lambda **_: torch.tensor([[float("nan")] * 576]))
    (shard,) = plans.list_shards(plan)
    with pytest.raises(RuntimeError, match=r"000000.parquet: vectors are not finite in torch.float32: use another"):
        embedder(shard)
    assert not (tmp_path / "out" / shard["name"]).exists()


def embed_alone(call: list[str], order: int = 1) -> int:
    """Runs a job without Ray, its shards in this order; returns its exit status."""
    options = parse(call)
    plan = make_plan(options)
    embedder = actors.Embedder(**what_actors_share(options, plan), **ALONE)
    for shard in plans.list_shards(plan)[::order]:
        if not (options.output / shard["name"]).exists():
            embedder(shard)
    return main(call)


def finished(tmp_path: Path, lines: list[dict], *more: str) -> list[str]:
    """The call of a job whose one shard is there, made without Ray."""
    call = arguments(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "out", *more)
    assert embed_alone(call) == 0
    return call


def test_tables_and_arrays_are_embedded_in_any_order_of_their_shards(tmp_path):
    texts = [f"{word} {i}" for word in ("one", "two", "three", "four", "five") for i in range(7)]
    parts = [texts[start : start + 7] for start in range(0, 35, 7)]

    def write_table(name: str, part: list[str], delimiter: str) -> None:
        content = io.StringIO()
        writer = csv.writer(content, delimiter=delimiter)
        writer.writerows([["note", "text"], *([i, text] for i, text in enumerate(part))])
        write_lines(tmp_path / name, [content.getvalue().rstrip().encode()])

    write_table("a.csv", [*parts[0], ""], ";")
    write_table("b.tsv.gz", parts[1], "\t")
    array = json.dumps([{"text": parts[2][0]}, 3, *({"text": text} for text in parts[2][1:])], indent=1)
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + array.encode())
    write_lines(tmp_path / "d.ndjson.gz", [b"", *({"text": text} for text in parts[3])])
    pq.write_table(pa.table({"text": parts[4]}), tmp_path / "e.parquet", row_group_size=3)
    call = arguments(tmp_path / "[a-e].*", tmp_path / "out", "--k", "1", "--rows_per_shard", "3")
    assert embed_alone(call, order=-1) == EXIT_BAD_ROWS

    found = read(tmp_path / "out")
    rows = [("a.csv", 1), ("b.tsv.gz", 1), ("c.json", 1), ("c.json", 3), ("d.ndjson.gz", 2), ("e.parquet", 1)]
    counts = [7, 7, 1, 6, 7, 7]
    ids = [f"{name}:{row + i}" for (name, row), count in zip(rows, counts, strict=True) for i in range(count)]
    assert list(found) == ids
    assert F.cosine_similarity(torch.stack(list(found.values())), expected(texts, 1)).min() > 0.9999
    assert [row[:2] for row in bad_rows(tmp_path / "out")] == [("a.csv", 8), ("c.json", 2)]


def as_kind(values: list[bytes | None], kind: str) -> pa.Array:
    """Text of any Arrow type, of bytes that need not be UTF-8."""
    if kind == "string_view":
        return pa.Array.from_buffers(pa.string_view(), len(values), pa.array(values, pa.binary_view()).buffers())
    large = pa.Array.from_buffers(pa.large_string(), len(values), pa.array(values, pa.large_binary()).buffers())
    return large.dictionary_encode() if kind == "category" else large


@pytest.mark.parametrize("kind", ["string_view", "category", "large_string"])
def test_text_of_any_arrow_type_and_a_broken_byte(tmp_path, kind):
    """Also when the job is started again, with a shard that is missing."""
    texts = [b"one", "zwei \u00e4".encode(), b"not \xff", None, b"one", b"a text too long to be in the view itself"]
    ids = [b"a", "\u00e4".encode(), b"c", b"d", b"not \xff", b"f"]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": as_kind(texts, kind), "key": as_kind(ids, kind)}), file)
    assert str(pq.read_schema(file).field("key").type).startswith("dictionary" if kind == "category" else kind)
    call = arguments(file, tmp_path / "out", *"--id_column key --k 1 --rows_per_shard 4".split())
    assert embed_alone(call) == EXIT_BAD_ROWS
    (tmp_path / "out" / "000000.parquet").unlink()
    assert embed_alone(call) == EXIT_BAD_ROWS
    found = read(tmp_path / "out")
    assert list(found) == ["a", "\u00e4", "f"]
    vectors = expected([texts[row].decode() for row in (0, 1, 5)], 1)
    assert F.cosine_similarity(torch.stack(list(found.values())), vectors).min() > 0.9999
    reported = bad_rows(tmp_path / "out")
    assert [row for _, row, _ in reported] == [3, 4, 5]
    assert "UTF-8" in reported[0][2] and "None" in reported[1][2] and "UTF-8" in reported[2][2]


def test_integer_ids_of_any_width(tmp_path):
    widths = {"int8": -(2**7), "uint16": 2**16 - 1, "int32": -(2**31), "int64": -(2**63), "uint64": 2**63 - 1}
    for name, value in widths.items():
        table = pa.table({"text": [name], "n": pa.array([value], getattr(pa, name)())})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    pq.write_table(pa.table({"text": ["x"], "n": pa.array([2**63], pa.uint64())}), tmp_path / "z.parquet")
    call = arguments(tmp_path / "*.parquet", tmp_path / "out", "--id_column", "n", "--k", "1")
    assert embed_alone(call) == EXIT_BAD_ROWS
    found = read(tmp_path / "out")
    assert list(found) == [widths[name] for name in sorted(widths)]
    assert F.cosine_similarity(torch.stack(list(found.values())), expected(sorted(widths), 1)).min() > 0.9999
    assert [(file, row, "64 bits" in why) for file, row, why in bad_rows(tmp_path / "out")] == [("z.parquet", 1, True)]


def test_a_column_of_nothing_is_told_of_each_row(tmp_path):
    """As a part of a larger corpus may have it."""
    pq.write_table(pa.table({"text": pa.nulls(2), "n": pa.nulls(2)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x", "y"], "n": [None, 7]}), tmp_path / "b.parquet")
    call = arguments(tmp_path / "*.parquet", tmp_path / "out", "--id_column", "n", "--k", "1")
    assert embed_alone(call) == EXIT_BAD_ROWS
    assert list(read(tmp_path / "out")) == [7]
    assert [row[:2] for row in bad_rows(tmp_path / "out")] == [("a.parquet", 1), ("a.parquet", 2), ("b.parquet", 1)]


def test_a_large_k_truncates_long_texts(tmp_path):
    """They and the steps share the backbone's 128 positions."""
    texts = ["x " * 2000, "short"]
    call = finished(tmp_path, [{"text": text} for text in texts], "--k", "100")
    assert main(call) == 0
    vectors = expected(texts, 100, max_length=128 - 100)
    found = torch.stack(list(read(tmp_path / "out").values()))
    assert F.cosine_similarity(found, vectors).min() > 0.9999


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
def test_documents_get_the_models_prompt_for_them(tmp_path, model, instruction):
    """As a converted model may have one."""
    changed = shutil.copytree(model, tmp_path / "model")
    settings = json.loads((changed / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    settings["prompts"]["document"] = "passage: "
    (changed / "config_sentence_transformers.json").write_text(json.dumps(settings))
    options = ["--instruction", instruction] if instruction else []
    finished(tmp_path, [{"text": "a red thing"}], "--k", "2", "--model", str(changed), *options)
    kept = {"instruction": instruction} if instruction else {"prompt": "passage: "}
    found = torch.stack(list(read(tmp_path / "out").values()))
    assert F.cosine_similarity(found, expected(["a red thing"], 2, changed, **kept)).min() > 0.9999


def test_a_job_whose_models_prompts_can_not_be_read_does_not_begin(tmp_path, monkeypatch):
    """For a want of them, an actor would embed documents bare that others embed under a prompt."""
    options = parse(arguments(write_lines(tmp_path / "a.jsonl", [{"text": "x"}]), tmp_path / "out"))
    plan = make_plan(options)

    def disconnected(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(loading, "cached_file", disconnected)
    with pytest.raises(OSError, match="config_sentence_transformers.json, which may hold prompts, can't be had: `hf"):
        what_actors_share(options, plan)


@pytest.mark.parametrize("own", [True, False])
def test_weights_have_the_dtype_that_is_asked_for(model, tmp_path, monkeypatch, own):
    """Those of this repo, which its own code loads, and of another."""
    file = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    options = parse(arguments(file, tmp_path / "out", "--dtype", "bfloat16"))
    shared = what_actors_share(options, make_plan(options))
    if own:
        monkeypatch.setattr(actors, "ROOT", model)
    assert actors.Embedder(**shared, **ALONE).model.dtype == torch.bfloat16


def test_a_k_that_leaves_no_room_for_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="k=128 takes all positions"):
        finished(tmp_path, [{"text": "x"}], "--k", "128")


def test_what_others_write_is_left_to_them(tmp_path):
    """Another run of the same job, here or on another machine that shares the folder."""
    call, output = finished(tmp_path, [{"text": "x"}], "--k", "1"), tmp_path / "out"
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = machine(tmp_path)
    kept = [f".000001.parquet.{here}-{os.getpid()}.tmp", ".000002.parquet.elsewhere-1.tmp"]
    kept += [f".000003.parquet.domain.{here}-{gone.pid}.tmp"]  # a longer name of another machine
    old = [f".000004.parquet.{here}-{os.getpid()}.tmp", ".000005.parquet.elsewhere-1.tmp"]
    for name in (*kept, *old, f"._bad_rows.jsonl.{here}-{gone.pid}.tmp"):
        (output / name).write_text("half")
    for name in old:
        os.utime(output / name, (time.time() - 2 * 24 * 3600,) * 2)
    assert main(call) == 0
    assert sorted(file.name for file in output.glob(".*")) == sorted(kept)


@pytest.mark.slow
def test_an_empty_shard_is_written_again(cluster, tmp_path, capsys):
    """As a loss of power leaves one."""
    call = finished(tmp_path, [{"text": "x"}], "--k", "1")
    shard = tmp_path / "out/000000.parquet"
    shard.write_bytes(b"")
    assert main(call) == 0 and "0 of before" in capsys.readouterr().out
    assert len(read(tmp_path / "out")) == 1


@pytest.mark.slow
def test_files_below_the_output_are_no_input(cluster, tmp_path):
    (tmp_path / "corpus").mkdir()
    output = tmp_path / "corpus/vectors"
    write_lines(tmp_path / "corpus/a.jsonl", [{"text": "x"}])
    call = arguments(tmp_path / "corpus/**/*", output, "--k", "1")
    assert main(call) == 0 and main(call) == 0


@pytest.mark.parametrize("given, joined", [("", "local"), ("1.2.3.4:6379", "1.2.3.4:6379")])
def test_only_the_named_cluster_is_joined(monkeypatch, given, joined):
    """Ray by itself would look for one that `ray start` has left here, dead or alive."""
    calls = []

    def init(address, **settings):
        calls.append(address)
        raise InterruptedError

    monkeypatch.setenv("RAY_ADDRESS", given)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("embed_gircse.what_actors_share", lambda *_: {})
    with pytest.raises(InterruptedError):
        embed_gircse.run(None, {}, [])
    assert calls == [joined]


@pytest.mark.parametrize("name", ["a-1.b", "", "x/y:*?", "B\u00fcro \u4e2d", "\udcff", "n" * 300])
def test_a_machine_may_be_called_anything(tmp_path, monkeypatch, name):
    """And nobody is killed to find out whether he lives, as Windows understands signal 0."""
    monkeypatch.setattr(platform, "node", lambda: name)
    monkeypatch.setattr(shards.psutil, "pid_exists", lambda process: process == os.getpid())
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a signal was sent"))
    monkeypatch.delattr(os, "uname")
    seen = []
    shards.write_whole(tmp_path / "000001.parquet", lambda file: (file.write_text("x"), seen.append(file)))
    assert (tmp_path / "000001.parquet").read_text() == "x" and not seen[0].exists()
    assert seen[0].name.isascii() and not set(seen[0].name) & set('/\\:*?"<>| ')
    own = os.getpid()
    left = [tmp_path / seen[0].name.replace(f"-{own}.", f"-{process}.") for process in (own, own + 1)]
    for file in left:
        file.touch()
    assert [shards.is_abandoned(file) for file in left] == [False, name != ""]  # no name is no proof
    monkeypatch.setattr(platform, "node", lambda: "another")
    assert not any(map(shards.is_abandoned, left))


# What is shown -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_that_lacks_letters(tmp_path, monkeypatch, encoding):
    data = write_lines(tmp_path / "\u4e2d.jsonl", [{"text": "x"}, b"bad"])
    call = arguments(data, tmp_path / "\u2192 out", "--k", "1")
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    assert embed_alone(call) == EXIT_BAD_ROWS
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    console.flush()
    printed = console.buffer.getvalue()
    assert b"1 rows embedded in" in printed and rb"\u2192 out" in printed and b".ndjson.gz" in printed
    assert list(read(tmp_path / "\u2192 out")) == ["\u4e2d.jsonl:1"]


def test_a_log_has_a_line_at_once_and_one_every_half_minute(capsys, monkeypatch):
    with progress(total=3, desc="at work") as bar:
        bar.update(1)
        bar.update(1)
    assert capsys.readouterr().err.count("at work") == 2  # at the begin and at the end
    monkeypatch.setattr(command_line, "LOG_SECONDS", 0)
    with progress(total=3, desc="at work") as bar:
        bar.update(1)
        bar.update(0)
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"(\d)/3", line)[1] for line in lines] == ["0", "1", "1", "1"]


def test_an_actor_tells_how_far_it_is(tmp_path, monkeypatch):
    """Each second, and of bad rows at the end."""
    file = write_lines(tmp_path / "a.jsonl", [*({"text": str(i)} for i in range(5)), b"bad"])
    options = parse(arguments(file, tmp_path / "out", "--k", "1", "--batch_size", "2"))
    tally = actors.Tally()
    told = []
    remote = SimpleNamespace(tell=SimpleNamespace(remote=lambda *of: (told.append(of), tally.tell(*of))))
    embedder = actors.Embedder(**what_actors_share(options, make_plan(options)), **ALONE | {"tally": remote})
    seconds = iter(range(0, 100, 2))
    monkeypatch.setattr(actors, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    embedder({"name": "000000.parquet", "file": 0, "start": 0, "stop": 6})
    assert told == [("000000.parquet", rows) for rows in (2, 4, 5, 6)]
    tally.tell("000001.parquet", 10)
    assert tally.total() == 16


def test_the_bar_follows_the_tally_while_it_can_be_asked(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "LOG_SECONDS", 0)
    answers = [0, ray.exceptions.GetTimeoutError(), 3, ray.exceptions.RayActorError(), 2, 5]  # 2: a shard began anew

    def get(reference, timeout):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "get", get)
    tally = SimpleNamespace(total=SimpleNamespace(remote=lambda: None))
    with progress(total=30, initial=20, desc="load") as bar:
        embed_gircse.follow(bar, tally, "work", lambda seconds: not answers)
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"(\w+): .* (\d+)/30", line).groups() for line in lines] == [
        ("load", "20"),
        ("load", "20"),
        ("work", "23"),
        ("work", "22"),
        ("work", "25"),
        ("work", "25"),
    ]


@pytest.mark.slow
def test_more_actors_than_fit_are_refused(cluster, tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    for more in (["--num_actors", "64"], ["--num_gpus", "8"]):
        with pytest.raises(ValueError, match="no node has room"):
            main([*arguments(file, tmp_path / "out"), *more])
