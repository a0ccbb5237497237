"""The family of a published folder, from the model_type in its config.json."""

from pathlib import Path

from conversion.names import read_json
from data_pipeline.common.errors import UserError
from redvillm_jax.bases.contract import Family, known_families, load_family

VIDEO = "it is trained on video already"
ROTARY = f"{VIDEO}, and takes a varying number of tokens a picture with positions in three axes"
CROSS = "its language model reads pictures through cross-attention, not as tokens"
VARIABLE = "it takes a varying number of tokens a picture, this method a fixed grid"

UNFIT = {  # model_type -> why the method does not fit it
    "smolvlm": f"{VIDEO} (SmolVLM 2); take SmolVLM 1 (model_type idefics3), or insist with --family=smolvlm",
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), ROTARY),
    **dict.fromkeys(("qwen2_5_omni", "qwen3_omni_moe", "glm4v", "glm4v_moe", "keye_vl", "ernie4_5_vl_moe"), ROTARY),
    **dict.fromkeys(("internvl", "internvl_chat", "minicpmv", "molmo2", "gemma4", "kimi_vl", "perception_lm"), VIDEO),
    **dict.fromkeys(("llava_next_video", "video_llava", "video_llama_3", "instructblipvideo"), "it is a video LLM"),
    **dict.fromkeys(("mllama", "idefics"), CROSS),
    **dict.fromkeys(("pixtral", "mistral3", "molmo", "phi3_v", "phi4_multimodal", "lfm2_vl"), VARIABLE),
    **dict.fromkeys(("blip-2", "instructblip", "idefics2"), "it has a query transformer, not a projector of its own"),
    "paligemma": "a picture and its question see themselves in both directions (a prefix language model)",
    "gemma3n": "its encoder is a convolutional network, and its language model has inputs in every layer",
    "chameleon": "its pictures are tokens of its vocabulary",
    **dict.fromkeys(("gemma3_text", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), "it has no vision tower"),
}


def supported() -> str:
    """The model types of all families, for messages."""
    types = {name: [one for one in load_family(name).MODEL_TYPES if one not in UNFIT] for name in known_families()}
    return "; ".join(f"{name}: {', '.join(found)}" for name, found in types.items())


def find_family(source: Path) -> str:
    """Returns the family of a published folder. Raises UserError for a model that no family computes, with the reason.

    A reason is a fact about the model; a family that lists the model type all the same reads it with --family.
    """
    file = source / "config.json"
    model_type = read_json(file).get("model_type")
    if isinstance(model_type, str) and model_type in UNFIT:
        raise UserError(f"{file}: model_type {model_type}: {UNFIT[model_type]}; supported: {supported()}")
    found = [name for name in known_families() if model_type in load_family(name).MODEL_TYPES]
    if not found:
        raise UserError(
            f"{file}: model_type is {model_type!r:.60}, supported: {supported()}; for your own family pass "
            "--family=MODULE (docs/new_base.md)"
        )
    return found[0]


def check_family(base: Family, source: Path) -> None:
    """Raises UserError when config.json names the model type of another family, or of a model that fits none."""
    model_type = read_json(source / "config.json").get("model_type")
    if model_type in base.MODEL_TYPES or not isinstance(model_type, str):
        return
    wrong = f"{source}: not a {base.name} model, its model_type is {model_type!r:.60}"
    families = [name for name in known_families() if model_type in load_family(name).MODEL_TYPES]
    if families:
        raise UserError(f"{wrong}; it looks like --family={families[0]}")
    if model_type in UNFIT:
        raise UserError(f"{wrong}: {UNFIT[model_type]}; supported: {', '.join(base.MODEL_TYPES)}")
