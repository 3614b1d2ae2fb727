"""Scores of choices and greedy answers, from one pass over the prompts.

Prompts are sorted by length and padded on the left, so that every row's next token stands in the last column.
Shapes: B rows, L prompt tokens, N continuations, T their tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fedmllm.backbones.base import Batch, Row
from fedmllm.backbones.encode import Encoder
from fedmllm.backbones.kv_cache import cache_argument, cache_of
from fedmllm.core.errors import FedmllmError
from fedmllm.core.types import Conversation

_PASS_TOKENS = {"cpu": 2048, "cuda": 32768}  # prompt tokens of one pass, padding included
WINDOW = 256  # prompts that are encoded, and so held with their pixels, at a time

_Out = TypeVar("_Out")


class CausalModel(Protocol):
    """A model with its encoder, as far as decoding needs it."""

    base: torch.nn.Module
    encoder: Encoder
    device: torch.device

    @property
    def ends(self) -> list[int]: ...  # ids of tokens that end an answer

    def collate(self, rows: Sequence[Row], left: bool = False) -> Batch: ...

    def logits(self, batch: Batch, index_N: Tensor, **arguments: Any) -> tuple[Tensor, Any]: ...


@dataclass
class Prefilled:
    """State of the model after B prompts."""

    logits_BV: Tensor  # of the token behind each prompt
    cache: Any
    mask_BL: Tensor | None  # None if no row is padded
    position_B: Tensor  # of the token behind each prompt


class Decoder:
    """Scores and greedy answers of one model.

    Args:
        model: It is neither trained nor changed.
    """

    def __init__(self, model: CausalModel) -> None:
        self._backbone = model
        self._encoder = model.encoder
        self._cache_argument = cache_argument(model.base)

    @torch.no_grad()
    def score(self, prompts: Sequence[Conversation], choices: Sequence[Sequence[str]]) -> list[list[float]]:
        """log p(choice | prompt) of each choice of each prompt, summed over the choice's tokens.

        Raises:
            FedmllmError: The numbers of prompts and lists of choices differ, or a choice is empty.
        """
        if len(prompts) != len(choices):
            raise FedmllmError(f"{len(prompts)} prompts but choices for {len(choices)}")
        known: dict[str, list[int]] = {}  # rows mostly have the same choices
        for options in choices:
            known |= {option: self._option_ids(option, options) for option in options if option not in known}
        ids = [[known[option] for option in options] for options in choices]

        def run(rows: Sequence[Row], index: Sequence[int]) -> list[list[float]]:
            return self._score_pass(rows, [ids[i] for i in index])

        return self._in_passes(prompts, [max(1, len(options) // 4) for options in choices], run)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Conversation], max_new_tokens: int) -> list[str]:
        """Greedy answers: the likeliest token, one by one, until the model ends its turn or `max_new_tokens`."""

        def run(rows: Sequence[Row], _: Sequence[int]) -> list[str]:
            return [self._encoder.decode(ids) for ids in self._generate_pass(rows, max_new_tokens)]

        return self._in_passes(prompts, [1] * len(prompts), run)

    def _option_ids(self, option: str, options: Sequence[str]) -> list[int]:
        ids = self._encoder.answer_ids(option)
        if not ids:
            raise FedmllmError(f"choices {list(options)}: an empty choice has no likelihood")
        return ids

    # --- passes

    def _in_passes(
        self,
        prompts: Sequence[Conversation],
        weights: Sequence[int],
        run: Callable[[Sequence[Row], Sequence[int]], list[_Out]],
    ) -> list[_Out]:
        """`run(rows, their indices)` over passes of similar lengths; results in the order of `prompts`."""
        results: dict[int, _Out] = {}
        for start in range(0, len(prompts), WINDOW):
            window = range(start, min(start + WINDOW, len(prompts)))
            rows = {i: self._encoder.prompt(prompts[i]) for i in window}

            def run_part(part: list[int], rows: dict[int, Row] = rows) -> list[_Out]:
                return run([rows[i] for i in part], part)

            for index in self._groups(rows, weights):
                for part, out in self._halved_if_short(index, run_part):
                    results.update(zip(part, out, strict=True))
        return [results[i] for i in range(len(prompts))]

    def _groups(self, rows: dict[int, Row], weights: Sequence[int]) -> Iterator[list[int]]:
        """Rows by falling length, as many as a pass may hold, at least one. The widest come first, to fail early."""
        budget = _PASS_TOKENS[self._backbone.device.type]
        group: list[int] = []
        for i in sorted(rows, key=lambda i: -rows[i].num_tokens):
            longest = rows[group[0] if group else i].num_tokens
            if group and longest * (len(group) + 1) * max(weights[j] for j in [*group, i]) > budget:
                yield group
                group = []
            group.append(i)
        if group:
            yield group

    def _halved_if_short(
        self, index: list[int], run: Callable[[list[int]], list[_Out]]
    ) -> Iterator[tuple[list[int], list[_Out]]]:
        try:
            yield index, run(index)
            return
        except torch.OutOfMemoryError:
            if len(index) == 1:
                raise
        torch.cuda.empty_cache()
        for part in (index[: len(index) // 2], index[len(index) // 2 :]):
            yield from self._halved_if_short(part, run)

    # --- one pass

    def _prefill(self, rows: Sequence[Row]) -> Prefilled:
        batch = self._backbone.collate(rows, left=True)
        mask_BL = batch["attention_mask"]
        num_rows, length = mask_BL.shape
        positions = batch["per_token"].get("position_ids")  # [3, B, L] if the family has M-RoPE
        if positions is None:
            batch["per_token"]["position_ids"] = (mask_BL.cumsum(dim=1) - 1).clamp(min=0)
            position_B = mask_BL.sum(dim=1)
        else:
            position_B = positions.amax(dim=(0, 2)) + 1
        if all(row.num_tokens == length for row in rows):
            del batch["attention_mask"]
        last_B = torch.arange(1, num_rows + 1, device=mask_BL.device) * length - 1
        logits_BV, output = self._backbone.logits(batch, last_B, use_cache=True)
        return Prefilled(logits_BV, cache_of(output), batch.get("attention_mask"), position_B)

    def _step(self, past: Prefilled, ids_NT: Tensor, index_M: Tensor) -> Tensor:
        """Logits [M, V] of these among the N x T tokens, which follow the cached ones and are added to the cache."""
        position_NT = past.position_B[:, None] + torch.arange(ids_NT.shape[1], device=ids_NT.device)
        if self._encoder.rope_index is not None:
            position_NT = position_NT.expand(3, -1, -1)
        batch = {"input_ids": ids_NT, "per_token": {"position_ids": position_NT}, "rows": ()}
        if past.mask_BL is not None:
            past.mask_BL = batch["attention_mask"] = torch.cat([past.mask_BL, torch.ones_like(ids_NT)], dim=1)
        logits_MV, output = self._backbone.logits(batch, index_M, use_cache=True, **{self._cache_argument: past.cache})
        past.cache = cache_of(output)
        past.position_B = past.position_B + ids_NT.shape[1]
        return logits_MV

    def _score_pass(self, rows: Sequence[Row], options: Sequence[list[list[int]]]) -> list[list[float]]:
        past = self._prefill(rows)
        row_N = [b for b, row in enumerate(options) for _ in row]
        first_N = self._pick(_log_softmax(past.logits_BV), row_N, [ids[0] for row in options for ids in row])
        longer = [(n, ids) for n, ids in enumerate(ids for row in options for ids in row) if len(ids) > 1]
        if longer:
            rest_N = self._score_rest(past, [row_N[n] for n, _ in longer], [ids for _, ids in longer])
            first_N = first_N.index_add(0, torch.tensor([n for n, _ in longer], device=first_N.device), rest_N)
        scores = iter(first_N.tolist())  # the only wait for the device
        return [[next(scores) for _ in row] for row in options]

    def _pick(self, logp_BV: Tensor, rows: list[int], tokens: list[int]) -> Tensor:
        """[N]: the log-probability of each token in its row."""
        row_N, token_N = (torch.tensor(values, device=logp_BV.device) for values in (rows, tokens))
        return logp_BV[row_N, token_N]

    def _score_rest(self, past: Prefilled, row_N: list[int], options: Sequence[list[int]]) -> Tensor:
        """[N]: sum over the tokens of each option except its first; each row's cache is copied for each of its options."""
        device = self._backbone.device
        index_N = torch.tensor(row_N, device=device)
        past.cache.reorder_cache(index_N)
        past.position_B = past.position_B[index_N]
        past.mask_BL = None if past.mask_BL is None else past.mask_BL[index_N]
        inputs = [torch.tensor(ids[:-1]) for ids in options]
        ids_NT = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(device)
        width = ids_NT.shape[1]
        place_M = [n * width + t for n, ids in enumerate(inputs) for t in range(len(ids))]
        logp_MV = _log_softmax(self._step(past, ids_NT, torch.tensor(place_M, device=device)))
        logp_M = self._pick(logp_MV, list(range(len(place_M))), [token for ids in options for token in ids[1:]])
        owner_M = torch.tensor([n for n, ids in enumerate(inputs) for _ in ids], device=device)
        return logp_M.new_zeros(len(options)).index_add(0, owner_M, logp_M)

    def _generate_pass(self, rows: Sequence[Row], max_new_tokens: int) -> list[list[int]]:
        past = self._prefill(rows)
        ends = torch.tensor(self._backbone.ends, device=self._backbone.device)
        token_B, done_B = past.logits_BV.argmax(dim=-1), torch.zeros(len(rows), dtype=torch.bool, device=ends.device)
        written: list[Tensor] = []
        all_B = torch.arange(len(rows), device=ends.device)
        while True:
            done_B = done_B | torch.isin(token_B, ends)
            written.append(torch.where(done_B, -1, token_B))
            if len(written) == max_new_tokens or bool(done_B.all()):
                break
            token_B = self._step(past, token_B[:, None], all_B).argmax(dim=-1)
        return [[int(t) for t in row if t >= 0] for row in torch.stack(written, dim=1).tolist()]


def at_least_float32(logits: Tensor) -> Tensor:
    """`logits` in float32, or float64 if they are: sums of log-probabilities in bfloat16 lose a digit that an AUC needs."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_softmax(logits: Tensor) -> Tensor:
    return at_least_float32(logits).log_softmax(dim=-1)
