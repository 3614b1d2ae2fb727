"""results/families.md: which family keeps which promise, on tiny random models that are made here.

python scripts/family_table.py [SHARED]     # SHARED: folder with parity/, for our own ports
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fedmllm.backbones.base import FromFolder, Precision  # noqa: E402
from fedmllm.backbones.hf import CAUSAL, TransformersBackbone, load_folder  # noqa: E402
from fedmllm.backbones.model_checks import NAMES, checkup  # noqa: E402
from fedmllm.core.errors import FedmllmError  # noqa: E402
from support.tiny_families import FAMILIES, PORTS, write  # noqa: E402

WHAT = {
    "image": "summed loss of rows with one and two pictures: in one batch as alone",
    "text": "the same for rows without pictures",
    "mixed": "the same for both together",
    "scores": "log-likelihoods of options from a shared cache: in one batch as alone",
    "greedy": "greedy answers: in one batch as alone",
    "gradient": "a finite gradient that is not zero on every lora_B, with and without pictures",
    "dropout": "LoRA dropout of a row: in any batch the same",
    "adapter": "written, read back and set again: the same bits",
}


def column(folder: Path, base: str, checkpointing: bool = False) -> tuple[TransformersBackbone | None, dict[str, str]]:
    precision = Precision.model_validate({"base": base, "gradient_checkpointing": checkpointing})
    try:
        backbone = load_folder(FromFolder(path=str(folder), precision=precision, max_tokens=4096), seed=0)
    except FedmllmError as error:
        return None, dict.fromkeys(NAMES, f"no: {error}")
    return backbone, {c.name: "yes" if c.good else f"NO ({c.seen})" for c in checkup(backbone)}


def main(shared: Path) -> None:
    lines, folders = [], {}
    with tempfile.TemporaryDirectory() as root:
        folders = {family: write(family, Path(root) / family) for family in FAMILIES}
        folders |= {name: shared / "parity" / folder for name, folder in PORTS.items() if (shared / "parity").is_dir()}
        for family, folder in folders.items():
            backbone, seen = column(folder, "float32")
            others = [column(folder, "float32", True)[1], column(folder, "bfloat16")[1], column(folder, "nf4")[1]]
            whole = ["yes" if all(v == "yes" for v in o.values()) else str(o) for o in others]
            assert backbone is not None, seen
            targets = sorted({n.split(".layers.")[1].split(".", 1)[1].rsplit(".", 2)[0] for n in backbone.trainable()})
            lines.append([family, *(seen[name] for name in NAMES), *whole, ", ".join(targets)])
    head = ["family", *NAMES, "checkpointing", "bf16", "NF4", "LoRA on"]
    table = [head, ["---"] * len(head), *lines]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    text = [
        "# Families",
        "",
        "Written by `python scripts/family_table.py`: tiny random models, made there in the hub's layout, loaded by the same",
        f"code as real ones; on the CPU. Versions: {versions}, bitsandbytes {importlib.metadata.version('bitsandbytes')}.",
        "Real weights were not at hand: see the last section.",
        "",
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        "| check | what is equal (float32: to 1e-3 relative; bf16: 5e-2) |",
        "| --- | --- |",
        *(f"| {name} | {what} |" for name, what in WHAT.items()),
        "| checkpointing, bf16, NF4 | all of the above with the base held so |",
        "",
        "Any other family of transformers whose forward pass takes `mm_encoder_outputs` loads by the same code, with an",
        f"attention mask (these go without: {', '.join(sorted(CAUSAL))}); `fedmllm doctor MODEL_DIR` runs this table's",
        "checks on it.",
        "",
        "## Not proven without real weights",
        "",
        "That a hub folder of today has the files and key names that these folders have; that pixels of the PIL image",
        "processors (which are used so that torchvision is not needed) give the accuracy of torchvision's, which differ by up",
        "to 0.016; memory and speed at full size; NF4 and bfloat16 on a GPU; that vLLM serves an adapter (its names are",
        "tested against vLLM's published rules, not against vLLM).",
        "",
    ]
    out = ROOT / "results" / "families.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text("\n".join(text))
    print(out.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared")
