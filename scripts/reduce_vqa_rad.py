"""Write examples/vqa_rad: VQA-RAD with pictures of at most 336 pixels a side.

    python scripts/reduce_vqa_rad.py FOLDER [--out examples/vqa_rad]

FOLDER holds trainset.json, testset.json and images/ of the set (CC0 1.0, osf.io/89kps). The question files are copied as they
are; pictures that no question names are left out. The same input gives the same bytes with the same version of Pillow.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import PIL
from PIL import Image

MAX_SIDE = 336  # pixels: what the vision towers of LLaVA and of MiniCPM-V read in one piece
QUALITY = 80  # of JPEG
TABLES = ("trainset.json", "testset.json")
SOURCE = """\
# VQA-RAD, reduced

Lau et al., "A dataset of clinically generated visual questions and answers about radiology images", 2018,
doi:10.1038/sdata.2018.251. Source: <https://osf.io/89kps>. Licence: CC0 1.0.

{count} radiology pictures, and the questions of {tables}: 3,064 + 451 rows in the form of MEVF and
later work. The question files are unchanged. `scripts/reduce_vqa_rad.py` (Pillow {pillow}) reduced the pictures to at most
{side} pixels a side and saved them as JPEG of quality {quality}, grey if they are grey; it left out those that no question
names. Not for clinical use, and not for comparison with results on full resolution.

- 1,267 training rows with `phrase_type` "frame" are not used: 1,797 + 451 rows remain.
- 21 of the 272 CLOSED test rows have another answer than yes or no.
- 202 pictures stand in both train and test, as in the published split.

sha256 of the question files:
{digests}
"""


def reduce_picture(source: Path, target: Path) -> None:
    """Save a picture with its longer side at most MAX_SIDE pixels."""
    with Image.open(source) as image:
        image.load()
        reduced = image.convert("L" if image.mode in ("L", "1", "I;16") else "RGB")
    red, *others = reduced.split()
    if all(band.tobytes() == red.tobytes() for band in others):
        reduced = red  # grey pixels in three bands
    reduced.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    reduced.save(target, "JPEG", quality=QUALITY, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("examples/vqa_rad"))
    arguments = parser.parse_args()
    images = arguments.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    names, digests = set(), []
    for table in TABLES:
        raw = (arguments.folder / table).read_bytes()
        names |= {row["image_name"] for row in json.loads(raw)}
        digests.append(f"- {table}: {hashlib.sha256(raw).hexdigest()}")
        shutil.copyfile(arguments.folder / table, arguments.out / table)
    for name in sorted(names):
        reduce_picture(arguments.folder / "images" / name, images / name)
    about = {"count": len(names), "tables": " and ".join(TABLES), "digests": "\n".join(digests)}
    text = SOURCE.format(**about, side=MAX_SIDE, quality=QUALITY, pillow=PIL.__version__)
    (arguments.out / "SOURCE.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
