"""The pruner's choices in ragged batches, and what its folder refuses."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file
from torch import Tensor

import tprl.pruner
from ragged import alone, visual_tokens
from tprl.checkpoint import DamagedCheckpoint
from tprl.config import PrunerConfig
from tprl.match import MATCHES, question_match
from tprl.policy import PolicyOutput
from tprl.pruner import CONFIG, WEIGHTS, TokenPruner
from tprl.types import VisualTokens

CONFIG_OF_TESTS = PrunerConfig(
    width=12, fingerprint="abc", latent=5, autoencoder_hidden=8, policy_hidden=8, policy_layers=1, policy_heads=2
)  # fmt: skip
COUNTS, ASKED = [9, 5, 1, 12], [3, 1, 2, 4]


def make_pruner(seed: int = 0, **settings: Any) -> TokenPruner:
    """A random pruner whose probabilities are far from equal."""
    random = torch.Generator().manual_seed(seed)
    pruner = TokenPruner(replace(CONFIG_OF_TESTS, **settings))
    with torch.no_grad():
        for name, weight in [*pruner.named_parameters(), ("bias", pruner.token_mean)]:
            noise = torch.randn(weight.shape, generator=random)
            vector = 0.3 * noise + (0 if name.endswith("bias") else 1)
            weight.copy_(noise * 2 / weight.shape[-1] ** 0.5 if weight.ndim > 1 else vector)
        pruner.token_scale.fill_(0.7)
    return pruner.eval()


def batch(seed: int = 0) -> VisualTokens:
    return visual_tokens(COUNTS, ASKED, 12, seed)


def with_logits(pruner: TokenPruner, logits: Tensor, monkeypatch: pytest.MonkeyPatch) -> TokenPruner:
    monkeypatch.setattr(pruner, "look", lambda *_: PolicyOutput(logits, torch.zeros(len(logits))))
    return pruner


# ---------------------------------------------------------------- choices


def test_tokens_are_centred_and_scaled() -> None:
    pruner, visual = make_pruner(), batch()
    tokens = visual.tokens
    torch.testing.assert_close(pruner.normalise(tokens), (tokens - pruner.token_mean) * 0.7)
    assert pruner.normalise(tokens.bfloat16()).dtype == torch.float32
    latents = pruner.autoencoder.encode(pruner.normalise(tokens))
    assert torch.equal(pruner.encode(visual), torch.cat([latents, question_match(visual)], 2))


def test_probabilities_of_a_row_are_what_they_are_alone() -> None:
    pruner, visual = make_pruner(), batch()
    probs = pruner.keep_probs(visual)
    assert probs.dtype == torch.float32
    assert (probs[~visual.mask] == 0).all()
    assert probs[visual.mask].max() - probs[visual.mask].min() > 0.2
    for row, count in enumerate(COUNTS):
        torch.testing.assert_close(probs[row, :count], pruner.keep_probs(alone(visual, row))[0])


@pytest.mark.parametrize("budget", [[1, 1, 1, 1], [4, 2, 1, 11], [9, 5, 1, 12], [8, 5, 1, 1]])
def test_the_most_probable_and_exactly_the_budget(budget: list[int]) -> None:
    pruner, visual = make_pruner(), batch()
    keep = pruner.select(visual, torch.tensor(budget)).keep_mask
    assert keep.dtype == torch.bool
    assert keep.sum(1).tolist() == budget
    assert not (keep & ~visual.mask).any()
    probs = pruner.keep_probs(visual)
    for row, count in enumerate(budget):
        ranked = sorted(range(COUNTS[row]), key=lambda i, row=row: -float(probs[row, i]))
        assert keep[row].nonzero()[:, 0].tolist() == sorted(ranked[:count])


def test_a_larger_budget_keeps_what_a_smaller_one_keeps() -> None:
    pruner, visual = make_pruner(), batch()
    held = torch.zeros_like(visual.mask)
    for count in range(1, 13):
        keep = pruner.select(visual, torch.tensor(COUNTS).clamp(max=count)).keep_mask
        assert not (held & ~keep).any()
        held = keep


def test_ties_and_probabilities_that_round_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are those of the logits: in float32 the sigmoid of 20 is that of 30. The first wins a tie."""
    visual = visual_tokens([5, 4], [1, 1], 12)
    logits = torch.tensor([[20.0, 30, 25, 30, -1], [-200, -150, -150, -300, 99]])
    pruner = with_logits(make_pruner(), logits, monkeypatch)
    assert logits.sigmoid()[0, :4].unique().numel() == 1
    keep = [pruner.select(visual, torch.tensor([count, count])).keep_mask.int().tolist() for count in (1, 2, 3)]
    assert keep == [
        [[0, 1, 0, 0, 0], [0, 1, 0, 0, 0]],
        [[0, 1, 0, 1, 0], [0, 1, 1, 0, 0]],
        [[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]],
    ]
    assert pruner.select_above(visual, 1.0).keep_mask.int().tolist() == keep[0]


@pytest.mark.parametrize("budget", [[0, 1, 1, 1], [10, 5, 1, 12], [1, 1, 2, 1], [-1, 1, 1, 1], [1], [[1, 1, 1, 1]]])
def test_budgets_out_of_range(budget: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"\[9, 5, 1, 12\], got"):
        make_pruner().select(batch(), torch.tensor(budget))


def test_above_a_threshold() -> None:
    pruner, visual = make_pruner(), batch()
    probs = pruner.keep_probs(visual)
    for threshold in [0.0, 0.3, 0.5, 0.7, float(probs[0, 2]), 1.0]:
        keep = pruner.select_above(visual, threshold).keep_mask
        for row, count in enumerate(COUNTS):
            above = [i for i in range(count) if float(probs[row, i]) > threshold]
            assert keep[row].nonzero()[:, 0].tolist() == (above or [int(probs[row, :count].argmax())])


def test_the_ends_of_the_threshold() -> None:
    pruner, visual = make_pruner(), batch()
    assert torch.equal(pruner.select_above(visual, 0).keep_mask, visual.mask)
    best = pruner.select(visual, torch.ones(4, dtype=torch.int64)).keep_mask
    assert torch.equal(pruner.select_above(visual, 1).keep_mask, best)


def test_the_calibrated_threshold_unless_one_is_given() -> None:
    visual = batch()
    low, high = make_pruner(threshold=0.4), make_pruner(threshold=0.6)
    assert torch.equal(low.select_above(visual).keep_mask, high.select_above(visual, 0.4).keep_mask)
    assert not torch.equal(low.select_above(visual).keep_mask, high.select_above(visual).keep_mask)
    assert torch.equal(low.select_above(visual, 0.0).keep_mask, visual.mask)  # 0 is a threshold, not "none given"


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan, math.inf])
def test_thresholds_out_of_range(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\], got"):
        make_pruner().select_above(batch(), threshold)


def test_tokens_of_another_width() -> None:
    visual = visual_tokens([4], [2], 16)
    for choose in (lambda p: p.select(visual, torch.tensor([2])), lambda p: p.select_above(visual, 0.5)):
        with pytest.raises(ValueError, match="of width 12, got tokens of width 16"):
            choose(make_pruner())


def test_half_precision() -> None:
    pruner, visual = make_pruner(), batch()
    half = replace(visual, tokens=visual.tokens.bfloat16(), query=visual.query.bfloat16())
    torch.testing.assert_close(pruner.keep_probs(half), pruner.keep_probs(visual), atol=0.05, rtol=0)
    assert pruner.keep_probs(half).dtype == torch.float32


def test_a_choice_holds_no_gradients() -> None:
    pruner = make_pruner()
    assert all(weight.requires_grad for weight in pruner.parameters())
    assert not pruner.keep_probs(batch()).requires_grad


def test_the_question_counts_unless_it_is_hidden() -> None:
    """Hidden, not even its length shows."""
    visual = batch()
    others = [
        replace(visual, query=torch.randn_like(visual.query)),
        visual_tokens(COUNTS, [1, 6, 5, 2], 12),
    ]
    seeing, blind = make_pruner(), make_pruner(use_question=False)
    others[1] = replace(visual, query=others[1].query, query_mask=others[1].query_mask)
    for other in others:
        assert (seeing.keep_probs(other) - seeing.keep_probs(visual)).abs().max() > 1e-3
        assert torch.equal(blind.keep_probs(other), blind.keep_probs(visual))
    assert blind.keep_probs(visual).isfinite().all()
    assert blind.keep_probs(visual)[visual.mask].unique().numel() > 1


# ---------------------------------------------------------------- its folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_pruner().save_pretrained(tmp_path / "pruner")
    return tmp_path / "pruner"


def test_round_trip(folder: Path) -> None:
    loaded, visual = TokenPruner.from_pretrained(folder, fingerprint="abc"), batch()
    assert loaded.config == CONFIG_OF_TESTS
    assert not loaded.training
    assert torch.equal(loaded.keep_probs(visual), make_pruner().keep_probs(visual))
    assert not torch.equal(make_pruner(seed=1).keep_probs(visual), make_pruner().keep_probs(visual))
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, CONFIG])


def test_saving_again_replaces(folder: Path) -> None:
    make_pruner(seed=1, latent=6, threshold=0.25).save_pretrained(str(folder))
    loaded = TokenPruner.from_pretrained(str(folder))
    assert (loaded.config.latent, loaded.config.threshold) == (6, 0.25)
    assert torch.equal(loaded.keep_probs(batch()), make_pruner(seed=1, latent=6).keep_probs(batch()))


def test_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"for another model \(width 12, fingerprint abc\) than this one \(xyz\)"):
        TokenPruner.from_pretrained(folder, fingerprint="xyz")
    assert TokenPruner.from_pretrained(folder).config.fingerprint == "abc"


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"holds no pruner: {name} is missing"):
        TokenPruner.from_pretrained(folder)


@pytest.mark.parametrize("name", ["none", "/none/such", "a/b/c", "./none", "some/one"])
def test_no_such_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **_: Any) -> str:
        validate_repo_id(name)
        raise ConnectionError("no way there")

    monkeypatch.setattr(tprl.pruner, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=rf"there is no folder {name.removeprefix('./')}\b"):
        TokenPruner.from_pretrained(name)


def test_a_name_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, sorted(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(tprl.pruner, "snapshot_download", download)
    assert TokenPruner.from_pretrained("someone/pruner").config == CONFIG_OF_TESTS
    assert asked == [("someone/pruner", sorted([WEIGHTS, CONFIG]))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"dropout": 0.1}, r"unknown settings \['dropout'\], missing settings \[\]"),
        (
            lambda s: {k: v for k, v in s.items() if k != "latent"},
            r"unknown settings \[\], missing settings \['latent'\]",
        ),
        (lambda s: [s], "has to hold a JSON object"),
        (lambda s: s | {"latent": "8"}, "pruner.json holds a setting of another type: '<=' not supported between"),
        (lambda s: s | {"latent": 6}, "does not fit its settings"),
        (lambda s: s | {"width": 13}, "does not fit its settings"),
        (lambda s: s | {"policy_layers": 2}, "does not fit its settings"),
    ],
)
def test_settings_that_do_not_fit(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(change(settings)))
    with pytest.raises(ValueError, match=message):
        TokenPruner.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"more": torch.ones(1)}, r"\['more'\]"),
        (lambda w: {k: v for k, v in w.items() if k != "token_mean"}, r"\['token_mean'\]"),
        (lambda w: w | {"token_mean": torch.ones(1)}, r"\['token_mean'\]"),
    ],
)
def test_weights_that_do_not_fit(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} does not fit its settings: {message}"):
        TokenPruner.from_pretrained(folder)


@pytest.mark.parametrize(("name", "share"), [*product([WEIGHTS, CONFIG], [0, 0.5, 0.99])])
def test_a_truncated_file(folder: Path, name: str, share: float) -> None:
    whole = (folder / name).read_bytes().rstrip()
    (folder / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DamagedCheckpoint, match=name):
        TokenPruner.from_pretrained(folder)


def test_settings_that_are_no_text(folder: Path) -> None:
    (folder / CONFIG).write_bytes(b"{\xff\xfe}")
    with pytest.raises(DamagedCheckpoint, match=CONFIG):
        TokenPruner.from_pretrained(folder)


def test_a_full_disk_leaves_nothing_half_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither over an old pruner nor in a new folder."""

    def full(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    shutil.copytree(folder, tmp_path / "before")
    monkeypatch.setattr("tprl.checkpoint.save_file", full)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match=f"could not save .*{WEIGHTS}: .*No space left"):
            make_pruner(seed=1, latent=6).save_pretrained(target)
    monkeypatch.undo()
    assert list((tmp_path / "new").iterdir()) == []
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, CONFIG])
    for name in (WEIGHTS, CONFIG):
        assert (folder / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    assert torch.equal(TokenPruner.from_pretrained(folder).keep_probs(batch()), make_pruner().keep_probs(batch()))


def test_settings_that_no_longer_fit_on_the_disk_leave_the_old_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        path.write_bytes(text.encode()[:9])
        raise OSError(28, "No space left on device")

    before = (folder / CONFIG).read_bytes()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        make_pruner(threshold=0.25).save_pretrained(folder)
    assert (folder / CONFIG).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, CONFIG])


def test_uploading_is_saving_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Hub:
        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
            assert (repository, private, exist_ok) == ("someone/pruner", True, True)

        def upload_folder(self, repo_id: str, folder_path: str) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"hub/{repo_id}"

    monkeypatch.setattr(tprl.pruner, "HfApi", Hub)
    assert make_pruner().push_to_hub("someone/pruner", private=True) == "hub/someone/pruner"
    loaded = TokenPruner.from_pretrained(tmp_path / "someone" / "pruner")
    assert torch.equal(loaded.keep_probs(batch()), make_pruner().keep_probs(batch()))


# ---------------------------------------------------------------- a look at states in which tokens are missing


def states() -> Tensor:
    """Two states of the first picture, one of each other."""
    held = torch.zeros(5, 12, dtype=torch.bool)
    for row, tokens in enumerate([[1, 4, 5, 8], [0, 2], [0, 1, 2, 3, 4], [0], [2, 3, 7, 11, 6, 9]]):
        held[row, tokens] = True
    return held


ROWS = torch.tensor([0, 0, 1, 2, 3])


@pytest.mark.parametrize("settings", [{}, {"use_question": False}, {"use_autoencoder": False}])
def test_a_look_at_a_state_is_a_look_at_what_it_holds(settings: dict[str, Any]) -> None:
    pruner, visual, held = make_pruner(**settings), batch(), states()
    latents = pruner.encode(visual)
    output = pruner.look(latents, visual, held, ROWS)
    assert output.logits.shape == held.shape
    assert (output.logits[~held] == 0).all()
    for row, picture in enumerate(ROWS.tolist()):
        left = alone(replace(visual, mask=held[row].expand(4, -1)), picture)
        expected = pruner.look(latents[picture, held[row]][None], left, left.mask)
        torch.testing.assert_close(output.logits[row, held[row]], expected.logits[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.state_value[row], expected.state_value[0], rtol=1e-4, atol=1e-5)


def test_without_rows_there_is_a_state_a_picture() -> None:
    pruner, visual = make_pruner(), batch()
    held, latents = states()[1:], pruner.encode(visual)
    found = pruner.look(latents, visual, held)
    expected = pruner.look(latents, visual, held, torch.arange(4))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    other = pruner.look(latents, visual, held, torch.tensor([3, 1, 2, 3]))
    assert not torch.allclose(other.state_value[0], found.state_value[0], atol=1e-3)


def test_a_token_that_is_gone_is_gone() -> None:
    """Neither its values nor its place reach the others, nor does a gradient reach it."""
    pruner, visual = make_pruner(), batch()
    latents = pruner.encode(visual).detach().requires_grad_()
    before = pruner.look(latents, visual, states(), ROWS)
    before.logits[states()].sum().backward(retain_graph=True)
    before.state_value.sum().backward()
    touched = torch.zeros(4, 12, dtype=torch.bool)
    for row, picture in enumerate(ROWS.tolist()):
        touched[picture] |= states()[row]
    assert latents.grad is not None
    assert torch.equal(latents.grad.abs().sum(-1) > 0, touched)
    visual.coords[~touched] = 0.123
    after = pruner.look(torch.where(touched[..., None], latents, 1e4), visual, states(), ROWS)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_without_the_autoencoder_the_policy_reads_the_tokens() -> None:
    pruner, visual = make_pruner(use_autoencoder=False), batch()
    assert torch.equal(pruner.encode(visual)[..., :12], pruner.normalise(visual.tokens))
    assert pruner.policy.token_in.in_features == 12 + MATCHES


def test_without_the_question_nothing_matches_it() -> None:
    assert not make_pruner(use_question=False).encode(batch())[..., -MATCHES:].any()
