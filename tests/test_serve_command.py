"""The server's command: its arguments, the cluster it joins, and what each replica gets."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

for package in ("ray.serve", "starlette", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is in requirements-serve.txt")

import serve_gircse
from gircse.serving import protocol


def options(*argv: str) -> SimpleNamespace:
    found = serve_gircse.parse(argv)
    serve_gircse.check(found)
    return found


def test_names_and_defaults(exported, monkeypatch):
    monkeypatch.chdir(exported.parent)
    assert options("--model", str(exported)).name == "tiny" == options("--model", "./tiny").name
    assert options("--model", "./tiny").model == str(exported)
    assert options("--model", str(exported), "--name", "mine", "--min_replicas", "3").max_replicas == 3
    assert protocol.PARAMETERS[:5] == ("input", "model", "dimensions", "encoding_format", "user")  # OpenAI's


@pytest.mark.parametrize(
    "more, said",
    [
        ("--min_replicas 3 --max_replicas 2", "max_replicas=2 is less than min_replicas=3"),
        ("--k 65", "k=65 must be a whole number from 1 to 64"),
        ("--timeout 0", "timeout=0 must be a number of seconds above 0"),
        ("--timeout nan", "timeout=nan must be a number of seconds above 0"),
        ("--batch_wait_ms -1", "batch_wait_ms=-1 must be a number of milliseconds, 0 for none"),
        ("--batch_wait_ms inf", "batch_wait_ms=inf must be a number of milliseconds, 0 for none"),
    ],
)
def test_arguments_that_do_not_go_together(exported, more, said):
    with pytest.raises(ValueError, match=said):
        options("--model", str(exported), *more.split())


def test_other_models_are_refused_before_anything_starts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ValueError, match="is no GIRCSE model"):
        options("--model", str(tmp_path))
    with pytest.raises(ValueError, match="model='/no/such' has no config.json: give a GIRCSE model's folder or Hub id"):
        options("--model", "/no/such")
    with serve_gircse.bind("127.0.0.1", 0) as bound, pytest.raises(ValueError, match="can't be listened on"):
        bound.listen()
        serve_gircse.bind("127.0.0.1", bound.getsockname()[1])


@pytest.mark.parametrize("given, joined", [(None, "local"), ("auto", "auto"), ("10.0.0.1:6379", "10.0.0.1:6379")])
def test_a_cluster_is_joined_only_when_it_is_named(exported, monkeypatch, given, joined):
    """Ray by itself would look for one that `ray start` has left here, dead or alive."""
    calls = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if given:
        monkeypatch.setenv("RAY_ADDRESS", given)
    monkeypatch.setattr("ray.init", lambda address, **settings: calls.append(address))
    monkeypatch.setattr("ray.shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(serve_gircse, "run", lambda options, bound: calls.append(bound.getsockname()[0]))
    serve_gircse.main(["--model", str(exported), "--port", "0"])
    assert calls == [joined, "127.0.0.1", "shutdown"]


def test_replicas_come_and_go_with_the_requests(monkeypatch):
    asked = {}
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    monkeypatch.setattr("ray.serve.start", lambda **_: None)
    monkeypatch.setattr("ray.serve.run", lambda *_, **__: "handle")
    monkeypatch.setattr(
        "ray.serve.deployment", lambda _, **options: asked.update(options) or SimpleNamespace(bind=lambda **_: None)
    )
    options = serve_gircse.parse("--min_replicas 2 --max_replicas 4".split())
    assert serve_gircse.deploy(options, "app") == "handle"
    scaling = {"min_replicas": 2, "initial_replicas": 2, "max_replicas": 4, "target_ongoing_requests": 32}
    assert asked["autoscaling_config"] == scaling


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_replicas_that_do_not_start_do_not_stay(monkeypatch, error):
    """On a cluster they would, and try again for ever."""
    deleted = []

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr("ray.serve.start", lambda **_: None)
    monkeypatch.setattr("ray.serve.run", fail)
    monkeypatch.setattr("ray.serve.delete", deleted.append)
    with pytest.raises(error):
        serve_gircse.deploy(serve_gircse.parse([]), "app")
    assert deleted == ["app"]


@pytest.mark.parametrize("given", [None, os.pathsep.join(("/opt/one", "/opt/two"))])
def test_replicas_find_what_this_process_finds(monkeypatch, given):
    monkeypatch.setenv("PYTHONPATH", given) if given else monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(serve_gircse, "size", lambda _: (0, 1))
    for name in ("start", "run"):
        monkeypatch.setattr(serve_gircse.serve, name, lambda *_, **__: None)
    made = {}
    monkeypatch.setattr(serve_gircse.serve, "deployment", lambda *_, **options: made.update(options) or MagicMock())
    serve_gircse.deploy(serve_gircse.parse([]), "app")
    found = made["ray_actor_options"]["runtime_env"]["env_vars"]["PYTHONPATH"].split(os.pathsep)
    assert found == [str(serve_gircse.ROOT), *(given.split(os.pathsep) if given else [])]


@pytest.mark.parametrize(
    "nodes, argv, expected",
    [
        ([(8, 0)], "", (0, 8)),
        ([(8, 0)], "--max_replicas 3", (0, 2)),
        ([(8, 0), (8, 0)], "--max_replicas 3", (0, 4)),
        ([(8, 0)], "--max_replicas 99", (0, 1)),
        ([(8, 0)], "--num_cpus 3 --min_replicas 2", (0, 3)),
        ([(16, 4)], "--max_replicas 4", (1, 1)),
        ([(16, 4)], "--num_gpus 0", (0, 16)),
        ([(16, 1)], "--num_gpus 0.5 --min_replicas 2", (0.5, 1)),
        ([(16, 1)], "--num_gpus 0.2 --min_replicas 5", (0.2, 1)),
        ([(16, 2)], "--num_gpus 0.6 --min_replicas 3", None),  # a part is of one GPU
        ([(16, 1)], "--min_replicas 2", None),
        ([(2, 0)], "--num_gpus 1", None),
        ([(2, 0)], "--num_cpus 3", None),
    ],
)
def test_what_each_replica_gets(monkeypatch, nodes, argv, expected):
    found = [{"Alive": True, "Resources": {"CPU": float(cpu), "GPU": float(gpu)}} for cpu, gpu in nodes]
    found += [{"Alive": False, "Resources": {"CPU": 64.0}}]
    monkeypatch.setattr("ray.nodes", lambda: found)
    arguments = serve_gircse.parse(argv.split())
    if expected is None:
        with pytest.raises(ValueError, match="there is no room for min_replicas="):
            serve_gircse.size(arguments)
    else:
        assert serve_gircse.size(arguments) == expected
