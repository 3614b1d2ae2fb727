"""Failures of a real federation, one after another: SuperLink, three sites, TLS and keys, on loopback.

    python scripts/flower_trial.py                                  all cases
    python scripts/flower_trial.py same-bytes ...                   these
    python scripts/flower_trial.py --out results/flower_trials.md   and write down what they said

Each case starts its own federation in a fresh folder, does the harm, and checks what the record says. Everything is
stopped at its end. A case takes one to ten minutes: Flower notices a dead SuperNode after 60 s.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from flower_federation import CASE_S, FEDMLLM, NAMES, Federation, dropped, expect, federation
from flower_promises import closed_door, leftovers, loopback, no_code, refusals, reticent, same_bytes, twice

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import describe

from fedmllm.flower.server.watch import is_written


def executor_killed(backbone: str) -> str:
    """kill -9 of what starts runs on the server, in the middle of one: that one continues, and the next one starts."""
    with federation(backbone, rounds=3) as f:
        f.start()
        thread = f.background_run()
        f.until(f.rounds, 200)
        f.harm("server", "flower-superexec")
        thread.join(CASE_S)
        said = (f.folder / "run-out.out").read_text()
        expect(f.events()[-1]["event"] == "end" and "attempt 2" not in said, said)
        expect(
            f.run("again")[-1]["event"] == "end" and f.digest("again") == f.digest(), "the next one did not end alike"
        )
        return f"rounds of {[round(r['wall_s'], 1) for r in f.rounds()]} s; {said.count('attempt')} other attempts"


def interrupted(backbone: str) -> str:
    """Ctrl-C of `server run`: the run stops on SuperLink too, and --resume ends with the bytes of one never stopped."""
    with federation(backbone, rounds=4, engine="min_sites = 3") as f:
        f.start()
        f.spawn("run", *FEDMLLM, "server", "run", "server", "experiment.toml", "--out", "out")
        f.until(lambda: len(f.rounds()) > 1, 200)
        f.processes["run"].send_signal(signal.SIGINT)
        f.until(lambda: f.processes["run"].poll() is not None, 60)
        f.until(lambda: not is_written(f.folder / "out" / "record.jsonl"), 30)
        done = len(f.rounds())
        expect(f.processes["run"].returncode == 130 and done < 4, (f.processes["run"].returncode, done))
        f.run("out", "--resume")
        expect(f.digest() == f.in_process(), "other bytes than without a stop")
        return f"stopped after round {done}; resumed, sha256 {f.digest()[:16]} as without a stop"


def client_raises(backbone: str) -> str:
    """A site whose data cannot be read: named, and the round continues with the others."""
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
    """kill -9 of a training process: named at once, the round continues, the next one has the site again."""
    with federation(backbone) as f:
        f.start()
        thread = f.background_run()
        f.until(lambda: f.rounds(), 200)
        f.harm("north", "site.trainer", signal.SIGSTOP)  # so that it is killed in the middle of a round
        f.until(lambda: len(f.events()) and time.sleep(6) is None, 10)
        f.harm("north", "site.trainer")
        thread.join(CASE_S)
        said = dropped(f.rounds())
        expect(len(f.rounds()) == 3 and len(said) == 1 and "trainer died" in said[0], said)
        return said[0]


def supernode_killed(backbone: str) -> str:
    """kill -9 of a SuperNode in the middle of a round: the site restarts it, the round continues, the site is back."""
    with federation(backbone, rounds=4) as f:
        f.start()
        thread = f.background_run()
        f.until(lambda: f.rounds(), 200)
        f.harm("north", "site.trainer", signal.SIGSTOP)
        time.sleep(6)
        f.harm("north", "flower-supernode")
        f.harm("north", "site.trainer", signal.SIGCONT)
        thread.join(CASE_S)
        rounds = f.rounds()
        said = dropped(rounds)
        expect(len(rounds) == 4 and 1 <= len(said) <= 2, said)
        expect(any(c["client"] == 1 for c in rounds[-1]["clients"]), rounds[-1])
        return f"{said}; the round took {max(r['wall_s'] for r in rounds):.0f} s"


def straggler(backbone: str) -> str:
    """A site that is slower than the round's time: left out and named; its late answer is dropped; it takes part again."""
    with federation(backbone, rounds=3, engine="round_timeout_s = 25") as f:
        toml = (f.folder / "experiment.toml").read_text().replace("round_timeout_s = 400\n", "")
        (f.folder / "experiment.toml").write_text(toml)
        f.start()
        thread = f.background_run()
        f.until(lambda: f.rounds(), 200)
        f.harm("north", "site.trainer", signal.SIGSTOP)
        f.until(lambda: len(f.rounds()) > 1, 90)
        f.harm("north", "site.trainer", signal.SIGCONT)
        thread.join(CASE_S)
        said = dropped(f.rounds())
        expect(len(f.rounds()) == 3 and len(said) == 1 and "no reply within 25 s" in said[0], said)
        expect(any(c["client"] == 1 for c in f.rounds()[-1]["clients"]), f.rounds()[-1])
        return said[0]


def superlink_killed(backbone: str) -> str:
    """kill -9 of SuperLink in the middle of a run: it is restarted, the run continues or is resumed; same bytes."""
    return same_bytes_after(backbone, lambda f: f.harm("server", "flower-superlink"))


def server_killed(backbone: str) -> str:
    """kill -9 of the server's whole process, which is then started again: `server run` resumes by itself; same bytes."""

    def harm(f: Federation) -> None:
        f.kill_site("server")
        f.spawn("server", *FEDMLLM, "server", "start", "server")

    return same_bytes_after(backbone, harm)


def same_bytes_after(backbone: str, harm: Callable[[Federation], None]) -> str:
    with federation(backbone, rounds=5, engine="min_sites = 3") as f:
        f.start()
        thread = f.background_run()
        f.until(lambda: len(f.rounds()) > 1, 200)
        harm(f)
        thread.join(CASE_S)
        kinds = [event["event"] for event in f.events()]
        expect(kinds.count("round") == 5 and kinds[-1] == "end", (kinds, f.events()[-1]))
        expect(f.digest() == f.in_process(), "other bytes than without a stop")
        return f"{kinds}; sha256 {f.digest()[:16]} as without a stop"


def bad_updates(backbone: str) -> str:
    """NaN, wrong shapes, a norm beyond the limit: left out of the sum and named in the record; the others continue."""
    with federation(backbone, rounds=1) as f:
        toml = f.folder / "experiment.toml"
        toml.write_text(toml.read_text() + "\n[update_filter]\nmax_norm = 100\n")
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
    "twice": twice,
    "loopback": loopback,
    "reticent": reticent,
    "refusals": refusals,
    "client-raises": client_raises,
    "trainer-killed": trainer_killed,
    "supernode-killed": supernode_killed,
    "straggler": straggler,
    "superlink-killed": superlink_killed,
    "server-killed": server_killed,
    "executor-killed": executor_killed,
    "interrupted": interrupted,
    "leftovers": leftovers,
    "bad-updates": bad_updates,
    "too-few": too_few,
    "at-random": at_random,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--backbone", default='name = "tiny"', help="the keys of [backbone], as TOML")
    parser.add_argument("--out", type=Path, help="results/flower_trials.md: the lines of these cases are replaced")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a stopped trial stops its processes
    failed = False
    for name in arguments.cases:
        began, load = time.monotonic(), os.getloadavg()[0]
        try:
            said, ok = CASES[name](arguments.backbone), True
        except (AssertionError, TimeoutError, RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            said, ok, failed = f"{type(error).__name__}: {error}", False, True
        seconds = round(time.monotonic() - began)
        line = f"| {name} | {'ok' if ok else 'FAILED'} | {seconds} | {load:.0f} | {said.replace('|', '/')[:500]} |"
        print(line, flush=True)
        if arguments.out:
            write(arguments.out, name, line)
    sys.exit(failed)


def write(path: Path, name: str, line: str) -> None:
    """Put a case's line into the table, in the order of `CASES`."""
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    table = {row.split("|")[1].strip(): row for row in rows if row.startswith("| ")}
    table[name] = line
    body = "\n".join(table.get(case, f"| {case} | not run yet | | | |") for case in CASES)
    what = "\n".join(f"- `{case}`: {(CASES[case].__doc__ or '').strip()}" for case in CASES)
    path.write_text(HEAD.format(machine=describe(), what=what, body=body), encoding="utf-8")


HEAD = """# Failures of a real federation, each done on purpose

`python scripts/flower_trial.py --out results/flower_trials.md`: SuperLink, gate, three SuperNodes and trainers on loopback,
TLS, registered keys, the embedded backbone. Machine: {machine}. It had other work too: `load` is the 1-minute load average
when a case began. A case's line is of its last run; messages are quoted as they read today.

{what}

|case|result|s|load|seen|
|---|---|---|---|---|
{body}
"""


if __name__ == "__main__":
    main()
