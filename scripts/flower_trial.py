"""Failures of a real federation, one after another: SuperLink, three sites, TLS and keys, on loopback.

    python scripts/flower_trial.py                 all cases
    python scripts/flower_trial.py same-bytes ...  these

Each case starts its own federation in a fresh folder, does the harm, and checks what the record says. Everything is
stopped at its end. A case takes one to four minutes: Flower notices a dead SuperNode after 60 s.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fedmllm.engines.flower_processes import die_with_parent, free_port, stop
from fedmllm.engines.flower_superlink import Server
from fedmllm.record import read

NAMES = ("east", "north", "west")
CASE_S = 900.0  # a command, at most
PATIENCE = 3.0  # for machines that are busy with other things
PATHS = (
    "/v1/fleet/pull-messages",
    "/v1/control/start-run",
    "/v1/control/list-runs",
    "/v1/runtime/acquire-task",
    "/docs",
)
FEDMLLM = [sys.executable, "-m", "fedmllm.cli"]


class Federation:
    """A server and three sites below `folder`; rows and pictures are drawn."""

    def __init__(
        self, folder: Path, backbone: str, rounds: int = 3, engine: str = "", train: str = "max_steps = 2"
    ) -> None:
        self.folder, self.backbone, self.port, self.gate = folder, backbone, free_port(), free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.limit_s = CASE_S  # of a command
        self._draw()
        self._experiment(rounds, engine, train)

    def _draw(self) -> None:
        rng = np.random.default_rng(0)
        header = ["image", "text", "answer", "site"]
        rows: dict[str, list[list[str]]] = {name: [] for name in (*NAMES, "test")}
        (self.folder / "pictures").mkdir(parents=True)
        for name, own in rows.items():
            for i in range(8 if name == "test" else 12):
                path = self.folder / "pictures" / f"{name}-{i}.png"
                Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(path)
                own.append([f"pictures/{path.name}", f"finding {rng.integers(100)}", ("no", "yes")[i % 2], name])
        tables = {**{name: rows[name] for name in NAMES}, "test": rows["test"]}
        tables["train"] = [row for name in NAMES for row in rows[name]]  # what one machine would hold, for comparison
        for name, table in tables.items():
            with (self.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([header, *table])

    def _data(self, train: str) -> str:
        columns = '{ image = "image", text = "text", answer = "answer", client = "site", question = "", choices = "" }'
        question = 'question = "Is it there?"\nchoices = ["no", "yes"]'
        files = f'root = "{self.folder}"\ntrain = "{train}.csv"\ntest = "test.csv"'
        return f'[data]\nname = "table"\n{files}\n{question}\ncolumns = {columns}\n'

    def _experiment(self, rounds: int, engine: str, train: str) -> None:
        head = f'num_rounds = {rounds}\ncohort_size = 3\npartition = {{ name = "by-column", column = "client" }}\n'
        body = f"[train]\nlr = 3e-3\nbatch_size = 4\naccumulation = 1\n{train}\n[backbone]\n{self.backbone}\n"
        sites = f'[engine]\nname = "flower-sites"\nround_timeout_s = 150\nretry_s = 5\nconnect_s = 120\n{engine}\n'
        (self.folder / "experiment.toml").write_text(head + self._data("train") + body + sites, encoding="utf-8")

    def call(self, *words: str) -> str:
        done = subprocess.run(
            [*FEDMLLM, *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=self.limit_s,
        )
        if done.returncode:
            raise RuntimeError(f"fedmllm {' '.join(words)}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
        return done.stdout

    def spawn(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, preexec_fn=die_with_parent
            )

    def start(self, bad: dict[str, str] | None = None, allow: str = "") -> None:
        self.call("server", "new", "server", "--port", str(self.port), "--gate", f"127.0.0.1:{self.gate}")
        self.spawn("server", *FEDMLLM, "server", "start", "server")
        self.until(lambda: "SuperLink on" in (self.folder / "server.out").read_text(), 60)
        for name in NAMES:
            self.call("site", "new", name, "--name", name, "--server", f"127.0.0.1:{self.gate}")
            (self.folder / name / "ca.crt").write_bytes((self.folder / "server" / "ca.crt").read_bytes())
            head = f'name = "{name}"\nserver = "127.0.0.1:{self.gate}"\nca = "ca.crt"\nkey = "site.key"\nthreads = 1\n'
            tables = f"{self._data(name)}[backbone]\n{self.backbone}\n[allow]\nmax_steps = 20\n{allow}\n"
            (self.folder / name / "site.toml").write_text(head + tables, encoding="utf-8")
            self.call("server", "add", "server", name, f"{name}/site.key.pub")
            self.site(name, (bad or {}).get(name, ""))

    def site(self, name: str, bad: str = "") -> None:
        command = (
            [sys.executable, str(Path(__file__).with_name("flower_bad_site.py")), bad]
            if bad
            else [*FEDMLLM, "site", "start"]
        )
        self.spawn(name, *command, f"{name}/site.toml")

    def run(self, out: str = "out", *words: str) -> list[dict]:
        with contextlib.suppress(RuntimeError):
            self.call("server", "run", "server", "experiment.toml", "--out", out, *words)
        return self.events(out)

    def background_run(self, out: str = "out") -> threading.Thread:
        thread = threading.Thread(target=self.run, args=(out,), daemon=True)
        thread.start()
        return thread

    def events(self, out: str = "out") -> list[dict]:
        record = self.folder / out / "record.jsonl"
        return list(read(record)) if record.exists() else []

    def rounds(self, out: str = "out") -> list[dict]:
        return [event for event in self.events(out) if event["event"] == "round"]

    def until(self, condition: Callable[[], object], seconds: float) -> None:
        end = time.monotonic() + seconds * PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds:.0f} s")
            time.sleep(0.2)

    def children(self, name: str, needle: str) -> list[int]:
        """Ids of the processes below the process `name` whose command line holds `needle`."""
        found, parents = [], {self.processes[name].pid}
        table = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                ppid = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                table.append((int(entry.name), ppid, (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()))
        for pid, ppid, line in sorted(table):
            if ppid in parents:
                parents.add(pid)
                found += [pid] if needle in line else []
        return found

    def harm(self, name: str, needle: str, sign: int = signal.SIGKILL) -> None:
        for pid in self.children(name, needle):
            os.kill(pid, sign)

    def digest(self, out: str = "out") -> str:
        return hashlib.sha256((self.folder / out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()

    def in_process(self) -> str:
        """Digest of the adapter that one process makes of the same rows, without a stop."""
        self.call("run", "experiment.toml", "--engine", "in-process", "--out", "in-process")
        return self.digest("in-process")

    def kill_site(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    def close(self) -> None:
        for process in reversed(self.processes.values()):
            stop(process, 10)


@contextlib.contextmanager
def federation(backbone: str, **settings: object) -> Iterator[Federation]:
    with tempfile.TemporaryDirectory(prefix="fedmllm-trial-") as folder:
        made = Federation(Path(folder), backbone, **settings)  # type: ignore[arg-type]
        try:
            yield made
        except BaseException:
            for log in sorted(Path(folder).glob("*.out")):
                print(f"--- {log.name}\n{log.read_text()[-1500:]}")
            print(f"--- superlink.log\n{(Path(folder) / 'server/superlink.log').read_text()[-1500:]}")
            raise
        finally:
            made.close()


def expect(condition: bool, what: object) -> None:
    if not condition:
        raise AssertionError(str(what))


def dropped(rounds: list[dict]) -> list[str]:
    return [f"round {r['round']}, client {d['client']}: {d['reason']}" for r in rounds for d in r["dropped"]]


def same_bytes(backbone: str) -> str:
    """Three rounds over three sites give the bytes of one process; the base is loaded once a site."""
    with federation(backbone) as f:
        f.start()
        f.run()
        expect(f.digest() == f.in_process(), "other bytes than in one process")
        loads = [
            line for name in NAMES for line in (f.folder / f"{name}.out").read_text().splitlines() if "loaded" in line
        ]
        expect(len(loads) == 9 and all("loaded 1 time(s)" in line for line in loads), loads)
        return f"sha256 {f.digest()[:16]}, 3 rounds of {[round(r['wall_s'], 1) for r in f.rounds()]} s, 1 load a site"


def closed_door(backbone: str) -> str:
    """What sites reach lets their path through and no other; a site without a registered key gets nowhere."""
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
        said = log.read_text().strip().splitlines()[-1][-200:]
        return f"outside {there}, inside {inside}; the stranger's SuperNode: {said}"


def no_code(backbone: str) -> str:
    """Whoever may start runs on the server still cannot run code at a site: the app that came with a run is not opened."""
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
    """Sites that tell no metric at all, and a server without test rows: the run ends, and the record holds neither."""
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
            "30 optimiser steps; this site allows 20",
            "train.lr = 0.003",
            "'agnostic'",
        ):
            expect(part in last["reason"], last["reason"])
        return last["reason"][:400]


def client_raises(backbone: str) -> str:
    """A site whose data cannot be read: named with the row, the round goes on with the others."""
    with federation(backbone) as f:
        f.start()
        for picture in (f.folder / "pictures").glob("north-*.png"):
            picture.write_bytes(b"no picture")
        f.run()
        said = dropped(f.rounds())
        expect(
            len(said) == 3 and all("client 1: site north: training failed with DataError" in line for line in said),
            said,
        )
        expect("north-11.png cannot be read" in (f.folder / "north.out").read_text(), "the site's own log is silent")
        expect("png" not in (f.folder / "out" / "record.jsonl").read_text(), "a name of a file left the site")
        return said[0]


def trainer_killed(backbone: str) -> str:
    """kill -9 of a training process: named at once, the round goes on, the next one has the site again."""
    with federation(backbone) as f:
        f.start()
        thread = f.background_run()
        f.until(lambda: f.rounds(), 200)
        f.harm("north", "flower_trainer", signal.SIGSTOP)  # so that it is killed in the middle of a round
        f.until(lambda: len(f.events()) and time.sleep(6) is None, 10)
        f.harm("north", "flower_trainer")
        thread.join(CASE_S)
        said = dropped(f.rounds())
        expect(len(f.rounds()) == 3 and len(said) == 1 and "trainer died" in said[0], said)
        return said[0]


def supernode_killed(backbone: str) -> str:
    """kill -9 of a SuperNode in the middle of a round: the site starts it anew, the round goes on, the site is back."""
    with federation(backbone, rounds=4) as f:
        f.start()
        thread = f.background_run()
        f.until(lambda: f.rounds(), 200)
        f.harm("north", "flower_trainer", signal.SIGSTOP)
        time.sleep(6)
        f.harm("north", "flower-supernode")
        f.harm("north", "flower_trainer", signal.SIGCONT)
        thread.join(CASE_S)
        rounds = f.rounds()
        said = dropped(rounds)
        expect(len(rounds) == 4 and 1 <= len(said) <= 2, said)
        expect(any(c["client"] == 1 for c in rounds[-1]["clients"]), rounds[-1])
        return f"{said}; the round took {max(r['wall_s'] for r in rounds):.0f} s"


def straggler(backbone: str) -> str:
    """A site that is slower than the round's time: left out and named; its late answer is dropped; it takes part again."""
    with federation(
        backbone, rounds=3, engine="round_timeout_s = 25".replace("round_timeout_s", "round_timeout_s")
    ) as f:
        toml = (f.folder / "experiment.toml").read_text().replace("round_timeout_s = 150\n", "")
        (f.folder / "experiment.toml").write_text(toml)
        f.start()
        thread = f.background_run()
        f.until(lambda: f.rounds(), 200)
        f.harm("north", "flower_trainer", signal.SIGSTOP)
        f.until(lambda: len(f.rounds()) > 1, 90)
        f.harm("north", "flower_trainer", signal.SIGCONT)
        thread.join(CASE_S)
        said = dropped(f.rounds())
        expect(len(f.rounds()) == 3 and len(said) == 1 and "no answer within 25 s" in said[0], said)
        expect(any(c["client"] == 1 for c in f.rounds()[-1]["clients"]), f.rounds()[-1])
        return said[0]


def superlink_killed(backbone: str) -> str:
    """kill -9 of SuperLink in the middle of a run: it and the run start again by themselves; same bytes."""
    with federation(backbone, rounds=5, engine="min_sites = 3") as f:
        f.start()
        thread = f.background_run()
        f.until(lambda: len(f.rounds()) > 1, 200)
        f.harm("server", "flower-superlink")
        thread.join(CASE_S)
        kinds = [event["event"] for event in f.events()]
        expect(kinds.count("round") == 5 and "resumed" in kinds and kinds[-1] == "end", kinds)
        expect(f.digest() == f.in_process(), "other bytes than without a stop")
        return f"{kinds}; sha256 {f.digest()[:16]} as without a stop"


def bad_updates(backbone: str) -> str:
    """NaN, wrong shapes, a norm beyond the limit: left out of the sum and named in the record; the others go on."""
    with federation(backbone, rounds=1) as f:
        toml = f.folder / "experiment.toml"
        toml.write_text(toml.read_text() + "\n[screen]\nmax_norm = 100\n")
        f.start(bad={"east": "nan", "north": "shapes", "west": "norm"})
        f.run()
        said = dropped(f.rounds())
        for part in ("NaN", "shape", "max_norm"):
            expect(any(part in line for line in said), said)
        return "; ".join(said)


def too_few(backbone: str) -> str:
    """Two of three sites are gone: the round is repeated, then the run stops resumably; with them back it ends as ever."""
    with federation(backbone, rounds=4, engine="min_sites = 3\nattempts = 2") as f:
        toml = f.folder / "experiment.toml"
        toml.write_text(toml.read_text().replace("connect_s = 120", "connect_s = 10"))
        f.start()
        thread = f.background_run()
        f.until(lambda: len(f.rounds()) > 1, 200)
        f.kill_site("north")
        f.kill_site("west")
        thread.join(CASE_S)
        last = f.events()[-1]
        expect(last["event"] == "stopped" and "engine.min_sites is 3, after 2 attempts" in last["reason"], last)
        for name in ("north", "west"):
            f.site(name)
        toml.write_text(toml.read_text().replace("connect_s = 10", "connect_s = 120"))
        f.run("out", "--resume")
        expect(f.digest() == f.in_process(), "other bytes than without a stop")
        return f"{last['reason'][:200]}; resumed, sha256 {f.digest()[:16]} as without a stop"


def at_random(backbone: str) -> str:
    """Twenty rounds while one site at a time is killed and started again at random: all rounds finish."""
    with federation(backbone, rounds=20, engine="min_sites = 2\nattempts = 5") as f:
        f.start()
        f.limit_s = 2400
        thread, rng, kills = f.background_run(), np.random.default_rng(0), 0
        f.until(lambda: f.rounds(), 200)
        while thread.is_alive() and len(f.rounds()) < 18:
            name = NAMES[rng.integers(3)]
            time.sleep(float(rng.uniform(2, 15)))
            f.kill_site(name)
            time.sleep(float(rng.uniform(0, 5)))
            f.site(name)
            kills += 1
            out, done = f.folder / f"{name}.out", lambda: (f.folder / f"{name}.out").read_text().count("trained on")  # noqa: B023
            before, until = done(), time.monotonic() + 150  # Flower lets a killed node back after 60 s
            while out.exists() and thread.is_alive() and done() == before and time.monotonic() < until:
                time.sleep(0.5)  # one site at a time is away
        thread.join(f.limit_s)
        rounds = f.rounds()
        expect([r["round"] for r in rounds] == list(range(1, 21)), [len(rounds), str(f.events()[-1])[:600]])
        counts = [len(r["clients"]) for r in rounds]
        expect(f.events()[-1]["event"] == "end" and min(counts) >= 2, counts)
        return f"{kills} kills; updates a round {counts}; left out: {len(dropped(rounds))}"


CASES: dict[str, Callable[[str], str]] = {
    "same-bytes": same_bytes,
    "closed-door": closed_door,
    "no-code": no_code,
    "reticent": reticent,
    "refusals": refusals,
    "client-raises": client_raises,
    "trainer-killed": trainer_killed,
    "supernode-killed": supernode_killed,
    "straggler": straggler,
    "superlink-killed": superlink_killed,
    "bad-updates": bad_updates,
    "too-few": too_few,
    "at-random": at_random,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--backbone", default='name = "tiny"', help="the keys of [backbone], as TOML")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a stopped trial stops its processes
    results, failed = {}, False
    for name in arguments.cases:
        began = time.monotonic()
        try:
            said, ok = CASES[name](arguments.backbone), True
        except (AssertionError, TimeoutError, RuntimeError) as error:
            said, ok, failed = f"{type(error).__name__}: {error}", False, True
        seconds = round(time.monotonic() - began)
        results[name] = {"ok": ok, "seconds": seconds, "what": (CASES[name].__doc__ or "").strip(), "seen": said}
        print(f"{'ok  ' if ok else 'FAIL'} {name:17} {seconds:4d} s  {said}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    main()
