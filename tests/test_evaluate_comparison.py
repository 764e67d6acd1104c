"""Several models in one run, and the table that ranks them."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("mteb", reason="mteb is in requirements-eval.txt")
from evaluate_gircse import main, parse
from evaluation_helpers import TASKS
from gircse.evaluation import subjects
from gircse.evaluation.comparison import compare, markdown
from gircse.evaluation.subjects import registry_meta
from helpers import ROOT


def rows(*scores: float, k: int | None = None, revision: str = "1") -> list[dict]:
    """Of two STS tasks, one of retrieval, one that asks to follow an instruction, one of FollowIR; a second metric."""
    kinds = ["STS", "STS", "Retrieval", "Instruction following", "InstructionReranking"]
    named = zip("abcde", kinds, scores, strict=False)
    found = [{"task": t, "revision": revision, "group": g, "scores": {str(k): s, "7": 0.0}} for t, g, s in named]
    return [*found, {**found[0], "scores": {str(k): 99.0}}]


def test_models_are_ranked_by_their_means():
    found = {
        "one": (rows(10, 20, 60, 5, 15), None),
        "two": (rows(40, 30, 50, 20, 30, k=5), 5),
        "three": (rows(20, 10.001, 60, 90, 90), None),  # level with the first one as shown, ahead by 0.0003
    }
    lines, counts = compare(found)
    assert counts == {"Instruction following": 1, "InstructionReranking": 1, "Retrieval": 1, "STS": 2}
    assert [line["model"] for line in lines] == ["two", "three", "one"]
    by_name = {line["model"]: line for line in lines}
    kinds = {"Instruction following": 20, "InstructionReranking": 30, "Retrieval": 50, "STS": 35}
    assert by_name["two"]["groups"] == kinds and by_name["two"]["k"] == 5
    shown = ("mean", "rank", "following", "following_rank", "overall")
    ranks = {name: tuple(line[key] for key in shown) for name, line in by_name.items()}
    assert ranks == {"one": (30, 2, 10, 3, 2.5), "two": (40, 1, 25, 2, 1.5), "three": (30, 2, 90, 1, 1.5)}

    table = markdown(lines, counts, {"source": "the paper", "lines": [{**by_name["two"], "groups": {"STS": 1.5}}]})
    head, _, *body = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert head == "model,k,Retrieval (1),STS (2),mean (3),rank,Instruction following (2),rank,overall rank".split(",")
    assert body[1] == ["three", "–", "60.00", "15.00", "30.00", "2", "90.00", "1", "1.5"]
    assert body[3] == ["two (the paper)", "5", "–", "1.50", "40.00", "1", "25.00", "2", "1.5"]


def test_tasks_that_a_model_lacks_count_for_none():
    lines, counts = compare({"one": (rows(10, 20, 30), None), "two": (rows(1, 40), None)})
    assert counts == {"STS": 2} and {line["model"]: line["mean"] for line in lines} == {"one": 15, "two": 20.5}


def test_tasks_of_one_side_alone_and_none_in_common():
    lines, _ = compare({"one": (rows(10, 20), None), "two": (rows(1, 40), None)})
    found = [(line["model"], line["following"], line["overall"]) for line in lines]
    assert found == [("two", None, 1), ("one", None, 2)]
    with pytest.raises(ValueError, match="no task was evaluated for all of one, two"):
        compare({"one": (rows(10), None), "two": (rows(10, revision="2"), None)})


def test_several_models_in_one_run(static_folder, model_folder, data_folder, tmp_path, capsys):
    models = [
        {"model": str(model_folder), "model_name": "us/ours"},
        {"model": str(static_folder), "prompt_template": "Task: {instruction} "},
        {"model": str(tmp_path / "nowhere"), "model_name": "us/lost"},
    ]
    (tmp_path / "models.json").write_text(json.dumps(models))
    beside = ROOT / "recipes/paper/table2.json"
    options = ["--models", tmp_path / "models.json", "--beside", beside, "--data", data_folder, "--device", "cpu"]
    out = tmp_path / "out"
    assert main(["--tasks", "local", *map(str, options), "--output_dir", str(out), "--k", "1", "3"]) == 1
    assert "us/lost was not evaluated" in capsys.readouterr().out
    found = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert {line["model"]: line["k"] for line in found["models"]} == {"us/ours": 3, static_folder.name: None}
    assert sum(found["tasks"].values()) == len(TASKS) == len(found["not_evaluated"].pop("us/lost"))
    assert found["not_evaluated"] == {}
    table = (out / "comparison.md").read_text(encoding="utf-8")
    assert table.endswith("\n\nus/lost: not evaluated\n")
    assert table.count("(the paper, Table 2)") == 16 and f"| {static_folder.name} | – |" in table
    report = json.loads((out / static_folder.name / "results.json").read_text(encoding="utf-8"))
    assert report["tasks"][0]["prompts"]["both"].startswith("Task: ") and (out / "us__ours/results.md").exists()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"model": "x"}, "models.json holds .* must be a list of models"),
        ([], r"models.json holds \[\]: it must be a list of models"),
        ([{"name": "x"}], r'"name": "x".* must be an object with \'model\''),
        ([{"model": "a/b", "trust_remote_code": True}], "an object with 'model' and, if they differ, model_name"),
        ([{"model": "a/b", "prompt_template": "Query: "}], "prompt_template='Query: ' has no '{instruction}'"),
        ([{"model": "a/b", "prompt_template": None}], "prompt_template=None must be of type str"),
        ([{"model": "a/b", "max_length": True}], "max_length=True must be of type int"),
        ([{"model": "a/b", "batch_size": 0}], "batch_size=0 must be at least 1"),
        ([{"model": "a/b", "dtype": "bf16"}], "dtype='bf16' must be one of float32, bfloat16, float16"),
        ([{"model": "a/b"}, {"model": "c/d", "model_name": "a/b"}], "two models are called 'a/b'"),
    ],
)
def test_a_list_of_models_is_read_before_anything_is_done(models, message, tmp_path):
    (tmp_path / "models.json").write_text(json.dumps(models))
    with pytest.raises(ValueError, match=message):
        main(["--tasks", "local", "--models", str(tmp_path / "models.json"), "--data", "nowhere"])


def test_a_folder_that_can_not_be_written_to_and_an_empty_template(tmp_path, capsys):
    (tmp_path / "file").touch()
    given = ["--model", str(tmp_path), "--tasks", "STS12", "--output_dir", str(tmp_path / "file" / "out")]
    with pytest.raises(ValueError, match="output_dir='.*out' can't be written to.*choose another"):
        main(given)
    with pytest.raises(SystemExit):
        main([*given, "--prompt_template", ""])
    assert "prompt_template='' has no '{instruction}'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nvidia/llama-embed-nemotron-8b", "axiotic/ogma-mini"])
def test_a_loader_of_mtebs_that_trusts_by_itself_needs_the_flag(monkeypatch, name):
    monkeypatch.setattr(subjects, "is_gircse", lambda *_: False)
    monkeypatch.setattr(subjects.ModelMeta, "load_model", lambda *_, **__: pytest.fail("its code would run"))
    with pytest.raises(ValueError, match="runs code of its own, in mteb's loader too: give --trust_remote_code"):
        subjects.load_subject(parse(["--model", name, "--tasks", "STS12"]))
    assert not subjects.trusts(registry_meta("Qwen/Qwen3-Embedding-0.6B").loader)


def test_numbers_beside_need_several_models(capsys):
    with pytest.raises(SystemExit):
        main(["--tasks", "STS12", "--beside", "table2.json"])
    assert "--beside table2.json stands below a table of several models: give --models, too" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--tasks", "STS12", "--models", "models.json", "--model_name", "a/b"])
    assert "--model_name a/b is of one model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nowhere.json can't be read as JSON"):
        main(["--tasks", "STS12", "--models", "models.json", "--beside", "nowhere.json"])


def test_the_papers_models_and_its_table():
    models = json.loads((ROOT / "recipes/paper/models.json").read_text(encoding="utf-8"))
    assert len(models) == 10 and all(registry_meta(entry["model"]).loader for entry in models)
    lines = json.loads((ROOT / "recipes/paper/table2.json").read_text(encoding="utf-8"))["lines"]
    assert all(line["overall"] == (line["rank"] + line["following_rank"]) / 2 for line in lines)
    best = min(lines, key=lambda line: line["overall"])
    assert (best["model"], best["mean"], best["following"]) == ("GIRCSE, Mistral", 67.83, 62.97)
