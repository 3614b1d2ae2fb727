"""A model folder in the hub's layout: what lies in it, and the model and processor made from it. Never remote code.

Nothing here asks the network unless the user's path begins with "hub:".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as FAMILIES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from fedmllm.backbones import FromFolder
from fedmllm.types import FedmllmError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "nf4": torch.bfloat16}
OURS = {"minicpmv": "MiniCPM-V 2.6 and MiniCPM-Llama3-V 2.5, by our port"}  # model_type of config.json


def load_base(spec: FromFolder) -> tuple[PreTrainedModel, Any, Callable[[], str]]:
    """(frozen model on its device, processor, digest). The global random state is left as it was."""
    folder = find(spec.path)
    family = family_of(folder)
    with torch.random.fork_rng():
        model = load_model(folder, family, DTYPES[spec.precision.base]).to(spec.device)
    return model, load_processor(folder, family), lambda: digest(folder)


def find(path: str) -> Path:
    """The folder that `path` names; "hub:owner/name" is fetched by its client, or found in its cache."""
    if path.startswith("hub:"):
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(path.removeprefix("hub:"), allow_patterns=patterns))
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FedmllmError(
            f"backbone.path: {path} is not a folder; give a model folder, or hub:owner/name to fetch one"
        )
    return folder


def family_of(folder: Path) -> str:
    """`model_type` of its config.json, checked to be one that reads pictures and text."""
    file = folder / "config.json"
    if not file.is_file():
        raise FedmllmError(f"{folder} is not a model folder: it has no config.json")
    try:
        family = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise FedmllmError(f"{file}: not a model's configuration: {error!r}") from error
    known = [*OURS, *FAMILIES]
    if family not in known:
        raise FedmllmError(
            f"{file}: model_type {family!r} is no family that reads pictures and text"
            f"{nearest(str(family), known)}; such as: minicpmv, minicpmv4_6, qwen3_vl, llava, internvl, gemma3"
        )
    return str(family)


def load_model(folder: Path, family: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with every weight from the folder's safetensors, or an error that names those that do not fit."""
    if not list(folder.glob("*.safetensors")):
        raise FedmllmError(f"{folder}: no *.safetensors; weights in other formats are not read (they may run code)")
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    if family in OURS:
        from fedmllm.backbones.minicpmv2 import MiniCPMV2ForConditionalGeneration as Model
    else:
        Model = AutoModelForImageTextToText
    model, info = Model.from_pretrained(str(folder), output_loading_info=True, **options)
    odd = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(odd.values()):
        listed = "; ".join(
            f"{len(names)} {kind.replace('_', ' ')}: {names[:3]}" for kind, names in odd.items() if names
        )
        raise FedmllmError(f"{folder}: the weights are not those of its config.json ({family}): {listed}")
    return cast("PreTrainedModel", model)


def load_processor(folder: Path, family: str) -> Any:
    """The family's processor on PIL alone, without its video part, so that torchvision is not needed."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise FedmllmError(f"{folder}: no tokenizer.json (or tokenizer.model)")
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise FedmllmError(f"{folder}: no preprocessor_config.json: how this model reads pictures is not said")
    if family in OURS:
        from fedmllm.backbones.minicpmv2 import MiniCPMV2Processor

        processor = MiniCPMV2Processor.from_pretrained(str(folder))
        template = processor.tokenizer.chat_template
    else:
        processor = _videoless(folder)
        template = processor.chat_template or processor.tokenizer.chat_template
    if not template:
        raise FedmllmError(f"{folder}: no chat template; it belongs into chat_template.jinja or tokenizer_config.json")
    return processor


def _videoless(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    kind = PROCESSOR_MAPPING[type(config)]

    class Pictures(kind):  # type: ignore[valid-type,misc]
        """The processor with a stand-in where its video part belongs."""

        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

        def __repr__(self) -> str:
            return str(kind.__name__)  # transformers' own writes all parts as JSON, also into its log

    parts = {
        "tokenizer": lambda: AutoTokenizer.from_pretrained(str(folder), local_files_only=True),
        "image_processor": lambda: AutoImageProcessor.from_pretrained(
            str(folder), local_files_only=True, backend="pil"
        ),
        "video_processor": NoVideo,
    }
    settings, _ = kind.get_processor_dict(str(folder), local_files_only=True)
    return Pictures.from_args_and_dict([parts[name]() for name in kind.get_attributes()], settings)


class NoVideo:
    """Stands where a processor wants its video part; holds what constructors read from it."""

    slice_mode = False
    downsample_mode = "16x"
    merge_size = 2
    num_frames = 1
    fps = 1


def digest(folder: Path) -> str:
    """sha256 over config.json and every weight file, by name."""
    h = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with file.open("rb") as stream:
            h.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return h.hexdigest()
