import csv
import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.common.errors import UserError
from data_pipeline.media.video_files import find_videos
from data_pipeline.questions.formats import FIELDS, guess_language
from data_pipeline.questions.instructions import read_instructions
from data_pipeline.questions.mixture import read_mixture, split_weight
from redvillm_jax.bases.contract import load_family
from redvillm_jax.demo.pretrain import write_text_files
from redvillm_jax.modules.qwen_tokenizer import SPECIAL_TOKENS
from redvillm_jax.training.rows import check_round_trip

ROW = {"id": "1", "video": "clip", "language": "zh", "question": "先出现什么颜色？", "answer": "红色"}
SPECIALS = ("</s>", "<s>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<image>", "<img>", "</img>", "<im_start>")


def write(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def error(path):
    with pytest.raises(UserError) as raised:
        read_instructions(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


# ---- the project's schema, in every container


def test_json_lines(tmp_path):
    rows = [ROW, {**ROW, "id": "2", "kind": "first_colour", "source": "kept", "choices": ["A. 红", "B. 绿"]}]
    path = write(tmp_path / "q.jsonl", rows)
    assert read_instructions(path) == rows
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))  # BOM, CRLF, blank lines
    assert read_instructions(path) == rows
    assert read_instructions(write_json(tmp_path / "q.json", rows)) == rows


def test_line_separators_inside_a_text_do_not_end_the_row(tmp_path):
    rows = [{**ROW, "answer": "one\u2028two\x85three\nfour"}]
    assert read_instructions(write(tmp_path / "q.jsonl", rows)) == rows


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("name", ["q.csv", "q.TSV"])
def test_csv(tmp_path, name, delimiter):
    rows = [{**ROW, "kind": "colour"}, {**ROW, "id": "2", "answer": 'two\nlines, "quoted"\tand more'}]
    with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, (*FIELDS, "kind"), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    assert read_instructions(tmp_path / name) == rows  # the second row has no "kind": its cell is empty


def test_csv_mistakes(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("id,video,language,question,answer\n1,v,en,Q?,A.\n2,v,en,Q?,\n")
    assert error(path) == "row 3: field 'answer' is missing, the row has id, video, language, question"
    path.write_text("id,video\n1,v,en\n")
    assert error(path) == "row 2: has 3 cells, the header has 2"
    path.write_text("id,id\n1,v\n")
    assert error(path) == 'column "id" comes twice'
    path.write_text("id,video\n1," + "v" * 200_000 + "\n")
    assert error(path).startswith("row 2: is not CSV: field larger than field limit")
    path.write_text("id,video,language,question,answer\n")
    assert error(path) == "holds no questions"


def test_parquet(tmp_path):
    rows = [{**ROW, "kind": "colour"}, {**ROW, "id": "2"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "any_name")
    assert read_instructions(tmp_path / "any_name") == rows
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**ROW, "id": 1}]), tmp_path / "q.parquet")
    assert error(tmp_path / "q.parquet") == "row 1: field 'id' is 1, expected text"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**ROW, "image": b"\xff"}]), tmp_path / "q.parquet")
    assert error(tmp_path / "q.parquet").startswith("row 1: cannot be written as JSON: Object of type bytes")
    whole = (tmp_path / "any_name").read_bytes()
    (tmp_path / "q.parquet").write_bytes(whole[: len(whole) // 2])
    assert error(tmp_path / "q.parquet").startswith("is not Parquet: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "row 2: field 'answer' is null, expected text"),
        ({"question": " "}, "row 2: field 'question' is empty, expected text"),
        ({"video": 7}, "row 2: field 'video' is 7, expected text"),
        ({"kind": ""}, "row 2: field 'kind' is empty, expected text"),
        ({"answer": ["红色"]}, "row 2: field 'answer' is a list of 1, expected text"),
        ({"id": "1"}, 'row 2: id "1" is already that of row 1'),
    ],
)
def test_a_bad_field_is_named(tmp_path, change, message):
    assert error(write(tmp_path / "q.jsonl", [ROW, {**ROW, "id": "2", **change}])) == message


def test_a_missing_field_is_named(tmp_path):
    incomplete = {name: value for name, value in ROW.items() if name != "answer"}
    expected = "row 1: field 'answer' is missing, the row has id, video, language, question"
    assert error(write(tmp_path / "q.jsonl", [incomplete])) == expected
    rows = [{"q": "Who?", "a": "A man.", "video_id": "v_1"}, {"q": "Who?", "a": "A man."}]
    assert error(write_json(tmp_path / "q.json", rows)) == "row 2: field 'video_id' is missing, the row has q, a"


def test_what_is_no_question_file_is_said(tmp_path):
    path = tmp_path / "q.jsonl"
    assert error(path) == "cannot be read: No such file or directory"
    path.write_text("")
    assert error(path) == "holds no questions"
    path.write_text(json.dumps(ROW) + "\n[3]\n")
    assert error(path) == "row 2: is a list of 1, expected an object with fields"
    path.write_text(json.dumps(ROW) + "\n{'id': 3}\n")
    assert error(path).startswith("row 2: is not JSON")
    path.write_text(json.dumps(ROW)[:-1] + ', "answer": "蓝色"}\n')
    assert error(path) == 'row 1: is not JSON: key "answer" comes twice in an object'
    path.write_text("[{]")
    assert error(path).startswith("is not JSON")
    path.write_text("[" * 100_000)
    assert error(path).startswith("is not JSON")
    path.write_bytes("问".encode("gbk"))
    assert error(path).startswith("is not UTF-8")
    path.write_text(json.dumps({**ROW, "answer": "\ud83d"}))  # half of a character
    assert error(path).startswith("row 1: cannot be written as JSON")


# ---- published forms


def test_video_instruct(tmp_path):
    rows = [{"q": "Who?", "a": "A man.", "video_id": "v_1"}] * 2
    rows.append({"q": "画面里 iPhone 旁边是谁？", "a": "一个男人。", "video_id": "v_2"})
    expected = {"video": "v_1", "language": "en", "question": "Who?", "answer": "A man."}
    assert read_instructions(write_json(tmp_path / "q.json", rows)) == [
        {"id": "0", **expected},
        {"id": "1", **expected},
        {"id": "2", "video": "v_2", "language": "zh", "question": rows[2]["q"], "answer": rows[2]["a"]},
    ]


def turns(*values, roles=("human", "gpt")):
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


def test_llava_conversations(tmp_path):
    """Video-ChatGPT's converter: the id is the video's, the marker before or behind the question."""
    rows = [
        {"id": "v_1", "video": "v_1.pkl", "conversations": turns("What is this?\n<video>", "A cat.")},
        {"id": "v_1", "video": "clips/v_1.mp4", "conversations": turns("<video>\nWho?", "A man.", "Why <video>?", "…")},
        {"id": 7, "video": "a.b.MP4", "conversations": turns("<image>\nWhat does </s> mean?", "It is <|im_end|>.")},
        {"id": "x", "video": "v", "language": "fr", "conversations": turns("Qui ?", "Un homme.")},
    ]
    expected = [
        ("v_1/0", "v_1", "en", "What is this?", "A cat."),
        ("v_1/1", "clips/v_1.mp4", "en", "Who?", "A man."),
        ("v_1/2", "clips/v_1.mp4", "en", "Why <video>?", "…"),
        ("7/0", "a.b.MP4", "en", "What does </s> mean?", "It is <|im_end|>."),
        ("x/0", "v", "fr", "Qui ?", "Un homme."),
    ]
    expected = [dict(zip(FIELDS, row, strict=True)) for row in expected]
    assert read_instructions(write_json(tmp_path / "q.json", rows)) == expected
    assert read_instructions(write(tmp_path / "q.jsonl", rows)) == expected
    table = pyarrow.Table.from_pylist([{**row, "id": str(row["id"])} for row in rows[:3]])
    pyarrow.parquet.write_table(table, tmp_path / "q.parquet")
    assert read_instructions(tmp_path / "q.parquet") == expected[:4]


def test_qwen_conversations(tmp_path):
    roles = ("user", "assistant")
    said = ("Picture 1: <img>videos/片段.mp4</img>\n视频里有什么？", "一只猫。", "它在 <img> 做什么？", "睡觉。")
    rows = [
        {"id": "identity_0", "conversations": turns(*said, roles=roles)},
        {"id": "identity_1", "video": "clip", "conversations": turns("你好", "你好！", roles=roles)},
    ]
    assert read_instructions(write_json(tmp_path / "q.json", rows)) == [
        {
            "id": "identity_0/0",
            "video": "videos/片段.mp4",
            "language": "zh",
            "question": "视频里有什么？",
            "answer": "一只猫。",
        },
        {"id": "identity_0/1", "video": "videos/片段.mp4", "language": "zh", "question": said[2], "answer": "睡觉。"},
        {"id": "identity_1/0", "video": "clip", "language": "zh", "question": "你好", "answer": "你好！"},
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"conversations": "hello"},
            "field 'conversations' is \"hello\", expected a list of questions and answers by turns",
        ),
        ({"conversations": turns("Q", "A", "Q")}, "field 'conversations' is a list of 3, expected a list of questions"),
        (
            {"conversations": turns("Q", "A", roles=("gpt", "human"))},
            "turn 1: field 'from' is \"gpt\", expected human or user",
        ),
        ({"conversations": turns("Q", "")}, "turn 2: field 'value' is empty, expected text"),
        ({"conversations": ["Q", "A"]}, 'turn 1: is "Q", expected an object with fields'),
        ({"conversations": turns("<video>", "A")}, "field 'conversations' has a question without text"),
        ({"video": "clips/.mp4"}, "field 'video' is \"clips/.mp4\", expected the name of a video"),
        ({"id": None}, "field 'id' is null, expected text"),
        ({"id": True}, "field 'id' is true, expected text"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path, change, message):
    rows = [{"id": "1", "video": "v", "conversations": turns("Q", "A")}]
    assert error(write_json(tmp_path / "q.json", [*rows, {**rows[0], **change}])).startswith(f"row 2: {message}")


def test_a_conversation_needs_one_video(tmp_path):
    assert error(write(tmp_path / "q", [{"id": "1", "conversations": turns("Q", "A")}])).startswith(
        "row 1: has no video"
    )
    two = "Picture 1: <img>a</img>\nPicture 2: <img>b</img>\nQ"
    path = write(tmp_path / "q", [{"id": "1", "conversations": turns(two, "A")}])
    assert error(path) == "row 1: shows several pictures, expected one video"


def test_odd_rows_are_left_out_with_their_reasons(tmp_path):
    system = [{"from": "system", "value": "Be brief."}, *turns("Q", "A")]
    rows = [
        {"id": "1", "video": "v", "conversations": turns("Q", "A")},
        {"id": "2", "image": "p.jpg", "conversations": turns("<image>\nQ", "A")},
        {"id": "3", "video": "v", "conversations": system},
        {"id": "4", "video": "v", "conversations": turns("Q", "A", "Q 2", "A 2")},
        {"id": "5", "video": "v", "conversations": [{"from": "\ud800", "value": "Q"}]},
    ]
    left_out = []
    (tmp_path / "q.json").write_text(json.dumps(rows))
    kept = read_instructions(tmp_path / "q.json", left_out)
    assert [row["id"] for row in kept] == ["1/0", "4/0", "4/1"]
    assert [reason.removeprefix(f"{tmp_path / 'q.json'}: ") for reason in left_out] == [
        "row 2: has no video: expected a field 'video', or <img>path</img> in the text",
        "row 3: turn 1: field 'from' is \"system\", expected human or user",
        "row 5: turn 1: field 'from' is \"\\ud800\", expected human or user",
    ]
    own = [ROW, {**ROW, "id": "2", "answer": ""}, {**ROW, "id": "3", "answer": "\ud83d"}, {**ROW, "id": "1"}]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, own[:3])))
    left_out = []
    assert read_instructions(path, left_out) == [ROW]
    assert len(left_out) == 2
    path.write_text("\n".join(map(json.dumps, own[1:2])))
    with pytest.raises(UserError, match=r"holds no questions; the first row: .*row 1: field 'answer' is empty"):
        read_instructions(path, [])
    path.write_text("\n".join(map(json.dumps, own)))
    with pytest.raises(UserError, match='row 4: id "1" is already that of row 1'):  # which one is meant?
        read_instructions(path, [])


def test_a_missing_language_is_guessed(tmp_path):
    rows = [{name: row[name] for name in FIELDS if name != "language"} for row in (ROW, {**ROW, "id": "2"})]
    rows[1] |= {"question": "Which colour is first?", "answer": "红"}
    read = read_instructions(write(tmp_path / "q.jsonl", rows))
    assert [row["language"] for row in read] == ["zh", "en"]


def test_languages_are_guessed_by_what_is_more():
    assert guess_language("What does 你好 mean?") == "en"
    assert guess_language("他用 PowerPoint 做什么") == "zh"
    assert guess_language("1 + 1 = 2") == "en"


# ---- mixtures


@pytest.fixture
def files(tmp_path):
    (tmp_path / "other").mkdir()
    write(tmp_path / "a.jsonl", [{**ROW, "id": str(i), "question": f"{i}?"} for i in range(1000)])
    write(tmp_path / "b.jsonl", [{**ROW, "id": str(i), "question": f"{i}!"} for i in range(990, 1010)])
    write(tmp_path / "c.jsonl", [{**ROW, "id": "c"}, {**ROW, "id": "d"}])
    shutil.copy(tmp_path / "c.jsonl", tmp_path / "other" / "c.jsonl")
    return tmp_path


def test_a_weight_takes_the_same_share_every_time(files):
    path = f"{files}/a.jsonl"
    whole, report = read_mixture([path])
    assert whole == read_instructions(path)
    assert report["files"] == [{"file": path, "weight": 1.0, "questions": 1000, "taken": 1000, "prefix": ""}]
    quarter, half = (read_mixture([f"{path}:{weight}"])[0] for weight in ("0.25", ".5"))
    assert 200 < len(quarter) < 300 and 450 < len(half) < 550
    assert [row for row in half if row in quarter] == quarter and [row for row in whole if row in half] == half
    assert [row["id"] for row in half[:6]] == ["0", "1", "3", "4", "7", "8"]  # a function of the ids, for ever


def test_a_weight_above_one_repeats_with_ids_of_their_own(files):
    rows, report = read_mixture([f"{files}/c.jsonl:3"])
    assert [row["id"] for row in rows] == ["c", "c#2", "c#3", "d", "d#2", "d#3"]
    assert {row["question"] for row in rows} == {ROW["question"]}
    assert report["questions_repeated"] == [{"id": "d", "same_as": "c"}]  # what the file repeats, not the weight


def test_files_with_ids_in_common_get_prefixes(files):
    rows, report = read_mixture([f"{files}/{name}.jsonl" for name in "abc"])
    assert [part["prefix"] for part in report["files"]] == ["a/", "b/", ""]
    assert len(rows) == len({row["id"] for row in rows}) == 1022
    assert rows[0]["id"] == "a/0" and rows[1000]["id"] == "b/990" and rows[-1]["id"] == "d"


def test_mixture_mistakes(files):
    with pytest.raises(UserError, match=r"c\.jsonl, .*c\.jsonl: id \"c/c\" comes twice \(2 ids do\): give each"):
        read_mixture([f"{files}/c.jsonl", f"{files}/other/c.jsonl"])
    with pytest.raises(UserError, match=r"c\.jsonl:0.001: the weight leaves none of 2 questions"):
        read_mixture([f"{files}/c.jsonl:0.001"])
    with pytest.raises(UserError, match="the weight is 0, expected more than 0"):
        read_mixture([f"{files}/c.jsonl:0"])


def test_weights_are_split_off():
    assert split_weight("a.json") == ("a.json", 1.0)
    assert split_weight("a:b.json:2") == ("a:b.json", 2.0)
    assert split_weight("a.json:0.5") == ("a.json", 0.5)
    assert split_weight("a.json:half") == ("a.json:half", 1.0)


# ---- a question's video


def found(tmp_path, files, video):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    return find_videos(tmp_path).file(video)


@pytest.mark.parametrize(
    ("video", "file"),
    [
        *(("a", "v_a.mp4"), ("v_b", "b.mp4"), ("c", "c.mp4"), ("v_c", "v_c.mp4"), ("absent", None)),
        *(("c.mp4", "c.mp4"), ("v_b.mp4", "b.mp4"), ("C:\\old\\c.mp4", "c.mp4"), ("elsewhere/c", "c.mp4")),
        *(("x/d", "x/d.mp4"), ("y/d.mp4", "y/d.mp4"), ("data/y/d", "y/d.mp4"), ("d.webm", "y/d.webm")),
        *(("e.mp4", "e.mp4"), ("z/e", "z/e.mp4"), ("f.part", "f.part.mp4"), ("f.part.mp4", "f.part.mp4")),
    ],
)
def test_a_video_may_be_named_by_its_path_and_with_its_extension(tmp_path, video, file):
    files = ["v_a.mp4", "b.mp4", "c.mp4", "v_c.mp4", "x/d.mp4", "y/d.mp4", "y/d.webm", "e.mp4", "z/e.mp4", "f.part.mp4"]
    if video == "y/d.mp4" or not video.endswith("y/d"):
        assert found(tmp_path, files, video) == file
    else:
        assert found(tmp_path, [name for name in files if name != "y/d.webm"], video) == file


def test_a_name_of_two_files_is_a_mistake_of_the_question_that_means_them(tmp_path):
    files = ["x/d.mp4", "y/d.mp4", "c.mp4"]
    assert found(tmp_path, files, "c") == "c.mp4"
    for video in ("d", "d.mp4", "z/d"):
        with pytest.raises(UserError, match=r"may be x/d.mp4 and y/d.mp4 of .*: write its path into the question"):
            found(tmp_path, files, video)


def test_ids_of_videos_find_their_files_again(tmp_path):
    files = ["c.mp4", "x/d.mp4", "y/d.mp4", "d.mp4", "e/f.mp4", "e/f.webm"]
    assert found(tmp_path, files, "c") == "c.mp4"
    videos = find_videos(tmp_path)
    ids = {file: videos.id(file) for file in files}
    assert ids == dict(zip(files, ("c", "x/d", "y/d", "d.mp4", "e/f.mp4", "e/f.webm"), strict=True))
    assert {videos.file(id): id for id in ids.values()} == ids


# ---- special strings are text


@pytest.mark.parametrize("family", ["llava", "llava_v1", "qwen_vl"])
def test_strings_that_look_like_special_tokens_are_text(family, tmp_path):
    write_text_files(family.removesuffix("_v1"), tmp_path)
    if family == "llava_v1":  # its image markers stand outside tokenizer.json, as if they were words
        first = len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]) + 1
        write_json(tmp_path / "added_tokens.json", {"<im_start>": first, "<im_end>": first + 1})
    tokenizer = load_family(family.removesuffix("_v1")).Tokenizer(tmp_path)
    names = {"llava": ["<s>", "</s>", "<image>"], "llava_v1": ["<s>", "</s>", "<image>", "<im_start>", "<im_end>"]}
    control = {tokenizer.special(token) for token in names.get(family, SPECIAL_TOKENS)}
    assert len(control) == len(names.get(family, SPECIAL_TOKENS))
    for string in SPECIALS:
        for text in (string, f"What is {string} here?", f"中{string}文"):
            ids = tokenizer.encode(text)
            assert not control & set(ids), f"{text!r} has a control token"
            assert tokenizer.decode(ids).strip() == text
            check_round_trip(tokenizer, text, "here")


# ---- anything else ends in one line

TEXTS = st.text(max_size=8) | st.sampled_from(
    ["zh", "<video>", "<video>\nQ", "Picture 1: <img>v.mp4</img>\nQ", "human", "gpt"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
TURNS = st.lists(
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "user", "assistant", 3]), "value": TEXTS | VALUES}),
    max_size=4,
)
RECORDS = st.one_of(
    st.fixed_dictionaries(dict.fromkeys(FIELDS, TEXTS | VALUES), optional={"kind": VALUES, "more": VALUES}),
    st.fixed_dictionaries(dict.fromkeys(("q", "a", "video_id"), TEXTS | VALUES)),
    st.fixed_dictionaries({"id": TEXTS | VALUES, "conversations": TURNS | VALUES}, optional={"video": TEXTS | VALUES}),
    st.dictionaries(st.sampled_from([*FIELDS, "q", "conversations"]) | TEXTS, VALUES, max_size=5),
    VALUES,
)


@st.composite
def contents(draw):
    """A file name and bytes: rows as JSON or CSV, often damaged, or anything."""
    rows = draw(st.lists(RECORDS, max_size=4))
    form = draw(st.sampled_from(["list", "lines", "table", "bytes", "text"]))
    if form == "list":
        content = json.dumps(rows).encode()
    elif form == "lines":
        content = "\n".join(json.dumps(row) for row in rows).encode()
    elif form == "table":
        cells = st.lists(TEXTS.map(lambda text: text.replace("\ud800", "")), min_size=1, max_size=5)
        content = "\n".join([",".join(FIELDS), *(",".join(row) for row in draw(st.lists(cells, max_size=4)))])
        content = content.encode("utf-8", "replace")
    elif form == "bytes":
        content = draw(st.sampled_from([b"", b"PAR1", b"\xef\xbb\xbf", b"["])) + draw(st.binary(max_size=60))
    else:
        content = draw(st.text(max_size=60)).encode("utf-8", "replace")
    if content and draw(st.booleans()):
        position = draw(st.integers(0, len(content) - 1))
        content = content[:position] + draw(st.binary(max_size=3)) + content[position + 1 :]
    return draw(st.sampled_from(["q.json", "q.csv", "q.tsv", "q.parquet"])), content


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(contents())
def test_every_file_gives_rows_or_one_line(tmp_path, file):
    path = tmp_path / file[0]
    path.write_bytes(file[1])
    try:
        rows = read_instructions(path)
    except UserError as mistake:
        assert str(mistake).startswith(str(path)) and "\n" not in str(mistake)
        return
    assert rows and len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert all(isinstance(row[field], str) and row[field].strip() for field in FIELDS)
        json.dumps(row, ensure_ascii=False).encode()
