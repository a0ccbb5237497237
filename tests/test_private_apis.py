"""What the project uses of other packages without their promise: one line says which of it has moved."""

import ast
import importlib
import importlib.metadata
import inspect
import mmap
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"

# file of ours, package, name, its parameters that we give by name (of functions)
NAMES = [
    ("redvillm_jax/runtime/jax_private.py", "jax", "jax._src.distributed:global_state.client", ()),
    ("redvillm_jax/runtime/jax_private.py", "jax", "jax._src.distributed:global_state.process_id", ()),
    ("redvillm_jax/runtime/jax_private.py", "jax", "jax._src.distributed:global_state.num_processes", ()),
    (
        "redvillm_jax/runtime/jax_private.py",
        "jax",
        "jax._src.lib:_jax.DistributedRuntimeClient.key_value_try_get",
        (),
    ),
    ("redvillm_jax/runtime/jax_private.py", "jax", "jax._src.lib:_jax.DistributedRuntimeClient.key_value_set", ()),
    ("redvillm_jax/runtime/jax_private.py", "jax", "jax._src.hardware_utils:num_available_tpu_chips_and_device_id", ()),
    (
        "redvillm_jax/runtime/jax_private.py",
        "jax",
        "jax.experimental.mesh_utils:create_device_mesh",
        ("allow_split_physical_axes",),
    ),
    ("redvillm_jax/runtime/jax_private.py", "jax", "jax.experimental.multihost_utils:process_allgather", ("tiled",)),
    ("redvillm_jax/runtime/jax_private.py", "jax", "jax.experimental.multihost_utils:sync_global_devices", ()),
    (
        "redvillm_jax/runtime/jax_private.py",
        "jax",
        "jax.experimental.multihost_utils:reached_preemption_sync_point",
        (),
    ),
    (
        "redvillm_jax/runtime/jax_private.py",
        "jax",
        "jax.experimental.topologies:get_topology_desc",
        ("platform", "topology_name"),
    ),
    (
        "redvillm_jax/modules/splash.py",
        "jax",
        f"{SPLASH}.splash_attention_mask_info:process_dynamic_mask",
        ("downcast_smem_data",),
    ),
    (
        "redvillm_jax/modules/splash.py",
        "jax",
        f"{SPLASH}.splash_attention_mask_info:process_dynamic_mask_dkv",
        ("downcast_smem_data",),
    ),
    (
        "redvillm_jax/modules/splash.py",
        "jax",
        f"{SPLASH}.splash_attention_mask_info:MaskInfo",
        ("data_next", "mask_next", "block_mask"),
    ),
    ("redvillm_jax/modules/splash.py", "jax", f"{SPLASH}.splash_attention_kernel:DEFAULT_MASK_VALUE", ()),
    (
        "redvillm_jax/modules/splash.py",
        "jax",
        f"{SPLASH}.splash_attention_kernel:BlockSizes",
        (
            *("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
            *("block_q_dq", "block_kv_dq"),
        ),
    ),
    (
        "redvillm_jax/modules/splash.py",
        "jax",
        f"{SPLASH}.splash_attention_kernel:SplashAttentionKernel",
        (),
    ),
    (
        "redvillm_jax/modules/splash.py",
        "jax",
        f"{SPLASH}.splash_attention_kernel:_splash_attention",  # what the class hands its arguments to
        (
            *("is_mqa", "block_sizes", "save_residuals", "mask_value", "attn_logits_soft_cap"),
            *("residual_checkpoint_name", "mask_function", "interpret"),
        ),
    ),
    ("data_pipeline/common/gcs.py", "gcsfs", "gcsfs:GCSFileSystem.call", ()),
    ("data_pipeline/common/gcs.py", "gcsfs", "gcsfs:GCSFileSystem._location", ()),
    ("data_pipeline/common/gcs.py", "etils", "etils.epath:backend.fsspec_backend.fs", ()),
    (
        "data_pipeline/store.py",
        "tensorflow-datasets",
        "tensorflow_datasets.core.example_serializer:ExampleSerializer.serialize_example",
        (),
    ),
]

# file of ours, package, files of its folder in which a text must stand, the texts
TEXTS = [
    (
        "redvillm_jax/runtime/abort_filter.py",
        "jaxlib",
        "libjax_common.so",
        (
            *("coordination_service", "preemption_sync_manager", "client.h", "RegisterTask", "DEADLINE_EXCEEDED"),
            *("stopped sending heartbeats", "leader task"),
        ),
    ),
    ("redvillm_jax/runtime/jax_private.py", "jaxlib", "libjax_common.so", ("RECEIVED_PREEMPTION_NOTICE",)),
    (
        "redvillm_jax/training/orbax_files.py",
        "orbax-checkpoint",
        "**/_src/**/*.py",
        ("'commit_success.txt'", "'_CHECKPOINT_METADATA'", ".orbax-checkpoint-tmp"),
    ),
    ("data_pipeline/pipeline.py", "grain", "**/process_prefetch.py", ("Worker process was", "with exit code ")),
    (
        "data_pipeline/store.py",
        "array_record",
        "python/array_record_module.so",
        ("Corrupted", "Invalid", "at least 64KB"),
    ),
    (
        "redvillm_jax/planning/hlo_cost.py",
        "libtpu",
        "libtpu.so",
        ("estimated_cycles", "known_trip_count", "replica_groups="),
    ),
    (
        "redvillm_jax/runtime/xla_messages.py",
        "libtpu",
        "libtpu.so",
        ("RESOURCE_EXHAUSTED", "memory space ", "would exceed memory"),
    ),
]
FOLDERS = {"orbax-checkpoint": "orbax/checkpoint"}  # of packages that are not called like theirs


def checked(file: str) -> dict[str, str]:
    """The versions that a file says it was checked with."""
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CHECKED":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{file}: has no constant CHECKED with the versions that it was checked with")


def moved(file: str, package: str, what: str) -> str:
    """The line that a test fails with."""
    version, known = importlib.metadata.version(package), checked(file)
    return f"{file}: {what} in {package} {version}; it was checked with {known}"


@pytest.mark.parametrize(("file", "package", "name", "parameters"), NAMES)
def test_a_private_name_is_where_it_was(file, package, name, parameters):
    module, _, path = name.partition(":")
    try:
        found = reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        pytest.fail(moved(file, package, f"{name} is gone"), pytrace=False)
    if parameters:
        lost = [p for p in parameters if p not in inspect.signature(found).parameters]
        assert not lost, moved(file, package, f"{name} does not take {', '.join(lost)}")


@pytest.mark.parametrize(("file", "package", "files", "texts"), TEXTS)
def test_a_text_that_is_read_is_still_written(file, package, files, texts):
    folder = importlib.metadata.distribution(package).locate_file(FOLDERS.get(package, package))
    missing = set(texts)
    for path in sorted(Path(folder).glob(files)):
        if path.stat().st_size:
            with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
                missing -= {text for text in missing if content.find(text.encode()) >= 0}
        if not missing:
            return
    pytest.fail(moved(file, package, f"the text {sorted(missing)[0]!r} is gone"), pytrace=False)


def uses(path: Path) -> set[str]:
    """Modules that a file imports and attributes that it reads which other packages do not promise."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            found |= {f".{node.attr}"} if node.attr.startswith("_") and not node.attr.startswith("__") else set()
    tuples = {"._replace", "._asdict", "._exit"}  # of named tuples and os: public, in spite of their names
    private = {name for name in found if "._" in name or name.startswith(("_", "jax.experimental"))}
    return {name for name in private - tuples if not name.startswith("__future__")}


def test_private_names_stay_in_their_files():
    files = {file for file, *_ in (*NAMES, *TEXTS)}
    for top in ("redvillm_jax", "data_pipeline", "conversion", "configs"):
        for path in (ROOT / top).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            assert name in files or not uses(path), f"{name}: uses {', '.join(sorted(uses(path)))}"


def test_every_file_says_what_it_was_checked_with():
    for file, package, *_ in (*NAMES, *TEXTS):
        wanted = "jax" if package == "jaxlib" else package
        assert wanted in checked(file), f"{file}: CHECKED lacks {wanted}"
