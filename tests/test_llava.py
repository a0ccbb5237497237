"""LLaVA against the reference arrays, against transformers' own classes, and at its real sizes."""

import dataclasses
import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from redvillm_jax.bases import llava
from redvillm_jax.model.base_folder import canonical_name
from redvillm_jax.model.weights import abstract_part, expected_tensors, name_table
from redvillm_jax.modules.attention import Masks
from tests.helpers import REFERENCE, ParityTable, fill, greedy, torch_tensors


def parts(config: llava.Config, tensors: dict[str, np.ndarray]) -> tuple:
    """Encoder, projector and LLM filled from published tensors."""
    tensors = {canonical_name(llava, name): array for name, array in tensors.items()}
    return tuple(
        fill(abstract_part(llava, part, config), tensors, llava.PREFIX[part])
        for part in ("encoder", "projector", "llm")
    )


def project(projector: llava.Projector, features: jax.Array) -> jax.Array:
    """Projects (B, M, D), all of it real."""
    return projector(features, jnp.ones(features.shape[:2], bool), (features.shape[1],))


def causal(attention_mask: np.ndarray) -> jax.Array:
    """(B, S) of real tokens -> (B, S, S) bool: earlier real slots are visible."""
    slots = attention_mask.shape[1]
    return jnp.asarray(np.tril(np.ones((slots, slots), bool)) & attention_mask.astype(bool)[:, None])


@jax.jit
def run_llm(llm: llava.LLM, embeds: jax.Array, position_ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Logits (B, S, vocab)."""
    return llm.logits(llm(embeds, position_ids, Masks(mask))[0])


def logits_of(llm: llava.LLM, embeds: jax.Array, attention_mask: np.ndarray | None = None) -> jax.Array:
    batch, length = embeds.shape[:2]
    attention_mask = np.ones((batch, length)) if attention_mask is None else attention_mask
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return run_llm(llm, embeds, positions, causal(attention_mask))


def with_images(llm: llava.LLM, ids: np.ndarray, image_token: int, tokens: jax.Array) -> jax.Array:
    """Embeddings of ids (B, S) whose image tokens are replaced by visual tokens (B, N, K), in order."""
    embeds = llm.embed(jnp.asarray(ids), jnp.float32)
    for row, row_ids in enumerate(ids):
        embeds = embeds.at[row, np.flatnonzero(row_ids == image_token)].set(tokens[row])
    return embeds


def loss_of(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    """The shifted mean cross-entropy over labels that are not -100."""
    kept = labels[:, 1:] != -100
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_probs, jnp.maximum(labels[:, 1:], 0)[..., None], axis=-1)[..., 0]
    return -(picked * kept).sum() / kept.sum()


# ---- the reference arrays

IMAGE_TOKEN = 300


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs the reference arrays in ../shared")
def test_every_reference_array():
    folder = REFERENCE / "llava_tiny"
    reference = np.load(folder / "ref.npz")
    used = set()

    def ref(name: str) -> np.ndarray:
        used.add(name)
        return reference[name]

    table = ParityTable("llava")
    config = llava.Config.from_published(
        {
            "text_config": {
                "vocab_size": 320,
                "hidden_size": 128,
                "intermediate_size": 176,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "rms_norm_eps": 1e-5,
            },
            "vision_config": {
                "image_size": 56,
                "patch_size": 14,
                "hidden_size": 64,
                "intermediate_size": 160,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
            },
        }
    )
    tensors = torch_tensors(folder / "orig_v15" / "pytorch_model.bin")
    encoder, mlp, llm = parts(config, tensors)
    linear_config = dataclasses.replace(config, projector="linear")
    linear_tensors = torch_tensors(folder / "orig_v1" / "pytorch_model.bin", folder / "clip" / "pytorch_model.bin")
    encoder_v1, linear, llm_v1 = parts(linear_config, linear_tensors)

    # Vision: the hidden state after a layer is the output of a tower with that feature layer.
    pixels = jnp.asarray(ref("pixels")).transpose(0, 2, 3, 1)
    table.add("clip_hidden_0", encoder.pre_layrnorm(encoder.embeddings(pixels)), ref("clip_hidden_0"))
    for layer in range(1, 5):
        tower = parts(dataclasses.replace(config, vision_feature_layer=layer - 5), tensors)[0]
        table.add(f"clip_hidden_{layer}", tower.hidden(pixels), ref(f"clip_hidden_{layer}"))
    table.add("clip_last_hidden_state", tower.hidden(pixels), ref("clip_last_hidden_state"))
    features = encoder(pixels)
    table.add("patch_features", features, ref("patch_features"))
    for v1, v15 in ((encoder_v1, encoder), (llm_v1, llm)):
        jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(v1)), nnx.to_pure_dict(nnx.state(v15)))
    images = project(mlp, features)
    table.add("mm_projected", images, ref("mm_projected"))

    # Text and pictures
    ids, mask = ref("image_ids"), ref("image_mask")
    pictures = with_images(llm, ids, IMAGE_TOKEN, images)
    image_logits = logits_of(llm, pictures, mask)
    table.add("image_logits", image_logits, ref("image_logits"))
    table.add("image_loss", loss_of(image_logits, ref("image_labels")), ref("image_loss"))
    table.add("greedy", greedy(llm, pictures[:1], ids[0, -1], 12)[0], ref("greedy"))
    text = llm.embed(jnp.asarray(ref("text_ids")), jnp.float32)
    table.add("text_logits", logits_of(llm, text), ref("text_logits"))

    # Video
    over_time, over_space = features.mean(0), features.mean(1)
    table.add("mean_over_time", over_time, ref("mean_over_time"))
    table.add("mean_over_space", over_space, ref("mean_over_space"))
    table.add("lin_mean_over_time", project(linear, over_time[None])[0], ref("lin_mean_over_time"))
    table.add("lin_mean_over_space", project(linear, over_space[None])[0], ref("lin_mean_over_space"))
    before, after = (llm.embed(jnp.asarray(ref(f"video_{part}_ids")), jnp.float32) for part in ("prefix", "suffix"))

    def video_embeds(projectors: dict[str, llava.Projector]) -> jax.Array:
        temporal = project(projectors["gt"], over_space[None])
        spatial = project(projectors["gz"], over_time[None])
        return jnp.concatenate([before, temporal, spatial, after], axis=1)

    def compare_video(kind: str, projector: llava.Projector) -> None:
        embeds = video_embeds({"gt": projector, "gz": projector})
        table.add(f"video_{kind}_embeds", embeds, ref(f"video_{kind}_embeds"))
        table.add(f"video_{kind}_logits", logits_of(llm, embeds), ref(f"video_{kind}_logits"))
        graphdef, weights = nnx.split(projector)
        labels = ref(f"grad_{kind}_labels")

        def video_loss(weights: dict[str, nnx.State]) -> jax.Array:
            projectors = {name: nnx.merge(graphdef, state) for name, state in weights.items()}
            return loss_of(logits_of(llm, video_embeds(projectors)), labels)

        loss, gradients = jax.value_and_grad(video_loss)({"gt": weights, "gz": weights})
        table.add(f"grad_{kind}_loss", loss, ref(f"grad_{kind}_loss"))
        for name, state in gradients.items():
            for path, leaf in nnx.to_flat_state(state):
                key = f"grad_{kind}_{name}.{'.'.join(path).removeprefix('linear.')}"
                table.add_gradient(key, leaf[...], ref(key))

    compare_video("lin", linear)
    compare_video("mlp", mlp)

    table.write()
    table.check()
    assert used == set(reference.files)


# ---- transformers' own LLaVA


def tiny_transformers(**text):
    """A random LLaVA of transformers with every weight, bias and norm off its initial value."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 96,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-3,
        }
        | text,
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 24,
            "patch_size": 8,
            "layer_norm_eps": 1e-3,
        },
        image_token_index=95,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


MISTRAL = {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 4}


@pytest.mark.parametrize("text", [{}, MISTRAL | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}])
def test_transformers_llava_built_here(text):
    model = tiny_transformers(**text)
    config = llava.Config.from_published(model.config.to_dict())
    encoder, projector, llm = parts(config, {name: t.numpy() for name, t in model.state_dict().items()})
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 3, 24, 24)).astype(np.float32)
    ids = rng.integers(0, 95, (2, 20))
    ids[0, 3:12] = ids[1, 5:14] = 95  # nine patches each
    with torch.no_grad():
        tower = model.model.vision_tower(torch.from_numpy(pixels), output_hidden_states=True)
        want_features = tower.hidden_states[-2][:, 1:]
        want_tokens = model.model.multi_modal_projector(want_features)
        inputs = {"input_ids": torch.from_numpy(ids), "pixel_values": torch.from_numpy(pixels)}
        generated = model.generate(
            **{name: value[:1] for name, value in inputs.items()}, max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    labels = np.where(np.arange(20) < 16, -100, ids)
    want = model(**inputs, labels=torch.from_numpy(labels))
    want.loss.backward()
    features = encoder(jnp.asarray(pixels).transpose(0, 2, 3, 1))
    np.testing.assert_allclose(features, want_features, atol=1e-4)
    tokens = project(projector, features)
    np.testing.assert_allclose(tokens, want_tokens, atol=1e-4)
    embeds = with_images(llm, ids, 95, tokens)
    np.testing.assert_allclose(logits_of(llm, embeds), want.logits.detach(), atol=1e-4)

    graphdef, weights = nnx.split(projector)

    def loss(weights: nnx.State) -> jax.Array:
        images = project(nnx.merge(graphdef, weights), features)
        return loss_of(logits_of(llm, with_images(llm, ids, 95, images)), labels)

    value, gradients = jax.value_and_grad(loss)(weights)
    np.testing.assert_allclose(value, want.loss.detach(), atol=1e-4)
    published = dict(model.named_parameters())
    table = ParityTable("transformers_llava")
    for name, leaf in name_table(projector, llava.PREFIX["projector"]).items():
        wanted = next(p for key, p in published.items() if canonical_name(llava, key) == name)
        table.add_gradient(name, dict(nnx.to_flat_state(gradients))[leaf.path][...], wanted.grad)
    assert len(table.rows) == 4
    table.check()

    want_ids = generated[0, -8:].tolist()
    assert len(set(want_ids)) > 1  # not one id over and over
    assert greedy(llm, embeds[:1], ids[0, -1], 8)[0][0].tolist() == want_ids


# ---- real sizes

SIZES = {  # facts of the published models: all parameters, and those of the vision tower, the projector and the LLM
    "v1-7b": (7_045_818_368, 303_179_776, 4_198_400, 6_738_440_192),
    "v1.5-7b-hf": (7_063_427_072, 303_507_456, 20_979_712, 6_738_939_904),
}


def published_shapes(config: llava.Config) -> dict[str, tuple[int, ...]]:
    """Everything that a model of this size is published with, under canonical names."""
    loaded = {name: leaf.shape for name, leaf in expected_tensors(llava, config).items()}
    assert not loaded.keys() & llava.unused(config).keys()
    return loaded | llava.unused(config)


@pytest.mark.parametrize("size", SIZES)
def test_real_sizes_have_the_published_parameter_counts(size):
    shapes = published_shapes(llava.SIZES[size])
    counts = [sum(int(np.prod(s)) for n, s in shapes.items() if n.startswith(p)) for p in llava.PREFIX.values()]
    assert (sum(counts), *counts) == SIZES[size]


def meta_shapes(models: dict[str, torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    return {
        canonical_name(llava, prefix + name): tuple(tensor.shape)
        for prefix, model in models.items()
        for name, tensor in model.state_dict().items()
    }


def test_real_v15_has_the_names_and_shapes_of_transformers():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    published = {"model_type": "llava", "text_config": text, "vision_feature_layer": -2}
    config = llava.Config.from_published(published)
    assert config == llava.SIZES["v1.5-7b-hf"]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(**published))
    assert meta_shapes({"": model}) == published_shapes(config)
    assert config == llava.Config.from_published(model.config.to_dict())


def test_real_v1_has_the_names_and_shapes_of_transformers():
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    published = {  # LLaVA-Lightning-7B-v1-1, of which the wrong ids do no harm
        "model_type": "llava",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "vocab_size": 32003,
        "mm_hidden_size": 1024,
        "mm_vision_tower": "openai/clip-vit-large-patch14",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = llava.Config.from_published(published)
    assert config == llava.SIZES["v1-7b"]
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    with torch.device("meta"):
        projector = torch.nn.Linear(1024, 4096)
        clip = CLIPVisionModel(vision)
        llm = LlamaForCausalLM(LlamaConfig(vocab_size=32003))
    models = {"vision_model.": clip, "model.mm_projector.": projector, "": llm}
    assert meta_shapes(models) == published_shapes(config)
    assert llava.Config.from_published(published, vision.to_dict()) == config


def test_original_v15_config():
    published = {
        "model_type": "llava_llama",
        "hidden_size": 4096,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
    }
    assert llava.Config.from_published(published) == llava.SIZES["v1.5-7b"]


IDENTITIES = {  # parts of fingerprints of bases that runs have recorded
    "v1-7b": "fe9e20c595304e17",
    "v1.5-7b": "9437de281916043a",
    "tiny": "20af1fc47b20237e",
}


@pytest.mark.parametrize("size", IDENTITIES)
def test_a_fingerprint_says_nothing_of_what_llava_1_lacks(size):
    config = llava.SIZES[size]

    def digest(config: llava.Config) -> str:
        return hashlib.sha256(json.dumps(llava.identity(config), sort_keys=True).encode()).hexdigest()

    assert digest(config).startswith(IDENTITIES[size])
    changes = {"head_dim": 8, "qkv_bias": True, "image_newline": True, "image_grid_pinpoints": ((336, 672),)}
    changes |= {"rope_theta": 5.0, "tie_word_embeddings": True, "sliding_window": 7, "layer_kinds": ("window",)}
    others = [digest(dataclasses.replace(config, **{name: value})) for name, value in changes.items()]
    assert len({digest(config), *others}) == 1 + len(changes)


def test_every_weight_has_a_sharding_rule():
    for size in llava.SIZES.values():
        for name in expected_tensors(llava, size):
            assert any(re.search(pattern, name) for pattern, _ in llava.SHARDING), name
