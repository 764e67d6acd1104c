"""The arguments of a training run: each is honoured or refused, and what can't be right is refused before training."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, HfArgumentParser, TrainingArguments

from gircse.training.arguments import WITHOUT_EFFECT, DataArguments, GircseTrainingArguments, ModelArguments
from helpers import make_rows, write_rows
from train_gircse import add_lora, check_settings, load_model, main
from training_helpers import make_trainer, tiny_model

pytestmark = pytest.mark.usefixtures("training_cache")

# Settings


def test_warm_up(processor, tmp_path):
    arguments = GircseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert arguments.get_warmup_steps(100) == 10
    chosen = GircseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", warmup_steps=3)
    assert chosen.get_warmup_steps(100) == 3
    assert [arguments.get_warmup_steps(steps) for steps in (1, 2, 10, 11)] == [0, 1, 1, 2]  # one step alone is a step
    trainer = make_trainer(tiny_model(), processor, tmp_path, make_rows(4), learning_rate=1.0)
    trainer.create_optimizer_and_scheduler(num_training_steps=100)
    rates = []
    for _ in range(20):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[5] == pytest.approx(0.5) and rates.index(max(rates)) == 10 and max(rates) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "setting, reason",
    [
        ({"k": 0}, "must be >= 1"),
        ({"sub_batch_size": 0}, "must be >= 1"),
        ({"sub_batch_size": -1}, "must be >= 1"),
        ({"per_device_train_batch_size": 0}, "must be >= 1"),
        ({"gradient_accumulation_steps": 0}, "must be >= 1"),
        ({"temperature": float("inf")}, "must be > 0, and finite"),
        ({"learning_rate": 0.0}, "must be > 0, and finite"),
        ({"refinement_weight": -1.0}, "must be >= 0, and finite"),
        ({"max_steps": 0}, "nothing would be trained"),
        ({"num_train_epochs": 0}, "nothing would be trained"),
    ],
)
def test_numbers_that_train_nothing_are_refused(tmp_path, setting, reason):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.* {reason}"):
        GircseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **setting)


def test_numbers_of_a_lora_are_above_zero():
    for name in ("lora_r", "lora_alpha"):
        with pytest.raises(ValueError, match=f"{name}=0 must be >= 1"):
            ModelArguments(**{name: 0})


def test_a_metric_that_is_not_measured_is_refused_before_training(processor, tmp_path):
    rows = {"rows": make_rows(4), "held_out": make_rows(4)}
    for name in ("loss", "accuracy_k7"):
        there = "accuracy, accuracy_k1, accuracy_k3, accuracy_k5, accuracy_k10, accuracy_k20"
        with pytest.raises(ValueError, match=f"metric_for_best_model='{name}' is not measured: choose one of {there}$"):
            make_trainer(tiny_model(), processor, tmp_path, **rows, metric_for_best_model=name)
    make_trainer(tiny_model(), processor, tmp_path, **rows, metric_for_best_model="eval_accuracy_k7", k=7)


def test_a_schedule_that_looks_at_the_accuracy_wants_it_to_rise(processor, tmp_path, monkeypatch):
    accuracies = iter([0.2, 0.4, 0.6, 0.8])
    monkeypatch.setattr(
        "gircse.training.trainer.retrieval_accuracy", lambda *args: dict.fromkeys(args[4], next(accuracies))
    )
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}, "eval_steps": 1}
    settings |= {"eval_strategy": "steps", "max_steps": 4, "learning_rate": 1e-4}
    trainer = make_trainer(tiny_model(), processor, tmp_path, make_rows(4), make_rows(6), **settings)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-4


def test_too_few_pairs_for_a_batch_are_refused_before_training(processor, tmp_path):
    with pytest.raises(
        ValueError, match="per_device_train_batch_size 4 x 1 .* needs 4 pairs, but there are 3; lower it"
    ):
        make_trainer(tiny_model(), processor, tmp_path, make_rows(3))


def test_settings_that_the_loss_would_refuse_are_refused_before_training(processor, tmp_path):
    parser = HfArgumentParser((ModelArguments, DataArguments, GircseTrainingArguments))
    shared = f"--output_dir {tmp_path} --use_cpu True --report_to none --max_length 64".split()
    with pytest.raises(ValueError, match="temperature=0.0 must be > 0, and finite"):
        parser.parse_args_into_dataclasses([*shared, "--temperature", "0"])
    for size in ("0", "32"):
        arguments = parser.parse_args_into_dataclasses([*shared, "--matryoshka_dims", "8", size])
        with pytest.raises(ValueError, match=rf"matryoshka_dims=\[{size}\] must be >= 1 and below the embedding's 32"):
            check_settings(tiny_model(), processor, *arguments)


@pytest.mark.parametrize("side", ["rows", "held_out"])
def test_a_prompt_that_leaves_nothing_of_the_texts_is_refused_before_training(processor, tmp_path, side):
    sides = {"rows": make_rows(4), "held_out": make_rows(4)}
    sides[side] = [*make_rows(3), make_rows(1)[0] | {"instruction": "red " * 600}]
    with pytest.raises(ValueError, match="instruction: the prompt .* leaves none for a text"):
        make_trainer(tiny_model(), processor, tmp_path, **sides)


@pytest.mark.parametrize("when", ["--eval_strategy steps --eval_steps 1", "--eval_on_start"])
def test_evaluation_without_pairs_to_evaluate_on_is_refused_before_training(workplace, tmp_path, monkeypatch, when):
    monkeypatch.setattr("train_gircse.GircseTrainer.train", lambda *args, **kwargs: pytest.fail("trained"))
    rows = [row | {"query": "the same"} for row in make_rows(9)]
    argv = f"--model_name_or_path {workplace.folder / 'model'} --use_cpu True --report_to none {when}".split()
    with pytest.raises(ValueError, match="no pair of .*few.jsonl is held out, to evaluate on"):
        main([*argv, "--train_data", write_rows(tmp_path / "few.jsonl", rows), "--output_dir", str(tmp_path / "out")])


def test_one_document_of_all_queries_is_refused(processor, tmp_path):
    rows = [{**row, "pos": ["yes"], "neg": []} for row in make_rows(4)]
    with pytest.raises(ValueError, match="all 4 pairs have the document 'yes': no query can be told from another"):
        make_trainer(tiny_model(), processor, tmp_path, rows)


def test_a_query_alone_with_its_document_is_refused(processor, tmp_path):
    rows = [{**row, "neg": []} for row in make_rows(4)]
    with pytest.raises(ValueError, match="per_device_train_batch_size=1 without hard negatives leaves a query nothing"):
        make_trainer(tiny_model(), processor, tmp_path, rows, per_device_train_batch_size=1)


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
dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
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
        {"dataloader_drop_last": True},
    ],
)
def test_arguments_without_effect_are_refused(tmp_path, setting):
    name = next(iter(setting))
    with pytest.raises(ValueError, match=rf"{name}=.* has no effect here: .*{WITHOUT_EFFECT[name][:20]}"):
        GircseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **setting)
    with pytest.raises(ValueError, match="split_batches"):
        GircseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, accelerator_config={"split_batches": True})


def test_an_output_that_is_no_path_is_refused():
    """And not made a folder that is called `s3:`."""
    with pytest.raises(ValueError, match=r"output_dir='s3://bucket/out' is no path: give one of a disk"):
        GircseTrainingArguments(output_dir="s3://bucket/out", use_cpu=True, report_to="none")


def test_defaults_of_the_command_line_are_refused_nowhere(tmp_path):
    parser = HfArgumentParser(GircseTrainingArguments)
    (training,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "--do_train"])
    assert training.k == 5


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


def test_a_best_model_that_would_not_be_saved_is_refused(tmp_path):
    settings = {"output_dir": str(tmp_path), "load_best_model_at_end": True, "eval_strategy": "steps"}
    with pytest.raises(ValueError, match="save_steps=500 must be eval_steps=10 with load_best_model_at_end"):
        GircseTrainingArguments(**settings)
    GircseTrainingArguments(**settings, eval_steps=100, save_steps=100)
    GircseTrainingArguments(**settings, save_strategy="best")


@pytest.mark.parametrize("length, kept", [("40", 100), ("105", 105), ("120", 108)])
def test_a_longer_text_than_before_is_saved_with_the_model(workplace, tmp_path, length, kept):
    """As far as the backbone's 128 positions leave room for 20 steps at inference; it was 100."""
    more = ["--max_length", length, "--max_steps", "1", "--held_out", "0", "--output_dir", str(tmp_path / "out")]
    main([*workplace.argv, *more])
    assert AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True).max_length == kept


def test_arguments_of_the_data_loader_reach_it(processor, tmp_path):
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3}
    loader = make_trainer(tiny_model(), processor, tmp_path, make_rows(8), **settings).get_train_dataloader()
    assert loader.persistent_workers and loader.prefetch_factor == 3 and loader.num_workers == 1
    seeds = ({"data_seed": 1}, {"data_seed": 1, "seed": 7}, {"data_seed": 2})
    trainers = [make_trainer(tiny_model(), processor, tmp_path, make_rows(40), **seed) for seed in seeds]
    orders = [list(trainer.get_train_dataloader().batch_sampler) for trainer in trainers]
    assert orders[0] == orders[1] != orders[2]


def test_help_of_any_version_of_transformers_is_printed(capsys, monkeypatch):
    """That of 5.2.0 has a bare per cent sign."""
    (field,) = [field for field in dataclasses.fields(GircseTrainingArguments) if field.name == "max_grad_norm"]
    monkeypatch.setattr(field, "metadata", {"help": "100% of it, 5%% more, or %(default)s"})
    with pytest.raises(SystemExit) as status:
        main(["--help"])
    assert status.value.code == 0 and "100% of it, 5% more, or 1.0" in " ".join(capsys.readouterr().out.split())


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
    newer = [part.replace("gradient_check", "activation_check") for part in argv]
    for asked in (argv, newer) if hasattr(GircseTrainingArguments, "activation_checkpointing") else (argv,):
        (training,) = HfArgumentParser(GircseTrainingArguments).parse_args_into_dataclasses(asked)
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):  # 5.24 reads the latter
            assert getattr(training, name, {"use_reentrant": reentrant}) == {"use_reentrant": reentrant}


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


def test_the_learning_rate_is_by_default_that_of_what_is_trained(processor, tmp_path):
    peft_model = add_lora(tiny_model(), ModelArguments())
    for model, settings, expected in (
        (tiny_model(), {}, 5e-5),
        (peft_model, {}, 5e-4),
        (peft_model, {"learning_rate": 0.01}, 0.01),
    ):
        assert make_trainer(model, processor, tmp_path, make_rows(4), **settings).args.learning_rate == expected


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
