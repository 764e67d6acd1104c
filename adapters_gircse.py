"""PEFT adapters of the plain causal LM: merged into it, loaded beside others, and repos that hold an adapter alone."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .backbone_gircse import HUB_ARGUMENTS, REPO_ARGUMENTS, dequantized, is_quantized, is_tied, load_backbone
from .configuration_gircse import dtype_name

# Fields of a PEFT configuration that hold module names; and those that hold numbers by module name, with the attributes
# of PEFT's layers that hold these.
MODULE_FIELDS = ("target_modules", "exclude_modules", "modules_to_save")
NUMBER_FIELDS = {"rank_pattern": ("r",), "alpha_pattern": ("lora_alpha", "alpha")}
ADDS_TO_EMBEDDINGS = "it adds to the token embeddings, whose weight the steps read as it is"


class AdapterMixin:
    """The methods of a `GircseModel` that load, merge and drop adapters."""

    @classmethod
    def _from_adapter(cls, repo: str, config: PretrainedConfig | None = None, **kwargs: Any) -> PreTrainedModel:
        """Loads the causal LM or GIRCSE model that the adapter in `repo` names, and merges the adapter into it."""
        common = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        where = {name: kwargs.pop(name) for name in REPO_ARGUMENTS if name in kwargs} | common
        # Dropped, so that no code of the backbone's repo is run, only that of this repo.
        for name in ("trust_remote_code", "code_revision", "adapter_kwargs", "_commit_hash"):
            kwargs.pop(name, None)
        # GircseConfig.from_pretrained would store the dtype as a setting; it is meant for the weights.
        dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
        if not isinstance(config, PretrainedConfig):
            config, kwargs = cls.config_class.from_pretrained(
                config or repo, return_unused_kwargs=True, **where, **kwargs
            )
        kwargs |= dtype or {dtype_name(): getattr(config, dtype_name())}
        # The caller's choice of attention is in the backbone's configuration, or in the outer one (transformers < 5).
        chosen = [getattr(part, "_attn_implementation_internal", None) for part in (config.text_config, config)]
        kwargs.setdefault("attn_implementation", chosen[0] or chosen[1])
        where["subfolder"] = "/".join(filter(None, (where.get("subfolder"), config.adapter)))
        if config.step_token == "learned":
            raise ValueError(
                f"step_token='learned': {str(repo)!r} holds an adapter alone, without such tokens: load a folder with "
                "all weights"
            )
        folder = adapter_folder(repo, **where)
        source = peft_package(repo).PeftConfig.from_pretrained(folder)
        base, common = source.base_model_name_or_path, {**common, "revision": source.revision}
        try:
            kind = PretrainedConfig.get_config_dict(base, **common)[0].get("model_type")
        except OSError as error:
            raise OSError(f"{str(repo)!r} holds an adapter of {base!r}, which can't be loaded here: {error}") from error
        if kind == cls.config_class.model_type:
            language_model = cls.from_pretrained(base, **common, **kwargs).language_model
        else:
            language_model = load_backbone(base, config.step_token in ("soft", "hard"), **common, **kwargs)
        language_model = merge_adapter(language_model, folder, bool(kwargs.get("quantization_config")))
        config.text_config, config.adapter = language_model.config, None  # it is saved with weights from now on
        if Path(base).exists():
            config.text_config._name_or_path = ""  # a path of this machine, which would be published
        # Building the model hands the outer configuration's attention down; None there would erase the backbone's
        # (transformers < 5).
        config._attn_implementation = language_model.config._attn_implementation
        return cls(config, language_model).eval()

    def load_adapter(
        self, peft_model_id: str | None = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As [`PreTrainedModel.load_adapter`], for adapters of the plain causal LM (keys
        `base_model.model.model.layers...`) and those of a `GircseModel` (`base_model.model.language_model...`). The
        adapter is not merged; `set_adapter(name)` switches between several.

        Raises:
            ValueError: if the adapter does not match the backbone or changes nothing, and then it is removed; if there
                is another of that name.
        """
        if peft_model_id is None or args or "adapter_state_dict" in kwargs:
            return super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        peft, name = peft_package(peft_model_id), adapter_name or "default"
        check_version_of_peft(peft)
        where = {key: kwargs.pop(key) for key in (*HUB_ARGUMENTS, *REPO_ARGUMENTS) if key in kwargs}
        where |= {key: value for key, value in (kwargs.pop("adapter_kwargs", None) or {}).items() if key[0] != "_"}
        if where.get("subfolder"):
            peft_model_id, where = adapter_folder(peft_model_id, **where), {}
        config = to_gircse_config(peft.PeftConfig.from_pretrained(peft_model_id, **where))
        weights = {
            to_gircse_key(key): value for key, value in peft.load_peft_weights(peft_model_id, "cpu", **where).items()
        }
        check_changes(peft_model_id, weights)
        loaded = getattr(self, "peft_config", {})  # by name; a model without adapters has no such attribute
        if name in loaded:
            raise ValueError(f"adapter_name={name!r} is taken; choose another, or free it by delete_adapter({name!r})")
        active = self.active_adapters() if loaded else None
        conversions = getattr(self, "_weight_conversions", None)
        try:
            info = super().load_adapter(peft_config=config, adapter_state_dict=weights, adapter_name=name, **kwargs)
            self._check_kept(name, weights, peft.utils.ModulesToSaveWrapper)
        except (KeyError, RuntimeError, ValueError) as error:
            if name in getattr(self, "peft_config", {}):
                self.delete_adapter(name)
            elif not hasattr(self, "peft_config"):  # it failed half-way: layers may be wrapped
                unwrap(self)
            if active:
                self.set_adapter(active)
            raise misfit(peft_model_id, self.language_model, error) from error
        finally:
            # transformers 5.0 leaves the adapter's renamings there, and would save the model's weights under them.
            self._weight_conversions = conversions
        return info

    def _check_kept(self, name: str, weights: dict[str, Tensor], replacement: type) -> None:
        """Raises a ValueError unless all weights of an adapter are loaded, and the steps use them."""
        if not isinstance(self.get_input_embeddings(), (nn.Embedding, replacement)):
            raise ValueError(f"{ADDS_TO_EMBEDDINGS}; merge it by GircseModel.from_causal_lm(adapter=...)")
        kept = self.get_adapter_state_dict(name)
        lost = weights.keys() ^ kept.keys()
        # transformers 5 leaves DoRA's magnitudes at their start, though their keys are there: values are compared, too.
        lost |= {key for key in weights.keys() - lost if not torch.equal(weights[key].to(kept[key]), kept[key])}
        if lost:
            raise ValueError(f"unmatched {sorted(lost)[:3]}; GircseModel.from_causal_lm(adapter=...) may take it")

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """As [`PreTrainedModel.add_adapter`].

        Raises:
            ValueError: if it adds to the token embeddings; then it is removed.
        """
        super().add_adapter(adapter_config, adapter_name)
        if not isinstance(self.get_input_embeddings(), (nn.Embedding, peft_package("").utils.ModulesToSaveWrapper)):
            self.delete_adapter(adapter_name or "default")
            raise ValueError(f"adapter_config: {ADDS_TO_EMBEDDINGS}; leave them out of it, or in modules_to_save")

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """As [`PreTrainedModel.set_adapter`].

        Raises:
            ValueError: if another adapter brings whole modules (`modules_to_save`), which stay in use, and this one
                has none in their place; nothing is changed then.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for path, module in self.named_modules():
            kept = getattr(module, "modules_to_save", None)
            if isinstance(kept, nn.ModuleDict) and (lacking := [name for name in names if name not in kept]):
                raise ValueError(
                    f"adapter_name={adapter_name!r}: {path} is of {', '.join(kept)} (modules_to_save), and "
                    f"{lacking[0]!r} has none of its own there: free the former by delete_adapter first"
                )
        super().set_adapter(adapter_name)

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """As [`PreTrainedModel.delete_adapter`]; layers without any adapter left become plain layers again."""
        super().delete_adapter(adapter_names)
        unwrap(self)

    def merge_adapters(self) -> None:
        """Merges the active adapters into the weights and removes all adapters, those of PEFT's own wrapper, too
        (`peft_model.get_base_model().merge_adapters()`). The embeddings stay the same and take less time, and the model
        is saved with all of its weights. Where an adapter changes the token embeddings or the LM head by themselves,
        these are no longer tied.

        Raises:
            ValueError: if there is no adapter.
        """
        if not hasattr(self, "peft_config"):
            raise ValueError("merge_adapters: the model has no adapter; load or add one first")
        self._untie_adapted()
        for module in list(self.modules()):
            if hasattr(module, "base_layer"):  # PEFT's wrapper of a layer (LoRA, ...)
                if not module.disable_adapters:
                    module.merge()
            elif hasattr(module, "original_module") and not module.disable_adapters:  # modules_to_save
                for name in module.active_adapters:
                    module.original_module.load_state_dict(module.modules_to_save[name].state_dict())
        del self.peft_config
        self._hf_peft_config_loaded = False
        unwrap(self)
        self.config.name_or_path = ""  # it is no longer the model of that folder or repo

    def adapter_config_for_causal_lm(self, name: str) -> Any:
        """PEFT's configuration of the adapter `name` as one of the plain causal LM, a copy. Patterns of module names
        may have been written for a `GircseModel`'s; in their place are the full names of the layers that they meet."""
        config, layers = copy.deepcopy(self.peft_config[name]), {}
        for path, module in self.language_model.named_modules():
            if any(name in getattr(module, part, ()) for part in getattr(module, "adapter_layer_names", ())):
                layers[path] = module
        fields = {field: getattr(config, field, None) or () for field in (*MODULE_FIELDS, *NUMBER_FIELDS)}
        if not any(isinstance(names, str) or any("." in it for it in names) for names in fields.values()):
            return config
        config.target_modules = set(layers)
        for field, attributes in NUMBER_FIELDS.items():
            if fields[field]:
                numbers = {
                    path: getattr(layer, attribute)[name]
                    for path, layer in layers.items()
                    for attribute in attributes
                    if hasattr(layer, attribute)
                }
                setattr(config, field, numbers)
        for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if hasattr(config, field):
                setattr(config, field, None)
        if getattr(config, "modules_to_save", None):
            config.modules_to_save = [module.removeprefix("language_model.") for module in config.modules_to_save]
        return config

    def _untie_adapted(self) -> None:
        """Gives the LM head a weight of its own if it shares the token embeddings' and an adapter changes either."""
        backbone = self.language_model
        ends = (backbone.get_input_embeddings(), backbone.get_output_embeddings())
        table, head = (getattr(end, "base_layer", getattr(end, "original_module", end)) for end in ends)
        if head.weight is table.weight and (table, head) != ends:
            head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
            for part in (self, backbone):
                part.config.get_text_config().tie_word_embeddings = part.config.tie_word_embeddings = False
                part.all_tied_weights_keys = {}


def merge_adapter(
    language_model: PreTrainedModel, adapter: str, stays_quantized: bool = False, **where: Any
) -> PreTrainedModel:
    """The causal LM with a PEFT adapter of that causal LM merged into its weights. Quantized ones are dequantized
    before, unless they are to stay so or transformers can't: what an adapter adds is mostly smaller than the steps of 4
    bits."""
    if is_quantized(language_model) and not stays_quantized:
        with suppress(NotImplementedError):
            language_model = dequantized(language_model)
    peft = peft_package(adapter)
    config = peft.PeftConfig.from_pretrained(adapter, **where)
    tied = is_tied(language_model)
    trainable = {name: weight.requires_grad for name, weight in language_model.named_parameters()}
    if any(weight.is_meta for weight in language_model.parameters()):
        raise ValueError(
            f"adapter={adapter!r} can't be merged into layers that device_map has put off to memory or disk: load it "
            "without, save_pretrained the merged model, and load that folder with device_map"
        )
    try:
        if getattr(config, "layer_replication", None):
            raise ValueError("it repeats layers (layer_replication), and PEFT itself merges such an adapter wrongly")
        model = peft.PeftModel(language_model, config)
        ends = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
        if tied and any(isinstance(end, peft.tuners.tuners_utils.BaseTunerLayer) for end in ends):
            raise ValueError(
                "it changes the token embeddings or the LM head, which are one weight there, by themselves; train it "
                "without these among its target_modules (modules_to_save may hold them)"
            )
        result = model.load_adapter(adapter, "default", **where)
        # Keys of the adapter's own weights carry its name, whatever its kind (LoRA, IA3, ...).
        lost = [key for key in result.missing_keys if ".default" in key] + list(result.unexpected_keys)
        if lost:
            raise ValueError(f"unmatched {lost[:3]}")
    except (KeyError, RuntimeError, ValueError) as error:
        raise misfit(adapter, language_model, error) from error
    check_changes(adapter, dict(model.named_parameters()))
    merged = model.merge_and_unload()
    for name, weight in merged.named_parameters():
        weight.requires_grad_(trainable.get(name, True))  # PEFT has frozen them all
    if tied and not is_tied(merged):  # the adapter brought weights of its own, which must not be tied again
        merged.config.tie_word_embeddings = False
        merged.all_tied_weights_keys = {}
    return merged


def adapter_folder(adapter: str, subfolder: str, **where: Any) -> str:
    """The local folder of an adapter in a subfolder of a repo, fetched if need be. PEFT itself, when offline, looks for
    such an adapter's weights in the wrong place."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = [cached_file(adapter, name, subfolder=subfolder, **where) for name in names]
    return str(Path(files[0]).parent)


def unwrap(model: PreTrainedModel) -> None:
    """Replaces PEFT's wrappers that have no adapter left by the layers inside: wrappers rename weights."""
    wrapped = []
    for name, module in model.named_modules():
        plain = getattr(module, "base_layer", getattr(module, "original_module", None))
        if plain is not None and not (hasattr(model, "peft_config") and {*module.parameters()} - {*plain.parameters()}):
            wrapped.append((name, plain))
    for name, plain in reversed(wrapped):  # inner wrappers first
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)


def peft_package(adapter: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"adapter={adapter!r} needs the peft package: pip install peft") from error
    return peft


def check_version_of_peft(peft: Any) -> None:
    """Raises an ImportError if the installed transformers needs a newer peft for unmerged adapters."""
    try:
        from transformers.integrations.peft import MIN_PEFT_VERSION
        from transformers.utils import check_peft_version
    except ImportError:  # this transformers has the check elsewhere, and makes it itself
        return
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        raise ImportError(
            f"transformers {transformers.__version__} needs peft >= {MIN_PEFT_VERSION} for unmerged adapters, and "
            f"this is peft {peft.__version__}: install a newer one, or merge the adapter by "
            "GircseModel.from_causal_lm(adapter=...), which works with this one"
        ) from error


def misfit(adapter: str, language_model: PreTrainedModel, reason: Exception) -> ValueError:
    return ValueError(f"adapter={adapter!r} does not fit {type(language_model).__name__}: {reason}")


def check_changes(adapter: str, weights: dict[str, Tensor]) -> None:
    updates = [weight for name, weight in weights.items() if "lora_B" in name]
    if updates and not any(weight.any() for weight in updates):
        raise ValueError(f"adapter={adapter!r} changes nothing: all of its lora_B weights are zero; was it trained?")


def to_gircse_key(key: str) -> str:
    """A key of an adapter's file, made for the plain causal LM or for a `GircseModel`, as a key of a `GircseModel`."""
    key = key.removeprefix("base_model.model.")
    return key if key.startswith(("language_model.", "learned_tokens.")) else f"language_model.{key}"


def to_gircse_config(config: Any) -> Any:
    """The PEFT configuration, its regular expressions of module names changed to match in a `GircseModel`, too."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(value := getattr(config, field, None), str):  # PEFT takes a str as a regular expression
            setattr(config, field, to_gircse_pattern(value))
    for field in NUMBER_FIELDS:
        if value := getattr(config, field, None):
            setattr(config, field, {to_gircse_pattern(key): number for key, number in value.items()})
    return config


def to_gircse_pattern(pattern: str) -> str:
    """A regular expression of names of the plain causal LM or of a `GircseModel`, as one of a `GircseModel`."""
    return rf"(language_model\.)?({pattern.removeprefix('^')})"
