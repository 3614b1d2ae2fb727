"""The verbs over many runs: suite, report, compare."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from fedmllm.core.errors import FedmllmError

SuiteFile = Annotated[Path, typer.Argument(help="Suite file.", metavar="SUITE.toml")]
Jobs = Annotated[int, typer.Option(help="Processes at a time.", min=1)]
Threads = Annotated[int, typer.Option(help="Threads a process; 0 = cores / jobs.", min=0)]
Memory = Annotated[
    float, typer.Option("--memory-gb", help="Memory for all processes; 0 = 80 % of the machine's.", min=0)
]
Dry = Annotated[bool, typer.Option("--dry", help="List the cells and what is finished; run nothing.")]


def suite(
    suite_file: SuiteFile,
    out: Annotated[Path | None, typer.Option(help="Folder of the cells. Default: runs/SUITE.")] = None,
    jobs: Jobs = 1,
    threads: Threads = 0,
    memory_gb: Memory = 0.0,
    dry: Dry = False,
) -> None:
    """Run a matrix of experiments; started again, it resumes with the unfinished cells."""
    from fedmllm.cli.suite_display import SuiteTable, clock
    from fedmllm.runs.folder import SUMMARY, RunFolder
    from fedmllm.runs.suites.scheduler import physical_bytes, run_suite
    from fedmllm.runs.suites.suite import Suite

    loaded = Suite.load(suite_file)
    folder = out or Path("runs") / suite_file.stem
    ours = {cell.run_id for cell in loaded.cells}
    if others := sum(path.parent.name not in ours for path in folder.glob(f"*/{SUMMARY}")):
        typer.echo(
            f"{folder} also holds {others} finished runs that are not cells of {suite_file}; a report of the folder "
            "includes them",
            err=True,
        )
    if dry:
        for cell in loaded.cells:
            mark = "finished" if RunFolder(folder / cell.run_id).is_finished else "to run"
            typer.echo(f"{cell.run_id} {mark:8} {cell.label}")
        return
    num_threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    budget = int(memory_gb * 1e9) or int(0.8 * physical_bytes())
    try:
        with SuiteTable(len(loaded.cells)) as table:
            state = run_suite(loaded, folder, jobs, num_threads, budget, table)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command resumes with the unfinished cells", err=True)
        raise typer.Exit(130) from None
    took = clock(sum(s for seconds in state.seconds.values() for s in seconds) / jobs)
    typer.echo(f"{loaded.title}: {state.finished} of {len(loaded.cells)} cells finished ({state.kept} kept), {took}")
    typer.echo(f"report: fedmllm report {folder}")
    if state.failed:
        counts = Counter(state.failed.values())
        reasons = "\n".join(f"  {count} x {reason}" for reason, count in counts.most_common(5))
        raise FedmllmError(f"{len(state.failed)} cells failed; started again, the suite tries them again:\n{reasons}")


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of suites or runs.", metavar="DIR...")],
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
    """What differs between two runs, or groups of runs, and whether their results differ by more than noise."""
    from fedmllm.reports.compare import compare as start
    from fedmllm.reports.compare import show

    show(start([a], [b]))
