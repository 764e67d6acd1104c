"""The recipes on a few made texts and tiny models: those that make a model or a number run as their heads say, and do
what is said there. Pictures, and the scripts that call recipes one after the other, are not run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

from conftest import ROOT
from helpers import make_tokenizer, text_config

sys.path.extend(str(ROOT / "recipes" / folder) for folder in ("", "root_model", "paper", "figures"))
import align_vectors
import distil
import graphs
import reset_weights
import shorten
import teacher_vectors
import train_objective
import train_with_teacher
from gircse.loading import load

SAMPLE = ROOT / "sample_pairs.jsonl"


def recipe(name: str, *arguments: object) -> str:
    command = [sys.executable, f"recipes/{name}.py", *map(str, arguments)]
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a backbone, texts with vectors of a made teacher, and a model distilled from these."""
    folder = tmp_path_factory.mktemp("recipes")
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    torch.manual_seed(0)
    config = text_config("llama", vocab_size=400, max_position_embeddings=256, initializer_range=0.02)
    backbone = AutoModelForCausalLM.from_config(config)
    backbone.save_pretrained(folder / "backbone")
    make_tokenizer().save_pretrained(folder / "backbone")

    texts = list(dict.fromkeys(row["query"] for row in rows))[:128]
    # the teacher knows a text by its first letter, which a student has to learn
    letters = torch.nn.functional.normalize(torch.randn(256, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    vectors = np.stack([letters[ord(text[0]) % 256].numpy() for text in texts]).astype(np.float16)
    (folder / "teacher").mkdir()
    (folder / "teacher/texts.json").write_text(json.dumps(texts), encoding="utf-8")
    np.save(folder / "teacher/vectors.npy", vectors)
    # the longest of the prompts has 136 of this tokenizer's tokens, and a text needs room after it
    settings = "--batch_size 16 --learning_rate 1e-2 --max_steps 96 --max_length 200"
    where = ("--vectors", folder / "teacher", "--output_dir", folder / "distilled")
    recipe("root_model/distil", "--model_name_or_path", folder / "backbone", *where, *settings.split())
    return SimpleNamespace(folder=folder, texts=texts, vectors=torch.from_numpy(vectors).float())


def test_the_order_of_an_epoch_is_that_of_a_run_without_a_break():
    made = {"texts": ["a" * (i % 7) for i in range(40)], "__len__": lambda self: 40}
    texts = type("Texts", (), made)()
    whole, resumed = (distil.teacher_loader(texts, None, 4, 64, seed=0) for _ in range(2))
    epochs = [list(whole.sampler) for _ in range(3)]
    assert epochs[0] != epochs[1] and sorted(epochs[1]) == list(range(40))
    distil.pass_over(resumed, 25)  # in the third epoch of ten steps each
    assert list(resumed.sampler) == epochs[2]
    with pytest.raises(ValueError, match="batch_size=41, but there are 40 texts with vectors: lower it"):
        distil.teacher_loader(texts, None, 41, 64, seed=0)


@pytest.mark.slow
def test_a_teachers_vectors_are_of_texts_sentences_and_whole_documents(static_folder, tmp_path):
    sentences = [f"The number {i} is written here in a sentence that takes some room." for i in range(9)]
    lines = ["too short", "A line of its own.", " ".join(sentences), "A line of its own."]
    (tmp_path / "a.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    pairs = [{"query": "what is the number", "pos": ["It is a number."], "neg": ["It is no number."]}] * 2
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    where = ("--text", tmp_path / "*.txt", tmp_path / "*.jsonl", "--output_dir", tmp_path / "out")
    recipe("root_model/teacher_vectors", *where, "--teacher", static_folder, "--long_of_a_file", 1)
    found = distil.TeacherTexts(str(tmp_path / "out"))
    of_pairs = ["what is the number", "It is a number.", "It is no number."]
    assert sorted(found.texts) == sorted(["A line of its own.", *sentences, lines[2], *of_pairs])
    expected = SentenceTransformer(str(static_folder), device="cpu").encode(found.texts, normalize_embeddings=True)
    np.testing.assert_allclose(np.stack([vector for _, vector in found]), expected, atol=0.01)
    with pytest.raises(ValueError, match="--text 'no/such' matches no file"):
        teacher_vectors.matching([str(tmp_path / "*.txt"), "no/such"])


def test_vectors_are_aligned_with_a_students_without_changing_a_similarity():
    teacher, noise = (torch.randn(200, n, generator=torch.Generator().manual_seed(n)) for n in (6, 10))
    teacher = torch.nn.functional.normalize(teacher, dim=-1)
    turn = torch.linalg.qr(noise[:10])[0][:, :6]  # orthonormal columns: how the student's space lies
    student = teacher @ turn.T + 0.05 * noise + 3  # all of the student's vectors lie to one side
    aligned = align_vectors.alignment(teacher, student)
    torch.testing.assert_close(aligned.T @ aligned, torch.eye(6), atol=1e-5, rtol=0)
    assert (aligned - turn).abs().max() < 0.05
    with pytest.raises(ValueError, match="10 dimensions don't fit into the model's 6"):
        align_vectors.alignment(student, teacher)


@pytest.mark.slow
def test_aligned_vectors_are_what_distillation_reads(made, tmp_path):
    """A teacher with fewer dimensions than the student."""
    (tmp_path / "teacher").mkdir()
    shutil.copy(made.folder / "teacher/texts.json", tmp_path / "teacher")
    narrow = torch.nn.functional.normalize(made.vectors[:, :20], dim=-1)
    np.save(tmp_path / "teacher/vectors.npy", narrow.numpy().astype(np.float16))
    where = ("--vectors", tmp_path / "teacher", "--output_dir", tmp_path / "aligned", "--fit_on", "64")
    said = recipe("root_model/align_vectors", "--model_name_or_path", made.folder / "backbone", *where)
    aligned = distil.TeacherTexts(str(tmp_path / "aligned"))
    vectors = torch.stack([vector for _, vector in aligned])
    assert aligned.texts == made.texts and vectors.shape == (128, 32)
    torch.testing.assert_close(vectors @ vectors.T, narrow @ narrow.T, atol=5e-3, rtol=0)
    assert float(re.search(r"before any training: (-?\d\.\d+)", said)[1]) > 0.1


@torch.no_grad()
def test_a_shorter_backbone_is_the_kept_layers_in_their_order():
    model = AutoModelForCausalLM.from_config(text_config("llama", num_hidden_layers=5)).eval()
    ids = torch.arange(3, 12)[None]
    states = model.model(ids, output_hidden_states=True).hidden_states
    position = torch.arange(9)[None]
    expected = states[1]
    for layer in model.model.layers[3:]:
        made = layer(expected, position_embeddings=model.model.rotary_emb(expected, position), position_ids=position)
        expected = made[0] if isinstance(made, tuple) else made
    shorten.leave_out(model, 1, 2)
    assert model.config.num_hidden_layers == len(model.model.layers) == 3
    found = model.model(ids, use_cache=True)
    torch.testing.assert_close(found.last_hidden_state, model.model.norm(expected), atol=1e-5, rtol=1e-4)
    assert found.past_key_values.get_seq_length(2) == 9
    for first, last in ((0, 2), (2, 1), (1, 3)):
        with pytest.raises(ValueError, match=f"leave_out {first} {last}: must be some of layers 0 to 2, not all"):
            shorten.leave_out(model, first, last)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loop_of_the_graphs_is_the_models(make_model, side):
    """Values and gradients, after padding to fixed lengths and rows."""
    model = make_model("qwen2-tied", logit_temperature=2.0).train()
    model.language_model.config._attn_implementation = "eager"
    ids, mask = torch.arange(3, 21).reshape(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[0, :2], mask[1, :3] = 0, 0
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    expected = model(ids, mask, k=3).step_embeddings
    weights = torch.randn_like(expected)
    parameters = [*model.parameters()]
    gradients = torch.autograd.grad((expected * weights).sum(), parameters)
    loop = graphs.GraphedLoop(model, (4, 16, 8))
    found = loop(ids, mask, k=3, rows=5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(torch.autograd.grad((found * weights).sum(), parameters), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert list(loop.graphs) == [(5, 8, 3)]
    with pytest.raises(ValueError, match=r"a text has 6 tokens, more than the last of lengths=\[4\]"):
        graphs.GraphedLoop(model, [4])(ids, mask, k=3, rows=5)


@torch.no_grad()
def cosines(path, made, k: int) -> float:
    model, processor = load(path)
    z = model.eval()(**processor(made.texts), k=k).embeddings
    return 1 - distil.distillation_loss(z, made.vectors).item()


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 12])
def test_distillation_teaches_every_number_of_steps(made, k):
    before, after = (cosines(made.folder / name, made, k) for name in ("backbone", "distilled"))
    assert before < 0.2 and after > before + 0.3


def test_distillation_loss_is_one_minus_the_mean_cosine():
    z = torch.eye(3)[:2]
    assert distil.distillation_loss(z, torch.eye(3)[[0, 0]]).item() == pytest.approx(0.5)


@pytest.mark.slow
def test_the_teachers_batches_are_of_like_length_and_take_each_text_once_an_epoch(made):
    texts = distil.TeacherTexts(str(made.folder / "teacher"))
    _, processor = load(made.folder / "distilled")
    loader = distil.teacher_loader(texts, processor, 10, 200, seed=0)
    first, second = list(loader.sampler), list(loader.sampler)
    assert sorted(first) == sorted(second) == list(range(len(texts))) and first != second
    lengths = [len(texts[row][0]) for row in first]
    within = np.mean([max(lengths[i : i + 10]) - min(lengths[i : i + 10]) for i in range(0, 120, 10)])
    assert within < (max(lengths) - min(lengths)) / 2
    batch = next(iter(loader))
    assert len(batch["input_ids"]) == len(batch["vectors"]) == 10 and len(loader) == len(texts) // 10


@pytest.mark.slow
def test_vectors_of_another_size_are_refused(made, tmp_path):
    np.save(tmp_path / "vectors.npy", np.zeros((1, 5), np.float16))
    (tmp_path / "texts.json").write_text('["a text"]')
    command = ["--model_name_or_path", made.folder / "backbone", "--vectors", tmp_path, "--output_dir", tmp_path / "o"]
    command += ["--max_steps", "1"]
    with pytest.raises(AssertionError, match="5 dimensions, but the model has 32"):
        recipe("root_model/distil", *command)


def logged(folder) -> list[dict]:
    lines = (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def train(name: str, made, folder, *arguments: str) -> list[dict]:
    """The log of two steps from the distilled model."""
    settings = "--tuning full --max_steps 2 --logging_steps 1 --k 3 --held_out 16 --report_to none --max_length 140"
    settings += " --per_device_train_batch_size 8 --save_strategy no --mix_sources"
    where = ("--model_name_or_path", made.folder / "distilled", "--output_dir", folder)
    recipe(name, *where, *settings.split(), *arguments)
    assert (folder / "model.safetensors").exists()
    return logged(folder)


@pytest.mark.slow
def test_objectives(made, tmp_path):
    icr, last_step = (
        train("paper/train_objective", made, tmp_path / name, "--objective", name)[0] for name in ("icr", "last_step")
    )
    assert icr["loss"] == pytest.approx(icr["L_1"] + icr["L_2"] + icr["L_3"] + icr["L_reg"], rel=1e-3)
    assert last_step["loss"] == pytest.approx(icr["L_3"], abs=5e-5)  # L_2 is 2e-4 away


@pytest.mark.slow
def test_answers_are_learned_as_a_language_model_does(made, tmp_path):
    """The loss of the first batch is that of the backbone on prompt and answer; hard tokens are what it embeds by."""
    rows = [{"query": f"what is {i}", "pos": [f"number {i}"], "instruction": "answer"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model, options = made.folder / "backbone", ("--step_token", "hard", "--objective", "answers")
    where = ("--model_name_or_path", model, "--train_data", tmp_path / "pairs.jsonl", "--output_dir", tmp_path / "out")
    settings = "--tuning full --max_steps 9 --logging_steps 1 --k 2 --held_out 0 --per_device_train_batch_size 16 "
    settings += "--learning_rate 1e-2 --report_to none --save_strategy no"
    recipe("paper/train_objective", *where, *options, *settings.split())
    losses = [line["loss"] for line in logged(tmp_path / "out") if "loss" in line]
    trained, processor = load(str(tmp_path / "out"))
    backbone, end = AutoModelForCausalLM.from_pretrained(model), processor.tokenizer.eos_token_id
    said = []
    for row in rows:
        prompt = processor([row["query"]], instruction="answer")["input_ids"]
        answer = [*processor.tokenizer(row["pos"][0], add_special_tokens=False)["input_ids"], end]
        ids = torch.cat([prompt, torch.tensor([answer])], dim=1)
        found = backbone(ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        said += found[range(len(answer)), answer].tolist()
    assert losses[0] == pytest.approx(-np.mean(said), rel=1e-5)
    assert losses[-1] < 0.9 * losses[0] and trained.config.step_token == "hard"


@pytest.mark.slow
def test_queries_contrasted_apart_are_batches_that_accumulate(made, tmp_path):
    """Of as many pairs as make one step, beside those held out."""
    rows = SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)[:24]
    (tmp_path / "pairs.jsonl").write_text("".join(rows), encoding="utf-8")
    shared = ("--train_data", tmp_path / "pairs.jsonl", "--num_negatives", 2)
    apart = train("paper/train_objective", made, tmp_path / "apart", *shared, "--contrast", 2)[0]
    batches = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4)
    small = train("paper/train_objective", made, tmp_path / "small", *shared, *batches)[0]
    assert apart == pytest.approx(small, rel=1e-4)
    assert apart["log_candidates"] < 2  # of 6 documents


def test_a_share_of_the_gradient_goes_back():
    model, state = SimpleNamespace(_next_token=lambda state: (None, state**2)), torch.tensor(3.0, requires_grad=True)
    train_objective.scale_gradient(model, 0.25)
    _, mixed = model._next_token(state)
    mixed.backward()
    assert mixed.item() == 9 and state.grad.item() == 0.25 * 6


@pytest.mark.slow
def test_the_way_back_through_soft_tokens(made, tmp_path):
    """Its gradient is scaled, and the values are not; a learned temperature moves and is what the folder has."""
    settings = ("--learning_rate", "1e-3", "--warmup_ratio", "0", "--max_grad_norm", "1e9")
    plain, same, none = (
        train("paper/train_objective", made, tmp_path / f"share{share}", "--soft_token_gradient", share, *settings)
        for share in ("1", "0.999999", "0")
    )
    assert plain[0]["loss"] == pytest.approx(none[0]["loss"], rel=1e-5)
    assert plain[0]["grad_norm"] == pytest.approx(same[0]["grad_norm"], rel=1e-6)
    assert plain[0]["grad_norm"] != pytest.approx(none[0]["grad_norm"], rel=2e-5)
    learned = train("paper/train_objective", made, tmp_path / "learned", "--learn_temperature", *settings)
    assert learned[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5) and learned[1]["temperature"] != 1
    config = json.loads((tmp_path / "learned" / "config.json").read_text(encoding="utf-8"))
    assert config["logit_temperature"] != 1 and abs(config["logit_temperature"] - learned[1]["temperature"]) < 0.5


@pytest.mark.slow
def test_a_teacher_adds_its_loss(made, tmp_path):
    teacher = ("--vectors", str(made.folder / "teacher"), "--teacher_batch_size", "16")
    added = {}
    for weight in ("1", "10"):
        folder = tmp_path / weight
        line = train("root_model/train_with_teacher", made, folder, *teacher, "--teacher_weight", weight)[0]
        added[weight] = line["loss"] - sum(value for name, value in line.items() if name.startswith("L_"))
    assert 0 < added["1"] < 1  # 1 - cos of a distilled model
    assert added["10"] == pytest.approx(10 * added["1"], rel=1e-2)


@pytest.mark.slow
def test_weights_are_reset_and_trained_alone(made, tmp_path):
    def weights(folder):
        return load(str(folder))[0].state_dict()

    chosen = "layers[.]1[.](?!input)"
    recipe(
        "root_model/reset_weights", made.folder / "distilled", made.folder / "backbone", tmp_path, "--weights", chosen
    )
    backbone, trained, reset = map(weights, (made.folder / "backbone", made.folder / "distilled", tmp_path))
    for name, weight in reset.items():
        assert torch.equal(weight, (backbone if re.search(chosen, name) else trained)[name]), name
    assert any(not torch.equal(reset[name], trained[name]) for name in reset)
    teacher = ("--vectors", str(made.folder / "teacher"), "--steps", "2", "--only", chosen)
    train("root_model/train_with_teacher", made, tmp_path / "again", *teacher, "--warmup_ratio", "0")
    moved = {name for name, weight in weights(tmp_path / "again").items() if not torch.equal(weight, trained[name])}
    assert moved == {name for name in trained if re.search(chosen, name)}


def test_weights_that_cannot_be_reset_or_trained_are_named():
    model, other = (torch.nn.ModuleDict({"layers": torch.nn.Linear(2, width)}) for width in (2, 1))
    with pytest.raises(ValueError, match="--weights 'no such' matches no weight, such as layers.weight"):
        reset_weights.reset(model, model, "no such")
    with pytest.raises(ValueError, match=r"layers.weight, \(2, 2\), is not in the backbone"):
        reset_weights.reset(model, other, "layers")
    with pytest.raises(ValueError, match="--only 'no such' matches no weight"):
        train_with_teacher.freeze_others(model, "no such")


@pytest.mark.slow
def test_training_with_a_teacher_goes_on_as_if_it_had_not_been_interrupted(made, tmp_path):
    """With the teacher's texts, their instructions and the numbers of steps."""
    teacher = ("--vectors", str(made.folder / "teacher"), "--steps", "1", "2", "3")
    settings = (*teacher, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2")
    straight = train("root_model/train_with_teacher", made, tmp_path, *settings)
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = train("root_model/train_with_teacher", made, tmp_path, *settings, "--resume_from_checkpoint", "last")
    assert [line["loss"] for line in again][-2:] == pytest.approx([line["loss"] for line in straight][-2:], rel=1e-5)


def test_steps_of_a_teachers_batch():
    inputs = {"input_ids": torch.zeros(4, 10)}
    assert {distil.draw_steps(inputs, (2, 5, 9), 40) for _ in range(99)} == {2, 5, 9}
    assert {distil.draw_steps(inputs, (2, 5, 9), 39) for _ in range(99)} == {2}


STEPS_OF_THE_ROOT_MODEL = (
    "shorten",
    "teacher_vectors",
    "align_vectors",
    "distil",
    "reset_weights",
    "train_with_teacher",
)


def test_the_root_models_steps_import_earlier_ones_alone():
    for number, name in enumerate(STEPS_OF_THE_ROOT_MODEL):
        code = (ROOT / f"recipes/root_model/{name}.py").read_text(encoding="utf-8")
        imported = re.findall(r"^\s*(?:import|from) (\w+)", code, re.MULTILINE)
        assert not set(imported) & set(STEPS_OF_THE_ROOT_MODEL[number:]), name


def test_publishing_stops_before_it_overwrites_when_a_file_is_missing(tmp_path):
    before = hashlib.sha256((ROOT / "config.json").read_bytes()).hexdigest()
    command = ["bash", "recipes/root_model/publish.sh", tmp_path, tmp_path]
    for name in ("gircse", "healed"):  # the second takes the first one's place
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        said = f"{name}/model.safetensors is missing: run the recipe that makes {tmp_path / name} to its end first"
        assert done.returncode == 1 and said in done.stderr
    assert hashlib.sha256((ROOT / "config.json").read_bytes()).hexdigest() == before
