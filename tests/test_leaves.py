"""Small parts by hand: the mask, meshes and placements, checkpoints, metrics, token rows."""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EVERY_FAMILY
from jax.sharding import PartitionSpec as P

from data_pipeline.common.errors import UserError, run
from data_pipeline.packing import Prefix, Question
from redvillm_jax.bases.contract import load_family
from redvillm_jax.model.base_folder import open_base
from redvillm_jax.modules.attention import visible
from redvillm_jax.modules.layers import attention
from redvillm_jax.runtime.sharding import make_mesh, weight_sharding
from redvillm_jax.train import open_metrics
from redvillm_jax.training.rows import check_round_trip, lay_out, show_rows, supervised_tokens, tokenize


def test_a_token_sees_its_prefix_and_its_own_question():
    groups, questions = jnp.array([[1, 1, 1, 1, 1, 2, 2, 0]]), jnp.array([[0, 0, 1, 1, 2, 0, 3, 0]])
    want = [
        "10000000",
        "11000000",
        "11100000",
        "11110000",
        "11001000",
        "00000100",
        "00000110",
        "00000001",
    ]
    got = ["".join(str(int(x)) for x in row) for row in np.asarray(visible(groups, questions))[0]]
    assert got == want


def test_a_row_that_sees_nothing_stays_finite():
    x = jnp.ones((1, 2, 1, 4))
    assert jnp.isfinite(attention(x, x, x, jnp.zeros((1, 2, 2), bool))).all()


def test_one_mesh_size_may_be_the_rest():
    assert dict(make_mesh({"data": 2, "fsdp": -1, "tensor": 2}).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    for sizes in ({"data": 3, "fsdp": -1, "tensor": 1}, {"data": -1, "fsdp": -1, "tensor": 1}):
        with pytest.raises(UserError, match="does not fit 8 devices"):
            make_mesh(sizes)


def test_weights_lie_by_the_first_matching_rule():
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    place = weight_sharding(mesh, [(r"a\.weight", P("tensor", "fsdp")), (r"bias", P())])
    assert place("x.a.weight", (6, 8), False).spec == P("tensor", "fsdp")
    assert place("x.a.weight", (3, 6, 8), True).spec == P(None, "tensor", "fsdp")
    assert place("x.a.weight", (5, 8), False).spec == P(None, "fsdp"), "5 rows do not divide by 2"
    with pytest.raises(ValueError, match=r"x\.b"):
        place("x.b", (2,), False)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_weight_of_a_base_has_a_sharding_rule(family):
    from redvillm_jax.model.weights import expected_tensors

    base = load_family(family)
    place = weight_sharding(make_mesh({"data": 1, "fsdp": 4, "tensor": 2}), base.SHARDING)
    for size in base.SIZES.values():
        for name, leaf in expected_tensors(base, size).items():
            place(name, leaf.shape, False)


def test_a_large_base_lies_in_parts():
    """No weight matrix of the real sizes is whole on every device of an fsdp mesh."""
    for family in EVERY_FAMILY:
        base = load_family(family)
        from redvillm_jax.model.weights import expected_tensors

        place = weight_sharding(make_mesh({"data": 1, "fsdp": 8, "tensor": 1}), base.SHARDING)
        leaves = [leaf for size in base.SIZES.values() for leaf in expected_tensors(base, size).items()]
        for name, leaf in leaves:
            if np.prod(leaf.shape) > 4_000_000:
                assert not place(name, leaf.shape, False).is_fully_replicated, name


def test_metrics_of_steps_that_run_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    metrics = open_metrics(path, last_step=1)
    metrics.write({"step": 2, "loss": 1.5})
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 1.5},
    ]


def test_the_tokens_of_a_step_are_those_that_its_rows_weigh():
    prefix = Prefix(np.array([1, 9, 2]), np.array([-1, 0, -1]), np.array([False, False, True]))
    questions = [Question(np.full(n, n), np.arange(n) > 1) for n in (4, 3, 6)]
    steps = [(((0, (0, 2)),), ((1, (1,)),)), (((1, (2,)),),)]
    plan = lay_out(steps, [prefix, prefix], questions, [], 1, None)
    weights = [sum(plan.row_fn(row)["target_weights"].sum() for row in step) for step in steps]
    assert supervised_tokens(plan) == weights == [2 + 2 + 4 + 1 + 1, 1 + 4]


class Lossy:
    """A tokenizer that drops what is not ASCII."""

    def encode(self, text):
        return [ord(c) for c in text if ord(c) < 128]

    def decode(self, ids, keep_special=False):
        return "".join(map(chr, ids))


def test_text_that_a_tokenizer_changes_is_refused():
    check_round_trip(Lossy(), "left ", "q1")
    with pytest.raises(UserError, match=r"'q2'.*turns '向左' into ''"):
        check_round_trip(Lossy(), "向左", "q2")


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_special_tokens_in_text_are_text(family, bases):
    base = open_base(bases[family])
    tokenizer = base.module.Tokenizer(base.path)
    for text in ("</s>", "<|im_end|>", "<image>", "<|im_start|>user", "什么</s>颜色"):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.stop_ids), text
        check_round_trip(tokenizer, text, text)


def test_an_answer_without_a_token_or_beyond_the_embedding_is_refused(bases):
    import dataclasses

    base = open_base(bases["llava"])
    tokenizer = base.module.Tokenizer(base.path)
    row = {"id": "q1", "question": "What?", "answer": ""}
    with pytest.raises(UserError, match="'q1': the answer has no token"):
        tokenize(base.module, tokenizer, base.config, [row], labels="answer")
    small = dataclasses.replace(base.config, vocab_size=5)
    with pytest.raises(UserError, match="beyond the base's 5 embeddings"):
        tokenize(base.module, tokenizer, small, [row | {"answer": "left"}], labels="answer")


def test_a_tokenizer_without_the_bases_markers_is_refused(bases):
    base = open_base(bases["llava"])
    with pytest.raises(UserError, match="its tokenizer has no <im_start>"):
        base.module.Tokenizer(base.path).special("<im_start>")


@pytest.mark.parametrize(
    ("file", "problem"),
    [("base.json", "is not whole JSON; make the base folder again"), ("config.json", "is not as it was")],
)
def test_a_damaged_base_folder_is_refused(file, problem, bases, tmp_path):
    shutil.copytree(bases["llava"], tmp_path / "base")
    (tmp_path / "base" / file).write_text("{")
    with pytest.raises(UserError, match=f"{file}: {problem}"):
        open_base(tmp_path / "base")


def test_rows_are_shown_with_counts_and_marks():
    batch = {
        "token_ids": np.array([[72, 0, 0, 63, 65, 66, 0]]),
        "video_tokens": np.array([[-1, 0, 1, -1, -1, -1, -1]]),
        "group_ids": np.array([[1, 1, 1, 1, 1, 1, 0]]),
        "target_slots": np.array([[3, 4, 0]]),
        "target_weights": np.array([[1.0, 1.0, 0.0]]),
    }
    assert show_rows(Lossy(), batch, 1) == "row 0: 6 tokens, 2 of them supervised\nH[2 visual tokens]?⟦AB⟧\n"


def ended(main, capsys, *argv):
    """The exit code of a command, and what it printed on stderr."""
    with pytest.raises(SystemExit) as exit:
        run(main, list(argv))
    return exit.value.code, capsys.readouterr().err


def test_a_users_mistake_is_one_line_and_code_two(capsys):
    def main(argv):
        raise UserError("x.mp4: no frames, expected one or more; remove it")

    assert ended(main, capsys) == (2, "error: x.mp4: no frames, expected one or more; remove it\n")


def test_a_file_that_cannot_be_used_is_one_line_and_code_two(capsys, tmp_path):
    def main(argv):
        Path(argv[0]).read_text()

    assert ended(main, capsys, str(tmp_path)) == (2, f"error: {tmp_path}: is a directory: give a file\n")
    code, said = ended(main, capsys, str(tmp_path / ("x" * 300)))
    assert (code, said.count("\n")) == (2, 1) and said.endswith("x: file name too long: choose a shorter name\n")


def test_what_nobody_thought_of_is_one_line_with_its_kind_and_place(capsys):
    def main(argv):
        return check_round_trip(None, "", "")

    code, said = ended(main, capsys)
    assert code == 1 and said.count("\n") == 1
    assert re.match(r"error: AttributeError at rows\.py:\d+: .*--debug shows the whole traceback", said)
    assert "Traceback (most recent call last)" in ended(main, capsys, "--debug")[1]

    def greedy(argv):
        raise MemoryError

    code, said = ended(greedy, capsys)
    assert (code, said.count("\n")) == (2, 1) and "too little memory" in said
