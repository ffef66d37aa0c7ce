"""How much faster a model of transformers answers on this CPU with a third of its visual tokens.

A LLaVA with random weights: a small vision tower that makes 576 visual tokens, and a language model of 12 layers. The
unpruned model, the one pruned before the language model and the one pruned inside it (FastV) run in turns in one
process, so what else the machine does meets all of them. Medians are printed, and their ratios.

    python benchmarks/prefill_speed.py
"""

from statistics import median
from time import perf_counter

import torch
import tyro
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tprl

IMAGE = 31


def make(width: int, layers: int) -> LlavaForConditionalGeneration:
    """A LLaVA of random weights whose vision tower is much smaller than its language model."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, vocab_size=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def main(
    budget: int = 192, text_tokens: int = 64, new_tokens: int = 16, width: int = 768, layers: int = 12, runs: int = 5
) -> None:
    """Measure.

    Args:
        budget: visual tokens to keep, of 576.
        text_tokens: other tokens of the prompt.
        new_tokens: tokens of the answer in the end-to-end row.
        width: of the language model, a multiple of 64.
        layers: of the language model.
        runs: how often each way runs, besides once to warm up.
    """
    model = make(width, layers)
    text = torch.randint(32, 4096, (1, text_tokens))
    ids = torch.cat([text[:, : text_tokens // 2], torch.full((1, 576), IMAGE), text[:, text_tokens // 2 :]], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 336, 336)}
    ways = ("unpruned", "uniform", "divprune", "fastv")
    seconds: dict[tuple[str, int], list[float]] = {(way, count): [] for way in ways for count in (1, new_tokens)}
    for run in range(runs + 1):
        for way, count in seconds:
            if way != "unpruned":
                tprl.prune(model, way, budget=budget)
            start = perf_counter()
            model.generate(**inputs, max_new_tokens=count, do_sample=False)
            elapsed = perf_counter() - start
            tprl.unprune(model)
            if run > 0:
                seconds[way, count].append(elapsed)
    table = Table(
        title=f"576 -> {budget} visual tokens, {layers} layers x {width}, {torch.get_num_threads()} thread(s)"
    )
    for name in ("method", "first token, s", "faster", f"{new_tokens} tokens, s", "faster"):
        table.add_column(name, justify="right")
    for way in ways:
        row = [way]
        for count in (1, new_tokens):
            own, whole = median(seconds[way, count]), median(seconds["unpruned", count])
            row += [f"{own:.3f}", f"{whole / own:.2f} x"]
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
