"""Put the tables of a results folder into README.md."""

import argparse
import json
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "results" / "scenes", help="%(default)s")
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text(), parser.parse_args().results))
