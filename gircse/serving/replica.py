"""A replica: the model, loaded once, and requests answered in batches."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from handler import padded

from ..loading import load, prompts_of
from ..locking import one_at_a_time
from .batcher import Batcher
from .protocol import UnknownModelError, read, write, write_error

logger = logging.getLogger("ray.serve")  # which ends up in the replica's log


class Replica:
    """A model that answers requests.

    Args:
        model: Hub id or folder of a GIRCSE model. The code is this repo's own.
        revision: the commit of a Hub id, one for all replicas, whenever they start.
        name: under which clients ask for it.
        dtype: of the weights, a name such as "bfloat16".
        device: "cuda" or "cpu".
        k: generated tokens where a request doesn't say; None for the config's number.
        max_batch_tokens, batch_wait: of a [`Batcher`].

    Raises:
        ValueError: as in `gircse.loading.load`, or if the model can't do `k` steps.
    """

    def __init__(
        self,
        model: str,
        revision: str | None,
        name: str,
        dtype: str,
        device: str,
        k: int | None,
        max_batch_tokens: int,
        batch_wait: float,
    ) -> None:
        with one_at_a_time():
            self.model, self.processor = load(model, dtype=dtype, revision=revision)
        self.model.to(device).eval()
        self.prompts = prompts_of(model, revision)
        self.name, config = name, self.model.config
        self.k = k or (None if config.step_token == "none" else config.num_steps)
        self.batcher = Batcher(self.run, max_batch_tokens, batch_wait)
        # Requests are read, and answers written, beside the event loop, so that new ones come in meanwhile; in one
        # thread, as two at a time may not use a tokenizer.
        self.clerk = ThreadPoolExecutor(1)
        self.broken = ""  # by which error
        self.run(self.tokens(["warm up"], "", self.k), self.k)  # raises for a k that the model can't do

    async def __call__(self, body: Any) -> tuple[int, bytes]:
        """Status and JSON of the answer to a request's JSON."""
        loop = asyncio.get_running_loop()
        try:
            rows, k, size, form = await loop.run_in_executor(self.clerk, self.read, body)
            embeddings = await self.batcher.embed(rows, k)
            return 200, await loop.run_in_executor(self.clerk, self.write, embeddings, size, form, sum(map(len, rows)))
        except UnknownModelError as error:
            return 404, write_error(404, str(error))
        except (TypeError, ValueError) as error:  # checks of the request, and the model's of k
            return 400, write_error(400, str(error))
        except Exception as error:  # what happened is for those who run the server
            logger.exception("a request failed")
            if "CUDA error" in str(error):  # after which the process can't use its GPU any more
                self.broken = str(error)
            return 500, write_error(500, "the server failed to embed this; its log says why")

    def check_health(self) -> None:
        """Ray Serve calls it every few seconds, and puts another replica in the place of one whose GPU is lost."""
        if self.broken:
            raise RuntimeError(self.broken)

    def read(self, body: Any) -> tuple[list[list[int]], int | None, int, str]:
        """The tokens of each text, k, how many dimensions the vectors have, and the answer's encoding."""
        texts, prompt, given = read(body, self.name, self.model.config.hidden_size, self.processor, self.prompts)
        k = given.get("k", self.k)
        size = given.get("dimensions", self.model.config.hidden_size)
        return self.tokens(texts, prompt, k), k, size, given.get("encoding_format", "float")

    def tokens(self, texts: list[str], prompt: str, k: int | None) -> list[list[int]]:
        most = self.model.text_limit(self.processor.max_length, k)
        return self.processor(texts, prompt=prompt, max_length=most, padding=False, return_tensors=None)["input_ids"]

    def run(self, rows: list[list[int]], k: int | None) -> Tensor:
        """(B, d) float32 on the CPU, not normalized, of B lists of tokens."""
        return self.model.generate_embedding(*padded(rows, self.model.device), k=k, normalize=False).cpu()

    def write(self, embeddings: list[Tensor], size: int, form: str, tokens: int) -> bytes:
        vectors = F.normalize(torch.stack(embeddings)[:, :size], dim=-1) if embeddings else torch.empty(0, size)
        if not vectors.isfinite().all():  # NaN is no JSON
            raise RuntimeError(f"vectors are not finite in {self.model.dtype}: serve in another --dtype, as bfloat16")
        return write(vectors.tolist(), self.name, tokens, form)
