"""A model folder in the hub's layout: what lies in it, and the model and processor made from it. Never remote code.

Nothing here asks the network unless the user's path begins with "hub:".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as FAMILIES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import logging

from fedmllm.backbones import nf4
from fedmllm.backbones.base import FromFolder
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.spec import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROCESSOR_FILES = {  # one of the names must be there
    ("tokenizer.json", "tokenizer.model", "vocab.json"): "the tokenizer",
    ("preprocessor_config.json", "processor_config.json"): "what says how the model reads pictures",
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# what transformers, its configurations and tokenizers raise about files that do not fit
LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)
OURS = {"minicpmv": "MiniCPM-V 2.6 and MiniCPM-Llama3-V 2.5, by our port"}  # model_type of config.json


def load_base(spec: FromFolder) -> tuple[PreTrainedModel, Any, Callable[[], str]]:
    """(frozen model on its device, processor, digest). The global random state is left as it was."""
    folder = find(spec.path)
    family = family_of(folder)
    device = device_of(spec.device)
    with torch.random.fork_rng(), quiet(), _offline():
        model = load_model(folder, family, spec, device)
        processor = load_processor(folder, family)
    return model, processor, lambda: digest(folder)


def device_of(name: str) -> torch.device:
    """The device that the user names. Raises ConfigError where it is not here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"backbone.device: got {name!r}; such as 'cpu', 'cuda', 'cuda:1'") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"backbone.device: got {name!r}, but this machine shows {count} CUDA devices; use 'cpu'")
    return device


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and loading report: what does not fit is raised, not printed."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _offline() -> Iterator[None]:
    """Libraries that would look something up by themselves find the network switched off."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def find(path: str, config_only: bool = False) -> Path:
    """The folder that `path` names; "hub:owner/name" is fetched by its client, or found in its cache."""
    if path.startswith("hub:"):
        from huggingface_hub import snapshot_download

        patterns = ["config.json"] if config_only else ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        try:
            return Path(snapshot_download(path.removeprefix("hub:"), allow_patterns=patterns))
        except (OSError, ValueError) as error:
            raise FedmllmError(
                f"backbone.path: {path} cannot be fetched from the hub, nor is it in its cache: {error}"
            ) from error
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
        adapter = (folder / "adapter_config.json").is_file()
        hint = "; it holds a LoRA adapter: give the folder of its base model" if adapter else ""
        raise FedmllmError(f"{folder} is not a model folder: it has no config.json{hint}")
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


def load_model(folder: Path, family: str, spec: FromFolder, device: torch.device) -> PreTrainedModel:
    """The model with every weight from the folder's safetensors, or an error that names those that do not fit."""
    if not list(folder.glob("*.safetensors")):
        raise FedmllmError(f"{folder}: no *.safetensors; weights in other formats are not read (they may run code)")
    nf4.check(folder, spec.precision.base)
    four_bits = spec.precision.base == "nf4"
    dtype = nf4.compute_dtype(device) if four_bits else DTYPES[spec.precision.base]
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    options["ignore_mismatched_sizes"] = True  # they are listed in `info` then, and raised below
    options |= nf4.options(folder, family, device, spec.lora.train_extra) if four_bits else {}
    kind: Any = AutoModelForImageTextToText
    if family in OURS:
        from fedmllm.backbones.minicpmv2.model import MiniCPMV2ForConditionalGeneration

        kind = MiniCPMV2ForConditionalGeneration
    try:
        model, info = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    except LOADING_ERRORS as error:
        raise FedmllmError(f"{folder}: its weights cannot be loaded ({family}): {error}") from error
    odd = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(odd.values()):
        listed = [f"{len(names)} {kind.replace('_', ' ')}: {names[:3]}" for kind, names in odd.items() if names]
        raise FedmllmError(f"{folder}: the weights are not those of its config.json ({family}): {'; '.join(listed)}")
    if four_bits:
        nf4.keep_trainable(model, dtype)
    return cast("PreTrainedModel", model if four_bits else model.to(device))


def load_processor(folder: Path, family: str) -> Any:
    """The family's processor on PIL alone, without its video part, so that torchvision is not needed."""
    for names, what in PROCESSOR_FILES.items():
        if not any((folder / name).is_file() for name in names):
            raise FedmllmError(
                f"{folder}: {what} is missing; it lies beside the weights on the hub as {' or '.join(names)}"
            )
    try:
        if family in OURS:
            from fedmllm.backbones.minicpmv2.model import MiniCPMV2Processor

            processor = MiniCPMV2Processor.from_pretrained(str(folder))
        else:
            processor = _videoless(folder)
    except LOADING_ERRORS as error:
        raise FedmllmError(f"{folder}: its processor ({family}) cannot be made: {error}") from error
    if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
        raise FedmllmError(
            f"{folder}: no chat template; it lies on the hub as chat_template.jinja or in tokenizer_config.json"
        )
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
    """sha256 over config.json and every weight file, by name; files are read side by side, once in a process."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    with ThreadPoolExecutor(max_workers=8) as pool:
        hashes = list(pool.map(lambda f: _file_digest(f, f.stat().st_size, f.stat().st_mtime_ns), files))
    lines = [f"{file.name} {hash_}" for file, hash_ in zip(files, hashes, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@lru_cache(maxsize=256)
def _file_digest(file: Path, size: int, mtime_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
