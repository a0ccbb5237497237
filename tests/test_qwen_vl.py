"""Qwen-VL against PyTorch: small random models always, the published model's own arrays where they are at hand."""

import dataclasses
import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline.common.errors import UserError
from redvillm_jax.bases import qwen_vl
from redvillm_jax.bases.qwen_vl import SIZES, Config
from redvillm_jax.model import weights
from redvillm_jax.modules.attention import Masks
from redvillm_jax.modules.qwen import ntk_base
from redvillm_jax.modules.resampler import sin_cos_positions
from tests.helpers import REFERENCE, ParityTable, fill, greedy, torch_tensors

torch = pytest.importorskip("torch")
from tests import torch_qwen_vl as oracle  # noqa: E402

TINY = REFERENCE / "qwen_vl_tiny"
PUBLISHED = REFERENCE / "qwen_vl_files"
needs_reference = pytest.mark.skipif(not TINY.is_dir(), reason="the published model's arrays are not here")

SMALL = Config(  # every size different from the others, positions that act from slot 24 on
    image_size=32,
    patch_size=4,
    vision_hidden_size=24,
    vision_intermediate_size=40,
    vision_num_hidden_layers=2,
    vision_num_attention_heads=3,
    n_queries=16,
    resampler_num_attention_heads=2,
    vocab_size=50,
    hidden_size=32,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    seq_length=24,
)


@dataclasses.dataclass
class Model:
    config: Config
    tensors: dict[str, np.ndarray]
    encoder: qwen_vl.Encoder
    projector: qwen_vl.Projector
    llm: qwen_vl.LLM

    @classmethod
    def build(cls, config: Config, tensors: dict[str, np.ndarray], dtype=jnp.float32) -> "Model":
        parts = {part: weights.abstract_part(qwen_vl, part, config) for part in weights.PARTS}
        return cls(
            config,
            tensors,
            **{part: fill(module, tensors, qwen_vl.PREFIX[part], dtype) for part, module in parts.items()},
        )

    def with_options(self, **options: str) -> qwen_vl.Projector:
        module = weights.abstract_part(qwen_vl, "projector", self.config, **options)
        return fill(module, self.tensors, qwen_vl.PREFIX["projector"])

    def torch_weights(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.array(tensor)) for name, tensor in self.tensors.items()}

    def torch_projector(self) -> dict[str, torch.Tensor]:
        projector = oracle.below(self.torch_weights(), "transformer.visual.")
        return {name: projector[name] for name in weights.name_table(self.projector, "")}


@pytest.fixture(scope="module")
def small() -> Model:
    rng = np.random.default_rng(0)
    tensors = {}
    for name, leaf in weights.expected_tensors(qwen_vl, SMALL).items():
        noise = rng.standard_normal(leaf.shape, dtype=np.float32)
        if re.search(r"ln_\w+\.weight$", name):
            tensors[name] = 1 + 0.3 * noise
        else:  # biases and tables are as large as what they are added to
            fan_in = 1 if len(leaf.shape) == 1 or "pos" in name else math.prod(leaf.shape[1:])
            tensors[name] = noise / fan_in**0.5
    return Model.build(SMALL, tensors)


def causal(batch: int, length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))


@jax.jit
def forward(llm, embeds, key_mask=None, context_length=None):
    batch, length = embeds.shape[:2]
    mask = causal(batch, length)
    if key_mask is not None:
        mask &= key_mask[:, None]
    position_ids = jnp.broadcast_to(jnp.arange(length), (batch, length))
    if context_length is not None:
        context_length = jnp.full(batch, context_length)
    return llm.logits(llm(embeds, position_ids, Masks(mask), context_length=context_length)[0])


@partial(jax.jit, static_argnums=2)
def project(projector, features, layout, mask=None):
    return projector(features, jnp.ones(features.shape[:2], bool) if mask is None else mask, layout)


def embed(llm, ids) -> jax.Array:
    return llm.embed(jnp.asarray(ids), jnp.float32)


def cross_entropy(logits, labels) -> jax.Array:
    """Mean over the labels that are not -100, each predicted by the slot before it."""
    log_probs, targets = jax.nn.log_softmax(logits[:, :-1]), labels[:, 1:]
    picked = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return -(picked * (targets >= 0)).sum() / (targets >= 0).sum()


@jax.jit
def encode(encoder, pixels):
    return encoder(pixels)


@jax.jit
def encoder_stages(encoder: qwen_vl.Encoder, pixels: jax.Array) -> dict[str, jax.Array]:
    graphdef, stack = nnx.split(encoder.transformer.resblocks.block)
    block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], stack))
    x = encoder.ln_pre(encoder.embed(pixels))
    return {
        "conv1": encoder.conv1(pixels),
        "pos_added": encoder.embed(pixels),
        "ln_pre": x,
        "block0_attn": block.attn(block.ln_1(x)),
        "block0": block(x, None)[0],
    }


# ---- small random models against PyTorch


@pytest.mark.parametrize("size", [(16, 16), (24, 32)])
def test_encoder_matches_torch(small: Model, size: tuple[int, int]):
    pixels = np.random.default_rng(1).standard_normal((2, *size, 3), dtype=np.float32)
    want = oracle.vision(small.torch_weights(), torch.from_numpy(pixels).permute(0, 3, 1, 2), heads=3)
    got = encoder_stages(small.encoder, pixels) | {"vit": encode(small.encoder, pixels)}
    table = ParityTable("encoder")
    for name, array in got.items():
        table.add(name, array, want[name], atol=2e-5)
    table.check()


@pytest.mark.parametrize("layout", [(8, 8), (4, 4), (3, 6), (1, 1)])
def test_resampled_pictures_match_torch(small: Model, layout: tuple[int, int]):
    features = np.random.default_rng(2).standard_normal((2, math.prod(layout), 24), dtype=np.float32)
    w = small.torch_projector()
    positions = oracle.grid(w["attn_pool.pos_embed"], *layout)
    want = oracle.resample(w, torch.from_numpy(features), positions, heads=2)["visual_out"]
    got = project(small.projector, features, layout)
    assert got.shape == (2, math.prod(small.projector.token_layout(layout)), 32)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("kind", ["grid", "1d"])
@pytest.mark.parametrize("length", [1, 7, 9, 21])
def test_resampled_sequences_match_torch(small: Model, length: int, kind: str):
    features = np.random.default_rng(length).standard_normal((1, length, 24), dtype=np.float32)
    w = small.torch_projector()
    positions = oracle.sequence(w["attn_pool.pos_embed"], length, kind)
    want = oracle.resample(w, torch.from_numpy(features), positions, heads=2)["visual_out"]
    projector = small.with_options(temporal_positions=kind)
    assert projector.token_layout((length,)) == (16,)
    np.testing.assert_allclose(project(projector, features, (length,)), want, atol=2e-5)


def test_per_token_is_one_picture_per_feature(small: Model):
    features = np.random.default_rng(3).standard_normal((1, 12, 24), dtype=np.float32)
    want = oracle.per_token(small.torch_projector(), torch.from_numpy(features[0]), heads=2)
    projector = small.with_options(qwen_align="per_token")
    assert (projector.token_layout((12,)), projector.token_layout((3, 4))) == ((12,), (3, 4))
    np.testing.assert_allclose(project(projector, features, (12,))[0], want, atol=2e-5)


@pytest.mark.parametrize("context_length", [None, 20, 25, 49])  # alpha: off, 1, 3, 7
def test_llm_matches_torch(small: Model, context_length: int | None):
    ids = np.random.default_rng(4).integers(0, 50, (2, context_length or 40))
    key_mask = np.ones(ids.shape, bool)
    key_mask[1, -7:] = False
    with torch.no_grad():
        want = oracle.decoder(
            small.torch_weights(),
            torch.from_numpy(small.tensors["transformer.wte.weight"][ids]),
            heads=4,
            seq_length=24 if context_length else None,
            key_mask=torch.from_numpy(key_mask),
        )
    got = forward(small.llm, embed(small.llm, ids), key_mask, context_length)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.parametrize("length", [10, 20, 30])  # the cached keys stay rotated with the prompt's base
def test_decoding_with_the_cache_equals_the_whole_sequence(small: Model, length: int):
    prompt = np.random.default_rng(length).integers(0, 50, (1, length))
    tokens, _ = greedy(small.llm, embed(small.llm, prompt), prompt[0, -1], 10)
    ids = np.concatenate([prompt, tokens], axis=1)
    with torch.no_grad():
        embeds = torch.from_numpy(small.tensors["transformer.wte.weight"][ids])
        logits = oracle.decoder(small.torch_weights(), embeds, heads=4, seq_length=24, context_length=length)
    np.testing.assert_array_equal(tokens[0], logits[0, length - 1 : -1].argmax(-1))


@pytest.mark.parametrize("qwen_align", ["resample", "per_token"])
def test_projector_gradients_match_torch(small: Model, qwen_align: str):
    rng = np.random.default_rng(5)
    features = rng.standard_normal((9, 24), dtype=np.float32)
    ids, labels = rng.integers(0, 50, 6), np.full((1, 6), -100)
    labels[0, -3:] = ids[-3:]

    w = {name: tensor.requires_grad_() for name, tensor in small.torch_projector().items()}
    if qwen_align == "resample":
        positions = oracle.sequence(w["attn_pool.pos_embed"], 9, "grid").detach()
        tokens = oracle.resample(w, torch.from_numpy(features)[None], positions, heads=2)["visual_out"][0]
    else:
        tokens = oracle.per_token(w, torch.from_numpy(features), heads=2)
    text = torch.from_numpy(small.tensors["transformer.wte.weight"][ids])
    logits = oracle.decoder(small.torch_weights(), torch.cat([tokens, text])[None], heads=4)[0, -4:-1]
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[0, -3:])).backward()

    got = projector_gradients(
        small.with_options(qwen_align=qwen_align),
        lambda projector: cross_entropy(
            forward(
                small.llm,
                jnp.concatenate([project(projector, features[None], (9,)), embed(small.llm, ids)[None]], axis=1),
            )[:, -6:],
            labels,
        ),
    )[1]
    frozen = qwen_vl.frozen_projector(qwen_align=qwen_align)
    table = ParityTable("gradients")
    for name, gradient in got.items():
        if any(re.search(pattern, name) for pattern in frozen):
            assert np.abs(gradient).max() < 1e-6, name
        else:
            table.add_gradient(name, gradient, w[name].grad, rtol=1e-4)
    assert len(table.rows) == (13 if qwen_align == "resample" else 10)
    table.check()


def projector_gradients(projector: nnx.Module, loss) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """loss(projector) and its gradients by leaf name."""
    graphdef, state = nnx.split(projector)
    value, gradients = jax.jit(jax.value_and_grad(lambda state: loss(nnx.merge(graphdef, state))))(state)
    return value, {".".join(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(gradients)}


# ---- what RED-VILLM adds


@pytest.mark.parametrize("options", [{}, {"temporal_positions": "1d"}, {"qwen_align": "per_token"}])
def test_missing_frames_leave_no_trace(small: Model, options: dict[str, str]):
    """n valid of T = 11 features give the tokens of a run with T = n, whatever stands in the missing ones."""
    projector = small.with_options(**options)
    lengths = np.array([1, 4, 7, 10, 11])
    features = np.random.default_rng(6).standard_normal((len(lengths), 11, 24), dtype=np.float32)
    mask = np.arange(11) < lengths[:, None]
    padded = project(projector, np.where(mask[..., None], features, 1e3), (11,), mask)
    for row, n in enumerate(lengths.tolist()):
        alone = project(projector, features[row : row + 1, :n], (n,))[0]
        np.testing.assert_allclose(padded[row, : len(alone)], alone, atol=1e-5, err_msg=f"{n} frames")


def test_a_missing_video_stays_finite(small: Model):
    """Rows with fewer videos than slots have masks without a single valid feature."""
    features, mask = jnp.zeros((1, 9, 24)), jnp.zeros((1, 9), bool)
    projectors = nnx.Dict({kind: small.with_options(temporal_positions=kind) for kind in ("grid", "1d")})

    def loss(projectors):
        return sum(project(projector, features, (9,), mask).sum() for projector in projectors.values())

    value, gradients = projector_gradients(projectors, loss)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_temporal_tokens_know_the_order(small: Model):
    features = np.random.default_rng(7).standard_normal((1, 10, 24), dtype=np.float32)
    for kind in ("grid", "1d"):
        projector = small.with_options(temporal_positions=kind)
        forwards, backwards = (project(projector, x, (10,)) for x in (features, features[:, ::-1]))
        assert np.abs(forwards - backwards).max() > 0.1


def test_temporal_positions_changes_the_tokens(small: Model):
    features = np.random.default_rng(8).standard_normal((1, 10, 24), dtype=np.float32)
    grid, line = (project(small.with_options(temporal_positions=kind), features, (10,)) for kind in ("grid", "1d"))
    assert np.abs(grid - line).max() > 0.1


@pytest.mark.parametrize("qwen_align", ["resample", "per_token"])
def test_frozen_leaves_exist(qwen_align: str):
    names = weights.name_table(weights.abstract_part(qwen_vl, "projector", SMALL), "")
    for pattern in qwen_vl.frozen_projector(qwen_align=qwen_align):
        assert any(re.search(pattern, name) for name in names), pattern


# ---- numbers of the published model


def test_published_config_is_the_named_size():
    published = {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "layer_norm_epsilon": 1e-06,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rotary_emb_base": 10000,
        "seq_length": 2048,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "visual": {
            "heads": 16,
            "image_size": 448,
            "image_start_id": 151857,
            "layers": 48,
            "mlp_ratio": 4.9231,
            "output_dim": 4096,
            "patch_size": 14,
            "width": 1664,
        },
        "vocab_size": 151936,
    }
    assert Config.from_published(published) == SIZES["7b"]
    assert SIZES["7b"].num_patches == 1024
    twin = {**published, "system_prompt": "", "visual": {**published["visual"], "n_queries": 16, "n_heads": 4}}
    changes = {"system_prompt": "", "n_queries": 16, "resampler_num_attention_heads": 4}
    assert Config.from_published(twin) == dataclasses.replace(SIZES["7b"], **changes)
    with pytest.raises(UserError, match=r"visual\.output_dim is 4096, supported: hidden_size = 2048"):
        Config.from_published({**published, "hidden_size": 2048})


def test_real_size_has_the_published_tensors():
    table = weights.expected_tensors(qwen_vl, SIZES["7b"])
    assert len(table) == 853
    assert sum(math.prod(leaf.shape) for leaf in table.values()) == 9_656_935_168
    shapes = {
        "transformer.wte.weight": (151936, 4096),
        "transformer.h.31.ln_1.weight": (4096,),
        "transformer.h.31.ln_2.weight": (4096,),
        "transformer.h.31.attn.c_attn.weight": (12288, 4096),
        "transformer.h.31.attn.c_attn.bias": (12288,),
        "transformer.h.31.attn.c_proj.weight": (4096, 4096),
        "transformer.h.31.mlp.w1.weight": (11008, 4096),
        "transformer.h.31.mlp.w2.weight": (11008, 4096),
        "transformer.h.31.mlp.c_proj.weight": (4096, 11008),
        "transformer.ln_f.weight": (4096,),
        "lm_head.weight": (151936, 4096),
        "transformer.visual.conv1.weight": (1664, 3, 14, 14),
        "transformer.visual.positional_embedding": (256, 1664),
        "transformer.visual.ln_pre.weight": (1664,),
        "transformer.visual.ln_pre.bias": (1664,),
        "transformer.visual.transformer.resblocks.47.ln_1.bias": (1664,),
        "transformer.visual.transformer.resblocks.47.ln_2.weight": (1664,),
        "transformer.visual.transformer.resblocks.47.attn.in_proj.weight": (4992, 1664),
        "transformer.visual.transformer.resblocks.47.attn.in_proj.bias": (4992,),
        "transformer.visual.transformer.resblocks.47.attn.out_proj.weight": (1664, 1664),
        "transformer.visual.transformer.resblocks.47.attn.out_proj.bias": (1664,),
        "transformer.visual.transformer.resblocks.47.mlp.c_fc.weight": (8192, 1664),
        "transformer.visual.transformer.resblocks.47.mlp.c_fc.bias": (8192,),
        "transformer.visual.transformer.resblocks.47.mlp.c_proj.weight": (1664, 8192),
        "transformer.visual.transformer.resblocks.47.mlp.c_proj.bias": (1664,),
        "transformer.visual.attn_pool.query": (256, 4096),
        "transformer.visual.attn_pool.pos_embed": (256, 4096),
        "transformer.visual.attn_pool.kv_proj.weight": (4096, 1664),
        "transformer.visual.attn_pool.attn.in_proj_weight": (12288, 4096),
        "transformer.visual.attn_pool.attn.in_proj_bias": (12288,),
        "transformer.visual.attn_pool.attn.out_proj.weight": (4096, 4096),
        "transformer.visual.attn_pool.attn.out_proj.bias": (4096,),
        "transformer.visual.attn_pool.ln_q.weight": (4096,),
        "transformer.visual.attn_pool.ln_kv.bias": (4096,),
        "transformer.visual.ln_post.weight": (4096,),
        "transformer.visual.ln_post.bias": (4096,),
        "transformer.visual.proj": (4096, 4096),
    }
    assert {name: table[name].shape for name in shapes} == shapes


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="Qwen-VL-Chat's files are not here")
def test_real_size_has_the_index_files_names_and_bytes():
    index = json.loads((PUBLISHED / "pytorch_model.bin.index.json").read_text())
    table = weights.expected_tensors(qwen_vl, SIZES["7b"])
    assert set(table) == set(index["weight_map"])
    bytes_in_bf16 = 2 * sum(math.prod(leaf.shape) for leaf in table.values())
    assert bytes_in_bf16 == index["metadata"]["total_size"]
    assert Config.from_published(json.loads((PUBLISHED / "config.json").read_text())) == SIZES["7b"]


def test_every_weight_has_a_place_on_the_mesh():
    for name, leaf in weights.expected_tensors(qwen_vl, SIZES["7b"]).items():
        spec = next((spec for pattern, spec in qwen_vl.SHARDING if re.search(pattern, name)), None)
        assert spec is not None, name
        assert len(spec) <= len(leaf.shape), name
        if math.prod(leaf.shape) > 2**21:  # what is large is sharded
            assert "fsdp" in str(spec), name


def test_rotary_base_grows_with_the_prompt():
    lengths = [1, 2048, 2049, 4096, 4097, 8192]
    bases = ntk_base(SIZES["7b"].decoder, jnp.array(lengths))[:, 0, 0]
    want = [10000 * alpha ** (128 / 126) for alpha in (1, 1, 3, 3, 7, 7)]
    np.testing.assert_allclose(bases, want, rtol=1e-6)


def test_fixed_positions_follow_the_published_formula():
    table = sin_cos_positions(256, 32)
    frequency = 10000.0 ** -(np.arange(8) / 8)
    for row, col in ((0, 0), (0, 3), (5, 0), (15, 14)):
        parts = [f(axis * frequency) for axis in (col, row) for f in (np.sin, np.cos)]
        np.testing.assert_allclose(table[16 * row + col], np.concatenate(parts), atol=2e-6)


# ---- the published model's arrays


@pytest.fixture(scope="module")
def published() -> Model:
    config = Config.from_published(json.loads((TINY / "ckpt" / "config.json").read_text()))
    return Model.build(config, torch_tensors(*sorted((TINY / "ckpt").glob("*.bin"))))


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return dict(np.load(TINY / "ref.npz"))


def vision_outputs(model: Model, ref: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    pixels, pixels16 = (jnp.asarray(ref[name].transpose(0, 2, 3, 1)) for name in ("pixels", "pixels16"))
    out = {f"{name}_frame0": x for name, x in encoder_stages(model.encoder, pixels[:1]).items()}
    out |= {"vit": encode(model.encoder, pixels), "vit16": encode(model.encoder, pixels16)}
    vit, projector = out["vit"], model.projector
    mask = jnp.ones((1, 1024), bool)
    pooled = projector.attn_pool(vit[:1], mask, projector.key_positions(mask, (32, 32)))
    return out | {
        "attn_pool_frame0": pooled,
        "ln_post_frame0": projector.ln_post(pooled),
        "visual_out_frames01": project(projector, vit[:2], (32, 32)),
        "visual_out16": project(projector, out["vit16"], (16, 16)),
    }


def alignment_outputs(model: Model, ref: dict[str, np.ndarray], vit: jax.Array) -> dict[str, jax.Array]:
    out = {"mean_over_time": vit.mean(0), "mean_over_space": vit.mean(1)}
    windows = out["mean_over_time"].reshape(16, 2, 16, 2, -1).mean((1, 3)).reshape(256, -1)
    per_token = model.with_options(qwen_align="per_token")

    def tokens(projector, features, layout):
        return project(projector, features[None], layout)[0]

    return out | {
        "win2_mean_over_time": windows,
        "align_mean_over_time": tokens(model.projector, out["mean_over_time"], (32, 32)),
        "align_win2_mean_over_time": tokens(model.projector, windows, (16, 16)),
        "align_mean_over_space_T9": tokens(model.projector, out["mean_over_space"], (9,)),
        "align_T100": tokens(model.projector, jnp.asarray(ref["feat_T100"]), (100,)),
        "valuepath_mean_over_time": tokens(per_token, out["mean_over_time"], (32, 32)),
        "valuepath_mean_over_space_T9": tokens(per_token, out["mean_over_space"], (9,)),
        "valuepath_T100": tokens(per_token, jnp.asarray(ref["feat_T100"]), (100,)),
    }


def language_outputs(
    llm: qwen_vl.LLM, ref: dict[str, np.ndarray], visual: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    out = {}
    pictures = embed(llm, ref["image_ids"]).at[:, 5:261].set(visual["visual_out_frames01"])
    for mode in ("eval", "train"):

        def logits(embeds, key_mask=None, mode=mode):
            return forward(llm, embeds, key_mask, embeds.shape[1] if mode == "eval" else None)

        out[f"text_logits_{mode}"] = logits(embed(llm, ref["text_ids"]), ref["text_mask"] > 0)
        out[f"text_loss_{mode}"] = cross_entropy(out[f"text_logits_{mode}"], ref["text_labels"])
        out[f"long_logits_{mode}"] = logits(embed(llm, ref["long_ids"]))
        out[f"image_logits_{mode}"] = logits(pictures)
    before, after = embed(llm, ref["video_prefix_ids"])[0], embed(llm, ref["video_suffix_ids"])[0]
    for mode, aligned in (("resample", "align"), ("pertoken", "valuepath")):
        video = [visual[f"{aligned}_mean_over_space_T9"], visual[f"{aligned}_mean_over_time"]]
        row = jnp.concatenate([before, *video, after])[None]
        out[f"video_{mode}_logits"] = forward(llm, row, None, row.shape[1])[:, -len(after) :]
    for name, prompt in (("text", ref["text_ids"][:1]), ("long", ref["long_ids"])):
        steps = ref[f"greedy_{name}"].shape[1]
        out[f"greedy_{name}"], out[f"greedy_{name}_kcache0"] = greedy(llm, embed(llm, prompt), prompt[0, -1], steps)
    return out


INPUTS = {"pixels", "pixels16", "feat_T100", "text_ids", "text_mask", "text_labels", "long_ids", "image_ids"}
INPUTS |= {"video_prefix_ids", "video_suffix_ids", "grad_labels"}


@needs_reference
def test_every_reference_array(published: Model, reference: dict[str, np.ndarray]):
    """Both projectors' copies, all stages, ref.npz and ref_long.npz (the same weights, trained for 48 tokens)."""
    assert set(weights.expected_tensors(qwen_vl, published.config)) == set(published.tensors)
    visual = vision_outputs(published, reference)
    visual |= alignment_outputs(published, reference, visual["vit"])
    got = visual | language_outputs(published.llm, reference, visual)

    text = [embed(published.llm, reference[f"video_{part}_ids"])[0] for part in ("prefix", "suffix")]

    def loss(projectors):
        q_t = project(projectors["gt"], visual["mean_over_space"][None], (9,))[0]
        q_z = project(projectors["gz"], visual["mean_over_time"][None], (32, 32))[0]
        row = jnp.concatenate([text[0], q_t, q_z, text[1]])[None]
        return cross_entropy(forward(published.llm, row), reference["grad_labels"])

    copies = nnx.Dict(gt=published.projector, gz=nnx.clone(published.projector))
    got["grad_loss"], gradients = projector_gradients(copies, loss)
    gradients = {f"grad_{name}": x for name, x in gradients.items() if not name.endswith("pos_embed")}

    table = ParityTable("qwen")
    for name in sorted(set(reference) - INPUTS):
        if name in gradients:
            table.add_gradient(name, gradients.pop(name), reference[name])
        else:
            table.add(name, got.pop(name), reference[name])
    assert not gradients and not got

    long_config = Config.from_published(json.loads((TINY / "config_seq48.json").read_text()))
    assert dataclasses.replace(long_config, seq_length=2048) == published.config
    long = dict(np.load(TINY / "ref_long.npz"))
    got = language_outputs(Model.build(long_config, published.tensors).llm, long, visual)
    assert set(got) == set(long) - INPUTS
    for name, array in got.items():
        table.add(f"long: {name}", array, long[name])
    table.write()
    table.check()


@needs_reference
def test_the_yardstick_matches_the_reference(published: Model, reference: dict[str, np.ndarray]):
    """The PyTorch code that the other tests trust gives the published model's arrays."""
    table = ParityTable("yardstick")
    with torch.no_grad():
        stages = oracle.vision(published.torch_weights(), torch.from_numpy(reference["pixels"][:1]), heads=4)
        for name in ("conv1", "pos_added", "ln_pre", "block0_attn", "block0"):
            table.add(f"{name}_frame0", stages[name], reference[f"{name}_frame0"])
        w = published.torch_projector()
        features = torch.from_numpy(reference["feat_T100"])
        positions = oracle.sequence(w["attn_pool.pos_embed"], 100, "grid")
        table.add(
            "align_T100", oracle.resample(w, features[None], positions, 2)["visual_out"][0], reference["align_T100"]
        )
        table.add("valuepath_T100", oracle.per_token(w, features, 2), reference["valuepath_T100"])
        for file, seq_length in (("ref.npz", 2048), ("ref_long.npz", 48)):
            ref = np.load(TINY / file)
            embeds = torch.from_numpy(published.tensors["transformer.wte.weight"][ref["long_ids"]])
            logits = oracle.decoder(published.torch_weights(), embeds, heads=4, seq_length=seq_length)
            table.add(f"long_logits_eval {file}", logits, ref["long_logits_eval"])
    table.check()


@needs_reference
def test_bfloat16_checkpoint(reference: dict[str, np.ndarray]):
    """The checkpoint of the published dtype, computed in bf16, stays near the fp32 arrays."""
    config = Config.from_published(json.loads((TINY / "ckpt_bf16" / "config.json").read_text()))
    model = Model.build(config, torch_tensors(TINY / "ckpt_bf16" / "pytorch_model.bin"), jnp.bfloat16)
    vit = encode(model.encoder, jnp.asarray(reference["pixels"][:1].transpose(0, 2, 3, 1), jnp.bfloat16))
    tokens = project(model.projector, vit, (32, 32))
    logits = forward(model.llm, model.llm.embed(jnp.asarray(reference["long_ids"]), jnp.bfloat16))
    assert vit.dtype == tokens.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    for got, want in ((tokens, reference["visual_out_frames01"][:1]), (logits, reference["long_logits_eval"])):
        difference = np.abs(np.asarray(got, np.float32) - want)
        assert difference.max() < 0.3 and difference.mean() < 0.03
