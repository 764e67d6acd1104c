"""Train a GIRCSE embedder with iterative contrastive refinement (ICR), and save or publish it as a Hub repo.

    python train_gircse.py                                     # a few minutes on a laptop: the root model, the sample
    python train_gircse.py --model_name_or_path Qwen/Qwen2.5-0.5B --train_data cfli/bge-full-data --output_dir out

The defaults are the paper's (appendix C): LoRA r 64, alpha 32, 10 % warm-up, temperature 0.02, lambda 1, K = 5, batch
16, one epoch; but for soft tokens at T = 2, the prompt of the backbone's chat template, and the learning rate, for
reasons in docs/training.md. `python train_gircse.py --help` lists everything.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from transformers import HfArgumentParser, PreTrainedModel, set_seed
from transformers.utils import logging

from gircse import ROOT
from gircse.command_line import HelpFormatter, check_writable, lenient_console
from gircse.loading import is_gircse, load, only_gguf_file, prompts_of
from gircse.training.accuracy import accuracy_steps
from gircse.training.arguments import BAD_ROWS, DataArguments, GircseTrainingArguments, ModelArguments
from gircse.training.callbacks import Split
from gircse.training.card import plot_curves, show_neighbours
from gircse.training.data import split_held_out
from gircse.training.pairs import describe, load_pairs, parse_columns
from gircse.training.publishing import ADAPTER_FOLDER, check_saving
from gircse.training.trainer import GircseTrainer

# Unless --held_out says how many pairs are held out: at most HELD_OUT, and as many as have HELD_OUT_SHARE of the texts
# that training embeds, but not fewer than FEWEST_HELD_OUT.
HELD_OUT, HELD_OUT_SHARE, FEWEST_HELD_OUT = 256, 0.05, 8
# What runs when no argument is given. Model and data are at their defaults: the root model, the repo's sample.
SAMPLE_FOLDER = "gircse-sample"
SAMPLE_RUN = (
    f"--output_dir {SAMPLE_FOLDER} --tuning full --held_out 84 --save_strategy no --logging_steps 5 --show_neighbours"
).split()

logger = logging.get_logger("gircse")


def main(argv: Sequence[str] | None = None, make_trainer: Callable[..., GircseTrainer] = GircseTrainer) -> None:
    """The command line. `make_trainer` may be a subclass of [`GircseTrainer`] with a loss of its own."""
    lenient_console()
    arguments, data, training = parse(argv)
    checkpoint = check_output(training)
    set_seed(training.seed)
    if training.disable_tqdm:
        datasets.disable_progress_bars()
        logging.disable_progress_bar()  # transformers' and the Hub's

    model, processor = load_model(arguments)
    check_settings(model, processor, arguments, data, training)
    if data.max_length and data.max_length > processor.max_length:
        processor.max_length = model.text_limit(data.max_length)  # the saved model reads as much as this run
    rows = read_pairs(data, training)
    pairs, held_out = hold_out(rows, data, training, checkpoint)
    if arguments.tuning == "lora":
        model = add_lora(model, arguments)
    check_saving(model, processor, training)
    base_models = [name for name in (arguments.model_name_or_path, arguments.adapter) if name]
    # With --push_to_hub, Trainer makes the Hub repo here, so that a missing permission shows before training.
    trainer = make_trainer(
        model,
        training,
        processor,
        pairs,
        held_out,
        data.max_length,
        base_models=base_models,
        train_data=data.train_data,
        callbacks=[Split(len(rows), len(held_out), training.seed)],
    )

    if len(held_out):
        trainer.evaluate()
    train(trainer, checkpoint)
    if len(held_out):
        trainer.evaluate()
    save(trainer)
    if data.show_neighbours and trainer.is_world_process_zero():
        show_neighbours(training.output_dir, held_out)


def parse(argv: Sequence[str] | None) -> tuple[ModelArguments, DataArguments, GircseTrainingArguments]:
    """The arguments of a command line; without any, those of the run on the sample."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        argv = SAMPLE_RUN
        print(f"No arguments: training the root model on the sample, as\n  python train_gircse.py {' '.join(argv)}\n")
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, GircseTrainingArguments), description=__doc__, formatter_class=HelpFormatter
    )
    return parser.parse_args_into_dataclasses(argv)


def load_model(arguments: ModelArguments) -> tuple[PreTrainedModel, Any]:
    """What training starts from; see `gircse.loading.load`."""
    axes = ("num_steps", "logit_temperature", "step_token", "attention", "pooling")
    names = ("dtype", "attn_implementation", "adapter", "gguf_file", "prompt_template", "suffix", *axes)
    path = arguments.model_name_or_path
    model, processor = load(path, **{name: getattr(arguments, name) for name in names})
    gguf = arguments.gguf_file or only_gguf_file(path)
    if not gguf and is_gircse(path) and (document := prompts_of(path).get("document")):
        logger.warning(f"documents are trained without the model's prompt for them, {document!r}, and saved without it")
    return model, processor


def add_lora(model: PreTrainedModel, arguments: ModelArguments) -> nn.Module:
    """LoRA on every linear layer of the backbone but the LM head (appendix C: r 64, alpha 32); learned step tokens are
    trained as they are."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="all-linear",
        modules_to_save=["learned_tokens"] if model.config.step_token == "learned" else None,
        task_type="FEATURE_EXTRACTION",
    )
    peft_model = get_peft_model(model, config)
    for weight in peft_model.parameters():
        if weight.requires_grad:  # the learned tokens' copy is of the model's dtype, which may lose small updates
            weight.data = weight.data.float()
    peft_model.print_trainable_parameters()
    return peft_model


def read_pairs(data: DataArguments, training: GircseTrainingArguments) -> datasets.Dataset:
    """The rows of the training file; see `gircse.training.pairs.load_pairs`."""
    if training.process_index == 0:
        print(f"Reading {data.train_data}", flush=True)
    pairs = load_pairs(
        data.train_data,
        config=data.data_config,
        split=data.data_split,
        columns=parse_columns(data.columns),
        symmetric_sources=data.symmetric_sources,
        instruction=data.instruction,
        limit=data.limit,
        max_bad_share=data.max_bad_share if data.skip_bad_rows else None,
        bad_rows_file=Path(training.output_dir) / BAD_ROWS,
    )
    if training.process_index == 0:
        print(describe(pairs), flush=True)
    return pairs


def train(trainer: GircseTrainer, checkpoint: str | None) -> None:
    """Trains, from a checkpoint if one is given. One at the end of the run is only loaded: Trainer would take another
    step before it looks."""
    args, there = trainer.args, state_of(checkpoint) if checkpoint else {}
    ends = args.max_steps if args.max_steps > 0 else args.num_train_epochs
    if not checkpoint or there["global_step" if args.max_steps > 0 else "epoch"] < ends:
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    # No epoch to train; of the schedules, some divide by the number of steps.
    changes = {"max_steps": -1, "num_train_epochs": 0, "lr_scheduler_type": "constant"}
    if args.resume_from_checkpoint != "last":  # this one was asked for, be another one the best
        changes["load_best_model_at_end"] = False
    given = {name: getattr(args, name) for name in changes}
    vars(args).update(changes)
    trainer.train(resume_from_checkpoint=checkpoint)
    vars(args).update(given)
    trainer.state.max_steps = args.max_steps  # 0 would say that nothing has been trained yet


def save(trainer: GircseTrainer) -> None:
    """Prints the accuracy, draws the curves, and writes the Hub-ready folder, to the Hub as well with `push_to_hub`."""
    folder, first = trainer.args.output_dir, trainer.is_world_process_zero()
    if first:
        if trainer.scores:
            print(f"\nHeld-out retrieval accuracy ({len(trainer.eval_dataset)} pairs)\n   k  before  after")
            for k, (before, after) in trainer.scores.items():
                print(f"  {k:2d}  {before:6.3f} {after:6.3f}")
        try:
            plot_curves(trainer.state.log_history, Path(folder) / "training_curves.png")
        except Exception as error:  # a picture must not cost the model
            logger.warning(f"the training curves can't be drawn: {type(error).__name__}: {error}")
        print(f"\nSaving to {folder}", flush=True)
    commit = trainer.push_to_hub() if trainer.args.push_to_hub else trainer.export()
    if first:
        print(f"Published: {commit}" if trainer.args.push_to_hub else f"Saved to {folder}")


def check_settings(
    model: PreTrainedModel,
    processor: Any,
    arguments: ModelArguments,
    data: DataArguments,
    training: GircseTrainingArguments,
) -> None:
    """Raises a ValueError for settings that don't go together, before anything is trained."""
    config = model.config
    if config.step_token == "learned" and training.k != config.num_steps:
        raise ValueError(f"k={training.k} would leave some of the model's {config.num_steps} learned tokens untrained")
    if arguments.tuning == "full" and arguments.dtype != "float32":
        raise ValueError(f"dtype={arguments.dtype!r} loses small updates of the weights; with full tuning use float32")
    gguf = arguments.gguf_file or only_gguf_file(arguments.model_name_or_path)
    if training.save_adapter and gguf:
        raise ValueError(f"save_adapter: an adapter can't be loaded beside a GGUF file ({gguf}); leave it out")
    if training.eval_strategy != "no" and data.held_out == 0:
        raise ValueError("eval_strategy needs pairs to evaluate on: held_out must be > 0")
    if wrong := [size for size in training.matryoshka_dims if not 0 < size < config.hidden_size]:
        raise ValueError(f"matryoshka_dims={wrong} must be >= 1 and below the embedding's {config.hidden_size}")
    k = training.k if data.held_out == 0 else max(training.k, *accuracy_steps(config))
    longest = data.max_length or processor.max_length
    most = model.text_limit(longest, k)
    if longest > most:
        steps = "" if config.step_token == "none" else f" less k={k} steps, the most of training and evaluation"
        raise ValueError(f"max_length={longest} exceeds the backbone's positions{steps}: use --max_length {most}")
    folder = Path(training.output_dir).resolve()
    if folder == ROOT:
        raise ValueError(f"output_dir={training.output_dir!r} is this repo itself; choose another folder")
    for name in ("model_name_or_path", "adapter"):
        given = getattr(arguments, name)
        if given and Path(given).resolve() in (folder, folder / ADAPTER_FOLDER):
            raise ValueError(f"output_dir={training.output_dir!r} would overwrite {name}={given!r}; choose another")


def hold_out(
    rows: datasets.Dataset, data: DataArguments, training: GircseTrainingArguments, checkpoint: str | None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out pairs, those of a checkpoint's run if there is one; see `split_held_out`."""
    split = Split.of(checkpoint) if checkpoint else {}
    check_split(split, len(rows), data, training.seed)
    count = split.get("held_out", data.held_out)
    try:
        wanted = held_out_size(len(rows), training) if count is None else count
        pairs, held_out = split_held_out(rows, wanted, training.seed)
    except ValueError:
        if count is not None:
            raise
        # every query has more pairs than would be held out, which nobody asked for
        pairs, held_out = split_held_out(rows, 0, training.seed)
    if not len(held_out) and (training.eval_strategy != "no" or training.eval_on_start):
        raise ValueError(
            f"no pair of {data.train_data} is held out, to evaluate on in training: give a new run --held_out N"
        )
    return pairs, held_out


def check_split(split: dict[str, int], rows: int, data: DataArguments, seed: int) -> None:
    """Raises a ValueError where a run would not go on with the pairs of its checkpoint, `split` of `Split.of`."""
    if rows != split.get("pairs", rows):
        raise ValueError(
            f"train_data={data.train_data!r} has {rows:,} pairs, and the run of this checkpoint read "
            f"{split['pairs']:,}: give it the same ones, or train on from the checkpoint's weights in a new run"
        )
    if data.held_out is not None and data.held_out != split.get("held_out", data.held_out):
        raise ValueError(
            f"held_out={data.held_out}, but the run of this checkpoint held out {split['held_out']} pairs and trained "
            "on the others: leave --held_out away"
        )
    if split.get("seed") not in (None, seed):
        raise ValueError(f"seed={seed} would hold pairs out that the run of this checkpoint has trained on, by {split}")


def held_out_size(rows: int, training: GircseTrainingArguments) -> int:
    """How many of `rows` pairs are held out to measure the accuracy on; a tenth at most. A pair has three texts, and to
    embed one, forward in 20 steps, costs about as much as to train on one, forward and backward in 5 steps: so the
    share of texts is about the share of time."""
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * rows / batch)
    texts = steps * batch * (2 + training.num_negatives)
    most = min(HELD_OUT, max(int(HELD_OUT_SHARE * texts / 3), FEWEST_HELD_OUT))
    return min(most, rows // 10)


def check_output(training: GircseTrainingArguments) -> str | None:
    """The checkpoint to go on from, or None; raises now, not after training, when the folder can't be used."""
    folder = Path(training.output_dir)
    check_writable(training.output_dir)
    checkpoint = last_checkpoint(folder)
    wanted = training.resume_from_checkpoint
    goes_on = wanted and (wanted == "last" or Path(wanted).resolve().parent == folder.resolve())
    if checkpoint and not goes_on:
        raise ValueError(
            f"output_dir={training.output_dir!r} holds {checkpoint.name} of an earlier run: add "
            "--resume_from_checkpoint last to go on with it, or choose another folder"
        )
    if not goes_on and (folder / "config.json").exists() and training.output_dir != SAMPLE_FOLDER:
        raise ValueError(
            f"output_dir={training.output_dir!r} holds a model, which would be overwritten: choose another folder, or "
            "remove it"
        )
    if wanted == "last" and not checkpoint:
        raise ValueError(
            f"resume_from_checkpoint='last', but output_dir={training.output_dir!r} holds no complete checkpoint"
        )
    if wanted:
        found = Path(checkpoint if wanted == "last" else wanted)
        if not found.is_dir():
            raise ValueError(f"resume_from_checkpoint={wanted!r} is no folder: give one of a checkpoint, or 'last'")
        # The optimizer's state is in files, one for each process, or in a folder of DeepSpeed.
        if not any(any(found.glob(name)) for name in ("optimizer*", "global_step*")):
            raise ValueError(
                f"resume_from_checkpoint={wanted!r}: {found.name} holds no optimizer's state, as --save_only_model "
                "leaves it, so that the run would not go on as it was. Train on from its weights in a new run instead"
            )
        if 0 < training.max_steps < state_of(found)["global_step"]:
            raise ValueError(f"resume_from_checkpoint={wanted!r} is beyond max_steps={training.max_steps}: raise that")
    return str(checkpoint) if wanted == "last" else wanted


def state_of(checkpoint: str | Path) -> dict[str, Any]:
    """Trainer's state, among it `global_step` and `epoch`."""
    return json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint. Trainer writes `trainer_state.json` last: a checkpoint that a killed run was
    writing lacks that file, or has half of it."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(re.sub(r"\D", "", p.name) or 0), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
        except (OSError, ValueError):
            logger.warning(f"{path} is not complete, as a run that is killed leaves it: passed over")
    return None


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
