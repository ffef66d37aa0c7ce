"""The batched answer scorer against one plain forward pass or one ``generate`` a question."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from evaluate.world import END, QUESTIONS, TEXTS, tiny_lvlm
from tprl.lvlm.in_model import dropping
from tprl.lvlm.model import Lvlm
from tprl.lvlm.packing import Block, Prefix, make_prefix
from tprl.lvlm.score import AnswerScorer, Within
from tprl.selectors import IN_MODEL


@pytest.fixture(scope="module")
def lvlm() -> Lvlm:
    return tiny_lvlm()


@pytest.fixture(scope="module")
def scorer(lvlm: Lvlm) -> AnswerScorer:
    return AnswerScorer(lvlm.model.model.language_model, lvlm.model.lm_head, tokens_per_pass=100)


@pytest.fixture(scope="module")
def before(lvlm: Lvlm) -> list[int]:
    return lvlm.prompts.ids("?")[0][:-1]


@pytest.fixture(scope="module")
def prefix(before: list[int]) -> Prefix:
    return make_prefix([[*before, 60]] * 6, 60, [[16]] * 6)


def block(lvlm: Lvlm, number: int) -> Block:
    question, answer = QUESTIONS[number % 4], " ".join([TEXTS[number % 4]] * (1 + number % 3))
    return Block(lvlm.prompts.ids(question, answer)[1], len(lvlm.prompts.ids(question)[1]))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randn(6, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def keep() -> Tensor:
    return torch.rand(6, 16, generator=torch.Generator().manual_seed(1)) < torch.linspace(0.1, 1, 6)[:, None]


def alone(
    scorer: AnswerScorer, before: list[int], tokens: Tensor, keep: Tensor, ids: list[int]
) -> tuple[Tensor, Tensor]:
    """Embeddings ``(1, L, D)`` and positions ``(1, L)`` of one question, written out."""
    embed = scorer.language.get_input_embeddings()
    places = [*range(len(before)), *(len(before) + i for i in range(16) if keep[i])]
    places += [len(before) + 16 + i for i in range(len(ids))]
    return torch.cat([embed(torch.tensor(before)), tokens[keep], embed(torch.tensor(ids))])[None], torch.tensor(
        [places]
    )


@torch.no_grad()
def test_compact_positions_count_what_is_left(
    lvlm: Lvlm, before: list[int], prefix: Prefix, tokens: Tensor, keep: Tensor
) -> None:
    scorer = AnswerScorer(lvlm.model.model.language_model, lvlm.model.lm_head)
    rows = [[block(lvlm, row)] for row in range(6)]
    original = scorer.score(prefix, tokens, keep, rows)
    scorer.reader.positions = "compact"
    scores = scorer.score(prefix, tokens, keep, rows)
    for row, (part,) in enumerate(rows):
        embeds, _ = alone(scorer, before, tokens[row], keep[row], part.ids)
        logits = lvlm.model.lm_head(scorer.language(inputs_embeds=embeds)[0])[0]
        answer = torch.tensor(part.ids[part.answer_start :])
        wanted = logits[-len(answer) - 1 : -1].log_softmax(1).gather(1, answer[:, None]).mean()
        assert scores.log_prob[row].item() == pytest.approx(wanted.item(), rel=1e-4)
    assert (scores.log_prob - original.log_prob).abs().max() > 1e-3
    everything = torch.ones_like(keep)
    whole = scorer.score(prefix, tokens, everything, rows)
    scorer.reader.positions = "original"
    torch.testing.assert_close(scorer.score(prefix, tokens, everything, rows).log_prob, whole.log_prob)


@torch.no_grad()
def test_score_is_that_of_one_forward_a_question(
    lvlm: Lvlm, scorer: AnswerScorer, before: list[int], prefix: Prefix, tokens: Tensor, keep: Tensor
) -> None:
    rows = [[block(lvlm, 3 * row + i) for i in range(1 + row % 3)] for row in range(6)]
    scores = scorer.score(prefix, tokens, keep, rows)
    wanted, correct = [], []
    for row, blocks in enumerate(rows):
        for part in blocks:
            embeds, positions = alone(scorer, before, tokens[row], keep[row], part.ids)
            logits = lvlm.model.lm_head(scorer.language(inputs_embeds=embeds, position_ids=positions)[0])[0]
            start = len(logits) - len(part.ids) + part.answer_start
            answer = torch.tensor(part.ids[part.answer_start :])
            predicted = logits[start - 1 : -1]
            wanted.append(predicted.log_softmax(-1)[range(len(answer)), answer].mean())
            correct.append(bool((predicted.argmax(-1) == answer).all()))
    torch.testing.assert_close(scores.log_prob, torch.stack(wanted), rtol=1e-4, atol=1e-4)
    assert scores.correct.tolist() == correct


@torch.no_grad()
def test_a_token_of_size_n_is_n_copies_of_it(
    lvlm: Lvlm, scorer: AnswerScorer, before: list[int], prefix: Prefix, tokens: Tensor, keep: Tensor
) -> None:
    """Copies at one position that all see each other and are seen by whatever sees one of them."""
    sizes = torch.randint(1, 5, keep.shape, generator=torch.Generator().manual_seed(2))
    rows = [[block(lvlm, row)] for row in range(6)]
    scores = scorer.score(replace(prefix, sizes=sizes.float()), tokens, keep, rows)
    for row, (part,) in enumerate(rows):
        embeds, positions = alone(scorer, before, tokens[row], keep[row], part.ids)
        copies = torch.cat([torch.ones(len(before)), sizes[row, keep[row]], torch.ones(len(part.ids))]).long()
        owner = torch.arange(len(copies)).repeat_interleave(copies)
        seen = (owner[:, None] >= owner)[None, None]
        hidden = scorer.language(
            inputs_embeds=embeds[:, owner], position_ids=positions[:, owner], attention_mask=seen
        ).last_hidden_state
        answer = torch.tensor(part.ids[part.answer_start :])
        wanted = lvlm.model.lm_head(hidden)[0, -len(answer) - 1 : -1].log_softmax(1).gather(1, answer[:, None]).mean()
        assert scores.log_prob[row].item() == pytest.approx(wanted.item(), rel=1e-4)
    assert (scores.log_prob - scorer.score(prefix, tokens, keep, rows).log_prob).abs().max() > 1e-3


@torch.no_grad()
def test_generate_is_greedy_one_question_at_a_time(
    lvlm: Lvlm, scorer: AnswerScorer, before: list[int], prefix: Prefix, tokens: Tensor, keep: Tensor
) -> None:
    """Compared without a cache, and cut at an end token that most answers do not reach."""
    prompts = [lvlm.prompts.ids(QUESTIONS[row % 4])[1] for row in range(6)]
    for end in (END, 40):
        wanted = []
        for row, prompt in enumerate(prompts):
            answer: list[int] = []
            while len(answer) < 4 and end not in answer:
                embeds, positions = alone(scorer, before, tokens[row], keep[row], prompt + answer)
                hidden = scorer.language(inputs_embeds=embeds, position_ids=positions)[0]
                answer.append(int(lvlm.model.lm_head(hidden)[0, -1].argmax()))
            wanted.append([token for token in answer if token != end])
        assert scorer.generate(prefix, tokens, keep, prompts, end, 4) == wanted


@torch.no_grad()
@pytest.mark.parametrize("name", IN_MODEL)
def test_methods_inside_the_model_prune_each_row_as_alone(
    lvlm: Lvlm, scorer: AnswerScorer, before: list[int], prefix: Prefix, tokens: Tensor, name: str
) -> None:
    method, everything = IN_MODEL[name](), torch.ones(6, 16, dtype=torch.bool)
    blocks = [block(lvlm, row) for row in range(6)]
    scores = scorer.score(prefix, tokens, everything, [[part] for part in blocks], Within(method, 4))
    prompts = [part.ids[: part.answer_start] for part in blocks]
    answers = scorer.generate(prefix, tokens, everything, prompts, 40, 3, Within(method, 4))
    for row, part in enumerate(blocks):
        embeds, positions = alone(scorer, before, tokens[row], everything[row], part.ids)
        visual = torch.zeros(1, embeds.shape[1], dtype=torch.bool)
        visual[:, len(before) : len(before) + 16] = True
        last = torch.tensor([len(before) + 16 + part.answer_start - 1])
        with dropping(scorer.language, method, visual=visual, last=last, budgets=torch.tensor([4])):
            logits = lvlm.model.lm_head(scorer.language(inputs_embeds=embeds, position_ids=positions)[0])[0]
        answer = torch.tensor(part.ids[part.answer_start :])
        predicted = logits[int(last) : -1]
        log_prob = predicted.log_softmax(-1)[range(len(answer)), answer].mean()
        torch.testing.assert_close(scores.log_prob[row], log_prob, rtol=1e-4, atol=1e-4)
        assert answers[row][0] == int(predicted[0].argmax())
    few = everything.clone()
    few[1, 3:] = False  # fewer than the budget
    rows = [[part] for part in blocks]
    most, three = (scorer.score(prefix, tokens, few, rows, Within(method, budget)).log_prob for budget in (4, 3))
    torch.testing.assert_close(most[1], three[1])
    assert (most - three)[0].abs() > 1e-4
    with pytest.raises(ValueError, match="prunes for one question a row"):
        scorer.score(prefix, tokens, everything, [blocks[:2]] * 6, Within(method, 4))
