"""The countdown task as data (derivations, splits, an interrupted build) and tokenizers."""

import json
from pathlib import Path

import numpy as np
import pytest

from tsopsd_jax.data import Tokenizer, countdown, load_problems
from tsopsd_jax.rewards import verify_countdown

# --- the countdown task ---


def test_random_derivations_are_right():
    rng = np.random.default_rng(3)
    operators = set()
    for _ in range(2000):
        prompt, response, answer = countdown.random_derivation(rng)
        assert verify_countdown(response, answer) == 1.0
        assert prompt == f"{answer} :"
        assert len(prompt.split(" ")) == 7 == countdown.MAX_PROMPT_TOKENS
        assert len(response.split(" ")) + 1 == 18 == countdown.MAX_RESPONSE_TOKENS
        numbers = [int(word) for word in prompt.split(" ")[:4]]
        assert all(1 <= number <= 19 for number in numbers)
        assert not countdown.is_held_out(numbers, int(answer.split(" ")[-1]))
        operators |= {word for word in response.split(" ") if word in "+-*"}
    assert operators == {"+", "-", "*"}


def test_a_harder_problem_has_more_numbers():
    rng = np.random.default_rng(4)
    for numbers in (2, 5, 6):
        prompt, response, answer = countdown.random_derivation(rng, numbers=numbers, held_out=True)
        assert (len(prompt.split(" ")), len(response.split(" ")) + 1) == countdown.lengths(numbers)
        assert verify_countdown(response, answer) == 1.0
    assert countdown.lengths(4) == (countdown.MAX_PROMPT_TOKENS, countdown.MAX_RESPONSE_TOKENS)
    with pytest.raises(ValueError, match="expected 2 to 6 numbers, got 7"):
        countdown.lengths(7)


def test_random_derivation_golden():
    """Training data must not change unnoticed: a new value here changes every countdown run."""
    assert countdown.random_derivation(np.random.default_rng(0)) == (
        "13 6 1 1 -> 0 :",
        "1 - 1 = 0 ; 0 * 6 = 0 ; 0 * 13 = 0",
        "13 6 1 1 -> 0",
    )


def test_held_out_ignores_order_and_is_a_small_part():
    assert countdown.is_held_out([1, 2, 3, 4], 10) == countdown.is_held_out([4, 2, 1, 3], 10)
    held_out = [countdown.is_held_out([a, b, 3, 4], t) for a in range(20) for b in range(20) for t in range(20)]
    assert 1 / 20 < np.mean(held_out) < 1 / 12  # one in 16


def test_vocabulary():
    assert len(countdown.VOCABULARY) == len(set(countdown.VOCABULARY)) == 109
    assert countdown.VOCABULARY[42] == "42"


@pytest.fixture(scope="module")
def countdown_directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("countdown")


def test_countdown_splits(countdown_directory, capfd):
    train = load_problems("countdown", directory=countdown_directory)
    test = load_problems("countdown", split="test", directory=countdown_directory)
    out, err = capfd.readouterr()
    assert out + err == ""  # a build says nothing
    assert (len(train), len(test)) == (20_000, 1_024)
    assert len({problem.prompt for problem in train}) == 20_000
    assert len({problem.id for problem in (*train, *test)}) == 21_024
    assert train[7].id == "countdown-train-7"
    assert train[7].prompt == f"{train[7].answer} :"

    def key(problem):
        *numbers, arrow, target = problem.answer.split(" ")
        assert arrow == "->"
        return tuple(sorted(map(int, numbers))), int(target)

    # disjoint even up to the order of the numbers
    assert not {key(problem) for problem in train} & {key(problem) for problem in test}


def test_countdown_first_rows_are_the_same_rows(countdown_directory):
    few = load_problems("countdown", directory=countdown_directory, first=3)
    assert [problem.prompt for problem in few] == ["17 4 11 7 -> 39 :", "19 16 1 11 -> 15 :", few[2].prompt]
    assert list(few) == list(load_problems("countdown", directory=countdown_directory))[:3]


def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    from tsopsd_jax.data import builders

    def stops(_self, _problems):
        yield 0, {"id": "a", "prompt": "b", "answer": "c"}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builders.ProblemSet, "_generate_examples", stops)
        with pytest.raises(KeyboardInterrupt):
            load_problems("countdown", directory=tmp_path)
    assert not list(tmp_path.rglob("*.json"))
    assert len(load_problems("countdown", split="test", directory=tmp_path)) == 1_024
    assert [path.name for path in tmp_path.iterdir()] == ["countdown"]


def test_killed_build_does_not_poison_the_next(tmp_path):
    """What kill -9 leaves: a half-built workplace and an empty parent of the final place."""
    (tmp_path / ".countdown-building-abc" / "countdown" / "1.0.0").mkdir(parents=True)
    (tmp_path / "countdown").mkdir()
    assert len(load_problems("countdown", split="test", directory=tmp_path)) == 1_024


def test_damaged_countdown_names_the_remedy(tmp_path):
    load_problems("countdown", split="test", directory=tmp_path)
    folder = tmp_path / "countdown" / "1.0.0"
    next(folder.glob("*test*")).write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"delete .*1\.0\.0 and run again"):
        load_problems("countdown", split="test", directory=tmp_path)
    (folder / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match=r"delete .*1\.0\.0 and run again"):
        load_problems("countdown", directory=tmp_path)


# --- tokenizers ---


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "new"
    countdown.write_tokenizer(folder)
    return folder


def test_countdown_tokenizer(tokenizer_directory):
    tokenizer = Tokenizer.load(tokenizer_directory)
    assert tokenizer.vocab_size == 109
    assert tokenizer.stop_ids == (108,)
    # an integer is its own id; + is 100, * 102, = 103, ; 104, -> 105, : 106
    assert tokenizer.encode("3 7 11 2 -> 34 :") == [3, 7, 11, 2, 105, 34, 106]
    assert tokenizer.encode("3 * 7 = 21 ; 11 + 2 = 13") == [3, 102, 7, 103, 21, 104, 11, 100, 2, 103, 13]
    assert tokenizer.decode(np.array([3, 102, 7, 103, 21, 108, 107], np.int32)) == "3 * 7 = 21"
    with pytest.raises(ValueError, match="cannot encode '3 x'"):
        tokenizer.encode("3 x")


def test_check_fits(tokenizer_directory):
    tokenizer = Tokenizer.load(tokenizer_directory)
    tokenizer.check_fits(109)
    tokenizer.check_fits(128)
    with pytest.raises(ValueError, match=r"108.*109"):
        tokenizer.check_fits(108)


def test_transformers_reads_the_countdown_tokenizer(tokenizer_directory):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tokenizer_directory))
    text = "3 7 11 2 -> 34 :"
    assert theirs(text)["input_ids"] == Tokenizer.load(tokenizer_directory).encode(text)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (108, 107, 109)
    assert theirs.decode([3, 100, 7, 108], skip_special_tokens=True) == "3 + 7"


def write_files(folder: Path, **files) -> Path:
    countdown.write_tokenizer(folder)
    (folder / "special_tokens_map.json").unlink()  # which transformers obeys before tokenizer_config.json
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_stop_ids_come_from_the_first_file_that_tells(tmp_path):
    both = write_files(tmp_path / "a", generation_config={"eos_token_id": [5, 6]}, config={"eos_token_id": 7})
    assert Tokenizer.load(both).stop_ids == (5, 6)
    only_config = write_files(tmp_path / "b", generation_config={"eos_token_id": None}, config={"eos_token_id": 7})
    assert Tokenizer.load(only_config).stop_ids == (7,)
    # id 0 is an id, not "nothing"
    assert Tokenizer.load(write_files(tmp_path / "c", config={"eos_token_id": 0})).stop_ids == (0,)
    older = write_files(tmp_path / "d", tokenizer_config={"eos_token": {"__type": "AddedToken", "content": "<pad>"}})
    assert Tokenizer.load(older).stop_ids == (107,)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {}}, "stop token"),
        ({"tokenizer_config": {"eos_token": "<absent>"}}, "stop token.*<absent>"),
        ({"config": {"eos_token_id": "8"}}, "eos_token_id"),
        ({"config": {"eos_token_id": [True]}}, "eos_token_id"),
        ({"config": {"eos_token_id": []}}, "eos_token_id"),
        ({"config": {"eos_token_id": -1}}, "eos_token_id"),
        ({"config": "{"}, "config.json: expected JSON"),
        ({"config": "[]"}, "JSON object"),
        ({"tokenizer": "{}"}, "cannot read .*tokenizer.json"),
    ],
)
def test_tokenizer_errors(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(write_files(tmp_path / "x", **files))


def test_tokenizer_missing(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        Tokenizer.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"tokenizer\.json, found none"):
        Tokenizer.load(tmp_path)
