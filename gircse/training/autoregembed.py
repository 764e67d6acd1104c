"""`GircseTrainer` with the two stages of AutoRegEmbed in the place of ICR: what they need beside the pairs, and how
they are trained.

Stage 1 is `CompressionTrainer`: a row's query is the context, its positive the output that the instruction asks for.
Stage 2 is `AlignmentTrainer`, on triplets. The decoder is a frozen causal LM, the one that the model was made from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..rows import kept_lines
from .conditional import alignment_loss, compression_loss, token_log_probabilities
from .data import PairCollator
from .trainer import GircseTrainer

REFERENCE = "reference_scores.jsonl"


class TargetCollator(PairCollator):
    """Batches of pairs with what the decoder is to say of the documents: `targets`, {input_ids, attention_mask} (M, T)
    int64, padded on the right, each bare and with the end token behind it; and `references`, (M,) float32."""

    def __init__(self, processor: Any, max_length: int | None, target_length: int) -> None:
        super().__init__(processor, max_length)
        self.target_length = target_length
        self.references: dict[str, float] = {}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        owners = [*rows, *(row for row in rows for _ in row["negatives"])]
        documents = [row["positive"] for row in rows] + [text for row in rows for text in row["negatives"]]
        keys = [
            reference_key(row["instruction"], row["query"], text) for row, text in zip(owners, documents, strict=True)
        ]
        references = torch.tensor([self.references.get(key, 0.0) for key in keys])
        return {**super().__call__(rows), "targets": self.targets(documents), "references": references}

    def targets(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        longest = self.target_length - 1
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:longest] for text in texts]
        rows = [torch.tensor([*row, tokenizer.eos_token_id]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(rows, batch_first=True, padding_value=tokenizer.eos_token_id)
        return {"input_ids": ids, "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True)}


def reference_key(instruction: str | None, query: str, document: str) -> str:
    return hashlib.blake2b(json.dumps([instruction or "", query, document]).encode(), digest_size=16).hexdigest()


class ConditionalTrainer(GircseTrainer):
    """What both stages share. Arguments as of [`GircseTrainer`], and

    Args:
        decoder: the causal LM that says the documents; it is frozen.
        target_length: the most tokens of a document that it says, the end token included.
    """

    def __init__(self, *args: Any, decoder: nn.Module, target_length: int = 128, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.sub_batch_size:
            raise ValueError(
                f"sub_batch_size={self.args.sub_batch_size} is for ICR, whose texts need each other; here "
                "smaller batches whose gradients accumulate do the same"
            )
        self.decoder = decoder.requires_grad_(False).eval().to(self.args.device)
        self.data_collator = TargetCollator(self.processing_class, self.data_collator.max_length, target_length)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        return self.loss_of(model, inputs)

    def loss_of(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def states(self, model: nn.Module, side: dict[str, Tensor]) -> Tensor:
        """The compressed texts, (B, n, d)."""
        return model(input_ids=side["input_ids"], attention_mask=side["attention_mask"], k=self.args.k).step_states


class CompressionTrainer(ConditionalTrainer):
    objective = "information compression (AutoRegEmbed's first stage)"

    def loss_of(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        count = len(inputs["query"]["input_ids"])
        ids, mask = (inputs["targets"][name][:count] for name in ("input_ids", "attention_mask"))
        return compression_loss(
            token_log_probabilities(self.decoder, self.states(model, inputs["query"]), ids, mask), mask
        )


class AlignmentTrainer(ConditionalTrainer):
    """Arguments as of [`ConditionalTrainer`], and `beta`, `tau` and `reference_sign` of `alignment_loss`.

    Raises:
        ValueError: a pair has no hard negative, or `num_negatives` is not 1.
    """

    objective = "conditional distribution alignment (AutoRegEmbed's second stage)"

    def __init__(self, *args: Any, beta: float = 0.1, tau: float = 0.1, reference_sign: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = {"beta": beta, "temperature": tau, "reference_sign": reference_sign}
        if self.args.num_negatives != 1:
            raise ValueError(f"num_negatives={self.args.num_negatives} must be 1: a query has one hard negative here")
        without = sum(not row for row in self.train_dataset.pairs["neg"])
        if without:
            raise ValueError(f"{without} of {len(self.train_dataset)} pairs have no hard negative: leave them out")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Scores the references first, by the model as it is now: a checkpoint is loaded later."""
        self.data_collator.references = self.score_references()
        return super().train(*args, **kwargs)

    def loss_of(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        count = len(inputs["query"]["input_ids"])
        queries = self.states(model, inputs["query"])
        positives = self.states(model, {name: rows[:count] for name, rows in inputs["document"].items()})
        ids, mask = (
            torch.cat([inputs["targets"][name], inputs["targets"][name][:count]])
            for name in ("input_ids", "attention_mask")
        )
        said = token_log_probabilities(self.decoder, torch.cat([queries, queries, positives]), ids, mask).sum(1)
        return alignment_loss(*said.split(count), *inputs["references"].split(count), **self.settings)

    @torch.no_grad()
    def score_references(self) -> dict[str, float]:
        """R(q -> d) of each query and each of its documents. They are kept in the output folder, a JSON line each."""
        file, pairs = Path(self.args.output_dir, REFERENCE), self.train_dataset.pairs
        with self.args.main_process_first(desc="reference scores"):
            known = {row["key"]: row["score"] for row in kept_lines(file)}
            wanted = {
                reference_key(row["instruction"], row["query"], text): (row["instruction"], row["query"], text)
                for row in pairs
                for text in (*row["pos"], *row["neg"])
            }
            missing = [(key, *texts) for key, texts in wanted.items() if key not in known]
            self.model.eval()
            with file.open("a", encoding="utf-8") as lines:
                for start in range(0, len(missing), self.args.per_device_eval_batch_size):
                    batch = missing[start : start + self.args.per_device_eval_batch_size]
                    for (key, *_), score in zip(batch, self._score(batch), strict=True):
                        known[key] = score
                        lines.write(json.dumps({"key": key, "score": score}) + "\n")
                    lines.flush()
        return known

    def _score(self, batch: Sequence[tuple[str, str | None, str, str]]) -> list[float]:
        _, instructions, queries, documents = zip(*batch, strict=True)
        side = self.data_collator._encode([*queries], [text or None for text in instructions])
        with self._on_device(), self.accelerator.autocast():
            states = self.states(self.model, {name: rows.to(self.args.device) for name, rows in side.items()})
            targets = {name: rows.to(self.args.device) for name, rows in self.data_collator.targets(documents).items()}
            said = token_log_probabilities(self.decoder, states, targets["input_ids"], targets["attention_mask"])
        return said.sum(1).tolist()
