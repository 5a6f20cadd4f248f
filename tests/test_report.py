"""A report is one file that asks nothing of the network, escapes what it is given, and shows what it was told to."""

from __future__ import annotations

import html.parser
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from embedkit.errors import RunError
from embedkit.metrics import Interval, compute_metrics
from embedkit.plots import describe_interval
from embedkit.report import (
    Cell,
    Figure,
    Report,
    RocLine,
    Score,
    Section,
    Table,
    plot_montage,
    plot_roc,
    plot_scores,
    render_report,
    score_table,
    write_report,
)
from embedkit.roc import compute_roc

NAN = float("nan")
NASTY = "<script>alert('x')</script> & \"quoted\" $\\frac{1$"


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def tiny_png() -> bytes:
    return plot_montage([np.zeros((4, 4), np.uint8)], [""])


def page_of(*sections: Section, title: str = "t", lead: str = "l") -> str:
    return render_report(Report(title, lead, sections))


def table_html(*rows: tuple[Cell, ...], columns: tuple[str, ...] = ("a", "b")) -> str:
    return page_of(Section("s", table=Table(columns, rows)))


class Tags(html.parser.HTMLParser):
    """Collects tags, and checks that each that opens is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# --- the page


def test_a_page_is_whole_and_asks_nothing_of_the_network() -> None:
    figure = Figure(tiny_png(), "caption", "alt")
    page = page_of(*(Section(f"s{number}", "text", (figure,), Table(("a",), ((1,),))) for number in range(3)))
    tags = Tags(page).seen
    assert {tag for tag, _ in tags} & {"script", "link", "iframe"} == set()
    sources = [values["src"] for _, values in tags if "src" in values]
    assert len(sources) == 3
    assert all(source and source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import", page)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert "prefers-color-scheme: dark" in page


def test_everything_from_data_is_escaped() -> None:
    figure = Figure(tiny_png(), NASTY, NASTY)
    table = Table((NASTY, "n"), ((NASTY, 1),), caption=NASTY)
    report = Report(NASTY, NASTY, (Section(NASTY, NASTY, (figure,), table),) * 3, ((NASTY, NASTY),), NASTY)
    page = render_report(report)
    assert "<script" not in page
    assert "alert('x')" not in page
    tags = Tags(page).seen
    assert [values["alt"] for tag, values in tags if tag == "img"] == [NASTY] * 3


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_leaves_the_page_whole(text: str) -> None:
    Tags(page_of(Section(text, text, table=Table((text,), ((text,),))), title=text, lead=text))


def test_blank_lines_part_paragraphs() -> None:
    assert "<p>one</p><p>two\nlines</p>" in page_of(Section("s", "one\n\ntwo\nlines\n\n"))


def test_contents_stand_at_the_top_of_three_sections_or_more() -> None:
    assert "<nav" not in page_of(Section("a"), Section("b"))
    page = page_of(Section("a"), Section("b"), Section("c & d"))
    assert '<a href="#part-3">c &amp; d</a>' in page
    assert '<section id="part-3">' in page


def test_facts_and_footer_are_shown_only_if_given() -> None:
    bare = page_of(Section("a"))
    assert "<dl>" not in bare
    assert "<footer>" not in bare
    page = render_report(Report("t", "l", (), (("seed", "7"),), "embedkit 1"))
    assert "<dt>seed</dt><dd>7</dd>" in page
    assert "<footer>embedkit 1</footer>" in page


def test_a_picture_is_shown_at_half_its_pixels() -> None:
    png = tiny_png()
    height, width = pixels(png).shape[:2]
    image = next(
        values for tag, values in Tags(page_of(Section("s", figures=(Figure(png, "", ""),)))).seen if tag == "img"
    )
    assert (image["width"], image["height"]) == (str(width // 2), str(height // 2))


def test_a_figure_that_is_no_png_is_refused() -> None:
    with pytest.raises(ValueError, match="figure 'heat' starts with b'GIF89a', expected the bytes of a PNG file"):
        page_of(Section("s", figures=(Figure(b"GIF89a", "heat", ""),)))


# --- tables


def test_columns_of_numbers_are_set_right_and_text_left() -> None:
    page = table_html(("x", 1), ("y", None), ("z", 2.5))
    assert '<th>a</th><th class="number">b</th>' in page
    assert '<td>x</td><td class="number">1</td>' in page


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (1234567, "1,234,567"),
        (0.81234, "0.8123"),
        (NAN, "–"),
        (None, "–"),
        ("a<b", "a&lt;b"),
        (Interval(0.8744, 0.8116, 0.9234), '0.874 <span class="limits">[0.812, 0.923]</span>'),
        (Interval(0.5, NAN, NAN), "0.500"),
        (Interval(NAN, NAN, NAN), "undefined"),
    ],
)
def test_cells_are_shown_as_their_kind_asks(cell: Cell, shown: str) -> None:
    page = table_html((cell,), columns=("a",))
    assert re.search(r"<td[^>]*>(.*)</td>", page)[1] == shown  # type: ignore[index]


def test_a_row_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns; expected as many"):
        table_html((1,))


def test_the_best_of_each_metric_is_strong_and_baselines_quiet() -> None:
    scores = {
        "grid": {"auroc": Interval(0.9, 0.8, 1.0), "brier": Interval(0.2, 0.1, 0.3)},
        "logistic": {"auroc": Interval(0.8, 0.7, 0.9), "brier": Interval(0.1, 0.0, 0.2)},
        "other": {"auroc": Interval(NAN, NAN, NAN)},
    }
    table = score_table(scores, baselines=["logistic"])
    assert table.columns == ("Head", "AUROC", "Brier ↓")
    assert [row[0] for row in table.rows] == ["grid", "logistic (baseline)", "other"]
    assert table.rows[2][2] is None
    assert table.quiet == (1,)
    assert table.strong == ((0, 1), (1, 2))
    page = page_of(Section("s", table=table))
    assert '<tr class="quiet"><td>logistic (baseline)</td>' in page
    assert "<strong>0.900</strong>" in page
    assert page.count("<strong>") == 2


# --- writing


def test_a_report_is_written_whole_and_replaces_the_older(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(path, Report("first", "", ()))
    assert write_report(path, Report("sécond", "", ())) == path
    assert "<h1>sécond</h1>" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"report not written: .*report\.html"):
        write_report(tmp_path / "file" / "report.html", Report("t", "", ()))


def test_a_failed_report_leaves_the_older_as_it_was(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.html", Report("first", "", ()))
    with pytest.raises(ValueError, match="expected the bytes of a PNG"):
        write_report(path, Report("second", "", (Section("s", figures=(Figure(b"", "", ""),)),)))
    assert "<h1>first</h1>" in path.read_text(encoding="utf-8")


# --- pictures


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.8744, 0.8116, 0.9234), "0.874 [0.812, 0.923]"),
        (Interval(-0.1, -0.25, 0.05), "-0.100 [-0.250, 0.050]"),
        (Interval(123.456, 99.5, 12345.6), "123.5 [99.5, 12,346]"),
        (Interval(0.5, NAN, NAN), "0.500"),
        (Interval(NAN, NAN, NAN), "undefined"),
    ],
)
def test_intervals_read_alike_everywhere(interval: Interval, text: str) -> None:
    assert describe_interval(interval) == text


def test_a_montage_shows_each_slice_at_its_grey_value() -> None:
    image = pixels(plot_montage([np.full((8, 8), grey, np.uint8) for grey in (40, 200)], ["a", "b"]))
    height, width = image.shape[:2]
    row = image[int(height * 0.6)]
    assert row[width // 4].tolist() == [40, 40, 40]
    assert row[3 * width // 4].tolist() == [200, 200, 200]


def test_an_overlay_is_clear_at_zero_and_hot_at_one() -> None:
    slice_ = np.full((10, 10), 100, np.uint8)
    heat = np.zeros((10, 10))
    heat[:, 5:] = 1.0
    bare = pixels(plot_montage([slice_] * 2, ["", ""]))
    image = pixels(plot_montage([slice_] * 2, ["", ""], overlays=[heat, None]))
    middle, width = int(bare.shape[0] * 0.5), bare.shape[1]
    left, right = image[middle, width // 8], image[middle, int(width * 0.42)]
    assert left.tolist() == [100, 100, 100]
    assert right[0] > 180
    assert right[0] > right[2]
    assert image[middle, 3 * width // 4].tolist() == [100, 100, 100]


def test_an_outlined_slice_has_a_frame_and_the_others_none() -> None:
    images, titles = [np.zeros((8, 8), np.uint8)] * 2, ["", ""]

    def framed(outlined: tuple[int, ...]) -> list[bool]:
        image = pixels(plot_montage(images, titles, outlined=outlined))
        orange = (image[..., 0] > 200) & (image[..., 2] < 100)
        half = image.shape[1] // 2
        return [bool(orange[:, :half].any()), bool(orange[:, half:].any())]

    assert framed(()) == [False, False]
    assert framed((0,)) == [True, False]
    assert framed((1,)) == [False, True]


def test_a_region_has_a_rim_where_it_lies_also_at_the_edge_and_smaller_than_a_pixel() -> None:
    slices, titles = [np.zeros((20, 20), np.uint8)] * 2, ["", ""]

    def rim(region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        image = pixels(plot_montage(slices, titles, regions={1: region}))
        blue = (image[..., 2] > 200) & (image[..., 0] < 120)
        assert not blue[:, : image.shape[1] // 2].any()
        bare = pixels(plot_montage(slices, titles))
        assert image.shape == bare.shape and (image[~blue] == bare[~blue]).mean() > 0.98
        return blue.nonzero()

    corner, small = np.zeros((20, 20)), np.zeros((20, 20))
    corner[:10, :10], small[15, 15] = 1, 0.02
    upper, lower = rim(corner), rim(small)
    assert upper[0].max() < lower[0].min() and upper[1].max() < lower[1].min()
    assert len(upper[0]) > 5 * len(lower[0]) > 0
    assert not rim(np.zeros((20, 20)))[0].size


def test_a_montage_grows_by_rows_not_beyond_its_columns() -> None:
    slices = [np.zeros((8, 8), np.uint8)] * 7
    two_rows, one_row = (pixels(plot_montage(slices[:count], [""] * count, columns=4)).shape for count in (7, 4))
    assert two_rows[1] == one_row[1]
    assert two_rows[0] > 1.7 * one_row[0]


def test_montage_input_that_does_not_fit_is_refused() -> None:
    slices = [np.zeros((8, 8), np.uint8)]
    with pytest.raises(ValueError, match="1 images, 2 titles, 1 overlays; expected as many of each"):
        plot_montage(slices, ["a", "b"])
    with pytest.raises(ValueError, match="0 images, 0 titles, 0 overlays"):
        plot_montage([], [])
    with pytest.raises(ValueError, match=r"overlay \(4, 4\) does not fit its image \(8, 8\); expected the same shape"):
        plot_montage(slices, ["a"], overlays=[np.zeros((4, 4))])


def roc_line(label: str = "head", *, baseline: bool = False) -> RocLine:
    targets, scores, groups = [0, 0, 1, 1, 0, 1], [0.1, 0.4, 0.35, 0.8, 0.2, 0.9], list("abcdef")
    auroc = compute_metrics("binary", targets, scores, groups, resamples=50)["auroc"]
    return RocLine(label, compute_roc(targets, scores, groups, resamples=50), auroc, baseline)


def blue(png: bytes) -> int:
    """Number of pixels in the first colour of heads."""
    image = pixels(png)
    return int((np.abs(image - [0, 0x72, 0xB2]).sum(axis=2) < 12).sum())


def test_a_roc_plot_draws_heads_in_colour_and_baselines_in_grey() -> None:
    assert blue(plot_roc([roc_line()])) > 500
    assert blue(plot_roc([roc_line(baseline=True)])) == 0


def test_scores_are_dots_in_colour_and_baselines_in_grey() -> None:
    def scores(*, baseline: bool) -> bytes:
        return plot_scores({"task": [Score("head", Interval(0.8, 0.6, 0.9), baseline)]}, metric="AUROC", chance=0.5)

    assert blue(scores(baseline=False)) > 500
    assert blue(scores(baseline=True)) == 0


def test_names_from_data_are_no_formulas() -> None:
    assert plot_montage([np.zeros((4, 4), np.uint8)], [NASTY])
    assert plot_roc([roc_line(NASTY)], title=NASTY)
    assert plot_scores({NASTY: [Score(NASTY, Interval(0.5, 0.4, 0.6))]}, metric=NASTY)


def test_undefined_scores_can_be_drawn() -> None:
    nothing = Interval(NAN, NAN, NAN)
    assert plot_scores({"a": [Score("x", nothing)], "b": [Score("y", Interval(3.0, 1.0, 9.0))]}, metric="MAE")
    assert plot_scores({"a": [Score("x", nothing)]}, metric="R2")


def test_pictures_are_the_same_each_time_and_leave_pyplot_alone() -> None:
    before = "matplotlib.pyplot" in sys.modules
    assert plot_roc([roc_line()]) == plot_roc([roc_line()])
    assert tiny_png() == tiny_png()
    assert ("matplotlib.pyplot" in sys.modules) == before
