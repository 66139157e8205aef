"""The architecture, read from the imports: a module may import only what stands before it in ORDER.

docs/architecture.md shows the same rooms with their modules, and every `module.name` that a docstring mentions exists.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tsopsd_jax"

ORDER = [
    "types",
    "metric_names",
    "huggingface",
    "loading",
    "writing",
    "distributed",
    "losses",
    "advantages",
    "rewards",
    "model",
    "hardware",
    "data",
    "logit_stats",
    "head_tiles",
    "head",
    "objectives",
    "rollout",
    "judge",
    "learn",
    "policy",
    "rundir",
    "evaluation",
    "train",
    "analysis",
    "display",
    "testing",
    "config",
    "plan",
    "commands",
    "cli",
    "__main__",
]
"""Every room of the package, a folder or a file, from the bottom up. A new one gets its place here."""

WALLS = {
    "config": {"config", "plan", "commands", "cli"},
    "analysis": {"analysis", "commands"},
    "commands": {"commands", "cli"},
    "cli": {"__main__"},
}
"""Room -> the only rooms that may import it. (Other walls are the order: a run directory does not know how it is
shown.)"""

MAX_LINES = 400
METRIC = r"(policy|reward|rollout|loss|optim|learner|judge|time|perf|control|evaluation)/[a-z_]+"


def name_of(file: Path) -> str:
    """tsopsd_jax/model/hf.py -> model.hf; a package's __init__ is the package."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    return module.split(".")[0]


def imported(file: Path) -> set[str]:
    """Dotted names of all that a file imports, at whatever depth; `from a import b` counts as a.b where b is a
    module."""
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


def test_every_room_has_a_place():
    assert sorted({room_of(name) for name in FILES if name}) == sorted(ORDER)


@pytest.mark.parametrize("module", [name for name in FILES if name])
def test_imports_go_downwards(module):
    own = room_of(module)
    for other in edges(module):
        assert other in FILES, f"{module} imports {other}, which is no module"
        room = room_of(other)
        if room != own:
            assert ORDER.index(room) < ORDER.index(own), f"{module} imports {other}, which stands above it"
        assert own in WALLS.get(room, ORDER), f"{module} imports {other}: only {WALLS[room]} may"


def test_the_package_itself_imports_nothing_of_its_own():
    assert edges("") == set()


def test_rooms_have_no_cycles():
    inside = {m: {e for e in edges(m) if room_of(e) == room_of(m)} for m in FILES if m}
    done: set[str] = set()
    while len(done) < len(inside):
        ready = {m for m, needs in inside.items() if m not in done and needs - {m} <= done}
        # A package's __init__ gathers its modules; a lazy import of it from below would be a cycle all the same.
        ready |= {m for m, needs in inside.items() if m not in done and needs - {m, room_of(m)} <= done}
        assert ready, f"a cycle among {sorted(set(inside) - done)}"
        done |= ready


def test_the_architecture_page_shows_the_rooms_and_their_modules():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.split("| room | modules |")[1].split("\n\n")[0]
    shown, order = set(), []
    for line in table.splitlines()[2:]:
        rooms, modules, _ = (re.findall(r"`([\w/.]+)`", cell) for cell in line.strip("|").split("|"))
        order += [room.rstrip("/") for room in rooms]
        shown |= {f"{rooms[0].rstrip('/')}.{module}" for module in modules} or set(rooms)
    assert order == ORDER, "the page lists the rooms in the order of the layers"
    modules = {name for name, file in FILES.items() if name and file.name != "__init__.py"}
    assert sorted(modules - shown) == [], "the table of docs/architecture.md lacks these modules"
    assert sorted(shown - modules) == [], "the table of docs/architecture.md has these, which do not exist"


def docstrings(file: Path):
    """(line, text) of every docstring in a file: of modules, classes, functions, and strings that follow a constant or
    field."""
    for node in ast.walk(ast.parse(file.read_text())):
        for child in ast.iter_child_nodes(node):
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                yield child.lineno, child.value.value


def mentioned(text: str) -> set[str]:
    """The back-ticked dotted names of a text that begin with a room: `learn.update.make_update`. (Files have
    slashes.)"""
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)(?:\(\))?`", text)
    return {name for name in names if room_of(name) in ORDER and not name.endswith(".py")}


def exists(name: str) -> bool:
    """A dotted name below the package leads to a module or to something defined in one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        if ".".join(parts[:cut]) not in FILES:
            continue
        found = importlib.import_module("tsopsd_jax." + ".".join(parts[:cut]))
        for part in parts[cut:]:
            if part not in vars(found) and part not in vars(found).get("__annotations__", {}):
                return False
            found = vars(found).get(part)
            if found is None:
                return True
        return True
    return False


def setting(name: str) -> bool:
    """A key of the configuration, such as `data.path`."""
    return f"`{name}`" in (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", list(FILES), ids=lambda name: name or "tsopsd_jax")
def test_names_in_docstrings_exist(module):
    for line, text in docstrings(FILES[module]):
        gone = [name for name in mentioned(text) if not exists(name) and not setting(name)]
        assert not gone, f"{FILES[module].name}:{line}: {gone}"


def test_names_in_documents_exist():
    """The lab notes keep the names of their day; the page on other projects has their names (tests/test_docs.py)."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if page.name not in ("lab_notes.md", "migration.md"):
            gone = [n for n in mentioned(page.read_text(encoding="utf-8")) if not exists(n) and not setting(n)]
            assert not gone, f"{page.name}: {gone}"


def test_flax_stays_inside_model():
    users = {m for m, file in FILES.items() if any(n.split(".")[0] == "flax" for n in imported(file))}
    assert users
    assert {room_of(m) for m in users} == {"model"}


def test_heavy_libraries_are_imported_where_they_are_used():
    heavy = {"transformers", "tensorflow_datasets", "matplotlib", "wandb", "pyarrow", "torch"}
    for module, file in FILES.items():
        for node in ast.parse(file.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = {n.split(".")[0] for n in names} & heavy
            # The dataset builders are classes of TFDS; that module as a whole is imported lazily.
            assert not found or module == "data.builders", f"{module} imports {found} at the top: do so in the function"


def test_a_metric_that_two_modules_know_has_its_name_in_one_place():
    where: dict[str, set[str]] = {}
    for module, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and re.fullmatch(METRIC, str(node.value)):
                where.setdefault(str(node.value), set()).add(module)
    assert where["policy/entropy_nats"] == {"metric_names"}
    assert {name: found for name, found in where.items() if len(found) > 1} == {}


def test_files_stay_short():
    lengths = {name: len(file.read_text().splitlines()) for name, file in FILES.items()}
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
    assert {name: sorted(modules) for name, modules in places.items() if len(modules) > 1} == {}


def test_no_attribute_is_looked_up_with_a_default():
    for file in FILES.values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                assert len(node.args) < 3, f"{file.name}:{node.lineno}: getattr with a default hides a missing field"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{file.name}:{node.lineno}: {node.func.id}"
            if isinstance(node, ast.Import):
                assert "pickle" not in {a.name for a in node.names}, f"{file.name}:{node.lineno}: pickle"


STRICT = {"types", "losses", "advantages", "logit_stats", "head_tiles", "head"}
"""Modules of mathematics, whose types pyright reads strictly; so are all objectives."""


def test_the_mathematics_is_typed_strictly():
    for name, file in FILES.items():
        if name in STRICT or name.startswith("objectives."):
            first = file.read_text().splitlines()[0]
            assert first.startswith("# pyright: strict"), f"{file.name}: begin it with {'# pyright: strict'!r}"


def test_a_docstring_begins_with_what_it_is():
    """`Of the head` or `The same for rows` is understood only after the line above it."""
    for name, file in FILES.items():
        for line, text in docstrings(file):
            assert not re.match(r"(Of|The same|Those|That of)\b", text), f"{name}:{line}: begin with a verb or a noun"
            joined = re.search(r"^ *(Args|Returns|Raises|Attributes): \S.*", text, re.MULTILINE)
            assert not joined, f"{name}:{line}: a heading stands alone in its line, got {joined[0].strip()!r}"
