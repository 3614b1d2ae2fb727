"""Progress bar of a run in a notebook."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from fedmllm.runs.events import Ended, Evaluated, Event, RoundEnd, Stopped


def in_notebook() -> bool:
    """True if the process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and bool(shell.has_trait("kernel"))


class NotebookBar:
    """A sink that draws one bar for the rounds of each federation of a run, with the loss or the metric seen last.

    Where ipywidgets is not installed, the bar is text.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._owner: int | None = None  # client whose training alone the bar shows; None: the federation

    def __call__(self, event: Event) -> None:
        if isinstance(event, RoundEnd):
            bar = self._bar_of(event)
            bar.update(event.round - bar.n)
            losses = [client["loss"] for client in event.clients if "loss" in client]
            if losses:
                bar.set_postfix_str(f"loss {sum(losses) / len(losses):.3f}")
        elif isinstance(event, Evaluated) and self._bar is not None:
            name, value = next(iter(event.metrics.items()))
            if value is not None:
                self._bar.set_postfix_str(f"{name} {value:.3f}")
        elif isinstance(event, Ended | Stopped):
            self._close()

    def _bar_of(self, event: RoundEnd) -> Any:
        if self._bar is None or event.client != self._owner:
            self._close()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tqdm recommends ipywidgets at import
                from tqdm.auto import tqdm
            self._bar, self._owner = tqdm(total=event.num_rounds, desc=event.whose, unit="round"), event.client
        return self._bar

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
