r"""How fast verify_math is: typical responses of about 1,000 tokens, with one and two threads (a worker process each).

    python benchmarks/verifier.py [--seconds S] [--out FILE]

Four kinds of answers, in equal parts: integers (right and wrong), plain fractions and units, symbolic expressions, and
prose or broken LaTeX. A peer for scale: one thread, and every answer sent to a worker.
"""

import argparse
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peers import about

from tsopsd_jax.rewards import answers_cut_off, verify_math
from tsopsd_jax.rewards.answers import final_answer
from tsopsd_jax.rewards.compare import Comparison
from tsopsd_jax.rewards.formula import parse_formula
from tsopsd_jax.rewards.math import WORKERS, equal, read_answer
from tsopsd_jax.rewards.trees import SCALARS, Unreadable

OUT = Path(__file__).parent / "results" / "verifier_cpu.json"
REASONING = "We substitute $x = 3k + 1$ and collect terms, so that $\\frac{a_n}{b_n}$ stays bounded. "
RESPONSE_CHARACTERS = 3500  # about 1,000 tokens
ROOTS = parse_formula("\\sqrt{8}"), parse_formula("2\\sqrt{2}")


def responses(count: int) -> list[tuple[str, str]]:
    """(response, gold), all different, the same every time."""
    draw = random.Random(0)

    def one(kind: int) -> tuple[str, str]:
        n, m = draw.randint(2, 999), draw.randint(2, 99)
        right = draw.random() < 0.5
        if kind == 0:
            return f"${n}$", str(n if right else n + 1)
        if kind == 1:
            return f"\\frac{{{n}}}{{{m}}}\\text{{ cm}}", f"{n}/{m}" if right else f"{m}/{n}"
        if kind == 2:
            return f"{n}\\sqrt{{{4 * m}}} + x^2", f"x^2+{2 * n if right else n}\\sqrt{{{m}}}"
        return draw.choice([f"about {n}, or so", f"\\frac{{{n}", f"x = {n} or {m}", "no solution"]), str(n)

    answers = [one(i % 4) for i in range(count)]
    padding = REASONING * (RESPONSE_CHARACTERS // len(REASONING))
    return [(f"{padding}\n\nAnswer: {answer}", gold) for answer, gold in answers]


def per_second(verify, threads: int, seconds: float) -> float:
    """Verifications a second; the workers are running before the clock starts."""
    pairs = responses(4000)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda pair: WORKERS.order(*pair), [ROOTS] * (2 * threads)))
        began, done = time.perf_counter(), 0
        while done < len(pairs) and time.perf_counter() - began < seconds:
            done += len(list(pool.map(lambda pair: verify(*pair), pairs[done : done + 40])))
        return done / (time.perf_counter() - began)


def symbolic_only(response: str, gold: str) -> float:
    """The peer: no rules, a worker for every answer that is a formula."""
    try:
        trees = parse_formula(read_answer(final_answer(response) or "")), parse_formula(read_answer(gold))
        return float(all(tree[0] in SCALARS for tree in trees) and WORKERS.order(*trees) == 0)
    except Unreadable:
        return 0.0


def settled(response: str, gold: str) -> bool:
    """Whether no worker is needed."""
    asked: list[bool] = []
    equal(final_answer(response) or "", gold, Comparison(lambda *_: asked.append(True)))
    return not asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    pairs = responses(4000)
    began = time.perf_counter()
    alone = sum(settled(response, gold) for response, gold in pairs)
    rules_s = time.perf_counter() - began
    began = time.perf_counter()
    WORKERS.order(*ROOTS)
    start_s = time.perf_counter() - began
    status = Path(f"/proc/{WORKERS.pool.idle[0].process.pid}/status").read_text().splitlines()
    result = about() | {
        "worker_start_s": round(start_s, 2),
        "worker_resident_mib": next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) // 1024,
        "settled_without_a_worker_fraction": alone / len(pairs),
        "rules_alone_per_s": round(len(pairs) / rules_s),
        "one_thread_per_s": round(per_second(verify_math, 1, args.seconds), 1),
        "two_threads_per_s": round(per_second(verify_math, 2, args.seconds), 1),
        "every_answer_to_one_worker_per_s": round(per_second(symbolic_only, 1, args.seconds), 1),
        "cut_off": answers_cut_off(),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
