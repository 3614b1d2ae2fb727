"""One compressed file for a suite's folder.

Reports read it as they read the folder.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from fedmllm.core.errors import FedmllmError
from fedmllm.core.storage import writing
from fedmllm.runs.folder import PREDICTIONS, RECORD, SUMMARY, RunFolder
from fedmllm.runs.predictions import last_evaluations
from fedmllm.runs.suites.suite import SUITE

ARCHIVE = ".tar.xz"
_NAMES = (SUITE, RECORD, SUMMARY, PREDICTIONS)  # what a report reads


def pack_results(folder: Path, out: Path, predictions: bool = False) -> int:
    """Write the finished runs of a folder, with the list of its suite, into one file.

    The same runs give the same bytes. Unpacked with `tar -xf`, the file is a folder in which `fedmllm suite` continues.

    Args:
        folder: Folder of a suite, with a folder for each run.
        out: The file; its name ends with ".tar.xz".
        predictions: Pack the predictions of the last evaluations too. They name test rows, their answers and kept columns.

    Returns:
        The number of runs.

    Raises:
        FedmllmError: The folder has no finished run, the name has another ending, or the file cannot be written.
    """
    if not out.name.endswith(ARCHIVE):
        raise FedmllmError(f"{out}: the name of an archive ends with {ARCHIVE}")
    runs = sorted(path.parent for path in folder.glob(f"*/{SUMMARY}"))
    if not runs:
        raise FedmllmError(f"{folder}: no finished run (a folder with {RECORD} and {SUMMARY})")
    suite = [folder / SUITE] if (folder / SUITE).is_file() else []  # runs without a suite have no labels
    files = [*suite, *(run / name for run in runs for name in (RECORD, SUMMARY))]
    kept = [path for run in runs if (path := RunFolder(run).predictions).is_file()] if predictions else []
    with writing(out), tarfile.open(out, "w:xz", preset=9) as archive:
        for path in (*files, *kept):
            data = last_evaluations(path) if path in kept else path.read_bytes()
            about = tarfile.TarInfo(path.relative_to(folder).as_posix())
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return len(runs)


@contextmanager
def unpacked(places: Sequence[Path]) -> Iterator[list[Path]]:
    """The places, with a temporary folder for each archive among them, which lasts as long as the block.

    Args:
        places: Folders, and files that `pack_results` wrote.

    Yields:
        One folder for each place.

    Raises:
        FedmllmError: A file is damaged, or holds a path outside its own folder.
    """
    with tempfile.TemporaryDirectory(prefix="fedmllm-") as temporary:
        found = []
        for number, place in enumerate(places):
            if place.name.endswith(ARCHIVE) and place.is_file():
                found.append(_unpack(place, Path(temporary) / str(number)))
            else:
                found.append(place)
        yield found


def _unpack(archive: Path, folder: Path) -> Path:
    """Write the files that a report reads; whatever else the archive holds is left in it."""
    try:
        with tarfile.open(archive, "r:xz") as file:
            for member in file:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise FedmllmError(f"{archive}: {member.name!r} is a path outside the archive's folder")
                content = file.extractfile(member) if path.name in _NAMES else None
                if content is not None:
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_bytes(content.read())
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise FedmllmError(f"{archive}: not an archive of results: {error}") from None
    folder.mkdir(exist_ok=True)  # an archive without any of the files is an empty folder
    return folder
