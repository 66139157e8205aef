"""verify_math where it takes algebra: hand-labelled pairs, hostile answers,
and the worker processes and their limits."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tsopsd_jax.rewards import answers_cut_off, verify_math
from tsopsd_jax.rewards import math as verifier
from tsopsd_jax.rewards.answers import final_answer, labelled, option_of
from tsopsd_jax.rewards.formula import parse_formula
from tsopsd_jax.rewards.math import read_answer
from tsopsd_jax.rewards.symbolic import Workers
from tsopsd_jax.rewards.trees import Unreadable
from tsopsd_jax.rewards.units import measured, read_unit
from tsopsd_jax.rewards.workers import CutOff

PAIRS = Path(__file__).parent / "golden" / "verify_pairs.jsonl"
ENDLESS = "\\sum_{k=1}^{10^{12}} \\sin k"
"""The one kind of formula whose cost only a worker's limits bound."""
ROOTS = parse_formula("\\sqrt{8}"), parse_formula("2\\sqrt{2}")


@pytest.fixture
def workers_of():
    """workers_of(wall_s=..., memory_bytes=...) -> Workers, closed at the end."""
    made = []

    def make(**limits):
        made.append(Workers(**limits))
        return made[-1]

    yield make
    for workers in made:
        workers.pool.close()


def ended(pid: int, within_s: float = 60) -> bool:
    """Whether the process goes within the time (a zombie that nobody reaps has gone)."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


# --- right and wrong ---


def disagreements(pairs: list[dict]) -> list[dict]:
    """The pairs at whose labels verify_math differs; none may need a worker's limits."""
    before = answers_cut_off()
    with ThreadPoolExecutor(2) as threads:
        scores = list(threads.map(lambda pair: verify_math(pair["response"], pair["gold"]), pairs))
    assert answers_cut_off() == before
    return [pair for pair, score in zip(pairs, scores, strict=True) if score != float(pair["right"])]


def test_agrees_with_the_labels_but_for_what_the_file_explains():
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    wrong = [pair for pair in pairs if not pair["right"]]
    assert len(pairs) >= 1000
    assert 2 * len(wrong) >= len(pairs)
    assert disagreements(pairs) == [pair for pair in pairs if "known" in pair]


def test_no_known_disagreement_is_a_wrong_answer_taken_for_right():
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    assert [pair for pair in pairs if "known" in pair and not pair["right"]] == []


@pytest.mark.shared_data
def test_agrees_with_the_labels_of_public_reports(shared_data):
    lines = (shared_data / "faults" / "verifier_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    assert len(pairs) == 196
    assert disagreements(pairs) == []


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Answer: 3\nso \\boxed{4}", "4"),  # what stands later
        ("\\boxed{4}\nAnswer: 3", "3"),
        ("Answer: 3\nso \\boxed{4", "3"),  # never closed
        ("\\boxed{\\frac{1}{\\{2\\}}} }", "\\frac{1}{\\{2\\}}"),
        ("Answer:\n\\[\n x^2\n\\]\nDone.", "\n x^2\n"),
        ("Answer:   \n\n", None),
        ("no mark", None),
    ],
)
def test_final_answer(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("answer", "text", "unit"),
    [
        ("The area is $5$ square cm.", "5", "cm^2"),
        ("5\\text{ cm}^{2}", "5", "cm^2"),
        ("5\\,\\text{m}\\cdot\\text{s}^{-1}", "5", "m/s"),
        ("\\$5", "5", "dollar"),
        ("2\\mathrm{i}", "2 i", None),  # no unit
        ("5t", "5t", None),
        ("√15", "\\sqrt 15", None),
    ],
)
def test_units_are_told_from_variables(answer, text, unit):
    (found,) = measured(read_answer(answer))
    assert (found.text, found.unit) == (text, read_unit(unit) if unit else None)


def test_what_could_mean_two_things_is_no_formula():
    for text in (
        "3 4",
        "1\\frac{3}{2}",
        "a/bc",
        "2^3^2",
        "x 2",
        "(1",
        "1/",
        "--1",
        "\\frac{1}{(1,2)}",
        "x_{1",
    ):
        with pytest.raises(Unreadable):
            parse_formula(text)


def test_options():
    assert [option_of(text) for text in ("(B)", "B) 3", "option c", "A or B", "BE", "")] == [
        "B",
        "B",
        None,
        None,
        None,
        None,
    ]
    assert labelled("\\textbf{(B)}\\ 26") == ("B", "26")
    assert labelled("26") == (None, "26")


def golds_of_real_data(folder: Path) -> list[str]:
    """All 790 of them."""
    golds = []
    for file, column in [
        ("math_500/test.jsonl", "answer"),
        ("aime_2024/test.jsonl", "expected_answer"),
        ("aime_2025/test.jsonl", "expected_answer"),
        ("aime_2026/test.jsonl", "answer"),
        ("olymmath_en/OlymMATH-EN-EASY.jsonl", "answer"),
        ("olymmath_en/OlymMATH-EN-HARD.jsonl", "answer"),
    ]:
        lines = (folder / file).read_text(encoding="utf-8").splitlines()
        golds += [str(json.loads(line)[column]) for line in lines]
    assert len(golds) == 790
    return golds


@pytest.mark.shared_data
def test_no_gold_answer_with_one_integer_changed_is_right(shared_data):
    def changed(gold: str) -> list[str]:
        """The gold with each of its integers one larger, one smaller, ten larger."""
        return [
            gold[: match.start()] + str(int(match[0]) + step) + gold[match.end() :]
            for match in re.finditer("[0-9]+", gold)
            for step in (1, -1, 10)
            if int(match[0]) + step >= 0
        ]

    pairs = [(other, gold) for gold in dict.fromkeys(golds_of_real_data(shared_data)) for other in changed(gold)]
    assert len(pairs) > 2000
    with ThreadPoolExecutor(2) as threads:
        scores = list(threads.map(lambda pair: verify_math(f"Answer: {pair[0]}", pair[1]), pairs))
    assert [pair for pair, score in zip(pairs, scores, strict=True) if score] == []


@pytest.mark.shared_data
def test_gold_answers_of_real_data_verify_against_themselves_and_not_against_others(shared_data):
    golds = golds_of_real_data(shared_data)
    for gold in golds:
        assert verify_math(f"So.\nAnswer: {gold}\n", gold) == 1.0
        assert verify_math(f"So \\boxed{{{gold}}}.", gold) == 1.0
    different = [gold for gold in dict.fromkeys(golds) if not gold.isdigit()]
    pairs = list(zip(different[::2], different[1::2], strict=False))
    assert len(pairs) > 100
    with ThreadPoolExecutor(2) as threads:
        scores = list(threads.map(lambda pair: verify_math(f"Answer: {pair[0]}", pair[1]), pairs))
    assert [pair for pair, score in zip(pairs, scores, strict=True) if score] == []


# --- hostile answers ---

UNITS = [
    "\\text{", "\\frac{1}{", "1,111", "{,}", "\\frac12", "9", "(9", "9/", "\\left", "$", "1 ", "\\!", "\\text {a}", "(",
    "[", "{", "}", "|", "\\{", "\\sqrt{", "\\sqrt[", "^", "_", "x_", "x^", "2^", "-", "+", "+1", "*", "!", "5!", "=",
    "x=", "<", "1<", ",", ";", ".", "0.", "%", "\\%", "&", "1&", "\\\\", "\\", "\\cup", "\\pm", "\\pm1,", "\\sin",
    "\\log_", "\\int", "\\sum_", "\\lim_{x\\to", "\\begin{pmatrix}", "\\boxed{", "Answer:", "\\input{/etc/passwd}",
    "\\def\\a{\\a\\a}", "\\x", "\x00", "\ud800", "\u202e", "٣", "３", "²", "½", "𝟛", "é", "\U0001f600", "import os;",
    "__class__.", "eval(", "lambda:", "{{0}}", "%s%n", "${jndi:}", "'", '"', "`", "#", "<script>", "\\n", "or ", "and ",
    "the answer is ", "e", "i", "infinity", "nan", "None",
]  # fmt: skip
TOWERS = [
    "9^{9^{9^{9}}}", ENDLESS, "9**9**9**9", "10^{-10^{10}}", "(10^9)!", "factorial(10**9)", "1/0", "0^0",
    "\\binom{10^9}{5\\cdot 10^8}", "\\sum_{k=1}^{10^9} k^k", "\\frac{1}{0}",
    "\\int_0^1 \\sin(\\cos(\\tan(x^x))) dx", "__import__('os').system('touch hacked')", "\\infty-\\infty",
    "open('/etc/passwd').read()", "(" * 390, "{" * 390, "\\sqrt{" * 65, "|" * 390, "\\text{" * 65,
]  # fmt: skip
HOSTILE = [f"Answer: {unit * times}" for unit in UNITS for times in (1, 6)]
HOSTILE += [f"\\boxed{{{tower}}}" if tower.count("{") == tower.count("}") else f"Answer: {tower}" for tower in TOWERS]


def test_no_hostile_answer_costs_more_than_the_limit(workers_of, monkeypatch):
    limit_s, start_s = 0.5, 15.0  # after a kill the next answer waits for a worker's start: about a second when idle
    monkeypatch.setattr(verifier, "WORKERS", workers_of(wall_s=limit_s))
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
    resident = _status_bytes("VmRSS")

    def timed(text: str) -> tuple[float, float]:
        began = time.monotonic()
        return verify_math(text, "34"), time.monotonic() - began

    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(timed, HOSTILE))
    assert len(HOSTILE) >= 200
    assert [text for text, (score, _) in zip(HOSTILE, got, strict=True) if score] == []
    assert max(seconds for _, seconds in got) < limit_s + start_s
    assert 1 <= answers_cut_off() <= 5, "an endless sum costs its worker, and little else does"
    assert _status_bytes("VmHWM") - resident < 100 * 2**20
    assert verify_math("Answer: \\sqrt{8}", "2\\sqrt{2}") == 1.0, "and nothing is left broken"


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


PIECES = [
    "\\frac", "\\sqrt", "{", "}", "(", ")", "[", "]", "\\{", "\\}", "|", "^", "_", "1", "2", "34", "0.5", "x", "y",
    "e", "i", "\\pi", "+", "-", "*", "/", "=", "<", "\\le", ",", ";", ":", " ", "%", "!", "°", "\\pm", "\\cup", "\\in",
    "\\infty", "\\text{", " cm", "and", "\\sin", "\\log", "\\binom", "\\sum_{k=1}^{5}", "\\begin{pmatrix}", "&",
    "\\\\", "\\end{pmatrix}", "\\overline", "'", "$", "²", "½", "−", "，", "（", "\ud800", "\x00", "\\", "\\color{red}",
    "C_5^2", "\\mathbb{R}", "1e3", "\\or", "\\emptyset", "three",
]  # fmt: skip


def test_no_text_makes_it_raise():
    draw = random.Random(0)
    before = answers_cut_off()
    for _ in range(3000):
        response, gold = ("".join(draw.choices(PIECES, k=draw.randint(1, most))) for most in (14, 6))
        assert verify_math(f"Answer: {response}", gold) in (0.0, 1.0)
    assert answers_cut_off() == before


SHAPES = [
    "{}", "-{}", "{}.5", "\\frac{{{}}}{{7}}", "\\frac{{7}}{{{}}}", "{}\\sqrt{{2}}", "\\sqrt{{{}}}", "2^{{{}}}",
    "{}^{{-9}}", "\\pi^{{{}}}", "e^{{-{}}}", "{}!", "\\frac{{1}}{{{}!}}", "({}, 3)", "\\{{{}, 3\\}}", "[-1, {})",
    "{}:1001", "x^2+{}x", "y = {}x", "x > {}", "{}\\text{{ cm}}", "{}^\\circ", "\\${}", "{}\\%", "{}\\times 10^{{-30}}",
    "10^{{-{}}}", "\\left(\\frac{{5}}{{6}}\\right)^{{{}}}", "{}i + 1", "\\ln {}", "0.\\overline{{{}}}",
    "\\sqrt{{2}} + 10^{{-{}}}", "\\begin{{pmatrix}} {} \\\\ 1 \\end{{pmatrix}}", "{}_{{11}}", "1,{}",
    "\\binom{{1000}}{{{}}}",
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_another_number_in_the_same_place_is_wrong(shape):
    draw = random.Random(shape)
    for _ in range(6):
        one, other = draw.sample(range(100, 400), 2)
        assert verify_math(f"Answer: {shape.format(one)}", shape.format(one)) == 1.0
        assert verify_math(f"Answer: {shape.format(other)}", shape.format(one)) == 0.0


@pytest.mark.parametrize("digits", [5, 50, 500, 1500])
def test_a_difference_in_a_late_digit_is_seen(digits, workers_of):
    workers = workers_of()
    near = (
        parse_formula(f"\\sqrt{{2}}+10^{{-{digits}}}")
        if digits < 1000
        else parse_formula(f"\\sqrt{{2}}+2^{{-{3 * digits}}}")
    )
    assert workers.order(near, parse_formula("\\sqrt{2}")) == 1
    assert workers.order(near, parse_formula("\\sqrt{2}+0")) == 1
    assert workers.order(parse_formula("\\sqrt{3+2\\sqrt{2}}"), parse_formula("1+\\sqrt{2}")) == 0


# --- workers ---

SLOW = parse_formula(ENDLESS), parse_formula("34")


def test_an_answer_over_the_limit_costs_its_worker_and_is_counted(workers_of):
    workers = workers_of(wall_s=1.0)
    assert workers.order(*ROOTS) == 0
    (first,) = workers.pool.idle
    with pytest.raises(CutOff):
        workers.order(*SLOW)
    assert (workers.pool.cut_off, workers.pool.idle) == (1, [])
    assert not Path(f"/proc/{first.process.pid}").exists(), "killed and waited for: no zombie"
    assert workers.order(*ROOTS) == 0
    assert workers.pool.idle[0].process.pid != first.process.pid
    assert workers.pool.cut_off == 1


def test_a_worker_killed_from_outside_is_replaced(workers_of):
    workers = workers_of(wall_s=60.0)
    assert workers.order(*ROOTS) == 0
    pid = workers.pool.idle[0].process.pid
    os.kill(pid, signal.SIGKILL)
    assert ended(pid)
    assert workers.order(*ROOTS) == 0, "it died idle: no answer is lost"
    assert workers.pool.cut_off == 0
    busy = workers.pool.idle[0].process.pid
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(workers.order, *SLOW)
        while workers.pool.idle:
            time.sleep(0.01)
        time.sleep(0.3)  # it has been asked
        os.kill(busy, signal.SIGKILL)
        with pytest.raises(CutOff):
            asked.result(timeout=50)  # before its limit of 60 s
    assert workers.pool.cut_off == 1


def test_a_worker_is_small_apart_and_limited(workers_of):
    workers = workers_of(memory_bytes=200 * 2**20)
    assert workers.order(*ROOTS) == 0
    pid = workers.pool.idle[0].process.pid
    limits = Path(f"/proc/{pid}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max address space")]
    assert line.split()[3:5] == [str(200 * 2**20)] * 2
    assert os.getsid(pid) == pid, "the terminal's Ctrl-C goes to the parent's session"
    assert "jaxlib" not in Path(f"/proc/{pid}/maps").read_text()
    assert len(os.listdir(f"/proc/{pid}/fd")) <= 5


def test_a_worker_that_cannot_start_is_an_error_of_the_installation(workers_of):
    with pytest.raises(RuntimeError, match="worker to start within 120 s, got .*import mpmath"):
        workers_of(memory_bytes=10 * 2**20).order(*ROOTS)


def test_old_workers_are_replaced_without_losing_an_answer(workers_of, monkeypatch):
    monkeypatch.setattr("tsopsd_jax.rewards.symbolic._ANSWERS_PER_WORKER", 2)
    workers = workers_of()
    assert workers.order(*ROOTS) == 0
    pid = workers.pool.idle[0].process.pid
    assert workers.order(*ROOTS) == 0
    assert workers.pool.idle == []
    assert ended(pid, 0.1)
    assert workers.pool.cut_off == 0


PARENT = """
import sys, threading
from tsopsd_jax.rewards.formula import parse_formula as parse
from tsopsd_jax.rewards.symbolic import Workers
workers = Workers(wall_s=2.0)
assert workers.order(parse("x+x"), parse("2x")) == 0
print(workers.pool.idle[0].process.pid, flush=True)
if sys.argv[1] == "busy":
    threading.Thread(target=workers.order, args=(parse(sys.argv[2]), parse("34")), daemon=True).start()
sys.stdin.read()
"""


@pytest.mark.parametrize("doing", ["idle", "busy"])
def test_workers_end_with_a_parent_that_is_killed(doing):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, doing, ENDLESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        parent.kill()
    gone = ended(pid)
    if not gone:
        os.kill(pid, signal.SIGKILL)  # a failure must not leave it computing
    assert gone


def test_threads_get_the_answers_to_their_own_questions(workers_of, monkeypatch):
    workers = workers_of()
    monkeypatch.setattr(verifier, "WORKERS", workers)
    pairs = [(f"Answer: \\sqrt{{{n * n * 2}}}", f"{n + n % 2}\\sqrt{{2}}") for n in range(2, 42)]
    with ThreadPoolExecutor(2) as threads:
        scores = list(threads.map(lambda pair: verify_math(*pair), pairs))
    assert scores == [float(n % 2 == 0) for n in range(2, 42)]
    assert 1 <= len(workers.pool.idle) <= 2
    assert sum(worker.answered for worker in workers.pool.idle) == len(pairs), "each of them takes a worker"
