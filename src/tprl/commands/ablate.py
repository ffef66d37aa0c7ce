"""``tprl ablate``: trains the method with one part changed at a time and measures what the part is worth."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import tyro

from tprl import processes
from tprl.commands.parse import parse_budgets, parse_names, parse_seeds
from tprl.commands.train import choose_settings
from tprl.config import TrainConfig
from tprl.data import load_source, load_training
from tprl.data.sample import samples_digest
from tprl.evaluate.ablation import Cells, compare, load_cells, measure, save_cells, write_ablation
from tprl.evaluate.checks import CELLS, check_budgets, check_out
from tprl.evaluate.provenance import commit, machine
from tprl.lvlm.cache import EncodedSamples, processor_digest, weights_digest
from tprl.pocket.assemble import cache_folder, open_lvlm
from tprl.train.ablation import FULL, ROWS, check_rows, train_row

TRAININGS = "trainings"


def ablate(
    out: Path,
    *,
    rows: str = ",".join(ROWS),
    seeds: str = "0",
    budgets: str = "64,32",
    data: str = "scenes",
    test_data: str | None = None,
    split: str = "test",
    n: int = 1000,
    model: str = "pocket-llava",
    preset: str = "default",
    dtype: str = "auto",
    device: str = "cpu",
    cache: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    config: Annotated[TrainConfig | None, tyro.conf.arg(name="set")] = None,
) -> None:
    """Write ablation.json, ablation.csv and ablation.md after every row that is done.

    Rows share encoded pictures, demonstrations and the stages on which they agree. More rows or seeds can be added with
    --resume, for example three seeds for the rows that matter.

    Args:
        out: folder of the results and of all trainings.
        rows: comma-separated; an unknown name lists all. Differences are taken to the row "full".
        seeds: of the trainings, comma-separated.
        budgets: visual tokens to keep when a row is measured, comma-separated.
        data: that is trained on: "scenes", "scenes-crowded", "scenes-tiles", "easy-vqa", or a .jsonl file.
        test_data: that is measured; --data unless given, which it has to be where that is a .jsonl file.
        split: that is measured.
        n: number of questions measured.
        model: "pocket-llava", or a folder or Hub id of a model.
        preset: "default", "quick" or "paper", as of ``tprl train``.
        dtype: of the model: "auto", "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda"; each of several processes takes a GPU of its own.
        cache: folder where encoded pictures are kept between runs; $TPRL_CACHE or ~/.cache/tprl unless given.
        resume: go on with what the folder holds.
        overwrite: throw away what the folder holds.
        config: settings of one's own, each with the default preset's value unless given; not together with --preset.
    """
    names, chosen_seeds, sizes = parse_names(rows), parse_seeds(seeds), parse_budgets(budgets)
    if unknown := [name for name in names if name not in ROWS]:
        raise ValueError(f"unknown rows {', '.join(unknown)}; known: {', '.join(ROWS)}")
    settings = choose_settings(preset, config)
    if settings.seed != TrainConfig().seed:
        raise ValueError(f"--set.seed {settings.seed} has no say here; --seeds are those of the trainings")
    if data.endswith(".jsonl") and (test_data is None or Path(test_data).resolve() == Path(data).resolve()):
        raise ValueError(f"{data} is trained on; say with --test-data which other questions are measured")
    sources = load_training(data, None, settings.samples, settings.validation)
    test = load_source(test_data or data, split, n)
    with processes.joined(device) as own_device:
        check_out(out, resume, overwrite)
        lvlm = open_lvlm(model, dtype, own_device)
        cache = cache or cache_folder()
        check_budgets(lvlm, test, sizes)
        check_rows(names, lvlm, settings)
        with processes.first_alone():
            encoded = EncodedSamples(lvlm, test, cache)
        made_from = {
            "weights": weights_digest(lvlm), "processor": processor_digest(lvlm),
            "dtype": str(lvlm.model.dtype).removeprefix("torch."),
            "trained_on": [samples_digest(source) for source in sources], "samples": samples_digest(test),
            "budgets": sizes, "settings": asdict(replace(settings, seed=0)),
        }  # fmt: skip
        about = {
            "model": model, "trained_on": sources[0].name, "data": test.name, "split": test.split, "n": len(encoded),
            "machine": machine(lvlm), "settings": made_from["settings"],
        }  # fmt: skip
        with processes.first_alone():
            if overwrite and processes.is_first():
                for name in (CELLS, TRAININGS):
                    shutil.rmtree(out / name, ignore_errors=True)
            (out / CELLS).mkdir(parents=True, exist_ok=True)

        found: dict[str, dict[int, Cells]] = {name: {} for name in ROWS}
        commits = set[str]()
        for name in ROWS:
            for path in sorted((out / CELLS).glob(f"{name}@*.json")):
                found[name][int(path.stem.partition("@")[2])], measured_by = load_cells(path, made_from)
                commits.add(measured_by)
        for name in names:
            row = ROWS[name]
            for seed in chosen_seeds:
                if seed not in found[name]:
                    seeded = replace(settings, seed=seed)
                    pruner = train_row(row, out / TRAININGS, lvlm, sources, seeded, cache).to(lvlm.device)
                    found[name][seed] = measure(encoded, pruner, sizes, row.positions, f"{name}, seed {seed}")
                    measured_by = commit()
                    commits.add(measured_by)
                    if processes.is_first():
                        save_cells(out / CELLS / f"{name}@{seed}.json", made_from, found[name][seed], measured_by)
                done = {name: cells for name, cells in found.items() if cells}
                if processes.is_first():
                    rows_so_far = compare(done, {name: ROWS[name].group for name in done}, FULL, test.samples)
                    write_ablation({**about, "commits": sorted(commits), "rows": rows_so_far}, out)
        if processes.is_first():
            print((out / "ablation.md").read_text())
