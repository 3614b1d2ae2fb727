"""Dry run of a site: train one round, print the reply."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedmllm.config.engine import LEAST_SITES, FlowerSites, SecureAggregation
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.core.tensors import flatten, manifest, manifest_digest, norm
from fedmllm.core.types import Round
from fedmllm.flower.request import Request, header_of
from fedmllm.flower.secure.layout import pack_words, word_form
from fedmllm.flower.secure.masks import add_masks
from fedmllm.flower.secure.terms import Advert, Terms
from fedmllm.flower.site.config import Site
from fedmllm.flower.site.process import masked_content, reply_content
from fedmllm.flower.site.trainer import Trainer
from fedmllm.flower.wire import ABOUT, ADAPTER_KEY, FLAT


def dry_run(site_file: Path, experiment_file: Path, out: Path | None, say: Callable[[str], None]) -> None:
    """Train round 1 of the experiment on this site's rows and print what would leave.

    Args:
        site_file: SITE.toml.
        experiment_file: An experiment that a server could run; its own data and paths are not read.
        out: File for the array as it would be sent (float32, little-endian), or None.
        say: Called with each line.

    Raises:
        Refused: The site does not allow the request.
    """
    site, experiment = Site.load(site_file), Experiment.load(experiment_file)
    with tempfile.TemporaryDirectory() as folder:  # state that the algorithm would keep here
        _train(site, experiment, Trainer(site, Path(folder), charges=False), out, say)


def _train(site: Site, experiment: Experiment, trainer: Trainer, out: Path | None, say: Callable[[str], None]) -> None:
    aggregator, at = experiment.server(), Round(1, experiment.seed, experiment.num_rounds, (0,), 1)
    largest = site.largest_rank() if aggregator.mixed_ranks else 0  # as the server would learn it
    if experiment.backbone.lora.at_most(largest) != experiment.backbone.lora:
        at = replace(at, ranks=(largest,))
    asked = Request.of(experiment, "", site.name, 0, at, largest_rank=largest)
    backbone = trainer.backbone(asked)
    start = backbone.lora()
    sent = aggregator.sends(start, aggregator.init(start), asked.at(), 0)
    request = asked.model_copy(update={"base": backbone.digest, "header": header_of(sent, aggregator)})
    payload = sent.travelling()
    say(f"the server would ask: {request.model_dump_json()}")
    secure = experiment.engine.secure if isinstance(experiment.engine, FlowerSites) else None
    if secure:
        request = request.model_copy(update={"secure": _made_up_terms(site, experiment, secure)})
    delta, about = trainer.train(request, flatten(payload).numpy(), manifest_digest(payload))
    content = reply_content(about, flatten(delta).numpy().tobytes())
    if request.secure:
        content = _masked(request.secure, site, about, flatten(delta).numpy())
        say("engine.secure: masked with made-up keys of two other sites; readable only in the sum over all sites:")
        say(f"  num_examples  {about['num_examples']}\n  metrics       {json.dumps(about['metrics'])}")
    array = content[ADAPTER_KEY][FLAT]
    kind = f"masked {array.dtype}" if secure else array.dtype
    say("this site would reply:")
    say(f"  delta         {len(manifest(delta))} tensors as one {kind} array of shape {list(array.shape)}, "
        f"{len(array.data)} bytes, norm {norm(delta):.6g}")  # fmt: skip
    for key, value in content[ABOUT].items():
        say(f"  {key:<13} {value!r}, {len(str(value).encode())} bytes")
    total = sum(len(part.deflate()) for part in get_all_nested_objects(content).values())
    say(f"  in total      {total} bytes as Flower packs them, and Flower's message header (ids, times, sizes)")
    if out:
        try:
            out.write_bytes(array.data)
        except OSError as error:
            raise FedmllmError(f"--adapter: {out}: cannot be written: {error.strerror}") from None
        say(f"the array as it would be sent: {out}")
    say("nothing was sent")


def _made_up_terms(site: Site, experiment: Experiment, secure: SecureAggregation) -> Terms:
    names = [site.name, *(name for name in ("one", "two", "three") if name != site.name)][:LEAST_SITES]
    adverts = tuple(Advert(site=name, public="0" * 64, signature="0" * 16) for name in names)
    weights = experiment.server().weighted_by or "rows"
    word_bits, bits = secure.words(experiment.cohort_size or LEAST_SITES, weights)
    return Terms(
        version=2,
        serial=1,
        adverts=adverts,
        weights=weights,
        word_bits=word_bits,
        bits=bits,
        rows=secure.rows,
        bound=secure.bound,
        max_norm=experiment.update_filter.max_norm,
    )


def _masked(terms: Terms, site: Site, about: Mapping[str, Any], delta: np.ndarray[Any, Any]) -> RecordDict:
    """The reply of a secure sum, with random keys in place of those of the pairs."""
    words = pack_words(delta, about["num_examples"], about["metrics"], terms)
    keys = {name: secrets.token_bytes(32) for name in terms.names() if name != site.name}
    form = word_form(len(delta), terms)
    return masked_content(form.to_bytes(add_masks(words, site.name, keys, form)), about)
