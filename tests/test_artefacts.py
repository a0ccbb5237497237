"""The files that the project writes, damaged: one line that says what is wrong, where, and what to do."""

import json
import os
import shutil

import pytest

from conversion import from_torch
from data_pipeline import prepare
from data_pipeline.common.artefacts import (
    ANSWERS_BEGUN,
    NUMBERED_ANSWER,
    Each,
    Form,
    read_lines,
    read_object,
    with_checksum,
)
from data_pipeline.common.errors import UserError
from redvillm_jax import evaluate, train
from redvillm_jax.demo import moving_shapes
from redvillm_jax.evaluation.judged_folder import read_judged
from redvillm_jax.inference.answer_log import AnswerLog
from redvillm_jax.inference.open_model import open_model
from redvillm_jax.model.base_folder import open_base
from redvillm_jax.training.checkpoint import load_trainables, read_description

KINDS = {
    "name": str,
    "size": int,
    "rate": float,
    "on?": bool,
    "rule": ("a", "b"),
    "said": str | None,
    "list": [{"id": str}],
    "sizes": Each(int),
    "inner": {"deep": dict},
}
FORM = Form(KINDS, "make it again")
WHOLE = {
    "name": "视频",
    "size": 3,
    "rate": 1,
    "rule": "b",
    "said": None,
    "list": [{"id": "x"}],
    "sizes": {"x": 1},
    "inner": {"deep": {}, "more": 1},
}


def refused(read, *arguments, **more) -> str:
    with pytest.raises(UserError) as error:
        read(*arguments, **more)
    assert "\n" not in str(error.value) and str(error.value).endswith("; make it again")
    return str(error.value).removesuffix("; make it again")


def test_a_whole_file_is_read_as_it_is(tmp_path):
    file = tmp_path / "x.json"
    for value in (WHOLE, WHOLE | {"on": True, "said": "yes", "further": []}):
        file.write_text(json.dumps(value))
        assert read_object(file, FORM) == value


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"\0" * 100, "is not whole JSON"),
        (json.dumps(WHOLE)[:-9].encode(), "is not whole JSON"),
        (b"[" * 200_000, "is not whole JSON"),
        (b"null", "is null, expected an object"),
        (b"[]", "is a list, expected an object"),
        (b"7", "is 7, expected an object"),
        (b'{"name": "\xff"}', "is not UTF-8 text"),
        (rb'{"name": "\ud800"}', "is not UTF-8 text"),
        (b"{}", "has no 'name'"),
    ],
)
def test_what_is_no_object_is_said(content, problem, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    assert refused(read_object, tmp_path / "x.json", FORM) == f"{tmp_path / 'x.json'}: {problem}"
    (tmp_path / "x.jsonl").write_bytes(json.dumps(WHOLE).encode() + b"\n" + (content or b" ") + b"\n")
    assert refused(read_lines, tmp_path / "x.jsonl", FORM) == f"{tmp_path / 'x.jsonl'}: line 2: {problem}"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": None}, "field 'name' is null, expected text"),
        ({"size": True}, "field 'size' is true, expected a whole number"),
        ({"size": 1.5}, "field 'size' is 1.5, expected a whole number"),
        ({"rate": "1"}, "field 'rate' is \"1\", expected a number"),
        ({"on": 1}, "field 'on' is 1, expected true or false"),
        ({"rule": "c"}, "field 'rule' is \"c\", expected a or b"),
        ({"rule": {}}, "field 'rule' is an object, expected a or b"),
        ({"said": []}, "field 'said' is a list, expected text or null"),
        ({"list": {}}, "field 'list' is an object, expected a list"),
        ({"list": [{"id": "x"}, {}]}, "field 'list.2' has no 'id'"),
        ({"sizes": {"x": 1, "y": "2"}}, "field 'sizes.y' is \"2\", expected a whole number"),
        ({"inner": {"deep": 1}}, "field 'inner.deep' is 1, expected an object"),
    ],
)
def test_fields_of_another_kind_are_named(change, problem, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(WHOLE | change))
    assert refused(read_object, tmp_path / "x.json", FORM) == f"{tmp_path / 'x.json'}: {problem}"


def test_what_is_no_file_is_said(tmp_path):
    assert "gone: cannot be read (No such file" in refused(read_object, tmp_path / "gone", FORM)
    assert "cannot be read (Is a directory)" in refused(read_lines, tmp_path, FORM)
    (tmp_path / "loop").symlink_to("loop")
    assert "loop: cannot be read (" in refused(read_object, tmp_path / "loop", FORM)
    if os.geteuid():  # root may read all
        (tmp_path / "locked").touch(mode=0)
        assert "locked: cannot be read (Permission" in refused(read_object, tmp_path / "locked", FORM)


def test_only_a_growing_file_may_end_in_half_a_line(tmp_path):
    file = tmp_path / "x.jsonl"
    begun, *answers = [{"made_with": {}}, *({"number": i, "answer": {"prediction": "猫"}} for i in (1, 2))]
    lines = [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in (begun, *answers)]
    forms = {"form": NUMBERED_ANSWER, "first": ANSWERS_BEGUN}
    assert read_lines(file, **forms, growing=True) == []
    for half in (b"", lines[2][:5], lines[2][:-6], lines[2][:-1]):  # within a character, and all but its end
        file.write_bytes(lines[0] + lines[1] + half)
        assert read_lines(file, **forms, growing=True) == [begun, answers[0]]
        if half:
            with pytest.raises(UserError, match="line 3: has no line break at its end"):
                read_lines(file, **forms)
    file.write_bytes(lines[0] + lines[1][:5] + b"\n" + lines[2])
    with pytest.raises(UserError, match="line 2: is not whole JSON"):
        read_lines(file, **forms, growing=True)
    file.write_bytes(lines[1] + lines[0])
    with pytest.raises(UserError, match="line 1: has no 'made_with'"):
        read_lines(file, **forms, growing=True)


# ---- the same through those who read them


def read_a_base_for_frames(folder):
    prepare.main([f"--base={folder}", f"--videos={folder}", "--instructions=x", f"--out={folder / 'out'}"])


def read_videos_again(folder):
    moving_shapes.main([f"--out={folder}", "--train=1", "--dev=1", "--test=1"])


READERS = {  # who reads: (the file, what a damaged one ends in)
    "a run": (load_trainables, "config.json", "put back this run's config.json"),
    "a run or a base": (open_model, "config.json", "put back this run's config.json"),
    "a run to be continued": (
        lambda folder: train.open_workdir(folder, {}),
        "config.json",
        "put back this run's config.json",
    ),
    "a base": (open_base, "base.json", "make the base folder again with conversion.from_torch"),
    "a base for frames": (read_a_base_for_frames, "base.json", "make the base folder again with conversion.from_torch"),
    "a base that is there": (
        lambda folder: from_torch.from_torch("llava", folder, folder),
        "base.json",
        "delete this folder, then run the same command again",
    ),
    "an export": (open_model, "redvillm.json", "export the model again with conversion.to_torch"),
    "a checkpoint": (read_description, "run.json", "the same training command again sets it aside"),
    "the log of a run": (
        lambda folder: train.open_metrics(folder / "metrics.jsonl", 9),
        "metrics.jsonl",
        "rename the file, then run the same command again",
    ),
    "scores": (
        lambda folder: evaluate.finished(folder, {}),
        "summary.json",
        "or was not written by this command: move it away, or choose another output",
    ),
    "answers begun": (
        lambda folder: AnswerLog(folder / "answers.jsonl", {}, {}),
        "answers.jsonl.part0",
        "or was not written by this command: move it away, or choose another output",
    ),
    "a judge's scores": (read_judged, "summary.json", "judge again"),
    "made videos": (read_videos_again, "settings.json", "delete its folder and make the videos again"),
}


@pytest.mark.parametrize("content", [b"[]\n", b"null\n", b'{"ste\n', b"\xff\xfe\n", b"{}\n", b"\0\0\n", None])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_ends_in_one_line(reader, content, tmp_path):
    read, name, remedy = READERS[reader]
    for beside in {
        "a run to be continued": ("checkpoints/3/x",),
        "scores": ("answers.jsonl",),
        "a judge's scores": ("verdicts.jsonl",),
    }.get(reader, ()):
        (tmp_path / beside).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / beside).touch()
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    missing = content == b"{}\n" and reader.startswith("a run ")  # then it is no run
    if content is not None and not missing:
        assert message.startswith(f"{tmp_path / name}: ") and remedy in message


def test_an_object_that_says_something_else_than_was_written_is_refused(tmp_path):
    form, file = Form({"size": int}, "make it again"), tmp_path / "a.json"
    said = with_checksum({"size": 32, "of": {10: "b", 9: ("a", 1.5)}})
    file.write_text(json.dumps(said, indent=1))
    assert read_object(file, form)["size"] == 32
    file.write_text(json.dumps(said | {"size": 33}))
    assert refused(read_object, file, form) == f"{file}: was changed after it was written"


def test_bases_and_exports_say_what_they_were_written_with(bases, tmp_path):
    shutil.copytree(bases["llava"], tmp_path / "base")
    file = tmp_path / "base" / "base.json"
    file.write_text(file.read_text().replace('"nearest"', '"bicubic"').replace('"image_size": 32', '"image_size": 48'))
    with pytest.raises(UserError, match=r"base\.json: was changed after it was written; make the base folder again"):
        open_base(tmp_path / "base")
