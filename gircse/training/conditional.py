"""The losses of AutoRegEmbed (arXiv 2502.11401), and the scores that they are made of. Pure functions on tensors.

A text x is compressed to n states; a frozen causal LM, the decoder, reads these as if they were token embeddings, with
the prompt's suffix behind them if there is one, and then says a text y. S(x -> y) is the log-probability that it gives
y, summed over the tokens of y.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def token_log_probabilities(
    decoder: nn.Module, states: Tensor, targets: Tensor, mask: Tensor, suffix: Tensor | None = None
) -> Tensor:
    """log p of each token of y, given the states of x and the tokens before it: (B, T) float32, 0 where padded.

    Args:
        decoder: a causal LM of transformers.
        states: (B, n, d), n >= 1.
        targets, mask: (B, T) int64, padded on the right.
        suffix: ids of what stands between x and y, (S,) int64; nothing by default, as in the paper.
    """
    ids = targets[:, :-1] if suffix is None else torch.cat([suffix.expand(len(targets), -1), targets[:, :-1]], dim=1)
    embedded = decoder.get_input_embeddings()(ids)  # (B, S + T - 1, d)
    inputs = torch.cat([states.to(embedded.dtype), embedded], dim=1)
    before = inputs.shape[1] - targets.shape[1] + 1  # n + S
    seen = F.pad(mask[:, :-1], (before, 0), value=1)
    logits = decoder(inputs_embeds=inputs, attention_mask=seen, use_cache=False).logits[:, before - 1 :]
    found = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return found * mask


def compression_loss(log_probabilities: Tensor, mask: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Information compression, the first stage: cross-entropy of the targets' tokens, their mean: ().

    Args:
        log_probabilities, mask: (B, T), as of `token_log_probabilities`.
        tokens: by how many it is divided, (); those of the mask by default. With the mean over processes here, the mean
            of the processes' losses is that of all their tokens.
    """
    return -log_probabilities.sum() / (mask.sum() if tokens is None else tokens)


def alignment_loss(
    to_positive: Tensor,
    to_negative: Tensor,
    positive_to_itself: Tensor,
    reference_to_positive: Tensor,
    reference_to_negative: Tensor,
    *,
    beta: float = 0.1,
    temperature: float = 0.1,
    reference_sign: int = 1,
) -> Tensor:
    """Conditional distribution alignment, the second stage: mean over the batch, ().

    With s_1 = sigmoid(beta |S(q -> d+) - S(d+ -> d+)|) and s_2 = sigmoid(beta [(S(q -> d+) - S(q -> d-)) + (R(q -> d+)
    - R(q -> d-))]), it is -log(exp(-s_1 / tau) / (exp(-s_1 / tau) + exp(-s_2 / tau))): the query is to say the positive
    as the positive itself does, and more likely than the negative.

    Args:
        to_positive, to_negative, positive_to_itself: (B,), S of the model.
        reference_to_positive, reference_to_negative: (B,), R, the same scores before this training.
        beta, temperature: tau; both 0.1 in the paper.
        reference_sign: 1 adds R's margin, as the authors' code does; -1 takes it off, as DPO would.
    """
    margin = to_positive - to_negative + reference_sign * (reference_to_positive - reference_to_negative)
    near, apart = torch.sigmoid(beta * (to_positive - positive_to_itself).abs()), torch.sigmoid(beta * margin)
    return F.softplus((near - apart) / temperature).mean()  # -log of the quotient
