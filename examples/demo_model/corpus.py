"""The demo model's text, by domain, from packages that Debian and Python carry, and from a generator of arithmetic.

Examples:
  python -m examples.demo_model.corpus --fetch build/sources   # download and unpack the Debian packages, no root needed
  python -m examples.demo_model.corpus --sources build/sources # documents and characters per domain and split
"""

import argparse
import csv
import io
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

from examples.demo_model.arithmetic import arithmetic_documents
from examples.demo_model.chat import chat_documents

PACKAGES = ("r-cran-janeaustenr", "bible-kjv", "bible-kjv-text", "iso-codes")
DOMAINS = ("python", "prose", "data", "arithmetic", "chat")
HELD_OUT_BOOKS = ("northangerabbey", "kjv/Ruth", "kjv/Jonah", "kjv/Jas")
AREAS = ("Africa", "America", "Antarctica", "Asia", "Atlantic", "Australia", "Europe", "Indian", "Pacific")


class MissingSource(Exception):
    """A source of text is not on this machine; the message says which and how to get it."""


@dataclass(frozen=True)
class Document:
    """One text of one domain. `name` decides the split, so a file is wholly in training or wholly held out."""

    domain: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        return self.name in HELD_OUT_BOOKS or zlib.crc32(self.name.encode()) % 20 == 0


def require(path: Path, package: str) -> Path:
    """`path` if it is there; else MissingSource, which names the Debian package."""
    if not path.exists():
        raise MissingSource(f"{path} is missing: install Debian's {package}, or run this module with --fetch DIR")
    return path


def python_documents() -> Iterator[Document]:
    """Modules of the running Python's standard library, without its tests and its tables."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    for path in sorted(require(root / "json", "python3").parent.rglob("*.py")):
        name = path.relative_to(root)
        if skipped.isdisjoint(name.parts) and not path.name.startswith("_sysconfigdata"):
            yield Document("python", str(name), path.read_text("utf-8", errors="ignore"))


def novels(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of Jane Austen's novels out of the R package's lazy-load database.

    Its records are a 4-byte size and a zlib stream each; a character vector holds strings as flags, length and bytes.
    """
    path = root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    rest = require(path, "r-cran-janeaustenr").read_bytes()
    names = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
    found = 0
    while len(rest) > 4:
        stream = zlib.decompressobj()
        record = stream.decompress(rest[4:])
        rest = stream.unused_data
        lines = list(r_strings(record))
        if len(lines) > 1000:
            yield names[found], lines
            found += 1


def r_strings(record: bytes) -> Iterator[str]:
    """Strings of the character vector in one record of R's XDR serialization."""
    position = record.index(b"\x00\x00\x00\x10") + 8
    while position + 8 <= len(record) and record[position + 3] == 9:
        length = int.from_bytes(record[position + 4 : position + 8])
        yield record[position + 8 : position + 8 + length].decode("utf-8", errors="ignore")
        position += 8 + length


def scripture(root: Path) -> Iterator[tuple[str, str]]:
    """(book, text) of the King James Bible, as Debian's own reader prints it; a paragraph holds a chapter."""
    reader = require(root / "usr/bin/bible", "bible-kjv")
    require(root / "usr/lib/bible.data", "bible-kjv-text")
    command = [str(reader), "-p", str(root / "usr/lib"), "-f", "gen1:1-rev22:21"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    books: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for match in re.finditer(r"^(\d?[A-Za-z]+)(\d+):\d+ (.+)$", printed, re.MULTILINE):
        books[match[1]][match[2]].append(match[3].strip())
    for book, chapters in books.items():
        yield book, "\n\n".join(" ".join(verses) for verses in chapters.values())


def prose_documents(root: Path) -> Iterator[Document]:
    """Six novels and the books of the Bible, a document per chapter (novels) or book, one line per paragraph."""
    for novel, lines in novels(root):
        text = "\n".join(line.strip() for line in lines)
        for chapter in re.split(r"\n+(?:CHAPTER|Chapter) [IVXLC\d]+\.?\s*\n+", text)[1:]:
            paragraphs = [" ".join(paragraph.split()) for paragraph in chapter.split("\n\n")]
            yield Document("prose", novel, "\n\n".join(paragraph for paragraph in paragraphs if paragraph))
    for book, text in scripture(root):
        yield Document("prose", f"kjv/{book}", text)


def as_json(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=2, ensure_ascii=False)


def as_json_lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, sorted({key for row in rows for key in row}), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_toml(rows: list[dict[str, Any]]) -> str:
    tables = [
        "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in row.items()) for row in rows
    ]
    return "\n\n".join(f"[[record]]\n{table}" for table in tables)


FORMATS: tuple[Callable[[list[dict[str, Any]]], str], ...] = (as_json, as_json_lines, as_csv, as_toml)


def iso_tables(root: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Tables of iso-codes: subdivisions by country, languages by first letters, others in parts of 25 rows."""
    folder = require(root / "usr/share/iso-codes/json", "iso-codes")
    for path in sorted(folder.glob("iso_*.json")):
        (rows,) = json.loads(path.read_text("utf-8")).values()
        tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for number, row in enumerate(rows):
            key = row.get("code") or row.get("alpha_3") or str(number)
            tables[key[:2] if len(rows) > 400 else str(number // 25)].append(row)
        for key, table in tables.items():
            yield f"{path.stem}/{key}", table


def unicode_tables() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Named characters in rows of 32 code points; ideographs and syllables, whose names are numbers, are left out."""
    for start in range(0x20, 0x1FB00, 32):
        rows = []
        for point in range(start, start + 32):
            name = unicodedata.name(chr(point), "")
            if name and not name.startswith(("CJK", "HANGUL SYLLABLE", "TANGUT", "NUSHU")):
                row = {"code": f"U+{point:04X}", "name": name, "category": unicodedata.category(chr(point))}
                rows.append(row | {"bidirectional": unicodedata.bidirectional(chr(point))})
        if len(rows) > 8:
            yield f"unicode/{start:04X}", rows


def zone_tables() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """For each time zone, its local time at the start of every quarter of eight years."""
    names = sorted(name for name in available_timezones() if name.split("/")[0] in AREAS)
    if not names:
        raise MissingSource("no time zones on this machine: install Debian's or PyPI's tzdata")
    for name in names:
        zone = ZoneInfo(name)
        instants = [datetime(2018 + number // 4, 1 + number % 4 * 3, 1, 12, tzinfo=UTC) for number in range(32)]
        rows = []
        for instant in instants:
            local = instant.astimezone(zone)
            hours = (local.utcoffset() or timedelta()).total_seconds() / 3600
            row = {"zone": name, "utc": instant.isoformat()[:16], "local": local.isoformat()[:16]}
            rows.append(row | {"offset": hours, "dst": bool(local.dst())})
        yield f"zone/{name}", rows


def data_documents(root: Path) -> Iterator[Document]:
    """Each table in one of four formats, which its name decides."""
    for source in (iso_tables(root), unicode_tables(), zone_tables()):
        for name, rows in source:
            form = FORMATS[zlib.crc32(name.encode()) // 20 % len(FORMATS)]
            yield Document("data", name, form(rows))


def documents(root: Path) -> list[Document]:
    """All documents, in a fixed order. Raises MissingSource where a package is absent under `root`."""
    texts = [*python_documents(), *prose_documents(root), *data_documents(root)]
    texts += [Document("arithmetic", *made) for made in arithmetic_documents()]
    texts += [Document("chat", *made) for made in chat_documents(texts, root)]
    return texts


def fetch(root: Path) -> None:
    """Downloads the Debian packages and unpacks them under `root`, without installing them."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=folder, check=True)
        for package in sorted(Path(folder).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fetch", type=Path, metavar="DIR", help="download the Debian packages and unpack them here")
    parser.add_argument("--sources", type=Path, default=Path("/"), metavar="DIR", help="where they are unpacked [/]")
    options = parser.parse_args()
    if options.fetch:
        fetch(options.fetch)
    try:
        texts = documents(options.fetch or options.sources)
    except MissingSource as error:
        sys.exit(f"corpus: {error}")
    for domain in DOMAINS:
        for held_out in (False, True):
            chosen = [text for text in texts if text.domain == domain and text.held_out == held_out]
            split = "held out" if held_out else "training"
            print(f"{domain:10} {split:8} {len(chosen):6} documents {sum(len(c.text) for c in chosen):10} characters")


if __name__ == "__main__":
    main()
