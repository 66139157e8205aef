"""The page of a run: what it shows, and that no run and no text can break it."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tsopsd_jax.display import series
from tsopsd_jax.display.page import write_report
from tsopsd_jax.display.series import Stretch, smoothed, thinned

CONFIG = """\
seed: 3
model:
  path: models/tiny
phases:
- name: collapse
  objective: {name: dapo}
  stop: {steps: 400, epochs: null, collapsed_below_nats: 0.08, recovered_above_nats: null, window_steps: 10}
  outcome: collapsed
- name: reheat
  objective: {name: ts_opsd}
  stop: {steps: null, epochs: null, collapsed_below_nats: null, recovered_above_nats: 0.12, window_steps: null}
  outcome: reheated
- name: continue
  objective: {name: dapo}
  stop: {steps: 30}
  outcome: continued
"""


def steps_of_a_run(lengths=(60, 15, 30)):
    """Entropy falls 0.33 -> 0.08, rises to 0.12, falls again; a reheating step has no reward."""
    courses = (("collapse", 0.33, 0.08), ("reheat", 0.08, 0.12), ("continue", 0.12, 0.07))
    noise = np.random.default_rng(0)
    lines = []
    for (phase, begin, end), length in zip(courses, lengths, strict=True):
        for at in range(length):
            line = {
                "step": len(lines) + 1,
                "phase": phase,
                "phase_step": at + 1,
                "time_s": 2.0 * (len(lines) + 1),
                "policy/entropy_nats": begin + (end - begin) * at / max(1, length - 1),
                "optim/grad_norm": 0.1 * math.exp(noise.normal()),
                "rollout/length_mean_tokens": 40 + noise.normal(),
                "rollout/tokens": 1000,
            }
            if phase != "reheat":
                line |= {"reward/mean": 0.4, "reward/accuracy_fraction": 0.5}
            lines.append(line)
    return lines


def evaluation(stage, step, **more):
    return {
        "stage": stage,
        "step": step,
        "benchmark": "sums",
        "problems": 1024,
        "samples": 8,
        "sampling": {"temperature": 1.0, "top_p": 0.7, "top_k": 0},
        "avg_at_k": 0.4312,
        "avg_at_k_stderr": 0.0061,
        "pass_at_k": 0.705,
        "length_mean_tokens": 41.2,
        "truncated_fraction": 0.004,
        "entropy_nats": 0.1234,
        "examples": [
            {"prompt": "1 + 1 =", "response": "It is 2.", "answer": "2", "correct": True},
            {"prompt": "2 + 2 =", "response": "It is 5.", "answer": "4", "correct": False},
        ],
        **more,
    }


def write_run(run_dir, lines=None, evaluations=(), config=CONFIG):
    run_dir.mkdir(exist_ok=True)
    if config is not None:
        (run_dir / "config.yaml").write_text(config)
    lines = steps_of_a_run() if lines is None else lines
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluations:
        (run_dir / "evaluations.jsonl").write_text("".join(json.dumps(each) + "\n" for each in evaluations))
    return run_dir


class Page(HTMLParser):
    """The page's elements and its visible text; fails where tags do not match."""

    VOID = frozenset({"meta", "link", "img", "br", "hr"})

    def __init__(self, run_dir):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.source = write_report(run_dir).read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.texts.append(data)

    def rows(self, number):
        """Cells of the page's table `number`."""
        table = re.findall(r"<tbody>(.*?)</tbody>", self.source, re.DOTALL)[number]
        cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("</tr>") if "<td" in row]
        return [[re.sub("<[^>]*>", "", cell) for cell in row] for row in cells]

    def figure(self, title):
        """The SVG of the panel of that title."""
        [found] = [each for each in self.source.split("<figure")[1:] if f">{title}</text>" in each]
        return found.split("</figure>")[0]

    def lines(self, title):
        """Data paths (SVG `d`) of the strong lines of a panel: the moving means, and evaluations."""
        path = r'<path d="(M[^"]*)"[^>]*style="fill: none; [^"]*stroke: var\(--\w+\); stroke-width: 1\.[46]'
        return re.findall(path, self.figure(title))


@pytest.fixture
def page(tmp_path):
    stages = (("base", 0), ("collapsed", 60), ("reheated", 75), ("continued", 105))
    return Page(write_run(tmp_path / "my run", evaluations=[evaluation(*stage) for stage in stages]))


def test_summary(page):
    assert "my run" in page.text
    assert "dapo → ts_opsd → dapo · model models/tiny · seed 3" in page.text
    # 60 + 15 + 30 steps of 1000 tokens and 2 s: 105 000 tokens, 210 s = 3.5 min
    facts = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page.source)
    facts = {name: re.sub("<[^>]*>", "", value) for name, value in facts}
    assert facts["Steps"] == "105"
    assert facts["Tokens sampled"] == "105.0k"
    assert facts["Wall time"] == "3m 30s"
    assert facts["Training accuracy, %"] == "50.0→50.0"
    # The means of the first five and the last five: 0.33 - 0.25 * 2/59 and 0.07 + 0.05 * 2/29
    assert facts["Entropy, nats"] == "0.322→0.073"


def test_phases(page):
    rows = page.rows(0)
    assert [row[:3] for row in rows] == [
        ["collapse", "dapo", "1&ndash;60"],
        ["reheat", "ts_opsd", "61&ndash;75"],
        ["continue", "dapo", "76&ndash;105"],
    ]
    # reheating: 15 // 4 = 3 at each end, 0.08 + 0.04 * 1/14 and 0.12 - 0.04 * 1/14
    assert rows[1][3:] == ["0.083→0.117", "&ndash;", "43.1→43.1", "70.5→70.5", "entropy ≥ 0.12 nats", "reheated"]
    assert rows[0][7] == "entropy &lt; 0.08 nats (mean of 10 steps) or 400 steps"


def test_plots_name_the_phases_and_the_thresholds(page):
    titles = ("Entropy", "Reward and accuracy", "Evaluations", "Gradient norm", "Response length", "Time of a step")
    assert page.source.count("<figure") == len(titles)  # rollout/tokens, which never changes, has none
    for title in titles:
        assert f'aria-label="{title} over steps"' in page.source
    svg = page.figure("Entropy")
    for text in ("collapse", "reheat", "continue"):
        assert f">{text}</text>" in svg
        assert f">{text}</text>" not in page.figure("Gradient norm")
    assert ">collapsed &lt; 0.08</text>" in svg
    assert ">recovered ≥ 0.12</text>" in svg
    assert svg.count("stroke-dasharray") == 2
    assert "var(--orange)" in svg
    assert "not recorded" not in svg


def test_a_phase_without_reward_leaves_a_gap(page):
    assert [path.count("M") for path in page.lines("Entropy")] == [1]
    assert [path.count("M") for path in page.lines("Gradient norm")] == [1]
    # reward, accuracy: before and after
    assert [path.count("M") for path in page.lines("Reward and accuracy")] == [2, 2]


def test_a_thin_line_does_not_bridge_a_gap(tmp_path):
    page = Page(write_run(tmp_path / "run", steps_of_a_run((200, 15, 200))))
    thin = re.findall(r'<path d="(M[^"]*)"[^>]*stroke-width: 0\.6', page.figure("Reward and accuracy"))
    assert [path.count("M") for path in thin] == [2, 2]


def test_evaluations(page):
    assert page.rows(2)[3] == (
        ["continued", "105", "sums", "1,024", "8", "43.1 ± 0.6", "70.5", "41", "0.4", "0.123"]
        + ["temperature 1.0, top_p 0.7, top_k 0"]
    )
    assert "recovered_above_nats: 0.12" in page.text


def test_evaluations_over_the_run_are_a_line_for_each_benchmark(tmp_path):
    stages = (("base", 0), ("collapsed", 60), ("reheated", 75))
    records = [evaluation(*stage, benchmark=name) for name in ("sums", "odds") for stage in stages]
    page = Page(write_run(tmp_path / "run", evaluations=records))
    figure = page.figure("Evaluations")
    for text in ("avg@8 sums", "pass@8 sums", "avg@8 odds", "pass@8 odds"):
        assert text in figure
    # avg and pass of each benchmark, one colour for both; each through three stages: a beginning and two lines
    paths = page.lines("Evaluations")
    assert [path.count("L") for path in paths] == [2, 2, 2, 2]
    assert figure.count("stroke-dasharray") == 2  # pass@k
    # The first stage is before the first step, and in the picture.
    first_x = {float(path.split()[1]) for path in paths}
    left = float(re.search(r'<rect x="([\d.]+)"', figure)[1])
    assert len(first_x) == 1
    assert first_x.pop() > left


def test_all_responses_to_a_problem_stand_side_by_side(tmp_path):
    def responses(*texts):
        return [{"response": text, "correct": right, "count": count} for text, right, count in texts]

    before = [{"prompt": "1 + 1 =", "answer": "2", "responses": responses(("two", True, 2), ("three", False, 1))}]
    after = [{"prompt": "1 + 1 =", "answer": "2", "responses": responses(("two", True, 3))}]
    records = [evaluation("base", 0, examples=before), evaluation("collapsed", 60, examples=after)]
    page = Page(write_run(tmp_path / "run", evaluations=records))
    assert page.text.count("Responses to one problem") == 1
    assert "base step 0 2 of 3 right, 2 different 2 × ✓ correct two ✗ wrong three" in page.text
    assert "collapsed step 60 3 of 3 right, all alike 3 × ✓ correct two" in page.text
    assert page.source.count('<div class="stages">') == 1
    assert page.source.count('class="stage"') == 2


def test_of_many_stages_the_first_and_the_last_are_shown(tmp_path):
    records = [evaluation(f"stage {at}", at) for at in range(31)]
    page = Page(write_run(tmp_path / "run", evaluations=records))
    # 8 of 31, 30 / 7 = 4.3 apart: 0, 4, 9, 13, 17, 21, 26, 30; two problems
    shown = re.findall(r'class="stage">(.*?) <span>', page.source)
    assert shown == 2 * [f"stage {at}" for at in (0, 4, 9, 13, 17, 21, 26, 30)]
    assert "23 stages between them are left out." in page.text


def test_responses_of_older_runs_are_one_a_problem(page):
    assert page.text.count("1 of 1 right ✓ correct It is 2.") == 4
    assert page.text.count("0 of 1 right ✗ wrong It is 5.") == 4


def test_every_metric_has_a_panel_or_is_said_to_stay_the_same(tmp_path):
    lines = steps_of_a_run((10, 5, 5))
    for at, each in enumerate(lines):
        each |= {"optim/learning_rate": 1e-6 * (at + 1), "rollout/groups_kept_fraction": 0.5, "my/curiosity": at * 1.5}
        each |= {"rollout/cache_peak_bytes": 2**20 * (at + 1), "note": "text"}
    page = Page(write_run(tmp_path / "run", lines))
    assert ">share</text>" not in page.figure("optim/learning_rate")
    memory = page.figure("rollout/cache_peak_bytes")
    assert ">MiB</text>" in memory
    assert re.findall(r">(\d+)</text>", memory)[-3:] == ["10", "15", "20"]  # of 1 to 20 MiB
    groups = re.split("<h3>", page.source.split("<h2>All metrics</h2>")[1].split("<h2>")[0])[1:]
    titles = {group.split("</h3>")[0]: re.findall('aria-label="(.*?) over', group) for group in groups}
    assert titles == {
        "Sampling": ["rollout/cache_peak_bytes"],
        "Update": ["optim/learning_rate"],
        "Your own metrics": ["my/curiosity"],
    }
    assert "The same in every step: rollout/tokens 1000, rollout/groups_kept_fraction 0.5." in page.text
    own = next(group for group in groups if group.startswith("Your own"))
    assert '<th class="n">my/curiosity</th>' in own
    assert '<td class="name">20</td><td class="n">28.5</td>' in own  # step 20: 19 * 1.5


def test_exact_values_of_a_long_run_are_spread_over_it(tmp_path):
    page = Page(write_run(tmp_path / "run", steps_of_a_run((600, 15, 30))))
    assert "Exact values of 60 of 645 steps" in page.text
    rows = page.rows(1)
    assert (rows[0][0], rows[-1][0], len(rows)) == ("1", "645", 60)
    assert rows[0][1] == "0.33"
    # 644 / 59 = 10.9 apart: steps 601 and 612 are reheating steps, which have no reward
    assert [(row[0], row[2]) for row in rows[54:58]] == [("590", "0.4"), ("601", "–"), ("612", "–"), ("623", "0.4")]


def test_the_time_of_a_step_is_stacked(tmp_path):
    lines = steps_of_a_run((10, 5, 5))
    for each in lines:
        each |= {"time/rollout_s": 2.0, "time/judge_s": 0.5, "time/update_s": 1.0, "time/step_s": 4.0}
    figure = Page(write_run(tmp_path / "run", lines)).figure("Time of a step")
    for name in ("sampling", "verifying", "update", "rest"):
        assert f" {name}</text>" in figure
    paths = dict(re.findall(r'<path id="(m\w+)" d="([^"]*)"', figure))
    areas = re.findall(r'<use xlink:href="#(m\w+)"[^>]*style="fill: var\(--(\w+)\); fill-opacity: 0\.75', figure)
    spans = {}
    for name, colour in areas:
        heights = [-float(y) for y in re.findall(r"[ML] \S+ (\S+)", paths[name])]
        spans[colour] = (min(heights), max(heights))
    second = spans["sky"][1] - spans["sky"][0]  # sampling takes 2 s
    parts = {colour: (high - low) / second * 2.0 for colour, (low, high) in spans.items()}
    # what is left of 4 s is 4 - 2 - 0.5 - 1 = 0.5 s
    assert parts == pytest.approx({"sky": 2.0, "amber": 0.5, "blue": 1.0, "slate": 0.5}, rel=1e-3)
    assert spans["amber"][0] == pytest.approx(spans["sky"][1])  # one on the other


def test_nothing_but_tables_may_be_wider_than_the_page(page):
    for match in re.finditer("<table", page.source):
        assert page.source[: match.start()].endswith('<div class="scroll">')
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert ".scroll { overflow-x: auto; }" in style
    assert "minmax(min(100%, 400px), 1fr)" in style
    widths = re.findall(r'<svg[^>]*viewBox="0 0 ([\d.]+)', page.source)
    assert {float(width) for width in widths} == {374.4}  # 5.2 inches: letters of 8.5 pt have 10 pixels at 500


def test_ids_of_figures_are_not_repeated(page):
    ids = re.findall(r' id="([^"]*)"', page.source)
    kinds = {re.sub("[0-9a-f]{8,}$", "", each) for each in ids}
    assert kinds <= {"p", "m"}  # clip paths and marks, which are named by what they are


def test_the_page_stands_alone(page):
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert "http" not in page.source.replace('http-equiv="Content-Security-Policy"', "")
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page.source)
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")


def test_equal_runs_give_equal_pages(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    pages = [write_report(write_run(tmp_path / name / "run", evaluations=[evaluation("base", 0)])) for name in "ab"]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert [path.name for path in pages[0].parent.glob("report*")] == ["report.html"]


def test_the_users_matplotlib_settings_do_not_leak_in_or_out(tmp_path):
    import matplotlib

    run_dir = write_run(tmp_path / "run")
    expected = write_report(run_dir).read_bytes()
    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30.0}):
        assert write_report(run_dir).read_bytes() == expected
        assert matplotlib.rcParams["lines.linewidth"] == 9.0


HOSTILE = (
    "</pre></details></style></title><script>alert(1)</script><img src=x onerror=alert(1)> $x^{ & \"q\" 'a' "
    "${title} $title --> ]]> \x00\x1b[31m \ud800 \u202e \u2028 漢字 #2563b0 http://example.org"
)


def test_hostile_text_stays_text(tmp_path):
    lines = steps_of_a_run((3, 1, 1))
    for line in lines[3:]:
        line["phase"] = HOSTILE
        line[HOSTILE] = line["step"]
    lines[0]["phase"] = "$x^{$"  # not for matplotlib's mathematics to read
    bad = {"prompt": HOSTILE, "response": HOSTILE * 3, "answer": HOSTILE, "correct": True}
    short = {"prompt": "<img src=x>", "responses": [{"response": "<script>2</script>", "correct": 1, "count": "<b>"}]}
    examples = [bad, short, {"prompt": "<b>", "response": "<b>"}, {"responses": [3, {}]}]
    record = evaluation(HOSTILE, 5, benchmark=HOSTILE, sampling={HOSTILE: HOSTILE}, examples=examples)
    config = json.dumps({"phases": [{"name": HOSTILE, "outcome": HOSTILE, "objective": {"name": HOSTILE}}]})
    run = write_run(tmp_path / "<b>run&", lines, [record], config)
    kept = {"step": HOSTILE, "phase": HOSTILE, "which": HOSTILE, "reward": HOSTILE, **bad}
    (run / "samples.jsonl").write_text(json.dumps(kept) + "\n" + json.dumps(kept | {"step": 3, "reward": 0.5}) + "\n")
    page = Page(run)
    assert "reward 0.5" in page.text
    assert not {tag for tag, _ in page.tags} & {"script", "img", "b"}
    assert "<script>alert(1)</script>" in page.text  # as text
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", page.source)
    page.source.encode("utf-8")


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 1}],
        [{"step": 7, "phase": "dapo", "phase_step": 1, "policy/entropy_nats": 0.3, "optim/grad_norm": 0.0}],
        [{"step": 1, "policy/entropy_nats": None, "reward/mean": None}, {"step": 2}],
        [{"step": step, "reward/mean": 0.0, "optim/grad_norm": 0.5} for step in range(1, 4)],
        [{"step": step, "reward/mean": -1.0, "policy/entropy_nats": "text"} for step in range(1, 4)],
        [{"phase": "no step"}, {"step": 1, "phase": None, "phase_step": None}],
    ],
    ids=["a step and nothing else", "one step", "nulls", "constants", "odd values", "no step"],
)
@pytest.mark.parametrize("config", [CONFIG, None, "", "phases: 3\n", "- a\n", "{:::", "phases: [1, {stop: 2}]"])
def test_a_poor_run_still_gives_a_page(tmp_path, lines, config):
    page = Page(write_run(tmp_path / "run", lines, config=config))
    assert "This run has no evaluations." in page.text


def test_a_run_of_one_step_shows_points(tmp_path):
    page = Page(write_run(tmp_path / "run", steps_of_a_run((1, 0, 0))))
    assert (
        len(re.findall(r"<use [^>]*style=\"fill: var\(--blue\)", page.figure("Entropy"))) == 3
    )  # the shade, the step, its mean
    assert page.rows(0)[0][2] == "1"


def test_a_resumed_run(tmp_path):
    lines = steps_of_a_run((10, 0, 0))
    for line in lines[6:]:
        line["time_s"] -= 12.0  # a new process counts from zero: 2, 4, 6, 8
    run_dir = write_run(tmp_path / "run", lines)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "phase": "coll')  # and it was stopped while writing
    page = Page(run_dir)
    assert "Steps 10 Wall time 20s" in page.text  # 6 * 2 s, then 4 * 2 s
    assert len(page.rows(0)) == 1


def test_a_cyclic_schedule_repeats_its_phases(tmp_path):
    lines = [
        {"step": 5 * cycle + at + 1, "phase": "reheat" if at > 2 else "collapse", "phase_step": at + 1 - 3 * (at > 2)}
        for cycle in range(300)
        for at in range(5)
    ]
    page = Page(write_run(tmp_path / "run", lines))
    assert [row[2] for row in page.rows(0)[:3]] == ["1&ndash;3", "4&ndash;5", "6&ndash;8"]
    assert "The first 200 of 600 phases." in page.text
    again = [{"step": at + 1, "phase": "dapo", "phase_step": at % 4 + 1} for at in range(8)]
    assert [row[2] for row in Page(write_run(tmp_path / "again", again)).rows(0)] == ["1&ndash;4", "5&ndash;8"]


def test_a_long_run_with_long_responses_gives_a_small_page(tmp_path):
    lines = steps_of_a_run((12_000, 15, 8_000))
    lines[5_000]["optim/grad_norm"] = 1e6
    long = [
        {"prompt": f"{at}" + "<&" * 5000, "response": "<&" * 20_000, "answer": "1", "correct": at % 2 == 0}
        for at in range(8)
    ]
    records = [evaluation(f"after {at}", at, examples=long) for at in range(30)]
    page = Page(write_run(tmp_path / "run", lines, records, CONFIG + "x: " + "long " * 100_000))
    assert len(page.source.encode()) < 1_500_000
    assert "characters left out" in page.text
    assert "More responses are in evaluations.jsonl." in page.text
    assert ">1.0M</text>" in page.figure("Gradient norm")  # the spike is within the scale, so it is among the points


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (str, "metrics.jsonl"),
        (lambda run_dir: run_dir.mkdir(), "metrics.jsonl"),
        (lambda run_dir: write_run(run_dir, []), "at least one step"),
        (lambda run_dir: write_run(run_dir, [{"step": 1}, 3, {"step": 2}]), r"metrics\.jsonl:2"),
    ],
    ids=["no directory", "no metrics", "no steps", "a broken line"],
)
def test_without_a_run_the_error_is_one_line(tmp_path, make, message):
    make(tmp_path / "run")
    with pytest.raises(ValueError, match=message) as error:
        write_report(tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "report.html").exists()


def test_smoothing_is_a_mean_within_a_phase():
    # Segments of 100 and 3 steps: half windows of 100 // 50 = 2 and 3 // 50 = 0
    values = np.concatenate([np.arange(100.0), [500.0, np.nan, 700.0]])
    values[50] = np.nan
    result = smoothed(values, [Stretch("a", 0, 100), Stretch("b", 100, 103)])
    assert result[10] == 10.0  # (8 + 9 + 10 + 11 + 12) / 5
    assert result[0] == 1.0  # (0 + 1 + 2) / 3
    assert result[99] == 98.0  # (97 + 98 + 99) / 3: nothing of the next phase
    assert result[51] == 51.25  # (49 + 51 + 52 + 53) / 4, without the NaN at 50
    np.testing.assert_array_equal(result[100:], [500.0, np.nan, 700.0])


def test_thinning_keeps_the_extremes(monkeypatch):
    monkeypatch.setattr(series, "MAX_POINTS", 4)
    # Two stretches, of 0..5 and 6..11 less the NaN at 3: lowest and highest of each
    values = np.array([5.0, 9.0, 4.0, np.nan, 1.0, 6.0, 2.0, 2.5, 8.0, 2.2, 0.0, 3.0])
    np.testing.assert_array_equal(thinned(values), [1, 4, 8, 10])
    np.testing.assert_array_equal(thinned(values[:5]), [0, 1, 2, 4])  # few enough: all that are finite
