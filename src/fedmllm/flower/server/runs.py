"""Runs over real sites, started again after SuperLink was killed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.storage import make_folder, write_atomically
from fedmllm.flower.server.experiment import over_sites
from fedmllm.flower.server.folder import Server
from fedmllm.flower.server.superlink import LOG, START_S
from fedmllm.flower.server.watch import Watch
from fedmllm.runs.folder import RunFolder
from fedmllm.runs.record import read

RESTARTS = 5  # of a run that was lost with its SuperLink
STOPPED = "ServerApp failed with exception: "  # Flower's words before the reason of a run that stopped by itself


def run_over_sites(
    server: Server, experiment: Experiment, out: Path, resume: bool, test: bool, only: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Run an experiment over the registered sites.

    A run that a killed SuperLink took with it is started again from its last finished round, `RESTARTS` times at most.

    Args:
        server: Its SuperLink should be running, and is waited for.
        experiment: As loaded from TOML.
        out: Folder of the run.
        resume: Continue the run in `out`; one that has finished is left as it is.
        test: Whether this machine has the test rows.
        only: Names of the sites that take part; () = all.

    Yields:
        The record's events as they come, and "submitted", "lost", "waiting" and "finished" events of this machine.

    Raises:
        ConfigError: The experiment does not fit the sites, or `resume` with other settings.
        FedmllmError: The run stopped for a reason of its own, or was lost too often.
    """
    sites = {k: v for k, v in server.sites().items() if not only or k in only}
    if unknown := sorted({*only} - {*sites}):
        raise ConfigError(f"--site: got {', '.join(unknown)}; registered: {', '.join(server.sites()) or 'none'}")
    if not sites:
        raise ConfigError("no site is registered; `fedmllm server add` registers one")
    whole = over_sites(experiment, tuple(sites), test)
    try:
        make_folder(out)
    except OSError as error:
        raise FedmllmError(f"--out: {out}: cannot be made: {error.strerror}") from None
    folder = RunFolder(out.absolute())
    record = folder.record
    if record.exists() and not resume:
        raise FedmllmError(f"{record} exists. Pass --resume to continue that run, or choose another --out")
    if resume and has_finished(folder, whole):
        yield {"event": "finished"}
        return
    if not server.is_reachable():
        yield {"event": "waiting", "port": server.listen.port, "seconds": 2 * START_S}
    num_seen = sum(1 for _ in read(record)) if record.exists() else 0
    for attempt in range(RESTARTS + 1):
        job = write_job(out, whole, sites, resume or attempt > 0)
        run_id = server.submit(job, 2 * START_S)
        yield {"event": "submitted", "run": run_id, "attempt": attempt + 1}
        watch = Watch(server.status, run_id, record)
        try:
            ended = False
            while not ended:
                ended = watch.ended()
                events = list(read(record)) if record.exists() else []
                num_seen = min(num_seen, len(events))  # a resumed record is truncated to its checkpoint
                yield from events[num_seen:]
                num_seen = len(events)
                if events and events[-1].get("event") == "end" and folder.is_finished:
                    return
                time.sleep(0.5)
        except (KeyboardInterrupt, GeneratorExit):
            server.cancel(run_id)
            raise
        if watch.details.startswith(STOPPED):  # SuperLink lived to report it: the run's own reason
            raise FedmllmError(watch.details.removeprefix(STOPPED))
        yield {"event": "lost", "status": watch.status, "note": f"log: {server.folder / LOG}"}
    log = server.folder / LOG
    raise FedmllmError(f"the run was lost {RESTARTS + 1} times; see {log}. Pass --resume to continue it")


def has_finished(folder: RunFolder, experiment: Experiment) -> bool:
    """Return whether the run in a folder has finished with these settings and sites.

    Raises:
        ConfigError: It has other settings or sites.
    """
    from fedmllm.runs.resume import Resume  # imports torch, which a new run does not need in this process

    return Resume.find(folder, experiment).folder.is_finished


def write_job(out: Path, experiment: Experiment, nodes: Mapping[str, int], resume: bool) -> Path:
    """Write the arguments of the ServerApp, as `server_app.Job` reads them -> the file."""
    path = out.absolute() / "job.json"
    places = {"out": str(out.absolute()), "folder": str(Path.cwd())}
    job = {"experiment": experiment.dump(), "nodes": dict(nodes), "resume": resume, **places}
    write_atomically(path, json.dumps(job))
    return path
