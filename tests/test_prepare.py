"""Published data sets: their files' layouts, `tsopsd data`, what a run leaves out, and a run on a prepared set."""

import csv
import json
import shutil
from pathlib import Path

import byte_model
import pytest
import yaml
from test_data import dapo_row, write_jsonl, write_parquet

from tsopsd_jax.cli import main
from tsopsd_jax.data import Problem, evaluation_split, load_problems, prepare, render, selection
from tsopsd_jax.rundir.log import read_metrics

# --- layouts of the published files ---


@pytest.mark.parametrize(
    ("name", "file", "row", "expected"),
    [
        (
            "math_500",
            "test.jsonl",
            {"problem": "1 + 1?", "solution": "Two.", "answer": "2", "level": 1, "unique_id": "test/algebra/1.json"},
            ("test/algebra/1.json", "1 + 1?", "2"),
        ),
        (
            "aime_2024",
            "data/test-0.parquet",
            {"id": 60, "problem": "P", "solution": "\\boxed{204}"},
            ("60", "P", "204"),
        ),
        (
            "aime_2024",
            "test.jsonl",
            {"id": "aime24-0", "problem": "P", "reference_solution": "\\boxed{073}", "expected_answer": "73"},
            ("aime24-0", "P", "73"),
        ),
        ("aime_2025", "test.jsonl", {"problem": "P", "answer": "70", "id": "0"}, ("0", "P", "70")),
        (
            "aime_2026",
            "test.jsonl",
            {"answer": "277", "prompt": render("boxed", "P")},
            ("aime_2026-test-1", "P", "277"),
        ),
        (
            "gsm8k",
            "main/train-00000-of-00001.parquet",
            {"question": "How many?", "answer": "2 * 540 = <<2*540=1080>>1080\n#### 1,080"},
            ("gsm8k-train-1", "How many?", "1080"),
        ),
    ],
)
def test_official_layouts(name, file, row, expected, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    (write_parquet(path, [row]) if path.suffix == ".parquet" else write_jsonl(path, row))
    assert load_problems(name, path=tmp_path) == [Problem(*expected)]  # the folder
    assert load_problems(name, path=path) == [Problem(*expected)]  # the file itself


def test_olymmath_is_its_two_halves(tmp_path):
    for half in ("EASY", "HARD"):
        rows = [{"problem": f"{half} {i}", "answer": str(i), "unique_id": f"{half}-{i}"} for i in range(3)]
        write_jsonl(tmp_path / f"OlymMATH-EN-{half}.jsonl", *rows)
        write_jsonl(tmp_path / f"OlymMATH-ZH-{half}.jsonl", *rows[:1])
    problems = load_problems("olymmath_en", path=tmp_path)
    assert [p.id for p in problems] == ["EASY-0", "EASY-1", "EASY-2", "HARD-0", "HARD-1", "HARD-2"]
    assert load_problems("olymmath_en", path=tmp_path, split="hard") == problems[3:]
    assert load_problems("olymmath_en", path=tmp_path, first=4) == problems[:4]
    with pytest.raises(ValueError, match="expected files of the split hard"):
        load_problems("olymmath_en", path=tmp_path / "OlymMATH-EN-EASY.jsonl")


def gpqa_row(i: int) -> dict[str, str]:
    """In the columns of the published file, which has many more."""
    wrong = {f"Incorrect Answer {k}": f"wrong {k} of {i}\n" for k in (1, 2, 3)}
    return {
        "Record ID": f"rec{i}",
        "Question": f"Question, {i}?",
        "Correct Answer": f" right {i}",
        **wrong,
        "Extra": "x",
    }


def write_gpqa(folder: Path, rows: list[dict[str, str]]) -> Path:
    with (folder / "gpqa_main.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(gpqa_row(0)))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_gpqa_shuffles_its_options_by_the_rows_id(tmp_path):
    problems = load_problems("gpqa", path=write_gpqa(tmp_path, [gpqa_row(i) for i in range(80)]))
    for i, problem in enumerate(problems):
        question, options, instruction = problem.prompt.split("\n\n")
        assert question == f"Question, {i}?"
        assert instruction == "Answer with the letter of the right option."
        listed = dict(line.split(") ", 1) for line in options.splitlines())
        assert list(listed) == ["A", "B", "C", "D"]
        assert sorted(listed.values()) == [f"right {i}", *(f"wrong {k} of {i}" for k in (1, 2, 3))]
        assert listed[problem.answer] == f"right {i}"
    letters = [problem.answer for problem in problems]
    assert min(letters.count(letter) for letter in "ABCD") >= 10  # 20 each on average, standard deviation 3.9
    # golden: a score must not change because an order did
    assert "".join(letters[:12]) == "DCABCDDCDCDB"
    (tmp_path / "gpqa_main.csv").unlink()
    assert load_problems("gpqa", path=write_gpqa(tmp_path, [gpqa_row(7)])) == [problems[7]]


def test_malformed_rows_of_other_layouts(tmp_path):
    write_gpqa(tmp_path, [gpqa_row(0), gpqa_row(1) | {"Incorrect Answer 2": " "}])
    with pytest.raises(ValueError, match=r"1 malformed rows \(row 2: Incorrect Answer 2 is missing"):
        load_problems("gpqa", path=tmp_path)
    write_jsonl(tmp_path / "test.jsonl", {"question": "q", "answer": "no mark"}, {"question": "q", "answer": "#### 5"})
    with pytest.raises(ValueError, match="2 malformed rows .row 1: answer has no ####; row 2: answer has no ####"):
        load_problems("gsm8k", path=tmp_path, split="test")
    with pytest.raises(
        ValueError, match=r"expected EN-EASY|expected .*EN-EASY\.jsonl, .*EN-HARD\.jsonl at .*found none"
    ):
        load_problems("olymmath_en", path=tmp_path)


# --- tsopsd data ---


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache in which two small sets are prepared, by the command line."""
    folder = tmp_path_factory.mktemp("data")
    problem = ("Find $x$ if $x + {} = 7$.", "What is $3 - {}$ times two?", "How long is a rope of {} times $2$ metres?")
    rows = [dapo_row(f"u{i}", render("dapo_answer", problem[i % 3].format(i)), str(i)) for i in range(12)]
    rows += rows[:7] + [dapo_row("u20", render("dapo_answer", "Long: " + "1 + " * 100 + "1?"), "101")]
    write_parquet(folder / "dapo-math-17k.parquet", rows)
    # written otherwise, but the problems u0 and u4
    same = "find  $x$ if $x$ + ${0}$ = $7$.", "What is $3-4$ times two?"
    write_jsonl(folder / "test.jsonl", *({"problem": p, "answer": "1", "unique_id": p} for p in same))
    for name in ("dapo_math_17k", "math_500"):
        arguments = ["data", "prepare", name, "--from", str(folder), "--cache-dir", str(folder / "cache")]
        assert main(arguments) == 0
    return folder / "cache"


def test_prepared_sets_are_found_by_name(cache, capsys):
    directory = cache / "datasets"
    problems = load_problems("dapo_math_17k", directory=directory)
    assert [p.id for p in problems] == [f"u{i}" for i in range(12)] + ["u20"]  # 7 repetitions left out
    assert problems[0][:3] == ("u0", render("dapo_answer", "Find $x$ if $x + 0 = 7$."), "0")
    assert load_problems("dapo_math_17k", directory=directory, first=2) == problems[:2]
    assert load_problems("dapo_math_17k", directory=directory, template="boxed")[1].prompt == render(
        "boxed", "What is $3 - 1$ times two?"
    )
    assert main(["data", "list", "--cache-dir", str(cache)]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    states = {name.strip(): " ".join(rest) for name, *rest in lines}
    assert "train 13" in states["dapo_math_17k"]
    assert "not prepared" in states["gsm8k"]
    assert "jsonl" not in states


def test_prepare_says_what_it_read_and_replaces_what_stands_there(tmp_path, capsys):
    for answers in ((1, 2), (3, 4, 5)):
        for split in ("train", "test"):
            rows = [
                {"question": f"q{a}", "answer": f"So.\n#### {a}"} for a in answers[: None if split == "train" else 1]
            ]
            write_jsonl(tmp_path / f"{split}.jsonl", *rows)
        command = ["data", "prepare", "gsm8k", "--from", str(tmp_path), "--cache-dir", str(tmp_path / "cache")]
        assert main(command) == 0
    directory = tmp_path / "cache" / "datasets"
    assert [p.answer for p in load_problems("gsm8k", directory=directory)] == ["3", "4", "5"]
    assert [p.id for p in load_problems("gsm8k", directory=directory, split="test")] == ["gsm8k-test-1"]
    assert evaluation_split("gsm8k") == "test"
    assert evaluation_split("olymmath_en") is None
    said = capsys.readouterr().out.splitlines()[-3:]
    assert said[:2] == [
        "gsm8k train: 3 problems; 0 repetitions left out; 0 malformed rows",
        "gsm8k test: 1 problems; 0 repetitions left out; 0 malformed rows",
    ]
    assert said[2] == str(directory / "gsm8k" / "1.0.0")
    assert [p.name for p in directory.iterdir()] == ["gsm8k"]  # no workplace is left


def test_malformed_rows_stop_the_preparation_unless_told_otherwise(tmp_path, capsys):
    rows = [{"problem": f"p{i}", "answer": "" if i in (2, 5) else "1", "unique_id": str(i)} for i in range(1, 8)]
    command = ["data", "prepare", "math_500", "--from", str(write_jsonl(tmp_path / "mine.jsonl", *rows))]
    command += ["--cache-dir", str(tmp_path / "cache")]
    assert main(command) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "mine.jsonl: 2 malformed rows (row 2: answer is missing, empty or not a text; row 5: answer" in line
    assert "--skip-malformed" in line
    assert not list(tmp_path.rglob("dataset_info.json"))
    assert main([*command, "--skip-malformed"]) == 0
    assert "5 problems; 0 repetitions left out; 2 malformed rows (row 2: " in capsys.readouterr().out
    kept = load_problems("math_500", directory=tmp_path / "cache" / "datasets")
    assert [p.id for p in kept] == ["1", "3", "4", "6", "7"]


def prepare_command(name: str, source: Path, cache: Path) -> list[str]:
    return ["data", "prepare", name, "--from", str(source), "--cache-dir", str(cache)]


def test_the_files_of_several_data_sets_are_not_one(tmp_path, capsys):
    """A folder above the data set's own: every `test.jsonl` below it would be read."""
    for name in ("aime_2024", "gsm8k"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "test.jsonl", {"problem": f"p of {name}", "answer": "7"})
    assert main(prepare_command("aime_2024", tmp_path, tmp_path / "cache")) == 2
    error = capsys.readouterr().err
    assert (
        f"expected the files of test in one folder, got 2 in 2: {tmp_path / 'aime_2024'}, {tmp_path / 'gsm8k'}" in error
    )
    with pytest.raises(ValueError, match="expected the files of test in one folder"):
        load_problems("aime_2024", path=tmp_path)
    assert not list(tmp_path.rglob("dataset_info.json"))
    assert main(prepare_command("aime_2024", tmp_path / "aime_2024", tmp_path / "cache")) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == f"aime_2024 test: read {tmp_path / 'aime_2024' / 'test.jsonl'}"
    assert said.err.strip() == "warning: aime_2024 test: 1 problems of 30"


def test_a_data_set_has_no_more_problems_than_are_known(tmp_path, capsys):
    rows = [{"problem": f"p{i}", "answer": "7"} for i in range(31)]
    assert main(prepare_command("aime_2025", write_jsonl(tmp_path / "test.jsonl", *rows), tmp_path / "cache")) == 2
    assert (
        "expected the data set's 30 problems, got 31: name its own file, or read yours as jsonl"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.rglob("dataset_info.json"))
    with pytest.raises(ValueError, match="expected the data set's 30 problems, got 31"):
        load_problems("aime_2025", path=tmp_path)
    assert len(load_problems("jsonl", path=tmp_path / "test.jsonl")) == 31


def test_a_long_list_of_malformed_rows_is_cut(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", *["{}"] * 30)
    numbers = ", ".join(str(n) for n in range(4, 21))
    with pytest.raises(
        ValueError, match=rf"30 malformed rows \(row 1: .*row 3: .*; rows {numbers}, \.\.\.; rows count"
    ):
        load_problems("jsonl", path=path)


def quiet(rows, what, total):
    del what, total
    return rows


def test_the_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no route to it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError) as error:
        prepare.prepare_dataset("math_500", tmp_path, watch=quiet)
    message = str(error.value)
    assert (
        "could not fetch HuggingFaceH4/MATH-500 from the Hugging Face hub (ConnectionError: no route to it)" in message
    )
    assert "`tsopsd data prepare math_500 --from PATH`" in message


def test_the_hub_is_asked_for_the_files_of_the_layout(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(repository, **options):
        asked[repository] = options
        write_jsonl(tmp_path / "test.jsonl", {"problem": "p", "answer": 1, "unique_id": "u"})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    prepared = prepare.prepare_dataset("math_500", tmp_path / "datasets", watch=quiet)
    assert prepared.tallies["test"].kept == 1
    (options,) = [asked.pop("HuggingFaceH4/MATH-500")]
    assert options["repo_type"] == "dataset"
    assert {"test.jsonl", "*/test.jsonl"} <= set(options["allow_patterns"])
    with pytest.raises(ValueError, match="aime_2026: no repository on the Hugging Face hub is known for it"):
        prepare.prepare_dataset("aime_2026", tmp_path, watch=quiet)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["jsonl"], "needs no preparation"),
        (["countdown", "--from", "x"], "expected no --from"),
        (["math500"], "did you mean 'math_500'"),
        (["math_500", "--from", "absent"], "expected a file at absent, found none"),
    ],
)
def test_what_cannot_be_prepared(arguments, says, tmp_path, capsys):
    assert main(["data", "prepare", *arguments, "--cache-dir", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


# --- what a run leaves out ---


def test_equal_problems_have_equal_fingerprints():
    same = (
        "Let $x^{2} = 4$. Find  $x$.",
        "let $x^2$ = $4$.\nfind $x$.",
        render("boxed", "Let $x^2=4$. Find $x$."),
        render("dapo_answer", "Let x^2 = 4. Find x."),
    )
    assert {selection.normalised(text) for text in same} == {"letx^2=4.findx."}
    assert len({selection.problem_fingerprint(text) for text in same}) == 1
    for other in ("Let $x^3 = 4$. Find $x$.", "Let $x^2 = -4$. Find $x$.", "Let $x^{24}$. Find $x$."):
        assert selection.problem_fingerprint(other) != selection.problem_fingerprint(same[0])
    assert selection.problem_fingerprint("\\frac{1}{23}") != selection.problem_fingerprint("\\frac{12}{3}")
    assert (
        selection.problem_fingerprint("How many?") == "01b5b5372c8f6913"
    )  # of sha256("howmany?"); stored ones depend on it
    stored = selection.fingerprints("amc_2023", "nowhere")
    assert len(stored) == 40


def test_a_sample_is_seeded_and_without_replacement():
    problems = [Problem(str(i), f"p{i}", "1") for i in range(100)]
    drawn = selection.drawn(problems, 40, seed=3)
    assert len({p.id for p in drawn}) == 40
    assert drawn == sorted(drawn, key=lambda p: int(p.id)) == selection.drawn(problems, 40, seed=3)
    assert drawn != selection.drawn(problems, 40, seed=4)
    assert selection.drawn(problems, 100, seed=3) == problems
    with pytest.raises(ValueError, match="at most the 100 problems there are, got 101"):
        selection.drawn(problems, 101, seed=3)


@pytest.mark.shared_data
def test_all_problems_of_the_overlap_are_found(shared_data):
    data = shared_data / "dapo_math_17k"
    listed = {row["index"] for row in json.loads((data / "eval_overlap.json").read_text())}
    assert len(listed) == 16
    known = [selection.fingerprints("amc_2023", shared_data)]
    for name in ("math_500", "aime_2024", "aime_2025", "aime_2026", "olymmath_en", "gsm8k"):
        problems = load_problems(name, path=shared_data / name, split=evaluation_split(name))
        known.append({selection.problem_fingerprint(p.prompt) for p in problems})
    train = load_problems("dapo_math_17k", path=data)
    left = {p.id for p in selection.without(train, known)}
    assert {p.id for p in train} - left == listed


# --- a run on a prepared set ---


def configuration(folder: Path, cache: Path, **data) -> list[str]:
    """Arguments for `check` and `train` of a tiny random model on the prepared set."""
    phase = {
        "name": "rl",
        "objective": {"name": "dapo"},
        "optimizer": {"learning_rate": 1e-3},
        "stop": {"steps": 1},
        "prompts_per_step": 4,
        "responses_per_prompt": 2,
        "max_response_tokens": 8,
        "reward": {"overlong_buffer_tokens": 4, "max_generation_batches": 1, "on_shortage": "fill"},
    }
    settings = {
        "model": {"path": str(byte_model.write(folder / "model")), "random_init": True},
        "data": {"name": "dapo_math_17k", "verifier": "math", "max_prompt_tokens": 320} | data,
        "phases": [phase],
        "cache_dir": str(cache),
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return [str(folder / "c.yaml")]


def test_check_tells_what_is_left_out(cache, tmp_path, capsys):
    asked = {"exclude": ["math_500", "amc_2023"], "drop_longer": True, "sample": 5, "chat": "thinking"}
    assert main(["check", *configuration(tmp_path, cache, **asked)]) == 0
    lines = [line.split("c.yaml: ")[1] for line in capsys.readouterr().out.splitlines() if "c.yaml: " in line]
    assert lines[:3] == [
        "left out of 13 problems: 2 of math_500, amc_2023",
        "left out of 11 problems: 1 over 320 tokens",
        "a sample of 5 of 10 problems",
    ]
    assert lines[3].startswith("valid; 5 problems")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "prompt 'u20' has "),
        ({"exclude": ["gsm8k"]}, "run `tsopsd data prepare gsm8k`"),
        ({"exclude": ["math500"]}, "did you mean 'math_500'"),
        ({"max_prompt_tokens": 8, "drop_longer": True}, "leave no problem"),
        ({"first": 2, "sample": 2}, "expected first or sample, got both (2, 2)"),
        ({"sample": 0}, "sample must be at least 1, got 0"),
        ({"sample": 14}, "at most the 13 problems there are, got 14"),
        ({"chat": "yes"}, "expected one of none, direct, thinking, got 'yes'"),
    ],
)
def test_selections_that_cannot_be(data, says, cache, tmp_path, capsys):
    assert main(["check", *configuration(tmp_path, cache, **data)]) == 2
    assert says in capsys.readouterr().err


def test_first_counts_what_is_not_left_out(cache, tmp_path):
    from tsopsd_jax.config import load_config
    from tsopsd_jax.config.build import prepare as prepare_run

    (file,) = configuration(tmp_path, cache, exclude=["math_500"], drop_longer=True, first=4)
    problems = prepare_run(load_config(file, [])).task.problems
    assert [p.id for p in problems] == ["u1", "u2", "u3", "u5"]  # u0 and u4 equal evaluation problems


def test_evaluation_problems_are_never_left_out(cache, tmp_path, capsys):
    (file,) = configuration(tmp_path, cache)
    benchmark = "{name: math_500, verifier: math, max_prompt_tokens: 320, drop_longer: true}"
    assert main(["check", file, "--set", f"evaluation.data={benchmark}"]) == 2
    assert "evaluation.data: exclude and drop_longer choose training problems" in capsys.readouterr().err


def test_a_run_on_a_prepared_set(cache, tmp_path, capsys):
    command = ["train", *configuration(tmp_path, cache, exclude=["math_500"], drop_longer=True, chat="direct")]
    assert main([*command, "--run-dir", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    (line,) = read_metrics(tmp_path / "run")
    assert line["optim/skipped"] == 0
    assert line["rollout/groups_filled"] == 4  # random weights solve nothing
    assert "left out of 13 problems: 2 of math_500" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run")
