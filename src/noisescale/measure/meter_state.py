"""A meter's memory between processes: what it keeps, and when it may be taken up again."""

from __future__ import annotations

from typing import Any

from noisescale.measure.arguments import check_state
from noisescale.measure.tally import Tally


def meter_state(meter: Any) -> dict[str, Any]:
    """Return the meter's memory, as plain values and tensors; take it between steps.

    Args:
        meter: the meter.
    """
    return {
        "version": 1,
        "source": meter.source,
        "mode": meter._mode,
        "every": meter._every,
        "abandoned": meter._source.abandoned,
        "preconditioner": meter._source.metric.name,
        "metric": meter._source.metric.state_dict(),
        **meter._tally.state_dict(),
        "log": meter._log.state_dict(),
    }


def load_meter_state(meter: Any, state: dict[str, Any]) -> None:
    """Continue exactly where the state was taken.

    Another mode may go on with it: the norms of every mode are unbiased, so that their steps
    are averaged together, and the record says so.

    Args:
        meter: the meter.
        state: what ``state_dict()`` returned.

    Raises:
        InvalidInputError: the state was taken with another source, cadence or grouping.
    """
    source = state["source"]
    mine = {
        "source": source if meter._auto else meter.source,
        "every": meter._every,
        "preconditioner": meter._source.metric.name,
    }
    check_state(state, mine)
    meter._switch(source)
    meter._source.metric.load_state_dict(state.get("metric", {}))
    meter._log.load_state_dict(state["log"])
    meter._tally = Tally.from_state(state)
    meter._source.abandoned = int(state["abandoned"])
    meter._split_done = False
    meter._arm()
