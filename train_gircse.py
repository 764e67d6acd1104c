"""Train a GIRCSE embedder with iterative contrastive refinement (ICR), and save or publish it as a Hub repo.

    python train_gircse.py                                     # a few minutes on a laptop: the root model, the sample
    python train_gircse.py --model_name_or_path Qwen/Qwen2.5-0.5B --train_data cfli/bge-full-data --output_dir out

The defaults are the paper's (appendix C): LoRA r 64, alpha 32, learning rate 1e-5 with 10 % warm-up, temperature 0.02,
lambda 1, K = 5, batch 16, one epoch. `python train_gircse.py --help` lists everything.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

from data_gircse import PairCollator, SourceBatches, TrainingPairs, load_pairs, split_held_out
from losses_gircse import REDUCTIONS, IcrLoss, candidate_mask, icr_loss

ROOT = Path(__file__).resolve().parent
# What goes along with a trained model, beside the code that loads it.
CODE_FILES = ("train_gircse.py", "data_gircse.py", "losses_gircse.py", "requirements.txt", "sample_pairs.jsonl")
ACCURACY_STEPS = (1, 3, 5, 10, 20)
# What runs when no argument is given: the root model on the sample that ships with the repo, which are the defaults.
SAMPLE_RUN = (
    "--output_dir gircse-sample --tuning full --learning_rate 1e-4 --num_train_epochs 4 --num_negatives 2 "
    "--held_out 84 --save_strategy no --logging_steps 5 --show_neighbours"
).split()

logger = logging.get_logger("gircse")


@dataclass
class ModelArguments:
    """Where the model starts from, and which of its weights are trained."""

    model_name_or_path: str = field(
        default=str(ROOT), metadata={"help": "a causal LM or a GIRCSE model: Hub id or folder"}
    )
    adapter: str | None = field(
        default=None, metadata={"help": "a PEFT adapter of the plain causal LM, merged before training"}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "dtype in which the weights are trained", "choices": ["float32", "bfloat16"]},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    tuning: str = field(default="lora", metadata={"help": "lora, or full for all weights", "choices": ["lora", "full"]})
    lora_r: int = 64
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    num_steps: int = field(default=20, metadata={"help": "K at inference, written to a new model's config"})
    logit_temperature: float = field(default=1.0, metadata={"help": "T of the soft tokens, for a new model"})
    step_token: str = field(default="soft", metadata={"help": "soft, hard, learned or none, for a new model"})
    attention: str = field(default="causal", metadata={"help": "causal or bidirectional, for a new model"})
    pooling: str = field(default="mean", metadata={"help": "mean or last, for a new model"})
    prompt_template: str = field(
        default="Instruct: {instruction}\nQuery: ", metadata={"help": "what precedes a text, for a new model"}
    )
    suffix: str = field(default="", metadata={"help": "what follows every text (for Causal-EOS, eos), for a new model"})
    save_dtype: str = field(
        default="float32", metadata={"help": "dtype of the saved weights", "choices": ["float32", "bfloat16"]}
    )


@dataclass
class DataArguments:
    """The pairs; see `data_gircse.load_pairs` for the layouts."""

    train_data: str = field(default=str(ROOT / "sample_pairs.jsonl"), metadata={"help": "file, folder, glob or Hub id"})
    limit: int | None = field(default=None, metadata={"help": "read only the first rows"})
    held_out: int = field(default=256, metadata={"help": "pairs kept from training to measure accuracy on"})
    symmetric_sources: list[str] = field(
        default_factory=list, metadata={"help": "sources whose documents get the instruction too"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "longest text in tokens, the processor's by default"}
    )
    show_neighbours: bool = field(
        default=False, metadata={"help": "at the end, load the saved folder in a new process and search with it"}
    )


@dataclass
class GircseTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the paper's defaults and the ICR objective's settings."""

    output_dir: str = field(default="gircse-trained", metadata={"help": "the Hub-ready folder"})
    learning_rate: float = field(default=1e-5, metadata={"help": "peak learning rate"})
    warmup_ratio: float = field(default=0.1, metadata={"help": "share of the steps with a rising learning rate"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "queries a process and step"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the pairs"})
    report_to: None | str | list[str] = field(default="tensorboard", metadata={"help": "where the log goes besides"})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "no buffer ever changes here"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two lines of the log"})
    k: int = field(default=5, metadata={"help": "K, the generated tokens in training"})
    temperature: float = field(default=0.02, metadata={"help": "tau of InfoNCE"})
    refinement_weight: float = field(default=1.0, metadata={"help": "lambda, the weight of the refinement penalty"})
    reduction: str = field(
        default="sum", metadata={"help": "over the steps' losses: sum (paper) or mean", "choices": list(REDUCTIONS)}
    )
    matryoshka_dims: list[int] = field(
        default_factory=list, metadata={"help": "also train the leading dimensions of these sizes"}
    )
    num_negatives: int = field(default=1, metadata={"help": "hard negatives a query, where there are so many"})
    sub_batch_size: int | None = field(
        default=None, metadata={"help": "gradient caching: texts whose activations are kept at once"}
    )
    mix_sources: bool = field(
        default=False, metadata={"help": "draw batches from all sources together, not one source each"}
    )

    def __post_init__(self) -> None:
        self.remove_unused_columns = False
        # Without this, Trainer refuses bf16 where there is only a CPU.
        accelerated = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
        self.use_cpu = self.use_cpu or not accelerated
        if self.gradient_checkpointing:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False, **(self.gradient_checkpointing_kwargs or {})}
        warmup_steps = self.warmup_steps
        super().__post_init__()
        self.warmup_steps = warmup_steps  # transformers 5.0 puts the ratio there, over an explicit number
        for name, value in (("k", self.k), ("sub_batch_size", self.sub_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be >= 1")

    def get_warmup_steps(self, num_training_steps: int) -> int:
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(num_training_steps * (self.warmup_steps or self.warmup_ratio))


class RandomState:
    """The random state of CPU and GPU at construction; inside `replay()` it holds again (dropout draws the same)."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def replay(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


class LogFile(TrainerCallback):
    """Writes each line of the log to `training_log.jsonl` as it comes; a resumed run goes on from its checkpoint's."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "training_log.jsonl"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.write_text("".join(json.dumps(line) + "\n" for line in state.log_history), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class EpochSetter(TrainerCallback):
    """Tells the data which epoch it is, also after a resume."""

    def __init__(self, dataset: TrainingPairs) -> None:
        self.dataset, self.batches = dataset, None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = int(state.epoch or 0)
        self.dataset.set_epoch(epoch)
        if self.batches is not None:
            self.batches.set_epoch(epoch)


class GircseTrainer(Trainer):
    """`Trainer` whose loss is ICR over queries, positives and hard negatives.

    Args:
        model: a `GircseModel`, or a `PeftModel` around one.
        args: [`GircseTrainingArguments`].
        processor: the `GircseProcessor` that is saved with the model.
        pairs: training rows, as `data_gircse.load_pairs` returns them.
        held_out: rows for the retrieval accuracy that `evaluate` returns.
        max_length: longest text in tokens.
        callbacks: as in `Trainer`.

    With `args.sub_batch_size`, gradients are cached: all texts are embedded without gradients, the loss is
    differentiated with respect to the embeddings, and each sub-batch is embedded again to carry that on to the weights.
    The gradients are those of the whole batch, exactly. Across processes the loss is that of the joint batch.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: GircseTrainingArguments,
        processor: Any,
        pairs: Any,
        held_out: Any = None,
        max_length: int | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process: start one process a GPU, by `accelerate launch`")
        collator = PairCollator(processor, max_length)
        dataset = TrainingPairs(pairs, args.num_negatives, args.seed)
        self._epoch_setter = EpochSetter(dataset)
        super().__init__(
            model,
            args,
            data_collator=collator,
            train_dataset=dataset,
            eval_dataset=held_out,
            processing_class=processor,
            callbacks=[LogFile(args.output_dir), self._epoch_setter, *(callbacks or [])],
        )
        self._metrics: list[dict[str, Tensor]] = []
        self._collapsed_lines, self._warned_of_collapse = 0, False

    # Data

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        batches = SourceBatches(
            self.train_dataset.pairs["source"],
            self.args.per_device_train_batch_size,
            by_source=not self.args.mix_sources,
            seed=self.args.seed,
            num_processes=self.accelerator.num_processes,
        )
        self._epoch_setter.batches = batches
        loader = torch.utils.data.DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate knows token batches only

    # Loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """L_total () of the joint batch of all processes; its gradient is scaled so that averaging the processes'
        gradients, as data parallelism does, gives that of the joint batch."""
        sides = [inputs["query"], inputs["document"]]
        if self.args.sub_batch_size is None:
            queries, documents = (self._embed(model, side) for side in sides)
            total = self._joint_loss(queries, documents, inputs)
            scale = self.accelerator.num_processes
            return _with_value(scale * total, total)
        return self._cached_loss(model, sides, inputs)

    def _embed(self, model: nn.Module, side: dict[str, Tensor]) -> Tensor:
        k = None if self._base_model().config.step_token == "none" else self.args.k
        return model(input_ids=side["input_ids"], attention_mask=side["attention_mask"], k=k).step_embeddings

    def _base_model(self) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _cached_loss(self, model: nn.Module, sides: list[dict[str, Tensor]], inputs: dict[str, Any]) -> Tensor:
        parts = [(side, rows) for side in range(2) for rows in _by_length(sides[side], self.args.sub_batch_size)]

        def part(side: int, rows: Tensor) -> dict[str, Tensor]:
            return {name: sides[side][name][rows] for name in ("input_ids", "attention_mask")}

        leaves: list[Tensor | None] = [None, None]
        states = []
        with torch.no_grad():
            for side, rows in parts:
                states.append(RandomState(rows.device))
                embeddings = self._embed(model, part(side, rows))
                if leaves[side] is None:
                    leaves[side] = embeddings.new_zeros(len(sides[side]["input_ids"]), *embeddings.shape[1:])
                leaves[side][rows] = embeddings
        torch.clear_autocast_cache()  # else older versions of torch go on with these passes' weights, without gradients
        queries, documents = (leaf.requires_grad_() for leaf in leaves)
        total = self._joint_loss(queries, documents, inputs)
        wanted = torch.autograd.grad(self.accelerator.num_processes * total, [queries, documents])

        # Trainer runs the backward pass of what is returned: the last sub-batch's. The others' come before, here.
        accumulation = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        for index, ((side, rows), state) in enumerate(zip(parts, states, strict=True)):
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(model), state.replay():
                embeddings = self._embed(model, part(side, rows))
                surrogate = (embeddings * wanted[side][rows]).sum()
                if not last:
                    self.accelerator.backward(surrogate / accumulation)
        return _with_value(surrogate, total)

    def _joint_loss(self, queries: Tensor, documents: Tensor, inputs: dict[str, Any]) -> Tensor:
        """ICR over the queries (B, K, d) and documents (M, K, d) of all processes; this one's own carry gradients."""
        count = queries.shape[0]
        positives, negatives = (self._gather(x, 0.0) for x in (documents[:count], documents[count:]))
        document_ids, document_labels = (
            torch.cat([self._gather(x[:count], -1), self._gather(x[count:], -1)])
            for x in (inputs["document_ids"], inputs["document_labels"])
        )
        queries, documents = self._gather(queries, 0.0), torch.cat([positives, negatives])
        positive_ids = self._gather(inputs["positive_ids"], -1)
        query_labels = self._gather(inputs["query_labels"], -1)
        candidates = candidate_mask(document_ids, positive_ids, document_labels, query_labels)
        candidates = candidates & (document_ids >= 0)  # padding of processes with fewer negatives
        with torch.autocast(queries.device.type, enabled=False):
            loss = icr_loss(
                queries,
                documents,
                candidates,
                temperature=self.args.temperature,
                refinement_weight=self.args.refinement_weight,
                reduction=self.args.reduction,
                dims=tuple(self.args.matryoshka_dims),
            )
        self._remember(loss, queries.detach(), candidates)
        return loss.total

    def _gather(self, rows: Tensor, fill: float) -> Tensor:
        """The rows of all processes in their order, padded to the same shape; this process' own keep their graph."""
        if self.accelerator.num_processes == 1:
            return rows
        for dim in range(min(rows.dim(), 2)):
            rows = self.accelerator.pad_across_processes(rows, dim=dim, pad_index=fill)
        gathered = list(self.accelerator.gather(rows.detach()).split(rows.shape[0])) if rows.shape[0] else []
        if gathered:
            gathered[self.accelerator.process_index] = rows
        return torch.cat(gathered) if gathered else rows

    # What is logged

    def _remember(self, loss: IcrLoss, queries: Tensor, candidates: Tensor) -> None:
        final = nn.functional.normalize(queries[:, -1].float(), dim=-1)  # (B, d)
        cosines = final @ final.T
        pairs = max(cosines.numel() - len(cosines), 1)
        self._metrics.append(
            {f"L_{k}": value for k, value in enumerate(loss.steps.detach().float(), start=1)}
            | {
                "L_reg": loss.refinement.detach(),
                "mean_cosine": (cosines.sum() - cosines.diagonal().sum()) / pairs,
                "log_candidates": candidates.sum(1).float().log().mean(),
            }
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means since the last line: L_1..L_K, L_reg, the mean off-diagonal cosine of the queries' z_K and the
        log of the number of candidates, which the losses stick at when training collapses."""
        if self._metrics and "loss" in logs:
            for name in self._metrics[0]:
                logs[name] = round(torch.stack([line[name] for line in self._metrics]).mean().item(), 5)
            self._metrics = []
            self._warn_of_collapse(logs)
        super().log(logs, *args, **kwargs)

    def _warn_of_collapse(self, logs: dict[str, float]) -> None:
        steps = [value for name, value in logs.items() if name.startswith("L_") and name != "L_reg"]
        chance = logs["log_candidates"]
        stuck = all(abs(value - chance) < 0.01 * chance for value in steps)
        self._collapsed_lines = self._collapsed_lines + 1 if stuck else 0
        if self._collapsed_lines == 5 and not self._warned_of_collapse and self.is_world_process_zero():
            self._warned_of_collapse = True
            logger.warning(
                "training has collapsed: for 5 lines of the log all step losses are the log of the candidates' number, "
                f"{chance:.3f}, as if all texts were one (mean cosine {logs['mean_cosine']:.3f}). Lower the learning "
                f"rate (now {self.args.learning_rate:g}), warm up longer, or start from a stronger backbone."
            )

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Retrieval accuracy on the held-out pairs at each of ACCURACY_STEPS, from one pass."""
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        batch_size = self.args.per_device_eval_batch_size
        with self.accelerator.autocast():  # as in training, also before Trainer has prepared the model
            accuracy = retrieval_accuracy(self._base_model(), pairs, self.data_collator, batch_size)
        metrics = {f"{metric_key_prefix}_accuracy_k{k}": value for k, value in accuracy.items()}
        if self.state.max_steps:  # before training, TensorBoard (transformers 5) would start in ./runs and stay there
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _with_value(carrier: Tensor, value: Tensor) -> Tensor:
    """A scalar with the gradient of `carrier` and the value of `value`."""
    return carrier - (carrier - value).detach()


def _by_length(side: dict[str, Tensor], size: int) -> list[Tensor]:
    """Row numbers in groups of `size`, texts of like length together, so that a sub-batch has little padding."""
    return list(side["attention_mask"].sum(1).argsort(stable=True).split(size))


@torch.no_grad()
def retrieval_accuracy(model: Any, pairs: Any, collator: PairCollator, batch_size: int = 32) -> dict[int, float]:
    """How often the positive is a query's nearest document, among all positives and one hard negative each of `pairs`
    less false negatives, for each k of ACCURACY_STEPS: {k: share}. One pass gives all k; {1: share} for a model
    without generation."""
    generates = model.config.step_token != "none"
    steps = ACCURACY_STEPS if generates else (1,)
    if model.config.step_token == "learned":
        steps = tuple(k for k in steps if k <= model.config.num_steps)
    rows = TrainingPairs(pairs, num_negatives=1, seed=0)
    batch = collator([rows[i] for i in range(len(rows))])
    was_training = model.training
    model.eval()
    sides = []
    for side in (batch["query"], batch["document"]):
        parts = _by_length(side, batch_size)
        embeddings = [
            model.generate_embedding(
                side["input_ids"][rows].to(model.device),
                side["attention_mask"][rows].to(model.device),
                k=max(steps) if generates else None,
                return_steps=True,
            )
            for rows in parts
        ]
        sides.append(torch.cat(embeddings)[torch.cat(parts).argsort()].cpu())
    model.train(was_training)
    candidates = candidate_mask(
        batch["document_ids"], batch["positive_ids"], batch["document_labels"], batch["query_labels"]
    )
    accuracy = {}
    for k in steps:
        queries, documents = (side[:, k - 1] for side in sides)
        scores = (queries @ documents.T).masked_fill(~candidates, -2.0)
        accuracy[k] = (scores.argmax(1) == torch.arange(len(queries))).float().mean().item()
    return accuracy


def load_model(arguments: ModelArguments) -> tuple[PreTrainedModel, Any]:
    """The model and its processor, from a GIRCSE model or a plain causal LM. The code is this repo's own."""
    model_class = get_class_from_dynamic_module("modeling_gircse.GircseModel", str(ROOT))
    processor_class = get_class_from_dynamic_module("processing_gircse.GircseProcessor", str(ROOT))
    path = arguments.model_name_or_path
    AutoConfig.register("gircse", model_class.config_class, exist_ok=True)  # or loading a tokenizer asks for trust
    name_of_dtype = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    settings: dict[str, Any] = {name_of_dtype: getattr(torch, arguments.dtype)}
    if arguments.attn_implementation:
        settings["attn_implementation"] = arguments.attn_implementation
    if PretrainedConfig.get_config_dict(path)[0].get("model_type") == "gircse":
        if arguments.adapter:
            raise ValueError(f"adapter={arguments.adapter!r} needs a plain causal LM, and {path!r} is a GIRCSE model")
        # Left open, the question whether to trust the folder's code would be put to the user for the tokenizer's sake.
        processor = processor_class.from_pretrained(path, trust_remote_code=False)
        return model_class.from_pretrained(path, **settings), processor
    names = ("num_steps", "logit_temperature", "step_token", "attention", "pooling")
    axes = {name: getattr(arguments, name) for name in names}
    model = model_class.from_causal_lm(path, adapter=arguments.adapter, **axes, **settings)
    processor = processor_class(
        AutoTokenizer.from_pretrained(path), prompt_template=arguments.prompt_template, suffix=arguments.suffix
    )
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    if positions:
        processor.max_length = min(processor.max_length, positions - max(model.config.num_steps, *ACCURACY_STEPS))
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
    peft_model.print_trainable_parameters()
    return peft_model


def export(model: Any, processor: Any, folder: str | Path, card: str, dtype: str = "float32") -> PreTrainedModel:
    """Saves a Hub-ready folder: weights (LoRA merged), tokenizer, configuration, code and model card.

    Raises:
        ValueError: if there is an adapter and it changes nothing.
    """
    folder = Path(folder)
    if hasattr(model, "merge_and_unload"):
        if not any(weight.any() for name, weight in model.named_parameters() if "lora_B" in name):
            raise ValueError("the adapter changes nothing: all of its lora_B weights are zero; has it been trained?")
        model = model.merge_and_unload()
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in CODE_FILES:
        if not (folder / name).exists() or not (folder / name).samefile(ROOT / name):
            shutil.copyfile(ROOT / name, folder / name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return model


def model_card(arguments: ModelArguments, data: DataArguments, training: GircseTrainingArguments, scores: dict) -> str:
    """The card of a trained model, filled from the run."""
    base = arguments.model_name_or_path
    on_hub = not Path(base).exists()
    rows = "\n".join(f"| {k} | {before:.3f} | {after:.3f} |" for k, (before, after) in scores.items())
    metadata = ["library_name: transformers", "pipeline_tag: feature-extraction"]
    metadata += ["tags: [gircse, sentence-similarity, text-embeddings, custom_code]"]
    metadata += [f"base_model: {base}"] if on_hub else []
    metadata += [f"datasets: [{data.train_data}]"] if re.fullmatch(r"[\w.-]+/[\w.-]+", data.train_data) else []
    settings = f"K = {training.k}, temperature {training.temperature}, lambda {training.refinement_weight}, "
    settings += f"reduction {training.reduction}, {arguments.tuning} tuning, learning rate {training.learning_rate:g}, "
    batch = (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.world_size)
    settings += f"batch {' x '.join(map(str, batch))} (queries, accumulation, processes)"
    body = CARD_BODY.format(rows=rows, settings=settings, base=base if on_hub else "a local model")
    return "\n".join(["---", *metadata, "---", body])


CARD_BODY = """
# A GIRCSE embedding model

Generates K soft tokens after a text and averages their last hidden states. Made from {base}.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(".", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
inputs = processor(["how do I renew a card"], instruction="Given a question, retrieve a passage that answers it.")
embeddings = model.generate_embedding(**inputs)  # (1, d), unit norm
```

Held-out retrieval accuracy before and after this training, by the number of generated tokens:

| k | before | after |
|---|---|---|
{rows}

Trained with iterative contrastive refinement: {settings}.
"""


def plot_curves(history: list[dict[str, Any]], path: Path) -> None:
    """The loss and the gradient norm over the steps (the paper's Figures 4 and 5)."""
    try:
        import matplotlib
    except ImportError:
        logger.warning("matplotlib is not installed: no picture of the training curves")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in history if "loss" in line and "L_1" in line]
    if not lines:
        return
    steps = [line["step"] for line in lines]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    names = sorted((n for n in lines[0] if n.startswith("L_") and n != "L_reg"), key=lambda n: int(n[2:]))
    for index, name in enumerate(names):
        shade = pyplot.cm.viridis(0.85 * index / max(len(names) - 1, 1))
        left.plot(steps, [line[name] for line in lines], color=shade, linewidth=1.2, label=f"$L_{{{name[2:]}}}$")
    left.set(xlabel="step", ylabel="contrastive loss of step k")
    left.legend(frameon=False)
    norms = [float(line.get("grad_norm", "nan")) for line in lines]
    right.plot(steps, norms, color="tab:gray", linewidth=1.2)
    right.set(xlabel="step", ylabel="gradient norm (L2)", ylim=(0, None))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


SEARCH = """
import json, sys
from transformers import AutoModel, AutoProcessor
folder, rows = sys.argv[1], json.load(sys.stdin)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
def embed(texts, instructions):
    return model.generate_embedding(**processor(texts, instruction=instructions))
queries = embed([r["query"] for r in rows[:4]], [r["instruction"] for r in rows[:4]])
for row, query in zip(rows, queries):
    same = [r for r in rows if r["source"] == row["source"]]
    documents = embed([r["pos"][0] for r in same], [r["instruction"] if r["symmetric"] else None for r in same])
    print(f"\\n{row['instruction']}\\n  {row['query']}")
    for score, index in zip(*map(list, (query @ documents.T).topk(min(3, len(same))))):
        print(f"    {score:.3f}  {same[index]['pos'][0]}")
"""


def show_neighbours(folder: str, pairs: Any) -> None:
    """Loads `folder` in a new process, as a user would, and prints a few held-out queries with their nearest texts."""
    print(f"\nLoading {folder} in a new process:", flush=True)
    rows = json.dumps([dict(row) for row in pairs])
    subprocess.run([sys.executable, "-c", SEARCH, str(Path(folder).resolve())], input=rows, text=True, check=True)


def check_settings(
    model: PreTrainedModel, arguments: ModelArguments, data: DataArguments, training: GircseTrainingArguments
) -> None:
    """Raises a ValueError for settings that don't go together, before anything is trained."""
    config = model.config
    if config.step_token == "learned" and training.k != config.num_steps:
        raise ValueError(f"k={training.k} would leave some of the model's {config.num_steps} learned tokens untrained")
    if arguments.tuning == "full" and arguments.dtype != "float32":
        raise ValueError(f"dtype={arguments.dtype!r} loses small updates of the weights; with full tuning use float32")
    if training.eval_strategy != "no" and not data.held_out:
        raise ValueError("eval_strategy needs pairs to evaluate on: held_out must be > 0")
    if Path(training.output_dir).resolve() == ROOT:
        raise ValueError(f"output_dir={training.output_dir!r} is this repo itself; choose another folder")
    if training.deepspeed and training.sub_batch_size:
        raise ValueError("sub_batch_size needs several backward passes a step, which DeepSpeed does not take")


def check_output(training: GircseTrainingArguments) -> str | None:
    """The checkpoint to go on from, or None; raises now, not after training, when the folder can't be used."""
    folder = Path(training.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_test"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process of this run may have been quicker
    except OSError as error:
        raise ValueError(f"output_dir={training.output_dir!r} can't be written to ({error}); choose another") from error
    checkpoint = last_checkpoint(folder)
    wanted = training.resume_from_checkpoint
    if checkpoint and not wanted:
        raise ValueError(
            f"output_dir={training.output_dir!r} holds {checkpoint.name} of an earlier run: add "
            "--resume_from_checkpoint last to go on with it, or choose another folder"
        )
    if wanted == "last" and not checkpoint:
        raise ValueError(
            f"resume_from_checkpoint='last', but output_dir={training.output_dir!r} holds no complete checkpoint"
        )
    return str(checkpoint) if wanted == "last" else wanted


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint. `trainer_state.json` is written last, so that one that a killed run was just
    writing lacks it, or has half of it."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(re.sub(r"\D", "", p.name) or 0), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
        except (OSError, ValueError):
            logger.warning(f"{path} is not complete, as a run that is killed leaves it: passed over")
    return None


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        argv = SAMPLE_RUN
        print(f"No arguments: training the root model on the sample, as\n  python train_gircse.py {' '.join(argv)}\n")
    parser = HfArgumentParser((ModelArguments, DataArguments, GircseTrainingArguments))
    arguments, data, training = parser.parse_args_into_dataclasses(argv)
    push, training.push_to_hub = training.push_to_hub, False  # once, at the end, the whole folder
    checkpoint = check_output(training)
    set_seed(training.seed)

    model, processor = load_model(arguments)
    check_settings(model, arguments, data, training)
    pairs = load_pairs(data.train_data, symmetric_sources=data.symmetric_sources, limit=data.limit)
    pairs, held_out = split_held_out(pairs, data.held_out, training.seed)
    if arguments.tuning == "lora":
        model = add_lora(model, arguments)
    trainer = GircseTrainer(model, training, processor, pairs, held_out, data.max_length)
    repo_id = create_hub_repo(training) if push and trainer.is_world_process_zero() else None

    before = trainer.evaluate() if data.held_out else {}
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.evaluate() if data.held_out else {}
    scores = {int(name.rpartition("_k")[2]): (before[name], after[name]) for name in after}

    if trainer.is_world_process_zero():
        if scores:
            print(f"\nHeld-out retrieval accuracy ({len(held_out)} pairs)\n   k  before  after")
            for k, (first, last) in scores.items():
                print(f"  {k:2d}  {first:6.3f} {last:6.3f}")
        card = model_card(arguments, data, training, scores)
        trained = trainer.accelerator.unwrap_model(trainer.model)
        export(trained, processor, training.output_dir, card, arguments.save_dtype)
        plot_curves(trainer.state.log_history, Path(training.output_dir) / "training_curves.png")
        print(f"\nSaved to {training.output_dir}")
        if push:
            publish(training.output_dir, repo_id, training)
        if data.show_neighbours:
            show_neighbours(training.output_dir, held_out)


def create_hub_repo(training: GircseTrainingArguments) -> str:
    """Creates the Hub repo, or finds it, before training, so that a missing permission shows now; returns its id."""
    from huggingface_hub import HfApi

    name = training.hub_model_id or Path(training.output_dir).resolve().name
    return (
        HfApi(token=training.hub_token)
        .create_repo(name, private=bool(training.hub_private_repo), exist_ok=True)
        .repo_id
    )


def publish(folder: str, repo_id: str, training: GircseTrainingArguments) -> None:
    """Uploads weights and code together, in one commit, without checkpoints and logs."""
    from huggingface_hub import HfApi

    commit = HfApi(token=training.hub_token).upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        ignore_patterns=["checkpoint-*", "runs/*", "*.bin", "training_log.jsonl"],
        commit_message="GIRCSE weights and code",
    )
    print(f"Published: {commit}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
