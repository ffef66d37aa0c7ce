"""The table: methods under budgets, on the same model, samples and prompts, in one run that can be interrupted.

Every (method, budget) is a cell, stored as soon as it is measured as ``cells/METHOD-BUDGET.json`` with the score of
every question; all differences are paired per question. ``results.json`` is made of the cells and of prefills that all
methods do in turns. Several processes, see ``tprl.processes``, share the questions of a cell; the first one writes.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import BatchFeature

from tprl import processes
from tprl.data.sample import Source, samples_digest
from tprl.evaluate.cell import Cell, score_pictures, score_questions
from tprl.evaluate.checks import CELLS, check_budgets, check_out, check_reach
from tprl.evaluate.flops import encoded_tokens, kv_cache_mib, lvlm_flops
from tprl.evaluate.latency import measure_prefills, prompt_inputs
from tprl.evaluate.methods import QUESTION_BLIND, Method, choice_flops
from tprl.evaluate.provenance import commit, machine, pruner_digest, write_json
from tprl.evaluate.rows import per_family, quality
from tprl.lvlm.cache import EncodedSamples, processor_digest, weights_digest
from tprl.lvlm.model import Lvlm

TIMED_PICTURES, COUNTED_PICTURES = 15, 32
"""Pictures whose prefill is timed, and those for which the work of the vision tower is counted."""
RESULTS = "results.json"


class Benchmark:
    """One run in one folder.

    Args:
        lvlm: the frozen model.
        model: its name, for the record.
        source: the questions.
        methods: the rows of the table.
        out: folder of the results.
        cache: folder of encoded pictures.
        seed: of the bootstrap; that of random methods is their own.
        resume: go on with what ``out`` holds.
        overwrite: throw away what ``out`` holds.
        trained_on: name of the questions that the pruner was trained on, for the record.

    Attributes:
        cells: what ``measure`` measured or found, by label: "unpruned", "blind" and those of the methods.

    Raises:
        ValueError: ``out`` exists and neither ``resume`` nor ``overwrite`` is set, or both are, or a budget is not
            allowed or out of its method's reach, or ``out`` holds a cell that was made from something else.
        DataError: a picture cannot be read. Nothing is written to ``out`` then.
    """

    def __init__(
        self,
        lvlm: Lvlm,
        model: str,
        source: Source,
        methods: Sequence[Method],
        out: Path,
        cache: Path,
        seed: int = 0,
        resume: bool = False,
        overwrite: bool = False,
        trained_on: str | None = None,
    ) -> None:
        check_out(out, resume, overwrite)
        first = check_budgets(lvlm, source, (method.budget for method in methods if method.budget is not None))
        check_reach(lvlm, methods, [first])  # before any picture is encoded
        self.lvlm, self.model, self.source, self.methods, self.out, self.seed = lvlm, model, source, methods, out, seed
        signals = frozenset[str]().union(*(method.needs for method in methods))
        with processes.first_alone():
            self.encoded = EncodedSamples(lvlm, source, cache, signals)
        check_reach(lvlm, methods, {self.encoded.visual_tokens(image_id) for image_id in self.encoded.image_ids})
        self._made_from = {
            "weights": weights_digest(lvlm),
            "processor": processor_digest(lvlm),
            "dtype": str(lvlm.model.dtype).removeprefix("torch."),
            "samples": samples_digest(source),
            "seed": seed,
        }
        self.trained_on = trained_on
        self.cells: dict[str, Cell] = {}
        with processes.first_alone():
            if overwrite and processes.is_first():
                _clear(out)
            (out / CELLS).mkdir(parents=True, exist_ok=True)

    def measure(self) -> None:
        """Measure the cells that are missing."""
        wanted: dict[str, Method | None] = {"unpruned": None, "blind": None}
        wanted |= {method.label: method for method in self.methods}
        for label, method in wanted.items():
            self.stored(label, method)  # a cell of another run shall be found before any work is done
        for number, (label, method) in enumerate(wanted.items(), 1):
            cell = self.stored(label, method)
            if cell is None:
                cell = self._measure(label, method, f"{label} ({number} of {len(wanted)})")
                self._store(label, method, cell)
            self.cells[label] = cell

    def results(self) -> dict[str, Any]:
        """The table of what ``measure`` has measured, and the prefills, which are measured now; also written to
        ``results.json``."""
        methods: dict[str, Method | None] = {"unpruned": None, **{method.label: method for method in self.methods}}
        milliseconds = measure_prefills(self.lvlm, methods, self._timed_inputs(), "prefills")
        results = {
            "model": self.model,
            "data": self.source.name,
            "split": self.source.split,
            "trained_on": self.trained_on,
            "n": len(self.encoded),
            "seed": self.seed,
            "machine": machine(self.lvlm),
            "commit": commit(),
            "rows": [self._row(method, milliseconds) for method in self.methods],
        }
        write_json(self.out / RESULTS, results)
        return results

    def stored(self, label: str, method: Method | None = None) -> Cell | None:
        """A cell that ``out`` holds.

        Raises:
            ValueError: it was made from another model, processor, seed or pruner, or from other samples.
        """
        path = self.out / CELLS / f"{label}.json"
        if not path.exists():
            return None
        fields = json.loads(path.read_text())
        made, wanted = fields.pop("made_from"), self._origin(method)
        fields.pop("commit", None)  # for the record; older cells have none
        if other := [name for name in wanted if made.get(name) != wanted[name]]:
            was = ", ".join(f"{name} {made.get(name)} instead of {wanted[name]}" for name in other)
            raise ValueError(f"{path} was made with {was}; use another folder or --overwrite")
        return Cell(**fields)

    def _origin(self, method: Method | None) -> dict[str, Any]:
        """All that a cell's numbers depend on."""
        pruner = method.pruner if method else None
        return {
            **self._made_from,
            "pruner": pruner_digest(pruner) if pruner else None,
            "threshold": method.threshold if method else None,
        }

    def _store(self, label: str, method: Method | None, cell: Cell) -> None:
        if processes.is_first():
            write_json(
                self.out / CELLS / f"{label}.json",
                {"made_from": self._origin(method), "commit": commit(), **asdict(cell)},
            )

    # --- measuring -------------------------------------------------------------------------------------------

    def _measure(self, label: str, method: Method | None, title: str) -> Cell:
        if method is None:
            return score_pictures(self.encoded, None, title, blind=label == "blind")
        cell = (
            score_pictures(self.encoded, method, title)
            if method.name in QUESTION_BLIND
            else score_questions(self.encoded, method, title)
        )
        return replace(cell, selector_flops=choice_flops(method, self.encoded, self._typical))

    def _timed_inputs(self) -> list[BatchFeature]:
        """The first question about each of the first pictures, ready for the model; the first of them only warms up."""
        chosen = [self.encoded.questions[i][0] for i in self.encoded.image_ids[: TIMED_PICTURES + 1]]
        chosen = chosen if len(chosen) > 1 else 2 * chosen
        return [prompt_inputs(self.lvlm, self.source, self.source.samples[i]) for i in chosen]

    @cached_property
    def _typical(self) -> int:
        """The sample whose prompt, picture included, has the median length."""
        lengths = [self._visual_tokens[i] + self.encoded.text_tokens(i) for i in range(len(self.encoded))]
        return sorted(range(len(lengths)), key=lambda i: lengths[i])[len(lengths) // 2]

    @cached_property
    def _visual_tokens(self) -> list[int]:
        """Of every sample's picture."""
        return [self.encoded.visual_tokens(sample.image_id) for sample in self.source.samples]

    @cached_property
    def _encoded_tokens(self) -> list[int]:
        """What the vision tower makes of the samples' pictures; of ``COUNTED_PICTURES`` evenly spaced from the smallest
        to the greatest, if there are more."""
        ranked = sorted(range(len(self.encoded)), key=lambda i: self._visual_tokens[i])
        count = min(len(ranked), COUNTED_PICTURES)
        chosen = [ranked[(2 * place + 1) * len(ranked) // (2 * count)] for place in range(count)]
        made = {}
        for i in chosen:
            if (size := self._visual_tokens[i]) not in made:
                inputs = prompt_inputs(self.lvlm, self.source, self.source.samples[i])
                made[size] = encoded_tokens(self.lvlm.model.config, inputs)
        return [made[self._visual_tokens[i]] for i in chosen]

    # --- results ---------------------------------------------------------------------------------------------

    def _row(self, method: Method, milliseconds: dict[str, float]) -> dict[str, Any]:
        config, cells = self.lvlm.model.config, self.cells
        cell, kept = cells[method.label], fmean(cells[method.label].kept)
        text = fmean(self.encoded.text_tokens(i) for i in range(len(self.encoded)))
        total = round(fmean(cells["unpruned"].kept))
        counts = method.layer_counts(config.get_text_config().num_hidden_layers, total)
        encoded = self._encoded_tokens
        whole = lvlm_flops(config, total, round(text), encoded_tokens=encoded).total
        entering = total if counts else round(kept)
        pruned = lvlm_flops(config, entering, round(text), counts, encoded_tokens=encoded)
        flops = pruned.total + cell.selector_flops
        return {
            **quality(method, cells, self.source.samples, self.seed),
            "flops": flops,
            "flops_unpruned": whole,
            "flops_saved": 1 - flops / whole,
            "prefill_ms": milliseconds[method.label],
            "prefill_ms_unpruned": milliseconds["unpruned"],
            "speedup": milliseconds["unpruned"] / milliseconds[method.label],
            "kv_cache_mib": kv_cache_mib(config, kept + text, self.lvlm.model.dtype.itemsize),
            "per_family": per_family(method, cells, self.source.samples),
        }


def _clear(out: Path) -> None:
    """Remove what a run writes, and nothing else."""
    for name in (CELLS, "gallery"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (RESULTS, "results.csv", "results.md", "curves.png", "gallery.json", "report.html"):
        (out / name).unlink(missing_ok=True)
