"""Training in two processes as the shipped configurations launch it: the same losses and weights as one process with
the joint batch, and a whole Hub-ready folder. On CPUs, by gloo; DeepSpeed, where it is installed, in one process."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import ROOT, environment, make_rows, make_tokenizer, outputs_of, tiny_text_config
from train_gircse import main

STEPS = 2
# As `torchrun` starts the script, once for each list of arguments.
SCRIPT = """
import json, os, sys, torch
sys.path.insert(0, sys.argv[1])
if os.environ.get("ACCELERATE_USE_FSDP"):
    # Accelerate leaves FSDP out where processes compute on CPUs: it is told that these are on GPUs.
    from accelerate.state import DistributedType, PartialState
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    torch.distributed.init_process_group("gloo")
from train_gircse import GircseTrainer, main
export, sharded = GircseTrainer.export, []
def watched(trainer):
    marks = ("device_mesh", "ds_id")  # of FSDP and ZeRO-3
    sharded.append(sum(any(hasattr(weight, mark) for mark in marks) for weight in trainer.model.parameters()))
    export(trainer)
GircseTrainer.export = watched
for argv in json.loads(sys.argv[2]):
    main(argv)
print("sharded:", sharded)
"""
TUNINGS = {"full": "--tuning full --learning_rate 1e-3", "lora": "--lora_r 4 --learning_rate 0.02 --sub_batch_size 3"}


def arguments_of(folder: Path, tuning: str, output: Path, processes: int) -> list[str]:
    argv = f"--model_name_or_path {folder / tuning} --train_data {folder / 'pairs.jsonl'} --output_dir {output} "
    argv += f"{TUNINGS[tuning]} --max_steps {STEPS} --per_device_train_batch_size {8 // processes} --k 2 --num_steps 3 "
    argv += "--held_out 4 --num_negatives 3 --max_grad_norm 1.0 --temperature 0.2 --logging_steps 1 --save_strategy no "
    argv += "--report_to none --use_cpu True --disable_tqdm True --dataloader_pin_memory False --seed 3"
    return argv.split() + (["--ddp_backend", "gloo"] if processes > 1 else [])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two plain causal LMs, for full tuning with a head of its own and for LoRA with a tied one, and pairs with unlike
    numbers of negatives. Vocabularies are large enough to be mixed in chunks, and for ZeRO-3, which keeps small weights
    whole, to shard."""
    folder = tmp_path_factory.mktemp("made")
    for name, tied in (("full", False), ("lora", True)):
        torch.manual_seed(0)
        config = tiny_text_config(tie_word_embeddings=tied, vocab_size=33000)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    rows = make_rows(40, lambda i: i % 4)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def alone(made):
    for tuning in TUNINGS:
        main(arguments_of(made, tuning, made / f"alone-{tuning}", processes=1))
    return made


def launched(config: str, prepare=prepare_multi_gpu_env) -> dict[str, str]:
    """What `accelerate launch --config_file configs/{config}.yaml` sets in the environment of the processes."""
    argv = ["--config_file", str(ROOT / "configs" / f"{config}.yaml"), "--num_processes", "2", "--main_process_port"]
    arguments = launch_command_parser().parse_args([*argv, "0", "train_gircse.py"])
    arguments = _validate_launch_command(arguments)[0]
    arguments.deepspeed_fields_from_accelerate_config = ""
    made = prepare(arguments)
    made = made[1] if isinstance(made, tuple) else made
    return {name: value for name, value in made.items() if os.environ.get(name) != value}


def run(count: int, script: list[str], folder: Path, **variables: str) -> list[str]:
    """What each of `count` processes of one launch printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    size = str(count)
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, *script],
            env=environment(folder, **variables, **common, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    return outputs_of(processes)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def assert_trained_as_alone(made: Path, config: str, tuning: str) -> None:
    ours, one = made / f"{config}-{tuning}", made / f"alone-{tuning}"
    for line, expected in zip(log_of(ours), log_of(one), strict=True):
        for name in ("loss", "grad_norm", "L_1", "L_2", "L_reg", "log_candidates", "eval_accuracy_k3"):
            if name in expected:
                assert line[name] == pytest.approx(expected[name], rel=1e-3), (tuning, name)
    weights, others = (load_file(folder / "model.safetensors") for folder in (ours, one))
    start = load_file(made / tuning / "model.safetensors")
    assert weights.keys() == others.keys()
    moved = {name: float((others[f"language_model.{name}"] - start[name]).abs().max()) for name in start}
    assert max(moved.values()) > 1e-3
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    files = [sorted(path.name for path in folder.iterdir() if path.suffix != ".png") for folder in (ours, one)]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "fsdp2-checkpointing"])
def test_two_processes_train_as_one(made, alone, config):
    variables = launched(config.partition("-")[0])
    if config.startswith("fsdp2"):
        variables["ACCELERATE_TORCH_DEVICE"] = "cpu"
        variables["FSDP_ACTIVATION_CHECKPOINTING"] = "true" if config.endswith("checkpointing") else "false"
    runs = [arguments_of(made, tuning, made / f"{config}-{tuning}", processes=2) for tuning in TUNINGS]
    for said in run(2, ["-c", SCRIPT, str(ROOT), json.dumps(runs)], made, **variables):
        sharded = json.loads(re.search(r"^sharded: (.*)$", said, re.MULTILINE)[1])
        assert len(sharded) == 2 and all(bool(count) == (config != "ddp") for count in sharded)
    for tuning in TUNINGS:
        assert_trained_as_alone(made, config, tuning)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_deepspeed_trains_as_without_it(made, alone, config, tuning):
    variables = launched(config, prepare_deepspeed_cmd_env) | {"DS_ACCELERATOR": "cpu"}
    argv = arguments_of(made, tuning, made / f"{config}-{tuning}", processes=1)
    if "--sub_batch_size" in argv:  # refused with DeepSpeed, and the gradients are the same without
        at = argv.index("--sub_batch_size")
        del argv[at : at + 2]
    (said,) = run(1, ["-c", SCRIPT, str(ROOT), json.dumps([argv])], made, **variables)
    (sharded,) = json.loads(re.search(r"^sharded: (.*)$", said, re.MULTILINE)[1])
    assert bool(sharded) == (config == "zero3")
    assert_trained_as_alone(made, config, tuning)


def test_fsdp2_configuration():
    variables = launched("fsdp2")
    assert variables["ACCELERATE_USE_FSDP"] == "true" and variables["FSDP_VERSION"] == "2"
    assert variables["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert variables["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert variables["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.parametrize("stage", ["2", "3"])
def test_zero_configurations(stage):
    """What accelerate hands to DeepSpeed."""
    variables = launched(f"zero{stage}", prepare_deepspeed_cmd_env)
    assert variables["ACCELERATE_USE_DEEPSPEED"] == "true" and variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
    assert variables.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false") == str(stage == "3").lower()
    assert variables["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"


def test_every_configuration_names_its_own_command():
    for path in (ROOT / "configs").iterdir():
        assert f"--config_file configs/{path.name} train_gircse.py" in path.read_text(), path.name
