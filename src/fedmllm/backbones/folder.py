"""Model, processor and digest of a model folder.

Remote code is never run. The network is used only for a path that begins with "hub:".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as FAMILIES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import logging

from fedmllm.backbones import nf4
from fedmllm.backbones.base import BackboneSpec, FromFolder, check_device_map
from fedmllm.backbones.hub_kernels import without_hub_kernels
from fedmllm.backbones.spread import devices_of, spread
from fedmllm.core.content_digest import files_digest
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.spec import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROCESSOR_FILES = {  # one of the names must be there
    ("tokenizer.json", "tokenizer.model", "vocab.json"): "the tokenizer is",
    ("preprocessor_config.json", "processor_config.json"): "the settings of its image processor are",
}
DIGEST_VERSION = (
    "v2:"  # of `folder_digest`; earlier digests had no prefix and covered config.json and the weights alone
)
READ_FILES = (  # everything that changes what a model reads, computes or where it ends an answer
    *("config.json", "generation_config.json", "*.safetensors"),
    *(
        "preprocessor_config.json",
        "processor_config.json",
        "chat_template.json",
        "*.jinja",
        "additional_chat_templates/*",
    ),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.tiktoken", "*.bpe", "tekken.json", "vocab.json", "vocab.txt", "merges.txt"),
)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# raised by transformers, its configurations and tokenizers for files that do not fit
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
    """Load the model and the processor of `spec`. The global random state is left as it was.

    Args:
        spec: The folder, the precision and the device.

    Returns:
        The frozen model on its device, its processor, and a function that computes the digest of the folder.

    Raises:
        ConfigError: The device or the precision does not fit this machine or the folder.
        FedmllmError: The folder is not an image-text-to-text model, is incomplete, or its files do not fit together.
    """
    folder = find_folder(spec.path)
    family = family_of(folder)
    try:
        check_device_map(spec)  # again: a server of a federation may ask for another precision
    except ValueError as error:
        raise ConfigError(f"backbone.{error}") from None
    devices = devices_of(spec.device_map)
    device = torch.device("cpu") if devices else device_of(spec.device)
    with torch.random.fork_rng(), quiet(), _offline(), without_hub_kernels():
        model = load_model(folder, family, spec, device)
        if devices:
            model = spread(model, devices)
        processor = load_processor(folder, family)
    return model, processor, lambda: folder_digest(folder)


def device_named(name: str) -> torch.device:
    """The device of `backbone.device`, whether this machine has it or not; "auto" as in `device_of`."""
    return device_of(name) if name == "auto" else torch.device(name)


def first_device(spec: BackboneSpec) -> torch.device:
    """The device of inputs and logits, whether this machine has it or not."""
    names = spec.device_map
    return (
        torch.device(devices_of(names)[0] if names == ("auto",) else names[0]) if names else device_named(spec.device)
    )


def device_of(name: str) -> torch.device:
    """The device of `backbone.device`; "auto" is the first CUDA device, otherwise the CPU.

    Raises:
        ConfigError: This machine has no such device, or the package does not support it.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    allowed = "allowed: 'auto', 'cpu', 'cuda', or a CUDA device by number such as 'cuda:1'"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"backbone.device: got {name!r}; {allowed}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"backbone.device: got {name!r}, which is not supported; {allowed}")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"backbone.device: got {name!r}, but this machine has {count} CUDA devices; use 'cpu' or 'auto'"
        )
    return device


@contextmanager
def quiet() -> Iterator[None]:
    """transformers prints neither progress bars nor a loading report in this block; a misfit is raised, not printed."""
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
    """Hugging Face libraries that look something up by themselves are offline in this block."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def find_folder(path: str, config_only: bool = False) -> Path:
    """The folder that `path` names.

    Args:
        path: A folder, or "hub:owner/name", which the hub's client fetches or finds in its cache.
        config_only: Fetch config.json alone.

    Raises:
        FedmllmError: There is no such folder, or the hub cannot be reached.
    """
    if path.startswith("hub:"):
        from huggingface_hub import snapshot_download

        patterns = (
            ["config.json"]
            if config_only
            else ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.bpe"]
        )
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
    """`model_type` of the folder's config.json.

    Raises:
        FedmllmError: The folder has no readable config.json, or its family does not read pictures and text.
    """
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
            f"{file}: model_type {family!r} is not a family that reads pictures and text"
            f"{nearest(str(family), known)}; such as: minicpmv, minicpmv4_6, qwen3_vl, llava, internvl, gemma3"
        )
    return str(family)


def load_model(folder: Path, family: str, spec: FromFolder, device: torch.device) -> PreTrainedModel:
    """The model, with every weight from the folder's safetensors.

    Raises:
        FedmllmError: There are no safetensors, or names or shapes differ from those of config.json; it names some.
    """
    if (folder / "adapter_config.json").is_file():  # transformers would load the model that it names, with the adapter
        raise FedmllmError(
            f"{folder / 'adapter_config.json'}: a LoRA adapter next to a model; give each a folder of its own, the model's as "
            "backbone.path and the adapter's as backbone.adapter"
        )
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
    """The family's processor on PIL alone, without its video part, so that torchvision is not needed.

    Raises:
        FedmllmError: A file of the processor is missing or cannot be read, or there is no chat template.
    """
    for names, what in PROCESSOR_FILES.items():
        if not any((folder / name).is_file() for name in names):
            raise FedmllmError(f"{folder}: {what} missing; on the hub: {' or '.join(names)}")
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
    own, defaults = image_settings(folder), dict(getattr(kind, "images_kwargs", {}))
    replaced = {key: (value, own[key]) for key, value in defaults.items() if key in own and own[key] != value}

    class Pictures(kind):  # type: ignore[valid-type,misc]
        """The processor with a stand-in for its video part, whose class defaults give way to the folder's settings."""

        images_kwargs: ClassVar[dict[str, Any]] = defaults | {key: value for key, (_, value) in replaced.items()}
        replaced_defaults: ClassVar[dict[str, tuple[Any, Any]]] = replaced  # key -> (the class's value, the folder's)

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


def image_settings(folder: Path) -> dict[str, Any]:
    """Settings of the image processor that the folder's files give, as transformers reads them."""
    settings: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            table = json.loads((folder / name).read_text(encoding="utf-8"))
            settings |= table if name == "preprocessor_config.json" else table.get("image_processor", {})
    return settings


class NoVideo:
    """Stand-in for the video part of a processor, with the attributes that constructors read."""

    slice_mode = False
    downsample_mode = "16x"
    merge_size = 2
    num_frames = 1
    fps = 1


def folder_digest(folder: Path) -> str:
    """Identity of a base model: `DIGEST_VERSION` and the sha256 over names and contents of `READ_FILES`.

    Files are read in parallel, each once in a process. Folders with equal digests read rows and compute alike; README,
    licence, training state and video settings are not covered.
    """
    found = {file.relative_to(folder).as_posix(): file for pattern in READ_FILES for file in folder.glob(pattern)}
    return DIGEST_VERSION + files_digest({name: found[name] for name in sorted(found)})


def is_digest_of(recorded: str, folder: Path) -> bool:
    """True if `folder` is the base of a record with the digest `recorded`, which may be of an earlier version.

    A digest without a version covers config.json and the weights alone: then the other files are not compared.
    """
    if recorded.startswith(DIGEST_VERSION):
        return recorded == folder_digest(folder)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return recorded == files_digest({file.name: file for file in files})
