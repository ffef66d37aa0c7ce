"""The trunk's invariants, and the action distribution against its equation written out and against statistics."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from ragged import alone, visual_tokens
from tprl.policy import KeepDistribution, Policy, PolicyOutput
from tprl.types import VisualTokens

LATENT, COUNTS, ASKED = 6, [7, 4, 1], [3, 2, 5]
RUBBISH = 1e4


def make_policy(dtype: torch.dtype = torch.float64, seed: int = 0) -> Policy:
    """A policy none of whose weights is zero or one."""
    random = torch.Generator().manual_seed(seed)
    policy = Policy(LATENT, LATENT, hidden=16, layers=2, heads=4)
    with torch.no_grad():
        for weight in policy.parameters():
            noise = torch.randn(weight.shape, generator=random)
            weight.copy_(noise / weight.shape[-1] ** 0.5 if weight.ndim > 1 else 1 + 0.3 * noise)
    return policy.to(dtype)


def look(policy: Policy, visual: VisualTokens, state: Tensor | None = None) -> PolicyOutput:
    """The tokens themselves stand for the latents."""
    dtype = policy.kind.dtype
    return policy(
        visual.tokens.to(dtype), visual.coords.to(dtype), visual.mask if state is None else state,
        visual.query.to(dtype), visual.query_mask,
    )  # fmt: skip


def holes(visual: VisualTokens) -> Tensor:
    """A state that has lost tokens at the beginning, in the middle and at the end of rows."""
    state = visual.mask.clone()
    state[0, [0, 3, 6]] = False
    state[1, [1, 2]] = False
    return state


def test_the_trunk_written_out() -> None:
    """Token by token and head by head: the place's six octaves, the kinds of tokens, attention before the residuals."""
    policy, visual = make_policy(), visual_tokens([5], [3], LATENT)
    octaves = torch.tensor([torch.pi * 2**k for k in range(6)]).double()
    angles = (visual.coords[0].double()[..., None] * octaves).flatten(1)
    tokens = policy.token_in(visual.tokens[0].double()) + policy.place_in(torch.cat([angles.sin(), angles.cos()], 1))
    state = torch.cat([tokens + policy.kind[0], policy.query_in(visual.query[0].double()) + policy.kind[1]])
    for block in policy.trunk:
        parts = (part.split(4, 1) for part in block.attention_in(block.attention_norm(state)).split(16, 1))
        heads = [(q @ k.T / 2).softmax(1) @ v for q, k, v in zip(*parts, strict=True)]
        state = state + block.attention_out(torch.cat(heads, 1))
        state = state + block.mlp(state)
    torch.testing.assert_close(look(policy, visual).logits[0], policy.actor(policy.norm(state[:5]))[:, 0])


def test_the_trunks_parts_written_out() -> None:
    policy, given = make_policy(), torch.randn(3, 16, generator=torch.Generator().manual_seed(5)).double()

    def linear(layer: nn.Module, rows: Tensor) -> Tensor:
        return rows @ layer.weight.T + layer.bias

    def normed(layer: nn.Module, rows: Tensor) -> Tensor:
        centred = rows - rows.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    def gelu(rows: Tensor) -> Tensor:
        return rows * (1 + torch.erf(rows / 2**0.5)) / 2

    norm, to_hidden = policy.query_in
    words = given[:, :LATENT]
    torch.testing.assert_close(policy.query_in(words), linear(to_hidden, normed(norm, words)))
    for block in policy.trunk:
        torch.testing.assert_close(block.attention_norm(given), normed(block.attention_norm, given))
        norm, up, _, down = block.mlp
        torch.testing.assert_close(block.mlp(given), linear(down, gelu(linear(up, normed(norm, given)))))
    torch.testing.assert_close(policy.norm(given), normed(policy.norm, given))
    for head in (policy.actor, policy.critic):
        first, _, second = head
        torch.testing.assert_close(head(given), linear(second, gelu(linear(first, given))))


# torch takes another road where no gradient is asked for, so both are walked
@pytest.mark.parametrize("grad", [True, False])
def test_a_row_is_what_it_is_alone(grad: bool) -> None:
    policy, visual = make_policy().eval(), visual_tokens(COUNTS, ASKED, LATENT)
    for tensor, mask in (
        (visual.tokens, visual.mask), (visual.coords, visual.mask), (visual.query, visual.query_mask)
    ):  # fmt: skip
        tensor[~mask] = RUBBISH
    with torch.set_grad_enabled(grad):
        output = look(policy, visual)
        for row, count in enumerate(COUNTS):
            expected = look(policy, alone(visual, row))
            torch.testing.assert_close(output.logits[row, :count], expected.logits[0])
            torch.testing.assert_close(output.state_value[row], expected.state_value[0])


@pytest.mark.parametrize("grad", [True, False])
def test_a_dropped_token_is_gone(grad: bool) -> None:
    policy, visual = make_policy().eval(), visual_tokens(COUNTS, ASKED, LATENT)
    state = holes(visual)
    visual.tokens[~state], visual.coords[~state] = RUBBISH, RUBBISH
    with torch.set_grad_enabled(grad):
        output = look(policy, visual, state)
        for row in range(len(visual)):
            left = VisualTokens(visual.tokens, state, visual.coords, visual.query, visual.query_mask)
            expected = look(policy, alone(left, row))
            torch.testing.assert_close(output.logits[row, state[row]], expected.logits[0])
            torch.testing.assert_close(output.state_value[row], expected.state_value[0])


def test_a_held_token_matters_to_the_others_and_to_the_value() -> None:
    policy, visual = make_policy(), visual_tokens(COUNTS, ASKED, LATENT)
    before = look(policy, visual)
    visual.tokens[0, 2] += 1
    after = look(policy, visual)
    others = [i for i in range(7) if i != 2]
    assert (before.logits[0, others] - after.logits[0, others]).abs().min() > 1e-6
    assert (before.state_value[0] - after.state_value[0]).abs() > 1e-6
    assert torch.equal(before.logits[1:], after.logits[1:])


def test_permuted_tokens_give_permuted_logits() -> None:
    policy, visual = make_policy(), visual_tokens([9, 9], [3, 2], LATENT)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    state = torch.rand(2, 9, generator=torch.Generator().manual_seed(4)) < 0.7
    moved = VisualTokens(
        visual.tokens[:, order], visual.mask, visual.coords[:, order], visual.query, visual.query_mask
    )  # fmt: skip
    before, after = look(policy, visual, state), look(policy, moved, state[:, order])
    torch.testing.assert_close(after.logits[state[:, order]], before.logits[:, order][state[:, order]])
    torch.testing.assert_close(after.state_value, before.state_value)
    assert not torch.allclose(after.logits, before.logits, atol=1e-3)


def test_the_policy_knows_where_a_token_lies() -> None:
    policy, visual = make_policy(), visual_tokens([5], [2], LATENT)
    visual.tokens[0, 1] = visual.tokens[0, 4]  # the same, but elsewhere
    output = look(policy, visual)
    assert (output.logits[0, 1] - output.logits[0, 4]).abs() > 1e-3
    for axis in range(2):
        moved = visual_tokens([5], [2], LATENT)
        moved.tokens.copy_(visual.tokens)
        moved.coords[0, 1, axis] = 1 - moved.coords[0, 1, axis]
        assert (look(policy, moved).logits[0, 1] - output.logits[0, 1]).abs() > 1e-3
    visual.coords[0, 1] = visual.coords[0, 4]
    logits = look(policy, visual).logits
    torch.testing.assert_close(logits[0, 1], logits[0, 4])


def test_every_token_of_the_question_matters() -> None:
    policy, visual = make_policy(), visual_tokens(COUNTS, ASKED, LATENT)
    before = look(policy, visual)
    for row, asked in enumerate(ASKED):
        for word in range(asked):
            changed = visual_tokens(COUNTS, ASKED, LATENT)
            changed.query[row, word] += torch.arange(LATENT)
            after = look(policy, changed)
            assert (after.logits[row, : COUNTS[row]] - before.logits[row, : COUNTS[row]]).abs().min() > 1e-6
            assert (after.state_value[row] - before.state_value[row]).abs() > 1e-6


def test_the_value_is_the_critic_of_the_mean_over_held_tokens() -> None:
    policy, visual = make_policy(), visual_tokens(COUNTS, ASKED, LATENT)
    state, seen = holes(visual), {}
    hooks: list[tuple[str, nn.Module]] = [("tokens", policy.norm), ("mean", policy.critic)]
    for name, module in hooks:
        module.register_forward_hook(lambda _, given, output, name=name: seen.update({name: (given[0], output)}))
    output = look(policy, visual, state)
    tokens, (mean, value) = seen["tokens"][1], seen["mean"]
    for row, held in enumerate(state):
        torch.testing.assert_close(mean[row], tokens[row, held].mean(0))
    assert torch.equal(output.state_value, value[:, 0])


def test_training_mode_changes_nothing() -> None:
    policy, visual = make_policy(torch.float32), visual_tokens(COUNTS, ASKED, LATENT)
    training, evaluating = look(policy.train(), visual), look(policy.eval(), visual)
    assert all(torch.equal(*pair) for pair in zip(training, evaluating, strict=True))
    policy.norm = nn.Sequential(policy.norm, nn.Dropout(0.1))  # to see that the comparison would tell
    assert not torch.equal(look(policy.train(), visual).logits, evaluating.logits)


def test_the_first_ratios_of_an_update_are_one() -> None:
    """What a rollout stored without gradients in evaluation mode, the update finds again with them in training mode."""
    policy, visual = make_policy(torch.float32), visual_tokens([256, 200, 31], ASKED, LATENT)
    with torch.no_grad():
        drawn = KeepDistribution(look(policy.eval(), visual).logits, visual.mask, 0.5)
        action = drawn.sample(torch.Generator().manual_seed(0))
        stored = drawn.token_log_prob(action)
    again = KeepDistribution(look(policy.train(), visual).logits, visual.mask, 0.5).token_log_prob(action)
    torch.testing.assert_close((again - stored).exp(), torch.ones_like(stored), atol=1e-5, rtol=0)
    torch.testing.assert_close((again - stored).sum(1).exp(), torch.ones(3), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- the distribution

LOGITS = torch.tensor([[0.3, -1.2, 2.0, 40.0], [-0.5, 0.9, -3.0, 0.1]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])
DISCOUNT = torch.tensor([0.25, 0.81], dtype=torch.float64)
DRAWS = 40_000


def slow_log_prob(logits: Tensor, mask: Tensor, discount: Tensor, action: Tensor) -> Tensor:
    """The equation, one token at a time."""
    rows = []
    for row in range(len(logits)):
        total = 0.0
        for token in range(logits.shape[1]):
            keep = float(discount[row]) / (1 + math.exp(-float(logits[row, token])))
            if mask[row, token]:
                total += math.log(keep if action[row, token] else 1 - keep)
        rows.append(total)
    return torch.tensor(rows, dtype=logits.dtype)


def actions(mask: Tensor) -> list[Tensor]:
    """All actions on one row's real tokens, padding dropped."""
    options = [(False, True) if real else (False,) for real in mask.tolist()]
    return [torch.tensor(action) for action in product(*options)]


@pytest.mark.parametrize("row", [0, 1])
def test_draws_are_as_frequent_as_the_equation_says(row: int) -> None:
    """All joint outcomes, so independence too; the share of all-drop draws goes to the most probable token."""
    logits, mask, discount = LOGITS[row].expand(DRAWS, -1), MASK[row].expand(DRAWS, -1), DISCOUNT[row]
    drawn = KeepDistribution(logits, mask, discount.expand(DRAWS)).sample(torch.Generator().manual_seed(row))

    def expected(discount: float) -> dict[tuple[bool, ...], float]:
        keep = [discount / (1 + math.exp(-x)) for x in LOGITS[row].tolist()]
        probs = {
            tuple(action.tolist()): math.prod(
                (p if kept else 1 - p) if real else 1.0
                for p, kept, real in zip(keep, action, MASK[row], strict=True)
            )
            for action in actions(MASK[row])
        }  # fmt: skip
        best = max((i for i in range(4) if MASK[row, i]), key=lambda i: keep[i])
        dropped = probs.pop((False,) * 4)
        probs[tuple(i == best for i in range(4))] += dropped
        return probs

    def largest_error(probs: dict[tuple[bool, ...], float]) -> float:
        """In standard errors."""
        shares = {action: float((drawn == torch.tensor(action)).all(1).float().mean()) for action in probs}
        assert sum(shares.values()) == pytest.approx(1)
        return max(abs(shares[a] - p) / math.sqrt(p * (1 - p) / DRAWS) for a, p in probs.items())

    assert largest_error(expected(float(discount))) < 4
    assert largest_error(expected(1.0)) > 20  # draws without the discount would be told apart


def test_log_prob_is_the_equation() -> None:
    dist = KeepDistribution(LOGITS, MASK, DISCOUNT)
    for action in product((False, True), repeat=4):
        rows = torch.tensor([action, action[::-1]])
        torch.testing.assert_close(dist.token_log_prob(rows).sum(1), slow_log_prob(LOGITS, MASK, DISCOUNT, rows))
    assert dist.token_log_prob(torch.ones_like(MASK))[0, 3] == 0
    torch.testing.assert_close(dist.probs, DISCOUNT[:, None] * LOGITS.sigmoid() * MASK)


def test_probabilities_of_all_actions_sum_to_one() -> None:
    dist = KeepDistribution(LOGITS, MASK, DISCOUNT)
    for row in range(2):
        total = sum(dist.token_log_prob(action.expand(2, -1)).sum(1)[row].exp() for action in actions(MASK[row]))
        torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))


def test_one_number_is_a_discount_for_every_row() -> None:
    action = MASK.clone()
    several = KeepDistribution(LOGITS, MASK, torch.tensor([0.5, 0.5])).token_log_prob(action).sum(1)
    assert torch.equal(KeepDistribution(LOGITS, MASK, 0.5).token_log_prob(action).sum(1), several)


@pytest.mark.parametrize("discount", [1.0, 0.5, 0.125])
def test_bernoulli_of_torch_agrees(discount: float) -> None:
    peer = torch.distributions.Bernoulli(probs=discount * LOGITS.sigmoid())
    dist = KeepDistribution(LOGITS, MASK, discount)
    action = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]]).bool()
    torch.testing.assert_close(dist.token_log_prob(action)[MASK], peer.log_prob(action.double())[MASK])
    expected = [peer.entropy()[row, MASK[row]].mean() for row in range(2)]
    torch.testing.assert_close(dist.entropy(), torch.stack(expected))


def mean_ratio(scored_with: float) -> float:
    """Mean of ``other(a) / scored(a)`` over draws with discount 0.5: 1 if the draws are scored as they were drawn."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(12, generator=random, dtype=torch.float64).expand(DRAWS, -1)
    mask = torch.ones_like(logits, dtype=torch.bool)
    action = KeepDistribution(logits, mask, 0.5).sample(random)
    other = KeepDistribution(logits + 0.1, mask, 0.5).token_log_prob(action).sum(1)
    return float((other - KeepDistribution(logits, mask, scored_with).token_log_prob(action).sum(1)).exp().mean())


def test_draws_are_scored_with_the_discount_they_were_drawn_with() -> None:
    assert mean_ratio(0.5) == pytest.approx(1, abs=0.01)
    assert abs(mean_ratio(1.0) - 1) > 0.5  # the discount in the draw and not in the score


def test_a_draw_that_drops_all_keeps_the_best_and_is_scored_as_such() -> None:
    logits = torch.tensor([[-30.0, -21, -25, 9], [-200, -190, -150, -151], [-40, -30, -30, -40]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()
    dist = KeepDistribution(logits, mask, 0.5)
    action = dist.sample(torch.Generator().manual_seed(0))
    assert action.int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]
    expected = [-21 + math.log(0.5), -150 + math.log(0.5), -30 + math.log(0.5)]
    torch.testing.assert_close(dist.token_log_prob(action).sum(1), torch.tensor(expected))
    nothing = dist.token_log_prob(torch.zeros_like(mask)).sum(1)
    assert (nothing > -1e-5).all()  # what would be stored if the action that was drawn, and not the one that acts, were


def test_draws_are_of_real_tokens_alone_and_repeat_with_the_seed() -> None:
    logits = torch.full((500, 8), 30.0)
    mask = torch.arange(8) < torch.arange(1, 9).repeat(63)[:500, None]
    dist = KeepDistribution(logits, mask, 0.3)
    first, again, other = (dist.sample(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert first.dtype == torch.bool
    assert not (first & ~mask).any()
    assert first.any(1).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.125])
def test_extreme_logits_stay_finite(discount: float) -> None:
    values = [-1e4, -200.0, -88.0, -17.0, 0.0, 17.0, 88.0, 200.0, 1e4]
    logits = torch.tensor([values], requires_grad=True)
    dist = KeepDistribution(logits, torch.ones(1, len(values), dtype=torch.bool), discount)
    kept, dropped = (dist.token_log_prob(torch.full((1, len(values)), flag)) for flag in (True, False))
    for token, x in enumerate(values):
        keep = math.log(discount) - (math.log1p(math.exp(-x)) if x > -700 else -x)
        assert kept[0, token].item() == pytest.approx(keep, rel=1e-4, abs=1e-6)
        if discount == 1:
            drop = -(math.log1p(math.exp(x)) if x < 700 else x)
        else:
            drop = math.log1p(-discount / (1 + math.exp(min(-x, 700))))
        assert dropped[0, token].item() == pytest.approx(drop, rel=1e-4, abs=1e-6)
    (kept.sum() + dropped.sum() + dist.entropy().sum()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert dist.entropy().isfinite().all()


def test_gradient_of_log_prob() -> None:
    logits = LOGITS.clone().requires_grad_()
    action = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]]).bool()
    KeepDistribution(logits, MASK, DISCOUNT).token_log_prob(action).sum(1).sum().backward()
    p, d = LOGITS.sigmoid(), DISCOUNT[:, None]
    expected = torch.where(action, 1 - p, -d * p * (1 - p) / (1 - d * p)) * MASK
    torch.testing.assert_close(logits.grad, expected)


def test_padding_changes_nothing() -> None:
    action = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]]).bool()
    dist = KeepDistribution(LOGITS, MASK, DISCOUNT)
    random = torch.Generator().manual_seed(0)
    more = torch.randn(2, 5, generator=random, dtype=torch.float64) * RUBBISH
    wide = KeepDistribution(
        torch.cat([LOGITS, more], 1), torch.cat([MASK, torch.zeros(2, 5, dtype=torch.bool)], 1), DISCOUNT
    )
    for fill in (False, True):
        wide_action = torch.cat([action, torch.full((2, 5), fill)], 1)
        torch.testing.assert_close(wide.token_log_prob(wide_action).sum(1), dist.token_log_prob(action).sum(1))
    torch.testing.assert_close(wide.entropy(), dist.entropy())
