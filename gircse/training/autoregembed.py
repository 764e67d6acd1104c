"""`GircseTrainer` with the two stages of AutoRegEmbed in the place of ICR: what they need beside the pairs, and how
they are trained.

Stage 1 is `CompressionTrainer`: a row's query is the context, its positive the output that the instruction asks for.
Stage 2 is `AlignmentTrainer`, on triplets. The decoder is a frozen causal LM, the one that the model was made from. It
reads the states in a text's place, so that a chat model's suffix follows them: without it, what it says first has no
likeness to an answer, and the loss of SmolLM2 starts far above what it says of nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..rows import kept_lines
from .conditional import alignment_loss, compression_loss, token_log_probabilities
from .data import PairCollator
from .trainer import GircseTrainer

REFERENCES = "reference_scores-{process}.jsonl"
# Arguments of ICR, which nothing here reads.
OF_ICR = ("temperature", "refinement_weight", "reduction", "matryoshka_dims", "sub_batch_size", "auto_find_batch_size")


class TargetCollator(PairCollator):
    """Batches of pairs with what the decoder is to say of the documents: `targets`, {input_ids, attention_mask} (M, T)
    int64, padded on the right, each bare and with the end token behind it, unless it was cut; and, once they are there,
    `references`, (M,) float32, and `positive`, the positives as the queries are read: with their row's instruction,
    whether or not that is what a search has documents read with."""

    def __init__(self, processor: Any, max_length: int | None, target_length: int) -> None:
        super().__init__(processor, max_length)
        self.target_length = target_length
        self.references: dict[tuple[str, str, str], float] = {}  # of (instruction, query, document)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        positives = [(row, row["positive"]) for row in rows]
        documents = positives + [(row, text) for row in rows for text in row["negatives"]]
        batch = {**super().__call__(rows), "targets": self.targets([text for _, text in documents])}
        if self.references:  # held-out pairs have none
            keys = [(row["instruction"], row["query"], text) for row, text in documents]
            batch["references"] = torch.tensor([self.references.get(key, math.nan) for key in keys])
            instructions = [row["instruction"] or None for row in rows]
            batch["positive"] = self._encode([text for _, text in positives], instructions)
        return batch

    def targets(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        rows = [torch.tensor([*row, tokenizer.eos_token_id][: self.target_length]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(rows, batch_first=True, padding_value=tokenizer.eos_token_id)
        return {"input_ids": ids, "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True)}


class ConditionalTrainer(GircseTrainer):
    """What both stages share. Arguments as of [`GircseTrainer`], and

    Args:
        decoder: the causal LM that says the documents; it is frozen.
        target_length: the most tokens of a document that it says, the end token included; longer ones are cut. Fewer
            where the decoder has no positions for so many.

    Raises:
        ValueError: for an argument of ICR that is not at its default.
    """

    stage: str
    contrasts = False

    def __init__(self, *args: Any, decoder: nn.Module, target_length: int = 128, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for argument in fields(self.args):
            value = getattr(self.args, argument.name)
            if argument.name in OF_ICR and value and value != argument.default:
                raise ValueError(f"{argument.name}={value!r} has no effect here, since it is of ICR: leave it out")
        suffix = self.processing_class.tokenizer(self.processing_class.suffix, add_special_tokens=False)["input_ids"]
        most = self._base_model().text_limit(None, self.args.k + len(suffix))  # the decoder has the same positions
        target_length = target_length if most is None else min(target_length, most)
        self.decoder = decoder.requires_grad_(False).eval().to(self.args.device)
        self.suffix = torch.tensor(suffix, dtype=torch.long, device=self.args.device)
        self.data_collator = TargetCollator(self.processing_class, self.data_collator.max_length, target_length)

    @property
    def objective(self) -> str:
        return f"{self.stage}: K = {self.args.k}"

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        with self.accelerator.autocast():  # which is the model's alone otherwise, and not the decoder's
            return self.loss_of(model, inputs)

    def loss_of(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def states(self, model: nn.Module, side: dict[str, Tensor]) -> Tensor:
        """The compressed texts, (B, n, d)."""
        return model(input_ids=side["input_ids"], attention_mask=side["attention_mask"], k=self.args.k).step_states

    def said(self, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """See `token_log_probabilities`."""
        return token_log_probabilities(self.decoder, states, ids, mask, self.suffix)


class CompressionTrainer(ConditionalTrainer):
    stage = "information compression (AutoRegEmbed's first stage)"

    def loss_of(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        count = len(inputs["query"]["input_ids"])
        ids, mask = (inputs["targets"][name][:count] for name in ("input_ids", "attention_mask"))
        said = self.said(self.states(model, inputs["query"]), ids, mask)
        return compression_loss(said, mask, self.accelerator.reduce(mask.sum().float(), "mean"))


class AlignmentTrainer(ConditionalTrainer):
    """Arguments as of [`ConditionalTrainer`], and `beta`, `tau` and `reference_sign` of `alignment_loss`.

    Raises:
        ValueError: a pair has no hard negative, `num_negatives` is not 1, or `beta` or `tau` is not above 0.
    """

    stage = "conditional distribution alignment (AutoRegEmbed's second stage)"

    def __init__(self, *args: Any, beta: float = 0.1, tau: float = 0.1, reference_sign: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, value in (("beta", beta), ("tau", tau)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be > 0, and finite")
        self.settings = {"beta": beta, "temperature": tau, "reference_sign": reference_sign}
        if self.args.num_negatives != 1:
            raise ValueError(f"num_negatives={self.args.num_negatives} must be 1: a query has one hard negative here")
        without = sum(not row for row in self.train_dataset.pairs["neg"])
        if without:
            raise ValueError(f"{without} of {len(self.train_dataset)} pairs have no hard negative: leave them out")

    @property
    def objective(self) -> str:
        names = {"temperature": "tau", "reference_sign": "sign of the reference term"}
        settings = (f"{names.get(name, name)} {value:g}" for name, value in self.settings.items())
        return f"{super().objective}, {', '.join(settings)}"

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Scores the references first, by the model as it is now: a checkpoint is loaded later."""
        self.data_collator.references = self.score_references()
        return super().train(*args, **kwargs)

    def loss_of(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        count = len(inputs["query"]["input_ids"])
        queries = self.states(model, inputs["query"])
        positives = self.states(model, inputs["positive"])
        ids, mask = (inputs["targets"][name] for name in ("input_ids", "attention_mask"))
        ids, mask = (torch.cat([rows, rows[:count]]) for rows in (ids, mask))
        said = self.said(torch.cat([queries, queries, positives]), ids, mask).sum(1)
        return alignment_loss(*said.split(count), *inputs["references"].split(count), **self.settings)

    @torch.no_grad()
    def score_references(self) -> dict[tuple[str, str, str], float]:
        """R(q -> d) of each query and each of its documents, by (instruction, query, document). Each process scores its
        share, and keeps it in a file of the output folder, a JSON line each. A file is read by one process alone, which
        tells the others: their folders may be on other machines, and half a line may have to be cut off."""
        folder, process, count = Path(self.args.output_dir), self.args.process_index, self.args.world_size
        files = {int(file.stem.rpartition("-")[2]): file for file in folder.glob(REFERENCES.format(process="*"))}
        own = [file for number, file in sorted(files.items()) if number % count == process]
        known = dict(gather_object([(row["key"], row["score"]) for file in own for row in kept_lines(file)]))
        scorer = self._fingerprint()
        wanted = {
            (row["instruction"], row["query"], text): hashlib.blake2b(
                json.dumps([scorer, row["instruction"], row["query"], text]).encode(), digest_size=16
            ).hexdigest()
            for row in self.train_dataset.pairs
            for text in (*row["pos"], *row["neg"])
        }
        missing = sorted((texts for texts, key in wanted.items() if key not in known), key=lambda t: len(t[1] + t[2]))
        own, size, new = missing[process::count], self.args.per_device_eval_batch_size, []
        self.model.eval()
        with (folder / REFERENCES.format(process=process)).open("a", encoding="utf-8") as lines, self._on_device():
            for start in range(0, len(own), size):
                batch = own[start : start + size]
                for texts, score in zip(batch, self._score(batch), strict=True):
                    new.append((wanted[texts], score))
                    lines.write(json.dumps({"key": wanted[texts], "score": score}) + "\n")
                lines.flush()
        known |= dict(gather_object(new))
        return {texts: known[key] for texts, key in wanted.items()}

    def _fingerprint(self) -> str:
        """Tells what the scores hang on: the weights, by sums that a change of any of them changes, and settings."""
        sums = [float(weight.double().sum()) for model in (self.model, self.decoder) for weight in model.parameters()]
        config, processor = self._base_model().config, self.data_collator.processor
        settings = [self.args.k, self.data_collator.max_length, self.data_collator.target_length]
        settings += [getattr(config, name) for name in config.SETTINGS]
        settings += [getattr(processor, name) for name in ("prompt_template", "suffix", "max_length")]
        settings.append(self.accelerator.mixed_precision)
        return hashlib.blake2b(json.dumps([sums, settings]).encode(), digest_size=16).hexdigest()

    def _score(self, batch: Sequence[tuple[str, str, str]]) -> list[float]:
        instructions, queries, documents = zip(*batch, strict=True)
        side = self.data_collator.processor(
            [*queries], instruction=[*instructions], max_length=self.data_collator.max_length
        )
        side, targets = (
            {name: rows[name].to(self.args.device) for name in ("input_ids", "attention_mask")}
            for rows in (side, self.data_collator.targets(documents))
        )
        with self.accelerator.autocast():
            said = self.said(self.states(self.model, side), *targets.values())
        return said.sum(1).tolist()
