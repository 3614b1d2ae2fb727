"""Memory and traffic of an experiment, without its weights.

From the settings and the model's config.json alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedmllm.backbones.folder import first_device
from fedmllm.backbones.footprint import Footprint, footprint
from fedmllm.backbones.places import base_folder
from fedmllm.config.experiment import Experiment

ADAM_BYTES = 16  # a trained weight: itself, its gradient, two moments, float32
WORKSPACE_BYTES = 2e9  # of the libraries on CUDA: 0.5 to 2 GB
LABEL_TOKENS = 16  # a row, generously: the only positions that go through the head


@dataclass(frozen=True)
class EstimateLine:
    """One line of an estimate."""

    part: str
    num_bytes: float
    note: str = ""


def by_device(sizes: Footprint, memory: list[EstimateLine]) -> list[EstimateLine]:
    """Memory of each device if layers are spread over several; empty otherwise.

    Adapters, gradients and activations are with their layers; logits and modules that are trained whole on the first.

    Args:
        sizes: Of the model.
        memory: By `estimate`.
    """
    layered = {"trained: LoRA", "gradients and optimiser", "activations"}
    of_layers = sum(line.num_bytes for line in memory if line.part in layered)
    others = [line for line in memory if line.part not in layered and not line.part.startswith("base: ")]
    lines = []
    for number, share in enumerate(sizes.shares):
        more = of_layers * share.num_layers / sizes.num_layers
        more += sum(line.num_bytes for line in others) if number == 0 else 0
        lines.append(
            EstimateLine(share.device, share.num_bytes + more, f"{share.num_layers} of {sizes.num_layers} layers")
        )
    return lines


def num_copies(experiment: Experiment) -> int:
    """Copies of the frozen model that train a round's clients at the same time (`engine.devices`).

    Args:
        experiment: On this machine, which says how many devices "all" are.
    """
    devices = getattr(experiment.engine, "devices", ())
    return max(1, torch.cuda.device_count() if "all" in devices else len(devices))


def estimate(experiment: Experiment) -> tuple[Footprint, list[EstimateLine], list[EstimateLine]]:
    """(sizes of the model, lines of memory in bytes, lines of traffic in bytes), from settings and config.json alone.

    Memory is that of one CUDA device, or that of all copies on the CPU.
    """
    spec = experiment.backbone
    sizes = footprint(base_folder(spec, config_only=True), spec)
    e, engine = experiment, experiment.engine.model_dump()
    cohort = e.cohort_size or e.partition.num_clients or 1
    who = (
        f"{cohort} clients"
        if e.cohort_size or e.partition.num_clients
        else "one client; all that the rows name take part"
    )
    copies = num_copies(experiment)
    stacked = min(engine["clients"], -(-cohort // copies)) if "clients" in engine else 1
    on_each = f" on each of {copies} devices" if copies > 1 else ""
    tokens = engine.get("token_budget") or spec.max_tokens * e.train.batch_size
    rows = max(1, tokens // spec.max_tokens)
    checkpointing = spec.precision.gradient_checkpointing
    a_token = sizes.checkpointed_bytes + sizes.layer_bytes if checkpointing else sizes.activation_bytes
    logits = 3 * 4 * LABEL_TOKENS * sizes.num_vocabulary  # logits, their softmax and its gradient
    memory = [EstimateLine(f"base: {p.name}", p.num_bytes, f"{p.num_weights:,} weights") for p in sizes.parts]
    memory += [
        EstimateLine(
            f"trained: {name}",
            4 * count * stacked,
            f"{count:,} weights, float32, {stacked} client(s) at a time{on_each}",
        )
        for name, count in sizes.trained.items()
    ]
    memory += [
        EstimateLine("gradients and optimiser", (ADAM_BYTES - 4) * sizes.num_trained * stacked, "AdamW, float32"),
        EstimateLine(
            "activations",
            a_token * tokens,
            f"{tokens:,} tokens a pass, {a_token / 1e6:.2f} MB each{', checkpointed' if checkpointing else ''}",
        ),
        EstimateLine("logits", logits * rows, f"{rows} row(s) of {LABEL_TOKENS} label tokens"),
    ]
    on_cpu = first_device(spec).type == "cpu"
    if copies > 1 and on_cpu:
        memory.append(
            EstimateLine("other copies", (copies - 1) * sum(line.num_bytes for line in memory), "engine.devices")
        )
    if on_cpu:  # they are kept on the host, wherever the model is
        memory.append(EstimateLine("kept image features", spec.keep_image_features_mb * 2**20, "at most"))
    traffic = [
        EstimateLine("down, a client", sizes.payload_bytes),
        EstimateLine("up, a client", sizes.payload_bytes),
        EstimateLine("a round", 2 * sizes.payload_bytes * cohort, who),
        EstimateLine("all rounds", 2 * sizes.payload_bytes * cohort * e.num_rounds, f"{e.num_rounds} rounds"),
    ]
    return sizes, memory, traffic
