"""What the report's figures show, read back from their Axes, on the run lm_eval saved and on edge cases."""

import hashlib
import itertools
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text

from lm_eval_lora_ensemble import figures
from lm_eval_lora_ensemble.analysis.run import merge_runs
from lm_eval_lora_ensemble.analysis.runs import load_runs
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.figures.style import MANY_POINTS, look
from lm_eval_lora_ensemble.figures.text import metric_label, task_name
from lm_eval_lora_ensemble.metrics.battery import uncertainty_scores
from lm_eval_lora_ensemble.metrics.bootstrap import Estimate, ResamplingPlan
from lm_eval_lora_ensemble.metrics.calibration import expected_calibration_error, reliability_table
from lm_eval_lora_ensemble.metrics.detection import Detection, detect
from lm_eval_lora_ensemble.metrics.ensemble_size import SizeMetrics, by_size
from lm_eval_lora_ensemble.metrics.predictions import Predictions
from lm_eval_lora_ensemble.metrics.registry import METRICS
from lm_eval_lora_ensemble.metrics.selection import risk_coverage

pytestmark = pytest.mark.filterwarnings("error")

LONG = "mmlu_high_school_geography_continuation"
NAN = float("nan")
UNKNOWN = (NAN, NAN)


@pytest.fixture(scope="module")
def run():
    (found,) = merge_runs(load_runs(str(Path(__file__).parent / "data" / "smollm2_arc_easy")))
    return found


@pytest.fixture(scope="module")
def arc(run) -> Predictions:
    return run.predictions("arc_easy_validation")


@pytest.fixture(scope="module")
def others(run) -> dict[str, Predictions]:
    return {
        "mmlu_astronomy": run.predictions("mmlu_astronomy"),
        "mmlu_college_physics": run.predictions("mmlu_college_physics"),
        LONG: run.predictions("mmlu_anatomy"),
    }


@pytest.fixture(scope="module")
def detections(arc, others) -> dict[str, dict[str, Detection]]:
    return {name: detect(arc, other, resamples=50) for name, other in others.items()}


def random_predictions(documents: int, members: int = 5) -> Predictions:
    rng = np.random.default_rng(3)
    counts = rng.integers(3, 6, documents)
    scores = rng.normal(size=(1, documents, 5)) * 2 + rng.normal(size=(members, documents, 5))
    scores[:, np.arange(5) >= counts[:, None]] = -np.inf
    return Predictions.from_scores(scores, rng.integers(0, counts), counts=counts)


def estimate(value: float, reach: float = 0.05) -> Estimate:
    around = (value - reach, value + reach)
    return Estimate(value, reach / 2, 0.0, around, around, around)


def curve(label: str, *values: float) -> figures.Curve:
    return figures.Curve(label, tuple(range(1, len(values) + 1)), tuple(map(estimate, values)))


def lines(ax) -> dict:
    """The Axes' lines by the part of the label that holds no number."""
    return {str(line.get_label()).split(",")[0]: line for line in ax.get_lines()}


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def note(ax) -> str:
    """What stands above the Axes below the title, on one line."""
    return " ".join(ax.texts[-1].get_text().split())


# what is drawn


def test_reliability_points_are_the_tables_rows(arc):
    ax = figures.plot_reliability(arc, bins=12, level=0.9)
    rows = [row for row in reliability_table(arc.confidence, arc.correct, 12, level=0.9) if row.n]
    (bars,) = (c for c in ax.containers if isinstance(c, ErrorbarContainer))
    points, _, (intervals,) = bars
    assert np.array_equal(points.get_xdata(), [row.confidence for row in rows])
    assert np.array_equal(points.get_ydata(), [row.accuracy for row in rows])
    limits = [segment[:, 1] for segment in intervals.get_segments()]
    assert np.allclose(limits, [(row.accuracy_low, row.accuracy_high) for row in rows])
    gaps = next(c for c in ax.collections if c.get_label().startswith("gap"))
    ends = [segment[:, 1] for segment in gaps.get_segments()]
    assert np.allclose(ends, [(row.confidence, row.accuracy) for row in rows])
    counts = [int(text.get_text()) for text in ax.texts if text.get_text().isdigit()]
    assert counts == [row.n for row in rows]
    assert sum(counts) == arc.n_documents
    ece = expected_calibration_error(arc.confidence, arc.correct, 12)
    assert f"ECE = {ece:.3f} (12 bins of equal width), n = 570 documents" in note(ax)
    assert "accuracy, 90 % Wilson interval" in legend(ax)


def test_reliability_numbers_stand_upright_when_they_would_touch_and_go_when_they_would_still():
    predictions = random_predictions(3000)

    def rotations(bins: int) -> set[float]:
        ax = figures.plot_reliability(predictions, bins=bins)
        return {text.get_rotation() for text in ax.texts if text.get_text().isdigit()}

    assert [rotations(bins) for bins in (10, 30, 60)] == [{0.0}, {90.0}, set()]


def test_confidence_histogram_stacks_right_and_wrong_answers(arc):
    ax = figures.plot_confidence_histogram(arc, bins=10)
    right, wrong = ax.containers
    edges = np.linspace(0, 1, 11)
    at = np.maximum(np.searchsorted(edges, arc.confidence) - 1, 0)  # right-closed, as the table's bins
    for bars, chosen in ((right, arc.correct), (wrong, ~arc.correct)):
        assert np.array_equal([bar.get_height() for bar in bars], np.bincount(at[chosen], minlength=10))
    assert [bar.get_y() for bar in wrong] == [bar.get_height() for bar in right]
    assert wrong[0].get_hatch()
    assert not right[0].get_hatch()
    assert lines(ax)["accuracy 0.637"].get_xdata()[0] == arc.correct.mean()
    assert lines(ax)["mean confidence 0.823"].get_xdata()[0] == arc.confidence.mean()


def test_information_map_has_a_point_a_document_apart_by_colour_and_marker(arc):
    ax = figures.plot_information_map(arc)
    scores = uncertainty_scores(arc)
    where = np.stack([scores["entropy"], scores["mutual_information"]], axis=1)
    right, wrong = ax.collections
    assert np.array_equal(right.get_offsets(), where[arc.correct])
    assert np.array_equal(wrong.get_offsets(), where[~arc.correct])
    assert to_hex(right.get_facecolor()[0]) != to_hex(wrong.get_edgecolor()[0])
    assert not np.array_equal(right.get_paths()[0].vertices, wrong.get_paths()[0].vertices)
    low, high = ax.get_ylim()
    assert low <= where[:, 1].min()
    assert where[:, 1].max() <= high < 0.25, "the axis is the data's, not the bounds'"
    assert "n = 570 documents, N = 5 members, C = 3 to 5 choices" in note(ax)


def test_information_map_draws_the_bounds_in_reach_and_states_the_other(arc):
    ax = figures.plot_information_map(arc)
    assert np.allclose(lines(ax)["H = ln C = 1.61"].get_xdata(), np.log(5))
    diagonal = lines(ax)["MI = H"]
    assert np.array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert diagonal.get_ydata()[-1] == ax.get_ylim()[1]
    assert not any(label.startswith("MI = ln N") for label in legend(ax))
    assert "MI = ln N = 1.61 lies above the axis" in note(ax)

    opposed = np.log([[[0.999, 0.001]], [[0.001, 0.999]]])
    ax = figures.plot_information_map(Predictions.from_scores(opposed, [0]))
    assert np.allclose(lines(ax)["MI = ln N = 0.69"].get_ydata(), np.log(2))
    assert np.allclose(lines(ax)["H = ln C = 0.69"].get_xdata(), np.log(2))
    assert "above the axis" not in note(ax)


def test_information_map_without_gold_answers_tells_nothing_apart(arc):
    blind = Predictions.from_scores(arc.log_probabilities, None, counts=arc.counts)
    ax = figures.plot_information_map(blind)
    (points,) = ax.collections
    assert len(points.get_offsets()) == 570
    assert legend(ax)[0] == "gold answer unknown (570)"


@pytest.mark.parametrize(
    ("score", "key"), [("predictive_entropy", "entropy"), ("mutual_information", "mutual_information")]
)
def test_uncertainty_histograms_are_shares_on_common_bins(arc, others, score, key):
    ax = figures.plot_uncertainty_histograms(arc, others, score=score, in_domain_name="arc_easy_validation")
    inside, _, *outlines = ax.patches
    assert inside.get_fill()
    edges = inside.get_data().edges
    for patch, part in zip([inside, *outlines], [arc, *others.values()], strict=True):
        shares = patch.get_data()
        assert np.array_equal(shares.edges, edges)
        values = np.maximum(uncertainty_scores(part)[key], 0)
        assert np.allclose(shares.values, np.histogram(values, edges)[0] / len(values))
        assert shares.values.sum() == pytest.approx(1)
    assert not any(patch.get_fill() for patch in outlines)
    assert len({str(patch.get_linestyle()) for patch in outlines}) == 3
    assert legend(ax)[0] == "arc_easy_validation, in-domain (n = 570)"
    assert legend(ax)[3] == f"{LONG}, out-of-domain (n = 60)"
    assert "numbers of choices differ" in note(ax)


def test_risk_coverage_curves_are_risk_coverages(arc):
    small = arc.take(np.arange(200))  # as many coverages as documents: every one is drawn
    ax = figures.plot_risk_coverage(small, resamples=50)
    error = ~small.correct
    ours, best = risk_coverage(1 - small.confidence, error), risk_coverage(error, error)
    drawn = lines(ax)["ensemble"]
    places = np.searchsorted(drawn.get_xdata(), ours.coverage - 1e-9)
    assert np.allclose(drawn.get_ydata()[places], ours.risk, atol=1e-12)
    assert drawn.get_label() == f"ensemble, AURC {ours.aurc:.3f}"
    assert drawn.get_ydata().mean() == pytest.approx(ours.aurc), "the area is the mean over all coverages"
    assert lines(ax)["oracle"].get_ydata().mean() == pytest.approx(best.aurc)
    assert set(lines(ax)["random"].get_ydata()) == {error.mean()}
    alone = [small.only([m]) for m in range(5)]
    areas = [risk_coverage(1 - p.confidence, ~p.correct).aurc for p in alone]
    assert lines(ax)["mean single member"].get_ydata().mean() == pytest.approx(np.mean(areas))


def test_risk_coverage_band_is_the_bootstraps(arc):
    small = arc.take(np.arange(100))
    ax = figures.plot_risk_coverage(small, resamples=400, seed=1, level=0.8)
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    order = np.argsort(-small.confidence, kind="stable")
    for accepted in (30, 100):
        risks = [
            np.repeat(~small.correct[order], w[order].astype(int))[:accepted].mean()
            for weights in ResamplingPlan(100, 400, 1).draws()
            for w in weights
        ]
        limits = corners[np.isclose(corners[:, 0], accepted / 100), 1]
        assert np.allclose([limits.min(), limits.max()], np.quantile(risks, [0.1, 0.9]))
    assert legend(ax)[0] == "80 % interval, ensemble"
    again = figures.plot_risk_coverage(small, resamples=400, seed=1, level=0.8).collections[0]
    assert np.array_equal(again.get_paths()[0].vertices, corners)


def test_risk_coverage_resamples_whole_tasks_of_a_group(others):
    pooled = Predictions.concatenate(list(others.values()))
    assert "resamples of tasks" in note(figures.plot_risk_coverage(pooled, resamples=20))


def test_by_size_draws_mean_and_spread(arc):
    rows = by_size(arc)
    ax = figures.plot_by_size(rows, metric="nll")
    (bars,) = ax.containers
    points, _, (intervals,) = bars
    assert list(points.get_xdata()) == [1, 2, 3, 4, 5]
    assert np.array_equal(points.get_ydata(), [row.mean["nll"] for row in rows])
    heights = [np.diff(segment[:, 1])[0] / 2 for segment in intervals.get_segments() if len(segment)]
    assert np.allclose(heights[:4], [row.spread["nll"] for row in rows[:4]])
    assert ax.get_ylabel() == "nll (nats, lower is better)"
    assert [t.get_text() for t in ax.get_xticklabels()] == [
        "1\n(5)",
        "2\n(10)",
        "3\n(10)",
        "4\n(5)",
        "5\n(1)",
    ]


def test_curves_draw_values_quoted_intervals_and_the_reference():
    gap = Estimate(0.5, NAN, NAN, UNKNOWN, UNKNOWN, UNKNOWN)
    basic = Estimate(0.6, 0.1, 0.0, (0.4, 0.7), (0.5, 0.8), UNKNOWN)
    kept = figures.Curve("kept", (1, 2, 3), (estimate(0.7), basic, gap))
    lost = curve("lost", 0.1, 0.2, 0.3)
    ax = figures.plot_curves(
        [kept, lost], ylabel="share", reference=0.25, reference_label="chance", note="n = 570"
    )
    drawn = lines(ax)
    assert list(drawn["kept"].get_ydata()) == [0.7, 0.6, 0.5]
    assert list(drawn["lost"].get_ydata()) == [0.1, 0.2, 0.3]
    assert list(drawn["chance"].get_ydata()) == [0.25, 0.25]
    band = ax.collections[0].get_paths()[0].vertices
    assert sorted(set(band[band[:, 0] == 2, 1])) == [0.5, 0.8], "basic where BCa is not defined"
    assert band[:, 0].max() == 2, "no band where there is no interval"
    for attribute in ("get_color", "get_marker", "get_linestyle"):
        assert getattr(drawn["kept"], attribute)() != getattr(drawn["lost"], attribute)()
    assert "n = 570; bands: 95 % interval" in note(ax)
    ax.figure.canvas.draw()
    assert all(float(t.get_text()).is_integer() for t in ax.get_xticklabels()), "there is no epoch 1.5"


def test_detection_draws_auroc_from_the_first_task_down(detections):
    ax = figures.plot_detection(detections, level=0.9, note="in-domain: arc_easy_validation")
    for score in ("max_probability", "entropy", "expected_entropy", "mutual_information"):
        dots = lines(ax)[score.replace("_", " ")]
        assert list(dots.get_xdata()) == [by[score].auroc.value for by in detections.values()]
        assert [round(y) for y in dots.get_ydata()] == [0, 1, 2]
    segments = ax.collections[0].get_segments()
    quoted = [by["max_probability"].auroc.quoted[:2] for by in detections.values()]
    assert np.allclose([segment[:, 0] for segment in segments], quoted)
    assert set(lines(ax)["chance"].get_xdata()) == {0.5}
    bottom, top = ax.get_ylim()
    assert bottom > top
    assert ax.get_yticklabels()[2].get_text() == "mmlu_high_school_\ngeography_continuation"
    assert "bars: 90 % interval" in note(ax)


# what holds for all of them


def all_figures(inside: Predictions, others: dict, detections: dict) -> dict:
    rows = by_size(inside)
    return {
        "reliability": lambda **k: figures.plot_reliability(inside, **k),
        "confidence": lambda **k: figures.plot_confidence_histogram(inside, **k),
        "map": lambda **k: figures.plot_information_map(inside, **k),
        **{
            score: lambda score=score, **k: figures.plot_uncertainty_histograms(
                inside, others, score=score, in_domain_name=LONG, **k
            )
            for score in ("predictive_entropy", "mutual_information")
        },
        "risk": lambda **k: figures.plot_risk_coverage(inside, resamples=20, **k),
        "size": lambda **k: figures.plot_by_size(rows, metric="brier_score", **k),
        "detection": lambda **k: figures.plot_detection(detections, note=f"in-domain: {LONG}", **k),
        "curves": lambda **k: figures.plot_curves(
            [curve(LONG, 0.1, 0.2, 0.3), curve("lost", 0.3, 0.2, 0.2)], ylabel="accuracy (share)", **k
        ),
    }


@pytest.fixture(scope="module")
def drawers(arc, others, detections) -> dict:
    return all_figures(arc, others, detections)


def texts_of(ax) -> list[Text]:
    """Every visible text, tick labels only where their tick is."""
    ticks = [
        label
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim()))
        for tick, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        if min(low, high) <= tick <= max(low, high)
    ]
    found = [*ticks, ax.xaxis.label, ax.yaxis.label, ax.title, ax._left_title, *ax.texts]
    found += ax.get_legend().get_texts() if ax.get_legend() else []
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def assert_legible(ax) -> None:
    """No text leaves the figure, and no two cover each other."""
    ax.figure.canvas.draw()
    whole = ax.figure.bbox
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(ax)]
    for text, box in boxes:
        assert box.x0 >= whole.x0 - 1 and box.x1 <= whole.x1 + 1, text
        assert box.y0 >= whole.y0 - 1 and box.y1 <= whole.y1 + 1, text
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert min(width, height) <= 1.5, f"{a!r} covers {b!r}"


KINDS = (
    "reliability",
    "confidence",
    "map",
    "predictive_entropy",
    "mutual_information",
    "risk",
    "size",
    "detection",
    "curves",
)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_keep_apart_and_inside_also_under_long_names(drawers, kind):
    ax = drawers[kind](title=f"{LONG}, five members, one title too long for one line of this figure")
    assert_legible(ax)
    assert to_hex(ax.figure.get_facecolor()) == "#ffffff"
    assert min(text.get_fontsize() for text in texts_of(ax)) * 480 / ax.figure.get_figwidth() / 72 >= 8.5, (
        "eight and a half pixels at a width of 480"
    )
    if kind != "curves":  # its labels are the caller's
        labels = ax.get_xlabel() + ax.get_ylabel()
        assert any(u in labels for u in ("nats", "share", "probability", "count", "AUROC", "better"))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_numbers_give_equal_files(drawers, kind, tmp_path):
    digests = []
    for attempt in ("a", "b"):
        files = figures.save(drawers[kind](title="a title"), tmp_path / f"{attempt}.v1")
        assert [file.name for file in files] == [f"{attempt}.v1.svg", f"{attempt}.v1.png"]
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]
    svg = (tmp_path / "a.v1.svg").read_text()
    ElementTree.fromstring(svg)
    assert len(svg) < 150_000
    assert "<dc:date>" not in svg
    assert "<text" not in svg, "glyphs are paths: no font of the reader is needed"


@pytest.mark.parametrize("kind", KINDS)
def test_figures_draw_into_axes_of_the_caller_and_leave_settings_alone(drawers, kind):
    before = dict(mpl.rcParams)
    ax = Figure().add_subplot()
    assert drawers[kind](ax=ax) is ax
    assert dict(mpl.rcParams) == before


EDGES = {
    "one document": lambda p: p.take([0]),
    "all right": lambda p: p.take(p.correct),
    "all wrong": lambda p: p.take(~p.correct),
    "one member": lambda p: p.only([0]),
    "equal members": lambda p: p.only([1, 1, 1]),
    "certain": lambda p: Predictions.from_scores(np.tile([0.0, -np.inf], (2, 4, 1)), [0, 0, 0, 0]),
    "ragged": lambda _: random_predictions(50),
}


@pytest.mark.parametrize("edge", EDGES)
def test_edge_cases_are_drawn_without_a_warning(arc, others, edge):
    inside = EDGES[edge](arc)
    outside = {name: EDGES[edge](part) for name, part in others.items()}
    with np.errstate(divide="warn", invalid="warn"):
        drawn = all_figures(inside, outside, {n: detect(inside, p, resamples=10) for n, p in outside.items()})
        for draw in drawn.values():
            assert_legible(draw(title=edge))


def test_one_member_is_said_to_have_no_mutual_information(arc):
    single = arc.only([0])
    histogram = figures.plot_uncertainty_histograms(
        single, {}, score="mutual_information", in_domain_name="arc_easy"
    )
    for ax in (figures.plot_information_map(single), histogram):
        assert "one member has no mutual information" in ax.texts[0].get_text()
        assert not ax.collections
        assert not ax.patches
    risk = figures.plot_risk_coverage(single, resamples=20)
    assert "one member" in lines(risk)
    assert "mean single member" not in lines(risk)


def test_undefined_estimates_leave_gaps():
    nothing = Estimate(NAN, NAN, NAN, UNKNOWN, UNKNOWN, UNKNOWN)
    ax = figures.plot_curves([figures.Curve("a", (1, 2), (nothing, nothing))], ylabel="share")
    assert_legible(ax)
    rows = {
        "a": {"entropy": Detection(nothing, nothing, nothing)},
        "b": {"max_probability": Detection(*[estimate(0.7)] * 3)},
    }
    ax = figures.plot_detection(rows)
    assert_legible(ax)
    assert list(lines(ax)["max probability"].get_xdata()) == [0.7]


def test_a_metric_that_is_infinite_at_every_size_leaves_the_axes_empty():
    rows = [SizeMetrics(k, 2, True, {"nll": np.inf}, {"nll": NAN}) for k in (1, 2)]
    assert_legible(figures.plot_by_size(rows, metric="nll"))


def test_a_curve_of_one_point_shows_its_interval():
    ax = figures.plot_curves([curve("a", 0.5)], ylabel="share")
    (segment,) = next(c for c in ax.collections if hasattr(c, "get_segments")).get_segments()
    assert np.allclose(segment, [(1, 0.45), (1, 0.55)])


def test_fifteen_thousand_documents_are_quick_and_small(tmp_path):
    big = random_predictions(15_000)
    start = time.process_time()
    figures.plot_risk_coverage(big)
    assert time.process_time() - start < 2
    ax = figures.plot_information_map(big)
    assert big.n_documents > MANY_POINTS
    assert all(points.get_rasterized() for points in ax.collections)
    svg, _ = figures.save(ax, tmp_path / "map")
    assert svg.stat().st_size < 200_000


def test_names_from_strangers_are_shown_as_text(arc, tmp_path):
    ax = figures.plot_reliability(arc, title="$\\frac{1}{$ \x1b[31m <script> ]]> --")
    svg, _ = figures.save(ax, tmp_path / "x")
    ElementTree.fromstring(svg.read_text())
    assert ax._left_title.get_text().startswith("$\\frac{1}{$ \\x1b[31m")
    assert legend(figures.plot_curves([curve("_kept", 0.1, 0.2)], ylabel="share")) == [" _kept"]
    assert figures.plot_curves([curve("", 0.1, 0.2)], ylabel="share").get_legend() is None
    assert task_name("a" * 50, 20) == "a" * 20 + "\n" + "a" * 20 + "\n" + "a" * 10


def test_every_metric_has_a_label_with_its_unit():
    for name, metric in METRICS.items():
        label = metric_label(name)
        assert metric.unit in label
        assert metric.direction in label


def test_series_differ_without_colour():
    looks = [look(i) for i in range(30)]
    assert len({(a.marker, str(a.dashes)) for a in looks}) == 30


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda p: figures.plot_by_size(by_size(p.only([0])), metric="f1"), "no metric 'f1'; choose one of"),
        (lambda p: figures.plot_by_size([], metric="nll"), "no ensemble size"),
        (lambda p: figures.plot_curves([], ylabel="nll (nats)"), "no curve to draw"),
        (lambda p: figures.plot_detection({}), "--ood"),
        (lambda p: figures.Curve("kept", (1, 2), (estimate(0.5),)), "2 positions and 1 estimates"),
        (
            lambda p: figures.plot_reliability(
                Predictions.from_scores(p.log_probabilities, None, counts=p.counts)
            ),
            "gold answers are needed",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(arc, draw, message):
    with pytest.raises(EnsembleError, match=message):
        draw(arc)


def test_figures_need_neither_torch_nor_lm_eval_nor_pyplot():
    code = (
        "import sys, lm_eval_lora_ensemble.figures; "
        "print([m for m in ('torch', 'lm_eval', 'transformers', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_figures_files_are_named_by_any_path(tmp_path):
    axes = figures.plot_reliability(Predictions.from_scores([[2.0, 0.0], [0.0, 1.0]], gold=[0, 0]))
    for place in (str(tmp_path / "one"), tmp_path / "one.png", str(tmp_path / "one.svg")):
        files = figures.save(axes, place)
        assert [file.name for file in files] == ["one.svg", "one.png"]
        assert all(file.is_file() for file in files)
