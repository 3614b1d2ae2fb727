"""A real federation on loopback for trials: SuperLink, gate, three sites, TLS and keys, below one folder."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import ipaddress
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fedmllm.flower.processes import die_with_parent, free_port, stop
from fedmllm.runs.record import read

NAMES = ("east", "north", "west")
CASE_S = 900.0  # a command, at most
PATIENCE = 3.0  # for machines that are busy with other things
FEDMLLM = [sys.executable, "-m", "fedmllm.cli"]


class Federation:
    """A server and three sites below `folder`; rows and pictures are drawn."""

    def __init__(
        self,
        folder: Path,
        backbone: str,
        rounds: int = 3,
        engine: str = "",
        train: str = "max_steps = 2",
        names: tuple[str, ...] = NAMES,
    ) -> None:
        self.names = names
        self.folder, self.backbone, self.port, self.gate = folder, backbone, free_port(), free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.limit_s = CASE_S  # of a command
        self._draw()
        self._experiment(rounds, engine, train)

    def _draw(self) -> None:
        rng = np.random.default_rng(0)
        header = ["image", "text", "answer", "site"]
        rows: dict[str, list[list[str]]] = {name: [] for name in (*self.names, "test")}
        (self.folder / "pictures").mkdir(parents=True)
        for name, own in rows.items():
            for i in range(8 if name == "test" else 12):
                path = self.folder / "pictures" / f"{name}-{i}.png"
                Image.fromarray(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(path)
                own.append([f"pictures/{path.name}", f"finding {rng.integers(100)}", ("no", "yes")[i % 2], name])
        tables = {**{name: rows[name] for name in self.names}, "test": rows["test"]}
        tables["train"] = [
            row for name in self.names for row in rows[name]
        ]  # what one machine would hold, for comparison
        for name, table in tables.items():
            with (self.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([header, *table])

    def _data(self, train: str) -> str:
        columns = '{ image = "image", text = "text", answer = "answer", client = "site", question = "", choices = "" }'
        question = 'question = "Is it there?"\nchoices = ["no", "yes"]'
        files = f'root = "{self.folder}"\ntrain = "{train}.csv"\ntest = "test.csv"'
        return f'[data]\nname = "table"\n{files}\n{question}\ncolumns = {columns}\n'

    def _experiment(self, rounds: int, engine: str, train: str) -> None:
        counts = f"num_rounds = {rounds}\ncohort_size = {len(self.names)}\n"
        head = f'{counts}partition = {{ name = "by-column", column = "client" }}\n'
        body = f"[train]\nlr = 3e-3\nbatch_size = 4\naccumulation = 1\n{train}\n[backbone]\n{self.backbone}\n"
        sites = f'[engine]\nname = "flower-sites"\nround_timeout_s = 400\nretry_s = 5\nconnect_s = 120\n{engine}\n'
        (self.folder / "experiment.toml").write_text(head + self._data("train") + body + sites, encoding="utf-8")

    def call(self, *words: str) -> str:
        done = subprocess.run(
            [*FEDMLLM, *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=self.limit_s,
            preexec_fn=die_with_parent,
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
        for name in self.names:
            self.call("site", "new", name, "--name", name, "--server", f"127.0.0.1:{self.gate}")
        keys = {name: (self.folder / name / "site.key.pub").read_text().strip() for name in self.names}
        peers = "[peers]\n" + "".join(f'{name} = "{key}"\n' for name, key in keys.items())
        for name in self.names:
            (self.folder / name / "ca.crt").write_bytes((self.folder / "server" / "ca.crt").read_bytes())
            head = f'name = "{name}"\nserver = "127.0.0.1:{self.gate}"\nca = "ca.crt"\nkey = "site.key"\nthreads = 1\n'
            limits = f"[allow]\nmin_steps = 1\nextra_tensors = true\nmax_steps = 20\n{allow}\n"
            tables = f"{self._data(name)}[backbone]\n{self.backbone}\n{peers}{limits}"
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
        try:
            said = self.call("server", "run", "server", "experiment.toml", "--out", out, *words)
        except RuntimeError as error:
            said = str(error)
        with contextlib.suppress(FileNotFoundError):  # a run that outlives its case
            (self.folder / f"run-{out}.out").write_text(said, encoding="utf-8")
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

    def in_process(self, *words: str) -> str:
        """Digest of the adapter that one process makes of the same rows, without a stop."""
        out = f"in-process-{len(list(self.folder.glob('in-process-*')))}"
        self.call("run", "experiment.toml", "--engine", "in-process", "--out", out, *words)
        return self.digest(out)

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


def addresses(pids: set[int]) -> set[str]:
    """The addresses at either end of all TCP sockets of these processes, as /proc names them."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            inodes |= {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, remote, state, inode = (row.split()[i] for i in (1, 2, 3, 9))
            if f"socket:[{inode}]" in inodes:
                ends = [local] if state == "0A" else [local, remote]  # 0A: listening, without a remote end
                found |= {_address(end.split(":")[0]) for end in ends}
    return found


def _address(words: str) -> str:
    """An address as /proc writes it: 32-bit words, each least significant byte first."""
    packed = b"".join(bytes.fromhex(words[i : i + 8])[::-1] for i in range(0, len(words), 8))
    address = ipaddress.ip_address(packed)
    return str(getattr(address, "ipv4_mapped", None) or address)
