"""What runs beside the steps: the log's file, the epoch of the data, and a watch that finds trouble in the log."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .data import TrainingPairs


class LogFile(TrainerCallback):
    """Writes each line of the log to `training_log.jsonl` as it comes; a resumed run keeps its checkpoint's."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "training_log.jsonl"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.write_text("".join(json.dumps(line) + "\n" for line in state.log_history), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class Split(TrainerCallback, ExportableState):
    """Keeps in each checkpoint how many pairs there are, how many of them are held out, and by which seed. By default
    their number hangs on the length of the run, and a run that goes on for longer would hold out pairs that it has
    trained on."""

    def __init__(self, pairs: int, held_out: int, seed: int | None = None) -> None:
        self.arguments = {"pairs": pairs, "held_out": held_out, "seed": seed}

    def state(self) -> dict[str, Any]:
        return {"args": self.arguments, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainer writes only what a checkpoint has already, and one of an earlier version has none.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    @classmethod
    def of(cls, checkpoint: str | Path) -> dict[str, int]:
        """The arguments of the run that wrote a checkpoint; {} of an earlier version's."""
        state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
        return state.get("stateful_callbacks", {}).get(cls.__name__, {}).get("args", {})


class StartAgain(TrainerCallback):
    """With `auto_find_batch_size`, Trainer begins anew when memory runs out, at step 0, but with the weights and the
    optimizer's state of then: this puts those of the beginning back."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.auto_find_batch_size:
            return
        trained = {name: weight for name, weight in kwargs["model"].named_parameters() if weight.requires_grad}
        if not self.weights:
            self.weights = {name: weight.detach().to("cpu", copy=True) for name, weight in trained.items()}
            return
        for name, weight in trained.items():
            weight.data.copy_(self.weights[name])
        if state.global_step == 0:  # else Trainer has read the checkpoint's state
            kwargs["optimizer"].state.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights = {}


class EpochSetter(TrainerCallback):
    """Tells the data which epoch it is, also after a resume. Not by `set_epoch`: Accelerate calls methods of that name
    with a count of its own, which starts at 0 again after a resume (before 1.14)."""

    def __init__(self, dataset: TrainingPairs) -> None:
        self.dataset, self.batches = dataset, None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = int(state.epoch or 0)
        self.dataset.begin_epoch(epoch)
        if self.batches is not None:
            self.batches.begin_epoch(epoch)


class Watch:
    """Tells once, and early, that a run learns nothing, from the lines of its log."""

    COLLAPSED, DIVERGING = 5, 3  # lines of the log in a row before a warning
    STEPS = 20  # that the diverging lines must span, as single steps say little
    GROWTH = 30  # gradient norm over the median so far; a batch of an easy source may have a hundredth of another's
    ONE_DIRECTION = 0.99  # mean cosine of texts that are as one; pretrained backbones start below

    def __init__(self) -> None:
        self.collapsed, self.diverging = 0, []  # how many lines in a row, and the steps of such lines
        self.least_loss, self.norms = math.inf, []  # norms of the lines before they grow
        self.told = False

    def see(
        self, step: int, losses: Sequence[float], chance: float, norm: float, cosine: float, warm: bool
    ) -> str | None:
        """The warning, when it has just become clear what is wrong; else None.

        Args:
            step: of the line.
            losses: L_1..L_K.
            chance: the log of the number of candidates, the loss of a model that gives all texts one vector.
            norm: the gradient norm before clipping, or NaN.
            cosine: the mean one between the queries' embeddings.
            warm: whether the warm-up is over, before which losses may start above chance.
        """
        loss = sum(losses) / len(losses)
        if not math.isfinite(loss) and not self.told:
            self.told = True
            return f"diverges: at step {step} the loss is no finite number"
        grown = bool(self.norms) and norm > self.GROWTH * statistics.median(self.norms)
        lost = warm and loss > 1.01 * chance and loss > 0.98 * self.least_loss
        alike = cosine > self.ONE_DIRECTION or all(abs(x - chance) < 0.01 * chance for x in losses)
        self.collapsed = self.collapsed + 1 if alike else 0
        self.diverging = [*self.diverging, step] if grown or lost else []
        self.least_loss = min(loss, self.least_loss)
        self.norms += [] if grown or math.isnan(norm) else [norm]
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
