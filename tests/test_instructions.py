import json

import pytest

from data_pipeline.errors import UserError
from data_pipeline.instructions import read_instructions

ROW = {"id": "1", "video": "clip", "language": "zh", "question": "先出现什么颜色？", "answer": "红色"}


def write(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def error(path):
    with pytest.raises(UserError) as raised:
        read_instructions(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_json_lines(tmp_path):
    rows = [ROW, {**ROW, "id": "2", "kind": "first_colour", "source": "kept"}]
    path = write(tmp_path / "q.jsonl", rows)
    assert read_instructions(path) == rows
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))  # BOM, CRLF, blank lines
    assert read_instructions(path) == rows


def test_line_separators_inside_a_text_do_not_end_the_row(tmp_path):
    rows = [{**ROW, "answer": "one\u2028two\x85three\nfour"}]
    assert read_instructions(write(tmp_path / "q.jsonl", rows)) == rows


def test_video_instruct(tmp_path):
    path = tmp_path / "q.json"
    path.write_text(json.dumps([{"q": "Who?", "a": "A man.", "video_id": "v_1"}] * 2))
    expected = {"video": "v_1", "language": "en", "question": "Who?", "answer": "A man."}
    assert read_instructions(path) == [{"id": "0", **expected}, {"id": "1", **expected}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "row 2: field 'answer' is null, expected text"),
        ({"question": " "}, "row 2: field 'question' is empty, expected text"),
        ({"video": 7}, "row 2: field 'video' is 7, expected text"),
        ({"kind": ""}, "row 2: field 'kind' is empty, expected text"),
        ({"id": "1"}, "row 2: id '1' is already that of row 1"),
    ],
)
def test_a_bad_field_is_named(tmp_path, change, message):
    assert error(write(tmp_path / "q.jsonl", [ROW, {**ROW, "id": "2", **change}])) == message


def test_a_missing_field_is_named(tmp_path):
    incomplete = {name: value for name, value in ROW.items() if name != "language"}
    expected = "row 1: field 'language' is missing (expected id, video, language, question, answer)"
    assert error(write(tmp_path / "q.jsonl", [incomplete])) == expected
    path = tmp_path / "q.json"
    path.write_text(json.dumps([{"q": "Who?", "a": "A man.", "video_id": "v_1"}, {"q": "Who?", "a": "A man."}]))
    assert error(path) == "row 2: field 'video_id' is missing (expected q, a, video_id)"


def test_what_is_no_question_file_is_said(tmp_path):
    path = tmp_path / "q.jsonl"
    assert error(path) == "cannot be read: No such file or directory"
    path.write_text("")
    assert error(path) == "holds no questions"
    path.write_text(json.dumps(ROW) + "\n[3]\n")
    assert error(path) == "row 2: is a list, expected an object with id, video, language, question, answer"
    path.write_text(json.dumps(ROW) + "\n{'id': 3}\n")
    assert error(path).startswith("row 2: is not JSON")
    path.write_text("[{]")
    assert error(path).startswith("is not JSON")
    path.write_bytes("问".encode("gbk"))
    assert error(path).startswith("is not UTF-8")
