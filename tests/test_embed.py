"""Bulk embedding: the vectors of `generate_embedding`, ids kept, bad rows set aside, and no row lost or repeated when a
worker or the whole job is killed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT

pytest.importorskip("ray.data")
import pyarrow as pa
import pyarrow.parquet as pq
import ray

import embed_gircse
from embed_gircse import EXIT_BAD_ROWS, main, parse
from gircse import command_line, rows
from gircse.command_line import progress
from gircse.embedding import actors, shards
from gircse.embedding import plan as plans
from gircse.embedding.actors import size_pool
from gircse.embedding.plan import PLAN, make_plan
from gircse.embedding.shards import BAD_ROWS

if not (ROOT / "model.safetensors").exists():
    pytest.skip("the repo root holds no model.safetensors to embed with", allow_module_level=True)

ROWS = [json.loads(line) for line in (ROOT / "sample_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
TEXTS = [text for row in ROWS for text in (row["query"], *row["pos"])]
INSTRUCTION = "Given a question, retrieve an answer."


@pytest.fixture(scope="module")
def cluster():
    """One local Ray for the tests that kill nothing."""
    ray.shutdown()  # one that tests of another file may have left
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def write_lines(file: Path, lines: list[bytes | dict]) -> Path:
    content = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def arguments(pattern: Path | str, output: Path, *more: str) -> list[str]:
    return ["--input", str(pattern), "--output", str(output), "--num_actors", "2", "--num_gpus", "0", *more]


def read(output: Path) -> dict:
    """id -> embedding, of the folder as any reader of Parquet sees it; an id that is there twice is an error."""
    table = pq.read_table(output)
    ids = table["id"].to_pylist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, torch.tensor(table["embedding"].to_pylist()), strict=True))


def bad_rows(output: Path) -> list[tuple[str, int]]:
    lines = (output / BAD_ROWS).read_text(encoding="utf-8").splitlines()
    return [(row["file"], row["row"], row["reason"]) for row in map(json.loads, lines)]


def stamps(output: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in output.glob("[0-9]*.parquet")}


def expected(texts: list[str], k: int, instruction: str | None = None) -> torch.Tensor:
    settings = {"model": str(ROOT), "revision": None, "dtype": "float32"}
    model, processor = actors.load_model(settings, trust_remote_code=False)
    return model.generate_embedding(**processor(texts, instruction=instruction), k=k)


# What comes out ------------------------------------------------------------------------------------------------------


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
    cosines = F.cosine_similarity(vectors, expected([text for part in parts for text in part], 2, INSTRUCTION))
    assert cosines.min() > 0.9999
    kind = pq.read_schema(output / "000000.parquet").field("embedding").type
    assert kind == pa.list_(pa.float32(), 384)

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


def test_another_model_default_ids_and_status_0(cluster, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in (*ROOT.glob("*.json"), *ROOT.glob("*_gircse.py"), ROOT / "model.safetensors"):
        shutil.copy(file, model)
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "same.jsonl", [{"text": f"{name} {i}"} for i in range(3)])
    output = tmp_path / "out"
    call = arguments(tmp_path / "?" / "same.jsonl", output, "--model", str(model), "--trust_remote_code")
    assert main(call) == 0
    found = read(output)
    assert list(found) == [f"{name}/same.jsonl:{row}" for name in "xy" for row in (1, 2, 3)]
    texts = [f"{name} {i}" for name in "xy" for i in range(3)]  # k is that of the config
    assert F.cosine_similarity(torch.stack(list(found.values())), expected(texts, 5)).min() > 0.9999
    assert bad_rows(output) == []


def embed_alone(call: list[str], order: int = 1) -> int:
    """Runs a job without Ray, its shards in this order; returns its exit status."""
    options = parse(call)
    plan = make_plan(options)
    embedder = actors.Embedder(plan, str(options.output), options.batch_size, "cpu", False)
    for shard in plans.list_shards(plan)[::order]:
        if not (options.output / shard["name"]).exists():
            assert embedder(shard)["rows"] == shard["stop"] - shard["start"]
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
    """They and the steps share the backbone's 512 positions."""
    texts = ["x " * 2000, "short"]
    call = finished(tmp_path, [{"text": text} for text in texts], "--k", "30")
    assert main(call) == 0
    settings = {"model": str(ROOT), "revision": None, "dtype": "float32"}
    model, processor = actors.load_model(settings, trust_remote_code=False)
    vectors = model.generate_embedding(**processor(texts, max_length=512 - 30), k=30)
    found = torch.stack(list(read(tmp_path / "out").values()))
    assert F.cosine_similarity(found, vectors).min() > 0.9999


def test_a_k_that_leaves_no_room_for_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="k=512 takes all positions"):
        finished(tmp_path, [{"text": "x"}], "--k", "512")


def test_what_others_write_is_left_to_them(tmp_path):
    """Another run of the same job, here or on another machine that shares the folder."""
    call, output = finished(tmp_path, [{"text": "x"}], "--k", "1"), tmp_path / "out"
    gone = subprocess.Popen(["true"])
    gone.wait()
    here = shards._machine()
    kept = [f".000001.parquet.{here}-{os.getpid()}.tmp", ".000002.parquet.elsewhere-1.tmp"]
    kept += [f".000003.parquet.domain.{here}-{gone.pid}.tmp"]  # a longer name of another machine
    old = [f".000004.parquet.{here}-{os.getpid()}.tmp", ".000005.parquet.elsewhere-1.tmp"]
    for name in (*kept, *old, f"._bad_rows.jsonl.{here}-{gone.pid}.tmp"):
        (output / name).write_text("half")
    for name in old:
        os.utime(output / name, (time.time() - 2 * 24 * 3600,) * 2)
    assert main(call) == 0
    assert sorted(file.name for file in output.glob(".*")) == sorted(kept)


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
    call = arguments(file, tmp_path / "out", "--k", "1")
    tally = actors.Tally()
    told = []
    remote = SimpleNamespace(tell=SimpleNamespace(remote=lambda *of: (told.append(of), tally.tell(*of))))
    embedder = actors.Embedder(make_plan(parse(call)), str(tmp_path / "out"), 2, "cpu", False, remote)
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


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "--k 3",
        "--instruction x",
        "--dtype bfloat16",
        "--rows_per_shard 9",
        "--id_column n",
        "model",
        "input",
        "content",
    ],
)
def test_other_arguments_for_the_same_output_are_refused(tmp_path, make_model, change):
    write_lines(tmp_path / "a.jsonl", [{"text": "x", "n": 1}])
    call = arguments(tmp_path / "*.jsonl", tmp_path / "out", "--k", "2")
    plan = make_plan(parse(call))
    assert make_plan(parse([*call, "--batch_size", "3", "--num_actors", "1"])) == plan  # these change no vector
    if change == "model":
        make_model().save_pretrained(tmp_path / "model")
        call += ["--model", str(tmp_path / "model"), "--trust_remote_code"]
    elif change == "input":
        write_lines(tmp_path / "b.jsonl", [{"text": "x"}])
    elif change == "content":
        write_lines(tmp_path / "a.jsonl", [{"text": "y", "n": 1}])
    else:
        call += change.split()
    file = {"input": "b", "content": "a"}.get(change)
    name = f"input {tmp_path / file}.jsonl" if file else change.split()[0].removeprefix("--")
    with pytest.raises(ValueError, match=re.escape(f"{name} was ")) as error:
        make_plan(parse(call))
    assert str(tmp_path / "out") in str(error.value)
    assert json.loads((tmp_path / "out" / PLAN).read_text()) == plan


def test_the_same_files_on_another_machine_go_on(tmp_path, make_model):
    """Copied again, they have other times."""
    make_model().save_pretrained(tmp_path / "model")
    data = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    call = arguments(data, tmp_path / "out", "--model", str(tmp_path / "model"), "--trust_remote_code")
    plan = make_plan(parse(call))
    for file in (data, *(tmp_path / "model").iterdir()):
        os.utime(file, (1, 1))
    assert make_plan(parse(call)) == plan


TWO_COMMITS = """
import json, sys
from pathlib import Path
import embed_gircse
from gircse.embedding import actors
folder, cache = map(Path, sys.argv[1:])
call = ["--input", str(folder / "a.jsonl"), "--model", "you/gircse", "--trust_remote_code", "--output"]
def revision(output, *more):
    settings = embed_gircse.make_plan(embed_gircse.parse([*call, str(folder / output), *more]))["settings"]
    return [settings["revision"][0], actors.load_model(settings, True)[0].config.num_steps]
def move_main(commit):
    (cache / "models--you--gircse" / "refs" / "main").write_text(commit)
move_main("b" * 40)
found = [revision("named", "--revision", "a" * 40), revision("main")]
move_main("a" * 40)
found += [revision("main"), revision("later")]
try:
    revision("main", "--revision", "a" * 40)
except ValueError as error:
    found.append(str(error))
print(json.dumps(found))
"""


def test_a_job_keeps_the_commit_that_it_began_with(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    repo = tmp_path / "cache" / "models--you--gircse"
    (repo / "refs").mkdir(parents=True)
    for commit, steps in (("a", 7), ("b", 5)):
        snapshot = repo / "snapshots" / (commit * 40)
        snapshot.mkdir(parents=True)
        for file in (*ROOT.glob("*.json"), *ROOT.glob("*_gircse.py"), ROOT / "model.safetensors"):
            (snapshot / file.name).symlink_to(file)
        config = json.loads((ROOT / "config.json").read_text()) | {"num_steps": steps}
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").write_text(json.dumps(config))
    run = subprocess.run(
        [sys.executable, "-c", TWO_COMMITS, str(tmp_path), str(tmp_path / "cache")],
        env={
            **os.environ,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    *found, refused = json.loads(run.stdout)
    assert found == [["a", 7], ["b", 5], ["b", 5], ["a", 7]]
    assert "revision was 'bbbb" in refused and ", is 'aaaa" in refused


@pytest.mark.parametrize(
    "nodes, asked, actors",
    [
        ([(16, 8), (8, 1)], {}, (9, 1, 1)),
        ([(16, 8), (8, 1)], {"num_actors": 2}, (2, 1, 1)),
        ([(2, 8), (8, 0)], {}, (2, 1, 1)),  # an actor needs a core
        ([(8, 2)], {"num_gpus": 0.5}, (4, 0.5, 1)),
        ([(8, 0), (4, 0)], {}, (2, 0, 4)),
        ([(8, 0), (4, 0)], {"num_actors": 2}, (4, 0, 2)),
        ([(8, 0), (1, 0)], {"num_actors": 2}, (2, 0, 4)),
    ],
)
def test_pool_of_actors(monkeypatch, nodes, asked, actors):
    alive = [{"Alive": True, "Resources": {"CPU": float(cpu), "GPU": float(gpu)}} for cpu, gpu in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}])
    assert size_pool(**{"num_actors": None, "num_gpus": None, **asked}) == actors


def test_what_can_not_be_right_is_refused_before_anything_runs(tmp_path, make_model):
    good = write_lines(tmp_path / "good.jsonl", [{"text": "x", "n": 1, "list": []}])
    odd = {"real": [1.5], "money": [Decimal("10.5")], "bytes": [b"x"]}
    pq.write_table(pa.table({"text": ["x"], "n": ["a"], **odd}), tmp_path / "b.parquet")
    (tmp_path / "array.json").write_text('[{"text": "x"}')
    (tmp_path / "array.json.gz").write_text('[{"text": "x"}]')
    (tmp_path / "none.csv").touch()
    write_lines(tmp_path / "a.txt", [b"x"])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    write_lines(tmp_path / "sparse.jsonl.gz", [b"", b'{"body"', b"[3]", {"m": 1}, {"text": "x"}])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    make_model().save_pretrained(tmp_path / "model")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text('{"model_type": "qwen2"}')
    for pattern, more, problem in [
        ("none*.jsonl", "", "matches no file"),
        ("a.txt", "", "ends in none of"),
        ("cut.jsonl.gz", "", "can't be read to its end"),
        ("b.parquet", "--text_column body", "no column 'body', only 'text', 'n'"),
        ("b.parquet", "--id_column real", "id_column='real' is of type double: cast it to int or str"),
        ("b.parquet", "--id_column money", "id_column='money' is of type decimal128(3, 1): cast it to int or str"),
        ("b.parquet", "--text_column real", "text_column='real' is of type double: cast it to str"),
        ("b.parquet", "--text_column bytes", "text_column='bytes' is of type binary: cast it to str"),
        ("array.json", "", "broken JSON array"),
        ("array.json.gz", "", "can't be read to its end"),
        ("none.csv", "", "no header"),
        (good.name, "--text_column body", "no column 'body', only 'text', 'n', 'list'"),
        (good.name, "--id_column key", "no column 'key', only 'text', 'n', 'list'"),
        ("sparse.jsonl.gz", "--text_column body", "no column 'body', only 'm', 'text'"),
        ("[gb]*", "--id_column n", "several types"),
        (good.name, f"--output {tmp_path / 'full'}", "holds other files"),
        (good.name, f"--model {tmp_path / 'model'}", "add --trust_remote_code"),
        (good.name, f"--model {tmp_path / 'plain'} --trust_remote_code", "no GIRCSE model but of type 'qwen2'"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(problem)):
            make_plan(parse([*arguments(tmp_path / pattern, tmp_path / "out"), *more.split()]))
        assert not (tmp_path / "out" / PLAN).exists()
    for wrong in (["--k", "0"], ["--batch_size", "x"]):
        with pytest.raises(SystemExit) as error:
            parse([*arguments(good, tmp_path / "out"), *wrong])
        assert error.value.code == 2


def test_columns_of_lines_may_come_late_or_not_at_all(tmp_path):
    late = write_lines(tmp_path / "late.jsonl", [b"broken", {"m": 1}, {"n": None, "text": "x"}, {"n": 3}])
    assert plans.measure(late, "text", None) == (4, None)
    assert plans.measure(late, "text", "n") == (4, "int")
    for lines in ([], [b"", b"broken", b"[3]"]):  # no row, so that the report says what is wrong with each line
        file = write_lines(tmp_path / "broken.jsonl", lines)
        assert plans.measure(file, "text", "n") == (len(lines), None)


def test_lines_are_counted_without_being_parsed(tmp_path, monkeypatch):
    file = write_lines(tmp_path / "a.jsonl.gz", [{"m": 1}, {"n": 2, "text": "x"}, *[{"n": 3, "text": "y"}] * 1000])
    loads, calls = json.loads, []
    monkeypatch.setattr(rows.json, "loads", lambda line: (calls.append(line), loads(line))[1])
    assert plans.measure(file, "text", "n") == (1002, "int") and len(calls) == 2


def test_files_have_names_whatever_they_are_called_and_wherever_they_lie(tmp_path, monkeypatch):
    files = [tmp_path / "x" / "a.csv", tmp_path / "y" / "\udcff\u4e2d.csv"]  # what no UTF-8 is, as Python has it
    assert plans.name_files(files) == ["x/a.csv", "y/\\udcff\u4e2d.csv"]

    def commonpath(_):
        raise ValueError("Paths don't have the same drive")

    monkeypatch.setattr(os.path, "commonpath", commonpath)
    assert plans.name_files(files[:1]) == [files[0].as_posix()]


def test_another_adapter_for_the_same_output_is_refused(tmp_path):
    """An adapter-only model keeps its weights in a folder of their own."""
    model, data = tmp_path / "model", write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    (model / "lora").mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "gircse", "adapter": "lora"}')
    (model / "lora" / "adapter_model.safetensors").write_bytes(b"1")
    call = arguments(data, tmp_path / "out", "--model", str(model), "--trust_remote_code")
    assert make_plan(parse(call)) == make_plan(parse(call))
    (model / "lora" / "adapter_model.safetensors").write_bytes(b"12")
    with pytest.raises(ValueError, match="model file lora/adapter_model.safetensors was "):
        make_plan(parse(call))


def test_more_actors_than_fit_are_refused(cluster, tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    for more in (["--num_actors", "64"], ["--num_gpus", "8"]):
        with pytest.raises(ValueError, match="no node has room"):
            main([*arguments(file, tmp_path / "out"), *more])


# What is killed ------------------------------------------------------------------------------------------------------


def start(call: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    with open(log, "w") as output:
        command = [sys.executable, str(ROOT / "embed_gircse.py"), *call]
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)


def descendants(root: int) -> dict[int, str]:
    """The command lines of all processes below `root`, by id."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has just ended
            continue
    below, new = set(), {root}
    while new:
        new = {process for process, parent in parents.items() if parent in new}
        below |= new
    return {process: names[process] for process in below if process in names}


def wait_for(condition, log: Path, seconds: float = 300):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.02)
    return value


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def actors_of(job: subprocess.Popen) -> list[int]:
    return [process for process, name in descendants(job.pid).items() if re.match(r"ray::.*Embedder", name)]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_a_killed_job_and_a_killed_worker_lose_and_repeat_no_row(tmp_path):
    """SIGKILL to the whole job; then the same command again, and SIGKILL to one of its actors, which it survives."""
    texts = TEXTS[:288]
    write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts[:144]])
    write_lines(tmp_path / "b.jsonl.gz", [{"text": text} for text in texts[144:]])
    output, log = tmp_path / "out", tmp_path / "log"
    call = arguments(tmp_path / "*.jsonl*", output, "--k", "20", "--rows_per_shard", "12", "--batch_size", "1")

    def wait_for_shards(job: subprocess.Popen, count: int) -> None:
        wait_for(lambda: len(stamps(output)) >= count or job.poll() is not None, log)
        assert job.poll() is None, f"ended too early to be killed:\n{log.read_text()[-3000:]}"

    job = start(call, log)
    try:
        wait_for_shards(job, 2)
        below = descendants(job.pid)
    finally:
        job.kill()
        job.wait()
    wait_for(lambda: not any(map(alive, below)), log)  # Ray's processes end with the job that started them
    before = stamps(output)
    assert 2 <= len(before) < 24 and not (output / BAD_ROWS).exists()
    (output / f".000023.parquet.{shards._machine()}-{job.pid}.tmp").write_text("half of a shard")

    job = start(call, log)
    try:
        wait_for_shards(job, len(before) + 2)
        actors = actors_of(job)
        assert len(actors) == 2
        os.kill(actors[0], signal.SIGKILL)
        wait_for(lambda: set(actors_of(job)) - set(actors) or job.poll() is not None, log)
        assert job.wait(timeout=300) == 0, log.read_text()[-3000:]
    finally:
        job.kill()
    after = stamps(output)
    assert len(after) == 24 and {name: after[name] for name in before} == before
    assert f"24 shards, {len(before)} of before" in log.read_text()
    assert sorted(file.name for file in output.iterdir()) == sorted([*after, BAD_ROWS, PLAN])
    found = read(output)
    assert list(found) == [f"{name}:{row}" for name in ("a.jsonl", "b.jsonl.gz") for row in range(1, 145)]
    vectors = torch.stack(list(found.values()))[::29]
    assert F.cosine_similarity(vectors, expected(texts[::29], 20)).min() > 0.9999
