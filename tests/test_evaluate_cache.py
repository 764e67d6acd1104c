"""What is evaluated anew and what is not, and scores that are none."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

mteb = pytest.importorskip("mteb", reason="mteb is in requirements-eval.txt")
import numpy as np

import evaluate_gircse
from evaluation_helpers import run, scores
from gircse.evaluation import cache, subjects
from gircse.evaluation.encoding import Vectors
from gircse.evaluation.subjects import content_hash
from helpers import write_rows


def edited(folder, tmp_path, name: str, rows: list[dict]):
    """A copy of a folder of data with another file in it."""
    copy = shutil.copytree(folder, tmp_path / "data")
    write_rows(copy / name, rows)
    return copy


def test_another_instruction_is_evaluated_anew(model_folder, data_folder, tmp_path, capsys):
    rows = [{"dataset": "scenes", "facet": "animal", "instruction": text} for text in ("Which animal?", "And now?")]
    data = edited(data_folder, tmp_path, "instruct_instructions.jsonl.gz", rows[:1])
    where = {"data": data, "tasks": ["instruct_scenes-animal"]}
    first = run(model_folder, tmp_path / "out", "--k", "1", **where)
    assert run(model_folder, tmp_path / "out", "--k", "1", **where) == first
    assert "has been evaluated before" in capsys.readouterr().out
    write_rows(data / "instruct_instructions.jsonl.gz", rows[1:])
    second = run(model_folder, tmp_path / "out", "--k", "1", **where)
    assert "evaluating k = 1" in capsys.readouterr().out
    assert [report["tasks"][0]["prompts"]["both"].count("Which animal?") for report in (first, second)] == [1, 0]


def test_a_result_without_its_prompts_is_none(model_folder, data_folder, tmp_path, capsys):
    """It may be of others."""
    where = {"data": data_folder, "tasks": ["sts_pairs"]}
    run(model_folder, tmp_path, "--k", "1", **where)
    (tmp_path / "prompts.json").unlink()
    run(model_folder, tmp_path, "--k", "1", **where)
    assert "has been evaluated before" not in capsys.readouterr().out


def test_two_evaluations_keep_their_prompts_in_one_folder(data_folder, tmp_path):
    tasks = evaluate_gircse.choose_tasks(["sts_pairs", "clustering_rooms"], str(data_folder))
    meta = mteb.models.ModelMeta.create_empty().model_copy(update={"name": "a/b", "revision": "1"})
    subject = subjects.Subject(meta, {}, [None], None, {}, None, None)
    both = [cache.Results(tmp_path), cache.Results(tmp_path)]
    for kept, task in zip(both, tasks, strict=True):
        kept.add(task, subject, None)
    assert len(json.loads((tmp_path / "prompts.json").read_text())) == 2


def test_a_result_of_some_languages_is_not_that_of_all(tmp_path):
    some, every = mteb.get_task("STS17", hf_subsets=["en-en"]), mteb.get_task("STS17")
    meta = mteb.models.ModelMeta.create_empty().model_copy(update={"name": "a/b", "revision": "1"})
    subject, kept = subjects.Subject(meta, {}, [None], None, {}, None, None), cache.Results(tmp_path)
    values = {"test": {"en-en": {"main_score": 0.5}}}
    kept.save_to_cache(mteb.TaskResult.from_task_results(some, values, evaluation_time=1), meta)
    kept.add(some, subject, None)
    assert kept.has(some, subject, None) and not kept.has(every, subject, None)


def test_a_text_on_both_sides_is_two_texts():
    """Sentence Transformers has a way to embed for each, also without a prompt."""
    embed = lambda texts, prompt, side, steps: np.full((len(texts), 1, 2), side == "query", np.float32)  # noqa: E731
    subject = SimpleNamespace(embed=embed, settings={}, loaded=None)
    with Vectors(subject, [None], 4) as vectors:
        found = [float(vectors(["rain"], "", side, None)[0, 0]) for side in ("query", "document")]
    assert found == [1, 0]


def test_a_later_model_gets_the_draws_of_a_run_of_its_own(model_folder, data_folder, tmp_path):
    """Clusters are begun at random."""
    models = tmp_path / "models.json"
    models.write_text(json.dumps([{"model": str(model_folder), "model_name": f"our/{name}"} for name in "ab"]))
    argv = ["--models", str(models), "--tasks", "clustering_rooms", "--data", str(data_folder), "--k", "1"]
    assert evaluate_gircse.main([*argv, "--output_dir", str(tmp_path / "out"), "--device", "cpu"]) == 0
    found = [json.loads((tmp_path / f"out/our__{name}/results.json").read_text()) for name in "ab"]
    assert scores(found[0]) == scores(found[1])


def test_a_score_that_is_no_number_is_none(model_folder, data_folder, tmp_path, monkeypatch):
    """All embeddings alike have no correlation with anything."""
    load = subjects.load_subject

    def collapsed(args):
        subject = load(args)
        embed = subject.embed
        subject.embed = lambda texts, *rest: np.broadcast_to(embed(texts[:1], *rest), (len(texts), 1, 32))
        return subject

    monkeypatch.setattr(evaluate_gircse, "load_subject", collapsed)
    tasks = {"tasks": ["sts_pairs", "clustering_rooms"], "data": data_folder, "status": 1}
    for _ in range(2):  # also when it comes from the cache
        report = run(model_folder, tmp_path, "--k", "1", **tasks)
        assert report["not_evaluated"] == {
            "sts_pairs": "its score is no number: are all embeddings alike, or all of its labels?"
        }
        assert [*scores(report)] == ["clustering_rooms"]


def test_the_hash_of_a_model_is_of_what_it_embeds_with(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    before = content_hash(folder)
    for name in ("results.json", "models.json", "package.json", "corpus.bin"):  # of a user who works in the folder
        (folder / name).write_text("{}")
    assert content_hash(folder) == before
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert content_hash(folder) != before


@pytest.mark.parametrize("name", ["query_0_Static/model.safetensors", "0_Words/vocab.txt", "spiece.model", "own.py"])
def test_the_hash_of_a_model_of_others_is_of_all_its_files(static_folder, tmp_path, name):
    folder = shutil.copytree(static_folder, tmp_path / "model")
    for other in ("README.md", "results.json", "checkpoint-10/model.safetensors", ".cache/a.json", "runs/b.json"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_text("{}")
    assert content_hash(folder) == content_hash(static_folder)
    hashes = {content_hash(folder)}
    (folder / name).parent.mkdir(exist_ok=True)
    for content in ("one", "two"):
        (folder / name).write_text(content)
        hashes.add(content_hash(folder))
    assert len(hashes) == 3


def test_a_report_is_of_the_last_model_and_of_all_its_tasks(model_folder, static_folder, data_folder, tmp_path):
    where, out = {"data": data_folder, "tasks": ["sts_pairs", "clustering_rooms"]}, tmp_path / "out"
    run(model_folder, out, "--k", "1", **where)
    report = run(model_folder, out, "--k", "1", data=data_folder, tasks=["clustering_rooms"])
    assert [*scores(report)] == ["clustering_rooms"]
    (tmp_path / "broken").mkdir()
    write_rows(tmp_path / "broken/sts_pairs.jsonl", [{"sentence1": "a"}])
    broken = {"data": tmp_path / "broken", "tasks": ["sts_pairs"], "status": 1}
    assert run(static_folder, out, **broken) == {}  # nothing of the first model


def test_a_folder_that_had_another_models_report_keeps_nothing_of_it(
    model_folder, static_folder, data_folder, tmp_path
):
    """A curve of steps, and scores for the Hub, which don't name their model."""
    where = {"data": data_folder, "tasks": ["sts_pairs"]}
    run(model_folder, tmp_path, "--k", "1", "2", **where)
    assert (tmp_path / "k_curve.png").exists()
    (tmp_path / ".eval_results").mkdir()
    (tmp_path / ".eval_results/STS13.yaml").write_text("[]")
    run(static_folder, tmp_path, **where)
    assert not (tmp_path / "k_curve.png").exists() and not [*(tmp_path / ".eval_results").iterdir()]


def test_a_sample_of_equal_labels_is_refused(model_folder, data_folder, tmp_path):
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": int(i > 0)} for i in range(40)]
    data = edited(data_folder, tmp_path, "pairclass_pairs.jsonl.gz", rows)
    where = {"data": data, "tasks": ["pairclass_pairs"], "status": 1}
    run(model_folder, tmp_path / "out", "--k", "1", "--sample", "2", **where)
    [task] = evaluate_gircse.choose_tasks(["pairclass_pairs"], str(data), 2)
    with pytest.raises(ValueError, match=r"a sample of 2 rows \(take more\): labels is 1 in all rows"):
        task.load_data()


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--model_name", "mine", "must be organization/name"),
        ("--beside", {"source": "paper", "lines": [{"model": "a"}]}, "is not like recipes/paper/table2.json: KeyError"),
    ],
)
def test_wrong_arguments_are_found_before_anything_is_evaluated(option, content, message, tmp_path, capsys):
    if isinstance(content, dict):
        (tmp_path / "beside.json").write_text(json.dumps(content))
        content = str(tmp_path / "beside.json")
    with pytest.raises(SystemExit):
        more = [] if option == "--model_name" else ["--models", "models.json"]
        evaluate_gircse.parse(["--tasks", "local", *more, option, content])
    assert message in capsys.readouterr().err
