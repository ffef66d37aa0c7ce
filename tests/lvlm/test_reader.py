"""What all prompts begin with, read once, against prompts that are read whole."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from evaluate.world import QUESTIONS, TEXTS, tiny_lvlm
from tprl.lvlm.model import Lvlm
from tprl.lvlm.packing import Block, Prefix, make_prefix
from tprl.lvlm.reader import RowReader
from tprl.lvlm.score import AnswerScorer

IMAGE, ROWS, COUNT = 60, 6, 16
BEGUN = [2, 5, 7]


@pytest.fixture(scope="module")
def lvlm() -> Lvlm:
    return tiny_lvlm()


@pytest.fixture
def scorer(lvlm: Lvlm) -> AnswerScorer:
    return AnswerScorer(lvlm.model.model.language_model, lvlm.model.lm_head)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randn(ROWS, COUNT, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def keep() -> Tensor:
    return torch.rand(ROWS, COUNT, generator=torch.Generator().manual_seed(1)) < torch.linspace(0.1, 1, ROWS)[:, None]


@pytest.fixture(scope="module")
def rows(lvlm: Lvlm) -> list[list[Block]]:
    asked = [(QUESTIONS[row % 4], " ".join([TEXTS[row % 4]] * (1 + row % 3))) for row in range(ROWS)]
    return [[Block(lvlm.prompts.ids(*both)[1], len(lvlm.prompts.ids(both[0])[1]))] for both in asked]


def begun_with(*beginnings: Sequence[int]) -> Prefix:
    return make_prefix([[*ids, IMAGE] for ids in beginnings], IMAGE, [[COUNT]] * len(beginnings))


@torch.no_grad()
def test_it_is_read_once_and_seen_by_every_row(
    lvlm: Lvlm, scorer: AnswerScorer, tokens: Tensor, keep: Tensor, rows: list[list[Block]]
) -> None:
    language, embed = scorer.language, scorer.language.get_input_embeddings()
    seen: list[int] = []
    handle = language.layers[0].register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    first = scorer.score(begun_with(*[BEGUN] * ROWS), tokens, keep, rows)
    second = scorer.score(begun_with(*[BEGUN] * ROWS), tokens, keep, rows)
    handle.remove()
    opening, *passes = seen
    assert opening == len(BEGUN)
    longest = max(int(keep[row].sum()) + len(rows[row][0].ids) for row in range(ROWS))
    assert passes.count(longest) == 2
    assert max(passes) == longest
    assert torch.equal(first.log_prob, second.log_prob)
    for row, (part,) in enumerate(rows):
        whole = [embed(torch.tensor(BEGUN)), tokens[row][keep[row]], embed(torch.tensor(part.ids))]
        places = [
            *range(3),
            *(3 + i for i in range(COUNT) if keep[row, i]),
            *range(3 + COUNT, 3 + COUNT + len(part.ids)),
        ]
        hidden = language(inputs_embeds=torch.cat(whole)[None], position_ids=torch.tensor([places]))[0]
        answer = torch.tensor(part.ids[part.answer_start :])
        log_probs = lvlm.model.lm_head(hidden)[0, -len(answer) - 1 : -1].log_softmax(1)
        torch.testing.assert_close(first.log_prob[row], log_probs.gather(1, answer[:, None]).mean())


def test_prompts_that_begin_differently_share_what_is_alike(
    scorer: AnswerScorer, tokens: Tensor, keep: Tensor, rows: list[list[Block]]
) -> None:
    beginnings = [[*BEGUN[:-1], 7 + row % 2] for row in range(ROWS)]
    together = scorer.score(begun_with(*beginnings), tokens, keep, rows).log_prob
    alike = scorer.score(begun_with(*[BEGUN] * ROWS), tokens, keep, rows).log_prob
    for row, ids in enumerate(beginnings):
        alone = scorer.score(begun_with(ids), tokens[[row]], keep[[row]], [rows[row]]).log_prob
        torch.testing.assert_close(together[[row]], alone)
    torch.testing.assert_close(together[::2], alike[::2])
    assert (together - alike)[1::2].abs().min() > 1e-4


@torch.no_grad()
def test_where_prompts_are_seen_in_both_directions_nothing_is_read_by_itself(
    lvlm: Lvlm, tokens: Tensor, keep: Tensor, rows: list[list[Block]]
) -> None:
    prefix = begun_with(*[BEGUN] * ROWS)
    for both_ways, skipped in (("nothing", len(BEGUN)), ("pictures", len(BEGUN)), ("prompts", 0)):
        reader = RowReader(lvlm.model.model.language_model, both_ways)
        _, inputs = reader.prepare(prefix, tokens[keep], keep, rows)
        assert reader.after_opening(prefix, inputs)[0] == skipped
