"""The match of visual tokens and questions against its definition written out with loops."""

from dataclasses import replace

import torch
from torch import Tensor

from ragged import visual_tokens
from tprl.match import MATCHES, question_match, standard_scores

COUNTS, ASKED, WIDTH = [9, 4, 1], [3, 1, 2], 6


def slow_match(tokens: Tensor, words: Tensor) -> Tensor:
    """``(N, 3)`` of one picture's real tokens and one question's real words."""
    cosines = [[float(torch.cosine_similarity(t, w, dim=0)) for w in words] for t in tokens]

    def standard(values: list[float]) -> list[float]:
        mean = sum(values) / len(values)
        deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
        return [(v - mean) / max(deviation, 1e-6) for v in values]

    nearest = standard([max(row) for row in cosines])
    by_word = [standard([row[word] for row in cosines]) for word in range(len(words))]
    ranked = [sorted((scores[token] for scores in by_word), reverse=True) for token in range(len(tokens))]
    second = [scores[1] if len(words) > 1 else 0.0 for scores in ranked]
    return torch.tensor([nearest, [scores[0] for scores in ranked], second]).T


def test_it_is_its_definition() -> None:
    visual = visual_tokens(COUNTS, ASKED, WIDTH)
    match = question_match(visual)
    assert match.shape == (3, 9, MATCHES)
    for row, (count, asked) in enumerate(zip(COUNTS, ASKED, strict=True)):
        expected = slow_match(visual.tokens[row, :count], visual.query[row, :asked])
        torch.testing.assert_close(match[row, :count], expected, rtol=1e-3, atol=1e-3)
        assert not match[row, count:].any()


def test_words_that_are_not_there_are_not_nearer_than_one_that_is_far() -> None:
    """The second question is one word, which every token of its picture is turned away from."""
    visual = visual_tokens(COUNTS, ASKED, WIDTH)
    word = visual.query[1, 0] / visual.query[1, 0].norm()
    visual.tokens[1] -= (visual.tokens[1] @ word + 0.5)[:, None] * word
    expected = slow_match(visual.tokens[1, :4], visual.query[1, :1])
    assert expected[:, 0].abs().min() > 0.01
    torch.testing.assert_close(question_match(visual)[1, :4], expected, rtol=1e-3, atol=1e-3)


def test_padding_changes_nothing() -> None:
    visual = visual_tokens(COUNTS, ASKED, WIDTH)
    before = question_match(visual)
    visual.tokens[~visual.mask] = 1e4
    visual.query[~visual.query_mask] = 1e4
    assert torch.equal(question_match(visual), before)


def test_no_question_no_match() -> None:
    visual = visual_tokens(COUNTS, ASKED, WIDTH)
    visual.query_mask[1] = False
    match = question_match(visual)
    assert not match[1].any()
    assert match[0].any()


def test_nobody_asks_anything() -> None:
    visual = visual_tokens(COUNTS, ASKED, WIDTH)
    visual.query_mask[:] = False
    empty = question_match(visual)
    wordless = replace(visual, query=visual.query[:, :0], query_mask=visual.query_mask[:, :0])
    assert torch.equal(question_match(wordless), empty)
    assert not empty.any()


def test_a_token_that_shows_what_is_asked_stands_out() -> None:
    visual = visual_tokens([50], [3], 64)
    visual.tokens[0, 7] += 3 * visual.query[0, 1]
    assert question_match(visual)[0, :, :2].argmax(0).tolist() == [7, 7]


def test_a_token_that_shows_two_words_stands_out_among_those_that_show_one() -> None:
    visual = visual_tokens([50], [3], 64)
    visual.tokens[0, 7] += 3 * visual.query[0, 1]
    visual.tokens[0, 9] += 3 * visual.query[0, 1] + 3 * visual.query[0, 2]
    match = question_match(visual)[0, :, 2]
    assert match.argmax() == 9
    assert match[7] < match[9] / 2


def test_standard_scores_have_mean_0_and_deviation_1() -> None:
    values, mask = torch.randn(2, 8, 3), torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
    scores = standard_scores(values, mask)
    torch.testing.assert_close(scores[1, :5].mean(0), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(scores[1, :5].std(0, correction=0), torch.ones(3))
    assert not scores[1, 5:].any()
