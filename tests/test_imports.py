"""Who may import whom: the layout stays a one-way street."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names)
COMMANDS = ("train", "answer", "evaluate", "judge", "encode", "plan", "selfcheck")

# Floors from the ground up: a room imports rooms of lower floors only. Commands stand above all of them.
FLOORS = (
    ("modules", "evaluation"),
    ("bases", "video", "runtime"),
    ("model",),
    ("training",),
    ("inference", "planning", "checks", "demo"),
)
DATA_FLOORS = (
    ("common",),
    ("media", "text"),
    ("questions",),
)


def imports(path: Path) -> set[str]:
    """All modules that a file imports anywhere, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] not in STANDARD}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def outside(path: Path, allowed: tuple[str, ...]) -> set[str]:
    """Imports that are not, and do not lie below, one of the allowed modules."""
    return {n for n in imports(path) if not any(n == a or n.startswith(a + ".") for a in allowed)}


@pytest.mark.parametrize("path", files("configs"), ids=str)
def test_configs_import_only_ml_collections(path):
    assert not outside(path, ("ml_collections", "configs"))


@pytest.mark.parametrize("path", files("data_pipeline"), ids=str)
def test_data_pipeline_knows_neither_jax_nor_models(path):
    heads = {name.split(".")[0] for name in imports(path)}
    assert not heads & {"jax", "flax", "optax", "orbax", "redvillm_jax", "conversion", "configs", "torch"}


@pytest.mark.parametrize("path", files("redvillm_jax/bases") + files("redvillm_jax/video"), ids=str)
def test_bases_and_representations_stand_on_modules_alone(path):
    allowed = (
        "redvillm_jax.modules",
        "redvillm_jax.video.contract",
        "redvillm_jax.bases.contract",
        "data_pipeline.common.errors",
        "data_pipeline.media.tiles",
        "jax",
        "flax",
        "numpy",
        "einops",
    )
    assert not outside(path, (*allowed, "transformers", "tiktoken"))


def room(name: str) -> str | None:
    """The room that a module of ours lies in: "redvillm_jax.model"; None for commands and what is not ours."""
    parts = name.split(".")
    known = {"redvillm_jax": FLOORS, "data_pipeline": DATA_FLOORS}.get(parts[0], ())
    return ".".join(parts[:2]) if len(parts) > 1 and any(parts[1] in floor for floor in known) else None


def test_every_folder_is_on_a_floor():
    for top, floors in (("redvillm_jax", FLOORS), ("data_pipeline", DATA_FLOORS)):
        folders = {path.parent.name for path in (ROOT / top).glob("*/__init__.py")}
        assert folders == {name for floor in floors for name in floor}


@pytest.mark.parametrize("path", files("redvillm_jax") + files("data_pipeline"), ids=str)
def test_rooms_import_lower_floors_only(path):
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own is None:
        return
    top, name = own.split(".")
    floors = {"redvillm_jax": FLOORS, "data_pipeline": DATA_FLOORS}[top]
    below = {f"{top}.{one}" for floor in floors[: next(i for i, f in enumerate(floors) if name in f)] for one in floor}
    found = {room(n) for n in imports(path) if n.startswith(f"{top}.")} - {own, None}
    assert not found - below


@pytest.mark.parametrize("top", ["redvillm_jax", "data_pipeline"])
def test_every_room_says_what_lives_there(top):
    for path in [ROOT / top / "__init__.py", *(ROOT / top).glob("*/__init__.py")]:
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize("path", files("conversion"), ids=str)
def test_conversion_imports_no_training_code(path):
    ours = {name for name in imports(path) if name.startswith("redvillm_jax")}
    rooms = ("bases.contract", "video.contract", "model", "training.checkpoint", "runtime.chips", "modules")
    rooms += ("inference", "runtime.sharding") if path.name == "stages.py" else ()  # it runs the model
    allowed = tuple(f"redvillm_jax.{room}" for room in rooms)
    assert not {n for n in ours if n != "redvillm_jax" and not n.startswith(allowed)}
    constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    assert not constants & {"llava", "qwen_vl"}, "what differs by family belongs into the base's file"


@pytest.mark.parametrize("path", files("redvillm_jax"), ids=str)
def test_product_imports_neither_conversion_nor_torch(path):
    assert not {name for name in imports(path) if name.split(".")[0] in ("conversion", "torch", "configs")}


@pytest.mark.parametrize("path", files("redvillm_jax") + files("conversion") + files("data_pipeline"), ids=str)
def test_nothing_imports_a_command(path):
    commands = {f"redvillm_jax.{name}" for name in COMMANDS} | {
        "data_pipeline.prepare",
        "data_pipeline.show",
        "data_pipeline.translate",
        "conversion.from_torch",
        "conversion.to_torch",
        "conversion.compare",
    }
    converts_first = {"conversion.from_torch"} if path.name == "compare.py" else set()
    assert not imports(path) & commands - converts_first


@pytest.mark.parametrize("path", [ROOT / "redvillm_jax/judge.py", *files("redvillm_jax/evaluation")], ids=str)
def test_what_judges_answers_runs_where_no_accelerator_is(path):
    assert not outside(path, ("redvillm_jax.evaluation", "data_pipeline", "numpy"))


def test_data_pipeline_opens_no_jax_backend():
    code = (
        "import data_pipeline.pipeline, data_pipeline.store, data_pipeline.prepare; import jax;"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
