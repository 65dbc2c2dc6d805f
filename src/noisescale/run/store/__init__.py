"""The store of a sweep: a folder with one line of JSON per trial."""

from __future__ import annotations

from noisescale.run.store.trials import TRIALS, TrialStore

__all__ = ["TRIALS", "TrialStore"]
