"""`Trainer` with the ICR loss over pairs, gradient caching, and publishing."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import logging

from ..loading import base_of, whole_weights
from .accuracy import check_metric, measured_steps, retrieval_accuracy
from .arguments import GircseTrainingArguments, set_defaults
from .callbacks import EpochSetter, LogFile, StartAgain, Watch
from .card import model_card
from .data import PairCollator, SourceBatches, TrainingPairs, check_negatives, check_pairs, check_prompts
from .gradient_cache import RandomState, joint_side, place_rows, rows_of, sub_batches, value_with_gradient_of
from .losses import IcrLoss, candidate_mask, icr_loss
from .publishing import REPLACED, check_adapter, copy_on_cpu, export, published_files

# What a GPU computes in the time in which it reads weights of half precision: about 300 tokens on an H100 (990 TFLOP/s,
# 3.35 TB/s), and more where launching kernels takes longer than either.
TOKENS_OF_A_PASS = 256

# All but cuDNN's, which torch takes by default on Hopper GPUs since 2.11: with a mask, few batches in hundreds get NaN
# gradients there (pytorch/pytorch#196678), and one such batch is the end of the weights.
ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

logger = logging.get_logger("gircse")


class GircseTrainer(Trainer):
    """`Trainer` whose loss is ICR over queries, positives and hard negatives.

    Args:
        model: a `GircseModel`, or a `PeftModel` around one.
        args: [`GircseTrainingArguments`].
        processor: the `GircseProcessor` that is saved with the model.
        pairs: training rows, as `pairs.load_pairs` returns them.
        held_out: rows for the retrieval accuracy that `evaluate` returns.
        max_length: longest text in tokens.
        callbacks: as in `Trainer`.
        base_models, train_data: for the card: the models that the weights come from, and the name of the pairs. It
            names Hub ids only, no paths, nor a file's name.

    With `args.sub_batch_size`, gradients are cached: all texts are embedded without gradients, the loss is
    differentiated with respect to the embeddings, and each sub-batch is embedded again to carry that on to the weights.
    The gradients are those of the whole batch, exactly. Across processes the loss is that of the joint batch.
    """

    loss_is_scaled_for_ga = False
    objective: str | None = None  # on the card, of a subclass that trains another one
    contrasts = True  # a query with all documents of its batch

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
        if self.contrasts and args.per_device_train_batch_size * args.world_size == 1:
            check_negatives(pairs, args.num_negatives)
        check_metric(args.metric_for_best_model, model.config, args.k)
        check_pairs(pairs, args.per_device_train_batch_size, args.world_size)
        check_prompts((pairs, held_out), processor, max_length)
        if args.save_adapter:
            check_adapter(model, base_models, args.push_to_hub)
        set_defaults(args, model)
        dataset = TrainingPairs(pairs, args.num_negatives, args.seed)
        self._epoch_setter = EpochSetter(dataset)
        super().__init__(
            model,
            args,
            data_collator=PairCollator(processor, max_length),
            train_dataset=dataset,
            eval_dataset=held_out,
            processing_class=processor,
            callbacks=[LogFile(args.output_dir), self._epoch_setter, StartAgain(), *(callbacks or [])],
        )
        if self.is_deepspeed_enabled and (args.sub_batch_size or args.auto_find_batch_size):
            raise ValueError(
                "sub_batch_size, which auto_find_batch_size lowers, needs several backward passes a step, of which "
                "DeepSpeed takes but one: leave both out"
            )
        self.base_models, self.train_data = list(base_models), train_data
        self.scores: dict[int, tuple[float, float]] = {}  # k: the accuracy before training, and the last one measured
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
        # Options at their defaults are not passed: older versions of transformers (5.0 among them) lack
        # `dataloader_multiprocessing_context` and `dataloader_in_order`, and older ones of torch lack `in_order`.
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
        return 0  # Trainer's estimate needs a batch of token ids

    # Loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in `Trainer`, with the kernels of `ATTENTION_KERNELS` for both ways, what is checkpointed included."""
        with sdpa_kernel(ATTENTION_KERNELS):
            return super().training_step(*args, **kwargs)

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
            return value_with_gradient_of(scale * total, total)
        return self._cached_loss(model, sides, inputs)

    def _embed(self, model: nn.Module, side: dict[str, Tensor]) -> Tensor:
        k = None if self._base_model().config.step_token == "none" else self.args.k
        return model(input_ids=side["input_ids"], attention_mask=side["attention_mask"], k=k).step_embeddings

    def _embed_both(self, model: nn.Module, sides: list[dict[str, Tensor]]) -> Sequence[Tensor]:
        """Queries and documents, in one pass of K steps where that saves time: each pass reads all weights, but queries
        are padded as documents are (not on a CPU, where the model prefills rows of like length together by itself)."""
        loop = self._base_model().config.step_token in ("soft", "hard") and not self.args.gradient_checkpointing
        longest = max(side["input_ids"].shape[1] for side in sides)
        padding = sum(len(rows) * (longest - rows.shape[1]) for rows in (side["input_ids"] for side in sides))
        saves = self.args.device.type == "cpu" or padding <= TOKENS_OF_A_PASS * (self.args.k + 1)
        if not (loop and saves) or self.accelerator.num_processes > 1:
            return [self._embed(model, side) for side in sides]
        return self._embed(model, joint_side(sides)).split([len(side["input_ids"]) for side in sides])

    def _base_model(self) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(self.model)
        return base_of(model)

    def _cached_loss(self, model: nn.Module, sides: list[dict[str, Tensor]], inputs: dict[str, Any]) -> Tensor:
        own = sub_batches(sides, self._sub_batch_size)
        parts = self.pad_sub_batches(own)
        leaves, states = self._embed_parts(model, sides, parts)
        # Older versions of torch would go on with the weights that autocast cast in these passes, without gradients.
        torch.clear_autocast_cache()
        queries, documents = (leaf.requires_grad_() for leaf in leaves)
        total = self._joint_loss(queries, documents, inputs)
        wanted = torch.autograd.grad(self.accelerator.num_processes * total, [queries, documents])

        # Trainer runs the backward pass of what is returned, the last sub-batch's; those of the others are run here.
        # transformers < 5 (4.51) has no `current_gradient_accumulation_steps`.
        accumulation = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        for index, ((side, rows), state) in enumerate(zip(parts, states, strict=True)):
            last = index == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(model), state.replay():
                embeddings = self._embed(model, rows_of(sides[side], rows))
                surrogate = (embeddings * wanted[side][rows]).sum() * (index < len(own))
                if not last:
                    self.accelerator.backward(surrogate / accumulation)
        return value_with_gradient_of(surrogate, total)

    def pad_sub_batches(self, parts: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
        """Gives all processes the same number of sub-batches, by repeating a text: with FSDP, all processes together
        gather the weights for each pass."""
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
            place_rows(
                embeddings, side, rows, self._embed(model, rows_of(sides[side], rows)), len(sides[side]["input_ids"])
            )
        return embeddings, states

    def _joint_loss(self, queries: Tensor, documents: Tensor, inputs: dict[str, Any]) -> Tensor:
        """ICR over the queries (B, K, d) and documents (M, K, d) of all processes; this one's own carry gradients."""
        count = queries.shape[0]
        positives, negatives = (self._gather(x, 0.0) for x in (documents[:count], documents[count:]))
        joint = {name: self._gather(inputs[name], -1) for name in ("positive_ids", "query_labels", "query_ids")}
        joint |= {
            name: torch.cat([self._gather(inputs[name][:count], -1), self._gather(inputs[name][count:], -1)])
            for name in ("document_ids", "document_labels", "prompted_ids")
        }
        queries, documents = self._gather(queries, 0.0), torch.cat([positives, negatives])
        # -1 pads processes with fewer negatives.
        candidates = candidate_mask(joint) & (joint["document_ids"] >= 0)
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
            self.record_metrics(loss, queries.detach(), candidates)
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

    def record_metrics(self, loss: IcrLoss, queries: Tensor, candidates: Tensor) -> None:
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
        norm = float(logs.get("grad_norm", math.nan))  # not logged without clipping by transformers 4 and 5.0
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
        if not pairs:
            raise ValueError("there are no held-out pairs to evaluate on: give the trainer held_out, or eval_dataset")
        config = self._base_model().config
        trained, steps = 1 if config.step_token == "none" else self.args.k, measured_steps(config, self.args.k)
        bar = not self.args.disable_tqdm if self.is_world_process_zero() else None
        with self._on_device(), self.accelerator.autocast():  # as in training, also before Trainer prepares the model
            accuracy = retrieval_accuracy(
                self.model, pairs, self.data_collator, self.args.per_device_eval_batch_size, steps, bar
            )
        for k, value in accuracy.items() if eval_dataset is None else ():
            before = self.scores.get(k, (math.nan,))[0] if self.state.global_step else value
            self.scores[k] = (before, value)
        metrics = {f"{metric_key_prefix}_accuracy_k{k}": value for k, value in accuracy.items()}
        metrics[f"{metric_key_prefix}_accuracy"] = accuracy[trained]
        if self.state.max_steps:  # before training, TensorBoard would start in ./runs and stay (transformers 5)
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
            settings = (self.args.save_dtype, adapter_of, self._query_instruction)
            export(model, self.processing_class, self.args.output_dir, *settings)
            self._write_card(None)

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
        if hasattr(self.callback_handler, "on_push_begin"):  # transformers < 5 has no such event
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        revision = revision or getattr(self.args, "hub_revision", None)  # transformers < 5 (4.51) has no hub_revision
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.export()
        if not self.is_world_process_zero():
            return None
        api, where = HfApi(token=token), {"repo_id": self.hub_model_id, "revision": revision}
        if revision:
            api.create_branch(self.hub_model_id, branch=revision, exist_ok=True)
        self._write_card(self.hub_model_id)
        print(f"Saved to {self.args.output_dir}; uploading it to {self.hub_model_id}", flush=True)
        commit = api.upload_folder(
            folder_path=self.args.output_dir,
            allow_patterns=published_files(self.processing_class),
            delete_patterns=REPLACED,
            commit_message=commit_message,
            **where,
        )
        card = self._write_card(self.hub_model_id, commit.oid)
        api.upload_file(
            path_or_fileobj=card, path_in_repo=card.name, commit_message="The card shows the pinned load", **where
        )
        return commit

    @property
    def _query_instruction(self) -> str | None:
        """The instruction of all training queries, "" for none; None where they have several."""
        found = set(self.train_dataset.pairs["instruction"])
        return found.pop() if len(found) == 1 else None

    @whole_weights()
    def _whole_model(self) -> nn.Module | None:
        """A copy of the model with whole weights on the first process, since training may go on; None on the others.
        Sharded weights are gathered from all processes."""
        model, base = self.accelerator.unwrap_model(self.model), self._base_model()
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return copy_on_cpu(model) if self.is_world_process_zero() else None
        weights = self.accelerator.get_state_dict(self.model_wrapped)
        if not self.is_world_process_zero():
            return None
        whole = type(base)(copy.deepcopy(base.config))
        if model is not base:
            from peft import get_peft_model

            whole = get_peft_model(whole, copy.deepcopy(model.active_peft_config))
        whole.float().load_state_dict(weights)
        return whole

    def _write_card(self, repo_id: str | None, commit: str | None = None) -> Path:
        folder = Path(self.args.output_dir)
        known = (self.base_models, self.train_data, self.scores, repo_id, commit, self.objective)
        text = model_card(folder, self.args, *known, self._query_instruction)
        (folder / "README.md").write_text(text, encoding="utf-8")
        return folder / "README.md"
