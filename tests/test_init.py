"""`tsopsd init` writes configurations that are valid as they stand; the command line helps who does not know it."""

import json

import pytest

from tsopsd_jax.cli import COMMANDS, main
from tsopsd_jax.config import load_config
from tsopsd_jax.model.packaged import model_directory


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TSOPSD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def test_the_packaged_model_and_task_need_no_option(capsys):
    assert main(["init"]) == 0
    assert "tsopsd train run.yaml" in capsys.readouterr().out
    config = load_config("run.yaml", [])
    assert [p.name for p in config.phases] == ["rl", "reheat", "rl-again"]
    assert [p.objective.name for p in config.phases] == ["dapo", "ts_opsd", "dapo"]
    assert config.phases[2].stop.steps == 90
    assert config.phases[2].stop.collapsed_below_nats is None
    assert main(["check", "run.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "run.yaml: valid; 20000 problems, 3 phases" in shown
    assert "warning" not in shown
    # 344,928 parameters: float32 weights and two moments, 12 bytes each, on the 8 devices of the tests: 517,392 bytes.
    assert "344.9k parameters: 517.4kB a device" in shown
    assert "rl: 64 x 8 responses a step, up to 10 times, of at most 19 tokens; until entropy < 0.15 nats" in shown


def test_ones_own_model_data_and_reward(in_a_folder_of_its_own):
    (in_a_folder_of_its_own / "my data.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "2"}) + "\n")
    asked = ["--model", "models/mine", "--data", "my data.jsonl"]
    assert main(["init", "sub/mine.yaml", *asked, "--reward", "last_number"]) == 0
    config = load_config("sub/mine.yaml", [])
    assert config.model.path == "models/mine"
    for data in (config.data, config.evaluation.data):
        assert data is not None
        assert (data.path, data.problem_field, data.answer_field) == ("my data.jsonl", "question", "answer")
        assert data.verifier == "last_number"
    # The paper's values: appendix A.
    rl, reheat, _ = config.phases
    assert (rl.optimizer.learning_rate, rl.prompts_per_step, rl.stop.collapsed_below_nats) == (2e-6, 64, 0.08)
    assert (reheat.optimizer.learning_rate, reheat.prompts_per_step, reheat.stop.recovered_above_nats) == (
        1e-6,
        1024,
        0.12,
    )


def test_the_usual_names_need_no_settings(in_a_folder_of_its_own):
    (in_a_folder_of_its_own / "d.jsonl").write_text('\n{"problem": "1+1?", "answer": "2"}\n')
    assert main(["init", "--model", "m", "--data", "d.jsonl"]) == 0
    assert "problem_field" not in (in_a_folder_of_its_own / "run.yaml").read_text()


@pytest.mark.parametrize(("positions", "lengths"), [(128, (26, 102)), (4096, (820, 3276)), (40_960, (1024, 4096))])
def test_lengths_fit_the_model(positions, lengths, in_a_folder_of_its_own):
    model = in_a_folder_of_its_own / "m"
    model.mkdir()
    shape = json.loads((model_directory("countdown-tiny") / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": positions}))
    (in_a_folder_of_its_own / "d.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    assert main(["init", "--model", "m", "--data", "d.jsonl"]) == 0
    config = load_config("run.yaml", [])
    assert config.evaluation.data is not None
    assert {config.data.max_prompt_tokens, config.evaluation.data.max_prompt_tokens} == {lengths[0]}
    responses = [p.max_response_tokens for p in config.phases]
    assert {config.evaluation.max_response_tokens, *responses} == {lengths[1]}


def test_a_file_that_is_there_stays_as_it_is(in_a_folder_of_its_own, capsys):
    (in_a_folder_of_its_own / "run.yaml").write_text("mine")
    assert main(["init"]) == 2
    assert "run.yaml: expected no such file, got one" in capsys.readouterr().err
    assert (in_a_folder_of_its_own / "run.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "m"], "--model: expected --data FILE.jsonl too"),
        (["--data", "d.jsonl"], "--data: expected --model DIR too"),
        (["--reward", "math"], "--reward math: expected --model and --data too"),
        (["--model", "m", "--data", "none.jsonl"], "--data none.jsonl: expected a file to read, got: No such file"),
        (["--model", "m", "--data", "odd.jsonl"], "got text, label in the first"),
        (["--model", "m", "--data", "empty.jsonl"], "got no object in the first"),
        (["--model", "m", "--data", "bad.jsonl"], "expected a JSON object a line"),
    ],
)
def test_bad_input_is_one_line(arguments, says, in_a_folder_of_its_own, capsys):
    (in_a_folder_of_its_own / "odd.jsonl").write_text('{"text": "1+1?", "label": "2"}\n')
    (in_a_folder_of_its_own / "empty.jsonl").write_text("")
    (in_a_folder_of_its_own / "bad.jsonl").write_text("{no json\n")
    assert main(["init", *arguments]) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("\n") == 1
    assert not (in_a_folder_of_its_own / "run.yaml").exists()


def test_tsopsd_alone_shows_its_help(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in COMMANDS)


def test_a_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("tsopsd 0.")


@pytest.mark.parametrize(("typed", "says"), [("trian", "did you mean 'train'?"), ("xyz", "known: init, demo, train")])
def test_a_mistyped_command(typed, says, capsys):
    assert main([typed, "x.yaml"]) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("\n") == 1
