"""The architecture, read from the imports: a module may import only what stands before it in ORDER."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tsopsd_jax"

ORDER = [
    "types",
    "loading",
    "distributed",
    "losses",
    "advantages",
    "rewards",
    "model",
    "data",
    "logit_stats",
    "head",
    "objectives",
    "rollout",
    "judge",
    "learn",
    "rundir",
    "evaluation",
    "train",
    "display",
    "testing",
    "config",
    "plan",
    "commands",
    "cli",
    "__main__",
]
"""Every module, or subpackage as a whole, from the bottom up. A new module gets its place here."""

MAX_LINES = 400

TWICE = {
    *(
        "main",
        "prepare",
        "read_settings",
        "claim",
        "checkpoints_of",
        "DTYPES",
        "T",
        "build",
        "Difference",
        "first_difference",
    ),
    *("is_held_out", "read", "read_json", "Layout", "Watch", "sample", "ENTROPY", "Segment", "draw", "IMPLEMENTATIONS"),
    *("Attend", "Progress"),
}
"""Public names that still stand for two things. Rename one of the two, or make them one, and take it out; add none."""


def name_of(file: Path) -> str:
    """tsopsd_jax/model/hf.py -> model.hf; a package's __init__ is the package."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(file: Path) -> set[str]:
    """Dotted names of all that a file imports, at whatever depth; `from a import b` counts as a.b where b is a module."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: relative import; write the full name"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full.removeprefix("tsopsd_jax.") in FILES else node.module)
    return names


def edges(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    ours = {name.removeprefix("tsopsd_jax.") for name in imported(FILES[module]) if name.startswith("tsopsd_jax.")}
    return ours - {""}


def test_every_module_has_a_place():
    assert sorted({name.split(".")[0] for name in FILES if name}) == sorted(ORDER)


@pytest.mark.parametrize("module", [name for name in FILES if name])
def test_imports_go_downwards(module):
    own = module.split(".")[0]
    for other in edges(module):
        assert other in FILES, f"{module} imports {other}, which is no module"
        top = other.split(".")[0]
        if top != own:
            assert ORDER.index(top) < ORDER.index(own), f"{module} imports {other}, which stands above it"


def test_the_package_itself_imports_nothing_of_its_own():
    assert edges("") == set()


def test_subpackages_have_no_cycles():
    inside = {m: {e for e in edges(m) if e.split(".")[0] == m.split(".")[0]} for m in FILES if m}
    done: set[str] = set()
    while len(done) < len(inside):
        ready = {m for m, needs in inside.items() if m not in done and needs - {m} <= done}
        # A package's __init__ gathers its modules; a lazy import of it from below would be a cycle all the same.
        ready |= {m for m, needs in inside.items() if m not in done and needs - {m, m.split(".")[0]} <= done}
        assert ready, f"a cycle among {sorted(set(inside) - done)}"
        done |= ready


def test_flax_stays_inside_model():
    users = {m for m, file in FILES.items() if any(n.split(".")[0] == "flax" for n in imported(file))}
    assert users
    assert {m.split(".")[0] for m in users} == {"model"}


def test_heavy_libraries_are_imported_where_they_are_used():
    heavy = {"transformers", "tensorflow_datasets", "matplotlib", "wandb", "pyarrow", "torch"}
    for module, file in FILES.items():
        for node in ast.parse(file.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = {n.split(".")[0] for n in names} & heavy
            # The dataset builders are classes of TFDS; that module as a whole is imported lazily.
            assert not found or module == "data.builders", f"{module} imports {found} at the top: do so in the function"


def test_files_stay_short():
    lengths = {file.name: len(file.read_text().splitlines()) for file in FILES.values() if file.name != "__init__.py"}
    long = {name: n for name, n in lengths.items() if n > MAX_LINES}
    assert not long, f"split these files (lines): {long}"


def public_names(file: Path) -> set[str]:
    """Functions, classes and constants that a file defines at its top, but for those with a leading underscore."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def test_a_public_name_is_defined_once():
    places: dict[str, set[str]] = {}
    for module, file in FILES.items():
        for name in public_names(file):
            if not (module.startswith("commands.") and name in ("add", "run")):  # what every command has
                places.setdefault(name, set()).add(module)
    twice = {name: modules for name, modules in places.items() if len(modules) > 1}
    assert set(twice) <= TWICE, (
        f"defined more than once: { {n: sorted(m) for n, m in twice.items() if n not in TWICE} }"
    )
    assert set(twice) >= TWICE, f"defined once by now, to be taken out of TWICE: {sorted(TWICE - set(twice))}"


def test_no_attribute_is_looked_up_with_a_default():
    for file in FILES.values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                assert len(node.args) < 3, f"{file.name}:{node.lineno}: getattr with a default hides a missing field"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{file.name}:{node.lineno}: {node.func.id}"
            if isinstance(node, ast.Import):
                assert "pickle" not in {a.name for a in node.names}, f"{file.name}:{node.lineno}: pickle"
