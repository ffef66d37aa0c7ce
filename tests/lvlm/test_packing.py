"""Packed rows: laid out by hand, and scored as each question is alone by the model with its own masks."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tprl.lvlm.packing import IGNORE, Block, Packed, Prefix, kept_indices, make_prefix, pack
from tprl.lvlm.score import AnswerScorer

VOCAB, WIDTH, BEFORE, VISUAL, IMAGE = 48, 16, [1, 5, 9], 11, 99


def prefixes(rows: int, before: Sequence[int] = BEFORE, visual: int = VISUAL) -> Prefix:
    return make_prefix([[*before, IMAGE]] * rows, IMAGE, [[visual]] * rows)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Random, its attention far from uniform."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    random, made = torch.Generator().manual_seed(0), LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                noise = torch.randn(weight.shape, generator=random, dtype=torch.float64)
                weight.copy_(noise * 1.5 / weight.shape[-1] ** 0.5)
    return made


def pictures(count: int) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(count, VISUAL, WIDTH, generator=random, dtype=torch.float64)


def masks() -> Tensor:
    """Few, all, one and many tokens kept."""
    keep = torch.zeros(4, VISUAL, dtype=torch.bool)
    keep[0, [2, 3, 8]] = True
    keep[1] = True
    keep[2, 10] = True
    keep[3, [0, 1, 4, 5, 6, 9]] = True
    return keep


def blocks(counts: Sequence[int]) -> list[list[Block]]:
    """So many questions about each picture, of different lengths, with answers of one to three tokens."""
    random = torch.Generator().manual_seed(2)
    rows = []
    for row, count in enumerate(counts):
        lengths = [(2 + (row + number) % 3, 1 + (row + 2 * number) % 3) for number in range(count)]
        rows.append([
            Block(torch.randint(VOCAB, (prompt + answer,), generator=random).tolist(), prompt)
            for prompt, answer in lengths
        ])  # fmt: skip
    return rows


def logits_of(model: LlamaForCausalLM, packed: Packed, pictures: Tensor, keep: Tensor) -> Tensor:
    """Vocabulary logits of a batch of packed rows, the kept tokens put in one at a time."""
    embeds = model.get_input_embeddings()(packed.ids).clone()
    for row, mask in enumerate(keep):
        for place, token in enumerate(mask.nonzero()[:, 0].tolist()):
            embeds[row, len(BEFORE) + place] = pictures[row, token]
    with torch.no_grad():
        return model(inputs_embeds=embeds, position_ids=packed.positions[0], attention_mask=packed.mask).logits


def log_probs(logits: Tensor, packed: Packed) -> list[list[float]]:
    """Of the answer's tokens, question by question."""
    found: list[list[float]] = [[] for _ in range(int(packed.owners.max()) + 1)]
    for row, place in (packed.targets != IGNORE).nonzero().tolist():
        owner, target = int(packed.owners[row, place]), int(packed.targets[row, place])
        found[owner].append(float(logits[row, place].log_softmax(0)[target]))
    return found


def alone(model: LlamaForCausalLM, picture: Tensor, keep: Tensor, block: Block) -> list[float]:
    """One question after the whole picture, the dropped tokens hidden by the model's own attention mask."""
    embed = model.get_input_embeddings()
    embeds = torch.cat([embed(torch.tensor(BEFORE)), picture, embed(torch.tensor(block.ids))])
    hidden = torch.cat([torch.ones(len(BEFORE)), keep, torch.ones(len(block.ids))]).long()
    with torch.no_grad():
        logits = model(
            inputs_embeds=embeds[None], attention_mask=hidden[None], position_ids=torch.arange(len(embeds))[None]
        ).logits[0]
    start = len(BEFORE) + VISUAL
    return [
        float(logits[start + place - 1].log_softmax(0)[block.ids[place]])
        for place in range(block.answer_start, len(block.ids))
    ]


def packed_batch(counts: Sequence[int] = (3, 1, 2, 2)) -> tuple[Packed, list[list[Block]]]:
    rows = blocks(counts)
    return pack(prefixes(4), masks(), rows), rows


def expected(model: LlamaForCausalLM, rows: list[list[Block]]) -> list[list[float]]:
    shown, keep = pictures(4), masks()
    return [alone(model, shown[row], keep[row], block) for row, found in enumerate(rows) for block in found]


def largest_error(found: list[list[float]], wanted: list[list[float]]) -> float:
    assert [len(answer) for answer in found] == [len(answer) for answer in wanted]
    return max(abs(a - b) for pair in zip(found, wanted, strict=True) for a, b in zip(*pair, strict=True))


def test_a_packed_question_is_what_it_is_alone(model: LlamaForCausalLM) -> None:
    packed, rows = packed_batch()
    found = log_probs(logits_of(model, packed, pictures(4), masks()), packed)
    assert largest_error(found, expected(model, rows)) < 1e-9


def test_what_would_be_wrong_is_told_apart(model: LlamaForCausalLM) -> None:
    """Positions counted anew after pruning, blocks that see one another, and other tokens kept."""
    packed, rows = packed_batch()
    wanted, shown, keep = expected(model, rows), pictures(4), masks()
    indices, real = kept_indices(keep)
    anew = packed.positions.clone()
    anew[packed.visual[None]] = len(BEFORE) + torch.arange(indices.shape[1]).expand(4, -1)[real]
    squeezed = anew - (packed.positions >= len(BEFORE) + VISUAL) * (VISUAL - real.sum(1))[:, None]
    causal = torch.ones_like(packed.mask).tril()
    wrong = {
        "positions": logits_of(model, replace(packed, positions=squeezed), shown, keep),
        "blocks see one another": logits_of(model, replace(packed, mask=packed.mask | causal), shown, keep),
        "tokens": logits_of(model, packed, shown.roll(1, 1), keep),
    }
    for name, logits in wrong.items():
        assert largest_error(log_probs(logits, packed), wanted) > 0.05, name


def test_padding_is_never_seen(model: LlamaForCausalLM) -> None:
    packed, rows = packed_batch()
    embeds_at = packed.ids.clone()
    blank = torch.ones_like(packed.ids, dtype=torch.bool)
    for row, keep in enumerate(masks()):
        blank[row, : len(BEFORE) + int(keep.sum()) + sum(len(block.ids) for block in rows[row])] = False
    assert blank.any(1).sum() == 3
    embeds_at[blank] = torch.randint(VOCAB, (int(blank.sum()),), generator=torch.Generator().manual_seed(3))
    before, after = (
        log_probs(logits_of(model, given, pictures(4), masks()), packed)
        for given in (packed, replace(packed, ids=embeds_at))
    )  # fmt: skip
    assert before == after
    assert not (packed.mask[:, 0] & blank[:, None, :] & ~blank[:, :, None]).any()


def test_the_scorer_agrees(model: LlamaForCausalLM) -> None:
    rows = blocks((3, 1, 2, 2))
    scorer = AnswerScorer(model.model, model.lm_head, tokens_per_pass=60)
    scores = scorer.score(prefixes(4), pictures(4), masks(), rows)
    means = torch.tensor([sum(answer) / len(answer) for answer in expected(model, rows)])
    torch.testing.assert_close(scores.log_prob, means, rtol=1e-5, atol=1e-5)


def test_a_layout_by_hand() -> None:
    """Prefix 7 8, four visual tokens of which the second and the fourth are kept in the first row and the first in
    the second; "20 21 | 22" and "30 | 31 32" about the first, "40 | 41" about the second."""
    keep = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]]).bool()
    rows = [[Block([20, 21, 22], 2), Block([30, 31, 32], 1)], [Block([40, 41], 1)]]
    packed = pack(prefixes(2, [7, 8], 4), keep, rows)
    assert packed.start.tolist() == [4, 3]
    assert packed.visual.int().tolist() == [[0, 0, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert packed.places[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert packed.places[1, :5].tolist() == [0, 1, 2, 3, 4]
    assert packed.ids.tolist() == [[7, 8, 0, 0, 20, 21, 22, 30, 31, 32], [7, 8, 0, 40, 41, 0, 0, 0, 0, 0]]
    assert packed.positions[0, 0].tolist() == [0, 1, 3, 5, 6, 7, 8, 6, 7, 8]
    assert packed.positions[0, 1, :5].tolist() == [0, 1, 2, 6, 7]
    none = IGNORE
    assert packed.targets.tolist() == [
        [none, none, none, none, none, 22, none, 31, 32, none],
        [none, none, none, 41, none, none, none, none, none, none],
    ]
    assert packed.owners.tolist() == [[-1, -1, -1, -1, -1, 0, -1, 1, 1, -1], [-1, -1, -1, 2, -1, -1, -1, -1, -1, -1]]
    seen = [
        "1000000000", "1100000000", "1110000000", "1111000000",
        "1111100000", "1111110000", "1111111000",
        "1111000100", "1111000110", "1111000111",
    ]  # fmt: skip
    assert packed.mask.shape == (2, 1, 10, 10)
    assert ["".join(str(int(flag)) for flag in line) for line in packed.mask[0, 0]] == seen
    assert packed.mask[1, 0, 3].int().tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert packed.mask[1, 0, 4].int().tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]


def test_nothing_before_the_picture() -> None:
    keep = torch.tensor([[0, 1, 0, 1]]).bool()
    packed = pack(prefixes(1, [], 4), keep, [[Block([20, 21], 1)]])
    assert packed.visual.tolist() == [[True, True, False, False]]
    assert packed.ids.tolist() == [[0, 0, 20, 21]]
    assert packed.positions.tolist() == [[[1, 3, 4, 5]]]
    assert packed.targets.tolist() == [[IGNORE, IGNORE, 21, IGNORE]]


def test_a_prompt_without_an_answer_has_no_targets() -> None:
    packed = pack(prefixes(1, [7], 2), torch.ones(1, 2).bool(), [[Block([20, 21], 2)]])
    assert (packed.targets == IGNORE).all()
    assert (packed.owners == -1).all()


def test_kept_indices_are_in_raster_order() -> None:
    random = torch.Generator().manual_seed(0)
    keep = torch.rand(20, 300, generator=random) < torch.rand(20, 1, generator=random)
    indices, real = kept_indices(keep)
    assert indices.shape == real.shape == (20, int(keep.sum(1).max()))
    for row in range(20):
        assert indices[row, real[row]].tolist() == [i for i in range(300) if keep[row, i]]
        assert real[row].tolist() == sorted(real[row].tolist(), reverse=True)
    assert (indices[~real] == 0).all()


def test_every_row_sees_itself() -> None:
    """A row of the mask without any True would make the softmax NaN."""
    packed, _ = packed_batch()
    assert packed.mask.any(-1).all()
    assert not (packed.mask & torch.ones_like(packed.mask).triu(1)).any()


def test_an_opening_ends_where_rows_differ_and_where_the_picture_begins() -> None:
    image = 60
    assert make_prefix([[7, 8, image], [7, 8, image]], image, [[2], [2]]).opening() == (7, 8)
    assert make_prefix([[7, 8, 5, image], [7, 9, 5, image]], image, [[2], [2]]).opening() == (7,)
    assert make_prefix([[7, 8, image], [7, image]], image, [[2], [2]]).opening() == (7,)
    assert make_prefix([[image, 7, image]], image, [[1, 1]]).opening() == ()
