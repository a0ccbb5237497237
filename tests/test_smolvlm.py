"""SmolVLM against transformers' Idefics3: every stage, gradients, decoding, files, prompts, and the real sizes."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import repeat
from flax import nnx
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, SmolVLMConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector, Idefics3VisionEmbeddings
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from conversion.from_torch import from_torch
from conversion.to_torch import to_torch
from data_pipeline.common.errors import UserError
from redvillm_jax.bases import smolvlm
from redvillm_jax.model.base_folder import canonical_name, open_base
from redvillm_jax.model.weights import abstract_part, expected_tensors, name_table
from redvillm_jax.modules.hf_tokenizer import HfTokenizer
from tests.helpers import ParityTable, fill, greedy
from tests.test_llava import logits_of, loss_of, with_images
from tests.tiny_bases import WRITERS

IMAGE_TOKEN = 95
TEXT = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"model_type": "llama", "num_key_value_heads": 2, "rms_norm_eps": 1e-3, "max_position_embeddings": 256}
VISION = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 2}
CASES = {  # image size, patch size, scale, tied
    "as 256m": (24, 3, 4, False),
    "tied, border without patch, odd positions": (77, 3, 5, True),
}


def published_config(image_size: int, patch_size: int, scale: int, tied: bool) -> Idefics3Config:
    return Idefics3Config(
        text_config=TEXT,
        vision_config=VISION | {"image_size": image_size, "patch_size": patch_size},
        scale_factor=scale,
        tie_word_embeddings=tied,
        image_token_id=IMAGE_TOKEN,
        attn_implementation="eager",
    )


def random_model(config: Idefics3Config) -> Idefics3ForConditionalGeneration:
    """A random model with every weight, bias and norm off its initial value."""
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def parts(folder: Path) -> tuple[smolvlm.Config, smolvlm.Encoder, smolvlm.Projector, smolvlm.LLM]:
    """Config, encoder, projector and LLM of a base folder, in fp32."""
    base = open_base(folder)
    tensors = {canonical_name(smolvlm, name): array for name, array in load_file(folder / "model.safetensors").items()}
    modules = (
        fill(abstract_part(smolvlm, part, base.config), tensors, smolvlm.PREFIX[part])
        for part in ("encoder", "projector", "llm")
    )
    return base.config, *modules


@functools.partial(jax.jit, static_argnums=2)
def project(projector: smolvlm.Projector, features: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    return projector(features, jnp.ones(features.shape[:2], bool), grid)


# ---- transformers' own model


@pytest.mark.parametrize("case", CASES, ids=["256m", "tied"])
def test_a_published_folder_computes_what_transformers_computes(case, tmp_path):
    model = random_model(published_config(*CASES[case]))
    model.save_pretrained(tmp_path / "published")
    from_torch("smolvlm", tmp_path / "published", tmp_path / "base", tokenizer=False)
    config, encoder, projector, llm = parts(tmp_path / "base")
    table = ParityTable(f"smolvlm_{'tied' if CASES[case][3] else '256m'}")
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 3, config.image_size, config.image_size)).astype(np.float32)
    ids = rng.integers(0, IMAGE_TOKEN, (2, 10 + config.num_image_tokens))
    for row, start in enumerate((3, 6)):
        ids[row, start : start + config.num_image_tokens] = IMAGE_TOKEN

    vision = model.model.vision_model
    inputs = {"input_ids": torch.from_numpy(ids), "pixel_values": torch.from_numpy(pixels)[:, None]}
    with torch.no_grad():
        states = vision(torch.from_numpy(pixels), output_hidden_states=True)
        want_tokens = model.model.connector(states.last_hidden_state)
        generated = model.generate(
            **{name: value[:1] for name, value in inputs.items()}, max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    labels = np.where(np.arange(ids.shape[1]) < ids.shape[1] - 4, -100, ids)
    want = model(**inputs, labels=torch.from_numpy(labels), output_hidden_states=True)
    want.loss.backward()

    images = jnp.asarray(pixels).transpose(0, 2, 3, 1)
    patches, features = jax.jit(lambda encoder, images: (encoder.embeddings(images), encoder(images)))(encoder, images)
    table.add("embeddings", patches, states.hidden_states[0])
    table.add("features", features, states.last_hidden_state)
    tokens = project(projector, features, config.grid)
    table.add("tokens", tokens, want_tokens)
    embeds = with_images(llm, ids, IMAGE_TOKEN, tokens)
    table.add("llm input", embeds, want.hidden_states[0].detach())
    table.add("logits", logits_of(llm, embeds), want.logits.detach())

    graphdef, weights = nnx.split(projector)

    @jax.jit
    @jax.value_and_grad
    def loss(weights: nnx.State) -> jax.Array:
        images = project(nnx.merge(graphdef, weights), features, config.grid)
        return loss_of(logits_of(llm, with_images(llm, ids, IMAGE_TOKEN, images)), labels)

    value, gradients = loss(weights)
    table.add("loss", value, want.loss.detach())
    trained = model.model.connector.modality_projection.proj.weight
    table.add_gradient("gradient of the projector", gradients["proj"]["weight"][...], trained.grad)
    got_ids, _ = greedy(llm, embeds[:1], ids[0, -1], 8)
    table.add("greedy ids", got_ids[0], generated[0, -8:].numpy())
    assert len(set(got_ids[0].tolist())) > 1  # not one id over and over
    table.write()
    table.check()


def test_positions_are_the_originals():
    for side in (*range(1, 33), 41, 43, 47, 50, 55, 61, 62, 83):
        sizes = {"hidden_size": 1, "intermediate_size": 1, "num_attention_heads": 1}
        original = Idefics3VisionEmbeddings(
            Idefics3Config(vision_config=sizes | {"image_size": side, "patch_size": 1}).vision_config
        )
        with torch.no_grad():
            original.patch_embedding.weight.zero_()
            original.patch_embedding.bias.zero_()
            original.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
            full = torch.ones((1, side, side), dtype=torch.bool)
            want = original(torch.zeros((1, 3, side, side)), full)[0, :, 0]
        np.testing.assert_array_equal(smolvlm.position_ids(side), want.numpy(), err_msg=f"{side} patches a side")
        if side in (26, 27, 32):  # Idefics3-8B, SmolVLM-2.2B, SmolVLM-256M and 500M
            np.testing.assert_array_equal(want, np.arange(side**2))
    assert (smolvlm.position_ids(25) != np.arange(625)).any()


@pytest.mark.parametrize(("side", "scale"), [(4, 2), (6, 3), (9, 3), (8, 4), (3, 1)])
def test_pixel_shuffle_has_the_original_s_order(side, scale):
    config = Idefics3Config(text_config=TEXT, vision_config=VISION, scale_factor=scale)
    connector = Idefics3Connector(config)
    features = np.random.default_rng(0).normal(size=(2, side**2, 32)).astype(np.float32)
    tiny = smolvlm.Config.from_published(
        config.to_dict() | {"vision_config": VISION | {"image_size": side, "patch_size": 1}}
    )
    projector = smolvlm.Projector(tiny, rngs=nnx.Rngs(0))
    projector.proj.weight[...] = jnp.asarray(connector.modality_projection.proj.weight.detach().numpy())
    with torch.no_grad():
        want = connector(torch.from_numpy(features))
    np.testing.assert_allclose(project(projector, features, (side, side)), want, atol=1e-5)
    assert projector.token_layout((side, 2 * side)) == (side // scale, 2 * side // scale)

    # a sequence: each feature as a region of equal features
    assert projector.token_layout((side**2,)) == (side**2,)
    regions = torch.from_numpy(repeat(features, "b n d -> (b n) region d", region=scale**2))
    with torch.no_grad():
        want = connector(regions).reshape(2, side**2, -1)
    np.testing.assert_allclose(project(projector, features, (side**2,)), want, atol=1e-5)


def test_a_grid_that_cannot_be_cut_into_regions_is_refused():
    projector = abstract_part(smolvlm, "projector", smolvlm.SIZES["tiny"])
    with pytest.raises(UserError, match="4 × 3 features, SmolVLM's projector needs multiples of 2"):
        projector.token_layout((4, 3))


# ---- files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_round_trip_keeps_every_bit(dtype, tmp_path):
    model = random_model(published_config(*CASES["as 256m"])).to(dtype)
    model.save_pretrained(tmp_path / "published")
    from_torch("smolvlm", tmp_path / "published", tmp_path / "base", tokenizer=False)
    to_torch(tmp_path / "base", tmp_path / "export", full=True)
    want, got = (load_torch(tmp_path / name / "model.safetensors") for name in ("published", "export"))
    assert want.keys() <= got.keys()
    for name, tensor in want.items():
        assert got[name].dtype == dtype and torch.equal(got[name].view(torch.int16), tensor.view(torch.int16)), name
    again = Idefics3ForConditionalGeneration.from_pretrained(tmp_path / "export")
    assert torch.equal(
        again.model.connector.modality_projection.proj.weight, want["model.connector.modality_projection.proj.weight"]
    )


PUBLISHED_256M = {  # as its authors publish it; 500M and 2.2B have other numbers
    "architectures": ["Idefics3ForConditionalGeneration"],
    "image_token_id": 49190,
    "model_type": "idefics3",
    "scale_factor": 4,
    "text_config": {
        "_flash_attn_2_enabled": True,
        "_name_or_path": "None",
        "architectures": ["VLlama3ForCausalLM"],
        "head_dim": 64,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "neftune_noise_alpha": 0.0,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pixel_shuffle_factor": 4,
        "qk_layer_norms": False,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "torch_dtype": "bfloat16",
        "use_resampler": False,
        "vocab_size": 49280,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0.dev0",
    "use_cache": True,
    "vision_config": {
        "hidden_size": 768,
        "image_size": 512,
        "max_image_size": {"longest_edge": 512},
        "model_type": "idefics3",
        "num_attention_heads": 12,
        "patch_size": 16,
        "size": {"longest_edge": 2048},
        "tie_word_embeddings": False,
        "use_base_siglip": False,
    },
    "vocab_size": 49280,
}
OTHERS = {  # changes of the text, changes of the tower, scale
    "256m": ({}, {}, 4),
    "500m": (
        {
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_attention_heads": 15,
            "num_hidden_layers": 32,
            "num_key_value_heads": 5,
        },
        {},
        4,
    ),
    "2.2b": (
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 16384,
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
            "num_key_value_heads": 32,
            "rope_theta": 273768.0,
            "vocab_size": 49155,
        },
        {
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
        3,
    ),
}
PARAMETERS = {"256m": 256_484_928, "500m": 507_482_304, "2.2b": 2_246_272_880}


def published(size: str) -> dict:
    """The config.json of a named size."""
    text, vision, scale = OTHERS[size]
    changes = {"text_config": PUBLISHED_256M["text_config"] | text, "scale_factor": scale}
    return PUBLISHED_256M | changes | {"vision_config": PUBLISHED_256M["vision_config"] | vision}


@pytest.mark.parametrize("size", OTHERS)
def test_real_sizes_have_the_names_and_shapes_of_transformers(size):
    config = smolvlm.Config.from_published(published(size))
    assert config == smolvlm.SIZES[size]
    assert (config.num_image_tokens, config.grid[0]) == {"2.2b": (81, 27)}.get(size, (64, 32))
    with torch.device("meta"):
        model = Idefics3ForConditionalGeneration(Idefics3Config(**published(size)))
    want = {canonical_name(smolvlm, name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: leaf.shape for name, leaf in expected_tensors(smolvlm, config).items()} == want
    assert sum(map(np.prod, want.values())) == PARAMETERS[size]
    assert smolvlm.Config.from_published(json.loads(model.config.to_json_string())) == config


@pytest.mark.parametrize("size", smolvlm.SIZES)
def test_every_weight_has_a_sharding_rule(size):
    for name in expected_tensors(smolvlm, smolvlm.SIZES[size]):
        assert any(re.search(pattern, name) for pattern, _ in smolvlm.SHARDING), name


def test_smolvlm_2_has_the_same_layout():
    other = published("256m") | {"model_type": "smolvlm", "use_reentrant_checkpointing": False, "pad_token_id": 128002}
    other["vision_config"] = other["vision_config"] | {"model_type": "smolvlm_vision"}
    assert smolvlm.Config.from_published(other) == smolvlm.SIZES["256m"]
    assert smolvlm.Config.from_published(SmolVLMConfig(**other).to_dict()) == smolvlm.SIZES["256m"]


def test_every_field_that_transformers_writes_is_in_a_table():
    for kind in (Idefics3Config, SmolVLMConfig):
        written = kind().to_dict()
        assert not written.keys() - smolvlm.IDEFICS3.keys()
        assert not written["text_config"].keys() - smolvlm.TEXT.keys()
        assert not written["vision_config"].keys() - smolvlm.VISION.keys()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_type", "idefics2"),
        ("scale_factor", 5),
        ("resampler", True),
        ("text_config.model_type", "mistral"),
        ("text_config.qk_layer_norms", True),
        ("text_config.rope_interleaved", True),
        ("text_config.use_resampler", True),
        ("text_config.attention_bias", True),
        ("vision_config.hidden_act", "gelu"),
        ("vision_config.image_size", [512, 384]),
        ("vision_config.num_channels", 1),
        ("vision_config.patch_size", 600),
    ],
)
def test_other_computations_are_refused(path, value):
    config = json.loads(json.dumps(PUBLISHED_256M))
    *above, name = path.split(".")
    (config[above[0]] if above else config)[name] = value
    with pytest.raises(UserError, match=f"{name}.*supported|not known: {name}|at least .*{name}") as caught:
        smolvlm.Config.from_published(config)
    assert "\n" not in str(caught.value)


# ---- pictures and prompts


@pytest.mark.parametrize("kind", [Idefics3ImageProcessorPil, SmolVLMImageProcessorPil])
def test_the_processor_s_sizes_are_read(kind):
    config, where = smolvlm.SIZES["256m"], "preprocessor_config.json"
    sizes = {"size": {"longest_edge": 1024}, "max_image_size": {"longest_edge": 512}}
    written = json.loads(kind(**sizes, do_image_splitting=False).to_json_string())
    want = dataclasses.replace(config, longest_edge=1024, image_splitting=False)
    assert smolvlm.read_image_processor(config, written, where) == want
    whole = {"image_processor": written, "image_seq_len": 64, "processor_class": "Idefics3Processor"}
    assert smolvlm.read_image_processor(config, whole, where) == want
    beside = {"image_seq_len": 64, "processor_class": "Idefics3Processor"}  # processor_config.json of transformers 4
    assert smolvlm.read_image_processor(want, beside, "processor_config.json") == want
    for name, value in {
        "size": {"longest_edge": 5000},
        "max_image_size": {"longest_edge": 364},
        "resample": 2,
        "image_mean": [0.4, 0.5, 0.5],
        "do_resize": False,
        "image_seq_len": 81,
        "do_solarize": True,
    }.items():
        with pytest.raises(UserError, match=name):
            smolvlm.read_image_processor(config, written | {name: value}, where)
        with pytest.raises(UserError, match=name):
            smolvlm.read_image_processor(config, {"image_processor": written} | {name: value}, where)


@pytest.mark.parametrize("question", ["What happens?", "Is <image> a <end_of_utterance> token?", "有几个人？\n"])
def test_the_prompt_is_transformers_own(question, tmp_path):
    WRITERS["smolvlm"](tmp_path)
    config, tokenizer = smolvlm.SIZES["tiny"], HfTokenizer(tmp_path)
    before, after = smolvlm.prompt(tokenizer, config, question, None)
    with_answer = smolvlm.prompt(tokenizer, config, question, "a red circle")
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil.from_pretrained(tmp_path, do_image_splitting=False),
        tokenizer.tokenizer,
        image_seq_len=config.num_image_tokens,
        chat_template=tokenizer.template,
    )
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    picture = np.zeros((20, 30, 3), np.uint8)
    image = tokenizer.special("<image>")

    def ids(chat: list[dict], **options) -> list[int]:
        text = processor.apply_chat_template(chat, **options)
        return processor(text=text, images=[picture])["input_ids"][0]

    visual = [image] * config.num_image_tokens
    if "<" not in question:
        assert [i for i, _ in before] + visual + [i for i, _ in after] == ids(chat, add_generation_prompt=True)
        chat.append({"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]})
        whole = [i for i, _ in with_answer[0]] + visual + [i for i, _ in with_answer[1]]
        assert whole == ids(chat)[: len(whole)] and tokenizer.decode(ids(chat)[len(whole) :]).strip() == ""
    else:  # typed by a person: plain text
        assert image not in [i for i, _ in after]
        assert sum(i == tokenizer.special("<end_of_utterance>") for i, _ in after) == 1
    supervised = [i for i, counts in with_answer[1] if counts]
    assert tokenizer.decode(supervised, keep_special=True).strip() == "a red circle<end_of_utterance>"
    assert tokenizer.stop_ids[0] == supervised[-1] == tokenizer.special("<end_of_utterance>")


def test_the_tiny_folder_is_the_tiny_size(tmp_path):
    config = smolvlm.Config.from_published(WRITERS["smolvlm"](tmp_path))
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert smolvlm.read_image_processor(config, processor, "preprocessor_config.json") == smolvlm.SIZES["tiny"]
    assert {leaf.shape for leaf in name_table(abstract_part(smolvlm, "projector", config), "").values()} == {(48, 192)}
