"""``tprl flops``: what an answer costs at several token budgets, counted from a model's config alone."""

from rich.console import Console
from rich.table import Table

from tprl.commands.parse import parse_budgets
from tprl.evaluate.flops import encoded_by, kv_cache_mib, lvlm_flops, text_tokens_at
from tprl.evaluate.presets import load_config

PAPER_SAVED = 0.542
"""Share of the FLOPs that TPRL, arXiv 2603.13394, says to save by keeping a third of the visual tokens."""


def flops(
    config: str,
    /,
    budgets: str | None = None,
    text_tokens: int = 64,
    generated_tokens: int = 1,
    encoded_tokens: int | None = None,
    cache_bytes: int = 2,
) -> None:
    """Print FLOPs and size of the KV cache of one prompt, unpruned and at every budget.

    A multiply-add is 2 FLOPs; the pruner's own cost is not included.

    Args:
        config: a preset (llava-1.5-7b, llava-1.5-13b, qwen2.5-vl-3b, qwen2.5-vl-7b), a config.json, or the folder or
            Hub id of a model.
        budgets: visual tokens that are kept, comma-separated; a third, two ninths and a ninth of them unless given.
        text_tokens: all other tokens of the prompt.
        generated_tokens: tokens of the answer; 1 is the prefill alone.
        encoded_tokens: visual tokens of the picture; needed where a model takes pictures of any size.
        cache_bytes: of a number in the cache: 2 for bfloat16 and float16, 4 for float32.
    """
    model = load_config(config)
    visual = encoded_by(model) if encoded_tokens is None else encoded_tokens
    third, *fewer = (max(1, round(visual * ninths / 9)) for ninths in (3, 2, 1))
    if cache_bytes < 1:
        raise ValueError(f"--cache-bytes {cache_bytes} is not allowed; at least 1")
    counts = parse_budgets(budgets) if budgets is not None else tuple(dict.fromkeys((third, *fewer)))
    if wrong := [count for count in counts if count > visual]:
        raise ValueError(f"budgets {wrong} are not allowed; 1 to the picture's {visual} visual tokens")
    unpruned = lvlm_flops(model, visual, text_tokens, None, generated_tokens, visual)
    answer = "prefill" if generated_tokens == 1 else f"prefill and {generated_tokens - 1} steps"
    table = Table(title=f"{config}: {text_tokens} text tokens, {answer}; TFLOPs")
    for name in ("visual tokens", "vision", "projector", "language", "total", "saved", "KV cache MiB"):
        table.add_column(name, justify="right")
    for count in (visual, *counts):
        costs = lvlm_flops(model, count, text_tokens, None, generated_tokens, visual)
        parts = [f"{part / 1e12:.3f}" for part in (costs.vision, costs.projector, costs.language, costs.total)]
        cache = kv_cache_mib(model, count + text_tokens + generated_tokens - 1, cache_bytes)
        table.add_row(str(count), *parts, f"{costs.saved(unpruned):.1%}", f"{cache:.1f}")
    console = Console()
    console.print(table)
    least = lvlm_flops(model, visual, 1, encoded_tokens=visual)
    if lvlm_flops(model, third, 1, encoded_tokens=visual).saved(least) < PAPER_SAVED:
        console.print(f"{visual} -> {third} visual tokens save less than {PAPER_SAVED:.1%} of a prefill at any length.")
    else:
        length = text_tokens_at(model, third, PAPER_SAVED, visual)
        console.print(
            f"{visual} -> {third} visual tokens save {PAPER_SAVED:.1%} of a prefill, TPRL's figure, with {length} text "
            "tokens, and less with more."
        )
