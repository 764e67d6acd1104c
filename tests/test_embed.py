"""Bulk embedding: the vectors of `generate_embedding`, ids kept, bad rows set aside, and no row lost or repeated when a
worker or the whole job is killed."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT

pytest.importorskip("ray.data")
import pyarrow as pa
import pyarrow.parquet as pq
import ray

import embed_gircse
from embed_gircse import BAD_ROWS, EXIT_BAD_ROWS, PLAN, Lines, main, make_plan, parquet_rows, parse

if not (ROOT / "model.safetensors").exists():
    pytest.skip("the repo root holds no model.safetensors to embed with", allow_module_level=True)

ROWS = [json.loads(line) for line in (ROOT / "sample_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
TEXTS = [text for row in ROWS for text in (row["query"], *row["pos"])]
INSTRUCTION = "Given a question, retrieve an answer."


@pytest.fixture(scope="module")
def cluster():
    """One local Ray for the tests that kill nothing."""
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
    model, processor = embed_gircse.load_model(settings, trust_remote_code=False)
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
        "not a JSON object",
        "5 (int)",
        "JSON",
        "'six' (str)",
        "'key'",
        "surr",
    ]
    assert [word in reason for word, (*_, reason) in zip(reasons, reported, strict=True)] == [True] * len(reasons)
    assert "47 rows embedded" in (printed := capsys.readouterr().out) and "9 bad rows" in printed

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


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_lines_of_any_part_in_any_order(tmp_path, suffix):
    lines = [{"n": n} for n in range(50)]
    files = [str(write_lines(tmp_path / f"{name}.{suffix}", lines)) for name in "ab"]
    reader = Lines()
    for file, start, stop in [(0, 0, 10), (0, 30, 35), (0, 35, 50), (0, 10, 30), (1, 5, 6), (0, 5, 6), (0, 45, 50)]:
        assert [(n, json.loads(line)["n"]) for n, line in reader.read(files[file], start, stop)] == [
            (n, n) for n in range(start, stop)
        ]


def test_rows_of_any_part_of_a_parquet_file(tmp_path):
    pq.write_table(pa.table({"n": range(50), "m": range(50)}), tmp_path / "a.parquet", row_group_size=8)
    for start, stop in [(0, 50), (0, 8), (7, 9), (8, 16), (3, 5), (20, 45), (49, 50)]:
        rows = list(parquet_rows(str(tmp_path / "a.parquet"), {"n"}, start, stop))
        assert rows == [(n, {"n": n}) for n in range(start, stop)]


def finished(tmp_path: Path, lines: list[dict], *more: str) -> list[str]:
    """The call of a job whose one shard is there, made without Ray."""
    call = arguments(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "out", *more)
    embedder = embed_gircse.Embedder(make_plan(parse(call)), str(tmp_path / "out"), 4, "cpu", False)
    assert embedder({"name": "000000.parquet", "file": 0, "start": 0, "stop": len(lines)})["bad"] == 0
    return call


def test_a_large_k_truncates_long_texts(tmp_path):
    """They and the steps share the backbone's 512 positions."""
    texts = ["x " * 2000, "short"]
    call = finished(tmp_path, [{"text": text} for text in texts], "--k", "30")
    assert main(call) == 0
    settings = {"model": str(ROOT), "revision": None, "dtype": "float32"}
    model, processor = embed_gircse.load_model(settings, trust_remote_code=False)
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
    here = os.uname().nodename
    kept = [f".000001.parquet.{here}-{os.getpid()}.tmp", ".000002.parquet.elsewhere-1.tmp"]
    kept += [f".000003.parquet.domain.{here}-{gone.pid}.tmp"]  # a longer name of another machine
    old = [f".000004.parquet.{here}-{os.getpid()}.tmp", ".000005.parquet.elsewhere-1.tmp"]
    for name in (*kept, *old, f"._bad_rows.jsonl.{here}-{gone.pid}.tmp"):
        (output / name).write_text("half")
    for name in old:
        os.utime(output / name, (time.time() - 2 * 24 * 3600,) * 2)
    assert main(call) == 0
    assert sorted(file.name for file in output.glob(".*")) == sorted(kept)


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
folder, cache = map(Path, sys.argv[1:])
call = ["--input", str(folder / "a.jsonl"), "--model", "you/gircse", "--trust_remote_code", "--output"]
def revision(output, *more):
    settings = embed_gircse.make_plan(embed_gircse.parse([*call, str(folder / output), *more]))["settings"]
    return [settings["revision"][0], embed_gircse.load_model(settings, True)[0].config.num_steps]
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
    assert embed_gircse.size_pool(**{"num_actors": None, "num_gpus": None, **asked}) == actors


def test_what_can_not_be_right_is_refused_before_anything_runs(tmp_path, make_model):
    good = write_lines(tmp_path / "good.jsonl", [{"text": "x", "n": 1, "list": []}])
    pq.write_table(pa.table({"text": ["x"], "n": ["a"], "real": [1.5]}), tmp_path / "b.parquet")
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
        ("b.parquet", "--id_column real", "of type double"),
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
    assert embed_gircse.measure(late, "text", None) == (4, None)
    assert embed_gircse.measure(late, "text", "n") == (4, "int")
    for lines in ([], [b"", b"broken", b"[3]"]):  # no row, so that the report says what is wrong with each line
        file = write_lines(tmp_path / "broken.jsonl", lines)
        assert embed_gircse.measure(file, "text", "n") == (len(lines), None)


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
    (output / f".000023.parquet.{os.uname().nodename}-{job.pid}.tmp").write_text("half of a shard")

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
