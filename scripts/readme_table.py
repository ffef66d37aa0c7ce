"""Put the newest results' tables into README.md: python scripts/readme_table.py [results folder]."""

import json
import sys
from pathlib import Path

from tprl.evaluate.tables import overview_table

ROOT = Path(__file__).parents[1]
START, END = "<!-- results: made by scripts/readme_table.py -->\n", "<!-- end of results -->\n"


def with_table(readme: str, results: Path) -> str:
    """The README with the tables of ``results/results.json`` between its two marks."""
    before, rest = readme.split(START)
    _, after = rest.split(END)
    return (
        before + START + "\n" + overview_table(json.loads((results / "results.json").read_text())) + "\n" + END + after
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "results" / "scenes"
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text(), folder))
