"""Documents that code cites exist, and so does what documents link to."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import sd15, sdxl, subjects3d

ROOT = Path(__file__).parents[1]
SOURCES = [p for top in ("cc_jax", "data_pipeline", "configs") for p in (ROOT / top).rglob("*.py")]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A path that ends in .md, and the title of a section where one follows. In backticks stands what
# code itself writes.
CITATION = re.compile(r'(?<![`\w./-])([\w./-]*\w\.md)\b(?:,\s+"([^"]+)")?')
LINK = re.compile(r"\]\(([^)\s]+)\)")
KEY = re.compile(r"`(data|encoder|injection|objective|train|sample)\.(\w+)\b")


def prose(source: str) -> Iterator[str]:
  """Docstrings, and blocks of comments on neighbouring lines, each as one line of text."""
  documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, documented):
      yield " ".join((ast.get_docstring(node) or "").split())
  block, last = [], 0
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      if token.start[0] != last + 1:
        yield " ".join(block)
        block = []
      block.append(token.string.lstrip("# "))
      last = token.start[0]
  yield " ".join(block)


def headings(page: Path) -> list[str]:
  text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
  return re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)


def anchors(page: Path) -> set[str]:
  """As GitHub makes them: lower case, no punctuation, hyphens for spaces, -1 for a second one."""
  seen: list[str] = []
  for heading in headings(page):
    slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    seen.append(slug + (f"-{seen.count(slug)}" if slug in seen else ""))
  return set(seen)


def broken_citations(text: str) -> list[str]:
  """Documents, and sections of them, that the text names and the repository lacks."""
  return [
    match[0] for match in CITATION.finditer(text)
    if ".." in match[1] or not (ROOT / match[1]).is_file()
    or (match[2] and match[2].rstrip(".") not in headings(ROOT / match[1]))
  ]  # fmt: skip


def broken_links(page: Path) -> list[str]:
  """Relative links of a page to a file or an anchor that does not exist."""
  text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
  broken = []
  for link in LINK.findall(text):
    if re.match(r"\w+:", link):
      continue
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    if not target.exists() or (anchor and anchor not in anchors(target)):
      broken.append(link)
  return broken


def test_cited_documents_exist():
  broken = {
    f"{path.relative_to(ROOT)}: {citation}"
    for path in SOURCES for text in prose(path.read_text()) for citation in broken_citations(text)
  }  # fmt: skip
  assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  assert not broken_links(page)


def test_broken_references_are_found(tmp_path):
  assert broken_citations("As ../shared/lab.md says, and method.md.") == [
    "../shared/lab.md", "method.md"]  # fmt: skip
  assert broken_citations('See docs/method.md, "MACL". Or docs/method.md, "Nothing".') == [
    'docs/method.md, "Nothing"']  # fmt: skip
  assert list(prose('x = 1  # (docs/no.md,\n# "A b")\n'))[-1] == '(docs/no.md, "A b")'
  page = tmp_path / "page.md"
  page.write_text("# A [R], b\n[x](#a-r-b) [x](no.md) [x](page.md#c) [x](https://x.org) [x](.)")
  assert broken_links(page) == ["no.md", "page.md#c"]


def test_method_page_names_every_reading():
  """Each key that docs/method.md names exists, and each key that a config marks [R] is there."""
  page = (ROOT / "docs" / "method.md").read_text()
  named = set(KEY.findall(page))
  config = subjects3d.get_config()
  assert not {f"{section}.{key}" for section, key in named if key not in config[section]}
  for module in (subjects3d, sd15, sdxl):
    text = ""  # comments since the last key
    for line in Path(module.__file__).read_text().splitlines():
      text += line.partition("#")[2]
      if key := re.match(r" +c\.(\w+)\.(\w+) = ", line):
        assert "[R]" not in text or key.groups() in named, key[0]
        text = ""
