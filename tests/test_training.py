"""Training: gradient caching, accumulation and processes give the gradients of the plain joint batch; a killed run goes
on as if nothing had happened; what is exported loads elsewhere."""

from __future__ import annotations

import copy
import csv
import dataclasses
import importlib.util
import io
import json
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from conftest import text_config
from gircse.command_line import lenient_console
from gircse.loading import PAPER_PROMPT
from gircse.training.accuracy import retrieval_accuracy, rows_by_tokens
from gircse.training.arguments import WITHOUT_EFFECT, DataArguments, GircseTrainingArguments, ModelArguments
from gircse.training.callbacks import Watch
from gircse.training.card import REMOTE_CODE, model_card, plot_curves, show_neighbours
from gircse.training.data import PairCollator
from gircse.training.gradient_cache import RandomState
from gircse.training.losses import candidate_mask, icr_loss
from gircse.training.pairs import FEATURES
from gircse.training.publishing import CODE_FILES, copy_on_cpu, export
from gircse.training.trainer import GircseTrainer, add_lora
from train_gircse import check_settings, held_out_size, load_model, main

try:
    import gguf
except ImportError:
    gguf = None

ROOT = Path(__file__).resolve().parents[1]
WORDS = "red blue green tall small old new fast slow warm cold dark bright wet dry loud quiet soft hard round".split()
HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


# What the tests are made of


def make_rows(count: int, negatives=lambda index: index % 3) -> list[dict]:
    """Rows of unlike lengths; `negatives(i)` hard negatives for row i."""
    rows = []
    for i in range(count):
        first, second = WORDS[i % 20], WORDS[(7 * i + 3) % 20]
        rows.append(
            {
                "query": f"which {first} thing {i} is {second}" + " or not" * (i % 4),
                "pos": [f"the {second} thing {i} is {first}" + " indeed" * (i % 3)],
                "neg": [f"nothing {first} {i} here {j}" for j in range(negatives(i))],
                "instruction": "find the answer" if i % 2 else "",
                "source": "one",
                "symmetric": False,
                "label": None,
            }
        )
    return rows


def make_pairs(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=FEATURES)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sentences = [text for row in make_rows(20, lambda i: 1) for text in (row["query"], *row["pos"], *row["neg"])]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<pad>", "<bos>", "<eos>"],  # ids 0, 1, 2, as the tiny backbones have them
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        eos_token="<eos>",
        pad_token="<pad>",
    )


def processor_class():
    return get_class_from_dynamic_module("processing_gircse.GircseProcessor", str(ROOT))


def tiny_text_config(**changes):
    return text_config("qwen2", **{"vocab_size": 400, "num_hidden_layers": 2, **changes})


def tiny_model(*, dtype=torch.float32, text_changes=None, **axes):
    """The same weights in every process; conftest's `make_model` is a fixture, which workers don't have."""
    model_class = get_class_from_dynamic_module("modeling_gircse.GircseModel", str(ROOT))
    torch.manual_seed(0)
    config = model_class.config_class(text_config=tiny_text_config(**(text_changes or {})), **axes)
    return model_class(config).to(dtype).eval()


def make_trainer(model, processor, folder, rows, held_out=None, callbacks=None, **settings) -> GircseTrainer:
    defaults = {
        "per_device_train_batch_size": 4,
        "k": 3,
        "num_negatives": 2,
        "logging_steps": 1,
        "max_grad_norm": 1e9,  # gradients are compared as they are
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = GircseTrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    held_out = None if held_out is None else make_pairs(held_out)
    return GircseTrainer(model, arguments, processor, make_pairs(rows), held_out, callbacks=callbacks)


def gradients_of(model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(trainer: GircseTrainer, inputs: dict) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of one micro-batch, by Trainer's own training step."""
    trainer.model.zero_grad(set_to_none=True)
    trainer.current_gradient_accumulation_steps = 1  # newer transformers set it in their loop
    loss = trainer.training_step(trainer.model, inputs)
    return loss.item(), gradients_of(trainer.model)


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-7) -> None:
    """Equal up to `relative` of the largest entry of each weight's gradient, and not all zero. Qwen2's norms are in
    float32 inside, and round differently when another grouping of the texts shares another prefix."""
    assert actual.keys() == expected.keys() and expected
    assert sum(float(gradient.abs().sum()) for gradient in expected.values()) > 1e-3
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        allowed = relative * max(float(gradient.abs().max()), 1e-6 * largest)
        assert float((actual[name] - gradient).abs().max()) <= allowed, name


class Probe(TrainerCallback):
    """Keeps the gradients of every optimizer step, before it is taken."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.gradients.append(gradients_of(model))


def train_and_watch(model, processor, folder, rows, **settings):
    """Trains, and returns the losses and document counts of the micro-batches, and the gradients of the steps."""
    probe = Probe()
    trainer = make_trainer(model, processor, folder, rows, callbacks=[probe], **settings)
    losses, documents, compute_loss = [], [], trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        losses.append(loss.item())
        documents.append(len(inputs["document_ids"]))
        return loss

    trainer.compute_loss = watched
    trainer.train()
    return SimpleNamespace(trainer=trainer, losses=losses, documents=documents, gradients=probe.gradients)


def one_batch(processor, rows: list[dict]) -> dict:
    collator = PairCollator(processor)
    return collator(
        [{**row, "positive": row["pos"][0], "negatives": row["neg"], "all_positives": row["pos"]} for row in rows]
    )


def outputs_of(processes: list[subprocess.Popen]) -> list[str]:
    """What the processes of one run say, once all have ended well; none outlives the call."""
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return outputs


def environment(folder: Path, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets"), "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **offline, **changes}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def processor():
    return processor_class()(make_tokenizer(), max_length=100)  # and 20 steps fit the backbone's 128 positions


# Gradient caching


@pytest.mark.parametrize("axes", [{}, {"step_token": "none", "pooling": "last"}])
def test_queries_and_documents_in_one_pass_change_nothing(processor, tmp_path, axes):
    rows = make_rows(5)
    trainer = make_trainer(tiny_model(dtype=torch.float64, **axes), processor, tmp_path, rows)
    inputs, passes, embed = one_batch(processor, rows), [], trainer._embed
    trainer._embed = lambda model, side: passes.append(len(side["input_ids"])) or embed(model, side)
    loss, actual = step(trainer, inputs)
    documents = len(inputs["document_ids"])
    assert passes == ([5, documents] if axes else [5 + documents])
    trainer._embed_both = lambda model, sides: [embed(model, side) for side in sides]
    expected_loss, expected = step(trainer, inputs)
    assert loss == pytest.approx(expected_loss, rel=1e-7)
    assert_same_gradients(actual, expected, 1e-6)


@pytest.mark.parametrize("sub_batch_size", [1, 3, 100])
def test_cached_gradients_are_the_plain_ones(processor, tmp_path, sub_batch_size):
    rows = make_rows(5)
    trainer = make_trainer(tiny_model(dtype=torch.float64), processor, tmp_path, rows)
    inputs = one_batch(processor, rows)
    loss, expected = step(trainer, inputs)
    trainer.args.sub_batch_size = sub_batch_size
    calls, embed = {True: [], False: []}, trainer._embed
    trainer._embed = lambda model, side: (
        calls[torch.is_grad_enabled()].append(len(side["input_ids"])) or embed(model, side)
    )
    cached_loss, actual = step(trainer, inputs)
    assert sum(calls[True]) == sum(calls[False]) == 5 + len(inputs["document_ids"])
    assert max(calls[True]) <= sub_batch_size and max(calls[False]) <= 4 * sub_batch_size
    assert cached_loss == pytest.approx(loss, rel=1e-10)
    assert_same_gradients(actual, expected)


def test_cached_passes_drop_the_same(processor, tmp_path):
    """With dropout the second pass must draw what the first drew, or the gradients are of another function."""
    rows = make_rows(4)
    model = tiny_model(dtype=torch.float64, text_changes={"attention_dropout": 0.1})
    trainer = make_trainer(model, processor, tmp_path, rows, sub_batch_size=3)
    inputs = one_batch(processor, rows)
    torch.manual_seed(5)
    step(trainer, inputs)  # sees that there is dropout, and is as if it had known
    seen, embed, known = [], trainer._embed, torch.get_rng_state()

    def watched(model, side):
        seen.append((side, embed(model, side)))
        return seen[-1][1]

    trainer._embed = watched
    torch.manual_seed(5)
    loss, actual = step(trainer, inputs)
    state = torch.get_rng_state()
    assert torch.equal(state, known)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for (side, before), (again, after) in zip(first, second, strict=True):
        assert torch.equal(side["input_ids"], again["input_ids"]) and torch.equal(before, after)
        assert not before.requires_grad and after.requires_grad
    with torch.no_grad():
        assert not torch.allclose(embed(model, first[0][0]), first[0][1])  # drawn anew, it is different

    # The same chunks in the same order from the same seed, in one graph.
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    chunks = [embed(model, side) for side, _ in first]
    assert torch.equal(torch.get_rng_state(), state)  # and the replay leaves the state as a plain step does
    count = len(rows)
    rows_of = [side["input_ids"] for side, _ in first]
    split = next(i for i in range(len(rows_of) + 1) if sum(map(len, rows_of[:i])) == count)
    sides = []
    for name, part in (("query", chunks[:split]), ("document", chunks[split:])):
        order = inputs[name]["attention_mask"].sum(1).argsort(stable=True)
        sides.append(torch.cat(part)[order.argsort()])
    expected_loss = trainer._joint_loss(*sides, inputs)
    expected_loss.backward()
    assert loss == pytest.approx(expected_loss.item(), rel=1e-10)
    assert_same_gradients(actual, gradients_of(model))


def test_random_state_of_any_accelerator(monkeypatch):
    """MPS stands for those that aren't CUDA; its generator is one of the CPU here."""
    generator = torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: generator.get_state())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, device: generator.set_state(state))
    state = RandomState(torch.device("mps"))
    first = torch.rand(3, generator=generator)
    after = generator.get_state()
    with state.replay():
        assert torch.equal(torch.rand(3, generator=generator), first)
    assert torch.equal(generator.get_state(), after)


@pytest.fixture
def own_precision(monkeypatch):
    """transformers 4 and Accelerate keep the precision of a trainer for those that come after it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_cached_gradients_under_autocast(processor, tmp_path, own_precision):
    """Autocast keeps cast weights; those cast without a graph in the first pass must not serve the second."""
    rows = make_rows(4)
    trainer = make_trainer(tiny_model(), processor, tmp_path, rows, bf16=True, temperature=0.2)
    inputs = one_batch(processor, rows)
    _, expected = step(trainer, inputs)
    trainer.args.sub_batch_size = 3
    _, actual = step(trainer, inputs)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.cosine_similarity(actual[name].flatten(), gradient.flatten(), dim=0) > 0.98, name


# Accumulation and processes


@pytest.mark.parametrize("sub_batch_size", [None, 3])
def test_accumulation_is_the_mean_of_the_micro_batches(processor, tmp_path, sub_batch_size):
    rows = make_rows(8)
    model = tiny_model(dtype=torch.float64)
    trainer = make_trainer(model, processor, tmp_path, rows)
    alone = [step(trainer, inputs) for inputs in trainer.get_train_dataloader()]
    assert len(alone) == 2
    settings = {"max_steps": 1, "gradient_accumulation_steps": 2, "sub_batch_size": sub_batch_size}
    run = train_and_watch(tiny_model(dtype=torch.float64), processor, tmp_path, rows, **settings)
    mean = {name: (gradient + alone[1][1][name]) / 2 for name, gradient in alone[0][1].items()}
    assert run.losses == pytest.approx([loss for loss, _ in alone], rel=1e-10)
    assert len(run.gradients) == 1
    assert_same_gradients(run.gradients[0], mean)
    assert run.trainer.state.log_history[0]["loss"] == pytest.approx(sum(run.losses) / 2, abs=1e-4)


def test_short_last_accumulation_is_the_same_cached(processor, tmp_path):
    """Three micro-batches by twos: Trainer's versions scale the last step in different ways; caching follows."""
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2}
    plain, cached = (
        train_and_watch(
            tiny_model(dtype=torch.float64), processor, tmp_path, make_rows(12), sub_batch_size=size, **settings
        )
        for size in (None, 3)
    )
    assert len(plain.losses) == 3 and len(plain.gradients) == len(cached.gradients) == 2
    for actual, expected in zip(cached.gradients, plain.gradients, strict=True):
        assert_same_gradients(actual, expected)


def test_every_epoch_is_drawn_anew(processor, tmp_path):
    """Another order and other hard negatives, and each pair once an epoch."""
    rows = make_rows(8, lambda i: 6)
    trainer = make_trainer(tiny_model(), processor, tmp_path, rows, num_train_epochs=2, num_negatives=1, k=1)
    seen, compute_loss = [], trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: (
        seen.append(inputs["document_ids"].tolist()) or compute_loss(model, inputs, *args, **kwargs)
    )
    trainer.train()
    positives = [[ids for batch in epoch for ids in batch[:4]] for epoch in (seen[:2], seen[2:])]
    negatives = [{ids for batch in epoch for ids in batch[4:]} for epoch in (seen[:2], seen[2:])]
    assert len(seen) == 4 and sorted(positives[0]) == sorted(positives[1]) and len(set(positives[0])) == 8
    assert positives[0] != positives[1] and negatives[0] != negatives[1]


def test_epoch_reaches_order_and_draws(processor, tmp_path):
    """Accelerate hands the epoch on too, but not to the order of batches that it deals to several processes."""
    trainer = make_trainer(tiny_model(), processor, tmp_path, make_rows(8, lambda i: 6), num_negatives=1)
    trainer.get_train_dataloader()
    setter, seen = trainer._epoch_setter, []
    for epoch in (None, 1.0, 1.5, 0.5):
        setter.on_epoch_begin(trainer.args, SimpleNamespace(epoch=epoch), None)
        seen.append((list(setter.batches), [trainer.train_dataset[i]["negatives"] for i in range(8)]))
    assert seen[0] == seen[3] and seen[1] == seen[2]
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]


# How many negatives row i has, and the settings; in the last case one process alone has any.
CASES = {
    "plain": (lambda i: i % 4, {}),
    "cached": (lambda i: i % 4, {"sub_batch_size": 3}),
    "accumulated": (lambda i: i % 4, {"sub_batch_size": 3, "gradient_accumulation_steps": 2}),
    "lonely": (lambda i: 2 * (i == 0), {"sub_batch_size": 3}),
}


def run_case(name: str, processor, folder: Path, processes: int) -> SimpleNamespace:
    negatives, settings = CASES[name]
    rows = make_rows(6 * settings.get("gradient_accumulation_steps", 1), negatives)
    return train_and_watch(
        tiny_model(dtype=torch.float64),
        processor,
        folder,
        rows,
        max_steps=1,
        num_negatives=3,
        per_device_train_batch_size=6 // processes,
        ddp_backend="gloo" if processes > 1 else None,
        **settings,
    )


def worker(folder: str) -> None:
    """One of two processes: runs all cases and writes what it saw."""
    folder = Path(folder)
    processor = processor_class().from_pretrained(folder / "processor")
    rank = int(os.environ["RANK"])
    seen = {}
    for name in CASES:
        run = run_case(name, processor, folder / f"{name}-{rank}", processes=2)
        assert run.trainer.accelerator.num_processes == 2
        seen[name] = {"losses": run.losses, "documents": run.documents, "gradients": run.gradients}
    torch.save(seen, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    processor.save_pretrained(folder / "processor")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=environment(
                folder,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs_of(processes)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_the_joint_batch(processor, tmp_path, two_processes, name):
    alone = run_case(name, processor, tmp_path, processes=1)
    ranks = [seen[name] for seen in two_processes]
    documents = [rank["documents"] for rank in ranks]
    assert [sum(pair) for pair in zip(*documents, strict=True)] == alone.documents
    assert documents[0] != documents[1]  # uneven numbers of negatives
    if name == "lonely":
        assert [3] in documents
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone.losses, rel=1e-10)
        assert len(rank["gradients"]) == len(alone.gradients) == 1
        assert_same_gradients(rank["gradients"][0], alone.gradients[0])


# Interrupted runs


@pytest.fixture(scope="module")
def workplace(processor, tmp_path_factory):
    """A saved tiny model with dropout, 60 pairs, and the arguments of a run of 14 steps in two epochs."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_model(text_changes={"attention_dropout": 0.1}).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    with (folder / "pairs.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows(60, lambda i: 2 + i % 3))
    argv = f"--model_name_or_path {folder / 'model'} --train_data {folder / 'pairs.jsonl'} --tuning full --k 2 "
    argv += "--learning_rate 1e-3 --num_train_epochs 2 --per_device_train_batch_size 8 --held_out 3 --temperature 0.1 "
    argv += "--logging_steps 1 --save_steps 3 --report_to none --use_cpu True --disable_tqdm True "
    argv += "--dataloader_pin_memory False"
    return SimpleNamespace(folder=folder, argv=argv.split())


@pytest.fixture(scope="module")
def straight(workplace):
    """The folder of a run that nothing interrupts, and what its logger said."""
    output, messages = workplace.folder / "straight", []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("gircse").addHandler(handler)
    try:
        main([*workplace.argv, "--output_dir", str(output)])
    finally:
        logging.getLogger("gircse").removeHandler(handler)
    return SimpleNamespace(folder=output, messages=messages)


def step_lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def assert_same_run(actual: Path, expected: Path, steps: int) -> None:
    logs = [step_lines(folder) for folder in (actual, expected)]
    for lines in logs:
        assert [line["step"] for line in lines] == list(range(1, steps + 1))  # none missing, none twice
    for line, other in zip(*logs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4), line["step"]
        assert line["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-6)
    weights, others = (load_file(folder / "model.safetensors") for folder in (actual, expected))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_training_moves_the_weights(workplace, straight):
    before = load_file(workplace.folder / "model" / "model.safetensors")
    after = load_file(straight.folder / "model.safetensors")
    assert max(float((after[name] - weight).abs().max()) for name, weight in before.items()) > 1e-3


def test_killed_run_resumes_to_the_same_end(workplace, straight):
    output = workplace.folder / "killed"
    argv = [*workplace.argv, "--output_dir", str(output)]
    with (workplace.folder / "killed.txt").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_gircse.py"), *argv],
            env=environment(workplace.folder),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    deadline, log = time.monotonic() + 400, output / "training_log.jsonl"
    # Two steps beyond the first checkpoint, so that their lines of the log come again.
    while not log.exists() or log.read_text().count('"loss"') < 5:
        assert process.poll() is None and time.monotonic() < deadline, (workplace.folder / "killed.txt").read_text()
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert (output / "checkpoint-3").is_dir() and not (output / "model.safetensors").exists()
    assert "Do you wish to run" not in (workplace.folder / "killed.txt").read_text()  # it needs nobody at the keyboard
    # A checkpoint that was being written when the run died is passed over.
    (output / "checkpoint-13").mkdir()
    (output / "checkpoint-13" / "config.json").write_text("{}")
    (output / "checkpoint-14").mkdir()
    (output / "checkpoint-14" / "trainer_state.json").write_text('{"epoch": 2')
    main([*argv, "--resume_from_checkpoint", "last"])
    assert_same_run(output, straight.folder, steps=14)


def test_resume_in_the_second_epoch(workplace, straight):
    """Step 9 is the second of epoch 2: order and drawn negatives are that epoch's, also after a resume."""
    output = workplace.folder / "later"
    shutil.copytree(straight.folder / "checkpoint-9", output / "checkpoint-9")
    main([*workplace.argv, "--output_dir", str(output), "--resume_from_checkpoint", "last"])
    assert_same_run(output, straight.folder, steps=14)


def test_used_output_is_refused(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr("train_gircse.load_model", lambda *_: pytest.fail("loaded before the check"))
    complete = tmp_path / "checkpoint-3"
    complete.mkdir()
    (complete / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="checkpoint-3.*--resume_from_checkpoint last"):
        main([*workplace.argv, "--output_dir", str(tmp_path)])


def test_unwritable_output_is_refused(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr("train_gircse.load_model", lambda *_: pytest.fail("loaded before the check"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written"):
        main([*workplace.argv, "--output_dir", str(tmp_path / "file" / "below")])


def test_resume_without_checkpoint_is_refused(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr("train_gircse.load_model", lambda *_: pytest.fail("loaded before the check"))
    with pytest.raises(ValueError, match="holds no.* checkpoint"):
        main([*workplace.argv, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "last"])


# Settings


def test_warm_up(processor, tmp_path):
    arguments = GircseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert arguments.get_warmup_steps(100) == 10
    chosen = GircseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", warmup_steps=3)
    assert chosen.get_warmup_steps(100) == 3
    trainer = make_trainer(tiny_model(), processor, tmp_path, make_rows(4), learning_rate=1.0)
    trainer.create_optimizer_and_scheduler(num_training_steps=100)
    rates = []
    for _ in range(20):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[5] == pytest.approx(0.5) and rates.index(max(rates)) == 10 and max(rates) == pytest.approx(1.0)


@pytest.mark.parametrize("setting", [{"k": 0}, {"sub_batch_size": 0}, {"sub_batch_size": -1}])
def test_counts_below_one_are_refused(tmp_path, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.* must be >= 1"):
        GircseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **setting)


# What `Trainer` does with all other arguments holds here, too.
HONOURED = """output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size
logging_strategy logging_steps logging_first_step logging_dir log_on_each_node logging_nan_inf_filter log_level
log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start save_only_model save_strategy save_steps
save_on_each_node save_total_limit save_safetensors enable_jit_checkpoint push_to_hub hub_token hub_private_repo
hub_model_id hub_strategy hub_revision load_best_model_at_end metric_for_best_model greater_is_better
ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
fsdp_config deepspeed debug skip_memory_metrics do_train do_eval resume_from_checkpoint local_rank""".split()
# Of transformers before 5, under names that went or have another one since.
OLD = """per_gpu_train_batch_size per_gpu_eval_batch_size no_cuda use_mps_device use_ipex fp16_opt_level fp16_backend
half_precision_backend tpu_num_cores tpu_metrics_debug fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap tp_size
adafactor mp_parameters push_to_hub_model_id push_to_hub_organization push_to_hub_token torchdynamo ray_scope _n_gpu
""".split()


def test_each_inherited_argument_is_honoured_or_refused():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert inherited - {*HONOURED, *OLD} - WITHOUT_EFFECT.keys() == set()
    assert not WITHOUT_EFFECT.keys() & {*HONOURED}


@pytest.mark.parametrize(
    "setting",
    [
        {"label_smoothing_factor": 0.1},
        {"label_names": ["labels"]},
        {"bf16_full_eval": True},
        {"include_num_input_tokens_seen": True},
        {"use_liger_kernel": True},
        {"hub_always_push": True},
        {"do_predict": True},
    ],
)
def test_arguments_without_effect_are_refused(tmp_path, setting):
    name = next(iter(setting))
    with pytest.raises(ValueError, match=rf"{name}=.* has no effect here: .*{WITHOUT_EFFECT[name][:20]}"):
        GircseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **setting)
    with pytest.raises(ValueError, match="split_batches"):
        GircseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, accelerator_config={"split_batches": True})


def test_defaults_of_the_command_line_are_refused_nowhere(tmp_path):
    parser = HfArgumentParser(GircseTrainingArguments)
    (training,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "--do_train"])
    assert training.k == 5


def test_memory_that_runs_out_makes_sub_batches_and_keeps_the_batch(processor, tmp_path):
    """A "GPU" that takes five texts at once: the same losses and gradients as with room for all of them."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 1}
    rows = make_rows(16)
    plain = train_and_watch(tiny_model(dtype=torch.float64), processor, tmp_path / "plain", rows, **settings)
    model, sizes = tiny_model(dtype=torch.float64), []

    def small(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if module.training and torch.is_grad_enabled() and sizes[-1] > 5:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(small, with_kwargs=True)
    found = train_and_watch(model, processor, tmp_path / "small", rows, auto_find_batch_size=True, **settings)
    assert found.trainer._train_batch_size == 5 and found.trainer._sub_batch_size == 5
    assert found.losses[-2:] == pytest.approx(plain.losses) and found.documents[-2:] == plain.documents
    for mine, theirs in zip(found.gradients, plain.gradients, strict=True):
        assert_same_gradients(mine, theirs, 1e-6)


def test_the_best_model_is_by_default_that_of_the_best_accuracy(processor, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.1])
    monkeypatch.setattr(
        "gircse.training.trainer.retrieval_accuracy", lambda *args: dict.fromkeys(args[4], next(accuracies))
    )
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer = make_trainer(
        tiny_model(), processor, tmp_path, make_rows(4), make_rows(6), load_best_model_at_end=True, **settings
    )
    trainer.train()
    assert trainer.args.metric_for_best_model == "accuracy" and trainer.args.greater_is_better
    assert trainer.state.best_metric == 0.9 and trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(weight, trainer.model.state_dict()[name]) for name, weight in best.items())


def test_arguments_of_the_data_loader_reach_it(processor, tmp_path):
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3}
    loader = make_trainer(tiny_model(), processor, tmp_path, make_rows(8), **settings).get_train_dataloader()
    assert loader.persistent_workers and loader.prefetch_factor == 3 and loader.num_workers == 1
    seeds = ({"data_seed": 1}, {"data_seed": 1, "seed": 7}, {"data_seed": 2})
    trainers = [make_trainer(tiny_model(), processor, tmp_path, make_rows(40), **seed) for seed in seeds]
    orders = [list(trainer.get_train_dataloader().batch_sampler) for trainer in trainers]
    assert orders[0] == orders[1] != orders[2]


def test_a_checkpoint_without_optimizer_is_not_gone_on_from(workplace, tmp_path):
    argv = [*workplace.argv, "--output_dir", str(tmp_path), "--max_steps", "3", "--save_only_model"]
    main(argv)
    with pytest.raises(ValueError, match="checkpoint-3 holds no optimizer's state, as --save_only_model leaves it"):
        main([*argv, "--resume_from_checkpoint", "last"])


def test_text_of_a_shell_is_read_as_it_is_meant(lora):
    template = r"Instruct: {instruction}\nQuery:\t"
    arguments = ModelArguments(model_name_or_path=str(lora.base), prompt_template=template, suffix=r"\n\\n")
    processor = load_model(arguments)[1]
    assert processor.prompt_template == "Instruct: {instruction}\nQuery:\t" and processor.suffix == "\n\\n"


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|system|>\nBe kind.<|end|>\n{% endif %}{% for m in messages %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


@pytest.mark.parametrize(
    "template, prompt, suffix",
    [
        (CHATML, "<|user|>\nInstruct: {instruction}\nQuery: ", "<|end|>\n<|assistant|>\n"),  # no default message
        (TRIMMED, "<bos><user>Instruct: {instruction}\nQuery: ", "</user><model>"),
        ("{{ messages[-1]['content'] }}|", "Instruct: {instruction}\nQuery: ", "|"),  # knows a single turn
        ("{{ messages[0]['role'] }}", "Instruct: {instruction}\nQuery: ", ""),  # drops the text
        ("{{ raise_exception('no roles') }}", "Instruct: {instruction}\nQuery: ", ""),
        (None, "Instruct: {instruction}\nQuery: ", ""),
    ],
)
def test_prompt_and_suffix_are_a_turn_of_the_chat_template(lora, tmp_path, template, prompt, suffix):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<bos>"
    tokenizer.chat_template = template
    for name in ("config.json", "model.safetensors"):
        shutil.copy(lora.base / name, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, processor = load_model(ModelArguments(model_name_or_path=str(tmp_path)))
    assert (processor.prompt_template, processor.suffix) == (prompt, suffix)
    assert model.config.logit_temperature == 2
    papers = ModelArguments(str(tmp_path), prompt_template=PAPER_PROMPT, logit_temperature=1.0)
    model, processor = load_model(papers)
    assert (processor.prompt_template, processor.suffix) == ("Instruct: {instruction}\nQuery: ", "")
    assert model.config.logit_temperature == 1
    processor = load_model(ModelArguments(str(tmp_path), suffix="<eos>"))[1]
    assert (processor.prompt_template, processor.suffix) == ("Instruct: {instruction}\nQuery: ", "<eos>")


def test_help_of_any_version_of_transformers_is_printed(capsys, monkeypatch):
    """That of 5.2.0 has a bare per cent sign."""
    (field,) = [field for field in dataclasses.fields(GircseTrainingArguments) if field.name == "max_grad_norm"]
    monkeypatch.setattr(field, "metadata", {"help": "100% of it, 5%% more, or %(default)s"})
    with pytest.raises(SystemExit) as status:
        main(["--help"])
    assert status.value.code == 0 and "100% of it, 5% more, or 1.0" in " ".join(capsys.readouterr().out.split())


def test_neighbours_are_printed_on_any_console(workplace, straight, monkeypatch):
    """Windows' consoles often have 256 characters."""
    said = {}
    run = subprocess.run

    def watched(*args, **kwargs):
        said["result"] = run(*args, **{**kwargs, "env": {**kwargs["env"], "PYTHONUTF8": "0", "LC_ALL": "C"}}, stdout=-1)

    monkeypatch.setattr("gircse.training.card.subprocess.run", watched)
    monkeypatch.setenv("PYTHONCOERCECLOCALE", "0")
    rows = make_rows(2)
    rows[0]["query"] = "多少钱"
    show_neighbours(str(straight.folder), make_pairs(rows))
    assert r"\u591a\u5c11\u94b1" in said["result"].stdout

    class Console(io.TextIOWrapper):
        pass

    console = Console(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    lenient_console()
    print("多")
    console.flush()
    assert console.buffer.getvalue().strip() == rb"\u591a"


# What could not be saved at the end


class Unsaved(PreTrainedTokenizerFast):
    """Saves nothing that a tokenizer is loaded from, as that of the mistral-common package."""

    def save_pretrained(self, folder, *args, **kwargs):
        Path(folder, "tekken.json").write_text("{}")
        return (str(Path(folder, "tekken.json")),)


def test_a_tokenizer_that_cannot_be_saved_is_replaced_or_refused_before_training(lora, tmp_path, monkeypatch):
    original, asked = AutoTokenizer.from_pretrained, []

    def load(path, **kwargs):
        asked.append(kwargs)
        tokenizer = original(path)
        return (
            tokenizer
            if kwargs.get("mistral_format") is False and replaced
            else Unsaved(tokenizer_object=tokenizer.backend_tokenizer)
        )

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    replaced = True
    processor = load_model(ModelArguments(model_name_or_path=str(lora.base)))[1]
    assert not isinstance(processor.tokenizer, Unsaved) and asked == [{}, {"mistral_format": False}]
    replaced = False
    monkeypatch.setattr("train_gircse.GircseTrainer.train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(ValueError, match="the tokenizer can't be saved .*mistral_format=False"):
        main([*lora.argv, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    "options, remedy", [([], "can't be merged.*--save_adapter"), (["--tuning", "full"], "use --tuning lora")]
)
def test_a_quantized_backbone_is_refused_before_training_where_it_could_not_be_saved(
    lora, tmp_path, monkeypatch, options, remedy
):
    original = load_model

    def load(arguments):
        model, processor = original(arguments)
        model.config.text_config.quantization_config = {"quant_method": "torchao"}
        return model, processor

    monkeypatch.setattr("train_gircse.load_model", load)
    monkeypatch.setattr("train_gircse.GircseTrainer.train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(ValueError, match=remedy):
        main([*lora.argv, *options, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    "files, said",
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "some/base"}'}, "adapter of 'some/base'.* --adapter"),
        ({"a.gguf": "", "b.gguf": ""}, "several GGUF files .a.gguf, b.gguf.: choose one by --gguf_file"),
        ({"modules.json": "[]"}, "Sentence Transformers model of other modules"),
        ({"pytorch_model.bin": ""}, "has no config.json"),
    ],
)
def test_folders_that_are_no_model_are_told_what_they_are(tmp_path, files, said):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        load_model(ModelArguments(model_name_or_path=str(tmp_path)))


def write_gguf(path: Path) -> None:
    """A tiny Llama in GGUF, with the tokenizer of the other tests."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    vocabulary = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(0)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32)}
    shapes |= {"blk.0.ffn_down": (32, 48)}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = generator.normal(0, 0.2, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd" else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(gguf is None, reason="gguf is not installed")
@pytest.mark.parametrize("named", [False, True])
def test_a_gguf_file_trains_saves_and_loads_from_the_command_line(workplace, tmp_path, named):
    """It is dequantized at loading, and nothing that is saved says otherwise."""
    (tmp_path / "base").mkdir()
    write_gguf(tmp_path / "base" / "tiny.gguf")
    if named:
        write_gguf(tmp_path / "base" / "other.gguf")
    argv = [*workplace.argv, "--max_steps", "2", "--warmup_steps", "1", "--held_out", "0", "--num_steps", "3"]
    argv += ["--model_name_or_path", str(tmp_path / "base"), *(["--gguf_file", "tiny.gguf"] if named else [])]
    main([*argv, "--output_dir", str(tmp_path / "out")])
    assert "quantiz" not in (tmp_path / "out" / "config.json").read_text()
    model, processor = load_model(ModelArguments(model_name_or_path=str(tmp_path / "out")))
    assert model.generate_embedding(**processor(["a red thing"])).shape == (1, 32)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32} and len(processor.tokenizer) > 99


def test_bad_rows_are_left_out_and_listed_beside_the_output(workplace, tmp_path):
    lines = workplace.folder.joinpath("pairs.jsonl").read_text().splitlines()
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines[:30], '{"query": "no answer"}', *lines[30:]]))
    argv = [*workplace.argv, "--train_data", str(tmp_path / "pairs.jsonl"), "--max_steps", "1", "--held_out", "0"]
    with pytest.raises(ValueError, match=r"pairs.jsonl:31: "):
        main([*argv, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="max_bad"):
        main([*argv, "--output_dir", str(tmp_path / "out"), "--skip_bad_rows"])  # one of 61 is more than 1 %
    main([*argv, "--output_dir", str(tmp_path / "out"), "--skip_bad_rows", "--max_bad_share", "0.02"])
    (bad,) = map(json.loads, (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines())
    assert bad["row"] == 31 and bad["file"].endswith("pairs.jsonl") and "pos" in bad["reason"]


def test_columns_of_other_names_are_named_on_the_command_line(workplace, tmp_path):
    with (tmp_path / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["Frage", "Antwort", "falsch"])
        writer.writerows([f"wer ist {i}?", f'"{i}"; wer sonst', f"{i + 1}"] for i in range(16))
    argv = [*workplace.argv, "--train_data", str(tmp_path / "pairs.csv"), "--max_steps", "1", "--held_out", "0"]
    main([*argv, "--output_dir", str(tmp_path / "out"), "--columns", "query=Frage,pos=Antwort", "neg=falsch"])
    assert json.loads((tmp_path / "out" / "training_log.jsonl").read_text().splitlines()[0])["log_candidates"] > 2.7


def test_command_line_lists_choices(capsys):
    parser = HfArgumentParser((ModelArguments, DataArguments, GircseTrainingArguments))
    parsed = parser.parse_args_into_dataclasses(["--matryoshka_dims", "8", "16", "--symmetric_sources", "a", "b"])
    assert parsed[2].matryoshka_dims == [8, 16] and parsed[1].symmetric_sources == ["a", "b"]
    for wrong in (["--reduction", "max"], ["--tuning", "half"], ["--save_dtype", "float23"]):
        with pytest.raises(SystemExit):  # found before training, not at the end
            parser.parse_args_into_dataclasses(wrong)
        assert wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize("given, reentrant", [([], False), (['{"use_reentrant": true}'], True), (["{}"], False)])
def test_gradient_checkpointing_settings_of_the_command_line(tmp_path, given, reentrant):
    argv = f"--output_dir {tmp_path} --use_cpu True --report_to none --gradient_checkpointing True".split()
    argv += ["--gradient_checkpointing_kwargs", *given] if given else []
    (training,) = HfArgumentParser(GircseTrainingArguments).parse_args_into_dataclasses(argv)
    assert training.gradient_checkpointing_kwargs == {"use_reentrant": reentrant}


@pytest.mark.parametrize("sub_batch_size", [None, 3])
def test_objective_settings_reach_the_loss(processor, tmp_path, sub_batch_size):
    rows = make_rows(4)
    chosen = {"reduction": "mean", "matryoshka_dims": [8], "temperature": 0.3, "refinement_weight": 0.5}
    model = tiny_model(dtype=torch.float64)
    trainer = make_trainer(model, processor, tmp_path, rows, sub_batch_size=sub_batch_size, **chosen)
    inputs = one_batch(processor, rows)
    queries, documents = (trainer._embed(model, inputs[side]) for side in ("query", "document"))
    mask = candidate_mask(inputs["document_ids"], inputs["positive_ids"])
    expected = {"reduction": "mean", "dims": (8,), "temperature": 0.3, "refinement_weight": 0.5}
    loss = step(trainer, inputs)[0]
    assert loss == pytest.approx(icr_loss(queries, documents, mask, **expected).total.item(), rel=1e-10)
    others = ({"reduction": "sum"}, {"dims": ()}, {"temperature": 0.02}, {"refinement_weight": 1.0})
    for other in others:  # each of them makes a difference here
        assert abs(loss - icr_loss(queries, documents, mask, **{**expected, **other}).total.item()) > 1e-4, other


# LoRA and the exported folder


@pytest.fixture(scope="module")
def lora(workplace):
    """A LoRA run of 4 steps from a plain causal LM, and the model of this process at its export."""
    base = workplace.folder / "plain"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config(tie_word_embeddings=True)).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    argv = f"--model_name_or_path {base} --train_data {workplace.folder / 'pairs.jsonl'} --tuning lora --lora_r 4 "
    argv += "--learning_rate 0.02 --max_steps 4 --per_device_train_batch_size 4 --k 3 --num_steps 4 --held_out 8 "
    argv += "--sub_batch_size 5 --logging_steps 1 --save_steps 2 --use_cpu True --disable_tqdm True "
    argv += f"--dataloader_pin_memory False --report_to {'tensorboard' if HAS_TENSORBOARD else 'none'}"
    output, kept = workplace.folder / "lora", SimpleNamespace()

    def watched(model, processor, *args, **kwargs):
        kept.inputs = processor(["a red thing", "cold"], instruction="find the answer")
        kept.unmerged = model.eval().get_base_model().generate_embedding(**kept.inputs, k=4)
        kept.model = export(model, processor, *args, **kwargs)
        return kept.model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gircse.training.trainer.export", watched)
        elsewhere = workplace.folder / "elsewhere"
        elsewhere.mkdir()
        patch.chdir(elsewhere)
        main([*argv.split(), "--output_dir", str(output)])
        kept.beside = list(elsewhere.iterdir())
    kept.argv, kept.folder, kept.base = argv.split(), output, base
    return kept


LOAD = """
import sys, torch
from transformers import AutoModel, AutoProcessor
folder, result = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(["a red thing", "cold"], instruction="find the answer")
assert not {"peft", "train_gircse"} & set(sys.modules)
torch.save(model.generate_embedding(**inputs, k=4), result)
"""


def test_lora_export_loads_elsewhere(lora, tmp_path):
    others = ["gircse/training/losses.py", "requirements.txt", "requirements-train.txt", "README.md", "config.json"]
    for name in [*REMOTE_CODE, *CODE_FILES, *others]:
        assert (lora.folder / name).is_file(), name
    keys = load_file(lora.folder / "model.safetensors")
    assert keys and not [key for key in keys if "lora" in key or "base_layer" in key or "base_model" in key]
    said = subprocess.run(
        [sys.executable, "-c", LOAD, str(lora.folder), str(tmp_path / "embeddings.pt")],
        env=environment(tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules")),
        cwd=tmp_path,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    assert "Do you wish to run" not in said
    merged = lora.model.eval().generate_embedding(**lora.inputs, k=4)
    torch.testing.assert_close(torch.load(tmp_path / "embeddings.pt"), merged, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged, lora.unmerged, rtol=0, atol=1e-4)
    start = type(lora.model).from_causal_lm(str(lora.base)).generate_embedding(**lora.inputs, k=4)
    assert float((start - merged).abs().max()) > 1e-3  # it has learned something


def test_card_tells_the_scores(lora):
    card = (lora.folder / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [int(row.split("|")[1]) for row in rows] == [1, 3, 5, 10, 20]
    assert card.startswith("---\nlibrary_name: transformers\n") and "batch 4 x 1 x 1" in card


@pytest.mark.parametrize(
    "step_token, said", [("soft", "(GIRCSE)"), ("learned", "learned"), ("none", "generates nothing")]
)
def test_what_the_card_shows_runs(processor, tmp_path, step_token, said):
    pytest.importorskip("sentence_transformers")
    export(tiny_model(step_token=step_token, num_steps=3), processor, tmp_path)
    settings = {"use_cpu": True, "report_to": "none", "learning_rate": 1e-4}
    card = model_card(tmp_path, GircseTrainingArguments(output_dir=str(tmp_path), **settings))
    blocks = card.split("```python\n")[1:]
    assert said in card and len(blocks) == 2 and ("k=5" in card) == (step_token == "soft")
    for block in blocks:
        names = {}
        exec(block.partition("```")[0].replace('"."', repr(str(tmp_path))), names)
        assert names["embeddings"].shape == (1, 32)


def test_lora_run_resumes(lora, workplace):
    output = workplace.folder / "lora-later"
    shutil.copytree(lora.folder / "checkpoint-2", output / "checkpoint-2")
    main([*lora.argv, "--output_dir", str(output), "--resume_from_checkpoint", "last"])
    assert_same_run(output, lora.folder, steps=4)


def test_learned_tokens_are_trained_beside_lora(processor, tmp_path):
    """LoRA reaches linear layers alone; tokens that start at random must learn all the same."""
    model = tiny_model(step_token="learned", num_steps=3)
    start = model.learned_tokens.weight.detach().clone()
    peft_model = add_lora(model, ModelArguments(lora_r=2))
    rows = make_rows(4)
    trainer = make_trainer(
        peft_model, processor, tmp_path / "run", rows, max_steps=2, learning_rate=0.1, warmup_steps=1, k=2
    )
    trainer.train()
    merged = export(trainer.model, processor, tmp_path / "out")
    assert not torch.equal(merged.learned_tokens.weight, start)
    assert "learned_tokens.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_longest_text_leaves_room_for_all_steps(lora):
    """Accuracy is measured at k = 20, however few steps the new model's config says."""
    model, processor = load_model(ModelArguments(model_name_or_path=str(lora.base), num_steps=2))
    assert processor.max_length == 128 - 20
    with torch.no_grad():
        assert model(**processor(["red " * 200]), k=20).embeddings.isfinite().all()


@pytest.mark.parametrize(
    "axes, options, longest",
    [
        ({}, "--k 2", 108),  # the accuracy is measured at k = 20
        ({}, "--k 30", 98),
        ({}, "--k 2 --held_out 0", 126),
        ({"step_token": "learned", "num_steps": 4}, "--k 4", 124),
        ({"step_token": "learned", "num_steps": 4}, "--k 4 --max_length 125", 124),
        ({"step_token": "none"}, "", 128),
    ],
)
def test_a_length_that_leaves_no_room_for_the_steps_is_refused(processor, tmp_path, axes, options, longest):
    model, processor = tiny_model(**axes), copy.copy(processor)
    processor.max_length = 512
    parser = HfArgumentParser((ModelArguments, DataArguments, GircseTrainingArguments))

    def check(*more: str) -> None:
        argv = [*f"--output_dir {tmp_path} --use_cpu True --report_to none {options}".split(), *more]
        check_settings(model, processor, *parser.parse_args_into_dataclasses(argv))

    with pytest.raises(ValueError, match=rf"max_length=\d+ exceeds .*positions.*: use --max_length {longest}$"):
        check()
    with pytest.raises(ValueError, match="max_length="):
        check("--max_length", str(longest + 1))
    check("--max_length", str(longest))


@pytest.mark.parametrize("argument, output", [("model_name_or_path", "m"), ("adapter", "m"), ("adapter", "")])
def test_output_in_the_place_of_what_training_starts_from_is_refused(processor, tmp_path, argument, output):
    start = tmp_path / "m" if argument != "adapter" or output else tmp_path / "adapter"
    start.mkdir()
    parser = HfArgumentParser((ModelArguments, DataArguments, GircseTrainingArguments))
    argv = f"--{argument} {start} --output_dir {tmp_path / output} --use_cpu True --report_to none".split()
    with pytest.raises(ValueError, match=f"output_dir=.* would overwrite {argument}="):
        check_settings(tiny_model(), processor, *parser.parse_args_into_dataclasses(argv + ["--max_length", "64"]))


def test_lora_is_merged_in_the_dtype_that_is_saved(processor, tmp_path):
    """In bfloat16, as it is trained, this much would be rounded away."""
    model = add_lora(tiny_model(dtype=torch.bfloat16), ModelArguments(lora_r=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1e-4)
    layer = model.get_base_model().language_model.model.layers[0].self_attn.q_proj
    start, change = layer.weight.detach().float(), layer.get_delta_weight("default").detach().float()
    merged = export(model, processor, tmp_path)
    learned = merged.language_model.model.layers[0].self_attn.q_proj.weight - start
    torch.testing.assert_close(learned, change, rtol=0.05, atol=float(change.abs().max()) / 50)


def test_copy_for_export_is_apart_from_the_model():
    model = tiny_model(text_changes={"tie_word_embeddings": True})
    copied = copy_on_cpu(model)
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied.state_dict().items())
    kept, changed = (dict(m.named_buffers()) for m in (copied, model))
    assert kept.keys() == changed.keys() and not any(torch.equal(kept[name], changed[name]) for name in kept)


def test_untrained_adapter_is_not_exported(processor, tmp_path):
    model = add_lora(tiny_model(), ModelArguments(lora_r=2))
    with pytest.raises(ValueError, match="lora_B"):
        export(model, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The log


@pytest.mark.parametrize("run, k", [("straight", 2), ("lora", 3)])
def test_log_lines(request, run, k):
    folder = request.getfixturevalue(run).folder
    for line in step_lines(folder):
        wanted = {"loss", "grad_norm", "learning_rate", "epoch", "L_reg", "mean_cosine", "log_candidates"}
        assert wanted | {f"L_{i}" for i in range(1, k + 1)} <= line.keys() and f"L_{k + 1}" not in line
        assert all(math.isfinite(line[name]) for name in wanted)
        total = sum(line[f"L_{i}"] for i in range(1, k + 1)) + line["L_reg"]
        assert line["loss"] == pytest.approx(total, abs=1e-3)
        assert -1 <= line["mean_cosine"] <= 1
    if run == "straight":  # 8 positives and 8 hard negatives for each query
        assert {line["log_candidates"] for line in step_lines(folder)} == {round(math.log(16), 5)}
    last = json.loads((folder / "training_log.jsonl").read_text().splitlines()[-1])
    assert "eval_accuracy_k20" in last  # the accuracy after training


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is not installed")
def test_tensorboard(lora):
    assert not lora.beside  # all that is written is in the output folder
    written = b"".join(path.read_bytes() for path in lora.folder.rglob("events.out.tfevents*"))
    assert written.count(b"train/L_3") == 4 and b"train/grad_norm" in written


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_curves(straight, tmp_path):
    assert (straight.folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    lines = [{"step": step, "loss": 2.0, "L_1": 1.0, "L_2": 0.9} for step in range(3)]
    plot_curves(lines, tmp_path / "without_norm.png")  # transformers 4 logs no norm when it clips none
    assert (tmp_path / "without_norm.png").exists()


def collapse_warnings(caplog) -> int:
    return sum("collapsed" in record.getMessage() for record in caplog.records)


def test_collapse_is_said_once(processor, tmp_path, caplog):
    """All tokens are one, so all texts are: every step loss is the log of the number of candidates."""
    model = tiny_model()
    weight = model.get_input_embeddings().weight.data
    weight.copy_(weight[5].clone().expand_as(weight))
    rows = make_rows(4, lambda i: 1)
    run = train_and_watch(model, processor, tmp_path, rows, max_steps=8, learning_rate=1e-7)
    line = run.trainer.state.log_history[0]
    assert line["L_1"] == pytest.approx(math.log(8), abs=1e-3) and line["mean_cosine"] == pytest.approx(1, abs=1e-3)
    assert collapse_warnings(caplog) == 1


def test_a_moment_at_chance_is_no_collapse(processor, tmp_path, caplog):
    trainer = make_trainer(tiny_model(), processor, tmp_path, make_rows(4))

    def lines(count: int, second_loss: float) -> None:
        for _ in range(count):
            trainer._metrics = [
                {
                    name: torch.tensor(value)
                    for name, value in {
                        "L_1": 2.0,
                        "L_2": second_loss,
                        "L_reg": 0.0,
                        "mean_cosine": 0.9,
                        "log_candidates": 2.0,
                    }.items()
                }
            ]
            trainer.log({"loss": 1.0})

    lines(4, 2.0)
    lines(1, 1.5)  # one step is better than chance: it learns
    lines(4, 2.0)
    assert collapse_warnings(caplog) == 0
    lines(1, 2.0)
    assert collapse_warnings(caplog) == 1
    lines(6, 2.0)
    assert collapse_warnings(caplog) == 1


def test_a_diverging_run_is_told_so_early_once_and_with_a_remedy(processor, tmp_path, caplog):
    settings = {"max_steps": 40, "learning_rate": 30.0, "warmup_steps": 1, "logging_steps": 5}
    train_and_watch(tiny_model(), processor, tmp_path, make_rows(64), **settings)
    (warning,) = [record.getMessage() for record in caplog.records if "training diverges" in record.getMessage()]
    assert "Lower the learning rate (now 30)" in warning and "--logit_temperature 2" in warning


@pytest.mark.parametrize(
    "losses, norms, expected",
    [
        ([9, 7, 5, 4, 3, 3, 2, 2], [50] * 8, None),  # starts above chance and falls
        ([9, 9, 9, 9, 9, 9], [50] * 6, "worse than by chance"),
        ([3, 2, 5, 6, 7], [50] * 5, "diverges: since step 30"),
        ([3, 3, 3, 3, 3], [50, 60, 3000, 5000, 7000], "the gradient explodes"),
        ([3, 3, 3, 3, 3], [50, 60, 3000, 60, 50], None),  # one batch
        ([3, math.nan, math.nan, math.nan], [50, math.nan, math.nan, math.nan], "diverges"),
        ([4.16] * 6, [50] * 6, "has collapsed"),
        ([9, 9, 9, 9, 9], [math.nan] * 5, "diverges"),
    ],
)
def test_watch(losses, norms, expected):
    def see(logging_steps: int, warm: bool) -> list[str]:
        watch, lines = Watch(), enumerate(zip(losses, norms, strict=True), 1)
        said = [watch.see(i * logging_steps, [loss] * 2, math.log(64), norm, 0.9, warm) for i, (loss, norm) in lines]
        return [line for line in said if line]

    found = see(10, True)
    assert len(found) == (expected is not None) and all(expected in line for line in found)
    assert not any("diverges" in line for line in see(1, True))  # a few steps say little
    if losses[0] == 9:
        assert not see(10, False)  # it may start there, and warms up


def test_watch_sees_that_all_texts_point_one_way():
    watch = Watch()
    cosines = [0.97, 0.995, 0.995, 0.98, *[0.995] * 6]
    said = [watch.see(10 * i, [4.4, 4.3], math.log(64), 50, cosine, False) for i, cosine in enumerate(cosines)]
    assert [i for i, line in enumerate(said) if line] == [8] and "all texts are as one" in said[8]


def test_a_healthy_run_is_not_warned(straight):
    assert not [message for message in straight.messages if "collapsed" in message or "diverges" in message]


# Accuracy

TEXTS = ["pad", "q0", "q1", "q2", "q3", "q4", "d0", "d1", "d2", "d3", "n0"]


def lookup_processor(texts, instruction=None, max_length=None):
    """A text's number in TEXTS, once to three times: lengths differ from the order."""
    ids = [torch.full((1 + TEXTS.index(text) % 3,), TEXTS.index(text)) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return {"input_ids": padded, "attention_mask": (padded > 0).long()}


class Lookup:
    """In a model's place: at each step a text's vector is the unit vector of a chosen angle."""

    def __init__(self, step_token: str = "soft", num_steps: int = 20) -> None:
        self.config = SimpleNamespace(step_token=step_token, num_steps=num_steps)
        self.device, self.training, self.asked = torch.device("cpu"), True, set()
        right = {"q0": 0, "q1": 90, "q2": 180, "q3": 270, "q4": 90, "d0": 0, "d1": 90, "d2": 180, "d3": 270, "n0": 45}
        angles = torch.tensor([[float(right.get(text, 0))] * 20 for text in TEXTS])
        for text, step, angle in (
            # At k = 1 the hard negative beats the positive of q0. d3 beats d2 for q2, and d2 beats d3 for q3; but
            # those two rows have one label.
            ("d0", 1, 20),
            ("n0", 1, 10),
            ("d2", 1, 200),
            ("d3", 1, 185),
            # At k = 5 two queries have changed places.
            ("q0", 5, 90),
            ("q1", 5, 0),
        ):
            angles[TEXTS.index(text), step - 1] = angle
        self.vectors = torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], dim=-1)  # (texts, 20, 2)

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def __call__(self, input_ids, attention_mask, k) -> SimpleNamespace:
        assert not self.training
        self.asked.add(k)
        return SimpleNamespace(step_embeddings=self.vectors[input_ids[:, 0], : k or 1])


def accuracy_rows() -> datasets.Dataset:
    empty = {"neg": [], "instruction": "", "source": "s", "symmetric": False, "label": None}
    rows = [
        {"query": "q0", "pos": ["d0"], "neg": ["n0"]},
        {"query": "q1", "pos": ["d1"]},
        {"query": "q2", "pos": ["d2"], "label": "same"},
        {"query": "q3", "pos": ["d3"], "label": "same"},
        {"query": "q4", "pos": ["d1"]},  # the positive of q1, too: neither counts against the other
    ]
    return make_pairs([{**empty, **row} for row in rows])


def test_accuracy_by_hand():
    model = Lookup()
    accuracy = retrieval_accuracy(model, accuracy_rows(), PairCollator(lookup_processor), batch_size=2)
    assert accuracy == pytest.approx({1: 4 / 5, 3: 1.0, 5: 3 / 5, 10: 1.0, 20: 1.0})
    assert model.training and model.asked == {20}  # one pass for all k, and the mode is what it was


def test_accuracy_is_measured_in_batches_of_as_many_tokens():
    """Batches of two texts of 512 tokens: 1024 tokens or 32 texts, of like length."""
    lengths = [600, 20, 512, 100, 512, 30, 500, *[10] * 40]
    side = {"attention_mask": torch.stack([(torch.arange(600) < n).long() for n in lengths])}
    batches = [[lengths[row] for row in rows.tolist()] for rows in rows_by_tokens(side, 2)]
    assert batches == [[10] * 32, [10] * 8 + [20, 30], [100, 500], [512, 512], [600]]


@pytest.mark.parametrize(
    "rows, settings, expected",
    [
        (100_000, {"num_train_epochs": 1}, 256),
        (100_000, {"max_steps": 40, "per_device_train_batch_size": 8}, 16),  # 960 texts: 48 of accuracy
        (100_000, {"max_steps": 40, "per_device_train_batch_size": 8, "num_negatives": 4}, 32),
        (100_000, {"max_steps": 40, "gradient_accumulation_steps": 2}, 64),
        (100_000, {"max_steps": 1}, 8),
        (50, {"num_train_epochs": 100}, 5),  # most are to train on
    ],
)
def test_accuracy_takes_a_twentieth_of_the_texts(tmp_path, rows, settings, expected):
    training = GircseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
    assert held_out_size(rows, training) == expected


def test_accuracy_masks_false_negatives():
    rows = [{**row, "label": None} for row in accuracy_rows()]
    accuracy = retrieval_accuracy(Lookup(), make_pairs(rows), PairCollator(lookup_processor), batch_size=2)
    assert accuracy == pytest.approx({1: 2 / 5, 3: 1.0, 5: 3 / 5, 10: 1.0, 20: 1.0})


def test_accuracy_of_other_step_tokens():
    collator = PairCollator(lookup_processor)
    none, learned = Lookup("none"), Lookup("learned", num_steps=4)
    assert retrieval_accuracy(none, accuracy_rows(), collator, batch_size=2) == pytest.approx({1: 4 / 5})
    assert retrieval_accuracy(learned, accuracy_rows(), collator, batch_size=2) == pytest.approx({1: 4 / 5, 3: 1.0})
    assert none.asked == {None} and learned.asked == {3}


def test_accuracy_before_training_is_measured_on_the_accelerator(processor, tmp_path, monkeypatch):
    """Also where Trainer leaves the model on the CPU until it shards it."""
    trainer, moves = make_trainer(tiny_model(), processor, tmp_path, make_rows(4), held_out=make_rows(6)), []
    monkeypatch.setattr(GircseTrainingArguments, "device", property(lambda self: torch.device("cuda", 0)))
    monkeypatch.setattr(trainer.model, "to", lambda device: moves.append(str(device)))
    trainer.evaluate()
    assert moves == ["cuda:0", "cpu"]
    trainer.state.max_steps = 1  # as in training, when the model is where it should be
    trainer.evaluate()
    assert len(moves) == 2


def test_the_learning_rate_is_by_default_that_of_what_is_trained(processor, tmp_path):
    peft_model = add_lora(tiny_model(), ModelArguments())
    for model, settings, expected in (
        (tiny_model(), {}, 5e-5),
        (peft_model, {}, 5e-4),
        (peft_model, {"learning_rate": 0.01}, 0.01),
    ):
        assert make_trainer(model, processor, tmp_path, make_rows(4), **settings).args.learning_rate == expected


def test_evaluate_reports_each_k(processor, tmp_path):
    trainer = make_trainer(tiny_model(), processor, tmp_path, make_rows(4), held_out=make_rows(6))
    metrics = trainer.evaluate()
    assert set(metrics) == {"eval_accuracy"} | {f"eval_accuracy_k{k}" for k in (1, 3, 5, 10, 20)}
    assert all(0 <= value <= 1 for value in metrics.values())
    assert metrics["eval_accuracy"] == metrics["eval_accuracy_k3"]


def test_accuracy_is_measured_at_the_trained_k_too(processor, tmp_path):
    for model, settings, trained in (
        (tiny_model(), {"k": 4}, 4),
        (tiny_model(step_token="none", pooling="last"), {}, 1),
    ):
        metrics = make_trainer(model, processor, tmp_path, make_rows(4), make_rows(6), **settings).evaluate()
        assert metrics["eval_accuracy"] == metrics[f"eval_accuracy_k{trained}"]


def test_accuracy_before_training_is_said_when_it_is_known_and_what_is_done_meanwhile(processor, tmp_path, capsys):
    rows = (make_rows(4), make_rows(6))
    make_trainer(tiny_model(), processor, tmp_path, *rows, disable_tqdm=False).evaluate()
    said = capsys.readouterr()
    assert said.out.startswith("Held-out accuracy before training (6 pairs): ") and " at k = 20" in said.out
    assert "held-out accuracy:   0%" in said.err  # of a bar that is gone when it is done
    for disable_tqdm in (True, None):  # None where there is no terminal
        make_trainer(tiny_model(), processor, tmp_path, *rows, disable_tqdm=disable_tqdm).evaluate()
        said = capsys.readouterr()
        assert said.out.startswith("Measuring held-out accuracy, 2 batches\nHeld-out accuracy before training")
        assert said.err == ""


if __name__ == "__main__":
    worker(sys.argv[1])
