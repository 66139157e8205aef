"""`extends`: how files are merged, what is refused, and which file and line an error names."""

import dataclasses
import typing
from pathlib import Path

import pytest
import yaml

from tsopsd_jax.cli import main
from tsopsd_jax.config import Config, load_config, overlay, strict
from tsopsd_jax.train.samples import Samples

BASE = """\
model: {path: somewhere}
data: {name: countdown, verifier: countdown}
phases:
  - name: rl
    objective: {name: dapo, hyperparameters: {clip_high: 0.28, clip_ratio_c: 10.0}}
    optimizer: {learning_rate: 1e-6}
    stop: {steps: 3, epochs: 2.0}
    prompts_per_step: 4
    responses_per_prompt: 2
    max_response_tokens: 8
    reward: {}
  - name: again
    objective: {name: dapo}
    optimizer: {learning_rate: 1e-6}
    stop: {steps: 1}
    prompts_per_step: 4
    responses_per_prompt: 2
    max_response_tokens: 8
    reward: {}
"""


def written(folder: Path, **files: str) -> Path:
    """Write base.yaml and `files`; returns the last one's path."""
    path = folder / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
    return path


def changes(folder: Path, path: Path) -> list[str]:
    """The settings that differ from the base's."""
    base, other = (strict.plain(load_config(each, [])) for each in (folder / "base.yaml", path))
    return [difference.words("->") for difference in strict.differences(base, other)]


@pytest.mark.parametrize(
    ("base", "change", "merged"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"a": {"b": 1, "c": 3}}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": None}}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": 2}, {"a": 2}),
        ({"a": 1}, {"a": {"b": {"c": 2}}}, {"a": {"b": {"c": 2}}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        (
            [{"name": "x", "v": 1}, {"name": "y", "v": 2}],
            {"y": {"v": 3}},
            [{"name": "x", "v": 1}, {"name": "y", "v": 3}],
        ),
        ([{"name": "x", "v": 1}, {"name": "y", "v": 2}], {"x": None}, [{"name": "y", "v": 2}]),
    ],
)
def test_rules_of_merging(base, change, merged):
    before = strict.plain(base)
    assert overlay.merge(base, change) == merged
    assert base == before, "the base stays as it is"


def test_an_overlay_changes_what_it_names_and_nothing_else(tmp_path):
    path = written(
        tmp_path,
        near="""\
extends: base.yaml
seed: 7
phases:
  rl: {stop: {epochs: null, steps: 9}, objective: {hyperparameters: {clip_ratio_c: null}}}
""",
    )
    assert changes(tmp_path, path) == [
        "phases.0.objective.hyperparameters.clip_ratio_c: 10.0 -> None",
        "phases.0.stop.steps: 3 -> 9",
        "phases.0.stop.epochs: 2.0 -> None",
        "seed: 0 -> 7",
    ]


def test_chains_are_followed_from_each_files_folder_and_the_nearest_wins(tmp_path):
    (tmp_path / "deep").mkdir()
    written(tmp_path, middle="extends: base.yaml\nseed: 1\nphases: {again: null}\n")
    (tmp_path / "deep" / "top.yaml").write_text("extends: ../middle.yaml\nseed: 2\n", encoding="utf-8")
    config = load_config(tmp_path / "deep" / "top.yaml", ["phases.rl.stop.steps=5"])
    assert ([p.name for p in config.phases], config.seed, config.phases[0].stop.steps) == (["rl"], 2, 5)


def test_a_group_of_settings_that_is_null_is_its_default(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(BASE)
    before = load_config(file, [])
    changed = ["evaluation=null", "phases.rl.objective.hyperparameters=null"]
    after = load_config(file, changed)
    assert after.evaluation == type(before.evaluation)()
    assert after.phases[0].objective.hyperparameters == {}
    with pytest.raises(ValueError, match=r"phases.rl.objective: expected a mapping of settings, got None \(from --set"):
        load_config(file, ["phases.rl.objective=null"])


def test_null_leaves_an_item_out_on_the_command_line_too(tmp_path):
    assert [phase.name for phase in load_config(written(tmp_path), ["phases.rl=null"]).phases] == ["again"]


def test_the_resolved_configuration_is_whole(tmp_path):
    path = written(tmp_path, near="extends: base.yaml\nseed: 7\n")
    resolved = strict.plain(load_config(path, []))
    assert "extends" not in resolved
    assert strict.plain(strict.build(Config, strict.parse(strict.dump(resolved)))) == resolved


def test_check_takes_overlays(tmp_path, capsys):
    path = written(tmp_path, near="extends: base.yaml\nseed: 7\n")
    assert main(["check", "--syntax-only", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: settings are valid\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a": "extends: b.yaml", "b": "extends: a.yaml"},
            r"b\.yaml: extends comes back .*b\.yaml -> .*a\.yaml -> .*b\.yaml",
        ),
        ({"a": "extends: a.yaml"}, r"a\.yaml: extends comes back to a file of the chain"),
        ({"a": "extends: gone.yaml"}, r"gone\.yaml: no such file \(asked for by .*a\.yaml\)"),
        ({"a": "extends: [base.yaml]"}, r"a\.yaml: extends: expected the path of one YAML file, got \['base.yaml'\]"),
        ({"a": "extends: base.yaml\nseed: {"}, r"a\.yaml: not valid YAML"),
        (
            {"a": "extends: base.yaml\nphases:\n  rehaet: {stop: {steps: 1}}"},
            r"a\.yaml: phases\.rehaet: expected the name of an item of the base \(rl, again\).* \(a\.yaml, line 3\)",
        ),
        (
            {"a": "extends: base.yaml\nphases:\n  rl:\n    stop: {stebs: null}"},
            r"a\.yaml: phases\.rl\.stop\.stebs: expected a key to remove .* \(a\.yaml, line 4\)",
        ),
        # The file to be blamed is the one that set the key last, at the line where it stands:
        (
            {"a": "extends: base.yaml\nphases:\n  again:\n    stop:\n      stebs: 3", "b": "extends: a.yaml\nseed: 1"},
            r"b\.yaml: phases\.again\.stop\.stebs: unknown key; did you mean 'steps'\? \(a\.yaml, line 5\)",
        ),
        (
            {"a": "extends: base.yaml\nphases: {again: {stop: {steps: x}}}"},
            r"a\.yaml: phases\.again\.stop\.steps: expected int, got 'x' \(str\) \(a\.yaml, line 2\)",
        ),
        ({"a": "extends: base.yaml\nseed: x"}, r"a\.yaml: seed: expected int, got 'x' \(str\) \(a\.yaml, line 2\)"),
        (
            {"base": BASE.replace("steps: 1", "steps: x"), "a": "extends: base.yaml"},
            r"a\.yaml: phases\.again\.stop\.steps: expected int, got 'x' \(str\) \(base\.yaml, line 15\)",
        ),
    ],
)
def test_refused(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_config(written(tmp_path, **files), [])


def test_a_line_is_blamed_only_for_what_it_says(tmp_path):
    with pytest.raises(ValueError, match=r"phases\.rl\.stop\.steps: .* \(from --set phases\.0\.stop\.steps\)$"):
        load_config(written(tmp_path), ["phases.0.stop.steps=x"])
    with pytest.raises(ValueError, match=r"phases\.again: micro_batches 3 .*; choose a divisor$"):  # both together
        load_config(written(tmp_path), ["phases.again.micro_batches=3"])
    with pytest.raises(ValueError, match=r"seed must be .* got -1$"):  # a setting that the message does not begin with
        load_config(written(tmp_path), ["seed=-1"])
    odd = {"a": "extends: base.yaml\nphases: {again: {stop: {steps: x}}}"}
    with pytest.raises(ValueError, match=r"phases\.again\.stop\.steps: .* \(a\.yaml, line 2\)$"):
        load_config(written(tmp_path, **odd), ["seed=2"])


def test_null_is_the_default_of_every_setting_that_may_be_null():
    """So that "null removes" and "null is the value" are one. The exception is told in docs/configuration.md."""

    def settings(cls):
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            hint = hints[field.name]
            for inner in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(inner):
                    yield from settings(inner)
            if cls is Samples and field.name == "every_steps":
                continue
            if type(None) in typing.get_args(hint):
                yield field

    found = list(settings(Config))
    assert len(found) > 20
    assert [field.name for field in found if field.default is not None] == []


def test_a_yaml_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump([1, 2]), encoding="utf-8")
    with pytest.raises(ValueError, match="expected a mapping of settings"):
        load_config(path, [])
