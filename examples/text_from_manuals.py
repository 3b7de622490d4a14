"""Turn manuals in HTML into training text: one file, three blank lines between pages, nothing said twice.

    pip install beautifulsoup4 lxml
    python examples/text_from_manuals.py manuals.txt /usr/share/doc/debian-* --without held_out_book.txt

Navigation, tables of contents and other languages than English are left out, as is every paragraph that was
there before (manuals come as one page and as many, and repeat their notices) and every paragraph that shares
thirteen words in a row with a text of ``--without``, so that a held-out text stays unseen.
"""

import argparse
import gzip
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from bs4 import BeautifulSoup, Tag, XMLParsedAsHTMLWarning

BLOCKS = ["p", "li", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "td", "th", "title"]
NOT_TEXT = ["script", "style", "nav", "header", "footer", "form", "head", "svg", "noscript"]
PAGES = re.compile(r"(\.html?|\.html?\.en|\.page)(\.gz)?$")
OTHER_LANGUAGE = r"(?:^|[/._-])(?!en)[a-z]{2}(?:[-_][A-Za-z]{2,4})?(?=/|\.html)"
SKIPPED = re.compile(rf"{OTHER_LANGUAGE}|genindex|search\.html|/toc\.html|changelog")
OVERLAP = 13
"""Words in a row: what GPT-3's authors used to tell that a text was seen."""
SHORTEST_PAGE = 600
"""Characters; what is shorter is hardly prose."""
SHORTEST_NOTICE = 40
"""Characters; what is shorter, such as a heading, may come again."""
SHORTEST_CELL = 60
"""Characters of a table's cell that reads as a sentence."""


def main() -> None:
    """Read pages, write text."""
    parser = argparse.ArgumentParser(description="Turn manuals in HTML into training text.")
    parser.add_argument("target", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--without", type=Path, action="append", default=[], help="must stay unseen")
    options = parser.parse_args()
    warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
    unseen = {run for path in options.without for run in _runs(path.read_text(encoding="utf-8"))}
    keeper = Keeper(unseen)
    pages = paragraphs = 0
    with options.target.open("w", encoding="utf-8") as file:
        for folder in options.folders:
            for path in sorted(folder.rglob("*")):
                if not PAGES.search(path.name) or SKIPPED.search(str(path.relative_to(folder))):
                    continue
                if not path.is_file():  # a folder by such a name, or a link into another package
                    continue
                kept = [block for block in blocks(path) if keeper.keeps(block)]
                text = "\n\n".join(kept)
                if len(text) >= SHORTEST_PAGE:
                    file.write(text + "\n\n\n")
                    pages += 1
                    paragraphs += len(kept)
    print(
        f"{pages} pages, {paragraphs} paragraphs, {options.target.stat().st_size / 1e6:.1f} MB; "
        f"{keeper.overlapping} paragraphs left out for sharing {OVERLAP} words with a text of --without"
    )


class Keeper:
    """Decides which paragraphs are new, and allowed to be seen."""

    def __init__(self, unseen: set[tuple[str, ...]]) -> None:
        self.overlapping = 0
        self._unseen = unseen
        self._said: set[str] = set()

    def keeps(self, block: str) -> bool:
        """Say whether a paragraph is kept, and remember it."""
        key = " ".join(_words(block))
        if len(key) >= SHORTEST_NOTICE and key in self._said:
            return False
        self._said.add(key)
        overlaps = not self._unseen.isdisjoint(_runs(block))
        self.overlapping += overlaps
        return not overlaps


def blocks(path: Path) -> Iterator[str]:
    """Give the paragraphs, items, headings and listings of one page in order."""
    data = path.read_bytes()
    soup = BeautifulSoup(gzip.decompress(data) if path.suffix == ".gz" else data, "lxml")
    for element in soup.find_all(NOT_TEXT):
        element.decompose()
    for element in soup.find_all(BLOCKS):
        if not isinstance(element, Tag) or element.find(BLOCKS) is not None:
            continue
        if element.name == "pre":
            text = element.get_text().strip("\n")
        else:
            text = " ".join(element.get_text().split())
        if element.name in ("td", "th") and len(text) < SHORTEST_CELL:
            continue
        links = sum(len(link.get_text()) for link in element.find_all("a"))
        if text.strip() and links <= 0.6 * len(text):
            yield text.replace("\n\n\n", "\n\n")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = _words(text)
    return (tuple(words[i : i + OVERLAP]) for i in range(len(words) - OVERLAP + 1))


if __name__ == "__main__":
    main()
