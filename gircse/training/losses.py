"""The ICR objective (paper, section 3.3): InfoNCE at every step, and a penalty where a later step is worse.

    L_k     = -log( exp(cos(z_k^q, z_k^+) / tau) / sum over d in B of exp(cos(z_k^q, z_k^d) / tau) ), mean over queries
    L_reg   = 1/(K-1) * sum over k < K of max(log L_{k+1} - log L_k, 0)
    L_total = reduce_k L_k + lambda * L_reg

B holds the positives and hard negatives of all queries of the batch, less the false negatives. Pure functions on
tensors; everything is computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("sum", "mean")
# A float32 cross-entropy below this is rounding error, whose logarithm would outweigh all else in the penalty.
SMALLEST_LOSS = 1e-6


class IcrLoss(NamedTuple):
    """All float32 at least: `total` () = `contrastive` () + lambda * `refinement` (); `steps` (K,) = L_1..L_K."""

    total: Tensor
    contrastive: Tensor
    refinement: Tensor
    steps: Tensor


def candidate_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """Which documents are candidates for which query. Document i is the positive of query i and always is one; any
    other document is left out as a false negative when its text is one of the query's positives, in this row or in
    another one of the same query, when it has the query's label, or when it is the query itself: the same text under
    the same prompt, whose embedding no model could tell from the query's.

    Args:
        batch: int64, as [`PairCollator`] makes them, -1 for none:
            `document_ids`: (M,), the same number for the same text; M >= B.
            `positive_ids`: (B, P), the texts that are right for each query.
            `document_labels`, `query_labels`: (M,) and (B,).
            `query_ids`: (B,), the same number for the same query.
            `prompted_ids`: (M,), a query's number for a document with its text and prompt.

    Returns:
        (B, M) bool, True for candidates.
    """
    document_ids, positive_ids, query_ids = (batch[name] for name in ("document_ids", "positive_ids", "query_ids"))
    same_text = torch.zeros(len(positive_ids), len(document_ids), dtype=torch.bool, device=document_ids.device)
    for ids in positive_ids.split(64, dim=1):  # a query of many rows may have thousands
        same_text |= (document_ids[None, :, None] == ids[:, None, :]).any(-1)  # (B, M)
    right = same_text & (document_ids >= 0)
    same_query = query_ids[:, None] == query_ids  # (B, B)
    false_negative = (same_query.float() @ right.float()) > 0
    for of_documents, of_queries in (("prompted_ids", "query_ids"), ("document_labels", "query_labels")):
        numbers = batch[of_documents][None]
        false_negative |= (numbers == batch[of_queries][:, None]) & (numbers >= 0)
    own = torch.eye(*false_negative.shape, dtype=torch.bool, device=false_negative.device)
    return own | ~false_negative


def stepwise_info_nce(queries: Tensor, documents: Tensor, candidates: Tensor | None, temperature: float) -> Tensor:
    """L_1..L_K of Eq. 7, all steps at once.

    Args:
        queries: (B, K, d), z_1..z_K of the queries; any norm.
        documents: (M, K, d), M >= B; the first B are the positives, in the order of the queries.
        candidates: (B, M) bool from [`candidate_mask`], or None for all.
        temperature: tau > 0.

    Returns:
        (K,), the mean over queries at each step.

    Raises:
        ValueError: if the shapes don't go together or the temperature is not positive.
    """
    if queries.dim() != 3 or documents.shape[1:] != queries.shape[1:] or documents.shape[0] < queries.shape[0]:
        raise ValueError(
            f"queries {tuple(queries.shape)} must be (B, K, d) and documents {tuple(documents.shape)} (M, K, d), M >= B"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    wide = torch.promote_types(queries.dtype, torch.float32)
    queries, documents = (F.normalize(x.to(wide), dim=-1).transpose(0, 1) for x in (queries, documents))
    scores = queries @ documents.transpose(1, 2) / temperature  # (K, B, M)
    if candidates is not None:
        scores = scores.masked_fill(~candidates, float("-inf"))
    log_likelihood = scores.diagonal(dim1=1, dim2=2) - scores.logsumexp(dim=-1)  # (K, B)
    return -log_likelihood.mean(dim=1)


def refinement_penalty(steps: Tensor) -> Tensor:
    """L_reg of Eq. 8 from L_1..L_K (K,): (); 0 for K = 1."""
    if steps.shape[0] < 2:
        return steps.new_zeros(())
    logs = steps.clamp_min(SMALLEST_LOSS).log()
    return F.relu(logs[1:] - logs[:-1]).mean()


def icr_loss(
    queries: Tensor,
    documents: Tensor,
    candidates: Tensor | None = None,
    *,
    temperature: float = 0.02,
    refinement_weight: float = 1.0,
    reduction: str = "sum",
    dims: tuple[int, ...] = (),
) -> IcrLoss:
    """L_total, summed over the full embedding and its leading `dims` dimensions.

    Args:
        queries, documents, candidates, temperature: see [`stepwise_info_nce`].
        refinement_weight: lambda (1 in the paper).
        reduction: over the steps: `"sum"` (the paper's Eq. 7) or `"mean"` (its released code).
        dims: Matryoshka sizes, each in 1..d-1; `steps` reports the full size alone.

    Raises:
        ValueError: for an unknown reduction or a size outside 1..d-1.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown; choose one of {', '.join(map(repr, REDUCTIONS))}")
    full = queries.shape[-1]
    if any(not 0 < dim < full for dim in dims):
        raise ValueError(f"dims={dims} must each be between 1 and {full - 1}, below the embedding's {full}")
    contrastive, refinement, full_steps = 0.0, 0.0, None
    for dim in (full, *dims):
        steps = stepwise_info_nce(queries[..., :dim], documents[..., :dim], candidates, temperature)
        contrastive = contrastive + (steps.sum() if reduction == "sum" else steps.mean())
        refinement = refinement + refinement_penalty(steps)
        full_steps = steps if full_steps is None else full_steps
    return IcrLoss(contrastive + refinement_weight * refinement, contrastive, refinement, full_steps)
