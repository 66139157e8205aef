"""`tsopsd analyse`: what each analysis reads, and the files that it writes."""

import json
import shutil

import jax
import numpy as np
import pytest

from tsopsd_jax.analysis import batches
from tsopsd_jax.cli import main
from tsopsd_jax.commands.analyse import ANALYSES
from tsopsd_jax.config.places import DEMO_CONFIG
from tsopsd_jax.data import Tokenizer
from tsopsd_jax.model import load_pretrained, save_pretrained
from tsopsd_jax.rundir import resumable_jsonl, unfinished

MODEL = DEMO_CONFIG.parent / "countdown-tiny"
TEXTS = {"3 5 7 9 -> 24 :": "3 + 5 = 8 ; 7 + 9 = 16 ; 8 + 16 = 24", "2 4 6 8 -> 20 :": "2 + 4 = 6 ; 6 + 6 = 12"}


@pytest.fixture(scope="module")
def heated(tmp_path_factory):
    """The packaged model moved a little, and moved back by nine tenths of that."""
    folder = tmp_path_factory.mktemp("models")
    model, params = load_pretrained(MODEL)
    keys = iter(jax.random.split(jax.random.key(0), 100))
    moved = jax.tree.map(lambda x: 1e-2 * jax.random.normal(next(keys), x.shape), params)
    for name, share in (("after", 1.0), ("recooled", 0.1)):
        tree = jax.tree.map(lambda x, d, s=share: x + s * d, params, moved)
        save_pretrained(folder / name, model, tree, tokenizer_from=MODEL)
    return folder


@pytest.fixture
def responses(tmp_path):
    tokenizer = Tokenizer.load(MODEL)
    lines = [
        {"prompt_ids": tokenizer.encode(prompt), "response_ids": [*tokenizer.encode(text), tokenizer.stop_ids[0]]}
        for prompt, text in TEXTS.items()
    ]
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def analyse(name, out, *more):
    """Run an analysis; returns what it wrote."""
    assert main(["analyse", name, "--out", str(out), *map(str, more)]) == 0
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / f"{name}.json").read_text())


def test_every_analysis_of_the_contract_is_there():
    assert set(ANALYSES) == {
        "curves", "representations", "distributions", "reasoning", "forks", "jump", "temperatures", "reversal", "cost",
        "table",
    }  # fmt: skip


def test_reversal_of_directories(heated, tmp_path):
    found = analyse(
        "reversal", tmp_path, "--before", MODEL, "--after", heated / "after", "--recooled", heated / "recooled"
    )
    assert list(found)[:5] == ["cosine", "reverse_projection", "norm_ratio", "residual", "per_layer"]
    assert list(found.values())[:4] == pytest.approx([-1.0, 0.9, 0.9, 0.1], abs=1e-5)
    assert [each["layer"] for each in found["per_layer"]] == ["embed_tokens", 0, 1, 2, "norm"]
    assert found["per_layer"][2]["residual"] == pytest.approx(0.1, abs=1e-4)


def test_reversal_of_two_equal_policies_is_refused(heated, tmp_path, capsys):
    same = ["--before", str(MODEL), "--after", str(MODEL), "--recooled", str(heated / "recooled")]
    assert main(["analyse", "reversal", "--out", str(tmp_path / "out"), *same]) == 2
    assert "expected --before and --after to differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_distributions_of_ids_and_of_text(heated, responses, tmp_path):
    two = ("--before", MODEL, "--after", heated / "after")
    found = analyse("distributions", tmp_path / "ids", *two, "--responses", responses)
    assert found["tokens"] == sum(len(text.split()) + 1 for text in TEXTS.values())
    for name in ("forward_kl_nats", "reverse_kl_nats", "entropy_change_nats", "top_k_overlap"):
        assert {"mean", "quantiles", "histogram"} <= found[name].keys()
    assert found["forward_kl_nats"]["mean"] > 0
    # The same responses as text: one with its stop token, one that was cut off.
    texts = [{"prompt": prompt, "response": text} for prompt, text in TEXTS.items()]
    texts[1]["stopped"] = False
    responses.write_text("".join(json.dumps(each) + "\n" for each in texts))
    again = analyse("distributions", tmp_path / "text", *two, "--responses", responses)
    assert (found["encoded_again"], again["encoded_again"]) == (0, 2)
    assert again["tokens"] == found["tokens"] - 1


class StopError(Exception):
    """What interrupts an analysis in a test."""


@pytest.mark.parametrize("name", ["distributions", "representations"])
def test_an_interrupted_analysis_goes_on_from_its_batches(name, heated, tmp_path, monkeypatch):
    """16 responses of 8 devices' rows are two batches: interrupted at the second, only the second is computed again."""
    # 127 is an id that the model may draw and the tokenizer has no token for.
    lines = [json.dumps({"prompt_ids": [1, 2], "response_ids": [3 + at, 127, 5]}) for at in range(16)]
    responses = tmp_path / "r.jsonl"
    responses.write_text("\n".join(lines) + "\n")
    options = ["--before", MODEL, "--after", heated / "after", "--responses", responses, "--tokens-at-once", 512]
    expected = analyse(name, tmp_path / "at once", *options)
    monkeypatch.setattr(unfinished, "SAVE_EVERY_S", 0.0)
    real = batches._part

    def part(sequences, which, width):
        if which[0] > 0 and stops:
            raise StopError
        return real(sequences, which, width)

    monkeypatch.setattr(batches, "_part", part)
    out, stops = tmp_path / "out", True
    with pytest.raises(StopError):
        main(["analyse", name, "--out", str(out), *map(str, options)])
    file = out / f"{name}.unfinished.npz"
    with np.load(file) as saved:
        assert saved["batches"] == 1
    stops = False
    # Other settings, under which no batch stays as it was, do not go on from it and leave nothing of it.
    swapped = ["--before", heated / "after", "--after", MODEL, *options[4:]]
    other = analyse(name, tmp_path / "other", *swapped)
    shutil.copyfile(file, tmp_path / "other" / file.name)
    assert analyse(name, tmp_path / "other", *swapped) == other
    assert not (tmp_path / "other" / file.name).exists()
    with np.load(file) as saved:
        arrays = {key: saved[key] for key in saved.files}
    assert analyse(name, out, *options) == expected
    assert not file.exists()
    # That it is taken up is seen where it says something else.
    changed, says = {"distributions": ("forward_kl_nats", "forward_kl_nats"), "representations": ("xy.0.0", "matrix")}[
        name
    ]
    np.savez(file, **arrays | {changed: 0 * arrays[changed]})
    assert analyse(name, out, *options)[says] != expected[says]


def test_representations_of_a_policy_with_itself(responses, tmp_path):
    found = analyse("representations", tmp_path, "--before", MODEL, "--after", MODEL, "--responses", responses)
    assert found["diagonal_min"] == pytest.approx(1.0, abs=1e-12)
    assert found["diagonal_mean"] == pytest.approx(1.0, abs=1e-12)
    matrix = np.asarray(found["matrix"])
    assert matrix.shape == (3, 3)
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-6)


def test_forks_are_sampled_once(heated, responses, tmp_path):
    options = ["--before", MODEL, "--after", heated / "after", "--responses", responses, "--samples", "3"]
    found = analyse("forks", tmp_path, *options)
    assert [each["name"] for each in found["checkpoints"]] == ["countdown-tiny", "after"]
    assert all(each["rollouts"] == 6 and each["logp_abs_mean_nats"] > 0 for each in found["checkpoints"])
    file = tmp_path / "rollouts" / "after.jsonl"
    whole = sorted(file.read_text().splitlines())
    assert len(whole) == 2 * (3 + 1)
    file.write_text("\n".join(file.read_text().splitlines()[:5]) + "\n")
    assert analyse("forks", tmp_path, *options) == found
    assert sorted(file.read_text().splitlines()) == whole


def test_temperatures_of_a_policy(responses, tmp_path):
    found = analyse("temperatures", tmp_path, "--before", MODEL, "--responses", responses, "--temperatures", "1.2")
    assert found["objectives"] == ["entropy ascent", "forward, T 1.2", "reverse, T 1.2"]
    assert found["cosine"][0][2] == pytest.approx(1.0, abs=1e-5)
    assert found["gradient_norm"][2] / found["gradient_norm"][0] == pytest.approx(1 / 6, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt_ids": [1], "response_ids": [999]}', "line 1: a token id is beyond the model's 128 entries"),
        ('{"prompt_ids": [1], "response_ids": ["x"]}', "line 1: expected lists of token ids"),
        ('{"response": "1"}', "line 1: expected prompt_ids and response_ids, or prompt and response as text"),
        ("", "expected at least one response"),
    ],
)
def test_files_of_responses_that_are_refused(text, says, tmp_path, capsys):
    file = tmp_path / "r.jsonl"
    file.write_text(text + "\n")
    two = ["--before", str(MODEL), "--after", str(MODEL), "--responses", str(file)]
    assert main(["analyse", "distributions", "--out", str(tmp_path / "out"), *two]) == 2
    assert says in capsys.readouterr().err


def test_a_policy_that_is_not_there(responses, tmp_path, capsys):
    two = ["--before", str(tmp_path / "no@3"), "--after", str(MODEL), "--responses", str(responses)]
    assert main(["analyse", "distributions", "--out", str(tmp_path / "out"), *two]) == 2
    assert "no is not a run directory" in capsys.readouterr().err
    two[1] = str(tmp_path)
    assert main(["analyse", "distributions", "--out", str(tmp_path / "out"), *two]) == 2
    assert "expected a Hugging Face model directory or RUN_DIR@STEP" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- run directories


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of the demo's phases as its log tells it: 10 steps of RL, 20 of reheating with a jump at the 12th, 5 of
    RL."""
    folder = tmp_path_factory.mktemp("runs") / "seed-0"
    folder.mkdir()
    shutil.copyfile(DEMO_CONFIG, folder / "config.yaml")
    lines = []
    for phase, count in (("rl", 10), ("reheat", 20), ("rl-again", 5)):
        for number in range(1, count + 1):
            jumped = phase == "reheat" and number >= 12
            lines.append(
                {
                    "step": len(lines) + 1,
                    "phase": phase,
                    "phase_step": number,
                    "policy/entropy_nats": 0.05 + 0.001 * number + 0.02 * jumped,
                    "reward/mean": 0.5,
                    "optim/grad_norm": 0.1,
                    "rollout/length_mean_tokens": 18.0,
                    "rollout/tokens": 1000,
                    "time/rollout_s": None if phase == "reheat" else 1.0,
                    "time/judge_s": 0.0,
                    "time/update_s": 2.0,
                    "time/step_s": 2.0 if phase == "reheat" else 4.0,
                }
            )
    write(folder / "metrics.jsonl", lines)
    scored = {"stage": "s", "benchmark": "b", "avg_at_k_stderr": 0.01}
    write(
        folder / "evaluations.jsonl", [scored | {"step": s, "avg_at_k": 0.4, "pass_at_k": 0.6} for s in (5, 10, 20, 30)]
    )
    return folder


def write(file, lines):
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))


def test_the_jump_of_a_run(run_dir, tmp_path):
    found = analyse("jump", tmp_path, run_dir)
    assert found["found"]
    assert (found["phase"], found["step_before"], found["step_after"]) == ("reheat", 21, 22)
    assert found["height_nats"] == pytest.approx(0.02, abs=1e-9)
    assert found["checkpoint_before"] is None
    assert not analyse("jump", tmp_path, run_dir, "--phase", "rl")["found"]
    assert main(["analyse", "jump", str(run_dir), "--phase", "no", "--out", str(tmp_path)]) == 2


def test_curves_of_runs_side_by_side_and_averaged(run_dir, tmp_path, capsys):
    found = analyse("curves", tmp_path, run_dir)["curves"]["seed-0"]
    assert found["reward"]["mean"] == [0.5] * 35
    assert found["avg_at_k"]["b"]["step"] == [5, 10, 20, 30]
    other = tmp_path / "seed-1"
    shutil.copytree(run_dir, other)
    lines = [json.loads(each) | {"reward/mean": 0.7} for each in (run_dir / "metrics.jsonl").read_text().splitlines()]
    write(other / "metrics.jsonl", lines)
    mean = analyse("curves", tmp_path, run_dir, other, "--mean", "both=2")["curves"]["both"]
    assert mean["reward"]["mean"][0] == pytest.approx(0.6)
    assert mean["reward"]["standard_deviation"][0] == pytest.approx(0.2 / np.sqrt(2))
    assert list(analyse("curves", tmp_path, run_dir, other)["curves"]) == ["seed-0", "seed-1"]
    capsys.readouterr()
    assert main(["analyse", "curves", str(run_dir), "--mean", "both=2", "--out", str(tmp_path)]) == 2
    assert "--mean: expected groups of all 1 runs, got groups of 2" in capsys.readouterr().err


def test_cost_of_a_run(run_dir, tmp_path):
    found = analyse("cost", tmp_path, run_dir)[str(run_dir)]
    assert [(p["phase"], p["reheats"], p["steps"], p["batch_sequences"]) for p in found["phases"]] == [
        ("rl", False, 10, 512),
        ("reheat", True, 20, 512),
        ("rl-again", False, 5, 512),
    ]
    assert found["reheating_share_of_the_rest"] == pytest.approx(40 / 60)


def test_analyses_of_a_cyclic_run(run_dir, tmp_path):
    """In the log the phases of a cycle have their round: `reheat#1`, `reheat#2`."""
    cyclic = tmp_path / "cyclic"
    shutil.copytree(run_dir, cyclic)
    lines = [json.loads(each) for each in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["phase"] = {"rl": "rl#1", "reheat": "reheat#1", "rl-again": "rl#2"}[line["phase"]]
    write(cyclic / "metrics.jsonl", lines)
    found = analyse("cost", tmp_path, cyclic)[str(cyclic)]
    assert [(p["phase"], p["reheats"]) for p in found["phases"]] == [
        ("rl#1", False),
        ("reheat#1", True),
        ("rl#2", False),
    ]
    assert analyse("jump", tmp_path, cyclic)["phase"] == "reheat#1"
    assert analyse("jump", tmp_path, cyclic, "--phase", "rl#1")["phase"] == "rl#1"


def test_accuracy_over_the_checkpoints_of_reheating(run_dir, tmp_path):
    found = analyse("reasoning", tmp_path, run_dir)
    assert [point["step"] for point in found["accuracy"]["b"]] == [10, 20, 30]  # the phase began after step 10
    assert found["entropy_nats"]["step"] == list(range(10, 30))


def test_the_table_and_pass_at_k(tmp_path):
    """Two problems with four samples: 1 and 4 of them right."""
    out = tmp_path / "evaluations"
    file = out / "toy" / "m.jsonl"
    resumable_jsonl.claim_output(file, {"problems": 2, "samples": 4})
    right = {"a": [True, False, False, False], "b": [True] * 4}
    score = {"tokens": 3, "stopped": True, "entropy_nats": 0.1}
    write(file, [score | {"id": i, "sample": s, "correct": c} for i, each in right.items() for s, c in enumerate(each)])
    found = analyse("table", tmp_path, out)
    assert found["rows"] == [
        {"model": "m", "percent": {"toy avg@4/pass@4": [62.5, 100.0], "average avg/pass": [62.5, 100.0]}}
    ]
    # Of the first problem 1 - C(3, k) / C(4, k) = k / 4, of the second 1.
    assert found["pass_at_k"]["toy/m"]["percent"] == pytest.approx([62.5, 75.0, 87.5, 100.0])
    assert main(["analyse", "table", str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 2
