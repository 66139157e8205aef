"""Sources of problems, prompts, and the order in which problems come."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tsopsd_jax.data import SOURCES, TEMPLATES, Tokenizer, indices, load_problems, render


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data sets are not beside the checkout (../shared/data)")
    return folder


@pytest.mark.shared_data
def test_qwen3_tokenizer(real_data):
    tokenizer = Tokenizer.load(real_data / "qwen3_tokenizer")
    assert tokenizer.vocab_size == 151_669
    assert tokenizer.stop_ids == (151_645,)  # <|im_end|>
    text = "Let $x = \\frac{1}{2}$.\n\nAnswer: 12"
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, 151_645, 151_643]) == text
    tokenizer.check_fits(151_936)
    with pytest.raises(ValueError, match=r"109.*151669"):
        tokenizer.check_fits(109)


# --- prompts ---


def test_templates():
    assert render("plain", "1 + 1?") == "1 + 1?"
    assert render("boxed", "1 + 1?") == (
        "1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert render("dapo_answer", "1 + 1?").endswith(
        '\n\n1 + 1?\n\nRemember to put your answer on its own line after "Answer:".'
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_braces_in_problems_survive(template):
    problem = "Find $\\frac{1}{2}$, {0}, {problem}, {} and }{."
    assert TEMPLATES[template].count("{problem}") == 1
    assert problem in render(template, problem)
    assert render(template, problem).count(problem) == 1


def test_unknown_template():
    with pytest.raises(ValueError, match=r"'boxd'.*did you mean 'boxed'"):
        render("boxd", "x")


# --- sources ---


def write_jsonl(path: Path, *rows) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_jsonl(tmp_path):
    path = write_jsonl(
        tmp_path / "mine.jsonl",
        {"problem": "What is {1+1}?", "answer": "2", "more": 0},
        "",
        {"problem": "¿Half?", "answer": 0.5, "id": 7},
    )
    problems = load_problems("jsonl", path=path, template="boxed")
    assert len(problems) == 2
    assert problems[0][:4] == ("mine-1", render("boxed", "What is {1+1}?"), "2", {"more": 0})
    assert problems[1][:3] == ("7", render("boxed", "¿Half?"), "0.5")
    assert load_problems("jsonl", path=path, first=1)[-1].prompt == "What is {1+1}?"


def test_jsonl_names_every_malformed_row(tmp_path):
    good = {"problem": "p", "answer": "a"}
    path = write_jsonl(tmp_path / "bad.jsonl", good, "{", {"problem": "p"}, [1], {"problem": " ", "answer": "a"}, good)
    with pytest.raises(
        ValueError, match=r"4 malformed rows \(row 2: not JSON.*row 3: answer.*row 4: not an object; rows 5; rows count"
    ) as e:
        load_problems("jsonl", path=path)
    assert "\n" not in str(e.value)
    # what lies beyond the rows asked for is not judged
    assert len(load_problems("jsonl", path=path, first=1)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"problem": "p", "answer": ' + "9" * 5000 + "}",
        '{"problem": "p", "answer": true}',
        "null",
        '{"problem": "\\ud800", "answer": "1"}',
    ],
)
def test_jsonl_hostile_rows(tmp_path, line):
    with pytest.raises(ValueError, match=r"1 malformed rows.*row 1"):
        load_problems("jsonl", path=write_jsonl(tmp_path / "x.jsonl", line))


def test_jsonl_fields_of_other_names(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", {"q": "Why?", "gold": 3, "problem": "no"})
    (problem,) = load_problems("jsonl", path=path, problem_field="q", answer_field="gold")
    assert problem[:4] == ("x-1", "Why?", "3", {"problem": "no"})
    with pytest.raises(ValueError, match="row 1: problem is missing"):
        load_problems("jsonl", path=path, problem_field="Q", answer_field="gold")


def test_jsonl_not_text(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"problem": "\xff", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"1 malformed rows.*row 1: not JSON"):
        load_problems("jsonl", path=path)


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("0.00005", "0.00005"),
        ("1e-12", "0.000000000001"),
        ("1e3", "1000"),
        ("1e16", "10000000000000000"),
        ("12345678901234567890", "12345678901234567890"),
        ("-2.50", "-2.5"),
        ("-0.0", "0"),
        ("4.0", "4"),
        ('"4.0"', "4.0"),  # a text stays as it is
    ],
)
def test_numbers_as_answers_are_written_in_plain_digits(tmp_path, written, answer):
    (problem,) = load_problems(
        "jsonl", path=write_jsonl(tmp_path / "x.jsonl", f'{{"problem": "p", "answer": {written}}}')
    )
    assert problem.answer == answer


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("column", ["answer", "id"])
def test_what_is_not_finite_is_refused(tmp_path, written, column):
    row = {"problem": "p", "answer": "1", "id": "a", column: float(written)}
    with pytest.raises(ValueError, match=rf"1 malformed rows \(row 1: {column} is -?(nan|inf), not a finite number"):
        load_problems("jsonl", path=write_jsonl(tmp_path / "x.jsonl", row))


@pytest.mark.parametrize(("kind", "answers"), [("float16", ["0.1", "1000"]), ("float32", ["0.1", "16777216"])])
def test_floats_of_parquet_have_the_digits_of_their_own_width(tmp_path, kind, answers):
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array(np.asarray([float(answer) for answer in answers], kind))
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["p", "q"], "answer": column}), tmp_path / "x.parquet")
    assert [p.answer for p in load_problems("jsonl", path=tmp_path / "x.parquet")] == answers
    # ... inside a record too
    rows = pyarrow.Table.from_pylist([dapo_row(f"u{i}", f"p{i}") for i in range(2)])
    truth = pyarrow.StructArray.from_arrays([column], ["ground_truth"])
    table = rows.set_column(rows.schema.get_field_index("reward_model"), "reward_model", truth)
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert [p.answer for p in load_problems("dapo_math_17k", path=tmp_path / "d.parquet")] == answers


def test_byte_order_marks_are_read(tmp_path):
    mark, line = "\ufeff".encode(), b'{"problem": "p", "answer": "1"}\n'
    for content in (mark + line, mark + line + mark + line, mark + b"\n" + line):
        (tmp_path / "x.jsonl").write_bytes(content)
        assert {p.answer for p in load_problems("jsonl", path=tmp_path / "x.jsonl")} == {"1"}
    (tmp_path / "x.jsonl").write_bytes(line.decode().encode("utf-16"))
    with pytest.raises(
        ValueError, match=r"x\.jsonl: expected JSON lines in UTF-8, got UTF-16 .*: save the file as UTF-8"
    ):
        load_problems("jsonl", path=tmp_path / "x.jsonl")


def test_jsonl_repeated_id(tmp_path):
    row = {"problem": "p", "answer": "a", "id": "same"}
    with pytest.raises(ValueError, match="row 2: id 'same' repeats"):
        load_problems("jsonl", path=write_jsonl(tmp_path / "x.jsonl", row, row))


def dapo_row(index="u1", content="Solve it.", truth="34") -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": content, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": index},
    }


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_dapo_layout(tmp_path):
    # the official file repeats its problems
    rows = [dapo_row("u1"), dapo_row("u2", "Find $\\frac{1}{2}$.", "7"), dapo_row("u1"), dapo_row("u3", "Why?")]
    rows += [dapo_row("u4"), dapo_row("u2", "Find $\\frac{1}{2}$.", "7")]  # another id does not make another problem
    problems = load_problems("dapo_math_17k", path=write_parquet(tmp_path / "d.parquet", rows))
    assert [problem.id for problem in problems] == ["u1", "u2", "u3"]
    assert problems[1][:3] == ("u2", render("dapo_answer", "Find $\\frac{1}{2}$."), "7")
    # with or without the official wording around it, the problem is the problem
    worded = [dapo_row("u2", render("dapo_answer", "Find $\\frac{1}{2}$."), "7")]
    path = write_parquet(tmp_path / "e.parquet", worded)
    assert load_problems("dapo_math_17k", path=path) == [problems[1]]
    assert load_problems("dapo_math_17k", path=path, template="plain")[0].prompt == "Find $\\frac{1}{2}$."
    assert len(load_problems("dapo_math_17k", path=tmp_path / "d.parquet", first=2)) == 2


def test_dapo_malformed_rows(tmp_path):
    rows = [
        dapo_row("u1"),
        dapo_row("u2", truth=None),
        dapo_row("u3") | {"prompt": []},
        dapo_row("u1", "Another text."),
        dapo_row("u5") | {"reward_model": None},
        dapo_row("u6", truth="35"),
    ]
    path = write_parquet(tmp_path / "d.parquet", rows)
    with pytest.raises(
        ValueError, match=r"5 malformed rows \(row 2: answer.*row 3: prompt.*row 4: .*'u1' repeats.*rows 5, 6"
    ):
        load_problems("dapo_math_17k", path=path)
    path = write_parquet(path, [rows[0], rows[5]])
    with pytest.raises(ValueError, match="row 2: repeats the problem of row 1 with another answer"):
        load_problems("dapo_math_17k", path=path)


def test_dapo_other_columns_or_no_parquet(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", [{"prompt": "x"}])
    with pytest.raises(ValueError, match="expected columns prompt, reward_model, extra_info, got prompt"):
        load_problems("dapo_math_17k", path=path)
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk\.parquet: expected a readable parquet file"):
        load_problems("dapo_math_17k", path=tmp_path / "junk.parquet")


def test_dapo_first_rows_do_not_read_the_rest(tmp_path, monkeypatch):
    from tsopsd_jax.data import layouts

    handed_out = []
    read = layouts._READERS[".parquet"]

    def counting(path, columns):
        for row in read(path, columns):
            handed_out.append(row)
            yield row

    monkeypatch.setitem(layouts._READERS, ".parquet", counting)
    path = write_parquet(tmp_path / "d.parquet", [dapo_row(f"u{i}", f"Problem {i}.") for i in range(2000)])
    assert len(load_problems("dapo_math_17k", path=path, first=5)) == 5
    assert len(handed_out) == 5
    assert len(load_problems("dapo_math_17k", path=path)) == 2000


@pytest.mark.shared_data
def test_real_dapo_math_17k(real_data):
    problems = load_problems("dapo_math_17k", path=real_data / "dapo_math_17k" / "dapo-math-17k.parquet")
    assert len(problems) == 17_243
    assert problems[0].answer == "34"
    before, after = TEMPLATES["dapo_answer"].split("{problem}")
    assert all(problem.prompt.startswith(before) and problem.prompt.endswith(after) for problem in problems)
    first = load_problems("dapo_math_17k", path=real_data / "dapo_math_17k" / "dapo-math-17k.parquet", first=10)
    assert list(first) == list(problems[:10])


@pytest.mark.shared_data
def test_real_dapo_answers_verify(real_data):
    from tsopsd_jax.rewards import verify_math

    path = real_data / "dapo_math_17k" / "dapo-math-17k.parquet"
    for problem in load_problems("dapo_math_17k", path=path, first=500):
        assert verify_math(f"So.\nAnswer: ${problem.answer}$", problem.answer) == 1.0
        assert verify_math(f"Answer: {problem.answer}1", problem.answer) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "countdwn"}, "countdown, dapo_math_17k, .*, jsonl, got 'countdwn': did you mean 'countdown'"),
        ({"name": "countdown"}, "expected a directory"),
        ({"name": "countdown", "split": "tset"}, "train, test, got 'tset'"),
        ({"name": "countdown", "path": "x"}, "expected no path"),
        ({"name": "countdown", "template": "boxed"}, "template"),
        ({"name": "dapo_math_17k"}, "expected a directory of prepared data sets or a path"),
        ({"name": "dapo_math_17k", "directory": "x"}, "is not prepared in x: run `tsopsd data prepare dapo_math_17k`"),
        ({"name": "math_500", "path": "x", "problem_field": "q"}, "its fields have fixed names"),
        ({"name": "olymmath_en", "path": "x", "split": "medium"}, r"easy\+hard, easy, hard, got 'medium'"),
        ({"name": "jsonl"}, "expected the path of a file, got none"),
        ({"name": "dapo_math_17k", "path": "absent.parquet"}, r"absent\.parquet.*download it"),
        ({"name": "jsonl", "path": "absent.jsonl"}, r"absent\.jsonl.*found none"),
        ({"name": "jsonl", "path": "x", "split": "train"}, "got 'train'"),
        ({"name": "jsonl", "path": "x", "template": "boxd"}, "did you mean 'boxed'"),
        ({"name": "jsonl", "path": "x", "first": 0}, "first >= 1"),
    ],
)
def test_source_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_problems(**arguments)


def test_empty_data_sets(tmp_path):
    with pytest.raises(ValueError, match="at least one row, got none"):
        load_problems("jsonl", path=write_jsonl(tmp_path / "x.jsonl", "", ""))
    import pyarrow

    empty = pyarrow.Table.from_pylist([dapo_row()]).slice(0, 0)
    import pyarrow.parquet

    pyarrow.parquet.write_table(empty, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="at least one row, got none"):
        load_problems("dapo_math_17k", path=tmp_path / "x.parquet")


def test_heavy_libraries_are_imported_late():
    heavy = "tensorflow_datasets", "pyarrow", "transformers", "tensorflow", "huggingface_hub", "jinja2"
    code = f"import sys, tsopsd_jax.data, tsopsd_jax.rewards; print([m for m in {heavy} if m in sys.modules])"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_sources_are_listed():
    years = {"aime_2024", "aime_2025", "aime_2026"}
    generated = {"arithmetic", "countdown"}
    assert set(SOURCES) == {"dapo_math_17k", "math_500", "olymmath_en", "gsm8k", "gpqa", "jsonl"} | generated | years


# --- the cursor ---


def test_order_golden():
    """numpy's default_rng([seed, epoch]).permutation(5): if it changed, resumed runs would too."""
    np.testing.assert_array_equal(indices(5, seed=0, position=0, count=5), [2, 4, 3, 0, 1])
    np.testing.assert_array_equal(indices(5, seed=0, position=5, count=5), [1, 4, 3, 0, 2])
    np.testing.assert_array_equal(indices(5, seed=1, position=0, count=5), [4, 0, 1, 2, 3])


def test_every_epoch_is_a_permutation_of_its_own():
    order = indices(100, seed=4, position=0, count=300).reshape(3, 100)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(100), (3, 1)))
    assert not np.array_equal(order[0], order[1])
    assert not np.array_equal(order[0], np.arange(100))


@pytest.mark.parametrize("step", [1, 3, 7, 20])
def test_resuming_anywhere_gives_the_same_order(step):
    whole = indices(7, seed=2, position=3, count=40)
    pieces = [indices(7, seed=2, position=3 + at, count=min(step, 40 - at)) for at in range(0, 40, step)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert whole.dtype == np.int64


def test_order_of_nothing():
    assert indices(7, seed=0, position=3, count=0).shape == (0,)


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": 0, "seed": 0, "position": 0, "count": 1},
        {"n": 5, "seed": -1, "position": 0, "count": 1},
        {"n": 5, "seed": 0, "position": -1, "count": 1},
        {"n": 5, "seed": 0, "position": 0, "count": -1},
    ],
)
def test_order_errors(arguments):
    n = arguments.pop("n")
    with pytest.raises(ValueError, match="expects"):
        indices(n, **arguments)
