"""A bag of tokens fitted to a stronger encoder's vectors, as the first layer of a Qwen2 backbone.

A text's vector is sum_t exp(u . e_t) e_t over its tokens, scaled to unit norm. What this needs, an embedding e_t of
unit RMS for each token and one vector u, is fitted to the teacher in a minute or two, where a transformer that starts
from nothing takes far longer to come as near. Causal attention computes the same sum: the query is constant, the key is
u . e_t, value and output are the identity. So every position of a backbone that starts like this holds the vector of
the text up to there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class BagOfTokens(nn.Module):
    def __init__(self, vocab_size: int, size: int) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(vocab_size, size))
        self.weighting = nn.Parameter(torch.zeros(size))

    def tokens(self) -> Tensor:
        """(V, d), each row of unit RMS, as the first layer's norm leaves it."""
        return F.rms_norm(self.embeddings, self.embeddings.shape[-1:])

    def forward(self, ids: list[list[int]]) -> Tensor:
        """(B, d), unit norm."""
        tokens = self.tokens()
        flat = torch.tensor([token for row in ids for token in row])
        starts = torch.tensor([0, *map(len, ids[:-1])]).cumsum(0)
        weights = (tokens @ self.weighting).exp()[flat]
        return F.normalize(F.embedding_bag(flat, tokens, starts, mode="sum", per_sample_weights=weights), dim=-1)


def fit(
    texts: list[str],
    vectors: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    epochs: int = 4,
    batch_size: int = 1024,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> BagOfTokens:
    """The bag that is nearest by cosine to the teacher's vectors, (n, d) of unit norm, for the n texts."""
    torch.manual_seed(seed)
    bag = BagOfTokens(len(tokenizer), vectors.shape[1])
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    optimizer = torch.optim.Adam(
        [{"params": [bag.embeddings], "lr": learning_rate}, {"params": [bag.weighting], "lr": learning_rate / 10}]
    )
    steps = epochs * -(-len(texts) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(len(texts)).split(batch_size):
            loss = 1 - (bag([ids[row] for row in rows]) * vectors[rows].float()).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"bag of tokens, epoch {epoch + 1}: 1 - cos {sum(losses) / len(losses):.4f}", flush=True)
    return bag


def check(config: PretrainedConfig, size: int) -> None:
    """Whether a Qwen2 model of this configuration can hold a bag of vectors of `size` dimensions.

    Raises:
        ValueError: it ties its embeddings, has fewer key/value heads than heads, or another size.
    """
    if config.tie_word_embeddings or config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            "a bag of tokens needs untied embeddings and a key/value head for each of the "
            f"{config.num_attention_heads} heads, but tie_word_embeddings is {config.tie_word_embeddings} and "
            f"num_key_value_heads is {config.num_key_value_heads}"
        )
    if config.hidden_size != size:
        raise ValueError(f"vectors of {size} dimensions, but the model has {config.hidden_size}")


@torch.no_grad()
def install(bag: BagOfTokens, model: PreTrainedModel) -> list[nn.Parameter]:
    """Writes the bag into the first layer of a freshly made Qwen2 model; returns the parameters that hold it.

    Raises:
        ValueError: the model can't hold it, see `check`.
    """
    config = model.config
    check(config, len(bag.weighting))
    embeddings, attention = model.get_input_embeddings(), model.model.layers[0].self_attn
    embeddings.weight.copy_(bag.tokens() / 2)  # beside the bag, so that neither outweighs the other
    for projection in (attention.v_proj, attention.o_proj):
        nn.init.eye_(projection.weight)
    # One dimension of each head weighs the tokens: the one that rotary positions turn least.
    half, slowest = attention.head_dim // 2, attention.head_dim // 2 - 1
    query, key = (
        tensor.view(config.num_attention_heads, attention.head_dim, *tensor.shape[1:])
        for tensor in (attention.q_proj.bias, attention.k_proj.weight)
    )
    attention.q_proj.weight.zero_()
    query[:, slowest] = attention.head_dim**0.5
    key[:, slowest] = bag.weighting
    key[:, slowest + half] = 0
    return [embeddings.weight, *attention.parameters()]


@torch.no_grad()
def damp(model: PreTrainedModel, factor: float) -> None:
    """Scales what the layers of a pretrained Qwen2 model add to the bag of its first layer, so that training for
    embeddings starts from the bag and not from the next token's prediction, which all but hides it."""
    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.weight.mul_(factor)
        if number > 0:
            layer.self_attn.o_proj.weight.mul_(factor)
