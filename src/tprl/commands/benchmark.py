"""``tprl benchmark``: the headline run, every method under every budget on several sets of questions."""

from pathlib import Path

from tprl import processes
from tprl.commands.evaluate import evaluate
from tprl.commands.parse import parse_names
from tprl.data import load_source
from tprl.evaluate.checks import CELLS, check_out
from tprl.evaluate.methods import METHODS


def benchmark(
    out: Path,
    *,
    data: str = "scenes,easy-vqa",
    split: str = "test",
    n: int = 2000,
    budgets: str = "192,128,64,32,16",
    methods: str = ",".join(METHODS),
    model: str = "pocket-llava",
    pruner: Path | None = None,
    threshold: float | None = None,
    gallery: int = 12,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    cache: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Run ``tprl evaluate`` on each set of questions; a killed run goes on with --resume, cell by cell.

    Args:
        out: folder for the results, one folder a set in it.
        data: comma-separated: "scenes", "scenes-crowded", "scenes-tiles", "easy-vqa", .jsonl files.
        split: "train", "val" or "test".
        n: number of questions of each set.
        budgets: visual tokens to keep, comma-separated.
        methods: comma-separated; all unless given.
        model: "pocket-llava", or a folder or Hub id of a model.
        pruner: folder of the pruner that "tprl" stands for; the shipped one unless given.
        threshold: keep probability of the row without budget; the pruner's calibrated one unless given.
        gallery: number of cases of each set to draw for the report; 0 for none.
        seed: of random methods and of the confidence intervals.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda"; each of several processes takes a GPU of its own.
        cache: folder where encoded pictures are kept between runs; $TPRL_CACHE or ~/.cache/tprl unless given.
        resume: go on with an interrupted run.
        overwrite: throw away what the folder holds.
    """
    sets = {Path(name).stem: name for name in parse_names(data)}
    if len(sets) < len(parse_names(data)):
        raise ValueError(f"the sets {data} need different file names, since each gets a folder of that name")
    with processes.joined(device) as own_device:
        check_out(out, resume, overwrite, f"*/{CELLS}")
        for name in sets.values():
            load_source(name, split, n)  # what cannot be read shall be said before the first set is measured
        for folder, name in sets.items():
            evaluate(
                out / folder, data=name, split=split, n=n, budgets=budgets, methods=methods, model=model,
                pruner=pruner, threshold=threshold, gallery=gallery, seed=seed, dtype=dtype, device=own_device,
                cache=cache, resume=resume, overwrite=overwrite,
            )  # fmt: skip
