"""The page of several runs and its parts: numbers by hand, groups of seeds, analyses beside them, hostile text."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tsopsd_jax.cli import main
from tsopsd_jax.commands.report import same_but_seed
from tsopsd_jax.display.comparison import ComparedRun, accuracy_table, final_table, final_values
from tsopsd_jax.display.figure_html import values_table
from tsopsd_jax.display.figures import (
    Bars,
    Chart,
    Curve,
    Figure,
    Histogram,
    Matrix,
    Strip,
    figure_as_json,
    figure_from_json,
    panel_svg,
    write_png,
)
from tsopsd_jax.rundir.log import strict_json

CONFIG = """\
seed: {seed}
model: {{path: countdown-tiny}}
data: {{name: countdown, split: train, verifier: countdown, max_prompt_tokens: 7}}
phases:
- name: rl
  objective: {{name: dapo}}
  prompts_per_step: 4
  responses_per_prompt: 2
  max_response_tokens: 19
  reward: {{}}
  stop: {{steps: 3}}
- name: heat
  objective: {{name: ts_opsd}}
  prompts_per_step: 4
  responses_per_prompt: 1
  max_response_tokens: 19
  stop: {{steps: {heat}}}
"""
HOSTILE = '<script>alert(1)</script> & "q" $x^{ </section> 漢字'


def lines_of(count, entropy=0.1, **more):
    return [{"step": at + 1, "phase": "rl", "phase_step": at + 1, "policy/entropy_nats": entropy} | more
            for at in range(count)]  # fmt: skip


def evaluation(stage, avg, passed, **more):
    return {"stage": stage, "step": 1, "benchmark": "toy", "samples": 8, "avg_at_k": avg, "pass_at_k": passed} | more


def cells(table):
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_final_values_by_hand():
    lines = [{"policy/entropy_nats": at, "reward/mean": None, "rollout/tokens": 1000, "time/step_s": 36.0}
             for at in range(7)]  # fmt: skip
    lines[1]["reward/mean"] = 0.25
    found = final_values(ComparedRun(lines, [evaluation("a", 0.1, 0.2), evaluation("b", 0.5, 0.75)]))
    assert found["entropy, nats"] == 4.0  # (2 + 3 + 4 + 5 + 6) / 5
    assert found["reward"] == 0.25  # the one step that measured it
    assert np.isnan(found["accuracy, %"])
    assert (found["toy avg@8, %"], found["toy pass@8, %"]) == (50.0, 75.0)  # the latest
    assert (found["tokens, M"], found["hours"]) == pytest.approx((0.007, 0.07))  # 7 x 1000, 7 x 36 s


def test_seeds_are_a_mean_with_its_deviation():
    def run(reward):
        return ComparedRun(lines_of(2, **{"reward/mean": reward}), [])

    head, both, alone = cells(final_table({"seeds": [run(0.25), run(0.75)], "<b>": [run(0.5)]}))
    at = head.index("reward")
    assert both[:2] == ["seeds 2 runs", "2 ± 0"]
    assert both[at] == "0.500 ± 0.354"  # sqrt((0.25^2 + 0.25^2) / (2 - 1))
    assert (alone[0], alone[at]) == ("&lt;b&gt;", "0.500")
    assert alone[head.index("accuracy, %")] == "-"


def test_accuracies_in_the_layout_of_table_1():
    first = [evaluation("base", 0.25, 0.5), evaluation("end", 0.75, 1.0), evaluation("end", 0.9, 0.9, phase_step=3)]
    other = [evaluation("base", 0.35, 0.6), evaluation("base", 0.5, 0.5, benchmark="b")]
    found = cells(accuracy_table({"x": [ComparedRun([], first), ComparedRun([], other)]}))
    assert found == [
        ["run, stage", "toy avg@8/pass@8", "b avg@8/pass@8", "average avg/pass"],
        # toy: (25 + 35) / 2 and (50 + 60) / 2; the average: (30 + 50) / 2 and (55 + 50) / 2
        ["x base", "30.00/55.00", "50.00/50.00", "40.00/52.50"],
        ["x end", "75.00/100.00", "-", "-"],
    ]
    assert accuracy_table({"x": [ComparedRun([], [])]}) == ""


def test_runs_that_differ_in_their_seed_alone_are_one_group():
    a, b = {"seed": None, "x": 1}, {"seed": None, "x": 2}
    assert same_but_seed([a, b, a], ["run-seed-0", "other", "run-seed-1"]) == {"run": [0, 2], "other": [1]}
    assert same_but_seed([a, b], ["r-0", "r-1"]) == {"r-0": [0], "r-1": [1]}
    assert same_but_seed([None, None], ["p", "q"]) == {"p": [0], "q": [1]}  # nothing is known of them
    assert same_but_seed([a, a, b, b], ["seed-0", "seed-1", "b-0", "b-1"]) == {"seed-0 and others": [0, 1], "b": [2, 3]}


PANELS = [
    Chart("c", "step", "nats", [Curve(HOSTILE, np.arange(3.0), np.asarray([1.0, np.nan, 3.0])),
          Curve("band", np.arange(2.0), np.ones(2), np.zeros(2), np.full(2, 1.5))],
          shaded=[("rl", 0.0, 1.0)], lines={"goal": 2.0}, strips=[Strip(1, 0.5, 2.5, 0.5)]),
    Histogram("h", "nats", np.asarray([0.0, 1.0, 2.0]), np.asarray([3.0, 0.0]), {"mean": 0.5}),
    Bars("b", "s", ["p", "q"], {"sampling": [1.0, 2.0], "update": [3.0, 4.0]}),
    Matrix("m", "after", "before", "CKA", np.asarray([[1.0, 0.5], [0.25, 1.0]])),
]  # fmt: skip


def test_a_figure_is_read_back_from_its_json(tmp_path):
    figure = Figure(PANELS, "what to see", 3)
    text = json.dumps(strict_json(figure_as_json(figure)), allow_nan=False)
    again = figure_from_json(json.loads(text))
    assert json.dumps(strict_json(figure_as_json(again))) == text
    for panel, read in zip(PANELS, again.panels, strict=True):
        assert panel_svg(panel) == panel_svg(read)
    write_png(again, tmp_path / "f.png")
    with pytest.raises(ValueError, match="analyse again"):
        figure_from_json({"caption": "", "columns": 1, "panels": [{"kind": "Pie"}]})


def test_exact_values_of_every_kind_of_panel():
    chart, histogram, bars, matrix = (cells(values_table(panel)) for panel in PANELS)
    assert chart[0][0::2] == ["step", "band"]
    assert chart[1:] == [["0", "1", "1 ± 0.5"], ["1", "", "1 ± 0.5"], ["2", "3", ""]]
    assert histogram[1:] == [["mark: mean", "0.5", ""], ["0", "1", "3"]]  # empty bins are left out
    assert bars == [["", "sampling, s", "update, s"], ["p", "1", "3"], ["q", "2", "4"]]
    assert matrix == [["before \\ after", "1", "2"], ["1", "1", "0.5"], ["2", "0.25", "1"]]
    long = Chart("c", "x", "y", [Curve("", np.arange(1000.0), np.arange(1000.0))])
    table = values_table(long)
    assert len(cells(table)) == 201
    assert "200 of 1000 rows." in table
    assert cells(table)[-1] == ["999", "999"]


def test_svg_takes_the_colours_and_the_text_of_the_page():
    svg = panel_svg(PANELS[0])
    assert "var(--curve-0)" in svg
    assert "#0072b2" not in svg
    assert "<script>" not in svg
    assert "&lt;script&gt;" in svg
    # The bar at the foot has the colour of curve 1, at 0.9 of half its ink.
    assert re.search(r'style="fill: var\(--curve-1\); opacity: 0.45', svg)


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def runs(tmp_path):
    """Two seeds whose reheating took 2 and 3 steps, and a run of other settings."""
    made = []
    for name, seed, heat, reward in (("r-0", 0, 2, 0.25), ("r-1", 1, 3, 0.75), ("other", 0, 2, 0.5)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(CONFIG.format(seed=seed, heat=4 if name == "other" else 5))
        lines = lines_of(3, **{"reward/mean": reward, "optim/grad_norm": 0.1})
        lines += [{"step": 4 + at, "phase": "heat", "phase_step": at + 1, "policy/entropy_nats": 0.2}
                  for at in range(heat)]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "evaluations.jsonl").write_text(json.dumps(evaluation("base", 0.5, 0.75)) + "\n")
        made.append(str(folder))
    return made


def test_several_runs_on_one_page(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *runs]) == 0
    assert capsys.readouterr().out.strip() == "report.html"
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "3 runs: r-0, r-1, other" in page
    assert '0.500 <span class="muted">± 0.354</span>' in page  # the reward of both seeds
    assert page.count("<svg") == 6  # reward, entropy, gradient norm, length, avg@8, pass@8
    assert "Bars at the foot" in page
    assert "Mean and standard deviation over runs: 2 of r." in page
    assert "50.00/75.00" in page
    assert main(["report", *runs[:2], "--out", str(tmp_path / "no" / "x.html")]) == 2
    assert "name another file with --out" in capsys.readouterr().err


def test_runs_of_equal_phases_are_shaded(runs, tmp_path):
    out = tmp_path / "two.html"
    assert main(["report", runs[0], runs[2], "--out", str(out)]) == 0
    assert "Shaded: the phases." in out.read_text("utf-8")


def analysed(folder, name, *, drawn):
    """The files of an analysis, with its panels or with the picture alone."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"found": HOSTILE}))
    (folder / f"{name}.png").write_bytes(b"\x89PNG")
    if drawn:
        figure = strict_json(figure_as_json(Figure(PANELS, f"caption {HOSTILE}")))
        (folder / f"{name}.figure.json").write_text(json.dumps(figure))


def test_a_run_with_analyses_keeps_its_page_and_gets_sections(runs, tmp_path, capsys):
    run = Path(runs[0])
    assert main(["report", str(run)]) == 0
    before = (run / "report.html").read_text("utf-8")
    assert "<img" not in before
    analysed(run / "analyses", "jump", drawn=True)
    analysed(tmp_path / "more", "cost", drawn=False)
    assert main(["report", str(run), "--analyses", str(tmp_path / "more")]) == 0
    page = (run / "report.html").read_text("utf-8")
    assert page.count("<h2>") == before.count("<h2>") + 2
    assert page.count("<svg") == before.count("<svg") + len(PANELS)
    assert page.count("<img alt=\"time and tokens of a run's phases".replace("'", "&#x27;")) == 1
    assert "img-src data:" in page
    assert "data:image/png;base64,iVBORw==" in page
    assert page.index("<h2>Jump") < page.index("<h2>Cost")
    assert "<script>" not in page
    # Its own part is as it was.
    body = before.split("<body>")[1].split("</main>")[0]
    assert body in page
    (run / "analyses" / "jump.figure.json").write_text("{}")
    capsys.readouterr()
    assert main(["report", str(run)]) == 2
    assert "jump.figure.json: expected a figure of this version" in capsys.readouterr().err
    assert main(["report", str(run), "--analyses", str(tmp_path / "none")]) == 2


def test_analyses_of_several_runs_say_whose_they_are(runs, tmp_path):
    for name in ("r-0", "r-1"):
        analysed(tmp_path / name / "analyses", "reversal", drawn=True)
    out = tmp_path / "page.html"
    assert main(["report", *runs, "--out", str(out)]) == 0
    assert re.findall(r"<h2>Reversal, (.*?)</h2>", out.read_text("utf-8")) == ["r-0", "r-1"]


def test_a_run_without_configuration_or_evaluations(runs, tmp_path):
    for run in runs[:2]:
        (Path(run) / "config.yaml").unlink()
        (Path(run) / "evaluations.jsonl").unlink()
    out = tmp_path / "page.html"
    assert main(["report", *runs[:2], "--out", str(out)]) == 0
    page = out.read_text("utf-8")
    assert "Accuracies" not in page
    assert "Bars at the foot" not in page
