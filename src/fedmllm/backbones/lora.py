"""LoRA as PEFT builds and names it, with seeded initialisation and dropout."""

from __future__ import annotations

import math
import re
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedmllm.backbones.base import Lora
from fedmllm.backbones.dropout import RowDropout, Seeds, dropout_mask, module_key, seed_tensor
from fedmllm.backbones.extra import extra_modules, widen
from fedmllm.backbones.peft_names import LoraConfig, LoraLayer, PeftModel, get_peft_model, get_peft_model_state_dict
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.rng import torch_stream
from fedmllm.core.tensors import same_names
from fedmllm.core.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "RowDropout",
    "Seeds",
    "add_lora",
    "default_targets",
    "dropout_mask",
    "module_key",
    "seed_tensor",
    "target_names",
]

# attention projections as the families of transformers call them; linear attention: Qwen3.5, MiniCPM-V 4.6
ATTENTION = r"(?:self_attn|attn|attention)\.(?:q_proj|k_proj|v_proj|o_proj|qkv_proj|out_proj)"
LINEAR_ATTENTION = r"linear_attn\.(?:in_proj_qkv|out_proj)"


def decoder_name(model: PreTrainedModel) -> str:
    """Name of the language model inside an image-text-to-text model: "model.language_model", "llm.model".

    Raises:
        FedmllmError: The model does not separate it from its vision tower.
    """
    decoder = model.llm.model if hasattr(model, "llm") else model.get_decoder()
    for name, module in model.named_modules():
        if module is decoder and name:
            return str(name)
    raise FedmllmError(f"{type(model).__name__}: its language model is not separate from its vision tower")


def default_targets(model: PreTrainedModel) -> str:
    """Regex over module names: the language model's attention projections. It cannot reach the vision tower."""
    return rf"{re.escape(decoder_name(model))}\.layers\.\d+\.(?:{ATTENTION}|{LINEAR_ATTENTION})"


def target_names(model: PreTrainedModel, targets: str) -> list[str]:
    """Modules that `targets` adapts.

    Args:
        model: The base.
        targets: Regex that must match whole names, as in PEFT.

    Returns:
        Their full names, sorted.

    Raises:
        ConfigError: It is not a regex, or it matches nothing, a module outside the language model, or one that is not a
            linear layer.
    """
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ConfigError(f"lora.targets: {targets!r} is not a regular expression: {error}") from None
    language = decoder_name(model) + "."
    found = {name: module for name, module in model.named_modules() if name and pattern.fullmatch(name)}
    linears = [n for n, m in model.named_modules() if n.startswith(language) and _is_linear(m)]
    allowed = f"the linear layers of its language model are {sorted({_short(n, language) for n in linears})}"
    if not found:
        raise ConfigError(f"lora.targets: {targets!r} matches no module of {type(model).__name__}; {allowed}")
    outside = [name for name in found if not name.startswith(language)]
    if outside:
        raise ConfigError(
            f"lora.targets: {targets!r} also matches {outside[0]!r} ({len(outside)} modules outside the language "
            f"model, such as the vision tower); begin it with {re.escape(language)!r}"
        )
    odd = [name for name, module in found.items() if not _is_linear(module)]
    if odd:
        kind = type(found[odd[0]]).__name__
        raise ConfigError(f"lora.targets: {targets!r} matches {odd[0]!r}, a {kind}, not a linear layer; {allowed}")
    return sorted(found)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)  # bitsandbytes' Linear4bit is one too


def _short(name: str, prefix: str) -> str:
    return re.sub(r"\d+", "N", name.removeprefix(prefix))


def add_lora(model: PreTrainedModel, lora: Lora, seed: int, base: str) -> tuple[PeftModel, Seeds]:
    """`model`, frozen, with one LoRA adapter on it: A kaiming-uniform from `seed`, B zero. Changes `model` in place.

    Args:
        model: Any image-text-to-text model.
        lora: Ranks, targets, dropout.
        seed: Source of A's values; the global random state is neither read nor changed.
        base: `base_model_name_or_path` of a saved adapter: the folder or hub id as the user wrote it.

    Returns:
        The PEFT model, and the seeds of its dropout.

    Raises:
        ConfigError: `lora.targets` or `lora.train_extra` do not fit the model.
    """
    targets = lora.targets or default_targets(model)
    target_names(model, targets)  # raises if they match nothing, or too much
    config = LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=targets,
        modules_to_save=extra_modules(model, lora.train_extra) or None,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated names in transformers; `base` is not a path on this machine
        peft = get_peft_model(model, config)
    peft.peft_config["default"].base_model_name_or_path = base
    widen(peft, model.dtype)
    _initialize(peft, seed, lora)
    return peft, _own_dropout(peft, lora.dropout)


def _initialize(peft: PeftModel, seed: int, lora: Lora) -> None:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), which is kaiming-uniform with a = sqrt(5), each from its own stream; or `lora.init`."""
    for name, parameter in parameters_by_saved_name(peft).items():
        if parameter.is_meta:
            continue
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            values = torch.empty(parameter.shape, dtype=torch.float32)
            values.uniform_(-bound, bound, generator=torch_stream(seed, "lora", name))
            parameter.data.copy_(values)
        elif ".lora_B." in name:
            parameter.data.zero_()
    if lora.init == "kaiming":
        return
    for layer in peft.modules():
        if isinstance(layer, LoraLayer) and not layer.lora_B["default"].weight.is_meta:
            b, a = _principal(layer.get_base_layer().weight, lora.r)
            layer.lora_B["default"].weight.data.copy_(b)
            if lora.init == "principal":
                layer.lora_A["default"].weight.data.copy_(a)


def _principal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B = U sqrt(S) and A = sqrt(S) V' of the leading directions, in float64. In each column of U the entry of largest
    magnitude is positive.

    Raises:
        ConfigError: W has fewer directions.
    """
    if rank > min(weight.shape):
        raise ConfigError(
            f"lora.r: got {rank}; a weight of shape {list(weight.shape)} has {min(weight.shape)} principal directions"
        )
    u, s, vt = torch.linalg.svd(weight.detach().to("cpu", torch.float64), full_matrices=False)
    sign = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()
    root = s[:rank].sqrt()
    return (u * sign)[:, :rank] * root, (vt * sign.mT)[:rank] * root[:, None]


def _own_dropout(peft: PeftModel, p: float) -> Seeds:
    seeds = Seeds()
    for name, module in peft.named_modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict):
            dropouts["default"] = RowDropout(p, module_key(name), seeds)
    return seeds


def parameters_by_saved_name(peft: PeftModel) -> dict[str, nn.Parameter]:
    """The live trained parameters, sorted by the names under which PEFT saves them."""
    live = {}
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            live[name.replace(".modules_to_save.default.", ".").replace(".default.", ".")] = parameter
    saved = get_peft_model_state_dict(peft, save_embedding_layers=False)
    if saved.keys() != live.keys():
        raise FedmllmError(f"PEFT saves other names than are trained: {sorted(saved.keys() ^ live.keys())[:3]}")
    return {name: live[name] for name in sorted(live)}


def adapter_config(peft: PeftModel) -> dict[str, Any]:
    """Content of adapter_config.json: PEFT's own, with the adapted modules by full name.

    PEFT would accept a regex; vLLM reads the last part of each name in a list, and simple regexes only.
    """
    configs: Any = peft.peft_config
    config = {key: sorted(v) if isinstance(v, set) else v for key, v in configs["default"].to_dict().items()}
    adapted = [name for name, module in peft.get_base_model().named_modules() if isinstance(module, LoraLayer)]
    return config | {"target_modules": sorted(adapted), "inference_mode": True}


def copy_of(live: dict[str, nn.Parameter]) -> Params:
    """Copies on the CPU: float64 of a float64 model, otherwise float32."""
    return {
        n: p.detach().to("cpu", torch.float64 if p.dtype == torch.float64 else torch.float32, copy=True)
        for n, p in live.items()
    }


def load_into(live: dict[str, nn.Parameter], params: Params) -> None:
    """Overwrite the live parameters.

    Raises:
        FedmllmError: Names or shapes differ.
    """
    same_names(dict[str, Tensor](live), params)
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(params[name])
