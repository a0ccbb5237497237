"""Qwen-VL against numbers of the published code: qwen_vl_golden.npz, on weights that a numpy seed gives.

The weights take the product's way: published names in a safetensors file, `from_torch`, `open_base`, `load_part`.
"""

import dataclasses
import json
import math
import zlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import save_file

from conversion import from_torch
from redvillm_jax.bases import qwen_vl
from redvillm_jax.model.base_folder import Base, load_part, open_base
from redvillm_jax.model.video_llm import VideoLLM
from redvillm_jax.modules.attention import Masks
from redvillm_jax.runtime.sharding import make_mesh, weight_sharding
from redvillm_jax.video import red_villm
from tests.helpers import ParityTable, greedy

SEED = 20261121
SIZE, VISUAL = 128, slice(5, 261)  # pixels of a picture's side; where its tokens stand in image_ids
LONG = 48  # the trained length with which 120 tokens are long

CONFIG = {  # as published, with the sizes of a tiny model
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "kv_channels": 64,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "torch_dtype": "float32",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": False,
    "use_logn_attn": True,
    "visual": {
        "heads": 4,
        "image_size": SIZE,
        "image_start_id": 300,
        "layers": 2,
        "mlp_ratio": 4.9231,
        "output_dim": 256,
        "patch_size": 4,
        "width": 64,
    },
    "vocab_size": 400,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """The published names and shapes of a checkpoint with that config."""
    width, hidden, mlp, vocabulary = 64, 256, 192, 400
    vision_mlp = int(width * 4.9231)

    def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    found = {"transformer.wte.weight": (vocabulary, hidden)}
    for i in range(2):
        block = f"transformer.h.{i}"
        found |= {f"{block}.ln_1.weight": (hidden,), f"{block}.ln_2.weight": (hidden,)}
        found |= linear(f"{block}.attn.c_attn", hidden, 3 * hidden) | {f"{block}.attn.c_proj.weight": (hidden, hidden)}
        found |= {f"{block}.mlp.{name}.weight": (mlp, hidden) for name in ("w1", "w2")}
        found |= {f"{block}.mlp.c_proj.weight": (hidden, mlp)}
    found |= {"transformer.ln_f.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    visual = "transformer.visual"
    found |= {f"{visual}.conv1.weight": (width, 3, 4, 4), f"{visual}.positional_embedding": (256, width)}
    found |= norm(f"{visual}.ln_pre", width)
    for i in range(2):
        block = f"{visual}.transformer.resblocks.{i}"
        found |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
        found |= linear(f"{block}.attn.in_proj", width, 3 * width) | linear(f"{block}.attn.out_proj", width, width)
        found |= linear(f"{block}.mlp.c_fc", width, vision_mlp) | linear(f"{block}.mlp.c_proj", vision_mlp, width)
    pool = f"{visual}.attn_pool"
    found |= {f"{pool}.query": (256, hidden), f"{pool}.pos_embed": (256, hidden)}
    found |= {f"{pool}.kv_proj.weight": (hidden, width)}
    found |= {f"{pool}.attn.in_proj_weight": (3 * hidden, hidden), f"{pool}.attn.in_proj_bias": (3 * hidden,)}
    found |= linear(f"{pool}.attn.out_proj", hidden, hidden)
    found |= norm(f"{pool}.ln_q", hidden) | norm(f"{pool}.ln_kv", hidden) | norm(f"{visual}.ln_post", hidden)
    return found | {f"{visual}.proj": (hidden, hidden)}


def seeded(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights that the published code computed with."""
    x = np.random.default_rng([SEED, zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32)
    if ".ln_" in name and name.endswith("weight"):
        return (1 + 0.1 * x).astype(np.float32)
    return (x * (0.05 if len(shape) < 2 else 1.5 / math.sqrt(math.prod(shape[1:])))).astype(np.float32)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(Path(__file__).with_name("qwen_vl_golden.npz")))


@pytest.fixture(scope="module")
def base(golden, tmp_path_factory) -> Base:
    source, out = tmp_path_factory.mktemp("golden_published"), tmp_path_factory.mktemp("golden") / "base"
    tensors = {name: seeded(name, shape) for name, shape in shapes().items()}
    tensors["transformer.visual.attn_pool.pos_embed"] = golden["pos_embed"]
    assert len(tensors) == 61
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(CONFIG))
    from_torch.main(["--family=qwen_vl", f"--source={source}", f"--out={out}", "--without_tokenizer"])
    return open_base(out)


def load(base: Base, **changes: int) -> VideoLLM:
    """The image LLM in fp32, with some numbers of its config changed."""
    base = dataclasses.replace(base, config=dataclasses.replace(base.config, **changes))
    place = weight_sharding(make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]), qwen_vl.SHARDING)
    encoder, projector, llm = (
        load_part(base, part, dtype=jnp.float32, sharding=place) for part in ("encoder", "projector", "llm")
    )
    return VideoLLM(
        base.module, base.config, red_villm.Video(1), encoder=encoder, projectors={"spatial": projector}, llm=llm
    )


@pytest.fixture(scope="module")
def model(base) -> VideoLLM:
    return load(base)


@partial(jax.jit, static_argnames="last")
def logits(model: VideoLLM, embeds: jax.Array, *, last: int) -> jax.Array:
    """The logits at the last positions, as the published code computes them in eval mode."""
    batch, length = embeds.shape[:2]
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    hidden, _ = model.llm(embeds, positions, Masks(mask), context_length=jnp.full(batch, length))
    return model.llm.logits(hidden[:, -last:])


def text(model: VideoLLM, ids: np.ndarray) -> jax.Array:
    return model.llm.embed(jnp.asarray(ids), jnp.float32)


def test_text(golden, model):
    ids = golden["text_ids"]
    table = ParityTable("golden_text")
    table.add("text_logits", logits(model, text(model, ids), last=4), golden["text_logits"])
    got, _ = greedy(model.llm, text(model, ids[:1]), ids[0, -1], 16)
    table.add("greedy_text", got[0], golden["greedy_text"])
    table.check()


def test_text_beyond_the_trained_length(golden, base):
    """Dynamic NTK and log-n scaling act."""
    long, ids = load(base, seq_length=LONG), golden["long_ids"]
    table = ParityTable("golden_long")
    table.add("long_logits", logits(long, text(long, ids), last=4), golden["long_logits"])
    got, _ = greedy(long.llm, text(long, ids), ids[0, -1], 8)
    table.add("greedy_long", got[0], golden["greedy_long"])
    table.check()


def test_pictures_and_their_gradients(golden, model):
    ids, labels = golden["image_ids"], jnp.asarray(golden["image_ids"][:, -6:])
    pictures = np.random.default_rng(SEED).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    graphdef, projectors, frozen = nnx.split(model, lambda path, _: path[0] == "projectors", ...)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(projectors, frozen):
        model = nnx.merge(graphdef, projectors, frozen)
        tokens = model.picture_tokens(jnp.asarray(pictures), jnp.float32)
        embeds = text(model, ids).at[:, VISUAL].set(tokens)
        found = logits(model, embeds, last=7)
        return optax.softmax_cross_entropy_with_integer_labels(found[:, :-1], labels).mean(), (tokens, found[:, -4:])

    (loss, (tokens, found)), gradients = run(projectors, frozen)
    trained = gradients["projectors"]["spatial"]
    table = ParityTable("golden_pictures")
    table.add("visual_tokens", tokens[:, ::16], golden["visual_tokens"])
    table.add("image_logits", found, golden["image_logits"])
    table.add("image_loss", loss, golden["image_loss"])
    table.add_gradient("grad_proj", trained["proj"][::32], golden["grad_proj"])
    table.add_gradient("grad_kv_proj", trained["attn_pool"]["kv_proj"]["weight"][::32], golden["grad_kv_proj"])
    table.add_gradient("grad_ln_post_weight", trained["ln_post"]["weight"][...], golden["grad_ln_post_weight"])
    table.check()
