"""The arguments of `train_gircse.py`: where the model starts, which pairs, and how it is trained."""

from __future__ import annotations

import math
import sys
from dataclasses import MISSING, dataclass, field, fields

import torch
from torch import nn
from transformers import TrainingArguments

from .. import ROOT
from ..command_line import unescape
from .losses import REDUCTIONS

BAD_ROWS = "bad_rows.jsonl"
# Peak learning rates at which a pretrained backbone learns without diverging (docs/results.md).
LORA_RATE, FULL_RATE = 5e-4, 5e-5
BY_ACCURACY = ("reduce_lr_on_plateau", "greedy")  # schedules of the learning rate that look at an evaluation
OF_EVALUATION = "held-out pairs are evaluated by retrieval accuracy alone"
OF_BATCHES = "batches are of one source each, in random order; --mix_sources mixes the sources"
OF_TOKENS = "a step embeds two sets of texts, whose tokens Trainer can't count"
# Arguments of `TrainingArguments` that have no effect here, and why: giving one is an error. All others work.
WITHOUT_EFFECT = {
    "average_tokens_across_devices": "the loss is that of the joint batch of all processes",
    "batch_eval_metrics": OF_EVALUATION,
    "bf16_full_eval": OF_EVALUATION,
    "dataloader_drop_last": "rows that fill no last batch are left out of an epoch anyway",
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
    "overwrite_output_dir": "no earlier model is overwritten; choose another folder, or remove it yourself",
    "parallelism_config": "layers are not split over processes; use configs/fsdp2.yaml or configs/zero3.yaml",
    "past_index": OF_EVALUATION,
    "prediction_loss_only": OF_EVALUATION,
    "train_sampling_strategy": OF_BATCHES,
    "use_cache": "the step loop has a KV cache of its own",
    "use_legacy_prediction_loop": OF_EVALUATION,
    "use_liger_kernel": "its kernels are for causal LMs with labels",
}


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
        default=None, metadata={"help": "GGUF file to load from a Hub repo; a folder's only one is found by itself"}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "dtype in which the weights are trained", "choices": ["float32", "bfloat16"]},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    tuning: str = field(default="lora", metadata={"help": "lora, or full for all weights", "choices": ["lora", "full"]})
    lora_r: int = field(default=64, metadata={"help": "rank of the LoRA"})
    lora_alpha: int = field(default=32, metadata={"help": "alpha of the LoRA, which is scaled by alpha / rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the LoRA"})
    num_steps: int | None = field(default=None, metadata={"help": "K at inference of a new model (20)"})
    logit_temperature: float | None = field(
        default=None, metadata={"help": "T of a new model's soft tokens (2; the paper's 1 makes gradients explode)"}
    )
    step_token: str | None = field(
        default=None, metadata={"help": "of a new model: soft (default), hard, learned or none"}
    )
    attention: str | None = field(default=None, metadata={"help": "of a new model: causal (default) or bidirectional"})
    pooling: str | None = field(
        default=None, metadata={"help": "of a new model: mean (default), mean_with_prompt or last"}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "what precedes a text, for a new model: the backbone's chat template with the paper's prompt; "
            "that prompt alone beside --suffix"
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
        for name in ("lora_r", "lora_alpha"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} must be >= 1")


@dataclass
class DataArguments:
    """The pairs; see `pairs.load_pairs` for the layouts."""

    train_data: str = field(default=str(ROOT / "sample_pairs.jsonl"), metadata={"help": "file, folder, glob or Hub id"})
    data_config: str | None = field(default=None, metadata={"help": "of a Hub data set that has several"})
    data_split: str | None = field(
        default=None, metadata={"help": "of a Hub data set: train, or all that are not to test on"}
    )
    columns: list[str] = field(
        default_factory=list,
        metadata={"help": "what the file calls columns, such as query=question pos=answer neg=wrong_1,wrong_2"},
    )
    instruction: str = field(default="", metadata={"help": "what the queries of rows without one get before them"})
    limit: int | None = field(default=None, metadata={"help": "read only the first rows"})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": f"leave rows with errors out, and list them in {BAD_ROWS} of the output"}
    )
    max_bad_share: float = field(default=0.01, metadata={"help": "with --skip_bad_rows: the most, as a share of rows"})
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
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "off: no buffer changes in training"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "write losses of NaN as 0 to the log"})
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
        if "://" in self.output_dir:
            raise ValueError(f"output_dir={self.output_dir!r} is no path: give one of a disk")
        if self.disable_tqdm is None and not sys.stderr.isatty():
            self.disable_tqdm = True  # bars would fill a file; the lines of the log stay
        by_accuracy = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type) in BY_ACCURACY
        if (self.load_best_model_at_end or by_accuracy) and self.metric_for_best_model is None:
            self.metric_for_best_model = "accuracy"  # at the trained k; Trainer's own default is a loss
        # TrainingArguments refuses bf16 on a machine without accelerator, unless use_cpu is set.
        accelerated = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
        self.use_cpu = self.use_cpu or not accelerated
        warmup_steps = self.warmup_steps
        super().__post_init__()  # also parses arguments given as JSON
        for name in ("gradient_checkpointing", "activation_checkpointing"):  # the newer name is that of 5.24
            if getattr(self, name, None):
                settings = getattr(self, f"{name}_kwargs") or {}
                setattr(self, f"{name}_kwargs", {"use_reentrant": False, **settings})
        self.warmup_steps = warmup_steps  # transformers 5.0 overwrites it by warmup_ratio
        if by_accuracy:  # what these schedules look at rises; with losses it would fall
            self.lr_scheduler_kwargs = {"mode": "max", **(self.lr_scheduler_kwargs or {})}
        self._check_numbers()
        if self.n_gpu > 1:
            raise ValueError(f"{self.n_gpu} GPUs in one process: start one process a GPU, by `accelerate launch`")
        if self.load_best_model_at_end and self.save_strategy == "steps" and self.save_steps != self.eval_steps:
            raise ValueError(
                f"save_steps={self.save_steps:g} must be eval_steps={self.eval_steps:g} with load_best_model_at_end, "
                "or the best model may be one that was not saved; --save_strategy best saves that alone"
            )
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

    def _check_numbers(self) -> None:
        """Raises a ValueError for numbers by which nothing could be trained, or the opposite."""
        for name in ("k", "sub_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be >= 1")
        for name in ("temperature", "learning_rate"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be > 0, and finite")
        if not 0 <= self.refinement_weight < math.inf:
            raise ValueError(f"refinement_weight={self.refinement_weight} must be >= 0, and finite")
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            raise ValueError(
                f"max_steps={self.max_steps}, num_train_epochs={self.num_train_epochs:g}: nothing would be trained"
            )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        steps = math.ceil(num_training_steps * (self.warmup_steps or self.warmup_ratio))
        return min(steps, num_training_steps - 1)  # the first step of a warm-up has a rate of 0


def set_defaults(args: GircseTrainingArguments, model: nn.Module) -> None:
    """Sets what depends on the model, a `GircseModel` or a `PeftModel` around one, and was not given."""
    tuned = hasattr(model, "get_base_model")
    if args.learning_rate is None:
        args.learning_rate = LORA_RATE if tuned else FULL_RATE
    # A head of its own that nothing is asked of gets no gradient. DDP has to look for it, which it is not told to do by
    # Trainer under gradient checkpointing.
    idle = not tuned and model.config.step_token != "soft" and not model.config.text_config.tie_word_embeddings
    if args.ddp_find_unused_parameters is None and idle:
        args.ddp_find_unused_parameters = True
