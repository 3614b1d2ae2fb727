"""The verbs over many runs: suite, report, compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmllm.cli.options import Track
from fedmllm.cli.threads import num_threads
from fedmllm.core.errors import FedmllmError
from fedmllm.core.machine import default_threads, usable_bytes

if TYPE_CHECKING:
    from fedmllm.runs.suites.suite import Cell, Suite

SuiteFile = Annotated[Path, typer.Argument(help="Suite file.", metavar="SUITE.toml")]
Jobs = Annotated[int, typer.Option(help="Processes at a time; 0 = one a device.", min=0)]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        help="Spread cells over: cpu, cuda (every card), cuda:1. May be repeated. Default: every card if there are several "
        'and cells have backbone.device = "auto" or "cuda".',
        metavar="NAME",
    ),
]
ThreadsEach = Annotated[
    int, typer.Option(help="Threads a process; 0 = usable cores / jobs, or 1 on a busy machine.", min=0)
]
Memory = Annotated[
    float, typer.Option("--memory-gb", help="Memory for all processes; 0 = 80 % of the usable memory.", min=0)
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="List the cells, what is finished and the expected time; run nothing.")
]
Dry = Annotated[bool, typer.Option("--dry", hidden=True)]  # name of --dry-run in earlier releases
Only = Annotated[
    list[str] | None,
    typer.Option(help="Only cells with this label, or part of one. May be repeated: all must match.", metavar="LABEL"),
]


def suite(
    suite_file: SuiteFile,
    out: Annotated[Path | None, typer.Option(help="Folder of the cells. Default: runs/SUITE.")] = None,
    only: Only = None,
    jobs: Jobs = 0,
    device: Devices = None,
    threads: ThreadsEach = 0,
    memory_gb: Memory = 0.0,
    track: Track = None,
    dry_run: DryRun = False,
    dry: Dry = False,
) -> None:
    """Run a matrix of experiments; started again, it resumes with the unfinished cells."""
    from fedmllm.cli.suite_display import SuiteTable, clock
    from fedmllm.runs.folder import RunFolder
    from fedmllm.runs.suites.devices import find_devices
    from fedmllm.runs.suites.scheduler import run_suite
    from fedmllm.runs.suites.suite import Suite
    from fedmllm.runs.trackers import check_trackers

    loaded = Suite.load(suite_file)
    cells = loaded.select(only or [])
    check_trackers(track or [])
    folder = out or Path("runs") / suite_file.stem
    note_left_out(loaded, suite_file)
    note_others(loaded, suite_file, folder)
    devices = find_devices(device or [], [cell.experiment for cell in cells], jobs)
    jobs = jobs or max(1, len(devices))
    if dry_run or dry:
        show_plan(loaded, cells, folder, jobs)
        return
    started = (RunFolder(folder / cell.run_id) for cell in cells)
    unfinished = (run.record for run in started if not run.is_finished)
    threads = num_threads(threads, unfinished, jobs, default_threads(jobs))
    budget = int(memory_gb * 1e9) or int(0.8 * usable_bytes())
    try:
        with SuiteTable(len(cells)) as table:
            state = run_suite(loaded, folder, jobs, threads, budget, table, cells, track or [], devices)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command resumes with the unfinished cells", err=True)
        raise typer.Exit(130) from None
    took = clock(sum(s for seconds in state.seconds.values() for s in seconds) / jobs)
    typer.echo(f"{loaded.title}: {state.finished} of {len(cells)} cells finished ({state.kept} kept), {took}")
    typer.echo(f"report: fedmllm report {folder}")
    if state.failed:
        counts = Counter(state.failed.values())
        reasons = "\n".join(f"  {count} x {reason}" for reason, count in counts.most_common(5))
        raise FedmllmError(f"{len(state.failed)} cells failed; started again, the suite tries them again:\n{reasons}")


def note_left_out(loaded: Suite, suite_file: Path) -> None:
    """Name the cells that are not run because an earlier one gives their results."""
    if not loaded.left_out:
        return
    keys = ", ".join(dict.fromkeys(key for left in loaded.left_out for key in left.keys))
    typer.echo(
        f"{suite_file}: {len(loaded.left_out)} cells differ from an earlier one only in settings that do not change "
        f"results ({keys}); the earlier one is kept, and these are not run:",
        err=True,
    )
    for left in loaded.left_out:
        typer.echo(f"  {left.cell.label} (kept: {left.kept.label})", err=True)


def note_others(loaded: Suite, suite_file: Path, folder: Path) -> None:
    """Count the finished runs in the folder that are not cells of the suite."""
    from fedmllm.runs.folder import SUMMARY

    ours = {cell.run_id for cell in loaded.cells}
    if others := sum(path.parent.name not in ours for path in folder.glob(f"*/{SUMMARY}")):
        typer.echo(
            f"{folder} also holds {others} finished runs that are not cells of {suite_file}; a report of the folder "
            "includes them",
            err=True,
        )


def show_plan(loaded: Suite, cells: Sequence[Cell], folder: Path, jobs: int) -> None:
    """Print the cells, what is finished, and the expected time of the others."""
    from fedmllm.cli.suite_display import clock
    from fedmllm.runs.folder import RunFolder
    from fedmllm.runs.suites.estimate import estimate

    to_run = []
    for cell in cells:
        finished = RunFolder(folder / cell.run_id).is_finished
        typer.echo(f"{cell.run_id} {'finished' if finished else 'to run':8} {cell.label}")
        to_run += [] if finished else [cell]
    expected = estimate(loaded.cells, to_run, folder)
    time = clock(expected.seconds / max(1, min(jobs, len(to_run))))
    if len(expected.unknown) == len(to_run) > 0:
        time = "unknown: no cell of these methods is finished"
    elif expected.unknown:
        methods = ", ".join(dict.fromkeys(cell.experiment.method_name() for cell in expected.unknown))
        time = f"more than {time}: unknown for {len(expected.unknown)} cells ({methods})"
    typer.echo(f"cells: {len(cells)}, finished: {len(cells) - len(to_run)}, to run: {len(to_run)}")
    typer.echo(f"estimated time: {time}")


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of suites or runs, or their .tar.xz.", metavar="DIR...")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The page, or a .md, .tex or .csv file. Default: report.html in the first folder."),
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="html (page, Markdown and CSV), markdown, latex or csv. Default: by --out.")
    ] = "",
) -> None:
    """Write an HTML page, Markdown, LaTeX and CSV tables from the records of runs."""
    from fedmllm.reports.write import write_report

    for path in write_report(folders, out, format_):
        typer.echo(str(path))


Side = typer.Argument(help="Folder of a run, or of several that differ in seed.", show_default=False)


def compare(a: Annotated[Path, Side], b: Annotated[Path, Side]) -> None:
    """Compare two runs, or groups of runs: their settings, their differences, and whether these are established."""
    from fedmllm.reports.compare import compare as start
    from fedmllm.reports.compare import show_comparison

    show_comparison(start([a], [b]))
