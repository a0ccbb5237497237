"""README and docs: names and links in them exist, and every source is one that a reader can open."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path
    for folder in ("data_pipeline", "redvillm_jax", "conversion", "configs")
    for path in (ROOT / folder).rglob("*.py")
]
ENTRIES = re.findall(r"`([\w/]+\.py): (\w+)`", (ROOT / "docs" / "where.md").read_text())


def defined(path: Path) -> set[str]:
    """The functions, classes and constants at the top of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        names |= {getattr(target, "name", None) or getattr(target, "id", "") for target in targets}
    return names


def test_where_leads_to_functions_that_exist():
    assert len(ENTRIES) > 40
    assert not [entry for entry in ENTRIES if entry[1] not in defined(ROOT / entry[0])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not link.startswith("http")]
    assert not [link for link in links if not (page.parent / link).exists()]
    paths = re.findall(r"`((?:data_pipeline|redvillm_jax|conversion|tests|benchmarks|configs|docs)/[\w/.]+)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_lies_outside_the_repository(path):
    found = re.findall(r"\(facts: |\bfacts\.md|\bdesign(?:\.md|'s lead)|\bshared/\w+\.md", path.read_text())
    assert not found, "name the paper's section, or a repository and its file"
