"""Tables as text: where cells stand, and that what is too wide is not lost."""

from data_pipeline.common.tables import markdown_table, table_row, text_table


def test_cells_stand_where_their_column_says():
    columns = ("<4", "  >6", " <0")
    assert table_row(("ab", 1.5, "a remark"), columns) == "ab       1.5 a remark"
    assert table_row(("too wide", 12), columns) == "too wide      12"
    assert text_table(("", "n"), [("a", 1), ("b", 20)], columns) == ["           n", "a          1", "b         20"]


def test_markdown_is_as_wide_as_its_cells():
    rows = [["a", "1"], ["bcd", "200"]]
    assert markdown_table(["x", "y"], rows) == ["| x   | y   |", "| --- | --- |", "| a   | 1   |", "| bcd | 200 |"]
    assert markdown_table(["x", "y"], rows, ">")[:3] == ["|   x |   y |", "| --: | --: |", "|   a |   1 |"]
