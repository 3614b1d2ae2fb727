"""Dry run of a site: train one round, print the reply."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import FedmllmError
from fedmllm.core.tensors import flatten, manifest, manifest_digest, norm
from fedmllm.flower.request import Request, header_of
from fedmllm.flower.site.config import Site
from fedmllm.flower.site.process import reply_content
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
        _train(site, experiment, Trainer(site, Path(folder)), out, say)


def _train(site: Site, experiment: Experiment, trainer: Trainer, out: Path | None, say: Callable[[str], None]) -> None:
    asked = Request.of(experiment, "", site.name, 0, 1)
    backbone = trainer.backbone(asked)
    start = backbone.lora()
    aggregator = experiment.server()
    sent = aggregator.sends(start, aggregator.init(start), asked.at(), 0)
    request = asked.model_copy(update={"base": backbone.digest, "header": header_of(sent, asked.at())})
    payload = sent.travelling()
    say(f"the server would ask: {request.model_dump_json()}")
    delta, about = trainer.train(request, flatten(payload).numpy(), manifest_digest(payload))
    content = reply_content(about, flatten(delta).numpy().tobytes())
    array = content[ADAPTER_KEY][FLAT]
    say("this site would reply:")
    say(f"  delta         {len(manifest(delta))} tensors as one {array.dtype} array of shape {list(array.shape)}, "
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
