"""The documentation says what the code does: settings, functions, test files, the README's example."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import re
import shlex
import types
import typing
from pathlib import Path

import byte_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax import objectives
from tsopsd_jax.cli import COMMANDS, _parser, main
from tsopsd_jax.config import Config, DataSettings, EvaluationSettings, strict
from tsopsd_jax.objectives import OBJECTIVES, tampo
from tsopsd_jax.rundir.log import MEASURED, read_metrics
from tsopsd_jax.types import Batch

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _documented(cls: type, prefix: str):
    """(key, type, default) of every setting, as docs/configuration.md writes them."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        options = (
            [a for a in typing.get_args(hint) if a is not type(None)] if type(None) in typing.get_args(hint) else [hint]
        )
        inner, key = options[0], f"{prefix}{field.name}"
        if typing.get_origin(inner) is tuple and dataclasses.is_dataclass(typing.get_args(inner)[0]):
            yield from _documented(typing.get_args(inner)[0], f"{key}[].")
            continue
        if dataclasses.is_dataclass(inner):
            if len(options) != len(typing.get_args(hint) or options):
                yield key, "group", "null"
            if inner is not DataSettings or key == "data":
                yield from _documented(typing.cast(type, inner), f"{key}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if key.startswith("evaluation.sampling."):
            default = vars(EvaluationSettings().sampling)[field.name]
        shown = "required" if default is dataclasses.MISSING else json.dumps(default).strip('"')
        kinds = typing.get_args(inner) if isinstance(inner, types.UnionType) else [inner]
        yield key, ", ".join((typing.get_origin(kind) or kind).__name__ for kind in kinds), shown


def test_every_setting_is_documented():
    table = read(DOCS / "configuration.md").split("\n## Settings")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| `([^`]+)` \|", table, flags=re.MULTILINE)
    documented = {key: f"{kind}, default {default}" for key, kind, default in rows}
    expected = {key: f"{kind}, default {default}" for key, kind, default in _documented(Config, "")}
    assert len(expected) > 50
    assert strict.first_difference(expected, documented) is None


def test_every_hyperparameter_is_documented():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `([^`]+)` \|", read(DOCS / "configuration.md"), flags=re.MULTILINE)
    expected = {
        (name, parameter.name, str(parameter.default))
        for name, factory in OBJECTIVES.items()
        for parameter in inspect.signature(factory).parameters.values()
    }
    assert sorted(expected - set(rows)) == [], "docs/configuration.md lacks these (objective, hyperparameter, default)"
    assert sorted(set(rows) - expected) == [], "docs/configuration.md has these, which no objective has"


def test_every_objective_is_named_where_one_chooses():
    (row,) = re.findall(r"^\| `phases\[\].objective.name` .*$", read(DOCS / "configuration.md"), flags=re.MULTILINE)
    assert [name for name in OBJECTIVES if f"`{name}`" not in row] == [], (
        "docs/configuration.md, phases[].objective.name"
    )
    assert [name for name in OBJECTIVES if name not in objectives.__all__] == [], "objectives/__init__.py"


def test_paper_to_code_names_what_exists():
    text = read(DOCS / "paper_to_code.md")
    modules = "head|losses|advantages|judge|learn|train|objectives|evaluation|rollout|rewards"
    functions = set(re.findall(rf"`((?:{modules})(?:\.[a-z_]+)*\.\w+)`", text))
    assert len(functions) > 10
    for function in functions:
        module, _, name = function.rpartition(".")
        known = vars(importlib.import_module(f"tsopsd_jax.{module}"))
        assert name in known or importlib.util.find_spec(f"tsopsd_jax.{function}"), function
    tests = set(re.findall(r"`(tests/\w+\.py)`", text))
    assert len(tests) > 5
    assert [t for t in sorted(tests) if not (ROOT / t).is_file()] == []


def methods() -> dict[str, list[str]]:
    """The library's rows of docs/methods.md: name -> the other cells."""
    table = read(DOCS / "methods.md").split("\n## The library's")[1].split("\n## ")[0].replace("\\|", "")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| `")
    ]
    return {name.strip("`"): cells for name, *cells in rows}


def test_every_objective_is_among_the_methods():
    rows = methods()
    assert set(rows) == set(OBJECTIVES), 'the table "The library\'s" of docs/methods.md has a row for each'
    for name, (_, where, _, source, test) in rows.items():
        made, parts = OBJECTIVES[name](), set(re.findall(r"`(\w+)`", where))
        declared = {part for part in ("select", "control") if made._asdict()[part] is not None}
        assert parts - {"stats", "loss"} == declared, name
        assert source, name
        files = re.findall(r"`(\w+\.py)`", test)
        assert files, name
        for file in files:
            assert name in read(ROOT / "tests" / file), f"{file} does not speak of {name}"


def at_ratio_one(name: str):
    """Gradients of the mean loss into logp and entropy where the sampler was the policy; knobs of a bonus are not 0."""
    rng = np.random.default_rng(0)
    logp, entropy = (jnp.asarray(-np.abs(2 * rng.normal(size=(4, 9))), jnp.float32) for _ in range(2))
    stats = {"logp": logp, "entropy": -entropy, "clamped_entropy": -0.9 * entropy}
    stats |= {f"logp_at_{t:g}": logp / t for t in inspect.signature(tampo).parameters["temperatures"].default}
    mask = np.arange(9)[None, :] < np.array([9, 4, 7, 2])[:, None]
    advantage = np.array([[1.5], [-1.2], [0.4], [-0.7]]) * np.ones((1, 9))
    objective = OBJECTIVES[name]()
    batch = Batch.of(tokens=np.zeros((4, 9), np.int32), mask=mask, advantage=advantage, old_logp=logp)
    if objective.control is not None:
        knobs = {knob: jnp.float32(value or 0.1) for knob, value in objective.control.init.items()}
        batch = dataclasses.replace(batch, knobs=knobs)
    if objective.select is not None:
        batch = objective.select(stats, batch)

    def mean(stats):
        loss = objective.loss(stats, batch).loss
        return loss.total / loss.count

    return jax.grad(mean)(stats)


@pytest.mark.parametrize("name", [name for name, factory in OBJECTIVES.items() if factory().uses_advantage])
def test_what_a_method_does_at_ratio_one(name):
    assert name in methods(), f"docs/methods.md has no row of {name}"
    said = {"as dapo": True, "acts": False}[methods()[name][2]]
    pairs = zip(jax.tree.leaves(at_ratio_one(name)), jax.tree.leaves(at_ratio_one("dapo")), strict=True)
    assert all(np.allclose(got, want, atol=1e-7) for got, want in pairs) is said


README = read(ROOT / "README.md")


def blocks(language: str) -> list[str]:
    """The README's blocks of a language, in their order."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_readme_is_short_and_shows_the_example_as_it_is():
    assert len(README.splitlines()) <= 150
    [shown] = [block for block in blocks("python") if "def dapo_with_entropy" in block]
    example = read(ROOT / "examples" / "entropy_bonus.py")

    def code(source: str) -> list[str]:
        lines = [re.sub(r"\s+#.*", "", line) for line in source[source.index("def dapo_with_entropy") :].splitlines()]
        return [line for line in lines if line.strip() and '"""' not in line]

    assert code(shown) == code(example)


def test_the_readmes_commands_are_known():
    """Words in blocks are parsed by the command line itself; those of the table name commands; make's are targets."""
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    ours = [words[1:] for words in lines if words[:1] == ["tsopsd"]]
    assert len(ours) >= 5
    for words in ours:
        _parser(words).parse_args(words)
    named = re.findall(r"`tsopsd (\w+)", README)
    assert len(named) > 4
    assert set(named) - set(COMMANDS) == set()
    makefile = read(ROOT / "Makefile")
    targets = {words[1] for words in lines if words[:1] == ["make"]}
    assert targets == {target for target in ("demo", "test") if f"\n{target}:" in makefile}
    extras = {extra for found in re.findall(r'"\.\[([\w,]+)\]"', README) for extra in found.split(",")}
    assert extras >= {"cuda", "tpu"}
    assert [extra for extra in extras if f"\n{extra} = [" not in read(ROOT / "pyproject.toml")] == []


TINY = (
    "model.random_init=true",
    "model.compute_dtype=float32",
    "data.max_prompt_tokens=64",
    "phases.rl.prompts_per_step=2",
    "phases.rl.responses_per_prompt=4",
    "phases.rl.max_response_tokens=8",
    "phases.rl.stop.steps=1",
    "phases.reheat.prompts_per_step=8",
    "phases.reheat.max_response_tokens=8",
    "phases.reheat.stop.steps=1",
)


@pytest.mark.slow
def test_the_readmes_own_run_takes_a_step_of_each_phase(tmp_path, monkeypatch, capsys):
    """Its data, reward and configuration, as they are written there, with a tiny model of random weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TSOPSD_CACHE_DIR", str(tmp_path / "cache"))
    [settings], [problem] = blocks("yaml"), blocks("json")
    [reward] = [block for block in blocks("python") if "def ends_with_answer" in block]
    assert len(settings.splitlines()) <= 15
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.jsonl").write_text(problem)
    (tmp_path / "my_reward.py").write_text(reward)
    (tmp_path / "mine.yaml").write_text(settings)
    byte_model.write(tmp_path / "models" / "Qwen3-0.6B")
    sets = [word for each in TINY for word in ("--set", each)]
    assert main(["check", "mine.yaml", *sets]) == 0
    assert main(["train", "mine.yaml", *sets]) == 0
    assert [line["phase"] for line in read_metrics(tmp_path / "runs" / "mine")] == ["rl", "reheat"]
    capsys.readouterr()
    assert main(["generate", "--run", "runs/mine", "--show", "1", "--max-tokens", "8"]) == 0
    shown = capsys.readouterr().out
    assert "What is 17 + 25?" in shown
    assert "--- answer: 42" in shown


def test_links_lead_to_files_and_headings_that_are_there():
    pages = [ROOT / "README.md", *DOCS.glob("*.md"), ROOT / "tpu" / "README.md", ROOT / "CONTRIBUTING.md"]
    checked = 0
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
            path, _, heading = link.partition("#")
            if "://" in link:
                continue
            target = page if not path else page.parent / path
            assert target.exists(), f"{page.name}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.+)$", read(target), flags=re.MULTILINE)
                known = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert heading in known, f"{page.name}: {link}"
            checked += 1
    assert checked > 40


METRIC = re.compile(r"(policy|distil|control|reward|judge|rollout|loss|optim|learner|time|perf|evaluation)/[a-zA-Z]\w*")


def _documented_metrics() -> set[str]:
    rows = [line.split("|")[1] for line in read(DOCS / "metrics.md").splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_metric_is_documented():
    """Names that the code spells out. (Those of a run are compared in tests/test_cli.py.)"""
    spelt = set()
    for path in (ROOT / "tsopsd_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and METRIC.fullmatch(node.value):
                spelt.add(node.value)
    spelt |= {f"evaluation/{name}" for name in MEASURED}
    documented = _documented_metrics()
    made = {
        "control/NAME",
        "last_update/NAME",
        "reward/NAME_mean",
        "tampo/credit_at_T",
        "distil/forward_kl_nats",
        "distil/reverse_kl_nats",
    }  # of parts
    assert len(spelt) > 40
    assert spelt - documented == set(), "docs/metrics.md lacks these"
    assert documented - spelt - made == set(), "docs/metrics.md has these, and the code has not"


def test_the_list_of_wishes_names_settings_that_exist():
    """The second column of `I want to ...`: settings or groups of them, but for what stands as a value or an option."""
    table = read(DOCS / "configuration.md").split("\n## I want to ...")[1].split("\n## ")[0]
    wishes = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    settings = {key for key, _, _ in _documented(Config, "")}
    others = {"jsonl", "direct", "thinking", "{problem}", "first", "kl_coefficient", "dapo"}
    assert len(wishes) >= 20
    for wish, answer in wishes:
        named = {name for name in re.findall(r"`([^`]+)`", answer) if not name.startswith(("tsopsd ", "--"))}
        assert named - others, wish
        assert named - others - settings == set(), wish
    assert "kl_coefficient" in inspect.signature(OBJECTIVES["dapo"]).parameters


def test_pages_for_people_name_settings_that_exist():
    """The first column of docs/migration.md; names with a dot in docs/troubleshooting.md."""
    settings = {key for key, _, _ in _documented(Config, "")}
    hyperparameters = {name for factory in OBJECTIVES.values() for name in inspect.signature(factory).parameters}
    ours = [line.split("|")[1] for line in read(DOCS / "migration.md").splitlines() if line.startswith("| `")]
    named = {name for cell in ours for name in re.findall(r"`([^`]+)`", cell)}
    assert len(named) > 30
    assert named - settings - hyperparameters - set(OBJECTIVES) == set()
    groups = "model|data|mesh|reward|optimizer|guard|sampling|evaluation|stop"
    asked = set(re.findall(rf"`((?:{groups})\.[a-z_]+)", read(DOCS / "troubleshooting.md")))
    assert len(asked) > 10
    assert {name for name in asked if not {name, f"phases[].{name}"} & settings} - _documented_metrics() == set()
