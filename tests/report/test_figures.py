from __future__ import annotations

import dataclasses
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from noisescale.errors import MissingExtraError
from noisescale.records import Advice, Interval, Measurement, Tradeoff
from noisescale.report import drawing, figures

pytest.importorskip("matplotlib")


def texts(svg: str) -> str:
    return " | ".join(ElementTree.fromstring(svg).itertext())


@pytest.mark.parametrize("name", ["determined", "nothing_fits"])
def test_every_figure_is_valid_inline_svg(advices: dict[str, Advice], name: str) -> None:
    advice, width = advices[name], drawing.NARROW
    limits = advice.limits
    for figure in (
        figures.noise_scale_figure(advice, width=width),
        figures.speed_figure(
            advice.speed, knee=limits.throughput_knee, memory=limits.memory, width=width
        ),
        figures.tradeoff_figure(advice, width=width),
    ):
        svg = drawing.to_svg(figure, prefix="p-")
        ids = [node.get("id") for node in ElementTree.fromstring(svg).iter() if node.get("id")]
        assert all(str(name).startswith("p-") for name in ids)
        assert len(ids) == len(set(ids))
        assert "http" not in svg


def test_noise_scale_figure_names_what_it_draws(advices: dict[str, Advice]) -> None:
    figure = figures.noise_scale_figure(advices["determined"])
    assert figure.axes[0].get_yscale() == "log"
    words = texts(drawing.to_svg(figure, prefix=""))
    for name in ("no upper end", "first quarter", "last quarter: at least", "pooled"):
        assert name in words
    assert "examples seen in training" in words


def test_noise_scale_figure_of_a_measurement(measurement: Measurement) -> None:
    words = texts(drawing.to_svg(figures.noise_scale_figure(measurement), prefix=""))
    assert "global batch of the run: 32" in words


def test_an_empty_trajectory_says_so(advices: dict[str, Advice]) -> None:
    figure = figures.noise_scale_figure(advices["too_few_steps"])
    assert "no window of the run has an interval" in texts(drawing.to_svg(figure, prefix=""))


def test_speed_figure_marks_knee_memory_and_failures(advices: dict[str, Advice]) -> None:
    advice = advices["many_rows"]
    figure = figures.speed_figure(
        advice.speed, knee=advice.limits.throughput_knee, memory=advice.limits.memory
    )
    words = texts(drawing.to_svg(figure, prefix=""))
    for name in ("knee: 384", "largest that fits: 384", "does not fit", "waiting for data"):
        assert name in words


def test_speed_figure_of_one_point(advices: dict[str, Advice]) -> None:
    curve = advices["determined"].speed
    single = dataclasses.replace(curve, points=curve.points[:1])
    assert "examples per second" in texts(drawing.to_svg(figures.speed_figure(single), prefix=""))


def test_tradeoff_figure_labels_the_recommended_size(advices: dict[str, Advice]) -> None:
    words = texts(drawing.to_svg(figures.tradeoff_figure(advices["many_rows"]), prefix=""))
    assert " | 128 | " in words
    assert "accepted waste 1.5×" in words


def test_tradeoff_figure_leaves_far_rows_out_but_never_the_recommended(
    advices: dict[str, Advice],
) -> None:
    advice = advices["many_rows"]
    far = dataclasses.replace(advice, recommended=advice.table[0])
    drawn = figures.drawn_rows(far)
    assert advice.table[0] in drawn
    assert len(drawn) < len(advice.table)


def test_tradeoff_fit_figure(tradeoff: Tradeoff) -> None:
    figure = figures.tradeoff_fit_figure(
        tradeoff, batch_size=[8, 64, 512], steps=[1300, 260, 120], censored=[False, False, True]
    )
    words = texts(drawing.to_svg(figure, prefix=""))
    for name in ("critical batch: 92.9", "fewest steps", "not reached: at least"):
        assert name in words
    unknown = Interval(point=None, low=None, high=None)
    bare = dataclasses.replace(tradeoff, steps_min=unknown, critical_batch=unknown)
    drawing.to_svg(
        figures.tradeoff_fit_figure(bare, batch_size=[8, 64], steps=[1300, 260]), prefix=""
    )


def test_figures_leave_the_global_style_alone(advices: dict[str, Advice]) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawing.to_svg(figures.tradeoff_figure(advices["determined"]), prefix="")
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_extra_is_named(
    advices: dict[str, Advice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'noisescale\[report\]'"):
        figures.tradeoff_figure(advices["determined"])
