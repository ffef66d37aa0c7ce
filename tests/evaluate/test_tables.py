"""The README's tables, from numbers made up so that every place of every table is known."""

from typing import Any

from tprl.evaluate.tables import overview_table


def row(method: str, budget: int | None, drop: float, kept: float) -> dict[str, Any]:
    return {
        "method": method, "budget": budget, "kept_mean": kept, "accuracy": 0.8 - drop / 100,
        "accuracy_unpruned": 0.8, "accuracy_blind": 0.15, "drop_points": drop, "drop_ci95": [drop - 1, drop + 1],
        "flops_saved": 0.9 - kept / 1000, "prefill_ms": 100.0, "speedup": 2.0, "kv_cache_mib": 1.0,
    }  # fmt: skip


RESULTS = {
    "model": "m", "data": "d", "split": "test", "n": 10, "seed": 3, "commit": "0123456789abcdef",
    "machine": {"cpu": "cpu", "threads": 2, "dtype": "float32", "torch": "2"},
    "rows": [
        row("random", 64, 4.0, 64), row("random", 32, 9.0, 32),
        row("tprl", None, 1.5, 48), row("tprl", 64, 2.0, 64), row("tprl", 32, 7.0, 32),
        row("peer", 64, 1.0, 64), row("peer", 32, 7.5, 32),
    ],
}  # fmt: skip


def test_methods_stand_by_their_mean_loss_and_the_fewest_points_are_bold() -> None:
    lines = overview_table(RESULTS).splitlines()
    assert lines[0].startswith("m on d/test, 10 questions, seed 3. Unpruned 80.0%, blind 15.0%.")
    assert lines[2] == "| points lost at | 64 | 32 | FLOPs saved |"
    assert lines[4:7] == [
        "| peer | **1.0** (0.0 to 2.0) | 7.5 (6.5 to 8.5) | 84% to 87% |",
        "| tprl | 2.0 (1.0 to 3.0) | **7.0** (6.0 to 8.0) | 84% to 87% |",
        "| random | 4.0 (3.0 to 5.0) | 9.0 (8.0 to 10.0) | 84% to 87% |",
    ]


def test_what_the_front_method_costs_stands_by_falling_budget() -> None:
    lines = overview_table(RESULTS).splitlines()
    assert [line.split("|")[1].strip() for line in lines[8:]] == ["tprl at", ":---", "its threshold", "64", "32"]
    assert lines[10] == "| its threshold | 48 | 78.5% | 1.5 (0.5 to 2.5) | 85.2% | 100 ms, 2.00x | 1.0 MiB |"
