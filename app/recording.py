"""A tower recorded: torch runs its operations in one call, without Python.

A forward in Python takes the interpreter's lock again after each of some hundred operations. Beside threads that
answer requests, those of a batch of short texts waited for it for half of their time.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)
Rows = Callable[[Tensor], Tensor]


class Recorded:
    """Batches (B, ...) -> rows (B, D), recorded at the first call; what cannot be recorded runs in Python as it is.

    module: gives the rows, in eval mode. precision: what it runs in; a record has the casts in itself.
    examples: several batches. The first is recorded, and the record is used if it gives for all of them, to the bit,
    what the module gives: where the module takes a shape for a constant, other shapes show it.
    """

    def __init__(
        self,
        module: nn.Module,
        examples: Callable[[], Sequence[Tensor]],
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._module, self._examples, self._precision = module, examples, precision
        self._rows: Rows | None = None

    def __call__(self, batch: Tensor) -> Tensor:
        return self.ready()(batch)

    def ready(self) -> Rows:
        """What gives the rows, from any thread, once this has returned."""
        if self._rows is None:
            self._rows = self._recorded() or self._in_python
        return self._rows

    @property
    def recorded(self) -> bool:
        """Whether Python is out of it."""
        return self.ready() != self._in_python

    def _in_python(self, batch: Tensor) -> Tensor:
        with torch.inference_mode(), self._precision():
            rows: Tensor = self._module(batch)
        return rows

    def _recorded(self) -> Rows | None:
        try:
            examples = self._examples()
            rows = self._record(examples[0])
            same = all(torch.equal(rows(each), self._in_python(each)) for each in examples)
            why = "its record gives other rows"
        except Exception as error:  # a model may do anything
            same, why = False, str(error).partition("\n")[0]
        if not same:
            log.info("%r runs in Python, for it cannot be recorded: %s", self._module, why)
        return rows if same else None

    def _record(self, example: Tensor) -> Rows:
        # torch warns of what it takes for a constant, which the examples show, and that it prefers torch.export, which
        # has nothing that runs without Python or a compiler.
        with warnings.catch_warnings(), torch.no_grad(), self._precision():
            warnings.simplefilter("ignore")
            record: Any = torch.jit.trace(self._module, (example,), check_trace=False)

        def rows(batch: Tensor) -> Tensor:
            # Not optimised: that runs the first batches slowly, and finds nothing to fuse on a processor.
            with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                found: Tensor = record(batch)
            return found

        return rows
