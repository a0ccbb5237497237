"""Every field of a published config.json is computed with, refused in one line, or known to change nothing."""

import copy
import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import without_hashes

from benchmarks import config_fields as generator
from conversion.from_torch import from_torch
from data_pipeline.common.errors import UserError
from redvillm_jax.bases import llava, qwen_vl
from redvillm_jax.bases.contract import known_families, load_family
from redvillm_jax.model.base_folder import open_base
from redvillm_jax.modules import llava_fields
from redvillm_jax.modules.clip_fields import CLIP, WHOLE_CLIP
from redvillm_jax.modules.config_fields import FIXED, NOTHING, READ, read_fields
from redvillm_jax.modules.image_processor_fields import (
    any_resolution_transform,
    clip_transform,
    gemma3_transform,
    idefics3_transform,
    read_transform,
)
from redvillm_jax.modules.llama_fields import LLAMA, MISTRAL, QWEN2
from tests.test_llava import tiny_transformers

# ---- one field changed in what transformers has written


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny LLaVA as transformers saves it."""
    folder = tmp_path_factory.mktemp("published")
    tiny_transformers().save_pretrained(folder)
    return folder


def put(config: dict, path: str, value) -> None:
    """Sets the field at a dotted path."""
    *keys, last = path.split(".")
    for key in keys:
        config = config[key]
    config[last] = value


def with_field(saved: Path, folder: Path, path: str, value) -> Path:
    """The published folder with one field changed; its weights are links."""
    config = json.loads((saved / "config.json").read_text())
    put(config, path, value)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(saved / "model.safetensors")
    return folder


LINEAR, LLAMA3 = {"rope_type": "linear", "factor": 2.0}, {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0}
REFUSED = [
    ("model_type", "llava_next_video"),
    ("projector_hidden_act", "relu"),
    ("vision_feature_select_strategy", "full"),
    ("vision_feature_layer", [-2, -1]),
    ("vision_feature_layer", -4),
    ("vision_feature_layer", 4),
    ("multimodal_projector_bias", False),
    ("quantization_config", {"quant_method": "awq"}),
    ("rope_scaling", LINEAR),
    ("rope_parameters", LLAMA3),
    ("a_new_field", 1),
    ("text_config", None),
    ("vision_config", []),
    ("text_config.model_type", "gemma"),
    ("text_config.rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("text_config.rope_scaling", LLAMA3),
    ("text_config.rope_parameters", {"full_attention": LLAMA3}),
    ("text_config.rope_parameters.rope_theta", 0),
    ("text_config.rope_theta", 0),
    ("text_config.rope_theta", -1.0),
    ("text_config.rope_theta", "10000"),
    ("text_config.rope_theta", 500.0),
    ("text_config.partial_rotary_factor", 0.5),
    ("text_config.partial_rotary_factor", True),
    ("text_config.hidden_act", "gelu"),
    ("text_config.attention_bias", True),
    ("text_config.mlp_bias", True),
    ("text_config.num_key_value_heads", 3),
    ("text_config.sliding_window", 4),
    ("text_config.hidden_size", "48"),
    ("text_config.hidden_size", 48.0),
    ("text_config.hidden_size", -48),
    ("text_config.hidden_size", True),
    ("text_config.num_attention_heads", 0),
    ("text_config.num_hidden_layers", 10**9),
    ("text_config.max_position_embeddings", 0),
    ("text_config.rms_norm_eps", "1e-5"),
    ("text_config.rms_norm_eps", float("nan")),
    ("text_config.rms_norm_eps", None),
    ("text_config.vocab_size", 10**30),
    ("text_config.pruned_heads", {"0": [1]}),
    ("text_config.is_encoder_decoder", True),
    ("text_config.a_new_field", {"deep": 1}),
    ("vision_config.model_type", "siglip_vision_model"),
    ("vision_config.hidden_act", "gelu"),
    ("vision_config.image_size", 30),
    ("vision_config.image_size", [24, 24]),
    ("vision_config.patch_size", 7),
    ("vision_config.num_channels", 1),
    ("vision_config.num_attention_heads", 3),
    ("vision_config.layer_norm_eps", "small"),
    ("vision_config.rope_parameters", LLAMA3),
]


@pytest.mark.parametrize(("path", "value"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_field_that_changes_the_computation_is_refused(path, value, saved, tmp_path):
    source = with_field(saved, tmp_path / "source", path, value)
    with pytest.raises(UserError) as caught:
        from_torch("llava", source, tmp_path / "base", tokenizer=False)
    message = str(caught.value)
    assert message.startswith(f"{source}") and "\n" not in message
    assert path.split(".")[-1] in message
    if not isinstance(value, dict):
        assert json.dumps(value) in message or str(value) in message
    assert re.search("supported|expected|not known|it looks like|needs", message)
    assert not (tmp_path / "base").exists()


def test_a_vocabulary_that_the_weights_do_not_have_is_refused(saved, tmp_path):
    source = with_field(saved, tmp_path / "source", "text_config.vocab_size", 97)
    with pytest.raises(UserError, match=r"embed_tokens.weight \(96, 48\) should be \(97, 48\)"):
        from_torch("llava", source, tmp_path / "base", tokenizer=False)


SAME = [  # other ways to say what is there
    ("text_config.rope_scaling", None),
    ("text_config.rope_scaling", {"rope_type": "default"}),
    ("text_config.rope_theta", 10000.0),
    ("text_config.rope_theta", 10000),
    ("text_config.rope_parameters", None),
    ("text_config.head_dim", None),
    ("text_config.use_cache", False),
    ("text_config.torch_dtype", "float16"),
    ("text_config.attention_dropout", 0.1),
    ("text_config.pruned_heads", {}),
    ("text_config.sliding_window", None),
    ("vision_config.vocab_size", 32000),
    ("vision_feature_layer", 2),
    ("ignore_index", -100),
    ("vocab_size", 96),
]


@pytest.mark.parametrize(("path", "value"), SAME, ids=lambda value: str(value)[:40])
def test_a_field_that_changes_nothing_is_left(path, value, saved):
    config = json.loads((saved / "config.json").read_text())
    changed = copy.deepcopy(config)
    put(changed, path, value)
    assert llava.Config.from_published(changed) == llava.Config.from_published(config)


def test_what_a_base_computes_with_is_read(saved):
    config = json.loads((saved / "config.json").read_text())

    def read(path: str, value):
        changed = copy.deepcopy(config)
        put(changed, path, value)
        return llava.Config.from_published(changed)

    assert read("text_config.rope_parameters.rope_theta", 500.0).rope_theta == 500.0
    assert read("text_config.num_key_value_heads", 1).num_key_value_heads == 1
    assert read("text_config.rms_norm_eps", 1e-6).rms_norm_eps == 1e-6
    assert read("vision_config.layer_norm_eps", 1e-6).vision_layer_norm_eps == 1e-6
    assert read("vision_feature_layer", 1).vision_feature_layer == -3
    assert read("text_config.max_position_embeddings", 64).max_position_embeddings == 64
    del config["text_config"]["num_key_value_heads"], config["text_config"]["rope_parameters"]
    assert read("text_config.rope_theta", 500.0).rope_theta == 500.0
    assert read("text_config.rope_theta", 500.0).num_key_value_heads == 4


def test_the_options_of_other_decoders_are_read(saved):
    config = json.loads((saved / "config.json").read_text())
    text = config["text_config"]
    scaled = copy.deepcopy(config)
    scaled["text_config"] |= {
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64},
        "rope_parameters": None,
    }
    assert llava.Config.from_published(scaled).rope_scaling.kind == "llama3"
    text |= {"model_type": "mistral", "head_dim": 24}  # the class has a window unless told otherwise
    mistral = llava.Config.from_published(config)
    assert (mistral.num_key_value_heads, mistral.head_dim, mistral.window) == (2, 24, 4096)
    text |= {"sliding_window": None}
    assert llava.Config.from_published(config).window is None
    text |= {"model_type": "qwen2"}
    qwen = llava.Config.from_published(config)
    assert qwen.qkv_bias and not qwen.tie_word_embeddings
    assert llava.Config.from_published(config | {"tie_word_embeddings": True}).tie_word_embeddings
    text |= {"tie_word_embeddings": True}
    assert llava.Config.from_published(config).tie_word_embeddings


def test_all_refused_fields_are_in_one_line(saved):
    config = json.loads((saved / "config.json").read_text())
    config["text_config"] |= {"hidden_act": "gelu", "mlp_bias": True, "a_new_field": 1}
    with pytest.raises(UserError) as caught:
        llava.Config.from_published(config, where="there.json")
    assert str(caught.value) == (
        'there.json: text_config.hidden_act is "gelu", supported: "silu"; '
        "text_config.mlp_bias is true, supported: false"
    )


def test_a_base_made_before_a_field_was_refused_does_not_open(bases, tmp_path):
    base = without_hashes(shutil.copytree(bases["llava"], tmp_path / "base"))
    assert open_base(base).config == open_base(bases["llava"]).config
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r'config.json: text_config.rope_scaling.rope_type is "dynamic", supported'):
        open_base(base)


# ---- original LLaVA and Qwen-VL

LLAVA_15 = {  # as its authors publish it
    "_name_or_path": "llava-v1.5-7b",
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
    "vocab_size": 32000,
}
LLAVA_15_HF = {  # as transformers' users have it
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
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
QWEN_VL = {
    "attn_dropout_prob": 0.0,
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "bf16": True,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "use_dynamic_ntk": True,
    "use_flash_attn": False,
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


def test_published_configs_are_read():
    assert llava.Config.from_published(LLAVA_15) == llava.SIZES["v1.5-7b"]
    assert llava.Config.from_published(LLAVA_15_HF) == llava.SIZES["v1.5-7b-hf"]
    assert qwen_vl.Config.from_published(QWEN_VL) == qwen_vl.SIZES["7b"]


REFUSED_ELSEWHERE = [
    ("llava", "model_type", "llava_qwen"),
    ("llava", "mm_vision_select_feature", "cls_patch"),
    ("llava", "mm_vision_select_layer", [-2]),
    ("llava", "mm_projector_type", "mlp3x_gelu"),
    ("llava", "mm_resampler_type", "spatial_pool"),
    ("llava", "mm_patch_merge_type", "spatial"),
    ("llava", "mm_hidden_size", 1280),
    ("llava", "mm_vision_tower", "google/siglip-so400m-patch14-384"),
    ("llava", "image_aspect_ratio", "highres"),
    ("llava", "image_aspect_ratio", None),
    ("llava", "use_mm_proj", False),
    ("llava", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("llava", "attention_bias", True),
    ("llava", "mm_use_im_start_end", "yes"),
    ("llava", "s2", True),
    ("qwen_vl", "model_type", "qwen2"),
    ("qwen_vl", "kv_channels", 64),
    ("qwen_vl", "rotary_pct", 0.5),
    ("qwen_vl", "no_bias", False),
    ("qwen_vl", "scale_attn_weights", False),
    ("qwen_vl", "tie_word_embeddings", True),
    ("qwen_vl", "use_cache_quantization", True),
    ("qwen_vl", "use_logn_attn", 1),
    ("qwen_vl", "use_dynamic_ntk", None),
    ("qwen_vl", "rotary_emb_base", 0),
    ("qwen_vl", "layer_norm_epsilon", "1e-6"),
    ("qwen_vl", "intermediate_size", 22017),
    ("qwen_vl", "num_attention_heads", 30),
    ("qwen_vl", "seq_length", 1),
    ("qwen_vl", "rope_scaling", {"type": "yarn"}),
    ("qwen_vl", "visual", None),
    ("qwen_vl", "visual.image_size", 450),
    ("qwen_vl", "visual.mlp_ratio", "4"),
    ("qwen_vl", "visual.heads", 15),
    ("qwen_vl", "visual.output_dim", 1024),
    ("qwen_vl", "visual.n_queries", 255),
    ("qwen_vl", "visual.n_heads", 33),
    ("qwen_vl", "visual.layers", 0),
    ("qwen_vl", "visual.act_layer", "quick_gelu"),
]


@pytest.mark.parametrize(("family", "path", "value"), REFUSED_ELSEWHERE, ids=lambda value: str(value)[:40])
def test_other_forms_are_refused_too(family, path, value):
    base = load_family(family)
    config = copy.deepcopy({"llava": LLAVA_15, "qwen_vl": QWEN_VL}[family])
    base.Config.from_published(config)
    put(config, path, value)
    with pytest.raises(UserError) as caught:
        base.Config.from_published(config)
    message = str(caught.value)
    assert "\n" not in message and path.removeprefix("mm_") in message
    assert "supported" in message or "not known" in message or "was trained with" in message


@pytest.mark.parametrize("field", ["hidden_size", "use_logn_attn", "visual", "seq_length"])
def test_a_missing_field_is_named(field):
    config = {key: value for key, value in QWEN_VL.items() if key != field}
    with pytest.raises(UserError, match=f"config.json: {field} is missing, expected "):
        qwen_vl.Config.from_published(config)


# ---- what transformers writes


def test_every_field_that_transformers_writes_is_in_a_table():
    from transformers import (
        CLIPConfig,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaNextConfig,
        MistralConfig,
        Qwen2Config,
    )

    tables = {
        LlavaConfig: llava_fields.LLAVA,
        LlavaNextConfig: llava_fields.NEXT,
        LlamaConfig: LLAMA,
        MistralConfig: MISTRAL,
        Qwen2Config: QWEN2,
        CLIPVisionConfig: CLIP,
        CLIPConfig: WHOLE_CLIP,
    }
    for config, table in tables.items():
        assert not config().to_dict().keys() - table.keys(), config


OLD_CLIP = (  # beside its sizes, in files that transformers 4 wrote
    "_name_or_path add_cross_attention architectures attention_dropout bad_words_ids bos_token_id "
    "chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout "
    "early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task "
    "forced_bos_token_id forced_eos_token_id id2label initializer_factor initializer_range is_decoder "
    "is_encoder_decoder label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type "
    "pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id "
    "task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k "
    "top_p torch_dtype torchscript transformers_version typical_p use_bfloat16"
).split()


def test_every_field_that_transformers_4_wrote_is_in_a_table():
    assert not set(OLD_CLIP) - CLIP.keys() and not set(OLD_CLIP) - LLAMA.keys()


# ---- image processors


def test_what_transformers_writes_of_its_transform_is_accepted():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    table = clip_transform(224, 14, llava.MEAN, llava.STD, pads=True)
    for processor in (CLIPImageProcessorPil, LlavaImageProcessorPil):
        written = json.loads(processor().to_json_string())
        read_transform(written, table, "preprocessor_config.json")
        read_transform({"image_processor": written, "patch_size": 14}, table, "processor_config.json")


HALF = (0.5, 0.5, 0.5)
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
NEXT = any_resolution_transform(336, 14, llava.MEAN, llava.STD, pinpoints=PINPOINTS, strategy="default")
ONEVISION = any_resolution_transform(
    384, 14, HALF, HALF, pinpoints=((384, 384), (768, 384)), strategy="full", aspect_ratio="anyres_max_9"
)
IDEFICS3, GEMMA3 = idefics3_transform(512, 64, HALF, HALF), gemma3_transform(896, 256, HALF, HALF)
PINPOINT_LISTS = [list(point) for point in PINPOINTS]
PROCESSORS = {  # class -> its arguments, the fields of its processor, the table, the values that are read
    "llava_next.LlavaNext": (
        {"size": {"shortest_edge": 336}, "crop_size": 336, "image_grid_pinpoints": PINPOINT_LISTS},
        {"patch_size": 14, "vision_feature_select_strategy": "default", "image_token": "<image>"},
        NEXT,
        {},
    ),
    "llava_onevision.LlavaOnevision": (
        {"image_mean": HALF, "image_std": HALF, "image_grid_pinpoints": [[384, 384], [768, 384]]},
        {"num_image_tokens": 729, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"},
        ONEVISION,
        {},
    ),
    "idefics3.Idefics3": (
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
        {"image_seq_len": 64},
        IDEFICS3,
        {"size": {"longest_edge": 2048}, "do_image_splitting": True},
    ),
    "gemma3.Gemma3": ({"size": {"height": 896, "width": 896}}, {"image_seq_length": 256}, GEMMA3, {}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_the_processors_of_other_families_write_is_accepted(name):
    family, kind = name.split(".")
    module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    arguments, outer, table, read = PROCESSORS[name]
    written = json.loads(getattr(module, f"{kind}ImageProcessorPil")(**arguments).to_json_string())
    kept = read_transform(written, table, "preprocessor_config.json")
    assert {key: value for key, value in kept.items() if table[key].effect == READ} == read
    named = {"processor_class": f"{kind}Processor"}
    assert read_transform(named | outer | {"image_processor": written}, table, "processor_config.json") == kept
    assert "size" not in read_transform(named | outer, table, "processor_config.json")


@pytest.mark.parametrize(
    ("table", "field", "value"),
    [
        (NEXT, "image_grid_pinpoints", PINPOINT_LISTS[:4]),
        (NEXT, "size", {"shortest_edge": 224}),
        (NEXT, "crop_size", {"height": 224, "width": 224}),
        (NEXT, "resample", 2),
        (NEXT, "vision_feature_select_strategy", "full"),
        (NEXT, "vision_aspect_ratio", "anyres_max_9"),
        (NEXT, "aspect_ratio_setting", "pad"),
        (ONEVISION, "vision_aspect_ratio", "anyres_max_4"),
        (ONEVISION, "image_mean", [0.48145466, 0.4578275, 0.40821073]),
        (ONEVISION, "do_resize", False),
        (IDEFICS3, "size", {"longest_edge": 5000}),
        (IDEFICS3, "size", {"longest_edge": True}),
        (IDEFICS3, "size", {"height": 512, "width": 512}),
        (IDEFICS3, "size", 2048),
        (IDEFICS3, "max_image_size", {"longest_edge": 364}),
        (IDEFICS3, "do_image_splitting", None),
        (IDEFICS3, "image_seq_len", 169),
        (IDEFICS3, "resample", 3),
        (GEMMA3, "do_pan_and_scan", True),
        (GEMMA3, "image_seq_length", 64),
        (GEMMA3, "size", {"height": 448, "width": 448}),
        (GEMMA3, "resample", 3),
        (GEMMA3, "image_processor_type", "Gemma3nImageProcessor"),
    ],
)
def test_another_transform_of_another_family_is_refused(table, field, value):
    with pytest.raises(UserError, match=re.escape(f"f.json: {field} is {json.dumps(value)[:100]}")) as caught:
        read_transform({field: value}, table, "f.json")
    assert "\n" not in str(caught.value) and "supported: " in str(caught.value)


TRANSFORM = {  # openai/clip-vit-large-patch14's
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_mean", 0.5),
        ("image_std", [0.5, 0.5, 0.5]),
        ("size", {"shortest_edge": 336}),
        ("size", {"height": 224, "width": 224}),  # squashes pictures
        ("crop_size", {"height": 336, "width": 336}),
        ("resample", 2),
        ("do_normalize", False),
        ("do_rescale", False),
        ("rescale_factor", 1 / 127.5),
        ("do_center_crop", False),
        ("do_pad", True),
        ("image_processor_type", "SiglipImageProcessor"),
        ("vision_feature_select_strategy", "full"),
        ("do_solarize", True),
    ],
)
def test_another_transform_is_refused(field, value):
    table = clip_transform(224, 14, llava.MEAN, llava.STD, pads=False)
    read_transform(TRANSFORM, table, "preprocessor_config.json")
    for written, path in (
        (TRANSFORM | {field: value}, field),
        ({"image_processor": TRANSFORM | {field: value}}, f"image_processor.{field}"),
    ):
        with pytest.raises(UserError, match=re.escape(path)):
            read_transform(written, table, "preprocessor_config.json")


def test_a_folder_s_transform_is_looked_at(saved, tmp_path):
    source = with_field(saved, tmp_path / "source", "ignore_index", -100)
    own = TRANSFORM | {"size": 24, "crop_size": 24}
    for name in ("preprocessor_config.json", "processor_config.json"):
        (source / name).write_text(json.dumps(own | {"image_mean": [0.5, 0.5, 0.5]}))
        with pytest.raises(UserError, match=f"{name}: image_mean is .0.5, 0.5, 0.5., supported: "):
            from_torch("llava", source, tmp_path / "base", tokenizer=False)
        (source / name).write_text(json.dumps(own))
    for text in ("[]", "{"):
        (source / "preprocessor_config.json").write_text(text)
        with pytest.raises(UserError, match=r"preprocessor_config\.json: .*; copy it again"):
            from_torch("llava", source, tmp_path / "base", tokenizer=False)
    (source / "preprocessor_config.json").write_text(json.dumps(own))
    from_torch("llava", source, tmp_path / "base", tokenizer=False)
    without_hashes(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(own | {"resample": 0}))
    with pytest.raises(UserError, match="resample is 0, supported: 3"):
        open_base(tmp_path / "base")


# ---- the tables themselves


def test_tables_are_sound():
    for family in known_families():
        for title, table in load_family(family).FIELDS.items():
            for name, field in table.items():
                assert field.effect in (READ, FIXED, NOTHING), (title, name)
                assert field.effect != FIXED or not field.accepts("another"), (title, name)


def test_an_object_is_expected():
    for value in (None, [], "text", 1):
        with pytest.raises(UserError, match="expected an object"):
            read_fields(value, LLAMA, "config.json")


def test_the_documented_tables_are_the_code_s():
    written = generator.FILE.read_text(encoding="utf-8")
    assert generator.tables() in written, "run python -m benchmarks.config_fields and commit docs/config_fields.md"
