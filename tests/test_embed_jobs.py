"""Jobs of bulk embedding: other arguments for the same output are refused, and no row is lost or repeated when a worker
or the whole job is killed."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

import pytest

pytest.importorskip("ray.data")
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
import torch.nn.functional as F

from embed_gircse import main, parse
from embed_helpers import TEXTS, arguments, expected, machine, read, stamps, write_lines
from gircse import loading, rows
from gircse.embedding import plan as plans
from gircse.embedding.actors import size_pool
from gircse.embedding.plan import PLAN, make_plan
from gircse.embedding.shards import BAD_ROWS
from helpers import ROOT

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


@pytest.mark.slow
def test_a_job_keeps_the_commit_that_it_began_with(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    repo = tmp_path / "cache" / "models--you--gircse"
    (repo / "refs").mkdir(parents=True)
    for commit, steps in (("a", 7), ("b", 5)):
        snapshot = repo / "snapshots" / (commit * 40)
        snapshot.mkdir(parents=True)
        for file in (*ROOT.glob("*.json"), *ROOT.glob("*_gircse.py"), *ROOT.glob("*.safetensors")):
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
        ([(8, 2)], {"num_gpus": 0.6}, (2, 0.6, 1)),  # a part is of one GPU
        ([(16, 1)], {"num_gpus": 0.2}, (5, 0.2, 1)),
        ([(16, 1)], {"num_gpus": 0.1, "num_actors": 10}, (10, 0.1, 1)),
        ([(16, 5)], {"num_gpus": 2}, (2, 2, 1)),
        ([(8, 0), (4, 0)], {}, (2, 0, 4)),
        ([(8, 0), (4, 0)], {"num_actors": 2}, (4, 0, 2)),
        ([(8, 0), (1, 0)], {"num_actors": 2}, (2, 0, 4)),
        ([(2, 0), *[(64, 0)] * 10], {}, (10, 0, 64)),  # a small head has no say
        ([(2, 0), *[(64, 0)] * 10], {"num_actors": 2}, (20, 0, 32)),
        ([(60, 0), *[(64, 0)] * 10], {}, (11, 0, 60)),
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
        ("full", "", "matches no file"),
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
        (good.name, f"--model {tmp_path / 'plain'}", "no GIRCSE model but of type 'qwen2'"),
        (good.name, f"--model {tmp_path / 'nowhere'}", "nowhere' is not there"),
        (good.name, f"--model {tmp_path / 'model'} --revision v1", "revision='v1' is for models on the Hub"),
        (good.name, "--revision v1", "revision='v1' is for models on the Hub"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(problem)):
            make_plan(parse([*arguments(tmp_path / pattern, tmp_path / "out"), *more.split()]))
        assert not (tmp_path / "out" / PLAN).exists()
    for wrong in (["--k", "0"], ["--batch_size", "x"]):
        with pytest.raises(SystemExit) as error:
            parse([*arguments(good, tmp_path / "out"), *wrong])
        assert error.value.code == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_job_that_failed_before_its_first_shard_leaves_its_folder_free(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("embed_gircse.run", fail)
    file = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    for shards in (0, 1):
        call = arguments(file, tmp_path / "out")
        if shards:
            make_plan(parse(call))
            (tmp_path / "out" / "000000.parquet").write_bytes(b"")  # as of a disk that has lost it
        with pytest.raises(error):
            main(call)
        assert (tmp_path / "out" / PLAN).exists() == bool(shards)


def test_a_folder_stands_for_the_files_in_it_that_can_be_read(tmp_path):
    for name in ("b.jsonl", "a.csv.gz", "README.md", "below/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert plans.find_files([str(tmp_path)], tmp_path / "out") == [tmp_path / "a.csv.gz", tmp_path / "b.jsonl"]
    with pytest.raises(FileNotFoundError, match="input='' matches no file"):  # not the working directory
        plans.find_files([""], tmp_path / "out")


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
    """An adapter-only model keeps its weights in a folder of their own, and most of them in its base's."""
    model, data = tmp_path / "model", write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    (model / "lora").mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "gircse", "adapter": "lora"}')
    (model / "lora" / "adapter_model.safetensors").write_bytes(b"1")
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"1")
    (model / "lora/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    call = arguments(data, tmp_path / "out", "--model", str(model), "--trust_remote_code")
    plan = make_plan(parse(call))
    (model / "results.json").write_text("{}")  # an evaluation into the model's folder makes it no other model
    assert make_plan(parse(call)) == plan
    (base / "model.safetensors").write_bytes(b"12")
    with pytest.raises(ValueError, match="base file model.safetensors was "):
        make_plan(parse(call))
    (base / "model.safetensors").write_bytes(b"1")
    (model / "lora" / "adapter_model.safetensors").write_bytes(b"12")
    with pytest.raises(ValueError, match="model file lora/adapter_model.safetensors was "):
        make_plan(parse(call))


@pytest.mark.parametrize(("online", "commit"), [(True, "abc"), (False, None)])
def test_the_commit_of_an_adapters_base_is_asked_for_at_once(tmp_path, monkeypatch, online, commit):
    """Else it would be known in the second run alone, which would take it for another one."""
    (tmp_path / "config.json").write_text('{"model_type": "gircse", "adapter": "."}')
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "us/lm", "revision": null}')
    cached = []

    def read_config(*asked):
        if not online:
            raise OSError("no connection")
        cached.append(asked)

    monkeypatch.setattr(loading, "read_config", read_config)
    monkeypatch.setattr(loading, "commit_of", lambda *asked: "abc" if asked in cached else None)
    assert loading.identify_base(tmp_path) == ({"base": "us/lm", "base revision": commit}, {})


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


def test_an_output_is_a_folder_of_a_disk(capsys):
    """And not one that is called `~` or `s3:`."""
    assert parse(["--input", "x", "--output=~/vectors"]).output == Path.home() / "vectors"
    with pytest.raises(SystemExit):
        parse(["--input", "x", "--output", "s3://bucket/vectors"])
    assert "'s3://bucket/vectors' is no path: give one of a disk" in capsys.readouterr().err


@pytest.mark.slow
def test_a_shard_that_kills_its_actor_is_not_tried_for_ever(tmp_path, monkeypatch):
    """As one does that takes more memory than there is."""
    monkeypatch.setattr("embed_gircse.RETRIES", 1)
    monkeypatch.setattr("embed_gircse.Embedder.embed", lambda *_: os._exit(1))
    call = arguments(write_lines(tmp_path / "a.jsonl", [{"text": "x"}]), tmp_path / "out", "--num_actors", "1")
    try:
        with pytest.raises(ray.exceptions.RayError):
            main(call)
    finally:
        ray.shutdown()
    assert not (tmp_path / "out" / PLAN).exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_a_killed_job_and_a_killed_worker_lose_and_repeat_no_row(tmp_path):
    """SIGKILL to the whole job, Ray's processes too, as if the power went; then the same command again, and SIGKILL to
    one of its actors, which it survives."""
    texts = TEXTS[:192]
    write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts[:96]])
    write_lines(tmp_path / "b.jsonl.gz", [{"text": text} for text in texts[96:]])
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
    for process in below:  # Ray would take half a minute to see that the job is gone
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, below)), log)
    before = stamps(output)
    assert 2 <= len(before) < 16 and not (output / BAD_ROWS).exists()
    (output / f".000015.parquet.{machine(tmp_path)}-{job.pid}.tmp").write_text("half of a shard")

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
    assert len(after) == 16 and {name: after[name] for name in before} == before
    assert f"16 shards, {len(before)} of before" in log.read_text()
    assert sorted(file.name for file in output.iterdir()) == sorted([*after, BAD_ROWS, PLAN])
    found = read(output)
    assert list(found) == [f"{name}:{row}" for name in ("a.jsonl", "b.jsonl.gz") for row in range(1, 97)]
    vectors = torch.stack(list(found.values()))[::29]
    assert F.cosine_similarity(vectors, expected(texts[::29], 20)).min() > 0.9999
