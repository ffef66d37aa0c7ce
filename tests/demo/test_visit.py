"""What a visitor gets: columns, steps and refusals, checked against the model and the policy asked directly."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluate.world import QUESTIONS, World, tiny_lvlm
from tprl.config import PrunerConfig
from tprl.demo.render import LOOKS, render
from tprl.demo.steps import Stepwise
from tprl.demo.visit import MAX_QUESTION, SIDE, STEPS, Amount, Visit, read_upload
from tprl.evaluate.answers import greedy_answer
from tprl.evaluate.latency import question_inputs
from tprl.lvlm.model import Lvlm
from tprl.pruner import TokenPruner
from tprl.types import VisualTokens

QUESTION = QUESTIONS[1]


@pytest.fixture(scope="module")
def lvlm() -> Lvlm:
    return tiny_lvlm()


@pytest.fixture(scope="module")
def pruner(lvlm: Lvlm) -> TokenPruner:
    torch.manual_seed(3)
    return TokenPruner(PrunerConfig(8, 8, 16, 1, 2, width=lvlm.width, fingerprint=lvlm.fingerprint)).eval()


@pytest.fixture
def visit(lvlm: Lvlm, pruner: TokenPruner) -> Visit:
    return Visit(lvlm, pruner, World().image("0"))


def seen(visit: Visit) -> VisualTokens:
    return visit.lvlm.visual_tokens(visit.lvlm.encode_images([visit.image]), [QUESTION])


def test_columns_are_the_whole_model_the_policy_and_a_peer(visit: Visit, pruner: TokenPruner) -> None:
    whole, own, peer = visit.compare(QUESTION, Amount("budget", 5, 0.5, STEPS), "divprune")
    assert [column.name for column in (whole, own, peer)] == ["", "tprl", "divprune"]
    assert whole.answered is not None
    assert own.answered is not None
    assert peer.answered is not None
    assert whole.answered.kept.tolist() == list(range(16))
    assert whole.answered.text == greedy_answer(visit.lvlm, question_inputs(visit.lvlm, visit.image, QUESTION))
    kept = pruner.select(seen(visit), torch.tensor([5])).keep_mask[0].nonzero()[:, 0]
    assert own.answered.kept.tolist() == kept.tolist()
    assert len(peer.answered.kept) == 5
    assert peer.answered.kept.tolist() != kept.tolist()
    for pruned in (own.answered, peer.answered):
        assert pruned.visual_tokens == 5
        assert pruned.kv_cache_mib < whole.answered.kv_cache_mib
    assert own.answered.flops > peer.answered.flops  # what chooses counts, and a policy costs more than DivPrune


def test_a_threshold_keeps_what_is_more_probable_and_the_peer_as_many(visit: Visit) -> None:
    probs = visit.keep_probs(QUESTION)
    threshold = float(probs.sort().values[8:10].mean())
    _, own, peer = visit.compare(QUESTION, Amount("threshold", 1, threshold, 0), "fastv")
    assert own.answered is not None
    assert peer.answered is not None
    assert own.answered.kept.tolist() == (probs > threshold).nonzero()[:, 0].tolist()
    assert len(own.answered.kept) == len(peer.answered.kept) == 7
    assert 7 < peer.answered.visual_tokens < 16  # its first layers see everything


def test_the_peer_alone_where_there_is_no_policy(lvlm: Lvlm) -> None:
    visit = Visit(lvlm, None, World().image("1"))
    columns = visit.compare(QUESTION, Amount("budget", 99, 0.5, STEPS), "uniform")
    assert [column.name for column in columns] == ["", "uniform"]
    assert columns[1].answered is not None
    assert len(columns[1].answered.kept) == 16
    assert "Where the policy looks" not in render(visit, columns)


def test_steps_hold_ever_fewer_of_what_the_one_before_held(visit: Visit, pruner: TokenPruner) -> None:
    visual, budget = seen(visit), torch.tensor([2])
    latents = pruner.encode(visual)
    states = [Stepwise(pruner, 3, stop).select(visual, budget).keep_mask[0] for stop in range(4)]
    assert [int(state.sum()) for state in states] == [16, 8, 4, 2]
    for before, after in pairwise(states):
        assert not (after & ~before).any()
        held = VisualTokens(
            visual.tokens[:, before], visual.mask[:, before], visual.coords[:, before], visual.query, visual.query_mask
        )
        # The policy shown nothing but what is held; how a token matches the question is told within its whole picture.
        logits = pruner.chosen_by(latents[:, before], held, held.mask)[0]
        chosen = logits.topk(int(after.sum())).indices
        assert sorted(before.nonzero()[chosen, 0].tolist()) == after.nonzero()[:, 0].tolist()


def test_one_step_is_the_one_look_of_inference(visit: Visit, pruner: TokenPruner) -> None:
    visual, budget = seen(visit), torch.tensor([6])
    assert torch.equal(Stepwise(pruner, 1, 1).select(visual, budget).keep_mask, pruner.select(visual, budget).keep_mask)
    _, own, _ = visit.compare(QUESTION, Amount("steps", 2, 0.5, 1), "random")
    assert own.answered is not None
    assert len(own.answered.kept) == 8


def test_the_page_shows_the_latest_questions_and_escapes_them(visit: Visit) -> None:
    for question in (*QUESTIONS, "is it <b> ?", QUESTIONS[0]):
        page = render(visit, visit.compare(question, Amount("budget", 4, 0.5, STEPS), "uniform"))
    assert visit.questions == [QUESTIONS[0], "is it <b> ?", *QUESTIONS[:0:-1]]
    assert page.count("<figcaption>") == LOOKS
    assert f"<figcaption>{QUESTIONS[0]}</figcaption>" in page
    assert QUESTIONS[1] not in page
    assert "is it &lt;b&gt; ?" in page
    assert "<b>" not in page
    assert page.count("<article") == 3
    assert "http" not in page


@pytest.mark.parametrize(("question", "word"), [(" ", "empty"), ("x" * (MAX_QUESTION + 1), "301")])
def test_questions_that_are_not_allowed(visit: Visit, question: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        visit.compare(question, Amount("budget", 4, 0.5, STEPS), "uniform")
    assert visit.questions == []


def test_uploads_are_bounded_and_broken_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGBA", (3000, 1000), "red").save(path)
    image = read_upload(path)
    assert (image.mode, image.size) == ("RGB", (SIDE, 341))
    whole = path.read_bytes()
    for content in (b"", b"no picture", whole[: len(whole) // 2]):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"^bad\.png cannot be read as a picture"):
            read_upload(tmp_path / "bad.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "kind.png", "TIFF")
    with pytest.raises(ValueError, match="JPEG, PNG or WebP"):
        read_upload(tmp_path / "kind.png")
    Image.new("1", (6000, 5000)).save(tmp_path / "many.png")
    with pytest.raises(ValueError, match=r"6000 x 5000 pixels; at most 25 million"):
        read_upload(tmp_path / "many.png")
    monkeypatch.setattr("tprl.demo.visit.MAX_BYTES", len(whole) - 1)
    with pytest.raises(ValueError, match="too large"):
        read_upload(path)
