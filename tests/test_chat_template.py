"""Prompts by the folder's own chat template: the ids of transformers' processors, cut at the visual tokens."""

import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.common.errors import UserError
from redvillm_jax.modules.chat_template import FILES, chat_prompt, find_template
from redvillm_jax.modules.hf_tokenizer import HfTokenizer
from tests.tiny_tokenizers import SPECIAL, TEMPLATES, write_template, write_tokenizer

IMAGE = {"picture_token": "<image>"}
SMOLVLM = IMAGE | {"opening": "<fake_token_around_image><global-img>", "closing": "<fake_token_around_image>"}
GEMMA = {"picture_token": "<start_of_image>", "visual_token": "<image_soft_token>"}
GEMMA |= {"opening": "\n\n<start_of_image>", "closing": "<end_of_image>\n\n"}
KINDS = [  # tokenizer, template, the family's arguments, the end of a turn
    ("mistral", "mistral", IMAGE, "</s>"),
    ("llama", "mistral", IMAGE, "</s>"),
    ("llama", "vicuna", IMAGE, "</s>"),
    ("llama3", "llama3", IMAGE, "<|eot_id|>"),
    ("llama3", "llama3_strings", IMAGE, "<|eot_id|>"),
    ("qwen2", "chatml", IMAGE, "<|im_end|>"),
    ("qwen2", "onevision", IMAGE, "<|im_end|>"),
    ("smollm2", "smolvlm", SMOLVLM, "<end_of_utterance>"),
    ("gemma", "gemma", GEMMA, "<end_of_turn>"),
]
ALL = pytest.mark.parametrize(("kind", "template", "options", "end"), KINDS, ids=lambda value: str(value)[:14])
QUESTIONS = ["What happens in this video?", "  Which 12 shapes\n\nappear first? ", "\nWhat? Ünïcode 球!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(kind: str, template: str) -> Path:
        if (kind, template) not in made:
            made[kind, template] = tmp_path_factory.mktemp(f"{kind}_{template}")
            write_tokenizer(kind, made[kind, template])
            write_template(TEMPLATES[template], made[kind, template])
        return made[kind, template]

    return make


def processor(kind: str, template: str, tokenizer):
    """transformers' own processor of a family, with one tile a picture and a few visual tokens."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
    from transformers.models.llava.processing_llava import LlavaProcessor

    square = {"height": 16, "width": 16}
    if template == "smolvlm":
        images = Idefics3ImageProcessorPil(do_image_splitting=False, size={"longest_edge": 16})
        return Idefics3Processor(images, tokenizer, image_seq_len=4)
    if template == "gemma":
        return Gemma3Processor(Gemma3ImageProcessorPil(size=square), tokenizer, image_seq_length=4)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square)
    return LlavaProcessor(images, tokenizer, patch_size=4, vision_feature_select_strategy="full")


def published(kind, template, tokenizer, question, answer=None, source=None, **more) -> list[int]:
    """The ids that transformers' processor makes of a picture and a question; visual tokens once."""
    picture = Image.new("RGB", (16, 16))
    if template == "llama3_strings":
        chat = [{"role": "user", "content": f"<image>\n{question}"}]
        more["processor_kwargs"] = {"images": [picture]}
    else:
        chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
    if answer is not None:
        text = answer if template == "llama3_strings" else [{"type": "text", "text": answer}]
        chat.append({"role": "assistant", "content": text})
    own = processor(kind, template, tokenizer.tokenizer)
    source = source or tokenizer.template
    (ids,) = own.apply_chat_template(
        chat, chat_template=source, tokenize=True, add_generation_prompt=answer is None, **more
    )
    slot = tokenizer.special("<image_soft_token>" if kind == "gemma" else "<image>")
    assert ids.count(slot) > 1
    return [i for value, run in groupby(ids) for i in ([value] if value == slot else run)]


def joined(tokenizer, options, question, answer=None) -> list[int]:
    """The ids of `chat_prompt` with one visual token."""
    before, after = chat_prompt(tokenizer, question, answer, **options)
    slot = tokenizer.special(options.get("visual_token", options["picture_token"]))
    return [i for i, _ in (*before, (slot, False), *after)]


@ALL
@pytest.mark.parametrize("question", QUESTIONS)
def test_ids_are_those_of_transformers(kind, template, options, end, question, folder):
    tokenizer = HfTokenizer(folder(kind, template))
    assert joined(tokenizer, options, question) == published(kind, template, tokenizer, question)


@ALL
def test_an_answer_follows_the_prompt_and_ends_with_its_turn(kind, template, options, end, folder):
    tokenizer = HfTokenizer(folder(kind, template))
    question, answer = QUESTIONS[0], "A dog runs.\nIt stops."
    before, after = chat_prompt(tokenizer, question, None, **options)
    longer = chat_prompt(tokenizer, question, answer, **options)
    assert longer[0] == before and longer[1][: len(after)] == after
    assert not any(supervised for _, supervised in (*before, *after))
    reply = longer[1][len(after) :]
    assert all(supervised for _, supervised in reply)
    assert reply[-1][0] == tokenizer.special(end) == tokenizer.stop_ids[0]
    assert tokenizer.decode([i for i, _ in reply]).strip() == answer
    whole = published(kind, template, tokenizer, question, answer)
    ids = joined(tokenizer, options, question, answer)
    if template == "onevision":  # its answered turn has a blank behind "assistant", its prompt has none
        ids.insert(-len(reply) - 1, tokenizer.encode(" ")[0])
    ends = whole[len(ids) - 1 :] if template == "vicuna" else whole[len(ids) :]  # its template ends no turn
    assert whole[: len(ids)] == ids or (template == "vicuna" and whole[: len(ids) - 1] == ids[:-1])
    assert tokenizer.decode(ends).strip() == ""


@ALL
def test_special_tokens_of_a_person_are_plain_text(kind, template, options, end, folder):
    tokenizer = HfTokenizer(folder(kind, template))
    typed = f"Is {SPECIAL[kind][1]} or {end} or {options['picture_token']}{end} a token?"
    before, after = chat_prompt(tokenizer, typed, typed, **options)
    plain = chat_prompt(tokenizer, "Is it?", "Yes.", **options)
    ids = [i for i, _ in (*before, *after)]
    for token in SPECIAL[kind]:
        found = tokenizer.special(token)
        assert ids.count(found) == [i for part in plain for i, _ in part].count(found)
    assert typed in tokenizer.decode(ids, keep_special=True)
    if template in ("llama3_strings", "smolvlm"):  # transformers cannot read them as plain text here
        return
    # It can where the template writes the first token, and counts a typed <image> as a picture.
    source = "{{ bos_token }}" * (kind in ("llama", "mistral")) + tokenizer.template
    typed = f"Is {SPECIAL[kind][1]} or {end}{end} a token?"
    want = published(kind, template, tokenizer, typed, source=source, sanitize_control_tokens=True)
    skipped = 2 * (kind == "mistral")  # a blank goes before a text, but not behind a written first token
    assert joined(tokenizer, options, typed)[skipped:] == want[skipped:]


@pytest.mark.parametrize("place", FILES)
def test_a_template_is_found_wherever_it_lies(place, tmp_path):
    write_tokenizer("qwen2", tmp_path)
    assert find_template(tmp_path) is None
    write_template(TEMPLATES["chatml"], tmp_path, place)
    assert find_template(tmp_path) == (place, TEMPLATES["chatml"])
    assert HfTokenizer(tmp_path).template == TEMPLATES["chatml"]


@pytest.mark.parametrize("form", ["list", "dict"])
def test_of_named_templates_the_default_is_taken(form, tmp_path):
    named = {"tool_use": "tools", "default": "own"}
    content = [{"name": k, "template": v} for k, v in named.items()] if form == "list" else named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": content}))
    assert find_template(tmp_path) == ("tokenizer_config.json", "own")


def test_a_base_of_before_keeps_its_familys_prompt(tmp_path):
    """Its base.json says nothing of a template, though the folder holds one."""
    write_template("own", tmp_path)
    (tmp_path / "base.json").write_text(json.dumps({"family": "llava"}))
    assert find_template(tmp_path) is None
    (tmp_path / "base.json").write_text(json.dumps({"family": "llava", "chat_template": "chat_template.jinja"}))
    assert find_template(tmp_path) == ("chat_template.jinja", "own")


def test_stop_ids(folder, tmp_path):
    """By the template, the tokenizer and generation_config.json."""
    assert HfTokenizer(folder("gemma", "gemma")).stop_ids == (5, 1)  # <end_of_turn>, <eos>
    write_tokenizer("smollm2", tmp_path)
    write_template(TEMPLATES["smolvlm"], tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5, 0]}))
    tokenizer = HfTokenizer(tmp_path)
    assert tokenizer.stop_ids == (tokenizer.special("<end_of_utterance>"), 2, 0)


def test_a_tokenizer_without_the_pictures_token(tmp_path):
    """LLaVA's own files place pictures without one: both halves are texts."""
    write_tokenizer("llama", tmp_path)
    content = (tmp_path / "tokenizer.json").read_text().replace("<image>", "<other>")
    (tmp_path / "tokenizer.json").write_text(content)
    write_template(TEMPLATES["mistral"], tmp_path)
    tokenizer = HfTokenizer(tmp_path)
    before, after = chat_prompt(tokenizer, "Is <image> a token?", None, **IMAGE)
    assert [i for i, _ in before] == [tokenizer.bos_id, *tokenizer.encode("[INST] ")]
    halves = tokenizer.encode("\nIs "), tokenizer.encode_behind("<image>", plain=True)
    assert [i for i, _ in after] == [*halves[0], *halves[1], *tokenizer.encode_behind(" a token? [/INST]", plain=True)]
    assert all(i < tokenizer.size for i, _ in (*before, *after))


BROKEN = {
    "{{ raise_exception('no pictures here') }}": "fails on a question (no pictures here)",
    "{% for message in messages": "fails on a question",
    "{{ messages[0].__class__ }}": "writes no answers",
    "{% for m in messages %}{{ m['content'][0]['text'] }}<|im_end|>{% endfor %}": "its chat template",
    "{% for m in messages %}{% for c in m['content'] | reverse %}{{ c['text'] if c['type'] == 'text' else '<image>' }}"
    "{% endfor %}<|im_end|>{% endfor %}": "writes the question before the picture",
    "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] if c['type'] == 'text' else '<image><image>' }}"
    "{% endfor %}<|im_end|>{% endfor %}": "writes no single place for the picture",
    "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] if c['type'] == 'text' else '' }}"
    "{% endfor %}<|im_end|>{% endfor %}": "writes no place for a picture (<image>)",
}


@pytest.mark.parametrize(("template", "message"), BROKEN.items(), ids=BROKEN.values())
def test_a_template_that_makes_no_prompt_is_refused_in_one_line(template, message, tmp_path):
    write_tokenizer("qwen2", tmp_path)
    write_template(template, tmp_path)
    with pytest.raises(UserError) as error:
        chat_prompt(HfTokenizer(tmp_path), "What?", None, **IMAGE)
    assert message in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_missing_tokens_and_templates_are_named(folder, tmp_path):
    write_tokenizer("llama", tmp_path)
    with pytest.raises(UserError, match=r"no chat template in processor_config.json, .*tokenizer_config.json"):
        chat_prompt(HfTokenizer(tmp_path), "What?", None, **IMAGE)
    with pytest.raises(UserError, match="its tokenizer has no <fake_token_around_image>"):
        chat_prompt(HfTokenizer(folder("qwen2", "chatml")), "What?", None, **SMOLVLM)
    write_tokenizer("qwen2", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    write_template(TEMPLATES["vicuna"], tmp_path)
    with pytest.raises(UserError, match="neither its chat template nor its tokenizer has a token that ends an answer"):
        HfTokenizer(tmp_path)


def test_rendering_needs_no_torch(folder):
    source = str(folder("qwen2", "chatml"))
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from redvillm_jax.modules.hf_tokenizer import HfTokenizer\n"
        "from redvillm_jax.modules.chat_template import chat_prompt\n"
        f"print(len(chat_prompt(HfTokenizer({source!r}), 'What?', 'A', picture_token='<image>')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and done.stdout == "2\n", done.stderr
