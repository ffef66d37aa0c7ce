"""``tprl answer``: one question about one picture, answered with every visual token and with the few that matter."""

from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from tprl.data.jsonl import read_image
from tprl.draw import draw_kept, headed, side_by_side
from tprl.evaluate.answers import Answered, answered
from tprl.evaluate.methods import check_names, make_methods
from tprl.pocket.assemble import SHIPPED_PRUNER, open_lvlm
from tprl.pruner import TokenPruner
from tprl.types import VisualTokens


def answer(
    image: Path,
    question: str,
    *,
    method: str = TokenPruner.name,
    budget: int | None = None,
    threshold: float | None = None,
    picture: Path | None = None,
    steps: bool = False,
    model: str = "pocket-llava",
    pruner: Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
) -> None:
    """Answer a question about a picture with and without pruning, and say what each took.

    Args:
        image: the picture's file.
        question: what is asked.
        method: what chooses the tokens, "tprl" or a peer, which needs --budget; an unknown name lists all.
        budget: visual tokens to keep; by the pruner's threshold unless given.
        threshold: keep probability above which a token stays; the pruner's calibrated one unless given.
        picture: PNG file to draw the kept patches into.
        steps: draw the way there too: all tokens, then a third, a ninth and a 27th of them.
        model: "pocket-llava", or a folder or Hub id of a model.
        pruner: folder of the pruner; the shipped one unless given.
        dtype: of the model: "auto", "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
    """
    if not question.strip():
        raise ValueError("the question is empty; ask something about the picture")
    if budget is not None and threshold is not None:
        raise ValueError("give --budget or --threshold, not both")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"--threshold must lie in [0, 1], got {threshold}")
    if budget is not None and budget < 1:
        raise ValueError(f"--budget must be at least 1, got {budget}")
    if steps and picture is None:
        raise ValueError("--steps are drawn into a picture; say which with --picture")
    if picture is not None and not (picture.parent.is_dir() and _can_write(picture)):
        raise ValueError(f"--picture {picture} cannot be written; give a name such as kept.png in a folder that exists")
    check_names([method])
    if method != TokenPruner.name:
        if budget is None:
            raise ValueError(f"--method {method} has no threshold; give --budget")
        if steps or pruner is not None:
            raise ValueError(f"--steps and --pruner go with --method {TokenPruner.name}, not with {method}")
    shown = read_image(image)
    lvlm = open_lvlm(model, dtype, device)
    policy = None
    if method == TokenPruner.name:
        policy = TokenPruner.from_pretrained(pruner or SHIPPED_PRUNER, lvlm.fingerprint).to(device)
    (row,) = make_methods([method], [budget] if budget else [], policy, threshold, budget is None, seed=0)
    visual = lvlm.visual_tokens(lvlm.encode_images([shown]), [question])
    total = int(visual.mask.sum())
    if budget is not None and budget > total:
        raise ValueError(f"--budget {budget} is more than the picture's {total} visual tokens; allowed: 1 to {total}")
    whole = answered(lvlm, shown, question)
    short = answered(lvlm, shown, question, row)
    _print(question, whole, short)
    if picture is not None:
        keep = torch.zeros(total, dtype=torch.bool).index_fill(0, short.kept, True)
        headed(_draw(shown, visual, keep, policy if steps else None, short.text), question, 17).save(picture)
        print(f"wrote {picture}")


def _can_write(picture: Path) -> bool:
    """Whether its name ends as that of a kind of picture that can be written."""
    return Image.registered_extensions().get(picture.suffix.lower()) in Image.SAVE


def _print(question: str, whole: Answered, short: Answered) -> None:
    table = Table("", "every token", "pruned", "saved", title=escape(question))
    table.add_row("answer", escape(whole.text), escape(short.text), "")
    for name, unit, before, after in (
        ("visual tokens", "", whole.visual_tokens, short.visual_tokens),
        ("FLOPs", " G", whole.flops / 1e9, short.flops / 1e9),
        ("prefill", " ms", whole.prefill_ms, short.prefill_ms),
        ("KV cache", " MiB", whole.kv_cache_mib, short.kv_cache_mib),
    ):
        table.add_row(name, f"{before:.4g}{unit}", f"{after:.4g}{unit}", f"{1 - after / before:.1%}")
    Console().print(table)


def _draw(image: Image.Image, visual: VisualTokens, keep: Tensor, policy: TokenPruner | None, text: str) -> Image.Image:
    """What was kept, and with a ``policy`` its way there."""
    coords, total = visual.coords[0].cpu(), len(keep)
    last = draw_kept(image, coords, keep, f"{int(keep.sum())} of {total} tokens: {text}")
    if policy is None:
        return last
    budgets = [total // 3, total // 9, total // 27]
    frames = [draw_kept(image, coords, torch.ones_like(keep), f"all {total} tokens")]
    for budget in [budget for budget in budgets if budget > int(keep.sum())]:
        chosen = policy.select(visual, torch.tensor([budget], device=visual.mask.device)).keep_mask[0].cpu()
        frames.append(draw_kept(image, coords, chosen, f"the {budget} likeliest"))
    return side_by_side([*frames, last])
