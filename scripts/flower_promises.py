"""Promises of a federation without failures: the same bytes, closed doors, no code at a site, nothing that leaves it
unasked. Cases of `scripts/flower_trial.py`.
"""

from __future__ import annotations

import shutil
import signal
import ssl
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from flower_federation import NAMES, addresses, dropped, expect, federation

from fedmllm.flower.server.folder import Server

PATHS = (
    "/v1/fleet/pull-messages",
    "/v1/control/start-run",
    "/v1/control/list-runs",
    "/v1/runtime/acquire-task",
    "/docs",
)


def same_bytes(backbone: str) -> str:
    """Three rounds over three sites give the bytes of one process, for FedAvg and FedAdam; the base is loaded once a site."""
    with federation(backbone) as f:
        f.start()
        said = []
        for name in ("fedavg", "fedadam"):
            f.run(name, "--set", f'aggregator="{name}"')
            expect(
                f.digest(name) == f.in_process("--set", f'aggregator="{name}"'),
                f"{name}: other bytes than in one process",
            )
            said.append(
                f"{name} sha256 {f.digest(name)[:16]}, rounds of {[round(r['wall_s'], 1) for r in f.rounds(name)]} s"
            )
        loads = [
            line for name in NAMES for line in (f.folder / f"{name}.out").read_text().splitlines() if "loaded" in line
        ]
        expect(len(loads) == 18 and all("loaded 1 time(s)" in line for line in loads), loads)
        return f"{'; '.join(said)}; 1 load a site"


def closed_door(backbone: str) -> str:
    """Check that the gate passes the sites' path and no other, and that a site without a registered key is refused."""
    import httpx

    with federation(backbone) as f:
        f.start()
        outside = httpx.Client(verify=ssl.create_default_context(cafile=str(f.folder / "server" / "ca.crt")))
        there = {path: outside.post(f"https://127.0.0.1:{f.gate}{path}").status_code for path in PATHS}
        inside = {path: outside.post(f"https://127.0.0.1:{f.port}{path}").status_code for path in PATHS}
        expect(all(there[path] == 404 for path in PATHS if "fleet" not in path), there)
        expect(there["/v1/fleet/pull-messages"] not in (200, 404) and 404 not in inside.values(), (there, inside))
        f.call("site", "new", "stranger", "--name", "east")
        (f.folder / "stranger/site.toml").write_text((f.folder / "east/site.toml").read_text())
        (f.folder / "stranger/ca.crt").write_bytes((f.folder / "server/ca.crt").read_bytes())
        f.site("stranger")
        log = f.folder / "stranger/site-state/supernode.log"
        f.until(lambda: log.exists() and "SuperNode" in log.read_text() and f.processes["stranger"].poll() is None, 30)
        time.sleep(15)
        expect("SuperNode ID" not in log.read_text(), log.read_text())
        said = next(line for line in (f.folder / "stranger.out").read_text().splitlines() if "SuperNode ended" in line)
        return f"outside {there}, inside {inside}; the stranger's log: {said[9:300]}"


def twice(backbone: str) -> str:
    """Two processes with one site's key: the second is rejected, the first continues. One folder twice: refused at once."""
    with federation(backbone, rounds=2) as f:
        f.start()
        logs = [f.folder / name / "site-state" / "supernode.log" for name in NAMES]
        f.until(lambda: all(log.exists() and "SuperNode ID" in log.read_text() for log in logs), 60)
        shutil.copytree(f.folder / "east", f.folder / "copy", ignore=shutil.ignore_patterns("site-state"))
        f.site("copy")
        f.run()
        copy = (f.folder / "copy.out").read_text()
        said = next(line for line in copy.splitlines() if "SuperNode ended" in line)
        expect(
            f.events()[-1]["event"] == "end" and not dropped(f.rounds()) and "trained" not in copy,
            (said, f.events()[-1]),
        )
        try:
            f.call("site", "start", "east/site.toml")
        except RuntimeError as error:
            expect("another process serves it already" in str(error), error)
            return said[9:300]
        raise AssertionError("a second process served the same folder")


def loopback(backbone: str) -> str:
    """During a run none of the processes listens on anything but loopback, or is connected to anything else."""
    with federation(backbone) as f:
        f.start()
        thread, seen = f.background_run(), set()
        while thread.is_alive():
            seen |= addresses({pid for name in f.processes for pid in (f.processes[name].pid, *f.children(name, ""))})
            time.sleep(0.3)
        expect(f.events()[-1]["event"] == "end" and seen == {"127.0.0.1"}, (seen, f.events()[-1]))
        return f"{len(f.processes)} processes with all below them, a run of 3 rounds: {sorted(seen)}"


def lives(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def leftovers(backbone: str) -> str:
    """kill -9 of the server and of a site in the middle of a run, Ctrl-C of the others: nothing that they started remains."""
    with federation(backbone, rounds=50) as f:
        f.start()
        f.background_run()
        f.until(f.rounds, 200)
        below = {name: f.children(name, "") for name in f.processes}
        expect(any(f.children("server", "flwr-serverapp")), "no ServerApp")
        for name, sign in {
            "server": signal.SIGKILL,
            "east": signal.SIGKILL,
            "north": signal.SIGINT,
            "west": signal.SIGTERM,
        }.items():
            f.processes[name].send_signal(sign)
        pids = [pid for found in below.values() for pid in found]
        f.until(lambda: not any(map(lives, pids)) and all(p.poll() is not None for p in f.processes.values()), 30)
        counts = {name: len(found) for name, found in below.items()}
        codes = {name: p.returncode for name, p in f.processes.items()}
        return f"processes below each: {counts}; none left; exit status {codes}"


def no_code(backbone: str) -> str:
    """A user who may start runs on the server still cannot run code at a site: the app that came with a run is not opened."""
    with federation(backbone) as f:
        f.start()
        logs = [f.folder / name / "site-state" / "supernode.log" for name in NAMES]
        f.until(lambda: all(log.exists() and "SuperNode ID" in log.read_text() for log in logs), 60)
        app = f.folder / "evil"
        app.mkdir()
        marker, seen = f.folder / "code-ran-at-a-site", f.folder / "replies.txt"
        settings = '[project]\nname = "evil"\nversion = "1.0.0"\n[tool.flwr.app]\npublisher = "x"\n'
        parts = '[tool.flwr.app.components]\nserverapp = "harm:server"\nclientapp = "harm:client"\n'
        (app / "pyproject.toml").write_text(settings + parts)
        (app / "harm.py").write_text(HARM.format(marker=str(marker), seen=str(seen)))
        Server(f.folder / "server").flwr("run", str(app), "fedmllm")
        f.until(seen.exists, 120)
        time.sleep(1)
        replies = seen.read_text()
        expect(not marker.exists() and replies.count("request cannot be read") == 3, replies)
        return f"no code ran at a site; their answers: {replies.splitlines()[0]}"


HARM = """
import pathlib
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    pathlib.Path({marker!r}).write_text("here")
    return Message(RecordDict(), reply_to=message)


@server.main()
def main(grid, context):
    asked = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(asked, timeout=60)
    said = [str(r.error if r.has_error() else dict(r.content["about"])) for r in replies]
    pathlib.Path({seen!r}).write_text("\\n".join(said))
"""


def reticent(backbone: str) -> str:
    """Sites that report no metric at all, and a server without test rows: the run ends, and the record holds neither."""
    with federation(backbone, rounds=2) as f:
        f.start(allow="metrics = []")
        events = f.run("out", "--no-test")
        expect(events[-1]["event"] == "end" and len(f.rounds()) == 2, events[-1])
        keys = {key for event in f.rounds() for client in event["clients"] for key in client}
        expect(keys == {"client", "num_examples", "norm"}, keys)
        values = [v for event in events if event["event"] == "eval" for v in event["metrics"].values()]
        expect(not any(values), values)
        return f"of a client the record knows {sorted(keys)}"


def refusals(backbone: str) -> str:
    """A request outside of what the sites allow is refused, the reason reaches the record, and the run stops."""
    with federation(backbone, engine="attempts = 1", train="max_steps = 0\nepochs = 10") as f:
        f.start(allow='[allow.settings]\n"train.lr" = { max = 1e-3 }\n"prompt.name" = ["agnostic"]')
        last = f.run()[-1]
        expect(last["event"] == "stopped", last)
        for part in (
            "refused by site north",
            "more optimiser steps than allow.max_steps = 20",
            "train.lr = 0.003",
            "'agnostic'",
        ):
            expect(part in last["reason"], last["reason"])
        return last["reason"][:400]
