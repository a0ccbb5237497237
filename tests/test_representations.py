"""The contract of video representations: slow-fast, the image grid and one from outside go through everything."""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import NUM_FRAMES
from flax import nnx
from helpers import config_of, plan_of
from safetensors.numpy import load_file
from test_encode import encode_store
from test_model import build, tokens
from test_train import leaves, make_config

from conversion.to_torch import to_torch
from data_pipeline.common.errors import UserError
from data_pipeline.media.reading import Clip
from data_pipeline.pipeline import batches
from data_pipeline.store import open_store
from redvillm_jax import evaluate, train
from redvillm_jax.inference.assistant import Assistant
from redvillm_jax.inference.open_model import model_fingerprint, open_model
from redvillm_jax.model.base_folder import open_base, sized_base
from redvillm_jax.model.build import load_model
from redvillm_jax.model.places import VideoPlaces
from redvillm_jax.model.settings import model_settings
from redvillm_jax.planning.programs import abstract_batch
from redvillm_jax.planning.workload import measure, paper_lengths
from redvillm_jax.runtime.sharding import make_mesh
from redvillm_jax.training.recipe import make_training, recipe_of
from redvillm_jax.video import contract, image_grid, slow_fast
from redvillm_jax.video.contract import load_video, make_video
from redvillm_jax.video.red_villm import ExtraMLP

SLOW_FAST = {"video": "slow_fast", "slow_frames": 2, "fast_side": 2}
KINDS = {
    "slow_fast": SLOW_FAST,
    "slow_fast, two projectors": SLOW_FAST | {"fast_module": True, "pool_fast": "before"},
    "image_grid": {"video": "image_grid", "grid_rows": 2, "grid_cols": 2},
    "outside": {"video": "tests.toy_video"},
}
GROUPS = {"slow_fast": {"slow"}, "slow_fast, two projectors": {"slow", "fast"}, "image_grid": {"image"}}
kinds = pytest.mark.parametrize("kind", KINDS)
ONE = {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}}


# ---- values


def slow_fast_of_torch(x: torch.Tensor, slow_frames: int, side: int) -> torch.Tensor:
    """The published pooling of projected tokens (T, rows, cols, K): slow and fast pathway, one behind the other."""
    chosen = torch.linspace(0, len(x), slow_frames + 1).to(torch.int32)[:-1].tolist()
    slow = torch.nn.functional.max_pool1d(x[chosen].flatten(1, 2).mT, 2).mT.flatten(0, 1)
    fast = torch.nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1).flatten(0, 2)
    return torch.cat([slow, fast])


@pytest.mark.parametrize(("frames", "grid", "side", "slow"), [(7, (6, 6), 2, 3), (5, (5, 7), 3, 4), (4, (4, 4), 4, 4)])
def test_slow_fast_pools_as_published(frames, grid, side, slow):
    x = np.random.default_rng(0).standard_normal((frames, *grid, 3)).astype(np.float32)
    video = slow_fast.Video(frames, slow_frames=slow, fast_side=side)
    pooled = video.pool(jnp.asarray(x)[None], jnp.array([frames]))
    got = [video.merge(s.name, pooled[s.name], s.layout)[0] for s in video.order(grid, frames)]
    want = slow_fast_of_torch(torch.from_numpy(x), slow, side)
    np.testing.assert_allclose(np.concatenate(got), want, atol=1e-6)
    before = slow_fast.Video(frames, slow_frames=slow, fast_side=side, pool_fast="before", slow_pool="mean")
    pooled = before.pool(jnp.asarray(x)[None], jnp.array([frames]))
    np.testing.assert_allclose(pooled["fast"][0], want[-frames * side * side :], atol=1e-6)
    pairs = pooled["slow"][0].reshape(slow, -1, 3)[:, : math.prod(grid) // 2 * 2].reshape(slow, -1, 2, 3)
    np.testing.assert_allclose(before.merge("slow", pooled["slow"], (slow, *grid))[0], pairs.mean(2).reshape(-1, 3))


def test_a_short_video_has_its_slow_frames_first():
    video = slow_fast.Video(8, slow_frames=4, fast_side=1, slow_pool="none")
    x = jnp.arange(8.0).reshape(1, 8, 1, 1, 1)
    for n, want in ((8, [0, 2, 4, 6]), (6, [0, 1, 3, 4]), (3, [0, 1, 2])):
        slow = video.pool(x, jnp.array([n]))["slow"][0, : video.order((1, 1), n)[0].layout[0], 0]
        assert slow.tolist() == want == [video.frame_of("slow", i, n) for i in range(len(want))]


def test_the_image_grid_is_read_left_to_right_and_top_to_bottom():
    video = image_grid.Video(9, grid_rows=3, grid_cols=2)
    frames = jnp.broadcast_to(jnp.arange(9, dtype=jnp.uint8)[None, :, None, None, None] * 20, (1, 9, 32, 32, 3))
    picture = video.arrange(frames, jnp.array([9]))
    assert picture.shape == (1, 1, 32, 32, 3) and picture.dtype == jnp.uint8
    cells = np.asarray(picture)[0, 0, [5, 16, 26]][:, [8, 24], 0]
    np.testing.assert_array_equal(cells, [[0, 20], [60, 80], [120, 140]])
    few = np.asarray(video.arrange(frames, jnp.array([2])))[0, 0, [5, 16, 26]][:, [8, 24], 0]
    np.testing.assert_array_equal(few, [[0, 0], [0, 20], [20, 20]])


def test_a_cell_is_the_frame_scaled_down():
    frame = np.random.default_rng(0).integers(0, 256, (1, 1, 8, 8, 3), np.uint8)
    got = image_grid.Video(1, grid_rows=2, grid_cols=1).arrange(jnp.asarray(frame), jnp.array([1]))[0, 0, :4]
    x = torch.from_numpy(frame[0, 0]).permute(2, 0, 1)[None].float()
    want = torch.nn.functional.interpolate(x, (4, 8), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    np.testing.assert_allclose(got, want.round(), atol=1)


# ---- the model


@kinds
@pytest.mark.parametrize("family", ["llava", pytest.param("qwen_vl", marks=pytest.mark.slow)])
def test_a_short_video_equals_a_run_with_fewer_frames(kind, family, bases):
    if (kind, family) == ("slow_fast", "qwen_vl"):
        pytest.skip("the other slow_fast has all that this one has")
    frames = np.random.default_rng(0).integers(0, 256, (1, NUM_FRAMES, 32, 32, 3), np.uint8)
    frames[:, 3:] = 0
    base, config, model = build(bases[family], family, **KINDS[kind])
    places = VideoPlaces(base, model_settings(config))
    got = tokens(model, frames, [3])[0]
    assert got.shape == (places.most, base.config.hidden_size)
    _, _, three = build(bases[family], family, **KINDS[kind] | {"num_frames": 3})
    np.testing.assert_allclose(got[places.slots(3)], tokens(three, frames[:, :3])[0], atol=1e-5)


def test_text_stands_before_the_tokens_that_it_belongs_to():
    base, config = sized_base("llava", "tiny"), config_of("llava", "tests.toy_video") | {"num_frames": 3}
    places = VideoPlaces(base, model_settings(config))
    placed = places.place(2, [0.0, 2.25], lambda text: [text])
    overview = [("all:", -1), *((0, slot) for slot in range(16))]
    assert placed == [*overview, ("0.0s", -1), (0, 16), ("2.2s", -1), (0, 17)]
    assert places.most == 19 and places.slots(2) == list(range(18))


# ---- through the commands


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "outside")) for kind in KINDS])
def test_through_everything(kind, bases, stores, videos, tmp_path):
    """encode, train from streams, export, open, answer from the video, evaluate from frames and from streams."""
    changes, base = KINDS[kind] | ONE | {"num_epochs": 1, "batch_questions": 24, "row_length": 200}, bases["llava"]
    flags = [f"--config.{name}={value}" for name, value in KINDS[kind].items()]
    streams, run, export = tmp_path / "streams", tmp_path / "run", tmp_path / "export"
    encode_store("llava", base, stores["llava"], streams, "--dtype=float32", *flags)
    config = make_config("llava", base, streams, **changes)
    assert train.train(config, run, jax.devices()[:1]) == 0
    trained = leaves(run)
    assert {name.split(".")[0] for name in trained} == GROUPS.get(kind, {"whole", "detail"})
    if kind == "outside":  # trains the copy alone
        mesh = make_mesh(ONE["mesh"], jax.devices()[:1])
        start = load_model(open_base(base), model_settings(config), mesh, dtype=jnp.float32).projectors["whole"]
        np.testing.assert_array_equal(trained["whole.linear_1.weight"], start.linear_1.weight[...])
        assert not np.array_equal(trained["detail.linear_1.weight"], start.linear_1.weight[...])

    to_torch(run, export)
    names = load_file(export / "projectors.safetensors").keys()
    copies = {name.split(".")[0].removesuffix("_module") for name in names if "_module." in name}
    assert copies == {"slow_fast, two projectors": {"fast"}, "outside": {"detail"}}.get(kind, set())
    opened = open_model(export, base=base)
    assert opened.fingerprint == open_model(run).fingerprint
    record = open_store(stores["llava"]).videos[0]
    question = open_store(stores["llava"]).instructions[0]["question"]
    clip = Clip(videos / "videos" / record["source"])
    said = Assistant(opened).ask(clip, question, max_new_tokens=4)
    flags = [f"--model={export}", f"--base={base}", "--max_new_tokens=4"]
    answers = {}
    for name, data in (("frames", stores["llava"]), ("streams", streams)):
        assert evaluate.main([*flags, f"--data={data}", f"--out={tmp_path / name}"]) == 0
        lines = (tmp_path / name / "answers.jsonl").read_text().splitlines()
        answers[name] = [json.loads(line) for line in lines]
    same = [[(line["prompt"], line["prediction"]) for line in lines] for lines in answers.values()]
    assert same[0] == same[1] and len(same[0]) == len(open_store(stores["llava"]).instructions)
    first = next(
        line for line in answers["frames"] if line["video"] == record["video"] and line["question"] == question
    )
    assert first["prediction"] == said
    untrained = Assistant(open_model(base, make_config("llava", "", "", **changes)))
    assert isinstance(untrained.ask(clip, question, max_new_tokens=2), str)
    times = [f"{at:.1f}s[1 visual tokens]" for at in open_store(stores["llava"]).seconds(0)]
    assert ("".join(times) in first["prompt"].replace(" s", "s")) == (kind == "outside")


@pytest.mark.parametrize("kind", ["slow_fast, two projectors", "outside"])
def test_packed_rows_equal_questions_one_by_one(kind, bases, stores):
    losses, store = {}, open_store(stores["llava"])
    for pack, row_length in ((False, 0), (True, 200)):
        switches = KINDS[kind] | {"num_epochs": 1, "batch_questions": 72, "pack": pack, "row_length": row_length}
        base, config, model = build(bases["llava"], "llava", **switches)
        plan = plan_of(config, base, store)
        batch = next(batches(plan.steps, plan.row_fn, store, rows_per_step=plan.bounds.rows_per_step))
        graphdef, weights = nnx.split(model)
        found = jax.jit(lambda w, b, g=graphdef: nnx.merge(g, w).target_losses(b, jnp.float32))(weights, batch)
        losses[pack], counted = np.zeros(len(store.instructions)), batch["target_weights"] > 0
        np.add.at(losses[pack], batch["target_questions"][counted], np.asarray(found)[counted])
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-5)


@kinds
def test_plan_knows_its_shapes(kind):
    """The real size lowers, with the rows that its tokens need."""
    config = make_config("llava", "", "", **KINDS[kind] | {"num_frames": 8, "dtype": "bfloat16"})
    base, settings = sized_base("llava", "v1.5-7b"), model_settings(config)
    mesh = make_mesh(ONE["mesh"], jax.devices()[:1])
    places = VideoPlaces(base, settings)
    work = measure(
        *paper_lengths(places.most), row_length=2048, batch_questions=8, pack=True, shards=1, total_questions=100
    )
    with jax.set_mesh(mesh):
        model = load_model(base, settings, mesh, dtype=jnp.bfloat16, parts=("projector", "llm"))
        training = make_training(
            recipe_of(config), base, settings, model, mesh, num_steps=9, row_length=work.row_length
        )
        batch = abstract_batch(settings, base, mesh, work)
        shapes = jax.eval_shape(training.step, *training.state.values(), training.frozen, batch)
    assert shapes[2]["row_losses"].shape == (work.rows,)


# ---- what goes wrong


def test_streams_of_another_pooling_are_refused(bases, stores, tmp_path, monkeypatch):
    flags = [f"--config.{name}={value}" for name, value in KINDS["outside"].items()]
    encode_store("llava", bases["llava"], stores["llava"], tmp_path / "streams", *flags)
    config = make_config("llava", bases["llava"], tmp_path / "streams", **KINDS["outside"])
    with pytest.raises(UserError, match="was made with toy_overview=mean, this model needs max: encode"):
        train.train(config | {"toy_overview": "max"}, tmp_path / "run")
    with pytest.raises(UserError, match=r"was made with video=tests\.toy_video, this model needs red_villm"):
        train.train(make_config("llava", bases["llava"], tmp_path / "streams"), tmp_path / "run")
    base, settings = open_base(bases["llava"]), model_settings(config)
    fingerprint = model_fingerprint(base, settings, None)
    code = tmp_path / "video.py"
    code.write_text("# changed\n")
    monkeypatch.setattr(load_video("tests.toy_video"), "__file__", str(code))
    with pytest.raises(UserError, match="was made with video_code="):
        train.train(config, tmp_path / "run")
    assert model_fingerprint(base, settings, None) != fingerprint, "other code, other answers"


HEAD = """
import dataclasses
from redvillm_jax.modules.bounds import whole
from redvillm_jax.video.contract import Field, Representation, Stream
FIELDS, GROUPS = {}, ("image",)
@dataclasses.dataclass(frozen=True)
class Video(Representation):
    def pool(self, features, num_frames):
        return {"a": features[:, 0].reshape(len(features), -1, features.shape[-1])}
    def order(self, grid, num_frames):
        return (Stream("a", "image", grid),)
    def projectors(self):
        return {"image": "image"}
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: "1 / 0", r"cannot be imported \(ZeroDivisionError: division by zero\)"),
        (lambda s: "raise OSError('two\\nlines')", "OSError: two lines"),
        (lambda s: s.replace("FIELDS, GROUPS", "NONE, GROUPS"), "has no FIELDS"),
        (lambda s: s.replace("FIELDS, GROUPS = {}", "FIELDS, NONE = {}"), "has no GROUPS"),
        (lambda s: s.replace("(Representation)", ""), "has no dataclass Video below contract.Representation"),
        (lambda s: s.replace("def projectors", "def other"), "its Video lacks the method projectors"),
        (
            lambda s: s.replace("{}", '{"x": Field(1, whole(1, 2), "tokens")}'),
            "only one of FIELDS and its Video has the field x",
        ),
    ],
)
def test_a_module_that_is_no_representation_is_refused_in_one_line(change, message, tmp_path, monkeypatch):
    package = f"package_{abs(hash(message)):x}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "video.py").write_text(change(HEAD))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_video(f"{package}.video")
    assert "\n" not in str(error.value) and str(error.value).startswith(f"config.video={package}.video: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("slowfast", "did you mean slow_fast?"),
        ("no.such.module", "cannot be imported"),
        ("contract", "expected one of"),
    ],
)
def test_a_name_that_is_none(name, message):
    with pytest.raises(UserError, match=message):
        load_video(name)


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        (
            "order",
            lambda self, grid, n: (contract.Stream("image", "image", (2, 3)),),
            "16 features, its layout .2, 3. has 6",
        ),
        (
            "order",
            lambda self, grid, n: (contract.Stream("b", "image", grid),),
            "order has the stream b, pool gives image",
        ),
        (
            "order",
            lambda self, grid, n: (contract.Stream("image", "c", grid),),
            "goes through 'c', projectors has image",
        ),
        (
            "order",
            lambda self, grid, n: (contract.Stream("image", "image", grid),) * (1 + n),
            "other streams or projectors",
        ),
        ("projectors", lambda self: {"image": "image", "b": "copy"}, "GROUPS lacks the projector b"),
        ("projectors", lambda self: {"image": "image", "b": "image"}, "several projectors start from the image LLM"),
        ("extra", lambda self, name: ExtraMLP, "stream image has an extra module, but GROUPS lacks extra_mlp"),
        ("projectors", lambda self: {"image": "zero"}, "starts from 'zero', expected one of image, copy, random"),
    ],
)
def test_a_representation_that_contradicts_itself_is_refused(method, value, message, monkeypatch):
    monkeypatch.setattr(image_grid.Video, method, value)
    settings = model_settings(config_of("llava", "image_grid"))
    with pytest.raises(UserError, match=message):
        load_model(sized_base("llava", "tiny"), settings, make_mesh(ONE["mesh"], jax.devices()[:1]), dtype=jnp.float32)


def test_every_field_of_every_representation_acts():
    for name in contract.known_videos():
        config = config_of("llava", name)
        for field, (default, bound, effect) in load_video(name).FIELDS.items():
            assert config[field] == default and not bound(default) and effect in contract.EFFECTS
            assert getattr(make_video(name, config), field) == default


def test_tokens_that_frames_share_lose_no_slot(monkeypatch):
    """A merge over time: four frames become two tokens, which no frame has alone."""
    kind = load_video("tests.toy_video").Video
    monkeypatch.setattr(kind, "merge", lambda self, name, x, layout: x[:, :2] if name == "each" else x)
    settings = model_settings(config_of("llava", "tests.toy_video") | {"num_frames": 4})
    places = VideoPlaces(sized_base("llava", "tiny"), settings)
    assert places.most == 18 and places.slots(4) == list(range(18))
    assert [block.frame for block in places.blocks(4)] == [None, None]


def test_packed_text_is_in_the_rows(bases, stores):
    config = config_of("llava", "tests.toy_video") | {"num_frames": NUM_FRAMES, "row_length": 200}
    base, store = open_base(bases["llava"]), open_store(stores["llava"])
    plan = plan_of(config, base, store)
    tokenizer = base.module.Tokenizer(base.path)
    prefix = plan.prefixes[0]
    text = tokenizer.decode(prefix.ids[prefix.video_tokens < 0].tolist())
    assert "".join(f"{at:.1f}s" for at in store.seconds(0)) in text.replace(" ", "")


def test_the_example_of_the_documents_works(tmp_path, monkeypatch, bases):
    page = (Path(__file__).parents[1] / "docs" / "new_representation.md").read_text()
    (tmp_path / "of_the_docs").mkdir()
    (tmp_path / "of_the_docs" / "video.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    base, config, model = build(bases["llava"], "llava", video="of_the_docs.video")
    frames = np.random.default_rng(0).integers(0, 256, (1, NUM_FRAMES, 32, 32, 3), np.uint8)
    places = VideoPlaces(base, model_settings(config))
    assert tokens(model, frames).shape[1] == places.most == 16 + NUM_FRAMES
    placed = places.place(2, [0.0, 1.5], lambda text: [text])
    assert [entry for entry in placed if entry[1] < 0] == [("0.0s ", -1), ("1.5s ", -1)]
