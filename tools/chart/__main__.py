"""`python -m tools.chart` writes what of the chart is generated; `--check` names what is out of date, exit code 1."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.chart import dashboards, defaults, goldens, readme, schema
from tools.chart.helm import CHART, ROOT


def generated() -> Iterator[tuple[Path, str]]:
    """Each generated file and its text; Helm renders the golden files with the others in place."""
    yield CHART / "values.schema.json", schema.text()
    yield CHART / "templates" / "_defaults.tpl", defaults.text()
    yield CHART / "README.md", readme.text()
    for name in dashboards.DASHBOARDS:
        yield CHART / "dashboards" / f"{name}.json", dashboards.text(name)
    for example in goldens.examples():
        yield goldens.FOLDER / example.name, goldens.text(example)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.chart", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = False
    for path, text in generated():
        if path.exists() and path.read_text() == text:
            continue
        stale = True
        print(f"chart: {path.relative_to(ROOT)}: {'out of date, run `make chart`' if check else 'written'}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
