"""Secure aggregation: fixed point, masks, what a site refuses, and sums over sites of this process (S1 to S8).

Only `test_a_run_with_masks_*` trains. `test_secure_sites.py` runs real processes.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flower_federation import NAMES, Federation
from scipy.stats import chisquare

from fedmllm.algorithms.base import Aggregator
from fedmllm.config.engine import FlowerSites, SecureAggregation, least_holders, sum_fits
from fedmllm.config.experiment import Experiment
from fedmllm.core.errors import ConfigError, FedmllmError
from fedmllm.core.tensors import flatten, manifest_digest
from fedmllm.core.types import Round, Sent
from fedmllm.flower.keys import make_site_key
from fedmllm.flower.request import Request
from fedmllm.flower.secure.attempt import Asked, Attempt, common_digest, mask_key
from fedmllm.flower.secure.fixed_point import WordForm, from_words, to_words
from fedmllm.flower.secure.layout import SUMMED_METRICS, pack_words, unpack_sum, word_form
from fedmllm.flower.secure.masks import add_masks, keystream, pair_key
from fedmllm.flower.secure.member import SecureMember
from fedmllm.flower.secure.shares import join, split
from fedmllm.flower.secure.terms import Advert, Ask, Terms
from fedmllm.flower.server.experiment import over_sites
from fedmllm.flower.server.secure_rounds import SecureRounds
from fedmllm.flower.site.config import Refused, Site
from fedmllm.flower.site.process import answer
from fedmllm.flower.wire import array_data
from fedmllm.runs.record import read
from fedmllm.runs.result import load_run
from support.sites_in_process import Plain, over_the_wire, write_sites

EXPERIMENT = Experiment.parse({"data": "synthetic-irony", "cohort_size": 0})
LIKE = {"a.lora_A.weight": torch.zeros(4, 50), "a.lora_B.weight": torch.zeros(60, 4)}
NUM = sum(t.numel() for t in LIKE.values())
RUN = EXPERIMENT.run_id()


def made_up(site: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, site]).normal(0, 0.01, NUM).astype(np.float32)


def terms(**changes) -> Terms:
    adverts = tuple(Advert(site=n, public="0" * 64, signature="0" * 16) for n in ("a", "b", "c"))
    known = {
        "version": 2,
        "serial": 1,
        "adverts": adverts,
        "weights": "rows",
        "word_bits": 48,
        "bits": 22,
        "rows": 2**20,
    }
    return Terms(**{**known, "bound": 8.0, "max_norm": 0.0, **changes})


FORM = word_form(NUM, terms())


def masks(key: bytes, form: WordForm = FORM) -> np.ndarray:
    return form.from_bytes(keystream(key, form.num_bytes))


def same(one, other, form: WordForm = FORM) -> bool:
    """Equal in every bit that travels."""
    return form.to_bytes(one) == form.to_bytes(other)


def metrics_of(site: int) -> dict[str, float]:
    """All metrics that are summed: of one that is missing, the words are random, and no sum is known bit for bit."""
    made = {"loss": 1.0 + site, "num_steps": 2.0 + site, "num_tokens": 100.0 * site, "time_s": 0.25 * site}
    assert set(made) == set(SUMMED_METRICS)
    return made


# ---- fixed point (S1, S5)


@pytest.mark.parametrize("word_bits", [32, 48, 64])
@pytest.mark.parametrize("num_sites", [3, 20])
def test_masked_words_sum_to_the_integers_exactly_in_any_order(num_sites, word_bits):
    form = WordForm(90, 10, word_bits)
    rng, names = np.random.default_rng(num_sites), [f"site-{i}" for i in range(num_sites)]
    plain = {n: rng.integers(0, 2**64, 100, dtype=np.uint64) for n in names}
    key = {frozenset((a, b)): rng.bytes(32) for a in names for b in names if a < b}
    masked = [add_masks(plain[n], n, {m: key[frozenset((n, m))] for m in names if m != n}, form) for n in names]
    sent = [form.from_bytes(form.to_bytes(words)) for words in masked]
    bits = [word_bits] * 90 + [64] * 10
    whole = [sum(int(plain[n][i]) for n in names) % 2**b for i, b in enumerate(bits)]

    def summed(order) -> list[int]:
        return [int(w) % 2**b for w, b in zip(np.add.reduce(order), bits, strict=True)]

    assert summed(sent) == summed(sent[::-1]) == summed(masked) == whole
    assert summed(sent[1:]) != whole


def test_a_word_is_the_weighted_rounded_number():
    words = to_words(np.array([0.5, -0.25, 2**-33, 0.0], dtype=np.float32), 3, 32, 8.0)
    assert words.view(np.int64).tolist() == [3 * 2**31, -3 * 2**30, 2, 0]  # 1.5 is a tie, rounded to even
    assert from_words(words, 32).tolist() == [1.5, -0.75, 2.0**-31, 0.0]


@pytest.mark.parametrize(("word_bits", "size"), [(32, 4), (48, 6), (64, 8)])
def test_words_travel_with_the_bits_that_their_sums_need(word_bits, size):
    form, largest = WordForm(4, 2, word_bits), 2 ** (word_bits - 1) - 1
    words = np.array([1, -1, largest, -largest, 2**63 - 1, -5]).view(np.uint64)
    data = form.to_bytes(words)
    assert len(data) == form.num_bytes == 4 * size + 16
    found = form.from_bytes(data)
    assert from_words(found[:4], 0, word_bits).tolist() == [1.0, -1.0, float(largest), -float(largest)]
    assert found[4:].view(np.int64).tolist() == [2**63 - 1, -5]
    with pytest.raises(FedmllmError, match=r"9 bytes are not the \d+ of 4 masked numbers"):
        form.from_bytes(bytes(9))


@pytest.mark.parametrize("bad", [8.001, -9.0, math.nan, math.inf])
def test_a_number_over_the_bound_is_refused_and_never_clipped(bad):
    with pytest.raises(FedmllmError, match=r"a number of its delta is over engine\.secure\.bound = 8"):
        to_words(np.array([0.0, bad]), 1, 32, 8.0)


@pytest.mark.parametrize(
    ("settings", "num_sites", "weights", "words"),
    [
        ({}, 3, "rows", (48, 22)),
        ({}, 15, "rows", (48, 20)),
        ({}, 50, "rows", (48, 18)),
        ({}, 3, "clients", (32, 26)),
        ({}, 50, "clients", (48, 38)),
        ({"rows": 4096, "bound": 1.0}, 3, "rows", (32, 17)),
        ({"rows": 4096, "bound": 1.0, "bits": 18}, 3, "rows", (48, 18)),
        ({"bits": 32}, 3, "rows", (64, 32)),
    ],
)
def test_words_are_the_narrowest_ones_in_which_no_sum_overflows(settings, num_sites, weights, words):
    secure = SecureAggregation(**settings)
    assert secure.words(num_sites, weights) == words
    word_bits, bits = words
    weight = secure.rows if weights == "rows" else 1
    form = WordForm(2, 0, word_bits)
    for sign in (1, -1):
        at_bound = np.full(2, sign * secure.bound, np.float32)
        sent = form.from_bytes(form.to_bytes(to_words(at_bound, weight, bits, secure.bound)))
        total = form.from_bytes(form.to_bytes(np.add.reduce([sent] * num_sites)))
        assert from_words(total, bits, word_bits).tolist() == [sign * secure.bound * weight * num_sites] * 2
    assert not settings.get("bits", 0) < bits < 40 or not sum_fits(num_sites, weight, secure.bound, bits + 1, word_bits)


def test_sums_that_would_overflow_are_refused_by_settings_and_by_sites():
    assert SecureAggregation(bits=40, bound=1.0).words(7, "rows") == (64, 40)
    with pytest.raises(ConfigError, match="bits = 40 need more than 64 bits; lower bits, rows or bound"):
        SecureAggregation(bits=40, bound=1.0).words(8, "rows")
    terms(bits=22)
    with pytest.raises(
        ValueError, match="sums of 3 sites with 23 digits after the binary point do not fit into 48 bits"
    ):
        terms(bits=23)
    for word_bits, bits in ((32, 6), (32, 7), (24, 8)):
        with pytest.raises(ValueError, match=r"bits"):
            terms(word_bits=word_bits, bits=bits)


def test_the_mean_of_narrow_words_is_within_the_stated_bound():
    for secure, rows in ((SecureAggregation(), 12), (SecureAggregation(rows=4096, bound=1.0), 3000)):
        word_bits, bits = secure.words(3, "rows")
        t = terms(word_bits=word_bits, bits=bits, rows=secure.rows, bound=secure.bound)
        parts = [pack_words(made_up(i), rows + i, {}, t) for i in range(3)]
        summed = unpack_sum(np.add.reduce(parts), NUM, 3, t)
        exact = sum((rows + i) * made_up(i).astype(np.float64) for i in range(3)) / (3 * rows + 3)
        stated = 2.0 ** -(bits + 1) / (rows + 1)
        assert np.abs(summed.mean - exact).max() <= stated + np.abs(exact).max() * 2.0**-24 < 2e-8  # and a float32


def test_the_mean_is_within_half_a_step_of_the_exact_one_and_metrics_are_summed():
    rows, t = [5, 1, 700], terms()
    losses = [{"loss": 2.0, "num_steps": 3.0}, {"loss": 1.0, "num_steps": 1.0}, {"loss": 3.0, "num_steps": 2.0}]
    parts = [pack_words(made_up(i), n, m, t) for i, (n, m) in enumerate(zip(rows, losses, strict=True))]
    summed = unpack_sum(np.add.reduce(parts), NUM, 3, t)
    exact = sum(n * made_up(i).astype(np.float64) for i, n in enumerate(rows)) / sum(rows)
    assert np.abs(summed.mean - exact).max() <= 2.0**-23 * 3 / 706 + np.abs(exact).max() * 2.0**-24  # and a float32
    assert summed.weight == 706
    assert summed.metrics == {"loss": pytest.approx((5 * 2 + 1 + 700 * 3) / 706, abs=1e-4), "num_steps": 6.0}
    plain = terms(weights="clients")
    alike = unpack_sum(np.add.reduce([pack_words(made_up(i), n, {}, plain) for i, n in enumerate(rows)]), NUM, 3, plain)
    assert alike.weight == 3


@pytest.mark.parametrize("kept", [{}, {"loss": math.nan}, {"loss": 1e30}])
def test_a_metric_that_one_site_keeps_to_itself_is_readable_for_no_site(kept):
    # With the value of two sites in the sum, each of them would know the other's; with that of one, the server.
    t, others = terms(), {"loss": 2.0, "num_steps": 1.0}
    at, sums = NUM + 1, []
    for _ in range(40):
        parts = [pack_words(made_up(i), 5, {**kept, "num_steps": 1.0} if i else others, t) for i in range(3)]
        total = np.add.reduce(parts)
        assert unpack_sum(total, NUM, 3, t).metrics == {"num_steps": 3.0}
        sums.append(total[at : at + 2])
    bits = np.unpackbits(np.concatenate(sums).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 0.05  # random numbers, the count as well


def test_a_sum_whose_masks_do_not_cancel_is_not_read():
    words = np.add.reduce([pack_words(made_up(i), 4, {}, terms()) for i in range(3)])
    with pytest.raises(FedmllmError, match="the masks do not cancel"):
        unpack_sum(words + masks(bytes(32)), NUM, 3, terms())
    with pytest.raises(FedmllmError, match="the masks do not cancel"):
        unpack_sum(pack_words(made_up(0), 1, {}, terms()), NUM, 3, terms())  # one row for three sites
    for rows in (0, 2**20 + 1):
        with pytest.raises(FedmllmError, match="not of 1 to 1048576, of which secure aggregation makes sums"):
            pack_words(made_up(0), rows, {}, terms())


# ---- masks (S2, S8)


def test_the_keystream_is_chacha20_of_rfc_8439():
    """RFC 8439, appendix A.1, test vectors 1 and 3 (the third: key 00..01, block counter 1, which is the second block)."""
    assert keystream(bytes(32), 32).hex() == "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    second = keystream(bytes(31) + b"\1", 128)[64:]
    assert second.hex().startswith("3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a")


def test_the_key_of_a_pair_is_the_same_at_both_and_another_for_another_context():
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    one, two = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    public = [k.public_key().public_bytes_raw() for k in (one, two)]
    assert pair_key(one, public[1], b"x") == pair_key(two, public[0], b"x") != pair_key(one, public[1], b"y")
    with pytest.raises(FedmllmError, match="not a usable X25519 key"):
        pair_key(one, bytes(32), b"x")  # of small order


# ---- sites


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    for name in (*NAMES, "south", "zone"):
        make_site_key(folder / name / "site.key")
    return {name: folder / name for name in (*NAMES, "south", "zone")}


class FakeTrainer:
    """Answers a request with a made-up update."""

    def __init__(self, number: int) -> None:
        self.number, self.asked = number, 0

    def ask(self, head, adapter):
        self.asked += 1
        about = {"num_examples": 10 * (self.number + 1), "metrics": metrics_of(self.number), "busy_s": 0.0}
        about |= {"num_loads": 1, "manifest": manifest_digest(LIKE)}
        return about, made_up(self.number).tobytes()


class FakeSites:
    """Part of the engine that `SecureRounds` uses, with sites of this process; `tamper` may change or drop a message."""

    def __init__(
        self, folder: Path, keys, names=NAMES, allow: str = "", peers=NAMES, attempts: int = 1, **secure
    ) -> None:
        self.settings = FlowerSites(attempts=attempts, retry_s=0, secure=SecureAggregation(**secure))
        self.experiment, self.names = EXPERIMENT, names
        self.clients = SimpleNamespace(aggregator=EXPERIMENT.aggregator, state=None)
        self.trainers = [FakeTrainer(i) for i in range(len(names))]
        self.folder, self.keys, self.allow, self.peers = folder, keys, allow, peers
        self.members = [self.member(name) for name in names]
        self.sent, self.replies, self.asked = [], [], {}
        self.tamper = lambda client, content: content
        self.tamper_reply = lambda client, content: content
        self.rounds = SecureRounds(self, self.settings.secure)

    def member(self, name: str) -> SecureMember:
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        peers = "".join(f'{n} = "{(self.keys[n] / "site.key.pub").read_text().strip()}"\n' for n in self.peers)
        head = f'name = "{name}"\nserver = "localhost:1"\nca = "ca.crt"\nkey = "{self.keys[name] / "site.key"}"\n'
        text = f"{head}[data]\nname = 'synthetic-irony'\n[peers]\n{peers}[allow]\n{self.allow}\n"
        (self.folder / name / "site.toml").write_text(text)
        return SecureMember(Site.load(self.folder / name / "site.toml"), self.folder / name)

    def connected(self, cohort):
        return dict.fromkeys(cohort, "now")

    def requests(self, at, sents, terms):
        from fedmllm.flower.messages import Packed

        asked = {k: Request.of(EXPERIMENT, "", self.names[k], k, at) for k in sents}
        texts = {k: r.model_copy(update={"secure": terms[k]}).model_dump_json() for k, r in asked.items()}
        return {k: Packed(sent.travelling()).content({"request": texts[k]}) for k, sent in sents.items()}

    def exchange(self, at, since, contents):
        for client, content in contents.items():
            if (content := self.tamper(client, content)) is None:
                yield client, "no reply within 1 s"
                continue
            self.asked[client] = content if "request" in content["about"] else self.asked.get(client)
            said = answer(Plain(content), self.trainers[client], self.members[client])[0]
            self.replies.append((client, said))
            reply = self.tamper_reply(client, said)
            self.sent.append((client, reply))
            yield client, Plain(reply) if reply is not None else "no reply within 1 s"

    def keep_digest(self, client, at, reply):
        return True

    def signatures(self) -> dict[str, str]:
        """Those of the sets of sites, by site."""
        said = [(self.names[k], c["about"]["secure"]) for k, c in self.replies if "secure" in c["about"]]
        return {name: json.loads(text) for name, text in said if text.startswith('"')}

    def round(self, number: int = 1, cohort=None):
        cohort = tuple(range(len(self.names))) if cohort is None else cohort
        at = Round(number, 0, 25, cohort, len(self.names))
        return self.rounds.round(at, {k: Sent(LIKE) for k in cohort})


def words_of(content) -> np.ndarray | None:
    return FORM.from_bytes(bytes(content["adapter"]["flat"].data)) if "adapter" in content else None


def test_the_server_gets_the_mean_and_neither_updates_nor_row_counts(tmp_path, keys):
    sites = FakeSites(tmp_path, keys)
    (update,) = sites.round()
    exact = sum(n * made_up(i).astype(np.float64) for i, n in enumerate((10, 20, 30))) / 60
    assert np.abs(flatten(update.delta).numpy() - exact).max() <= 2.0**-23 * 3 / 60 + 2.0**-30
    assert (update.clients, update.num_clients, update.num_examples) == ((0, 1, 2), 3, 60)
    loss = pytest.approx((10 * 1 + 20 * 2 + 30 * 3) / 60, abs=1e-4)
    assert update.metrics == {"loss": loss, "num_steps": 9.0, "num_tokens": 300.0, "time_s": 0.75}
    masked = [(client, content) for client, content in sites.sent if words_of(content) is not None]
    assert [set(content["about"]) for _, content in masked] == [{"manifest"}] * 3
    plain = [pack_words(made_up(i), 10 * (i + 1), metrics_of(i), terms()) for i in range(3)]
    assert same(np.add.reduce([words_of(c) for _, c in masked]), np.add.reduce(plain))  # bit for bit


def top_bits(words) -> np.ndarray:
    return np.bincount(words[:NUM] >> np.uint64(44) & np.uint64(15), minlength=16)


def test_each_reply_alone_is_uniform_and_two_attempts_differ(tmp_path, keys):
    sites = FakeSites(tmp_path, keys)
    sites.round(1)
    sites.round(2)
    words = [(client, words_of(content)) for client, content in sites.sent if words_of(content) is not None]
    assert len(words) == 6
    for _, one in words:
        sent = np.frombuffer(FORM.to_bytes(one), np.uint8)
        nibbles = np.bincount(np.concatenate([sent & 15, sent >> 4]), minlength=16)
        assert chisquare(nibbles).pvalue > 1e-6
        assert chisquare(top_bits(one)).pvalue > 1e-6  # the top bits, too
    assert not np.any(words[0][1] == words[3][1])  # the same update of the same site


def test_an_update_is_not_uniform_without_masks():
    plain = pack_words(made_up(0), 10, {}, terms())
    assert chisquare(top_bits(plain)).pvalue < 1e-12


# ---- sites that are missing (S3)


def test_without_one_reply_there_is_no_sum_and_the_same_sites_are_asked_again_with_new_keys(tmp_path, keys):
    sites = FakeSites(tmp_path, keys, attempts=2)
    lost = iter([1])
    sites.tamper_reply = lambda k, content: (
        None if k == 1 and words_of(content) is not None and next(lost, 0) else content
    )
    (update,) = sites.round()
    assert update.clients == (0, 1, 2)
    assert [trainer.asked for trainer in sites.trainers] == [2, 2, 2]
    first, again = [w for k, c in sites.sent if k == 0 and (w := words_of(c)) is not None]
    assert not np.any(first == again)


def test_a_site_does_not_give_a_second_sum_over_fewer_sites_of_the_same_round(tmp_path, keys):
    """The server has all three replies, says that one was lost, and asks for the sum of the others: its update."""
    sites = FakeSites(tmp_path, keys, names=(*NAMES, "south"), peers=(*NAMES, "south"))
    sites.round(1)
    with pytest.raises(
        FedmllmError, match="was summed over east, north, south, west; a sum over east, north, west would"
    ):
        sites.round(1, cohort=(0, 1, 2))
    sites.members = [sites.member(name) for name in sites.names]  # restarted
    sites.rounds._adverts.clear()
    with pytest.raises(FedmllmError, match="would give away the difference"):
        sites.round(1, cohort=(0, 1, 2))
    assert sites.round(2, cohort=(0, 1, 2))[0].clients == (0, 1, 2)  # another round trains on other batches


def test_a_restarted_site_is_asked_for_a_new_key(tmp_path, keys):
    sites = FakeSites(tmp_path, keys, attempts=2)
    sites.round(1)
    sites.members[2] = sites.member(NAMES[2])
    assert sites.round(2)[0].clients == (0, 1, 2)
    sites = FakeSites(tmp_path, keys)
    sites.round(3)
    sites.members[2] = sites.member(NAMES[2])
    with pytest.raises(FedmllmError, match=r"west: refused by site west: this site has no key of this run"):
        sites.round(4)


# ---- shares (S3, S4)

FIVE = (*NAMES, "south", "zone")


def test_any_threshold_of_shares_give_the_secret_and_fewer_do_not():
    secret = bytes(range(32))
    shares = dict(enumerate(split(secret, 3, 5), start=1))
    assert all(join({x: shares[x] for x in chosen}) == secret for chosen in itertools.combinations(shares, 3))
    with pytest.raises(FedmllmError, match="not of one secret"):
        join({x: shares[x] for x in (1, 2)})
    with pytest.raises(FedmllmError, match="not of one secret"):
        join({1: shares[1], 2: shares[2], 3: shares[4]})
    with pytest.raises(FedmllmError, match="32 bytes and 4 of 3 shares"):
        split(secret, 4, 3)
    assert [least_holders(k) for k in (3, 4, 5, 6, 9, 10, 50)] == [3, 3, 4, 5, 7, 7, 34]


def test_shares_of_another_attempt_or_for_another_site_cannot_be_read():
    """Their key encrypts one message: its nonce is zero."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    names = ["a", "b", "c"]
    run = {n: X25519PrivateKey.generate() for n in names}
    publics = {n: key.public_key().public_bytes_raw().hex() for n, key in run.items()}
    made = {n: Attempt({"serial": 1}, names, 3).shares_for(run[n], n, publics) for n in names}
    for_b = {n: shares["b"] for n, shares in made.items()}
    Attempt({"serial": 1}, names, 3).receive(run["b"], "b", publics, for_b)
    with pytest.raises(FedmllmError, match="the shares of a are missing or not of this attempt"):
        Attempt({"serial": 2}, names, 3).receive(run["b"], "b", publics, for_b)
    with pytest.raises(FedmllmError, match="the shares of a are missing or not of this attempt"):
        Attempt({"serial": 1}, names, 3).receive(run["c"], "c", publics, for_b)


def recovering(folder: Path, keys, names=FIVE, **more) -> FakeSites:
    return FakeSites(folder, keys, names=names, peers=names, drop_outs="recover", **more)


def plain_sum(numbers) -> np.ndarray:
    return np.add.reduce([pack_words(made_up(i), 10 * (i + 1), metrics_of(i), terms(bits=21)) for i in numbers])


def lose(client: int, words: bool = True):
    """Drops the masked reply of a site, or everything it says after it."""
    return lambda k, c: (
        None if k == client and (words_of(c) is not None) == words and "refused" not in c["about"] else c
    )


@pytest.mark.parametrize("missing", [None, 0, 2, 4])
def test_the_sum_over_the_sites_that_are_there_is_recovered_exactly(tmp_path, keys, missing):
    sites = recovering(tmp_path, keys)
    totals, unmask = [], sites.rounds._unmasked
    sites.rounds._unmasked = lambda *given: totals.append(unmask(*given)) or totals[-1]
    if missing is not None:
        sites.tamper_reply = lose(missing)
    update, *failures = sites.round()
    there = [k for k in range(5) if k != missing]
    assert same(totals[0], plain_sum(there))  # bit for bit
    assert (update.clients, update.num_examples) == (tuple(there), sum(10 * (k + 1) for k in there))
    assert [(f.client, f.reason) for f in failures] == ([] if missing is None else [(missing, "no reply within 1 s")])


def test_a_site_that_is_lost_after_its_update_stays_in_the_sum(tmp_path, keys):
    sites, masked = recovering(tmp_path, keys), set()

    def gone(client, content):
        if client == 1 and client in masked:
            return None
        masked.update([client] if words_of(content) is not None else [])
        return content

    sites.tamper_reply = gone
    (update,) = sites.round()
    assert update.clients == (0, 1, 2, 3, 4)


def test_with_fewer_than_the_threshold_there_is_no_sum(tmp_path, keys):
    sites = recovering(tmp_path, keys)
    sites.tamper_reply = lambda k, c: None if k in (0, 1) and words_of(c) is not None else c
    with pytest.raises(FedmllmError, match="no sum over 4 of 5 sites"):
        sites.round()


def test_a_late_update_of_a_site_that_was_left_out_stays_masked(tmp_path, keys):
    sites = recovering(tmp_path, keys)
    sites.tamper_reply = lose(3)
    sites.round()
    late = next(words for k, c in sites.replies if k == 3 and (words := words_of(c)) is not None)
    attempt = sites.members[3]._runs[RUN].attempt
    table = json.loads(sites.asked[3]["about"]["request"])["secure"]
    publics = {a["site"]: a["public"] for a in table["mask_keys"] if a["site"] != "south"}
    asked = sites.asked[3]
    common = common_digest(asked["about"]["request"], array_data(asked))
    pairs = {n: mask_key(attempt.facts, common, attempt.private, public, "south", n) for n, public in publics.items()}
    without_pairs = late + (np.zeros_like(late) - add_masks(np.zeros_like(late), "south", pairs, FORM))
    own = pack_words(made_up(3), 40, metrics_of(3), terms(bits=21))
    assert chisquare(top_bits(without_pairs)).pvalue > 1e-6  # what the server has
    assert same(without_pairs - masks(attempt.seed), own)  # with the seed that it never gets


def test_no_site_gives_shares_for_two_sets_of_sites(tmp_path, keys):
    """S4: the server says to all that a site was there, and then that it was missing, to get both of its secrets."""
    sites = recovering(tmp_path, keys)
    sites.round()
    ask = Ask(op="sign", run_id=RUN, round=1, serial=1, alive=sorted(FIVE))
    fewer = ask.model_copy(update={"alive": tuple(sorted(set(FIVE) - {"west"}))})
    with pytest.raises(Refused, match="this site signed another set of sites for attempt 1"):
        sites.members[0].sign(fewer)
    with pytest.raises(Refused, match="shares for a set of sites that this site did not sign"):
        sites.members[0].open(fewer)
    assert sites.members[0].open(ask.model_copy(update={"signatures": sites.signatures()})).keys == {}


def test_shares_need_the_signatures_of_more_than_two_thirds_over_the_same_set(tmp_path, keys):
    """A server that shows one set to some sites and another one to the others gets too few signatures of either."""
    sites = recovering(tmp_path, keys)
    sites.tamper_reply = lambda k, c: None if "secure" in c["about"] and c["about"]["secure"].startswith('"') else c
    with pytest.raises(FedmllmError, match="no sum over 4 of 5 sites"):
        sites.round()  # every update was sent and every site has signed, but nothing was opened
    signatures = sites.signatures()
    assert sorted(signatures) == sorted(FIVE)
    ask = Ask(op="open", run_id=RUN, round=1, serial=1, alive=sorted(FIVE))
    three = {n: signatures[n] for n in FIVE[:3]}
    bad = {**three, "south": signatures["east"]}
    for given in (three, bad):
        with pytest.raises(Refused, match="3 sites signed the set of sites; 4 are required"):
            sites.members[4].open(ask.model_copy(update={"signatures": given}))
    assert set(sites.members[4].open(ask.model_copy(update={"signatures": signatures})).seeds) == set(FIVE)


@pytest.mark.parametrize(
    ("alive", "says"),
    [
        (FIVE[:3], "a secure sum over 3 sites; this attempt requires 4"),
        ((*FIVE[:4], "stranger"), "a sum over other sites than those that were asked"),
        (FIVE[1:], "a sum over other sites than those that were asked, or without this one"),
    ],
)
def test_a_site_signs_no_set_that_is_too_small_strange_or_without_it(tmp_path, keys, alive, says):
    sites = recovering(tmp_path, keys)
    sites.tamper = lambda k, c: None if "secure" in c["about"] and '"op":"sign"' in c["about"]["secure"] else c
    with pytest.raises(FedmllmError):
        sites.round()
    with pytest.raises(Refused, match=says):
        sites.members[0].sign(Ask(op="sign", run_id=RUN, round=1, serial=1, alive=tuple(sorted(alive))))


def test_a_round_that_was_opened_is_not_opened_over_other_sites(tmp_path, keys):
    sites = recovering(tmp_path, keys)
    sites.round()
    sites.tamper_reply = lose(2)
    with pytest.raises(FedmllmError, match="would give away the difference"):
        sites.round()
    assert sites.round(2)[0].clients == (0, 1, 3, 4)


def test_a_site_that_was_restarted_misses_a_round_and_is_back_in_the_next(tmp_path, keys):
    sites = recovering(tmp_path, keys)
    sites.round(1)
    sites.members[4] = sites.member("zone")
    update, failure = sites.round(2)
    assert update.clients == (0, 1, 2, 3)
    assert "this site has no key of this run; it was restarted" in failure.reason
    assert sites.round(3)[0].clients == (0, 1, 2, 3, 4)


def swapped_shares(table) -> None:
    shares = table["secure"]["shares"]
    shares["east"], shares["north"] = shares["north"], shares["east"]


def forged_mask_key(table) -> None:
    table["secure"]["mask_keys"][1]["public"] = "09" + "00" * 31


def no_key_of_others(table) -> None:
    """Without masks of pairs the opened masks of its own are all that hides a site's update."""
    table["secure"]["mask_keys"] = [k for k in table["secure"]["mask_keys"] if k["site"] == table["site"]]


def one_key_twice(table) -> None:
    keys = table["secure"]["mask_keys"]
    keys.append(keys[0])


def own_key_of_the_attempt_replaced(table) -> None:
    for key in table["secure"]["mask_keys"]:
        key["public"] = "09" + "00" * 31


def lower_threshold(table) -> None:
    table["secure"]["threshold"] = 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swapped_shares, "the shares of east are missing or not of this attempt"),
        (forged_mask_key, "the key of north is not signed by that site for this attempt"),
        (no_key_of_others, "the keys of the attempt are not those of its sites"),
        (one_key_twice, "the keys of the attempt are not those of its sites"),
        (own_key_of_the_attempt_replaced, "the key of this site is not its own"),
        (lower_threshold, "attempt 1 was not prepared as it is asked for"),
        (lambda t: {"round": 9}, "attempt 1 was not prepared as it is asked for"),
    ],
)
def test_a_site_refuses_tampered_shares_and_keys_before_it_trains(tmp_path, keys, change, says):
    sites = recovering(tmp_path, keys)
    sites.tamper = changed(change)
    with pytest.raises(FedmllmError, match=says):
        sites.round()
    assert not any(trainer.asked for trainer in sites.trainers)


def test_a_site_sets_the_least_threshold_itself(tmp_path, keys):
    sites = recovering(tmp_path, keys)
    sites.rounds._settings = SimpleNamespace(
        **sites.settings.secure.model_dump(), threshold=lambda k: 3, words=sites.settings.secure.words
    )
    with pytest.raises(FedmllmError, match="3 of 5 sites could open a sum; this site requires 4 to 5"):
        sites.round()


# ---- what a site refuses (S7)


def changed(terms_of) -> object:
    """A server that changes the terms of what it asks."""

    def tamper(client, content):
        if "request" in content["about"]:
            table = json.loads(content["about"]["request"])
            table |= terms_of(table) or {}
            content["about"]["request"] = json.dumps(table)
        return content

    return tamper


def forged(table) -> None:
    """The server puts a key of its own in place of the second site's."""
    table["secure"]["adverts"][1]["public"] = "09" + "00" * 31


def only_two(table) -> None:
    del table["secure"]["adverts"][2]


def one_twice(table) -> None:
    table["secure"]["adverts"][2] = table["secure"]["adverts"][1]


def unknown(table) -> None:
    table["secure"]["adverts"][2]["site"] = "stranger"


def own_key_replaced(table) -> None:
    for advert in table["secure"]["adverts"]:
        advert["signature"] = advert["signature"][:-2] + "00"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (forged, "the key of north is not signed by that site for this run"),
        (only_two, r"request\.secure\.adverts: got .*at least 3"),
        (one_twice, "a site or a key of the secure sum comes twice"),
        (unknown, "stranger is not among the peers of this site's file"),
        (own_key_replaced, "the secure sum is not over this site's key of the run"),
        (lambda t: {"run_id": "0" * 12}, "this site has no key of this run"),
    ],
)
def test_a_site_refuses_tampered_terms_before_it_trains(tmp_path, keys, change, says):
    sites = FakeSites(tmp_path, keys)
    sites.tamper = changed(change)
    with pytest.raises(FedmllmError, match=says):
        sites.round()
    assert [trainer.asked for trainer in sites.trainers] == [0, 0, 0]


def wider_words(table) -> None:
    table["secure"]["word_bits"] = 64


def of_protocol_1(table) -> None:
    del table["secure"]["version"], table["secure"]["word_bits"], table["secure"]["rows"]


def of_protocol_3(table) -> None:
    table["secure"]["version"] = 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (of_protocol_1, r"request\.secure\.version: missing"),
        (of_protocol_3, r"request\.secure\.version: got 3"),
        (wider_words, "the masks do not cancel|masked words came as"),
    ],
)
def test_another_version_of_the_protocol_is_refused(tmp_path, keys, change, says):
    sites = FakeSites(tmp_path, keys)
    sites.tamper = lambda k, c: changed(change)(k, c) if k == 0 else c
    with pytest.raises(FedmllmError, match=says):
        sites.round()


def test_signatures_of_another_version_are_not_valid(tmp_path, keys, monkeypatch):
    from fedmllm.flower.secure import signing

    sites = FakeSites(tmp_path, keys)
    old = sites.members[0]
    monkeypatch.setattr(signing, "PROTOCOL", "fedmllm secure aggregation 1")
    advert = old.advertise(RUN)
    monkeypatch.undo()
    assert not sites.members[1]._is_of(advert, "key of a run", {"run_id": RUN})
    assert sites.members[1]._is_of(old.advertise(RUN), "key of a run", {"run_id": RUN})
    with pytest.raises(ValueError, match="version"):
        Ask(op="key", run_id=RUN, version=1)


def test_a_key_of_another_run_or_a_replayed_attempt_is_refused(tmp_path, keys):
    sites = FakeSites(tmp_path, keys)
    other = [member.advertise("f" * 12) for member in sites.members]
    sites.round(1)
    adverts = sites.rounds._adverts
    sites.rounds._adverts = {**adverts, 1: other[1]}  # signed by that site, for another run
    with pytest.raises(FedmllmError, match="the key of north is not signed by that site for this run"):
        sites.round(2)
    sites.rounds._adverts = adverts
    sites.rounds._serial = 0  # the same attempt again: the same masks for another update
    with pytest.raises(FedmllmError, match="attempt 1 comes after attempt 1; a key is used once"):
        sites.round(3)
    request = Request.of(EXPERIMENT, "", "east", 0, 5).model_copy(update={"secure": terms()})
    with pytest.raises(Refused, match="the keys of attempt 1 were used or dropped"):
        sites.members[0].mask(request, "", made_up(0), 10, {})


@pytest.mark.parametrize(
    ("drop_outs", "says"),
    [
        ("repeat", "attempt 1 comes after attempt 1"),
        ("recover", "attempt 1 was not prepared as it is asked for, or it was used"),
    ],
)
def test_a_replayed_request_is_refused_before_anything_is_trained(tmp_path, keys, drop_outs, says):
    sites = FakeSites(tmp_path, keys, drop_outs=drop_outs)
    sites.round(1)
    said = answer(Plain(sites.asked[0]), sites.trainers[0], sites.members[0])[0]
    assert says in said["about"]["refused"]
    assert sites.trainers[0].asked == 1


@pytest.mark.parametrize("drop_outs", ["repeat", "recover"])
def test_an_attempt_masks_one_update(tmp_path, keys, drop_outs):
    """The same masks on two updates would give their difference."""
    sites = FakeSites(tmp_path, keys, drop_outs=drop_outs)
    sites.round(1)
    text, adapter = sites.asked[0]["about"]["request"], array_data(sites.asked[0])
    with pytest.raises(Refused, match="the keys of attempt 1 were used or dropped"):
        sites.members[0].mask(Request.read(text), common_digest(text, adapter), made_up(9), 10, {})


def test_another_round_number_gives_other_masks(tmp_path, keys):
    """A server that names another round to one site than the others gets noise."""
    sites = FakeSites(tmp_path, keys)
    sites.tamper = lambda k, c: changed(lambda t: {"round": 7})(k, c) if k == 0 else c
    with pytest.raises(FedmllmError, match="the masks do not cancel"):
        sites.round()


def small_rate(table) -> None:
    table["train"]["lr"] = 1e-30


def fewer_bits(table) -> None:
    table["secure"]["bits"] -= 8


@pytest.mark.parametrize("drop_outs", ["repeat", "recover"])
@pytest.mark.parametrize("change", [small_rate, fewer_bits, "adapter"])
def test_a_server_that_asks_one_site_for_more_than_the_others_gets_noise(tmp_path, keys, drop_outs, change):
    """With updates of almost zero from the others, the sum would be one site's update."""
    from fedmllm.flower.messages import Packed

    sites = FakeSites(tmp_path, keys, drop_outs=drop_outs)

    def tamper(client, content):
        if client != 0 or "request" not in content["about"]:
            return content
        if change == "adapter":
            return Packed({n: t + 1 for n, t in LIKE.items()}).content({"request": content["about"]["request"]})
        return changed(change)(client, content)

    sites.tamper = tamper
    with pytest.raises(FedmllmError, match="the masks do not cancel"):
        sites.round()


# ---- two sums over the same sites, asked in two ways


def once_each(table) -> None:
    table["secure"]["weights"] = "clients"


@pytest.mark.parametrize("drop_outs", ["repeat", "recover"])
def test_a_sum_with_other_weights_is_refused(tmp_path, keys, drop_outs):
    """By rows and once each over the same three sites: two equations for one site's update."""
    sites = FakeSites(tmp_path, keys, drop_outs=drop_outs)
    sites.round()
    sites.tamper = changed(once_each)
    with pytest.raises(
        FedmllmError, match=r'a sum weighted by "clients"; this site has allow\.secure_weights = "rows"'
    ):
        sites.round()
    assert [trainer.asked for trainer in sites.trainers] == [1, 1, 1]


def test_a_site_may_count_once_in_all_sums(tmp_path, keys):
    sites = FakeSites(tmp_path, keys, allow='secure_weights = "clients"')
    with pytest.raises(FedmllmError, match='a sum weighted by "rows"'):
        sites.round()
    sites.clients.aggregator = Aggregator.pick("feddyn", "aggregator")
    assert sites.round()[0].num_examples == 3


def one_epoch_more(table) -> None:
    table["train"]["epochs"] += 1


@pytest.mark.parametrize("drop_outs", ["repeat", "recover"])
def test_sums_of_one_run_have_the_same_settings(tmp_path, keys, drop_outs):
    sites = FakeSites(tmp_path, keys, drop_outs=drop_outs)
    sites.round(1)
    sites.tamper = changed(one_epoch_more)
    for number in (1, 2):
        with pytest.raises(FedmllmError, match=f"run {RUN} was asked for with other settings"):
            sites.round(number)
    sites.members = [sites.member(name) for name in sites.names]  # restarted
    sites.rounds._adverts.clear()
    with pytest.raises(FedmllmError, match=f"run {RUN} was asked for with other settings"):
        sites.round(1)
    assert [trainer.asked for trainer in sites.trainers] == [1, 1, 1]
    sites.tamper = lambda client, content: content
    assert [sites.round(number)[0].num_clients for number in (1, 2)] == [3, 3]  # a round may be repeated as it was


def test_a_norm_cannot_be_searched_for_with_one_limit_after_another(tmp_path, keys):
    sites = FakeSites(tmp_path, keys)
    sites.rounds._max_norm = 1e-3
    with pytest.raises(FedmllmError, match="the norm of its delta"):
        sites.round()
    sites.rounds._max_norm = 1e-2
    with pytest.raises(FedmllmError, match="was asked for with other settings"):
        sites.round()


@pytest.mark.parametrize("drop_outs", ["repeat", "recover"])
def test_a_round_is_not_summed_again_from_another_adapter_or_another_kept_state(tmp_path, keys, drop_outs):
    from fedmllm.flower.messages import Packed

    sites = FakeSites(tmp_path, keys, drop_outs=drop_outs)
    sites.round(1)

    def from_another(client, content):
        if "request" not in content["about"]:
            return content
        return Packed({n: t + 1 for n, t in LIKE.items()}).content({"request": content["about"]["request"]})

    for tamper in (from_another, changed(lambda t: {"kept": {"1": "0" * 64}})):
        sites.tamper = tamper
        with pytest.raises(FedmllmError, match="round 1 was summed after another request"):
            sites.round(1)
        assert [trainer.asked for trainer in sites.trainers] == [1, 1, 1]  # before anything is trained
    sites.tamper = from_another
    assert sites.round(2)[0].num_clients == 3  # another round starts from another adapter


def test_a_record_of_sums_that_cannot_be_read_is_no_empty_one(tmp_path, keys):
    sites = FakeSites(tmp_path, keys)
    sites.round(1)
    file = tmp_path / "east" / "secure" / f"{RUN}.json"
    for text in ('{"1": ["east", "north", "west"]}', "{"):  # of an earlier version; cut off
        file.write_text(text)
        with pytest.raises(FedmllmError, match=f"what run {RUN} was summed over cannot be read here"):
            sites.round(1)


def test_a_site_may_demand_secure_sums_and_how_many_sites_they_need(tmp_path, keys):
    sites = FakeSites(tmp_path, keys, allow="secure_sites = 3")
    here = sites.members[0]._site
    plain = Request.of(EXPERIMENT, "base", "east", 0, 1)
    assert "an update in the clear; this site allows sums over 3 sites only" in here.refuse(plain, 3, 20)
    assert "in the clear" not in here.refuse(plain.model_copy(update={"secure": terms()}), 3, 20)
    more = FakeSites(tmp_path, keys, allow="secure_sites = 4", peers=(*NAMES, "south"))
    with pytest.raises(FedmllmError, match="a secure sum over 3 sites; this site requires 4"):
        more.round()


@pytest.mark.parametrize(
    ("allow", "peers", "says"),
    [
        ("secure_sites = 2", NAMES, r"allow\.secure_sites: got 2; a sum needs 3 sites"),
        ("secure_sites = 4", NAMES, r"allow\.secure_sites: got 4; peers names 2 other sites"),
    ],
)
def test_a_site_file_that_demands_what_cannot_be_is_named(tmp_path, keys, allow, peers, says):
    with pytest.raises(ConfigError, match=says):
        FakeSites(tmp_path, keys, allow=allow, peers=peers)


def test_a_peer_under_two_names_or_without_a_key_is_named(tmp_path, keys):
    sites = FakeSites(tmp_path, keys)
    site = sites.members[0]._site
    for peers, says in (
        ({**site.peers, "double": site.peers["north"]}, "one key has two names"),
        ({**site.peers, "east": site.peers["north"]}, r"peers\.east: not the public key of"),
        ({"north": "ssh-ed25519 AAAA"}, r"peers\.north: not a"),
    ):
        with pytest.raises(FedmllmError, match=says):
            SecureMember(site.model_copy(update={"peers": peers}), tmp_path)


def test_the_site_checks_the_norm_that_the_server_cannot_see(tmp_path, keys):
    sites = FakeSites(tmp_path, keys)
    sites.rounds._max_norm = 1e-3
    with pytest.raises(FedmllmError, match=r"the norm of its delta is over update_filter\.max_norm = 0\.001"):
        sites.round()
    assert not any(words_of(content) is not None for _, content in sites.sent)


# ---- experiments

SECURE = {"name": "flower-sites", "secure": {}}
TABLE = {"data": "synthetic-irony", "cohort_size": 3, "partition": {"name": "dirichlet", "num_clients": 5}}
LINEAR = sorted(name for name, member in Aggregator.members.items() if member.weighted_by)


def test_the_aggregators_that_need_a_sum_only_are_these():
    assert LINEAR == [
        "fedadagrad", "fedadagrad-reference", "fedadam", "fedadam-reference", "fedavg", "fedavg-reference", "fedavgm",
        "fedavgm-reference", "feddyn", "fedsa-lora", "fedsvd", "fedyogi", "fedyogi-reference", "ffa-lora", "rolora",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"aggregator": "median"},
            r"aggregator\.name: got 'median', which needs each site's update; .*allowed: fedada",
        ),
        ({"aggregator": "krum", "cohort_size": 5}, "got 'krum', which needs each site's update"),
        ({"aggregator": "flora"}, "got 'flora', which needs each site's update"),
        ({"aggregator": "scaffold"}, "got 'scaffold', which returns more than the delta"),
        (
            {"privacy": {"name": "client-dp", "noise_multiplier": 1, "clip": 1}},
            r"privacy\.name: got 'client-dp'; engine\.secure gives the server the sum",
        ),
        ({"cohort_size": 2}, "cohort_size: got 2; engine.secure needs 3 to 50 sites a round"),
        ({"engine": {**SECURE, "secure": {"bits": 40}}, "cohort_size": 5}, "lower bits, rows or bound"),
        ({"engine": {**SECURE, "secure": {"bits": 41}}}, r"engine\.secure\.bits: got 41"),
        ({"engine": {**SECURE, "secure": {"shares": 1}}}, r"engine\.secure\.shares: unknown key; allowed: bits, bound"),
        ({"engine": {"name": "in-process", "secure": {}}}, r"engine\.secure: unknown key"),
    ],
)
def test_what_needs_more_than_a_sum_is_refused_while_the_experiment_is_read(changes, says):
    with pytest.raises(ConfigError, match=says):
        Experiment.parse({**TABLE, "engine": SECURE, **changes})


@pytest.mark.parametrize("name", LINEAR)
def test_of_a_linear_aggregator_the_mean_gives_what_the_updates_give(name):
    from fedmllm.core.tensors import mean_delta, plain_mean_delta
    from fedmllm.core.types import ClientUpdate

    aggregator = Aggregator.pick(name, "aggregator")
    g = torch.Generator().manual_seed(0)
    params = {n: torch.randn(t.shape, generator=g) for n, t in LIKE.items()}
    at = Round(1, 0, 4, (0, 1, 2), 5)
    own = aggregator.sends(params, aggregator.init(params), at, 0).returned()
    updates = [
        ClientUpdate(k, {n: torch.randn(t.shape, generator=g) for n, t in own.items()}, rows, {})
        for k, rows in enumerate((7, 1, 30))
    ]
    mean = (mean_delta if aggregator.weighted_by == "rows" else plain_mean_delta)(updates)
    whole = replace(updates[0], delta=mean, num_examples=38, clients=(0, 1, 2))
    state, other = aggregator.init(params), aggregator.init(params)
    for _ in range(2):
        params_1, state = aggregator.apply(params, state, at, updates)
        params_2, other = aggregator.apply(params, other, at, [whole])
        for n in params_1:
            torch.testing.assert_close(params_1[n], params_2[n], rtol=1e-4, atol=1e-5)


def test_two_sites_are_too_few_also_if_all_of_them_take_part():
    every_site = Experiment.parse({"data": "synthetic-irony", "cohort_size": 0, "engine": SECURE})
    over_sites(every_site, ("a", "b", "c"), test=True)
    with pytest.raises(ConfigError, match=r"cohort_size: got 2; engine\.secure needs 3 to 50"):
        over_sites(every_site, ("a", "b"), test=True)


def test_a_plain_aggregator_over_sites_is_not_changed():
    """A run id does not depend on where an experiment runs, nor on its masks."""
    plain = Experiment.parse({**TABLE, "engine": {"name": "flower-sites"}})
    assert plain.run_id() == Experiment.parse({**TABLE, "engine": SECURE}).run_id()


# ---- trained (S6)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Federation:
    return Federation(tmp_path_factory.mktemp("rows"), 'name = "tiny"', rounds=1, train="max_steps = 2")


def last_adapter(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_a_run_with_masks_gives_the_adapter_of_one_without(rows, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    changes = ["evaluate.limit=2", "engine.attempts=2", "engine.retry_s=0"]
    over_the_wire(rows, tmp_path / "clear", changes, monkeypatch)
    wire = over_the_wire(
        rows, tmp_path / "masked", [*changes, "engine.secure={}"], monkeypatch, allow="secure_sites = 3"
    )
    torch.set_num_threads(before)
    clear, masked = (last_adapter(tmp_path / name / "out") for name in ("clear", "masked"))
    assert max(float((clear[n] - masked[n]).abs().max()) for n in clear) < 1e-7  # float32 sums in the clear one
    (event,) = [e for e in read(tmp_path / "masked" / "out" / "record.jsonl") if e["event"] == "round"]
    (entry,) = event["clients"]
    assert entry["clients"] == [0, 1, 2]
    assert entry["num_examples"] == 36
    assert event["dropped"] == []
    assert "aggregation_error" not in event  # it would need each update
    assert "only the sum" in event["aggregation_note"]
    size = sum(t.numel() for t in clear.values())
    assert event["up_bytes"] == 3 * (6 * size + 8 * 9) == event["up_lora_bytes"]
    assert load_run(tmp_path / "masked" / "out").history.rounds[0]["num_averaged"] == 3
    texts = [json.dumps(dict(content["about"])) for _, content in wire.replies if "adapter" in content]
    assert len(texts) == 3
    assert not any("loss" in text or "num_examples" in text for text in texts)
    first = next(e for e in read(tmp_path / "masked" / "out" / "record.jsonl") if e["event"] == "experiment")
    assert first["settings"]["engine"]["secure"] == {"drop_outs": "repeat", "bits": None, "rows": 2**20, "bound": 8.0}


def test_the_dry_run_prints_what_leaves_masked(rows, tmp_path):
    from fedmllm.flower.site.dry_run import dry_run

    write_sites(rows, tmp_path, allow="secure_sites = 3")
    lines = []
    secure = rows.folder / "secure.toml"
    secure.write_text((rows.folder / "experiment.toml").read_text() + "secure = {}\n")
    dry_run(tmp_path / "east" / "site.toml", secure, tmp_path / "sent", lines.append)
    after = "\n".join(lines).split("this site would reply:")[1]
    assert "as one masked uint8 array" in after
    assert "num_examples" not in after
    data = np.frombuffer((tmp_path / "sent").read_bytes(), np.uint8)
    assert chisquare(np.bincount(data >> 4, minlength=16)).pvalue > 1e-6
    with pytest.raises(Refused, match="an update in the clear; this site allows sums over 3 sites only"):
        dry_run(tmp_path / "east" / "site.toml", rows.folder / "experiment.toml", None, lines.append)


def test_without_peers_a_site_takes_part_in_no_secure_sum(rows, tmp_path):
    write_sites(rows, tmp_path, allow="", peers=False)
    member = SecureMember(Site.load(tmp_path / "east" / "site.toml"), tmp_path / "state")
    advert = member.advertise(RUN)
    request = Request.of(EXPERIMENT, "", "east", 0, 1)
    others = tuple(a.model_copy(update={"site": n}) for a, n in zip(terms().adverts, NAMES, strict=True))
    known = terms(adverts=(advert, *others[1:]))
    with pytest.raises(Refused, match="north is not among the peers of this site's file"):
        member.prepare(request.model_copy(update={"secure": known}), Asked("", ""))
