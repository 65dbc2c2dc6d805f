"""Measured steps run uncompiled: hooks inside ``torch.compile`` may silently not be called.

Compiled code holds the hooks that a module had when it was traced, and by default does not look
whether they changed. While a source watches, what ``torch.compile`` made runs as plain Python,
whatever made it and whenever; its compiled code stays for the steps between, and nothing is
traced twice.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_PREFIX = "_orig_mod"
_EAGER = "force_eager"

_holders: set[int] = set()
_stance: list[Any] = []
"""The stance in force while there are holders: one entry."""


class Uncompiled:
    """Keeps ``torch.compile`` from acting, from ``hold()`` to ``release()``.

    The last of several holders to release puts back what was in force before; so does the end
    of the model's life, for loops that never detach.
    """

    def __init__(self, model: nn.Module) -> None:
        self._key = id(self)
        weakref.finalize(model, _release, self._key).atexit = False

    def hold(self) -> None:
        """Run uncompiled from now on, whatever was chosen since the last call."""
        if self._key in _holders and self.holds():
            return
        now = torch.compiler.set_stance("force_eager")
        if not _holders or now.prev.stance != _EAGER:
            _stance[:] = [now]
        _holders.add(self._key)

    def holds(self) -> bool:
        """Whether nobody chose otherwise since ``hold()``."""
        # Private, but asking in public means to set it twice.
        known: Any = getattr(sys.modules.get("torch._dynamo.eval_frame"), "_stance", None)
        if hasattr(known, "stance"):
            return bool(known.stance == _EAGER)
        probe = torch.compiler.set_stance("force_eager")
        probe.__exit__(None, None, None)
        return bool(probe.prev.stance == _EAGER)

    def release(self) -> None:
        """Let compiled code run again."""
        _release(self._key)


def _release(key: int) -> None:
    if key not in _holders:
        return
    _holders.remove(key)
    if not _holders:
        held = _stance.pop()
        default = torch.compiler.set_stance("default")
        # Someone else's later choice stays.
        found = default.prev if default.prev != held.stance else held.prev
        default.prev = found
        default.__exit__(None, None, None)


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` in a form that ``torch.compile`` calls rather than traces."""
    disabled: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def plain(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile(module)`` wraps."""
    while _PREFIX in model._modules:
        inner = model._modules[_PREFIX]
        assert inner is not None
        model = inner
    return model


def plain_name(name: str) -> str:
    """Return a parameter's or module's name without the wrappers of ``torch.compile``."""
    return ".".join(part for part in name.split(".") if part != _PREFIX)
