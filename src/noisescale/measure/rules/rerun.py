"""A module is run on other examples, to see what depends on the batch and what on single ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from noisescale.measure.gradients import tensors_in
from noisescale.measure.rules.nodes import UnknownError
from noisescale.measure.rules.registry import replaced
from noisescale.measure.rules.whole_module import twin
from noisescale.measure.untouched import untouched

# Largest difference between the outputs of one example in two batches, relative to the largest
# output: of batches of different and of equal size. (assumed; batch statistics of 10^4 examples
# differ by 1e-2)
_SAME_EXAMPLE = 1e-4
_SAME_SHAPES = 1e-6


class Rerun:
    """Runs one call of a module again, on other examples of its batch.

    Args:
        module: the module.
        size: number of examples.
        args: of the call.
        kwargs: of the call.
    """

    def __init__(
        self, module: nn.Module, size: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._module = module
        self._size = size
        self._arguments = args, kwargs

    def on(self, examples: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs for some of the examples, by their numbers, and the inputs.

        Raises:
            UnknownError: the module does not run on them.
        """

        def cut(tensor: Tensor) -> Tensor:
            batched = tensor.dim() and tensor.shape[0] == self._size
            given = tensor.detach()
            given = given[examples.to(given.device)] if batched else given
            return given.requires_grad_(tensor.requires_grad)

        args, kwargs = replaced(self._arguments, cut)
        named = dict(self._module.named_parameters(remove_duplicate=False))
        try:
            with untouched(self._module), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                output = twin(self._module, named)(*args, **kwargs)
        except Exception as error:
            raise UnknownError from error
        return tensors_in(output), tensors_in((args, kwargs))

    def half(self, outputs: Sequence[Tensor]) -> tuple[int, list[Tensor], list[Tensor]]:
        """Return half the number of examples, and outputs and inputs for the first of them.

        Args:
            outputs: of the call itself.

        Raises:
            UnknownError: the module does not run on them, or mixes the examples of a batch.
        """
        half = self._size // 2
        found, inputs = self.on(torch.arange(half))
        if not self._agree(outputs, found, half, _SAME_EXAMPLE) and self._mixes(half):
            raise UnknownError
        return half, found, inputs

    def _mixes(self, half: int) -> bool:
        """Whether outputs depend on other examples of the batch, random numbers being equal."""
        every = torch.arange(self._size)
        with torch.no_grad():
            one, other = self.on(every)[0], self.on(every % half)[0]
        return not self._agree(one, other, half, _SAME_SHAPES)

    def _agree(
        self, some: Sequence[Tensor], others: Sequence[Tensor], rows: int, bound: float
    ) -> bool:
        pairs = [
            (one.detach()[:rows], other.detach()[:rows])
            for one, other in zip(some, others, strict=False)
            if one.is_floating_point() and one.dim() and one.shape[0] == self._size
        ]
        return bool(pairs) and all(
            a.shape == b.shape
            and torch.allclose(a, b, rtol=0, atol=bound * float(a.abs().amax()), equal_nan=True)
            for a, b in pairs
        )
