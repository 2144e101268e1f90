"""Makes the committed data files from the packages that they came in, so that anyone can check each byte's origin.

    python data/prepare.py FASHION_MNIST_DEB_FOLDER HANDBOOK_DEB_FOLDER VADER_SDIST SKIMAGE_FOLDER SKLEARN_FOLDER [OUT]

The two folders are the Debian packages unpacked with `dpkg-deb -x`; versions and hashes are in manifest.toml. Files are
copied or re-compressed unchanged; only the handbook's HTML is turned into plain prose. No course command runs this.
"""

import gzip
import io
import re
import shutil
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path

# Chapters (counted from 0, the foreword) whose text is for measuring perplexity; the others are calibration text. Every
# second one, so that both parts cover the book's range of subjects; a chapter is never divided.
TEST_PLACES = range(1, 100, 2)


class Prose(HTMLParser):
    """Collects the text of every `<div class="para">`, a string each; listings, titles and navigation are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._open: list[tuple[str, bool]] = []  # (tag, does it collect) of each open element
        self._text = ""

    def _flush(self) -> None:
        text = re.sub(r"\s+", " ", self._text).strip()
        if text:
            self.paragraphs.append(text)
        self._text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("img", "br", "hr", "meta", "link"):
            return
        classes = (dict(attrs).get("class") or "").split()
        collects = bool(self._open) and self._open[-1][1]
        if tag == "div" and "para" in classes:
            self._flush()
            collects = True
        elif tag in ("pre", "p", "h1", "h2", "h3", "h4", "h5", "table", "div") or "docnav" in classes:
            self._flush()
            collects = False
        self._open.append((tag, collects))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An empty element holds no text."""

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1][0] == tag:
            self._open.pop()
            if tag in ("div", "pre", "p", "li", "dd", "td"):
                self._flush()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][1]:
            self._text += data


def _prose(page: Path) -> list[str]:
    parser = Prose()
    parser.feed(page.read_text(encoding="utf-8"))
    parser._flush()
    return parser.paragraphs


def _chapters(folder: Path) -> list[tuple[str, list[str]]]:
    """(first page, paragraphs) of each chapter in the book's order, along the `rel="next"` links from the foreword."""
    chapters: list[tuple[str, list[str]]] = []
    name: str | None = "foreword.html"
    while name:
        page = folder / name
        if not name.startswith("sect."):
            chapters.append((name, []))
        chapters[-1][1].extend(_prose(page))
        following = re.search(r'<link rel="next" href="([^"]+)"', page.read_text(encoding="utf-8"))
        name = following[1] if following else None
    return chapters


def _write_gz(path: Path, content: bytes) -> None:
    """The same bytes in give the same bytes out: no name and no time in the header."""
    with open(path, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(content)


def main(
    fashion: str, handbook: str, vader: str, skimage: str, sklearn: str, out: str = str(Path(__file__).parent)
) -> None:
    target = Path(out)
    for folder in ("fashion-mnist", "handbook", "reviews", "photos"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    for source in sorted(Path(fashion, "usr/share/datasets/fashion-mnist").glob("*.gz")):
        shutil.copyfile(source, target / "fashion-mnist" / source.name)

    chapters = _chapters(Path(handbook, "usr/share/doc/debian-handbook/html/en-US"))
    for part, keep in (
        ("calibration", lambda place: place not in TEST_PLACES),
        ("test", lambda place: place in TEST_PLACES),
    ):
        chosen = [(name, text) for place, (name, text) in enumerate(chapters) if keep(place)]
        content = "\n\n".join(paragraph for _, text in chosen for paragraph in text) + "\n"
        _write_gz(target / "handbook" / f"{part}.txt.gz", content.encode())
        print(part, len(content.encode()), "bytes:", *(name.removesuffix(".html") for name, _ in chosen))

    with tarfile.open(vader) as sdist:
        nested = sdist.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(nested)) as archive:
        snippets = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read()
    _write_gz(target / "reviews" / "movieReviewSnippets_GroundTruth.txt.gz", snippets)

    for source in (Path(skimage, "data"), Path(sklearn, "datasets/images")):
        for name in ("chelsea.png", "coffee.png", "china.jpg", "flower.jpg"):
            if (source / name).exists():
                shutil.copyfile(source / name, target / "photos" / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
