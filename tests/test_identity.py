"""Run identity of settings that were added after a release."""

from __future__ import annotations

from typing import Annotated

from fedmllm.core.spec import ADDED_LATER, EXECUTION_ONLY, Spec


class _Inner(Spec):
    rate: float = 0.5
    words: Annotated[tuple[str, ...], ADDED_LATER] = ("NA",)


class _Outer(Spec):
    inner: _Inner = _Inner()
    depth: Annotated[int, ADDED_LATER] = 3
    threads: Annotated[int, EXECUTION_ONLY] = 1


def test_a_later_setting_is_part_of_the_identity_only_if_it_differs_from_its_default() -> None:
    before = {"inner": {"rate": 0.5}}
    assert _Outer().identity() == before
    assert _Outer(depth=3, threads=8, inner=_Inner(words=("NA",))).identity() == before  # given, but the default
    changed = _Outer(depth=4, inner=_Inner(words=("NA", "-"))).identity()
    assert changed == {"inner": {"rate": 0.5, "words": ["NA", "-"]}, "depth": 4}
