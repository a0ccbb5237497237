"""LLaVA-NeXT, LLaVA on other decoders and LLaVA-OneVision against transformers' classes, in files and at real sizes."""

import dataclasses
import functools
import json
import re
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from conversion.from_torch import from_torch
from conversion.to_torch import to_torch
from data_pipeline.common.errors import UserError
from data_pipeline.media.resizing import resizer
from redvillm_jax.bases import llava, llava_onevision
from redvillm_jax.model.base_folder import Base, canonical_name, open_base
from redvillm_jax.model.weights import abstract_part, expected_tensors, name_table
from redvillm_jax.modules.attention import Masks
from redvillm_jax.modules.layers import normalize
from redvillm_jax.modules.llama_fields import QWEN2
from redvillm_jax.modules.llava_fields import NEXT
from tests.helpers import ParityTable, fill, greedy
from tests.test_llava import causal, logits_of, loss_of, with_images

IMAGE = 95  # the image token, the last id
PINPOINTS = [[24, 48], [48, 24], [48, 48]]
TEXT = {
    "vocab_size": IMAGE + 1,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
    "layer_norm_eps": 1e-3,
}
SIGLIP = CLIP | {
    "model_type": "siglip_vision_model",
    "num_hidden_layers": 2,
    "image_size": 26,
    "vision_use_head": False,
}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}
MISTRAL = {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6}
QWEN = {"model_type": "qwen2", "rope_theta": 1e6}
TILED = {"image_token_index": IMAGE, "image_grid_pinpoints": PINPOINTS}
SI_TILED = TILED | {"image_grid_pinpoints": [[26, 26], [26, 52]]}
CASES = {  # name -> (our family, transformers' class, its config)
    "next mistral": (
        llava,
        LlavaNextForConditionalGeneration,
        LlavaNextConfig(text_config=TEXT | MISTRAL, vision_config=CLIP, **TILED),
    ),
    "llava llama3": (
        llava,
        LlavaForConditionalGeneration,
        LlavaConfig(
            text_config=TEXT | {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "head_dim": 16},
            vision_config=CLIP,
            image_token_index=IMAGE,
        ),
    ),
    "llava qwen2 tied": (
        llava,
        LlavaForConditionalGeneration,
        LlavaConfig(text_config=TEXT | QWEN, vision_config=CLIP, tie_word_embeddings=True, image_token_index=IMAGE),
    ),
    "onevision tied": (
        llava_onevision,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionConfig(text_config=TEXT | QWEN | {"tie_word_embeddings": True}, vision_config=SIGLIP, **SI_TILED),
    ),
    "onevision head": (
        llava_onevision,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionConfig(
            text_config=TEXT | QWEN,
            vision_config=SIGLIP | {"vision_use_head": True},
            vision_feature_layer=-2,
            **SI_TILED,
        ),
    ),
}


@functools.cache
def random_model(case: str) -> PreTrainedModel:
    """transformers' model with every weight, bias and norm off its initial value."""
    torch.manual_seed(0)
    _, kind, config = CASES[case]
    model = kind(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def write_published(case: str, folder: Path, names: str) -> Path:
    """A published folder. names: "disk", as transformers writes them; "module", as its classes have them."""
    model = random_model(case)
    model.save_pretrained(folder)
    if names == "module":
        tied = [name for name in model.all_tied_weights_keys]
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def family_name(family: ModuleType) -> str:
    return family.__name__.split(".")[-1]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Returns the base of a case's published folder."""

    @functools.cache
    def make(case: str, names: str = "disk") -> Base:
        folder = tmp_path_factory.mktemp("case")
        source = write_published(case, folder / "published", names)
        from_torch(family_name(CASES[case][0]), source, folder / "base", tokenizer=False)
        return open_base(folder / "base")

    return make


def parts(base: Base, **changes) -> tuple:
    """Encoder, projector and LLM of a base, with a changed config."""
    config = dataclasses.replace(base.config, **changes)
    tensors = {name: base.tensors[published][:] for name, published in base.published.items()}
    return tuple(
        fill(abstract_part(base.module, part, config), tensors, base.module.PREFIX[part])
        for part in ("encoder", "projector", "llm")
    )


@jax.jit
def project(projector: nnx.Module, features: jax.Array) -> jax.Array:
    return projector(features, jnp.ones(features.shape[:2], bool), (features.shape[1],))


@jax.jit
def run_body(llm: nnx.Module, embeds: jax.Array, position_ids: jax.Array, masks: Masks) -> jax.Array:
    """Hidden states behind the last norm: (B, S, K)."""
    return llm(embeds, position_ids, masks)[0]


# ---- transformers' own classes


ORDINARY = ("next mistral", "onevision tied")
EACH = [case if case in ORDINARY else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", EACH)
def test_every_stage_is_transformers(case, converted):
    family, model, base = CASES[case][0], random_model(case), converted(case)
    encoder, projector, llm = parts(base)
    table = ParityTable(case.replace(" ", "_"))
    rng = np.random.default_rng(0)
    size, count = base.config.image_size, base.config.num_patches
    pixels = rng.normal(size=(2, 3, size, size)).astype(np.float32)
    ids = rng.integers(0, IMAGE, (2, 12 + count))
    for row, start in enumerate((3, 6)):
        ids[row, start : start + count] = IMAGE
    labels = np.where(np.arange(ids.shape[1]) < ids.shape[1] - 5, -100, ids)

    body = model.model
    with torch.no_grad():
        states = body.vision_tower(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
        want_features = states[model.config.vision_feature_layer][:, 1 if family is llava else 0 :]
    want_tokens = body.multi_modal_projector(want_features)
    mask = torch.from_numpy(ids == IMAGE)[..., None]
    embeds = body.language_model.embed_tokens(torch.from_numpy(ids)).detach()
    embeds = embeds.masked_scatter(mask.expand_as(embeds), want_tokens)
    want = model(inputs_embeds=embeds, labels=torch.from_numpy(labels), output_hidden_states=True)
    want.loss.backward()
    with torch.no_grad():
        generated = model.generate(inputs_embeds=embeds[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)

    images = jnp.asarray(pixels).transpose(0, 2, 3, 1)
    first = encoder.embeddings(images)
    table.add("embeddings", encoder.pre_layrnorm(first) if family is llava else first, states[0])
    features = jax.jit(lambda encoder, images: encoder(images))(encoder, images)
    table.add("features", features, want_features)
    tokens = project(projector, features)
    table.add("tokens", tokens, want_tokens.detach())
    ours = with_images(llm, ids, IMAGE, tokens)
    table.add("merged embeddings", ours, want.hidden_states[0].detach())
    slots = ids.shape[1]
    positions = jnp.broadcast_to(jnp.arange(slots), ids.shape)
    masks = Masks(causal(np.ones(ids.shape)))
    with torch.no_grad():
        first = body.language_model.norm(want.hidden_states[1])
    table.add(
        "decoder layer 1, normalised", run_body(parts(base, num_hidden_layers=1)[2], ours, positions, masks), first
    )
    table.add("decoder", run_body(llm, ours, positions, masks), want.hidden_states[-1].detach())
    table.add("logits", logits_of(llm, ours), want.logits.detach())

    graphdef, weights = nnx.split(projector)

    @jax.jit
    @jax.value_and_grad
    def loss(weights: nnx.State) -> jax.Array:
        images = project(nnx.merge(graphdef, weights), features)
        return loss_of(logits_of(llm, with_images(llm, ids, IMAGE, images)), labels)

    value, gradients = loss(weights)
    table.add("loss", value, want.loss.detach())
    wanted = {canonical_name(family, name): weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    for name, leaf in name_table(projector, family.PREFIX["projector"]).items():
        table.add_gradient(f"gradient of {name}", dict(nnx.to_flat_state(gradients))[leaf.path][...], wanted[name])
    got_ids, _ = greedy(llm, ours[:1], ids[0, -1], 8)
    table.add("greedy ids", got_ids[0], generated[0].numpy())
    assert len(set(got_ids[0].tolist())) > 1  # not one id over and over
    table.write()
    table.check()


@pytest.mark.slow  # test_llama.py has the same of the decoder with each of its options
@pytest.mark.parametrize("case", ORDINARY)
def test_cached_decoding_is_a_full_pass(case, converted):
    llm = parts(converted(case))[2]
    ids = np.random.default_rng(1).integers(0, IMAGE, (2, 20))
    embeds = llm.embed(jnp.asarray(ids), jnp.float32)
    whole = logits_of(llm, embeds)
    cache = llm.init_cache(2, 20, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(20), ids.shape)
    rows = Masks(causal(np.ones(ids.shape)))
    step = jax.jit(lambda llm, part, at, mask, cache, i: llm(part, at, mask, cache=cache, cache_index=i))
    found = []
    for start, end in ((0, 9), *((i, i + 1) for i in range(9, 20))):
        mask = jax.tree.map(lambda m, start=start, end=end: m[:, start:end], rows)
        hidden, cache = step(llm, embeds[:, start:end], positions[:, start:end], mask, cache, start)
        found.append(llm.logits(hidden))
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, atol=1e-4)


# ---- files


@pytest.mark.parametrize("case", ["next mistral", "llava qwen2 tied", "onevision tied", "onevision head"])
@pytest.mark.parametrize("names", ["disk", "module"])
def test_a_folder_comes_back_bit_for_bit(case, names, converted, tmp_path):
    base = converted(case, names)
    source = Path(json.loads((base.path / "base.json").read_text())["source"])
    to_torch(base.path, tmp_path / "export", full=True)
    want, got = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "export"))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
    prefix = {"disk": "language_model.model.", "module": "model.language_model."}[names]
    assert any(name.startswith(prefix) for name in want)
    assert base.fingerprint == converted(case, "disk").fingerprint
    config = base.config
    loaded = expected_tensors(base.module, config)
    assert ("language_model.image_newline" in loaded) == ("llava " not in case)
    assert ("language_model.lm_head.weight" in loaded) == ("tied" not in case)
    for name in loaded:
        assert any(re.search(pattern, name) for pattern, _ in base.module.SHARDING), name


def test_the_original_form_is_read(converted, tmp_path):
    """The original repository's names and config; its pairs are (width, height)."""
    base = converted("next mistral")
    tensors = {name: torch.from_numpy(base.tensors[published][:]) for name, published in base.published.items()}
    original = (
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("language_model.image_newline", "model.image_newline"),
        ("language_model.", ""),
    )

    def rename(name: str) -> str:
        new, old = next(pair for pair in original if name.startswith(pair[0]))
        return old + name.removeprefix(new)

    source = tmp_path / "llava-v1.6-mistral"
    (source / "vision").mkdir(parents=True)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, source / "model.safetensors")
    (source / "vision" / "config.json").write_text(json.dumps(CLIP))
    transform = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 24, "crop_size": 24, "resample": 3}
    (source / "vision" / "preprocessor_config.json").write_text(json.dumps(transform | {"do_center_crop": True}))
    said = {name: value for name, value in (TEXT | MISTRAL).items() if name != "model_type"} | {
        "model_type": "llava_mistral",
        "mm_vision_tower": "openai/clip-vit-tiny",
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [pair[::-1] for pair in PINPOINTS],
        "image_crop_resolution": 224,
        "tie_word_embeddings": False,
    }
    (source / "config.json").write_text(json.dumps(said))
    again = from_torch("llava", source, tmp_path / "base", tokenizer=False)
    assert again["fingerprint"] == base.fingerprint
    padded = llava.Config.from_published(said | {"image_aspect_ratio": "pad"}, CLIP)  # as LLaVA-Med
    assert padded.image_newline and padded.image_grid_pinpoints == () and llava.picture_fit(padded) == "pad"
    for change, words in (
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints is missing"),
        ({"image_grid_pinpoints": [[24, 50]]}, r"image_grid_pinpoints has \[50, 24\]"),
        ({"sliding_window": "all"}, "sliding_window"),
        ({"s2": True}, "not known: s2"),
    ):
        with pytest.raises(UserError, match=words):
            llava.Config.from_published(said | change, CLIP)


@pytest.mark.parametrize("case", ["next mistral", "onevision tied"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_grid_pinpoints", [[24, 26]]),
        ("image_grid_pinpoints", "(1x1),...,(6x6)"),
        ("image_grid_pinpoints", []),
        ("use_image_newline_parameter", False),
        ("vision_feature_select_strategy", None),
        ("vision_feature_layer", [-1, -2]),
        ("projector_hidden_act", "relu"),
        ("vision_aspect_ratio", "square"),
        ("a_new_field", 1),
    ],
)
def test_a_field_that_changes_the_computation_is_refused(case, field, value):
    family, _, config = CASES[case]
    config = json.loads(json.dumps(config.to_dict()))
    family.Config.from_published(config)
    with pytest.raises(UserError, match=field):
        family.Config.from_published(config | {field: value})


# ---- frames


@pytest.mark.parametrize(
    ("family", "size", "processor"),
    [
        (llava, "next-mistral-7b", LlavaNextImageProcessorPil),
        (llava_onevision, "si-7b", LlavaOnevisionImageProcessorPil),
    ],
)
def test_a_frame_is_the_processor_s_base_view(family, size, processor):
    config = family.SIZES[size]
    frame = np.random.default_rng(0).integers(0, 256, (37, 90, 3)).astype(np.uint8)
    side = {"height": config.image_size, "width": config.image_size}
    made = processor(size=side, crop_size=side, image_mean=family.MEAN, image_std=family.STD)
    read = family.read_image_processor(config, json.loads(made.to_json_string()), "preprocessor_config.json")
    assert read == config
    want = made(Image.fromarray(frame), return_tensors="np").pixel_values[0][0]
    square = resizer(family.frame_fit(config))(frame, config.image_size)
    got = normalize(square, family.MEAN, family.STD, jnp.float32)
    np.testing.assert_allclose(np.asarray(got).transpose(2, 0, 1), want, atol=1e-5)


# ---- real sizes

CLIP_336 = {"model_type": "clip_vision_model"}
REAL = {  # size -> (family, class, config, parameters)
    "next-mistral-7b": (
        llava,
        LlavaNextForConditionalGeneration,
        LlavaNextConfig(
            text_config=MISTRAL
            | {
                "vocab_size": 32064,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-5,
            }
        ),
        7_566_747_648,
    ),
    "next-vicuna-7b": (
        llava,
        LlavaNextForConditionalGeneration,
        LlavaNextConfig(
            text_config={"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        ),
        7_063_431_168,
    ),
    "next-llama3-8b": (
        llava,
        LlavaNextForConditionalGeneration,
        LlavaNextConfig(
            text_config={
                "model_type": "llama",
                "vocab_size": 128320,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
            }
        ),
        8_355_276_800,
    ),
    "si-0.5b": (
        llava_onevision,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionConfig(
            text_config=QWEN
            | {
                "vocab_size": 152000,
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "max_window_layers": 24,
                "sliding_window": 32768,
                "tie_word_embeddings": True,
            }
        ),
        893_675_552,
    ),
    "si-7b": (
        llava_onevision,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionConfig(
            text_config=QWEN
            | {
                "vocab_size": 152128,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
            }
        ),
        8_030_807_584,
    ),
}


@pytest.mark.parametrize("size", REAL)
def test_real_sizes_have_the_names_and_shapes_of_transformers(size):
    family, kind, config, count = REAL[size]
    published = json.loads(json.dumps(config.to_dict()))
    ours = family.Config.from_published(published)
    assert ours == family.SIZES[size]
    with torch.device("meta"):
        model = kind(config)
    tied = ["lm_head.weight"] if ours.tie_word_embeddings else []
    want = {canonical_name(family, n): tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
    loaded = {name: leaf.shape for name, leaf in expected_tensors(family, ours).items()}
    assert loaded | family.unused(ours) == want
    assert sum(int(np.prod(shape)) for shape in want.values()) == count


NEXT_HF = {  # llava-hf/llava-v1.6-mistral-7b-hf's
    "architectures": ["LlavaNextForConditionalGeneration"],
    "ignore_index": -100,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_token_index": 32000,
    "model_type": "llava_next",
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
        "architectures": ["MistralForCausalLM"],
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    },
    "torch_dtype": "float16",
    "transformers_version": "4.39.0.dev0",
    "use_image_newline_parameter": True,
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


def test_the_config_that_transformers_4_wrote_is_read():
    assert llava.Config.from_published(NEXT_HF) == llava.SIZES["next-mistral-7b"]


def test_every_field_that_transformers_writes_is_in_a_table():
    assert not LlavaNextConfig().to_dict().keys() - NEXT.keys()
    assert not LlavaOnevisionConfig().to_dict().keys() - llava_onevision.ONEVISION.keys()
    assert not LlavaOnevisionConfig().text_config.to_dict().keys() - QWEN2.keys()
