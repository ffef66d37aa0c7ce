"""``tprl evaluate``: how much accuracy pruning costs and what it saves, against the peers, in one run."""

import json
import sys
from pathlib import Path

from tprl import processes
from tprl.commands.parse import parse_budgets, parse_names
from tprl.data import load_source
from tprl.evaluate.benchmark import Benchmark
from tprl.evaluate.checks import check_out
from tprl.evaluate.gallery import write_gallery
from tprl.evaluate.methods import check_names, make_methods
from tprl.evaluate.tables import markdown_table, write_tables
from tprl.pocket.assemble import SHIPPED_PRUNER, cache_folder, open_lvlm
from tprl.pruner import TokenPruner


def evaluate(
    out: Path,
    *,
    data: str = "scenes",
    split: str = "test",
    n: int = 2000,
    budgets: str = "192,128,64,32",
    methods: str = "tprl,random,uniform,fastervlm,divprune,fastv",
    model: str = "pocket-llava",
    pruner: Path | None = None,
    threshold: float | None = None,
    threshold_row: bool = True,
    gallery: int = 12,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    cache: Path | None = None,
    images: Path | None = None,
    skip_bad: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Measure methods under budgets and write results.json, results.csv, results.md, curves.png and a gallery.

    Args:
        out: folder for the results.
        data: "scenes", "scenes-crowded", "scenes-tiles", "easy-vqa", or a .jsonl file.
        split: "train", "val" or "test".
        n: number of questions.
        budgets: visual tokens to keep, comma-separated.
        methods: comma-separated; an unknown name lists all.
        model: "pocket-llava", or a folder or Hub id of a model.
        pruner: folder of the pruner that "tprl" stands for; the shipped one unless given.
        threshold: keep probability of the row without budget; the pruner's calibrated one unless given.
        threshold_row: whether "tprl" gets a row without budget, where every question keeps as many as it needs.
        gallery: number of cases to draw for the report; 0 for none.
        seed: of random methods and of the confidence intervals.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda"; each of several processes takes a GPU of its own.
        cache: folder where encoded pictures are kept between runs; $TPRL_CACHE or ~/.cache/tprl unless given.
        images: picture folder of a .jsonl file; the file's own unless given.
        skip_bad: leave out records of a .jsonl file that cannot be read.
        resume: go on with an interrupted run.
        overwrite: throw away what the folder holds.
    """
    names, sizes = parse_names(methods), parse_budgets(budgets)
    check_names(names)
    if not 0 <= seed < 2**63 or gallery < 0:
        raise ValueError(f"--seed and --gallery are whole numbers from 0 on, below 2**63, got {seed} and {gallery}")
    if (pruner is not None or threshold is not None) and TokenPruner.name not in names:
        raise ValueError(f"--pruner and --threshold are those of {TokenPruner.name}, which --methods does not name")
    if threshold is not None and not threshold_row:
        raise ValueError("--threshold is that of the row that --no-threshold-row leaves out; give one of the two")
    with processes.joined(device) as own_device:
        check_out(out, resume, overwrite)
        source = load_source(data, split, n, skip_bad, images)
        chosen = TokenPruner.from_pretrained(pruner or SHIPPED_PRUNER) if TokenPruner.name in names else None
        rows = make_methods(names, sizes, chosen, threshold, threshold_row, seed)
        lvlm = open_lvlm(model, dtype, own_device)
        if chosen is not None:
            chosen.check_fits(lvlm.fingerprint)
            chosen.to(lvlm.device)
        known = _trained_on(pruner) if chosen else []
        if data.endswith(".jsonl") and any(_same_file(Path(data), name) for name in known) and processes.is_first():
            print(f"warning: the pruner was trained or calibrated on {data}, which is measured here", file=sys.stderr)
        trained_on = known[0].name if known else None
        run = Benchmark(lvlm, model, source, rows, out, cache or cache_folder(), seed, resume, overwrite, trained_on)
        run.measure()
        with processes.first_alone():  # the others wait, since they would disturb the prefills
            if not processes.is_first():
                return
            results = run.results()
            write_tables(results, out)
            if gallery:
                write_gallery(lvlm, source, rows, run.cells["unpruned"], run.cells, out, gallery)
            print(markdown_table(results))


def _trained_on(pruner: Path | None) -> list[Path]:
    """The data that a pruner was trained on and, if others, those on which its threshold was found: of the shipped one
    scenes, of one in the folder of its run what that run says, of any other nothing."""
    if pruner is None:
        return [Path("scenes")]
    run = pruner.resolve().parent / "config.json"
    told = json.loads(run.read_text()) if run.is_file() else {}
    return [Path(told[name]) for name in ("data", "val_data") if isinstance(told.get(name), str)]


def _same_file(measured: Path, known: Path) -> bool:
    """Whether a file is one that a run names; by its name alone where that cannot be found from here."""
    return measured.samefile(known) if known.exists() else measured.name == known.name
