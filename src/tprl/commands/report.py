"""``tprl report``: one page about a folder of results, to look at and to pass on."""

from pathlib import Path
from typing import Annotated

import tyro

from tprl.evaluate.report import write_report


def report(folder: Annotated[Path, tyro.conf.Positional], *, run: Path | None = None, out: Path | None = None) -> None:
    """Write a self-contained HTML page: headline figures, curves, tables, a gallery and the training's curves.

    Args:
        folder: results of `tprl evaluate`, `tprl benchmark` or `tprl ablate`.
        run: folder of the training whose curves are to be shown; unless given, the results' own where it holds a
            metrics.jsonl.
        out: the page; report.html in the results' folder unless given.
    """
    page = out or folder / "report.html"
    write_report(folder, run, page)
    print(page)
