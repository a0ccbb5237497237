import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.common.errors import UserError
from data_pipeline.questions.eval_sets import ASK_LETTER, BENCHMARKS, read_benchmark


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def error(benchmark, path):
    with pytest.raises(UserError) as raised:
        read_benchmark(benchmark, path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def read(benchmark, path):
    """The rows without the set's name, which all of them have."""
    rows = read_benchmark(benchmark, path)
    assert all(row.pop("benchmark") == benchmark for row in rows)
    return rows


def row(id, video, question, answer, **more):
    return {"id": id, "video": video, "language": "en", "question": question, "answer": answer, **more}


# ---- answers in words


def test_vcgbench(tmp_path):
    generic = {"Q": "What happens?", "A": "A man runs.", "video_name": "v_p1"}
    pair = {"Q1": "What is worn?", "Q2": "Which clothes?", "A": "A hat.", "video_name": "v_p2"}
    write(tmp_path / "generic_qa.json", [generic, generic])
    write(tmp_path / "temporal_qa.json", [generic])
    write(tmp_path / "consistency_qa.json", [pair])
    said = ("v_p1", "What happens?", "A man runs.")
    expected = [
        row("generic/0", *said, kind="generic"),
        row("generic/1", *said, kind="generic"),
        row("temporal/0", *said, kind="temporal"),
        row("consistency/0/1", "v_p2", "What is worn?", "A hat.", kind="consistency", group="consistency/0"),
        row("consistency/0/2", "v_p2", "Which clothes?", "A hat.", kind="consistency", group="consistency/0"),
    ]
    assert read("vcgbench", tmp_path) == expected
    assert read("vcgbench", tmp_path / "temporal_qa.json") == expected[2:3]
    (tmp_path / "temporal_qa.json").rename(tmp_path / "t.json")
    assert error("vcgbench", tmp_path).startswith(f"{tmp_path}: has no temporal_qa.json; give one file")
    assert "expected a file named generic_qa.json, temporal_qa.json" in error("vcgbench", tmp_path / "t.json")


def test_msvd_qa(tmp_path):
    rows = [{"answer": "cat", "id": 7, "question": "what runs?", "video_id": n} for n in (1301, 2)]
    path = write(tmp_path / "test_qa.json", rows[:1])
    assert read("msvd_qa", tmp_path) == [row("7", "vid1301", "what runs?", "cat")]
    write(tmp_path / "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid1\r\nYmXCfQm0_CA_18_25 vid1301\r\n\r\n")
    assert read("msvd_qa", path) == [row("7", "YmXCfQm0_CA_18_25", "what runs?", "cat")]
    write(path, [rows[0], {**rows[1], "id": 8}])
    assert "row 2: " in error("msvd_qa", path) and "has no vid2" in error("msvd_qa", path)
    write(tmp_path / "youtube_mapping.txt", "name vid1301\nname2\n")
    assert 'youtube_mapping.txt: row 2: is "name2", expected a name' in error("msvd_qa", path)


def test_msrvtt_qa(tmp_path):
    rows = [{"answer": "couch", "category_id": 14, "id": 158581, "question": "what?", "video_id": 7010}]
    write(tmp_path / "test_qa.json", rows)
    assert read("msrvtt_qa", tmp_path) == [row("158581", "video7010", "what?", "couch")]


def test_tgif_frameqa(tmp_path):
    header = "gif_name\tquestion\tanswer\ttype\tvid_id\tkey\tdescription\r\n"
    line = "tumblr_x_250\twhat is in the cone ?\tcookie\t{}\tFRAMEQA1159\t27138\ta cookie , in a cone .\r\n"
    path = write(tmp_path / "Test_frameqa_question.csv", header + line.format(2))
    expected = [row("FRAMEQA1159", "tumblr_x_250", "what is in the cone ?", "cookie", kind="color")]
    assert read("tgif_frameqa", tmp_path) == expected
    write(path, header + line.format(4))
    assert error("tgif_frameqa", path) == f"{path}: row 2: field 'type' is \"4\", expected 0 to 3"


@pytest.mark.parametrize("benchmark", ["activitynet_qa", "msvd_qa", "msrvtt_qa", "tgif_frameqa"])
def test_pairs_of_files_are_matched_by_id(tmp_path, benchmark):
    asked = [("1QIU", "is it red", "v_1QIU_3"), ("9eni", "how many", "v_9eni_2")]
    asked = [dict(zip(("video_name", "question", "question_id"), values, strict=True)) for values in asked]
    answers = [("two", 7, "v_9eni_2"), ("unused", 0, "v_x_1"), ("no", 3, "v_1QIU_3")]
    answers = [dict(zip(("answer", "type", "question_id"), values, strict=True)) for values in answers]
    path = write(tmp_path / "test_q.json", asked)
    assert "test_a.json: cannot be read" in error(benchmark, path)
    write(tmp_path / "test_a.json", answers)
    kinds = [{"kind": "yes/no"}, {"kind": "number"}] if benchmark == "activitynet_qa" else [{}, {}]
    assert read(benchmark, path) == [
        row("v_1QIU_3", "1QIU", "is it red", "no", **kinds[0]),
        row("v_9eni_2", "9eni", "how many", "two", **kinds[1]),
    ]
    write(tmp_path / "test_a.json", answers[:2])
    assert 'test_a.json has no answer with question_id "v_1QIU_3"' in error(benchmark, path)
    write(tmp_path / "test_a.json", [answers[0]] * 2)
    assert 'row 2: question_id "v_9eni_2" is already answered' in error(benchmark, path)


# ---- multiple choice


def test_mvbench(tmp_path):
    data = {"question": "What first?", "candidates": ["Ate.", "Slept.", "Sat."], "answer": "Slept."}
    write(tmp_path / "action_sequence.json", [{"video": "ZS9XR.mp4", "start": 11.1, "end": 17, **data}])
    write(tmp_path / "moving_count.json", [{"video": "clevrer/video_1.mp4", **data}])
    choices = ["A. Ate.", "B. Slept.", "C. Sat."]
    question = f"What first?\nA. Ate.\nB. Slept.\nC. Sat.\n{ASK_LETTER}"
    kinds = ("action_sequence", "moving_count")
    expected = [
        row(f"{kinds[0]}/0", "ZS9XR", question, "B", kind=kinds[0], choices=choices, start=11.1, end=17.0),
        row(f"{kinds[1]}/0", "video_1", question, "B", kind=kinds[1], choices=choices),
    ]
    assert read("mvbench", tmp_path) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "Ran."}, "field 'answer' is \"Ran.\", which is none of its 2 candidates"),
        ({"candidates": ["Ate."]}, "field 'candidates' has 1 entries, expected 2 to 26"),
        ({"candidates": "Ate."}, "field 'candidates' is \"Ate.\", expected a list of texts"),
        ({"candidates": ["Ate.", ""]}, "candidates: field '2' is empty, expected text"),
        ({"start": 3}, "field 'end' is missing, the row has video, question, candidates, answer, start"),
        ({"start": 3, "end": 2}, "is about 3 to 2 seconds, expected a part of a video"),
        ({"start": 3, "end": 10**12}, "is about 3 to 1000000000000 seconds, expected a part of a video"),
    ],
)
def test_mvbench_mistakes(tmp_path, change, message):
    data = {"video": "a.mp4", "question": "What first?", "candidates": ["Ate.", "Slept."], "answer": "Ate."}
    path = write(tmp_path / "action_sequence.json", [data, {**data, **change}])
    assert error("mvbench", path) == f"{path}: row 2: {message}"


def test_videomme(tmp_path):
    options = ["A. Apples.", "B. Candles.", "C. Berries.", "D. All."]
    data = {"video_id": "001", "duration": "short", "videoID": "fFjv93ACGo8", "question_id": "001-1"}
    data |= {"task_type": "Counting Problem", "question": "Which?", "options": options, "answer": "C"}
    path = tmp_path / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([data]), path)
    question = "\n".join(("Which?", *options, ASK_LETTER))
    more = {"kind": "short/Counting Problem", "choices": options}
    assert read("videomme", tmp_path) == [row("001-1", "fFjv93ACGo8", question, "C", **more)]
    path = write(tmp_path / "v.json", [{**data, "options": ["Apples.", "Candles."]}])
    assert error("videomme", path).endswith("field 'options' is a list of 2, expected 'A. …', 'B. …' and so on")
    path = write(tmp_path / "v.json", [{**data, "answer": "E"}])
    assert error("videomme", path).endswith('answer "E" is none of A, B, C, D')


def test_tempcompass(tmp_path):
    def put(form, question, answer):
        return write(tmp_path / f"{form}.json", {"103_reverse": {"action": [{"question": question, "answer": answer}]}})

    put("multi-choice", "What?\nA. dunking\nB. passing", "B. passing")
    put("yes_no", "Is he dunking?", "yes")
    put("caption_matching", "Which?\nOption 1: He runs.\nOption 2: He sits: now.", "Option 2: He sits: now.")
    put("captioning", "Information A: …\nGenerated Caption:", "B. dunking")

    def expected(form, *said, **more):
        return row(f"{form}/103_reverse/action/0", "103_reverse", *said, kind=f"{form}/action", **more)

    asked = "\nPlease directly give the best option:"
    options, captions = ["A. dunking", "B. passing"], ["Option 1: He runs.", "Option 2: He sits: now."]
    assert read("tempcompass", tmp_path) == [
        expected("multi-choice", f"What?\nA. dunking\nB. passing{asked}", "B", choices=options),
        expected("yes_no", "Is he dunking?\nPlease answer yes or no:", "yes"),
        expected("caption_matching", "\n".join(("Which?", *captions)) + asked, "Option 2", choices=captions),
        expected("captioning", "Information A: …\nGenerated Caption:", "B. dunking"),
    ]
    where = '"103_reverse", "action", row 1'
    path = put("multi-choice", "What?\nA. dunking", "C. gone")
    assert error("tempcompass", path) == f'{path}: {where}: answer "C. gone" is no line of the question'
    path = put("yes_no", "Is he?", "maybe")
    assert error("tempcompass", path) == f'{path}: {where}: answer "maybe" is neither yes nor no'
    write(path, {"103": {"action": {}}})
    assert error("tempcompass", path) == f'{path}: "103", "action": is a dict of 0, expected a list'


def test_vnbench(tmp_path):
    data = {"video": "/VNBench_new/1_cnt_edit1.mp4", "type": "cnt_edit1", "needle_time": [3, 9], "length": 30.5}
    data |= {"question": "How many?", "options": [3, 1, "2", 4], "gt": 2, "gt_option": "C"}
    write(tmp_path / "VNBench-main-4try.json", [{**data, "try": i} for i in range(4)])
    choices = ["A. 3", "B. 1", "C. 2", "D. 4"]
    question = "\n".join(("How many?", *choices, ASK_LETTER))
    video = "1_cnt_edit1"
    more = {"kind": "cnt_edit1", "group": video, "choices": choices}
    expected = [row(f"{video}_{i}", video, question, "C", **more) for i in range(4)]
    assert read("vnbench", tmp_path) == expected


# ---- mistakes


def test_what_is_no_set_is_said(tmp_path):
    assert error("mmbench", tmp_path) == f"unknown benchmark 'mmbench', expected one of {', '.join(BENCHMARKS)}"
    for name in BENCHMARKS:
        assert " has no " in error(name, tmp_path)
        assert "none.json: " in error(name, tmp_path / "none.json")
    data = {"answer": "cat", "id": 7, "question": "what?", "video_id": 1}
    path = write(tmp_path / "test_qa.json", [data, data])
    assert error("msrvtt_qa", path) == f'{path}: row 2: id "7" is already that of row 1'
    path = write(tmp_path / "test_qa.json", [])
    assert error("msrvtt_qa", path) == f"{path}: holds no questions"


NAMES = ("Q", "Q1", "Q2", "A", "video_name", "id", "video_id", "question", "answer", "question_id", "type", "try", "gt")
NAMES += ("gif_name", "vid_id", "video", "candidates", "options", "start", "end", "videoID", "task_type", "duration")
SCALARS = (
    st.none() | st.booleans() | st.integers(-1, 9) | st.floats() | st.sampled_from(["a", "A. a", "yes", "", "v.mp4"])
)
VALUES = SCALARS | st.text(max_size=4) | st.lists(SCALARS, max_size=3) | st.just(["a", "b"]) | st.just(10**400)
ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=8) | VALUES, max_size=3)
NESTED = st.dictionaries(st.text(max_size=3), st.dictionaries(st.text(max_size=3), ROWS | VALUES, max_size=2) | VALUES)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.sampled_from(list(BENCHMARKS)), st.data())
def test_every_file_gives_rows_or_one_line(tmp_path, benchmark, data):
    file = {"mvbench": "task.json", "videomme": "test-0.parquet"}.get(benchmark, BENCHMARKS[benchmark].files[0])
    kinds = NESTED | ROWS if benchmark == "tempcompass" else ROWS
    write(tmp_path / "test_a.json", json.dumps(data.draw(ROWS)))
    path = write(tmp_path / file, json.dumps(data.draw(kinds)))
    try:
        rows = read_benchmark(benchmark, path)
    except UserError as mistake:
        assert "\n" not in str(mistake)
        return
    for found in rows:
        assert all(
            isinstance(found[name], str) and found[name].strip() for name in ("id", "video", "question", "answer")
        )
        choices = found.get("choices")
        assert choices is None or sum(choice.startswith(found["answer"]) for choice in choices) == 1
