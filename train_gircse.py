"""Train a GIRCSE embedder with iterative contrastive refinement (ICR), and save or publish it as a Hub repo.

    python train_gircse.py                                     # a few minutes on a laptop: the root model, the sample
    python train_gircse.py --model_name_or_path Qwen/Qwen2.5-0.5B --train_data cfli/bge-full-data --output_dir out

The defaults are the paper's (appendix C): LoRA r 64, alpha 32, 10 % warm-up, temperature 0.02, lambda 1, K = 5, batch
16, one epoch; but for soft tokens at T = 2, the prompt of the backbone's chat template, and the learning rate, for
reasons in docs/training.md. `python train_gircse.py --help` lists everything.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData, try_to_load_from_cache
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
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
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.integrations import deepspeed
from transformers.utils import logging

from data_gircse import PairCollator, SourceBatches, TrainingPairs, load_pairs, parse_columns, split_held_out
from losses_gircse import REDUCTIONS, IcrLoss, candidate_mask, icr_loss

ROOT = Path(__file__).resolve().parent
# What goes along with a trained model, beside the code that loads it.
CODE_FILES = ["train_gircse.py", "data_gircse.py", "rows_gircse.py", "losses_gircse.py", "sample_pairs.jsonl"]
CODE_FILES += ["requirements.txt", "requirements-train.txt", "sentence_gircse.py", "modules.json", "handler.py"]
CODE_FILES += ["evaluate_gircse.py", "tasks_gircse.py", "report_gircse.py", "requirements-eval.txt"]
CODE_FILES += ["embed_gircse.py", "requirements-embed.txt"]
CODE_FILES += [f"configs/{name}.yaml" for name in ("ddp", "fsdp2", "zero2", "zero3")]
# What others' machines run of a published folder, and when.
REMOTE_CODE = {
    "configuration_gircse.py": "all of them",
    "modeling_gircse.py": "`AutoModel`",
    "step_loop_gircse.py": "`AutoModel`",
    "soft_tokens_gircse.py": "`AutoModel`",
    "backbone_gircse.py": "`AutoModel`",
    "adapters_gircse.py": "`AutoModel`",
    "static_steps_gircse.py": "`AutoModel`",
    "processing_gircse.py": "`AutoProcessor`",
    "sentence_gircse.py": "`SentenceTransformer`",
    "handler.py": "Inference Endpoints",
}
# Stays at home when a folder is published; what an upload removes from the repo if the folder has no such file.
ADAPTER_FOLDER = "adapter"
BAD_ROWS = "bad_rows.jsonl"
NOT_PUBLISHED = ["checkpoint-*", "runs/*", "*.bin", "training_log.jsonl", BAD_ROWS]
REPLACED = ["*.safetensors", "*.safetensors.index.json", "*adapter_config.json"]
ACCURACY_STEPS = (1, 3, 5, 10, 20)
# Measuring accuracy takes at most this share of the texts that training embeds, unless --held_out says how many.
HELD_OUT, HELD_OUT_SHARE, FEWEST_HELD_OUT = 256, 0.05, 8
# Peak learning rates at which a pretrained backbone learns without diverging (docs/training.md).
LORA_RATE, FULL_RATE = 2e-4, 5e-5
# What the paper puts before a text (appendix C), and what stands for the text in it.
PAPER_PROMPT, TEXT = "Instruct: {instruction}\nQuery: ", "{text}"
# Sub-batches that go together in gradient caching's first pass, which keeps no activations.
WIDER_WITHOUT_GRADIENTS = 4
# What a text of --per_device_eval_batch_size stands for: that many of them are a batch of more texts that are shorter.
TOKENS_OF_A_TEXT = 512
OF_EVALUATION = "held-out pairs are evaluated by retrieval accuracy alone"
OF_BATCHES = "batches are of one source each, in random order; --mix_sources mixes the sources"
OF_TOKENS = "a step embeds two sets of texts, whose tokens Trainer can't count"
# Arguments of `TrainingArguments` that nothing here would act on, and why. All others hold as Trainer has them.
WITHOUT_EFFECT = {
    "average_tokens_across_devices": "the loss is that of the joint batch of all processes",
    "batch_eval_metrics": OF_EVALUATION,
    "bf16_full_eval": OF_EVALUATION,
    "do_predict": "evaluate_gircse.py scores a saved model",
    "eval_accumulation_steps": OF_EVALUATION,
    "eval_do_concat_batches": OF_EVALUATION,
    "eval_use_gather_object": OF_EVALUATION,
    "fp16_full_eval": OF_EVALUATION,
    "group_by_length": OF_BATCHES,
    "hub_always_push": "the finished folder is uploaded, and no checkpoint",
    "include_for_metrics": OF_EVALUATION,
    "include_inputs_for_metrics": OF_EVALUATION,
    "include_num_input_tokens_seen": OF_TOKENS,
    "include_tokens_per_second": OF_TOKENS,
    "jit_mode_eval": OF_EVALUATION,
    "label_names": "the columns of pairs are fixed; --columns maps others to them",
    "label_smoothing_factor": "InfoNCE has no labels to smooth; a higher --temperature softens it",
    "length_column_name": OF_BATCHES,
    "liger_kernel_config": "its kernels are for causal LMs with labels",
    "overwrite_output_dir": "nothing of an earlier run is removed; choose another folder, or remove it yourself",
    "parallelism_config": "layers are not split over processes; use configs/fsdp2.yaml or configs/zero3.yaml",
    "past_index": OF_EVALUATION,
    "prediction_loss_only": OF_EVALUATION,
    "train_sampling_strategy": OF_BATCHES,
    "use_cache": "the step loop has a KV cache of its own",
    "use_legacy_prediction_loop": OF_EVALUATION,
    "use_liger_kernel": "its kernels are for causal LMs with labels",
}
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
    gguf_file: str | None = field(
        default=None, metadata={"help": "the file to take of a repo in GGUF; the one that there is in a folder"}
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
    logit_temperature: float = field(
        default=2.0, metadata={"help": "T of the soft tokens, for a new model; the paper's 1 makes gradients explode"}
    )
    step_token: str = field(default="soft", metadata={"help": "soft, hard, learned or none, for a new model"})
    attention: str = field(default="causal", metadata={"help": "causal or bidirectional, for a new model"})
    pooling: str = field(default="mean", metadata={"help": "mean or last, for a new model"})
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "what precedes a text, for a new model: the backbone's chat template with the paper's prompt"
        },
    )
    suffix: str | None = field(
        default=None,
        metadata={
            "help": "what follows every text, for a new model: as in the chat template; '' beside --prompt_template"
        },
    )

    def __post_init__(self) -> None:
        for name in ("prompt_template", "suffix"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, unescape(value))


def unescape(text: str) -> str:
    r"""Text of a command line: a shell's quotes leave `\n` as two characters, which stand for a line break (`\t` for a
    tab, `\\` for one backslash)."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], "\\"), text)


@dataclass
class DataArguments:
    """The pairs; see `data_gircse.load_pairs` for the layouts."""

    train_data: str = field(default=str(ROOT / "sample_pairs.jsonl"), metadata={"help": "file, folder, glob or Hub id"})
    data_config: str | None = field(default=None, metadata={"help": "of a Hub data set that has several"})
    columns: list[str] = field(
        default_factory=list,
        metadata={"help": "what the file calls columns, such as query=question pos=answer neg=wrong_1,wrong_2"},
    )
    limit: int | None = field(default=None, metadata={"help": "read only the first rows"})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": f"leave rows with errors out, and list them in {BAD_ROWS} of the output"}
    )
    max_bad_share: float = field(default=0.01, metadata={"help": "the most of them, as a share of all rows"})
    held_out: int | None = field(
        default=None,
        metadata={
            "help": "pairs kept from training to measure accuracy on: as many as take 5 % of its time, up to 256"
        },
    )
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
    learning_rate: float | None = field(
        default=None, metadata={"help": f"peak learning rate: {LORA_RATE:g} of a LoRA, {FULL_RATE:g} of all weights"}
    )
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
    save_dtype: str = field(
        default="float32", metadata={"help": "dtype of the saved weights", "choices": ["float32", "bfloat16"]}
    )
    save_adapter: bool = field(
        default=False, metadata={"help": "save the LoRA alone, which loads as the whole model does, not merged weights"}
    )
    hub_strategy: str = field(default="end", metadata={"help": "end: the finished folder; no checkpoint is uploaded"})

    def __post_init__(self) -> None:
        self.remove_unused_columns = False
        self._check_inherited()
        if self.disable_tqdm is None and not sys.stderr.isatty():
            self.disable_tqdm = True  # bars fill a log that is no terminal; the lines of the log stay
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "accuracy"  # at the trained k; Trainer's own default is a loss
        # Without this, Trainer refuses bf16 where there is only a CPU.
        accelerated = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
        self.use_cpu = self.use_cpu or not accelerated
        warmup_steps = self.warmup_steps
        super().__post_init__()  # which also reads a command line's JSON
        if self.gradient_checkpointing:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False, **(self.gradient_checkpointing_kwargs or {})}
        self.warmup_steps = warmup_steps  # transformers 5.0 puts the ratio there, over an explicit number
        for name, value in (("k", self.k), ("sub_batch_size", self.sub_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be >= 1")
        if self.hub_strategy != "end":
            raise ValueError(
                f"hub_strategy={self.hub_strategy.value!r} uploads checkpoints, which don't load: use 'end'"
            )
        if self.accelerator_config.split_batches or self.accelerator_config.dispatch_batches:
            raise ValueError("accelerator_config: split_batches and dispatch_batches would cut contrastive batches up")

    def _check_inherited(self) -> None:
        """Raises a ValueError for an argument of `TrainingArguments` that would have no effect."""
        for base in fields(TrainingArguments):
            value, default = getattr(self, base.name, None), base.default
            if base.default_factory is not MISSING:
                default = base.default_factory()
            if base.name in WITHOUT_EFFECT and value and value not in (default, "no"):
                raise ValueError(
                    f"{base.name}={value!r} has no effect here: {WITHOUT_EFFECT[base.name]}. Leave it at {default!r}"
                )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(num_training_steps * (self.warmup_steps or self.warmup_ratio))


class RandomState:
    """The random state of CPU and accelerator at construction; inside `replay()` it holds again (dropout draws the
    same)."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [] if device.type == "cpu" else [device]
        self.type, self.module = device.type, torch.get_device_module(device)
        self.states = self._now()

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(self.module.get_rng_state(device) for device in self.devices)]

    def restore(self) -> None:
        cpu, *others = self.states
        torch.set_rng_state(cpu)
        for device, state in zip(self.devices, others, strict=True):
            self.module.set_rng_state(state, device)

    def holds(self) -> bool:
        """Whether no random number has been drawn since."""
        return all(map(torch.equal, self.states, self._now()))

    @contextmanager
    def replay(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices, device_type=self.type):
            self.restore()
            yield


@contextmanager
def whole_weights() -> Iterator[None]:
    """Models made inside have all of their weights. With ZeRO-3, transformers would make them in empty shards, whatever
    `zero3_init_flag` says, which can be neither checked nor evaluated nor filled before training shards them itself."""
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    config = deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)


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


class Watch:
    """Tells once, and early, that a run learns nothing, from the lines of its log."""

    COLLAPSED, DIVERGING = 5, 3  # lines in a row that it takes
    STEPS = 20  # and the steps, as single ones say little
    GROWTH = 30  # of the gradient norm over the least so far; sources differ by less
    ONE_DIRECTION = 0.99  # mean cosine between texts; pretrained backbones start below

    def __init__(self) -> None:
        self.collapsed, self.diverging = 0, []  # lines, and the steps of lines
        self.least_loss = self.least_norm = math.inf
        self.told = False

    def see(
        self, step: int, losses: Sequence[float], chance: float, norm: float, cosine: float, warm: bool
    ) -> str | None:
        """What is wrong, if that has just become clear.

        Args:
            step: of the line.
            losses: L_1..L_K.
            chance: the log of the number of candidates, the loss of a model that takes all texts for one.
            norm: the gradient norm before clipping, or NaN.
            cosine: the mean one between the queries' embeddings.
            warm: whether the warm-up is over, before which losses may start above chance.
        """
        loss = sum(losses) / len(losses)
        grown = norm > self.GROWTH * self.least_norm
        lost = not math.isfinite(loss) or (warm and loss > 1.01 * chance and loss > 0.98 * self.least_loss)
        alike = cosine > self.ONE_DIRECTION or all(abs(x - chance) < 0.01 * chance for x in losses)
        self.collapsed = self.collapsed + 1 if alike else 0
        self.diverging = [*self.diverging, step] if grown or lost else []
        self.least_loss, self.least_norm = min(loss, self.least_loss), min(norm, self.least_norm)
        if self.told:
            return None
        if self.collapsed >= self.COLLAPSED:
            self.told = True
            return f"has collapsed: for {self.collapsed} lines of the log all texts are as one"
        if len(self.diverging) >= self.DIVERGING and step - self.diverging[0] >= self.STEPS:
            self.told = True
            what = "the gradient explodes" if grown else "the losses are worse than by chance and don't fall"
            return f"diverges: since step {self.diverging[0]} {what}"
        return None


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
        base_models: what the weights come from, and `train_data`: the pairs' name, for the card; Hub ids, or paths,
            which the card doesn't tell.

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
        base_models: Sequence[str] = (),
        train_data: str = "",
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process: start one process a GPU, by `accelerate launch`")
        if args.save_adapter:
            check_adapter(model, base_models, args.push_to_hub)
        if args.learning_rate is None:
            args.learning_rate = LORA_RATE if hasattr(model, "get_base_model") else FULL_RATE
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
        if self.is_deepspeed_enabled and (args.sub_batch_size or args.auto_find_batch_size):
            raise ValueError(
                "sub_batch_size, which auto_find_batch_size lowers, needs several backward passes a step, of which "
                "DeepSpeed takes but one: leave both out"
            )
        self.base_models, self.train_data = list(base_models), train_data
        self.scores: dict[int, tuple[float, float]] = {}  # k: the accuracy before training, and the last one measured
        self._draws_numbers = False  # whether a forward pass does, as with dropout
        self._metrics: list[dict[str, Tensor]] = []
        self._watch = Watch()

    # Data

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        batches = SourceBatches(
            self.train_dataset.pairs["source"],
            self.args.per_device_train_batch_size,
            by_source=not self.args.mix_sources,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            num_processes=self.accelerator.num_processes,
        )
        self._epoch_setter.batches = batches
        # Of these, older versions of transformers and torch lack some, so that defaults are left to torch.
        names = ("persistent_workers", "prefetch_factor", "multiprocessing_context")
        options = {name: value for name in names if (value := getattr(self.args, f"dataloader_{name}", None))}
        if not getattr(self.args, "dataloader_in_order", True):
            options["in_order"] = False
        loader = torch.utils.data.DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            **options,
        )
        return self.accelerator.prepare(loader)

    @property
    def _sub_batch_size(self) -> int | None:
        """Texts whose activations are kept at once; None for all. With `auto_find_batch_size`, Trainer lowers its batch
        size and starts again when memory runs out: here that is the size of the sub-batches, and the contrastive batch,
        which the result depends on, stays as it is."""
        if self._train_batch_size == self.args.per_device_train_batch_size:
            return self.args.sub_batch_size
        return min(self._train_batch_size, self.args.sub_batch_size or self._train_batch_size)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate knows token batches only

    # Loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """L_total () of the joint batch of all processes; its gradient is scaled so that averaging the processes'
        gradients, as data parallelism does, gives that of the joint batch."""
        sides = [inputs["query"], inputs["document"]]
        if self._sub_batch_size is None:
            queries, documents = self._embed_both(model, sides)
            total = self._joint_loss(queries, documents, inputs)
            scale = self.accelerator.num_processes
            return _with_value(scale * total, total)
        return self._cached_loss(model, sides, inputs)

    def _embed(self, model: nn.Module, side: dict[str, Tensor]) -> Tensor:
        k = None if self._base_model().config.step_token == "none" else self.args.k
        return model(input_ids=side["input_ids"], attention_mask=side["attention_mask"], k=k).step_embeddings

    def _embed_both(self, model: nn.Module, sides: list[dict[str, Tensor]]) -> Sequence[Tensor]:
        """Queries and documents, in one pass on a CPU, where the model prefills rows of like length together by itself:
        each step then reads the weights once, not twice. Elsewhere, queries would be padded as documents are."""
        loop = self._base_model().config.step_token in ("soft", "hard") and not self.args.gradient_checkpointing
        if not loop or self.args.device.type != "cpu" or self.accelerator.num_processes > 1:
            return [self._embed(model, side) for side in sides]
        longest = max(side["input_ids"].shape[1] for side in sides)
        joint = {
            name: torch.cat([nn.functional.pad(side[name], (0, longest - side[name].shape[1])) for side in sides])
            for name in ("input_ids", "attention_mask")
        }
        return self._embed(model, joint).split([len(side["input_ids"]) for side in sides])

    def _base_model(self) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _cached_loss(self, model: nn.Module, sides: list[dict[str, Tensor]], inputs: dict[str, Any]) -> Tensor:
        size = self._sub_batch_size
        own, start = _parts(sides, size), RandomState(inputs["positive_ids"].device)
        parts = self._even(own)
        if not self._draws_numbers:
            # Without activations to keep, several sub-batches fit at once.
            leaves, _ = self._embed_parts(model, sides, self._even(_parts(sides, WIDER_WITHOUT_GRADIENTS * size)))
            self._draws_numbers = not start.holds()
            states = [start] * len(parts)
        if self._draws_numbers:  # dropout has to draw the same in both passes, and so for the same texts together
            start.restore()
            leaves, states = self._embed_parts(model, sides, parts)
        torch.clear_autocast_cache()  # else older versions of torch go on with these passes' weights, without gradients
        queries, documents = (leaf.requires_grad_() for leaf in leaves)
        total = self._joint_loss(queries, documents, inputs)
        wanted = torch.autograd.grad(self.accelerator.num_processes * total, [queries, documents])

        # Trainer runs the backward pass of what is returned: the last sub-batch's. The others' come before, here.
        accumulation = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        for index, ((side, rows), state) in enumerate(zip(parts, states, strict=True)):
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(model), state.replay():
                embeddings = self._embed(model, _rows(sides[side], rows))
                surrogate = (embeddings * wanted[side][rows]).sum() * (index < len(own))
                if not last:
                    self.accelerator.backward(surrogate / accumulation)
        return _with_value(surrogate, total)

    def _even(self, parts: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
        """As many sub-batches on all processes, a text repeated where need be: sharded weights are gathered for each
        pass, by all processes together."""
        if not self.is_fsdp_enabled:
            return parts
        most = int(self.accelerator.gather(torch.tensor([len(parts)], device=self.accelerator.device)).max())
        side, rows = parts[0]
        return parts + [(side, rows[:1])] * (most - len(parts))

    @torch.no_grad()
    def _embed_parts(
        self, model: nn.Module, sides: list[dict[str, Tensor]], parts: list[tuple[int, Tensor]]
    ) -> tuple[list[Tensor], list[RandomState]]:
        """The embeddings of queries and documents, (B, K, d) and (M, K, d), and the random state before each part."""
        embeddings: list[Tensor | None] = [None, None]
        states = []
        for side, rows in parts:
            states.append(RandomState(rows.device))
            _place(embeddings, side, rows, self._embed(model, _rows(sides[side], rows)), len(sides[side]["input_ids"]))
        return embeddings, states

    def _joint_loss(self, queries: Tensor, documents: Tensor, inputs: dict[str, Any]) -> Tensor:
        """ICR over the queries (B, K, d) and documents (M, K, d) of all processes; this one's own carry gradients."""
        count = queries.shape[0]
        positives, negatives = (self._gather(x, 0.0) for x in (documents[:count], documents[count:]))
        document_ids, document_labels, prompted_ids = (
            torch.cat([self._gather(inputs[name][:count], -1), self._gather(inputs[name][count:], -1)])
            for name in ("document_ids", "document_labels", "prompted_ids")
        )
        queries, documents = self._gather(queries, 0.0), torch.cat([positives, negatives])
        positive_ids = self._gather(inputs["positive_ids"], -1)
        query_labels, query_ids = (self._gather(inputs[name], -1) for name in ("query_labels", "query_ids"))
        candidates = candidate_mask(document_ids, positive_ids, document_labels, query_labels, query_ids, prompted_ids)
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
            self._warn_of_trouble(logs)
        super().log(logs, *args, **kwargs)

    def _warn_of_trouble(self, logs: dict[str, float]) -> None:
        losses = [value for name, value in logs.items() if name.startswith("L_") and name != "L_reg"]
        step, chance = self.state.global_step, logs["log_candidates"]
        norm = float(logs.get("grad_norm", math.nan))  # transformers 4 logs none when it clips none
        warm = step > self.args.get_warmup_steps(self.state.max_steps)
        trouble = self._watch.see(step, losses, chance, norm, logs["mean_cosine"], warm)
        if trouble and self.is_world_process_zero():
            facts = f"losses {losses[0]:.2f} to {losses[-1]:.2f}, {chance:.2f} by chance; gradient norm {norm:.0f}"
            remedies = f"Lower the learning rate (now {self.args.learning_rate:g}), warm up longer"
            if "diverges" in trouble and self._base_model().config.step_token == "soft" and len(losses) > 1:
                remedies += ", damp the gradient through the soft tokens (--logit_temperature 2 for a new model)"
            logger.warning(
                f"training {trouble} ({facts} before clipping; mean cosine {logs['mean_cosine']:.3f}). {remedies}, or "
                "start from a stronger backbone."
            )

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Retrieval accuracy on the held-out pairs, from one pass: `eval_accuracy` at the trained k, and
        `eval_accuracy_k1`, ... at this and each of ACCURACY_STEPS."""
        pairs = self.eval_dataset if eval_dataset is None else eval_dataset
        config = self._base_model().config
        trained = 1 if config.step_token == "none" else self.args.k
        steps = sorted({*accuracy_steps(config), trained})
        bar = not self.args.disable_tqdm if self.is_world_process_zero() else None
        with self._on_device(), self.accelerator.autocast():  # as in training, also before Trainer prepares the model
            accuracy = retrieval_accuracy(
                self.model, pairs, self.data_collator, self.args.per_device_eval_batch_size, steps, bar
            )
        for k, value in accuracy.items():
            before = self.scores.get(k, (math.nan,))[0] if self.state.global_step else value
            self.scores[k] = (before, value)
        metrics = {f"{metric_key_prefix}_accuracy_k{k}": value for k, value in accuracy.items()}
        metrics[f"{metric_key_prefix}_accuracy"] = accuracy[trained]
        if self.state.max_steps:  # before training, TensorBoard (transformers 5) would start in ./runs and stay there
            self.log(dict(metrics))
        elif self.is_world_process_zero():
            found = ", ".join(f"{value:.3f} at k = {k}" for k, value in accuracy.items())
            print(f"Held-out accuracy before training ({len(pairs)} pairs): {found}", flush=True)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """With FSDP and DeepSpeed, Trainer leaves the model on the CPU until training shards it."""
        moves = not self.state.max_steps and self.model.device.type != self.args.device.type
        if moves:
            self.model.to(self.args.device)
        try:
            yield
        finally:
            if moves:
                self.model.to("cpu")

    # Publishing

    def export(self) -> None:
        """Writes the Hub-ready folder to `args.output_dir`: see [`export`], and the card. Called by all processes.

        Raises:
            ValueError: if there is an adapter and it changes nothing.
        """
        model = self._whole_model()
        if self.is_world_process_zero():
            adapter_of = self.base_models[0] if self.args.save_adapter else None
            export(model, self.processing_class, self.args.output_dir, self.args.save_dtype, adapter_of)
            self._write_card()

    def push_to_hub(
        self,
        commit_message: str = "GIRCSE weights and code",
        *,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        """Writes the Hub-ready folder and uploads it to `args.hub_model_id`, which is created if need be: all in one
        commit, which a second one writes into the card, as the pinned load. Called by all processes.

        Args:
            commit_message: of the first commit.
            token: in place of `args.hub_token`.
            revision: the branch, that of `args.hub_revision` or the main one by default.

        Returns:
            The `CommitInfo` of the first commit; None on other processes than the first.
        """
        if self.args.save_adapter:
            check_adapter(self.accelerator.unwrap_model(self.model), self.base_models, publishes=True)
        if hasattr(self.callback_handler, "on_push_begin"):  # not in transformers 4.51
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        revision = revision or getattr(self.args, "hub_revision", None)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.export()
        if not self.is_world_process_zero():
            return None
        api, where = HfApi(token=token), {"repo_id": self.hub_model_id, "revision": revision}
        self._write_card("COMMIT")
        commit = api.upload_folder(
            folder_path=self.args.output_dir,
            ignore_patterns=NOT_PUBLISHED,
            delete_patterns=REPLACED,
            commit_message=commit_message,
            **where,
        )
        card = self._write_card(commit.oid)
        api.upload_file(
            path_or_fileobj=card, path_in_repo=card.name, commit_message="The card shows the pinned load", **where
        )
        return commit

    @whole_weights()
    def _whole_model(self) -> nn.Module | None:
        """A copy of the model, as training may go on, on the first process. Sharded weights come from all of them."""
        model, base = self.accelerator.unwrap_model(self.model), self._base_model()
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return _copy_on_cpu(model) if self.is_world_process_zero() else None
        weights = self.accelerator.get_state_dict(self.model_wrapped)
        if not self.is_world_process_zero():
            return None
        whole = type(base)(copy.deepcopy(base.config))
        if model is not base:
            from peft import get_peft_model

            whole = get_peft_model(whole, copy.deepcopy(model.active_peft_config))
        whole.float().load_state_dict(weights)
        return whole

    def _write_card(self, commit: str | None = None) -> Path:
        folder = Path(self.args.output_dir)
        repo_id = None if commit is None else self.hub_model_id
        text = model_card(folder, self.args, self.base_models, self.train_data, self.scores, repo_id, commit)
        (folder / "README.md").write_text(text, encoding="utf-8")
        return folder / "README.md"


def _copy_on_cpu(model: nn.Module) -> nn.Module:
    """A copy, for which there may be no room beside model and optimizer on the accelerator."""
    copies: dict[int, Tensor] = {id(x): x.detach().to("cpu", copy=True) for x in model.buffers()}
    for weight in model.parameters():
        copies[id(weight)] = nn.Parameter(weight.detach().to("cpu", copy=True), weight.requires_grad)
    return copy.deepcopy(model, copies)


def _with_value(carrier: Tensor, value: Tensor) -> Tensor:
    """A scalar with the gradient of `carrier` and the value of `value`."""
    return carrier - (carrier - value).detach()


def _rows(side: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: side[name][rows] for name in ("input_ids", "attention_mask")}


def _parts(sides: list[dict[str, Tensor]], size: int) -> list[tuple[int, Tensor]]:
    """Sub-batches of up to `size` texts of one side: (side, row numbers)."""
    return [(side, rows) for side in range(2) for rows in _by_length(sides[side], size)]


def _place(embeddings: list[Tensor | None], side: int, rows: Tensor, found: Tensor, count: int) -> None:
    """Puts a sub-batch's embeddings (b, K, d) at their rows of the side's (count, K, d)."""
    if embeddings[side] is None:
        embeddings[side] = found.new_zeros(count, *found.shape[1:])
    embeddings[side][rows] = found


def _by_length(side: dict[str, Tensor], size: int) -> list[Tensor]:
    """Row numbers in groups of `size`, texts of like length together, so that a sub-batch has little padding."""
    return list(side["attention_mask"].sum(1).argsort(stable=True).split(size))


def _by_tokens(side: dict[str, Tensor], size: int) -> list[Tensor]:
    """Row numbers in batches of like length that have no more tokens than `size` texts of TOKENS_OF_A_TEXT, and no more
    than 16 `size` texts."""
    lengths = side["attention_mask"].sum(1)
    batches: list[list[int]] = [[]]
    for row in lengths.argsort(stable=True).tolist():  # each is the longest of its batch so far
        count = len(batches[-1]) + 1
        if count > 1 and (count * lengths[row] > TOKENS_OF_A_TEXT * size or count > 16 * size):
            batches.append([])
        batches[-1].append(row)
    return [torch.tensor(batch) for batch in batches]


@torch.no_grad()
def retrieval_accuracy(
    model: Any,
    pairs: Any,
    collator: PairCollator,
    batch_size: int = 32,
    steps: Sequence[int] | None = None,
    bar: bool | None = None,
) -> dict[int, float]:
    """How often the positive is a query's nearest document, among all positives and one hard negative each of `pairs`
    less false negatives, for each k of `steps` (`accuracy_steps` by default): {k: share}. One pass gives all k; {1:
    share} for a model without generation. Its progress is shown by a bar, or one line for `bar=False`."""
    generates, steps = model.config.step_token != "none", steps or accuracy_steps(model.config)
    rows = TrainingPairs(pairs, num_negatives=1, seed=0)
    batch = collator([rows[i] for i in range(len(rows))])
    was_training = model.training
    model.eval()
    sides = batch["query"], batch["document"]
    parts = [(side, rows) for side in range(2) for rows in _by_tokens(sides[side], batch_size)]
    embeddings: list[Tensor | None] = [None, None]
    if bar is False:
        print(f"Measuring held-out accuracy, {len(parts)} batches", flush=True)
    for side, part in tqdm(parts, desc="held-out accuracy", leave=False, disable=not bar):
        inputs = {name: value.to(model.device) for name, value in _rows(sides[side], part).items()}
        found = model(**inputs, k=max(steps) if generates else None).step_embeddings.cpu()
        _place(embeddings, side, part, found, len(sides[side]["input_ids"]))
    model.train(was_training)
    ids = ("document_ids", "positive_ids", "document_labels", "query_labels", "query_ids", "prompted_ids")
    candidates = candidate_mask(*(batch[name] for name in ids))
    accuracy = {}
    for k in steps:
        queries, documents = (side[:, k - 1] for side in embeddings)
        scores = (queries @ documents.T).masked_fill(~candidates, -2.0)
        accuracy[k] = (scores.argmax(1) == torch.arange(len(queries))).float().mean().item()
    return accuracy


def accuracy_steps(config: PretrainedConfig) -> tuple[int, ...]:
    """The k's at which accuracy is measured."""
    if config.step_token == "none":
        return (1,)
    return tuple(k for k in ACCURACY_STEPS if config.step_token != "learned" or k <= config.num_steps)


@whole_weights()
def load_model(arguments: ModelArguments) -> tuple[PreTrainedModel, Any]:
    """The model and its processor, from a GIRCSE model or a plain causal LM. The code is this repo's own.

    Raises:
        ValueError: if the arguments don't go together, the folder is none of these, or the backbone is refused.
    """
    model_class = get_class_from_dynamic_module("modeling_gircse.GircseModel", str(ROOT))
    processor_class = get_class_from_dynamic_module("processing_gircse.GircseProcessor", str(ROOT))
    path = arguments.model_name_or_path
    AutoConfig.register("gircse", model_class.config_class, exist_ok=True)  # or loading a tokenizer asks for trust
    settings: dict[str, Any] = {"dtype": getattr(torch, arguments.dtype)}
    if arguments.attn_implementation:
        settings["attn_implementation"] = arguments.attn_implementation
    gguf = {"gguf_file": name} if (name := arguments.gguf_file or _only_gguf_file(path)) else {}
    if not gguf and _is_gircse(path):
        if arguments.adapter:
            raise ValueError(f"adapter={arguments.adapter!r} needs a plain causal LM, and {path!r} is a GIRCSE model")
        # Left open, the question whether to trust the folder's code would be put to the user for the tokenizer's sake.
        processor = processor_class.from_pretrained(path, trust_remote_code=False)
        return model_class.from_pretrained(path, **settings), processor
    names = ("num_steps", "logit_temperature", "step_token", "attention", "pooling")
    axes = {name: getattr(arguments, name) for name in names}
    model = model_class.from_causal_lm(path, adapter=arguments.adapter, **axes, **settings, **gguf)

    def make_processor(**options: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(path, **gguf, **options)
        template, suffix = arguments.prompt_template, arguments.suffix
        if template is None and suffix is None:
            template, suffix = chat_prompt(tokenizer)
        return processor_class(tokenizer, prompt_template=template or PAPER_PROMPT, suffix=suffix or "")

    processor = make_processor()
    if _saving_problem(processor):  # beside the mistral-common package, Mistral's repos load as its own tokenizer
        processor = make_processor(mistral_format=False)
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    if positions:
        processor.max_length = min(processor.max_length, positions - max(model.config.num_steps, *ACCURACY_STEPS))
    return model, processor


def chat_prompt(tokenizer: Any) -> tuple[str, str]:
    """What precedes and what follows a text, so that both are one user's turn of the tokenizer's chat template that has
    the paper's prompt in it, at the point where the model would answer. Without a chat template, the paper's prompt.

    The turn is that of a conversation that goes on, since many templates open one with a default system message."""
    turn = {"role": "user", "content": f"{PAPER_PROMPT}{TEXT}"}
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

    def render(messages: list[dict[str, str]], answers: bool) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answers)

    if not getattr(tokenizer, "chat_template", None):
        return PAPER_PROMPT, ""
    try:
        first, before, both = render([turn], True), render(earlier, False), render([*earlier, turn], True)
    except Exception as error:  # a template is a program of whoever wrote the tokenizer
        logger.warning(f"the chat template can't be used ({error}): texts get the paper's prompt")
        return PAPER_PROMPT, ""
    prompt, found, suffix = (both.removeprefix(before) if both.startswith(before) else first).partition(TEXT)
    if not found or PAPER_PROMPT not in prompt:
        return PAPER_PROMPT, ""
    start = tokenizer.bos_token or ""
    return (prompt if prompt.startswith(start) or not first.startswith(start) else start + prompt), suffix


def _is_gircse(path: str) -> bool:
    """Whether a folder or Hub repo is a GIRCSE model.

    Raises:
        ValueError: for a folder that is no model of transformers, with what it is.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
            remedy = f"holds a PEFT adapter of {base!r}: give that as the model, and this folder as --adapter"
        elif gguf := sorted(file.name for file in folder.glob("*.gguf")):
            remedy = f"holds several GGUF files ({', '.join(gguf)}): choose one by --gguf_file"
        elif (folder / "modules.json").exists():
            remedy = "is a Sentence Transformers model of other modules: give the causal LM that it was made from"
        else:
            remedy = "has no config.json: give the folder of a causal LM or of a GIRCSE model"
        raise ValueError(f"model_name_or_path={path!r} {remedy}")
    return PretrainedConfig.get_config_dict(path)[0].get("model_type") == "gircse"


def _only_gguf_file(path: str) -> str | None:
    """The GGUF file of a folder that holds nothing else to load."""
    files = [] if (Path(path) / "config.json").exists() else list(Path(path).glob("*.gguf"))
    return files[0].name if len(files) == 1 else None


def _saving_problem(processor: Any) -> Exception | None:
    """What saving the processor raises, or None."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            processor.save_pretrained(folder)
        except Exception as error:  # of whichever tokenizer it is
            return error


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


def export(
    model: Any, processor: Any, folder: str | Path, dtype: str = "float32", adapter_of: str | None = None
) -> PreTrainedModel:
    """Saves a Hub-ready folder but for its card: weights (LoRA merged), tokenizer, configuration, prompts and code.

    With `adapter_of`, the model that training started from, the LoRA alone takes the weights' place; see
    [`save_adapter`].

    Raises:
        ValueError: if there is an adapter and it changes nothing.
    """
    folder = Path(folder)
    tuned = hasattr(model, "merge_and_unload")
    if tuned and not any(weight.any() for name, weight in model.named_parameters() if "lora_B" in name):
        raise ValueError("the adapter changes nothing: all of its lora_B weights are zero; has it been trained?")
    if adapter_of:
        model = save_adapter(model, folder, getattr(torch, dtype), adapter_of)
    else:
        shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)  # of an earlier run
        saved = getattr(torch, dtype)
        if tuned:  # in the wider of both, as bfloat16 would round much of what was learned away
            model = model.to(torch.promote_types(model.dtype, saved)).merge_and_unload()
        model = model.to(saved)
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in CODE_FILES:
        if not (folder / name).exists() or not (folder / name).samefile(ROOT / name):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    settings = json.dumps(sentence_transformers_settings(processor), indent=2, ensure_ascii=False)
    (folder / "config_sentence_transformers.json").write_text(settings + "\n", encoding="utf-8")
    return model


def save_adapter(model: Any, folder: Path, dtype: torch.dtype, adapter_of: str) -> PreTrainedModel:
    """Saves the LoRA of a `PeftModel` as one of the plain causal LM, and a configuration that tells where it is.

    The keys are PEFT's for the causal LM, `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, so that
    PEFT alone loads it on that, too. It lies in a subfolder: with `adapter_config.json` beside `config.json`,
    `AutoModel.from_pretrained` would not look at the latter, and give the bare backbone.

    Returns:
        The model without its adapter.
    """
    from peft import get_peft_model_state_dict

    base, config = model.get_base_model(), copy.deepcopy(model.active_peft_config)
    # A folder is named so that it is found from elsewhere, too.
    place = str(Path(adapter_of).resolve()) if Path(adapter_of).exists() else adapter_of
    config.base_model_name_or_path, config.revision = place, commit_of(adapter_of)
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    if not isinstance(config.target_modules, str):
        config.target_modules = {_plain_name(name) for name in config.target_modules}
    weights = {
        _plain_name(name, "base_model.model."): weight.detach().to("cpu", dtype).contiguous()
        for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    config.save_pretrained(folder / ADAPTER_FOLDER)
    save_file(weights, folder / ADAPTER_FOLDER / "adapter_model.safetensors", metadata={"format": "pt"})
    for path in folder.glob("model*.safetensors*"):  # of an earlier run
        path.unlink()
    base = model.unload()
    base.config.adapter = ADAPTER_FOLDER
    custom_object_save(base, folder, config=base.config)
    base.config.save_pretrained(folder)
    return base


def check_adapter(model: Any, base_models: Sequence[str], publishes: bool) -> None:
    """Raises a ValueError for a model that `save_adapter` can't save, or that nobody else could load."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base is model or base.config.step_token == "learned":
        lost = "full tuning" if base is model else "learned tokens"
        raise ValueError(f"save_adapter=True saves a LoRA of the backbone alone, and would lose {lost}: leave it out")
    if len(base_models) != 1:
        raise ValueError(f"save_adapter=True needs the one model that the LoRA belongs to, not {list(base_models)}")
    if publishes and not _is_hub_id(base_models[0]):
        raise ValueError(f"save_adapter=True publishes no weights, and {base_models[0]!r} is not on the Hub")


def commit_of(name: str) -> str | None:
    """The commit of the Hub that was loaded under `name`, from the place of its files in the cache."""
    found = [try_to_load_from_cache(name, file) for file in ("config.json", "modules.json") if _is_hub_id(name)]
    return next((Path(path).parent.name for path in found if isinstance(path, str)), None)


def _plain_name(name: str, prefix: str = "") -> str:
    """A `GircseModel`'s name of a module or weight -> the causal LM's."""
    return prefix + name.removeprefix(prefix).removeprefix("language_model.")


def sentence_transformers_settings(processor: Any) -> dict[str, Any]:
    """This repo's `config_sentence_transformers.json`, its prompts in the template of `processor`."""
    names = ("config_sentence_transformers.json", "processor_config.json")
    settings, own = (json.loads((ROOT / name).read_text(encoding="utf-8")) for name in names)
    before, _, after = own["prompt_template"].partition("{instruction}")
    for name, prompt in settings["prompts"].items():
        settings["prompts"][name] = processor.prompt_for(prompt.removeprefix(before).removesuffix(after))
    return settings


def model_card(
    folder: Path,
    training: GircseTrainingArguments,
    base_models: Sequence[str] = (),
    train_data: str = "",
    scores: dict[int, tuple[float, float]] | None = None,
    repo_id: str | None = None,
    commit: str | None = None,
) -> str:
    """The card of the exported `folder`, filled from the run.

    Args:
        folder: its `config.json` says what the model does; its code files are listed with their hashes.
        training: the run's settings.
        base_models, train_data: see [`GircseTrainer`].
        scores: held-out accuracy before and after training by k.
        repo_id, commit: where the folder is published; without them the card speaks of the folder itself.
    """
    bases = [name for name in base_models if _is_hub_id(name)]
    on_hub, data_name = _is_hub_id(train_data), train_data if _is_hub_id(train_data) else Path(train_data).name
    results = [
        EvalResult(
            task_type="text-retrieval",
            dataset_type=train_data if on_hub else "local",
            dataset_name=f"{data_name or 'training pairs'}, held out",
            metric_type="accuracy",
            metric_name=f"accuracy at k = {k}",
            metric_value=round(after, 5),
        )
        for k, (_, after) in (scores or {}).items()
    ]
    name = (repo_id or str(folder.resolve())).rpartition("/")[2]
    metadata = ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        datasets=[train_data] if on_hub else None,
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["gircse", "sentence-transformers", "sentence-similarity", "text-embeddings", "custom_code"],
        **({"model_name": name, "eval_results": results} if results else {}),
    )
    step_token = json.loads((folder / "config.json").read_text(encoding="utf-8"))["step_token"]
    run = [name for name in REMOTE_CODE if (folder / name).exists()]
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in run}
    batch = (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.world_size)
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        base=", ".join(bases) or "a local model",
        method=METHODS[step_token],
        k=", k=5" if step_token in ("soft", "hard") else "",
        repo=repo_id or ".",
        pin="" if commit is None else f'revision="{commit}", ',
        files="\n".join(f"| `{name}` | {REMOTE_CODE[name]} | `{digest}` |" for name, digest in hashes.items()),
        rows="\n".join(f"| {k} | {before:.3f} | {after:.3f} |" for k, (before, after) in (scores or {}).items()),
        settings=f"K = {training.k}, temperature {training.temperature}, lambda {training.refinement_weight}, "
        f"reduction {training.reduction}, learning rate {training.learning_rate:g}, "
        f"batch {' x '.join(map(str, batch))} (queries, accumulation, processes)",
    )


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"([\w.-]+/)?[\w.-]+", name) is not None and not Path(name).exists()


METHODS = {
    "soft": "it generates K soft tokens after a text and averages their last hidden states (GIRCSE)",
    "hard": "it generates K tokens after a text and averages their last hidden states",
    "learned": "it appends K learned tokens to a text and averages their last hidden states",
    "none": "it pools the last hidden states of a text and generates nothing",
}
CARD = """---
{metadata}
---

# {name}

A text embedding model: {method}. Made from {base}.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{repo}", {pin}trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo}", {pin}trust_remote_code=True)
inputs = processor(["how do I renew a card"], instruction="Given a question, retrieve a passage that answers it.")
embeddings = model.generate_embedding(**inputs)  # (1, d), unit norm
```

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{repo}", {pin}trust_remote_code=True)
embeddings = model.encode_query(["how do I renew a card"]{k})
```

Inference Endpoints serve merged weights by `handler.py`; Text Embeddings Inference and vLLM can't.

## What `trust_remote_code=True` runs

Only these files, by who loads the model. Read them, and pin the commit that you have read.

| file | loaded by | SHA-256 |
|---|---|---|
{files}

## Held-out retrieval accuracy

Before and after this training, by the number of generated tokens:

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
    labelled = {round(sixth * (len(names) - 1) / 5) for sixth in range(6)}  # more names would cover the curves
    for index, name in enumerate(names):
        shade = pyplot.cm.viridis(0.85 * index / max(len(names) - 1, 1))
        label = f"$L_{{{name[2:]}}}$" if index in labelled else None
        left.plot(steps, [line[name] for line in lines], color=shade, linewidth=1.2, label=label)
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
    call = [sys.executable, "-c", SEARCH, str(Path(folder).resolve())]
    subprocess.run(call, input=rows, text=True, check=True, env={**os.environ, "PYTHONIOENCODING": ":backslashreplace"})


def lenient_console() -> None:
    """Has characters that the console's encoding lacks (Windows' often has 256) printed as their numbers, not raise."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help texts with per cent signs that stand for themselves, as some of transformers' do."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action) or ""
        return re.sub(r"%(%|\(\w+\)\w)?", lambda match: match[0] if match[1] else "%%", text)


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
    if training.eval_strategy != "no" and data.held_out == 0:
        raise ValueError("eval_strategy needs pairs to evaluate on: held_out must be > 0")
    k = training.k if data.held_out == 0 else max(training.k, *accuracy_steps(config))
    longest, most = data.max_length or processor.max_length, model.max_input_length(k)
    if most is not None and longest > most:
        steps = "" if config.step_token == "none" else f" less k={k} steps, the most of training and evaluation"
        remedy = f"use --max_length {most}" if most > 0 else "use a smaller k"
        positions = most + (0 if config.step_token == "none" else k)
        raise ValueError(f"max_length={longest} exceeds the backbone's {positions} positions{steps}: {remedy}")
    folder = Path(training.output_dir).resolve()
    if folder == ROOT:
        raise ValueError(f"output_dir={training.output_dir!r} is this repo itself; choose another folder")
    for name in ("model_name_or_path", "adapter"):
        given = getattr(arguments, name)
        if given and Path(given).resolve() in (folder, folder / ADAPTER_FOLDER):
            raise ValueError(f"output_dir={training.output_dir!r} would overwrite {name}={given!r}; choose another")


def held_out_size(rows: int, training: GircseTrainingArguments) -> int:
    """How many of `rows` pairs are kept for the accuracy: three texts each, of which one costs about as much, forward
    and in 20 steps, as a text of training, forward and backward in 5; and a tenth of the pairs at most."""
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * rows / batch)
    texts = steps * batch * (2 + training.num_negatives)
    most = min(HELD_OUT, max(int(HELD_OUT_SHARE * texts / 3), FEWEST_HELD_OUT))
    return min(most, rows // 10)


def check_saving(model: Any, processor: Any, training: GircseTrainingArguments) -> None:
    """Raises a ValueError now, and not after training, for a model that the export could not save."""
    if problem := _saving_problem(processor):
        raise ValueError(
            f"the tokenizer can't be saved ({problem}): give a folder with a tokenizer.json, such as one that "
            "AutoTokenizer.from_pretrained(..., mistral_format=False).save_pretrained(folder) has written"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    quantized = getattr(base.config.text_config, "quantization_config", None) is not None
    if quantized and model is base:
        raise ValueError("the backbone is quantized, and its weights can't be trained as they are: use --tuning lora")
    if quantized and not training.save_adapter:
        raise ValueError(
            "the backbone is quantized, and a LoRA can't be merged into such weights: add --save_adapter, or start "
            "from the weights before quantization"
        )


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
    if wanted:
        found = Path(checkpoint if wanted == "last" else wanted)
        # A file of the optimizer's, one for each process, or a folder of DeepSpeed's.
        if found.is_dir() and not any(any(found.glob(name)) for name in ("optimizer*", "global_step*")):
            raise ValueError(
                f"resume_from_checkpoint={wanted!r}: {found.name} holds no optimizer's state, as --save_only_model "
                "leaves it, so that the run would not go on as it was. Train on from its weights in a new run instead"
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


def main(argv: Sequence[str] | None = None, make_trainer: Callable[..., GircseTrainer] = GircseTrainer) -> None:
    """The command line. `make_trainer` may be a subclass of [`GircseTrainer`] with a loss of its own."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        argv = SAMPLE_RUN
        print(f"No arguments: training the root model on the sample, as\n  python train_gircse.py {' '.join(argv)}\n")
    lenient_console()
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, GircseTrainingArguments), description=__doc__, formatter_class=HelpFormatter
    )
    arguments, data, training = parser.parse_args_into_dataclasses(argv)
    checkpoint = check_output(training)
    set_seed(training.seed)
    if training.disable_tqdm:
        datasets.disable_progress_bars()
        logging.disable_progress_bar()  # transformers' and the Hub's

    model, processor = load_model(arguments)
    check_settings(model, processor, arguments, data, training)
    if training.process_index == 0:
        print(f"Reading {data.train_data}", flush=True)
    pairs = load_pairs(
        data.train_data,
        config=data.data_config,
        columns=parse_columns(data.columns),
        symmetric_sources=data.symmetric_sources,
        limit=data.limit,
        max_bad_share=data.max_bad_share if data.skip_bad_rows else None,
        bad_rows_file=Path(training.output_dir) / BAD_ROWS,
    )
    held_out = held_out_size(len(pairs), training) if data.held_out is None else data.held_out
    pairs, held_out = split_held_out(pairs, held_out, training.seed)
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
    )

    if len(held_out):
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=checkpoint)
    if len(held_out):
        trainer.evaluate()
    if trainer.is_world_process_zero():
        if trainer.scores:
            print(f"\nHeld-out retrieval accuracy ({len(held_out)} pairs)\n   k  before  after")
            for k, (before, after) in trainer.scores.items():
                print(f"  {k:2d}  {before:6.3f} {after:6.3f}")
        plot_curves(trainer.state.log_history, Path(training.output_dir) / "training_curves.png")
        print(f"\nSaving to {training.output_dir}", flush=True)
    if training.push_to_hub:
        commit = trainer.push_to_hub()
    else:
        trainer.export()
    if trainer.is_world_process_zero():
        print(f"Saved to {training.output_dir}")
        if training.push_to_hub:
            print(f"Published: {commit}")
        if data.show_neighbours:
            show_neighbours(training.output_dir, held_out)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
