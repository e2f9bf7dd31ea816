"""Reports: what was measured is in them, in every form, and nothing else is."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_openelm.benchmarks import report
from mlx_openelm.benchmarks.report.charts import figures, runs
from mlx_openelm.benchmarks.report.findings import cells, headlines, rows
from mlx_openelm.benchmarks.report.html import page
from mlx_openelm.benchmarks.report.palette import LOOKS, slots
from mlx_openelm.benchmarks.report.svg import scale, tick, ticks
from mlx_openelm.benchmarks.report.wording import (
    interval,
    number,
    percent,
    printable,
    scaled,
    times,
    work_label,
)
from mlx_openelm.benchmarks.results import Machine, Measurement, Model, Results, Work, write
from mlx_openelm.benchmarks.statistics import Ratio

from . import browser, measured
from .conftest import Run

MODULE = "mlx_openelm.benchmarks"
HOSTILE = '<script>alert("1")</script>|`x`\n\x1b[31m[red]&amp;\u202e*_$^{}$'
WORKS = (
    *(Work("prefill", prompt_tokens=n) for n in (32, 512)),
    measured.DECODE,
    Work("decode", prompt_tokens=1024, gen_tokens=64),
    Work("batch", prompt_tokens=32, gen_tokens=64, batch=4),
    Work("long", prompt_tokens=32, gen_tokens=1000),
)


def everything() -> Results:
    """A partial run with all that can happen in one: a failure, other tokens, seconds, notes."""
    machinery = measured.Machinery(5)
    results = measured.results(machinery=machinery, works=WORKS)
    found = results.measurements
    found[2] = replace(found[2], differs="at token 17: 403 instead of 29")
    found[3] = replace(found[3], trials=[], error="took longer than 300 s")
    found[4] = replace(found[4], statistics={"acceptance": 0.62})
    for kind in ("load", "cold"):
        seconds = {name: 0.2 / speed for name, speed in measured.SPEED.items()}
        found += measured.measure(machinery, measured.DEMO, Work(kind), seconds, unit="s")
    return replace(results, partial=True, notes=["noisy: bandwidth varied by 41 %"])


def hostile() -> Results:
    """A run whose every text is out to do harm."""
    machine = Machine(chip=HOSTILE, os=HOSTILE, blas=HOSTILE, versions={HOSTILE: HOSTILE})
    model = Model(HOSTILE, HOSTILE, HOSTILE, 1, 1)
    work = replace(measured.DECODE, text=HOSTILE)
    other = Work(HOSTILE, 7, 7)
    found = [
        *measured.measure(measured.Machinery(1), model, work, {"mlx-openelm": 2, HOSTILE: 1}),
        *measured.measure(measured.Machinery(1), model, other, {"mlx-openelm": 2, HOSTILE: 1}),
        Measurement(HOSTILE, HOSTILE, work, HOSTILE, error=HOSTILE, note=HOSTILE, differs=HOSTILE),
    ]
    return Results(HOSTILE, [HOSTILE], machine, [model], found, notes=[HOSTILE], partial=True)


def empty() -> Results:
    return Results("2026-11-24T12:00:00Z", [], Machine(), [], [], partial=True)


ALL = {"everything": everything, "hostile": hostile, "empty": empty}


def as_table(results: Results, width: int = 80) -> str:
    from rich.console import Console

    out = io.StringIO()
    report.table(results, Console(file=out, width=width))
    return out.getvalue()


# ---------------------------------------------------------------------------------------------
# What follows from the trials


def test_rows_say_what_was_measured() -> None:
    found = rows(measured.results(seed=3, works=[measured.DECODE], models=[measured.DEMO]))
    assert [row.runtime for row in found] == list(measured.SPEED)
    ours, mlx_lm, llama, torch = found
    assert ours.ratio is None
    assert mlx_lm.ratio and pytest.approx(mlx_lm.ratio.value, rel=0.05) == 1 / 0.47
    assert torch.ratio and pytest.approx(torch.ratio.value, rel=0.05) == 1 / 0.72
    assert llama.ratio and llama.ratio.value == pytest.approx(1, rel=0.05)
    assert ours.speed and ours.fraction and ours.measurement.limit
    assert ours.fraction == ours.speed.median / ours.measurement.limit.tokens_per_second


def test_a_ratio_is_of_trials_of_the_same_turn() -> None:
    wild = measured.Machinery(1, drift=1.0, noise=0)
    speeds = {"mlx-openelm": 3.0, "x": 1.0}
    a, b = measured.measure(wild, measured.DEMO, measured.DECODE, speeds)
    b = replace(b, trials=list(reversed(b.trials[1:])))
    results = replace(empty(), models=[measured.DEMO], measurements=[b, a])
    ours, theirs = rows(results)
    assert ours.ours
    assert theirs.ratio == (pytest.approx(3), pytest.approx(3), pytest.approx(3))


def test_fewer_seconds_are_faster() -> None:
    seconds = {"mlx-openelm": 1.0, "mlx-lm": 4.0}
    found = measured.measure(measured.Machinery(1), measured.DEMO, Work("load"), seconds, unit="s")
    _, theirs = rows(replace(empty(), models=[measured.DEMO], measurements=found))
    assert theirs.ratio and theirs.ratio.value == pytest.approx(4, rel=0.1)
    assert theirs.fraction is None


def test_a_wrong_answer_has_no_ratio_and_no_headline() -> None:
    results = everything()
    [wrong] = [row for row in rows(results) if row.wrong]
    assert wrong.ratio is None
    assert any("at token 17: 403 instead of 29" in remark for remark in wrong.remarks)
    [ratios] = [f for f in figures(results) if f.title == "Against the others"]
    first_model, _ = ratios.charts
    first_work = first_model.table()[1][:2]
    assert [row[1] for row in first_work] != ["mlx-lm", "llama.cpp"]


def test_impossible_values_are_left_out() -> None:
    [found] = measured.measure(measured.Machinery(1), measured.DEMO, measured.DECODE, {"x": 1.0})
    trials = [replace(found.trials[0], value=value) for value in (0.0, -1.0, math.nan, math.inf)]
    [row] = rows(replace(empty(), measurements=[replace(found, trials=trials)]))
    assert row.speed is None
    assert figures(replace(empty(), measurements=[replace(found, trials=trials)])) == [
        f for f in figures(replace(empty(), measurements=[found])) if f.title == "Peak memory"
    ]


def test_headlines_say_the_ratio_and_the_tie() -> None:
    said = [str(line) for line in headlines(rows(measured.results(models=[measured.DEMO])))]
    assert len(said) == 2
    assert said[0].startswith("demo, float32, generate 64 after 128: mlx-openelm ")
    assert re.search(r"2\.\d\d× mlx-lm \(\d\.\d\d–\d\.\d\d\)", said[0])
    assert "of the roofline" in said[0]


def test_few_trials_make_no_interval() -> None:
    for trials, said in ((1, "(1 trial)"), (2, "(2 trials)")):
        results = measured.results(works=[measured.DECODE], trials=trials, models=[measured.DEMO])
        ours, *others = rows(results)
        assert [cells(row).ratio for row in others] == [
            f"{row.ratio.value:.2f}× {said}" for row in others if row.ratio
        ]
        first = str(headlines([ours, *others])[0])
        assert "×" not in first
        assert "too few trials, or too unsteady, to compare with mlx-lm" in first
        [figure] = [f for f in figures(results) if f.title == "Against the others"]
        [(_, marks)] = figure.charts[0].groups
        assert all(mark.hollow for mark in marks)


def test_a_slow_turn_of_two_makes_no_large_ratio() -> None:
    """Turns of 900 to 8 and 940 to 1552 tokens/s: their ratios' mean is 57, the medians' 1.18."""
    speeds = {"mlx-openelm": (900.0, 940.0), "llama.cpp": (8.0, 1552.0)}
    model, work = measured.DEMO, measured.DECODE
    found = [
        replace(
            one, trials=[replace(t, value=speeds[one.runtime][i]) for i, t in enumerate(one.trials)]
        )
        for one in measured.measure(
            measured.Machinery(1), model, work, dict.fromkeys(speeds, 1.0), 2
        )
    ]
    ours, theirs = rows(replace(empty(), models=[model], measurements=found))
    assert cells(theirs).ratio == "1.18× (2 trials)"
    assert "×" not in str(headlines([ours, theirs])[0])


def test_a_headline_agrees_with_the_medians_beside_it() -> None:
    """Of these turns all but three are a tie, yet the medians are 100 and 200."""
    mine = [100] * 17 + [300] * 14
    its = [100] * 14 + [200] * 3 + [301] * 14
    speeds = {"mlx-openelm": mine, "llama.cpp": its}
    model, work = measured.DEMO, measured.DECODE
    found = [
        replace(
            one,
            trials=[
                replace(t, value=float(speeds[one.runtime][i])) for i, t in enumerate(one.trials)
            ],
        )
        for one in measured.measure(
            measured.Machinery(1), model, work, dict.fromkeys(speeds, 1.0), 31
        )
    ]
    ours, theirs = rows(replace(empty(), models=[model], measurements=found))
    assert ours.speed and theirs.speed and theirs.ratio
    assert (ours.speed.median, theirs.speed.median) == (100, 200)
    assert theirs.ratio.low > 0.5
    assert "unsteady, to compare with llama.cpp" in str(headlines([ours, theirs])[0])


# ---------------------------------------------------------------------------------------------
# Words and numbers


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1234.4, "1,234"), (999.6, "1,000"), (99.96, "100"), (12.34, "12.3"), (1.0, "1.00"),
        (0.184, "0.184"), (0.01234, "0.0123"), (0.0, "0"), (1e-7, "1e-07"), (-12.34, "-12.3"),
        (math.nan, "?"), (1e300, "1e+300"),
    ],
)  # fmt: skip
def test_numbers(value: float, said: str) -> None:
    assert number(value) == said


def test_units() -> None:
    assert scaled(543e6, "B") == "543 MB"
    assert scaled(999.9e6, "B") == "1.00 GB"
    assert scaled(12, "B") == "12.0 B"
    assert percent(0.617) == "62 %"
    assert percent(0.0312) == "3.1 %"


def test_an_interval_that_ends_short_of_1_does_not_look_like_a_tie() -> None:
    assert times(Ratio(2.0, 1.9, 2.1), 5) == "2.00× (1.90–2.10)"
    assert times(Ratio(1.0, 0.9, 1.1), 5) == "a tie (0.90–1.10)"
    assert interval(Ratio(0.99, 0.98, 0.998), 5) == "0.980–0.998"


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (Work("prefill", 2048), "prompt of 2,048"),
        (Work("decode", 32, 64), "generate 64 after 32"),
        (Work("batch", 32, 64, 8), "generate 8 × 64 after 32"),
        (Work("decode", 32, 64, text="princess"), "generate 64 after 32, princess"),
        (Work("load"), "load the model"),
        (Work("new\nkind", 3, 4), "new\N{REPLACEMENT CHARACTER}kind 4 after 3"),
    ],
)
def test_works_have_names(work: Work, said: str) -> None:
    assert work_label(work) == said


@given(st.text())
def test_printable_text_is_printable(text: str) -> None:
    assert printable(text).isprintable()
    assert len(printable(text)) == len(text)


# ---------------------------------------------------------------------------------------------
# The forms


@pytest.mark.parametrize("width", [30, 40, 50, 60, 80, 120])
@pytest.mark.parametrize("name", ALL)
def test_the_table_keeps_to_its_width(name: str, width: int) -> None:
    said = as_table(ALL[name](), width)
    assert max(map(len, said.splitlines())) <= width
    assert "\x1b" not in said
    assert "PARTIAL" in said


@pytest.mark.parametrize("width", [30, 40, 50, 60, 70])
def test_a_narrow_terminal_cuts_no_figure(width: int) -> None:
    results = everything()
    said = " ".join(as_table(results, width).split())
    for row in rows(results):
        for cell in cells(row):
            assert cell in said
    assert "…" not in said.replace("tokens…", "")


def test_the_table_says_everything_at_80_columns() -> None:
    results = everything()
    said = as_table(results)
    words = " ".join(said.split())
    for row in rows(results):
        for remark in row.remarks:
            assert remark in words
        if row.speed:
            assert number(row.speed.median) in said
        if row.ratio:
            assert times(row.ratio, row.turns) in said
        if row.fraction is not None:
            assert percent(row.fraction) in said
    assert "of limit" in " ".join(said.replace("\n", " ").split()) or "limit" in said
    assert "failed" in said
    assert "other tokens" in said
    assert "Note: noisy: bandwidth varied by 41 %" in said
    assert "…" not in said


def test_markdown_has_a_line_for_each_measurement(tmp_path: Path) -> None:
    results = everything()
    report.write_markdown([results, results], tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    models = len(results.models)
    assert len(lines) == 2 * (len(results.measurements) + 2 * models)
    assert {line.count(" |") for line in lines} == {6}
    assert "took longer than 300 s" in text


def test_markdown_takes_what_comes_from_a_file_as_text(tmp_path: Path) -> None:
    report.write_markdown([hostile()], tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    # Every character that means something to Markdown or HTML has a backslash before it.
    for line in text.splitlines():
        cells = re.sub(r"\\.", "", line.strip("| ")).replace(" | ", "").replace("**", "")
        assert not re.search(r"[<>`|\[\]]", cells), line
    assert "\x1b" not in text


class Tags(HTMLParser):
    """All tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes


@pytest.mark.parametrize("name", ALL)
def test_the_page_runs_and_fetches_nothing(name: str) -> None:
    text = page([ALL[name](), everything()])
    parser = Tags()
    parser.feed(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(parser.tags)
    names = {name for name, _ in parser.attributes}
    assert not {name for name in names if name.startswith("on")}
    assert not names & {"src", "style", "xlink:href", "srcset", "action"}
    assert {value for name, value in parser.attributes if name == "href"} <= {"#run-1", "#run-2"}
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_the_page_takes_what_comes_from_a_file_as_text() -> None:
    text = page([hostile()])
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not any(c in text for c in "\x1b\u202e")


def test_figures_have_what_was_measured() -> None:
    titles = [figure.title for figure in figures(everything())]
    assert titles == [
        "Generation by size and precision",
        "Peak memory",
        "Against the others",
        "Prompt processing over length",
        "Generation over context",
        "Roofline",
        "Waiting for the first token",
        "A long generation",
    ]
    assert figures(empty()) == []
    assert runs([everything()]).charts == []
    assert len(runs([everything(), measured.results()]).charts) == 2


def test_pngs_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    both = [everything(), measured.results(models=[measured.DEMO])]
    written = report.write_pngs(both, tmp_path)
    assert len(written) == len(set(written)) == sum(len(figures(run)) for run in both) + 1
    written = report.write_pngs([hostile()], tmp_path)
    assert len(written) == len(figures(hostile())) > 0
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)
    assert report.write_pngs([empty()], tmp_path) == []


def test_every_known_runtime_has_its_own_look() -> None:
    names = [*measured.SPEED, "b", "a", "c"]
    places = slots(names)
    assert places == slots(reversed(list(measured.SPEED))) | {"b": 4, "a": 5, "c": 6}
    assert len(set(places.values())) == len(names) == len(LOOKS)


@given(st.floats(1e-6, 1e12), st.floats(1.05, 1e9), st.booleans())
def test_ticks_are_round_and_within(low: float, factor: float, log: bool) -> None:
    high = low * factor
    found = ticks(low, high, log)
    assert 2 <= len(found) <= 8
    at = scale(low, high, 0, 100, log)
    assert all(-0.1 <= at(value) <= 100.1 for value in found)
    assert all(len(tick(value)) <= 14 for value in found)


# ---------------------------------------------------------------------------------------------
# In a browser


CHROMIUM = browser.find()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [("everything", 1280, False), ("everything", 390, True), ("hostile", 390, False)],
)
def test_chromium_draws_every_chart_with_its_data(
    tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    assert CHROMIUM
    both = [ALL[name](), measured.results(seed=2)]
    report.write_html(both, tmp_path / "report.html")
    found, logged = browser.look(CHROMIUM, tmp_path / "report.html", tmp_path, width, dark)
    assert logged == []
    assert found["overflow"] == 0
    assert found["ground"] == ("rgb(22, 24, 27)" if dark else "rgb(253, 253, 251)")
    wanted = [
        (figure.title, chart)
        for figure in [runs(both), *figures(both[0]), *figures(both[1])]
        for chart in figure.charts
    ]
    assert len(found["charts"]) == len(wanted)
    for drawn, (title, chart) in zip(found["charts"], wanted, strict=True):
        assert drawn["title"] == [title, chart.title if chart.title != title else ""]
        heads, data = chart.table()
        assert drawn["data"] == [[" ".join(cell.split()) for cell in row] for row in data]
        assert drawn["axes"] and all(drawn["axes"])
        assert set(drawn["axes"]) <= set(heads)
        shown = [row for row in data if row[1]]  # without the corners of the roofs
        assert len(drawn["marks"]) == len(shown)
        for mark, row in zip(drawn["marks"], shown, strict=True):
            assert mark["drawn"], mark
            assert row[-1] in mark["words"]
        if name != "hostile":
            assert drawn["outside"] == []
        assert drawn["width"] > 300
        assert drawn["height"] > 50
    colours = {m["fill"] for chart in found["charts"] for m in chart["marks"]}
    assert len(colours) > 3


# ---------------------------------------------------------------------------------------------
# The command


def test_the_command_writes_a_report_over_several_files(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(everything(), tmp_path / f"{name}.json")
    out = tmp_path / "out" / "deep"
    done = run(MODULE, "report", tmp_path / "a.json", tmp_path / "b.json", "-o", out)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in out.iterdir()} == {"report.html", "report.md"}
    assert done.stdout == ""
    assert f"wrote {out / 'report.html'}" in done.stderr


@pytest.mark.parametrize("content", ["{", '{"schema": 99}'])
def test_the_command_refuses_in_one_line(run: Run, tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    done = run(MODULE, "report", tmp_path / "a.json", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'a.json'}: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(run: Run, tmp_path: Path) -> None:
    write(everything(), tmp_path / "a.json")
    done = run(MODULE, "report", tmp_path / "a.json", "-o", tmp_path / "a.json" / "out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
