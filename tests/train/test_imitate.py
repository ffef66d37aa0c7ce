"""Demonstrations become targets, and targets become a policy."""

import torch

from tprl.demonstrations import MemoScore
from tprl.train.imitate import imitation_loss, survival_targets, unpruned_scores, worth_function
from train.puzzle import Puzzle, make_pruner


def test_targets_are_the_share_of_later_states_that_hold_a_token() -> None:
    states = torch.tensor([[[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]]).bool()
    expected = torch.tensor([[[1, 2 / 3, 1 / 3, 0], [1, 1 / 2, 0, 0], [1, 0, 0, 0]]])
    assert torch.allclose(survival_targets(states), expected)


def test_the_loss_is_that_of_the_tokens_held() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0], [3.0, 0.5, 9.0]])
    target = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]])
    state = torch.tensor([[True, True, True], [True, True, False]])
    terms = [
        -(y * torch.sigmoid(x).log() + (1 - y) * (1 - torch.sigmoid(x)).log())
        for x, y in zip(logits[state], target[state], strict=True)
    ]
    assert torch.allclose(imitation_loss(logits, target, state), torch.stack(terms).mean())


def test_imitating_teaches_which_token_the_question_names() -> None:
    puzzle, pruner = Puzzle(), make_pruner()
    optimizer = torch.optim.AdamW(pruner.policy.parameters(), lr=3e-3)
    indices = list(range(len(puzzle)))
    visual = puzzle.visual(indices)
    target = torch.nn.functional.one_hot(puzzle.place(indices), visual.mask.shape[1]).float()
    latents = pruner.encode(visual).detach()
    for _ in range(200):
        loss = imitation_loss(pruner.look(latents, visual, visual.mask).logits, target, visual.mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = pruner.select(visual, torch.ones(len(indices), dtype=torch.int64)).keep_mask
    assert (found & target.bool()).any(1).float().mean() > 0.9


def test_scores_of_all_steps_come_in_one_call() -> None:
    puzzle = Puzzle()
    indices = [4, 1, 2]
    visual = puzzle.visual(indices)
    masks = torch.zeros(2, 3, 12, dtype=torch.bool)
    masks[0] = True
    masks[1, :, 0] = True
    masks[1, 1] = torch.nn.functional.one_hot(puzzle.place([1]), 12).bool()[0]
    for kind, lost in (("log_likelihood", -2.0), ("correct", 0.0)):
        best = 0.0 if kind == "log_likelihood" else 1.0
        scores = MemoScore(worth_function(puzzle, indices, visual.tokens, kind))(masks)  # type: ignore[arg-type]
        assert scores[0].tolist() == [best] * 3
        assert scores[1, 1] == best
        assert scores[1, 0] == (best if int(puzzle.place([4])) == 0 else lost)
        assert unpruned_scores(puzzle, indices, kind).tolist() == [best] * 3  # type: ignore[arg-type]
