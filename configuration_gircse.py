"""Configuration of GIRCSE: the backbone's own configuration and every number that changes an embedding."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

STEP_TOKENS = ("soft", "hard", "learned", "none")
ATTENTIONS = ("causal", "bidirectional")
POOLINGS = ("mean", "mean_with_prompt", "last")


class GircseConfig(PretrainedConfig):
    """Configuration of a [`GircseModel`].

    The three axes span the paper's Table 1: GIRCSE is (soft, causal, mean), generation with hard tokens
    (hard, causal, mean), compressed tokens (learned, causal, mean), Causal-EOS (none, causal, last) and
    Bidirectional-Avg (none, bidirectional, mean). LaSER (arXiv 2603.01425) is (soft, causal, mean_with_prompt).

    Args:
        text_config: the backbone's configuration, of any causal LM that transformers knows (an object or its dict).
        num_steps: K, the number of generated tokens at inference (section 4.1: 5 in training, 20 at inference); with
            `step_token="learned"` the number of trained tokens, with `"none"` without effect.
        logit_temperature: T in `s_k = softmax(logits / T)`; the paper's Eq. 5 has T = 1.
        step_token: what is fed back at each step: `"soft"` (the mix of token embeddings, Eq. 6), `"hard"` (the most
            probable token), `"learned"` (trained embeddings, one pass) or `"none"` (no generation).
        attention: `"causal"`, or `"bidirectional"` for `step_token="none"`.
        pooling: `"mean"` of the step states (Eq. 4; of the prompt's states when there are no steps); the `"last"`; or,
            of generated tokens, `"mean_with_prompt"`: the mean of the prompt's last state and the step states.
        adapter: the subfolder of a repo that holds a PEFT adapter in place of weights; None for a repo of weights.

    Raises:
        ValueError: for a value outside its choices or range, or a combination that has no meaning.
        TypeError: if `text_config` is neither a configuration nor a dict.
    """

    model_type = "gircse"
    SETTINGS = ("num_steps", "logit_temperature", "step_token", "attention", "pooling")  # those of GIRCSE alone
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        num_steps: int = 20,
        logit_temperature: float = 1.0,
        step_token: str = "soft",
        attention: str = "causal",
        pooling: str = "mean",
        adapter: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value, choices in (
            ("step_token", step_token, STEP_TOKENS),
            ("attention", attention, ATTENTIONS),
            ("pooling", pooling, POOLINGS),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")
        _check_together(step_token, attention, pooling)
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps={num_steps!r} must be an int >= 1")
        if not isinstance(logit_temperature, (int, float)) or not 0 < logit_temperature < float("inf"):
            raise ValueError(f"logit_temperature={logit_temperature!r} must be a finite number > 0")

        self.text_config = _as_config(text_config)
        self.num_steps = num_steps
        self.logit_temperature = float(logit_temperature)
        self.step_token = step_token
        self.attention = attention
        self.pooling = pooling
        self.adapter = adapter
        # PretrainedConfig hands its attention implementation down to `text_config`; None would erase the choice made
        # there for a backbone that exists already.
        if kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = getattr(self.text_config, "_attn_implementation_internal", None)
        # Pipelines load a tokenizer only for a config that names a class (transformers < 5). Which class is really
        # loaded, tokenizer_config.json says.
        kwargs.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> GircseConfig:
        """As [`PretrainedConfig.from_dict`], but the configuration of another kind of model raises a ValueError, and so
        does a setting of `kwargs` that the constructor would refuse."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"model_type={found!r} is not {cls.model_type!r}: this is another kind of model. "
                "For a plain causal LM use GircseModel.from_causal_lm(...)"
            )
        # PretrainedConfig.from_dict sets keyword arguments as attributes after the constructor has checked its own.
        settings = {name: kwargs.pop(name) for name in cls.SETTINGS if name in kwargs}
        if "dtype" in config_dict and dtype_name() != "dtype":  # transformers < 5 (before 4.56)
            # Left as `dtype`, an attribute of the config would take `from_pretrained(..., dtype=...)`, not the model.
            config_dict = {dtype_name() if name == "dtype" else name: value for name, value in config_dict.items()}
        return super().from_dict({**config_dict, **settings}, **kwargs)

    @property
    def hidden_size(self) -> int:
        """d, the dimension of the embeddings; trainers and serving stacks look it up by this name."""
        # OPT-350m projects its states to the size of its token embeddings.
        return getattr(self.text_config, "word_embed_proj_dim", None) or self.text_config.hidden_size


def _check_together(step_token: str, attention: str, pooling: str) -> None:
    """Raises a ValueError for values of the axes that don't go together."""
    if attention == "bidirectional" and step_token != "none":
        raise ValueError(
            f"attention='bidirectional' needs step_token='none', not {step_token!r}: with generated tokens the "
            "earlier states would depend on the later ones; use attention='causal'"
        )
    if pooling == "mean_with_prompt" and step_token not in ("soft", "hard"):
        raise ValueError(
            f"pooling='mean_with_prompt' needs step_token='soft' or 'hard', not {step_token!r}, which generates "
            "nothing; use pooling='mean'"
        )


def dtype_name() -> str:
    """What the installed transformers calls the dtype of weights, in configurations and as an argument."""
    return "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"  # transformers < 5 (before 4.56)


def _as_config(text_config: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig:
    if isinstance(text_config, PretrainedConfig):
        return text_config
    if text_config is None:
        return AutoConfig.for_model("qwen2")
    if not isinstance(text_config, dict):
        raise TypeError(f"text_config must be a configuration or a dict, not {type(text_config).__name__}")
    if "model_type" not in text_config:
        raise ValueError("text_config has no 'model_type'; give the backbone's own configuration (its config.json)")
    # Saved configs say that an attention was chosen, but not which, and would be read as "eager" (transformers < 5).
    config = AutoConfig.for_model(**{k: v for k, v in text_config.items() if k != "_attn_implementation_autoset"})
    _read_rope_parameters(config)
    return config


def _read_rope_parameters(config: PretrainedConfig) -> None:
    """Copies rotary settings from `rope_parameters`, where transformers 5 writes them, to the attributes that older
    versions read; without them, these would take their defaults (transformers < 5)."""
    rope = getattr(config, "rope_parameters", None)
    if not rope or not hasattr(config, "rope_theta"):  # transformers 5 has no such attribute
        return
    main = rope.get("full_attention", rope)  # Gemma 3 has settings for each kind of layer
    config.rope_theta = main["rope_theta"]
    if main.get("rope_type", "default") != "default":
        config.rope_scaling = {name: value for name, value in main.items() if name != "rope_theta"}
    if "partial_rotary_factor" in main:
        config.partial_rotary_factor = main["partial_rotary_factor"]
    if "sliding_attention" in rope:
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]


GircseConfig.register_for_auto_class()
