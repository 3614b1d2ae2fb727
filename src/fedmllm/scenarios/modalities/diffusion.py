"""Conversion: a diffusion pipeline draws a text."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from fedmllm.core.content_digest import files_digest
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.rng import torch_stream
from fedmllm.core.spec import EXECUTION_ONLY
from fedmllm.core.storage import make_folder, writing
from fedmllm.core.types import Example, Modality
from fedmllm.scenarios.modalities.completion import Completion, CompletionSite, Filling, require_kind

SLOT = "{text}"
PIPELINE_FILES = ("*.json", "*.safetensors", "*.txt")


class Diffusion(Completion):
    """Draw a picture of each text whose row has none, with a pipeline of the package diffusers (such as arXiv:2112.10752).

    The picture is drawn from the text and a seed alone, so it holds for test rows, too. It adds nothing to what the text says:
    it only gives the row the form of a complete one. The
    pipeline is public and does not train; nothing additional leaves a client. It knows its own pictures of the world: one
    that never saw radiographs draws none.
    """

    reads_model = False

    name: Literal["diffusion"] = "diffusion"
    path: str = ""
    """Folder of the pipeline, with its model_index.json and safetensors; "hub:owner/name" asks the network."""
    prompt: str = SLOT
    """What is drawn; "{text}" is the row's text, cut at the tokens that the pipeline reads."""
    of: Modality = "text"
    """Modality that is drawn."""
    to: Modality = "image"
    """Modality that receives the picture."""
    steps: PositiveInt = 20
    """Denoising steps of the pipeline."""
    guidance: Annotated[float, Field(ge=0)] = 7.5
    """Weight of classifier-free guidance; 1 or less = without."""
    size: NonNegativeInt = 0
    """Pixels of a side; 0 = the pipeline's own."""
    device: Annotated[str, EXECUTION_ONLY] = "cpu"
    """Device of the pipeline, such as "cuda"."""
    folder: Annotated[str, EXECUTION_ONLY] = ""
    """Folder that keeps the pictures for other processes and later runs; "~" is allowed; "" = for this process."""

    def at_test(self) -> bool:
        return True

    def check(self, modalities: tuple[Modality, ...]) -> None:
        for key, modality in (("of", self.of), ("to", self.to)):
            if modality not in modalities:
                raise ConfigError(f"completion.{key}: got {modality!r}; the rows have {', '.join(modalities)}")
        if self.of == self.to:
            raise ConfigError(f"completion.to: got {self.to!r}, which is also `of`; name the modality of the pictures")
        if SLOT not in self.prompt:
            raise ConfigError(f"completion.prompt: got {self.prompt!r}; it must contain {SLOT}")
        if not self.path:
            raise ConfigError("completion.path: missing; give the folder of a text-to-image pipeline of diffusers")
        if not self.path.startswith("hub:") and not (Path(self.path).expanduser() / "model_index.json").is_file():
            raise ConfigError(
                f"completion.path: got {self.path!r}; no folder of a pipeline: it has no model_index.json. "
                "allowed: such a folder, or hub:owner/name"
            )
        if importlib.util.find_spec("diffusers") is None:
            raise ConfigError("completion: 'diffusion' needs the package diffusers: pip install 'fedmllm[diffusion]'")

    def check_kinds(self, pictures: frozenset[Modality], texts: frozenset[Modality]) -> None:
        require_kind("completion.of", self.of, "text", texts)
        require_kind("completion.to", self.to, "pictures", pictures)

    def notes(self, train: Sequence[Example], public: Sequence[Example]) -> Sequence[str]:
        return (f"completion: diffusion pipeline {self.path}, digest {_load(self.path, self.device)[1]}",)

    def prepare(self, site: CompletionSite) -> Filling:
        return _Drawing(self, site)


class _Drawing(Filling):
    def __init__(self, settings: Diffusion, site: CompletionSite) -> None:
        self._settings, self._seed = settings, site.seed
        self._folder = Path(settings.folder).expanduser() if settings.folder else site.folder

    def fill(self, example: Example, training: bool) -> Example:
        s, text = self._settings, example.fields.get(self._settings.of)
        if text is None or s.to in example.fields:
            return example
        if not isinstance(text, str):
            raise ConfigError(f"{example.where}, id {example.id}: completion.of: {s.of!r} is a picture")
        return replace(example, fields={**example.fields, s.to: (self._picture(s.prompt.replace(SLOT, text)),)})

    def _picture(self, prompt: str) -> Path:
        """The file of a prompt's picture; drawn if it is not there yet."""
        import diffusers
        import torch

        s = self._settings
        pipeline, digest = _load(s.path, s.device)
        versions = (torch.__version__, diffusers.__version__, torch.device(s.device).type)
        words = (digest, *versions, prompt, s.steps, s.guidance, s.size, self._seed)
        file = self._folder / f"{hashlib.sha256(repr(words).encode()).hexdigest()[:32]}.png"
        if file.is_file():
            return file
        # One prompt at a time: the bits of a picture do not depend on its neighbours. The noise is drawn on the CPU.
        arguments: dict[str, Any] = {"height": s.size, "width": s.size} if s.size else {}
        noise = torch_stream(self._seed, "diffusion", prompt)
        drawn = pipeline(
            [prompt], num_inference_steps=s.steps, guidance_scale=s.guidance, generator=[noise], **arguments
        )
        make_folder(self._folder)
        partial = file.with_name(f".{file.stem}.{os.getpid()}.png")
        with writing(partial):
            drawn.images[0].convert("RGB").save(partial)
            partial.replace(file)
        return file


@cache
def _load(path: str, device: str) -> tuple[Any, str]:
    """(the pipeline on its device, digest of its files). Experiments of a process share it."""
    import diffusers
    import torch
    from diffusers.utils import logging

    loader: Any = diffusers.DiffusionPipeline  # has no types
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        folder = _fetched(path)
        with torch.random.fork_rng():
            pipeline = loader.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device), _digest(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise FedmllmError(f"completion.path: the pipeline {path} cannot be loaded: {error}") from error


def _fetched(path: str) -> Path:
    if not path.startswith("hub:"):
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path.removeprefix("hub:"), allow_patterns=list(PIPELINE_FILES)))


def _digest(folder: Path) -> str:
    found = {file.relative_to(folder).as_posix(): file for pattern in PIPELINE_FILES for file in folder.rglob(pattern)}
    return files_digest({name: found[name] for name in sorted(found)})[:16]
