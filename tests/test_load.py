"""Load: a million problems, ten thousand long rows through the scheduler, a store that fails."""

import dataclasses
import hashlib
import random
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tsopsd_jax.commands import exit_codes
from tsopsd_jax.config import Config, claim
from tsopsd_jax.config.claim import inputs_of
from tsopsd_jax.data import Problem, indices, load_problems
from tsopsd_jax.data.encode import pack_prompts
from tsopsd_jax.rewards import math as verifier
from tsopsd_jax.rewards import verify_math
from tsopsd_jax.rewards.symbolic import Workers
from tsopsd_jax.rollout.schedule import Geometry, Schedule
from tsopsd_jax.rundir import object_store
from tsopsd_jax.rundir.log import RunLog, read_metrics
from tsopsd_jax.rundir.trackers import Tracker

MILLION = 10**6


def test_the_cursor_of_a_million_problems():
    """Each of them once an epoch, in 64 steps of 15,625; a step in the midst is found without those before it."""
    steps = [indices(MILLION, seed=3, position=at, count=15_625) for at in range(0, MILLION, 15_625)]
    seen = np.concatenate(steps)
    assert seen.size == MILLION
    assert (np.bincount(seen, minlength=MILLION) == 1).all()
    assert np.array_equal(indices(MILLION, seed=3, position=40 * 15_625, count=15_625), steps[40])
    next_epoch = indices(MILLION, seed=3, position=MILLION - 5, count=10)
    assert np.array_equal(next_epoch[:5], steps[-1][-5:])
    tracemalloc.start()
    indices(MILLION, seed=3, position=123, count=64)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes <= 40 * MILLION, "a few permutations of integers, no lists of objects"


class Counting(Sequence):
    """Problems that count how often they are asked for."""

    def __init__(self, problems):
        self.problems, self.asked = problems, 0

    def __len__(self):
        return len(self.problems)

    def __getitem__(self, at):
        self.asked += len(range(*at.indices(len(self)))) if isinstance(at, slice) else 1
        return self.problems[at]


def start_of_a_run(file, rows: int, tokenizer) -> tuple[int, int]:
    """Read, tokenise and digest a file of problems: bytes that are held, and at most, beside those of the file."""
    tracemalloc.start()
    problems = load_problems("jsonl", path=file)
    packed = pack_prompts(problems, tokenizer, max_prompt_tokens=2048)
    inputs_of(Config.__new__(Config), {"training problems": problems})
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(problems) == packed.count == rows
    return held, most


def test_each_problem_costs_the_same_however_many_there_are(tmp_path, tokenizer, monkeypatch):
    """In memory, at its highest too: no list of all lines, no table of prompts as wide as the longest may be, no text
    of all problems. (Python's own memory and NumPy's; benchmarks/problems.py measures a million rows.)"""
    monkeypatch.setattr(claim.strict, "plain", lambda _: {})
    cost, margin = {}, 5_000_000  # what does not grow with the rows: a piece of prompts as lists
    for rows in (15_000, 30_000):
        file = tmp_path / f"{rows}.jsonl"
        with file.open("w") as out:
            for at in range(rows):
                text = f"{at % 89 + 10} {at // 89 % 89 + 10} {at // 7921 + 10} 7 -> {at % 83 + 10} :"
                out.write(f'{{"id": "p{at}", "problem": "{text}", "answer": "7", "level": 3}}\n')
        cost[rows] = start_of_a_run(file, rows, tokenizer)
    (held, most), (held_of_twice, most_of_twice) = cost.values()
    assert held_of_twice <= 2.1 * held
    assert most_of_twice <= 2.1 * most
    assert held_of_twice / 30_000 < 1_500, "bytes a row"
    assert most_of_twice < 1.6 * held_of_twice + margin


def test_each_problem_is_looked_at_once(tokenizer):
    rows = 40_000
    problems = Counting([Problem(str(at), "3 5 7 9 -> 24 :", "24") for at in range(rows)])
    encoded = []
    counting = dataclasses.replace(tokenizer)
    object.__setattr__(counting, "encode", lambda text, before: encoded.append(text) or tokenizer.encode(text, before))
    packed = pack_prompts(problems, counting, max_prompt_tokens=7)
    assert problems.asked == len(encoded) == rows
    tokens, lengths = packed.padded(np.asarray([rows - 1, 0, 20_000]))
    assert tokens.tolist() == [tokenizer.encode("3 5 7 9 -> 24 :")] * 3
    assert lengths.tolist() == [7] * 3


def test_packed_prompts_are_the_padded_ones(tokenizer):
    texts = ["3 5 7 9 -> 24 :", "3 5 -> 24 :", "3 ->", "1 2 3 4 -> 10 :"]
    packed = pack_prompts([Problem(t, t, "1") for t in texts], tokenizer, max_prompt_tokens=9)
    tokens, lengths = packed.padded(np.asarray([1, 3, 1]))
    for row, at in enumerate((1, 3, 1)):
        ids = tokenizer.encode(texts[at])
        assert tokens[row].tolist() == ids + [0] * (9 - len(ids))
        assert lengths[row] == len(ids)
    assert packed.padded(np.empty(0, np.int64))[0].shape == (0, 9)
    with pytest.raises(ValueError, match="prompt 'long' has 7 tokens, expected 1 to 5"):
        pack_prompts([Problem("long", texts[0], "1")], tokenizer, max_prompt_tokens=5)


def test_the_digest_of_problems_is_that_of_their_list(monkeypatch):
    """As it always was: runs that were begun before know their problems again."""
    monkeypatch.setattr(claim.strict, "plain", lambda _: {})
    rows = [Problem("a", "x \u00e9", "1"), Problem("b", "y", "2", {"level": 3}, (("system", "s"),))]
    text = '[["x \\u00e9", "1"], ["y", "2", {"level": 3}, [["system", "s"]]]]'
    found = inputs_of(Config.__new__(Config), {"training problems": rows, "none": []})
    assert found == {
        "training problems": f"2, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}",
        "none": f"0, sha256 {hashlib.sha256(b'[]').hexdigest()[:16]}",
    }


def test_ten_thousand_rows_of_8192_tokens_go_through_the_scheduler():
    """A simulated device: lengths up to the limit, none of it computed. Every row ends once, with its own length, and
    the pool of pages stays within its size."""
    rng = np.random.default_rng(0)
    rows, limit = 10_000, 8_192
    lengths = np.minimum(rng.geometric(1 / 2_500, rows), limit)
    prompts = rng.integers(20, 300, rows)
    geometry = Geometry(segment_tokens=128, max_prompt_tokens=512, max_response_tokens=limit, shards=4)
    schedule = Schedule(prompts, slots=512, geometry=geometry)
    ended: dict[int, int] = {}
    while not schedule.over:
        schedule.grow()
        if schedule.live.any():
            schedule.commit()
        schedule.shrink()
        schedule.admit()
        assert schedule.pool <= geometry.pool_sizes(512 // 4)[-1]
        assert schedule.table.count.sum() == schedule.uses.sum() == (schedule.uses > 0).sum()
        before = np.where(schedule.live, schedule.drawn, 0)
        left = np.where(schedule.live, lengths[schedule.row] - before, 0)
        count = np.minimum(left, 128)
        length_of = (before + count).ravel()  # by slot, numbered over all shards
        for row, slot, _ in schedule.advance(count, schedule.live & (left <= 128)):
            assert row not in ended
            ended[row] = int(length_of[slot])
    assert [ended[row] for row in range(rows)] == lengths.tolist()
    assert schedule.kept_tokens == lengths.sum()
    assert schedule.kept_tokens / schedule.slot_steps > 0.85, "slots are refilled while others go on"


def test_every_answer_at_its_limit_is_answered_and_leaves_nothing(monkeypatch):
    """All responses of a step ask for a sum that never ends: each costs its limit and its worker, no more."""
    workers = Workers(wall_s=0.3)
    monkeypatch.setattr(verifier, "WORKERS", workers)
    endless = [f"Answer: \\sum_{{k=1}}^{{10^{{12}}}} \\sin({n} k)" for n in range(1, 13)]
    try:
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(lambda text: verify_math(text, "34"), endless)) == [0.0] * len(endless)
        assert workers.pool.cut_off == len(endless)
        assert workers.pool.idle == [], "each was killed, and waited for"
        assert verify_math("Answer: \\sqrt{8}", "2\\sqrt{2}") == 1.0
        assert len(workers.pool.idle) == 1
    finally:
        workers.pool.close()


# ------------------------------------------------------------------------------------------------ a store


@pytest.fixture
def flaky(monkeypatch):
    """flaky(share): so many of the writes to the store fail, at random from a seed."""
    from etils import epath

    def make(share: float) -> list[int]:
        dice, failed = random.Random(0), [0]
        place = type(epath.Path("gs://any/x"))
        write = place.write_bytes

        def write_bytes(self, content):
            if dice.random() < share:
                failed[0] += 1
                raise ConnectionError("503 backend error")
            return write(self, content)

        monkeypatch.setattr(place, "write_bytes", write_bytes)
        monkeypatch.setattr(object_store, "PAUSE_S", 0.0)
        return failed

    return make


@pytest.mark.usefixtures("buckets")
def test_a_store_that_fails_one_write_in_ten_loses_nothing(tmp_path, flaky):
    folder = object_store.folder_of("gs://flaky/x", tmp_path / "here")
    (folder / "config.yaml").write_text("seed: 0")
    failed = flaky(0.1)
    with RunLog(folder, last_step=0, tracker=Tracker(tensorboard=False)) as log:
        for step in range(1, 101):
            log.write(line(step))
            log.push()
    assert failed[0] > 5
    there = object_store.folder_of("gs://flaky/x", tmp_path / "there")
    object_store.fetch(there)
    assert (there / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    assert [each["step"] for each in read_metrics(there)] == list(range(1, 101))


@pytest.mark.usefixtures("buckets")
def test_a_store_that_fails_always_ends_the_run_with_exit_code_6(tmp_path, flaky, capsys):
    folder = object_store.folder_of("gs://broken/x", tmp_path)
    (folder / "config.yaml").write_text("seed: 0")
    failed = flaky(1.0)
    with pytest.raises(
        object_store.StoreError, match=r"could not be written in 6 attempts \(ConnectionError: 503"
    ) as caught:
        object_store.push(folder)
    assert failed[0] == 6
    assert exit_codes.explain("train", caught.value) == 6
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().err


def line(step: int) -> dict:
    return {"step": step, "phase": "rl", "phase_step": step, "time_s": 1.0}
