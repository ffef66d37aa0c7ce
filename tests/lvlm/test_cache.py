"""Cached pictures, and how right the model's answers are."""

import copy
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

import tprl
from evaluate.world import World, tiny_lvlm
from tprl.data.sample import Source
from tprl.evaluate.latency import prompt_inputs
from tprl.lvlm import shards
from tprl.lvlm.cache import EncodedSamples, weights_digest
from tprl.lvlm.model import Lvlm
from tprl.lvlm.score import AnswerScores, Within
from tprl.scoring import score
from tprl.selectors.in_model import FastV


@pytest.fixture(scope="module")
def lvlm() -> Lvlm:
    return tiny_lvlm()


@pytest.fixture(scope="module")
def encoded(lvlm: Lvlm, tmp_path_factory: pytest.TempPathFactory) -> EncodedSamples:
    return EncodedSamples(lvlm, World(), tmp_path_factory.mktemp("cache"), frozenset({"cls_attention"}))


def generated(lvlm: Lvlm, source: Source, index: int) -> str:
    """The greedy answer to one sample, by the model's own ``generate``."""
    inputs = prompt_inputs(lvlm, source, source.samples[index])
    end = lvlm.processor.tokenizer.convert_tokens_to_ids("[end]")
    output = lvlm.model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=end)
    return lvlm.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_what_comes_from_disk_is_what_the_model_computes(lvlm: Lvlm, encoded: EncodedSamples) -> None:
    world = encoded.source
    visual = encoded.visual(range(24))
    direct = lvlm.encode_images([world.image(str(i)) for i in range(6)], frozenset({"cls_attention"}))
    for index in range(24):
        torch.testing.assert_close(visual.tokens[index], direct[index // 4].tokens)
        torch.testing.assert_close(visual.signals["cls_attention"][index], direct[index // 4].signals["cls_attention"])
    assert visual.mask.shape == (24, 16)
    assert visual.query_mask.sum(1).tolist() == [4, 5, 3, 3] * 6


def test_unpruned_accuracy_is_that_of_generate(lvlm: Lvlm, encoded: EncodedSamples) -> None:
    world = encoded.source
    wanted = [score(world.samples[i], generated(lvlm, world, i)) for i in range(24)]
    assert 0 < sum(wanted) < 24
    visual = encoded.visual(range(24))
    assert encoded.accuracy(range(24), visual.tokens, visual.mask).tolist() == pytest.approx(wanted)
    assert encoded.accuracy_unpruned.tolist() == pytest.approx(wanted)
    visual, indices, pictures = encoded.by_picture(encoded.image_ids)
    scores = encoded.score(indices, visual.tokens, visual.mask[pictures], pictures=pictures)
    torch.testing.assert_close(encoded.unpruned.log_prob, scores.log_prob)
    assert torch.equal(encoded.unpruned.correct, scores.correct)


def test_samples_that_look_at_the_same_tokens_share_a_row(
    encoded: EncodedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    indices, keep = [5, 0, 1, 4, 2, 6], torch.rand(6, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[3], keep[1] = keep[0], keep[2]  # 5 and 4 see the same of picture 1, 0 and 1 of picture 0
    keep[4] = keep[0]  # of another picture
    firsts = [encoded.questions[image_id][0] for image_id in encoded.image_ids[:2]]
    tokens, pictures = encoded.visual(firsts).tokens, torch.tensor([1, 0, 0, 1, 0, 1])
    alone = [
        encoded.score([i], tokens[p][None], mask[None]) for i, p, mask in zip(indices, pictures, keep, strict=True)
    ]
    read: list[int] = []
    score_rows = encoded.scorer.score

    def counting(*given: Any, **named: Any) -> AnswerScores:
        read.append(len(given[2]))
        return score_rows(*given, **named)

    monkeypatch.setattr(encoded.scorer, "score", counting)
    together = encoded.score(indices, tokens, keep, pictures=pictures)
    assert read == [4]
    encoded.score(indices, tokens, keep, Within(FastV(), 2), pictures)
    assert read == [4, 6]  # each question is pruned for by itself
    torch.testing.assert_close(together.log_prob, torch.cat([one.log_prob for one in alone]))
    assert together.correct.tolist() == [bool(one.correct) for one in alone]
    assert len(set(together.log_prob.tolist())) == 6


def test_questions_about_one_picture_share_a_row(encoded: EncodedSamples) -> None:
    every = encoded.visual(range(24))
    keep = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    visual, indices, pictures = encoded.by_picture(encoded.image_ids[::-1])
    assert indices == [index for first in range(20, -1, -4) for index in range(first, first + 4)]
    shared = encoded.accuracy(indices, visual.tokens, keep.flip(0)[pictures], pictures=pictures)
    alone = encoded.accuracy(range(24), every.tokens, keep.repeat_interleave(4, 0))
    torch.testing.assert_close(shared, alone[indices])
    assert encoded.answers(indices, every.tokens[indices], every.mask[indices]) == [
        encoded.answers([i], every.tokens[[i]], every.mask[[i]])[0] for i in indices
    ]


def test_a_second_cache_reads_what_the_first_wrote(lvlm: Lvlm, encoded: EncodedSamples) -> None:
    lvlm_without_tower = Lvlm(lvlm.model, lvlm.processor)
    lvlm_without_tower.encode_images = None  # type: ignore[method-assign,assignment]
    again = EncodedSamples(lvlm_without_tower, encoded.source, encoded.folder.parent, encoded.signals)
    assert again.folder == encoded.folder
    torch.testing.assert_close(again.features("3").tokens, encoded.features("3").tokens)


def test_shards_are_closed_once_full_and_an_interrupted_build_goes_on(
    lvlm: Lvlm, encoded: EncodedSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty pictures in batches of four, and a shard is full after five: each holds eight."""
    monkeypatch.setattr(shards, "ENCODE_BATCH", 4)
    monkeypatch.setattr(shards, "SHARD_BYTES", 5 * (16 * 16 * 4 + 16 * 2 * 4))
    whole = EncodedSamples(lvlm, World(20), tmp_path / "whole")
    names = [f"tokens-{number:05d}.safetensors" for number in range(3)]
    assert sorted(path.name for path in whole.folder.iterdir()) == names
    counting = Lvlm(lvlm.model, lvlm.processor)
    batches: list[int] = []
    monkeypatch.setattr(
        counting, "encode_images", lambda images, signals: (batches.append(len(images)), lvlm.encode_images(images))[1]
    )
    (whole.folder / names[1]).unlink()
    again = EncodedSamples(counting, World(20), tmp_path / "whole")
    assert batches == [4, 4]
    for image_id in whole.image_ids:
        torch.testing.assert_close(again.features(image_id).tokens, whole.features(image_id).tokens)
        direct = lvlm.encode_images([again.source.image(image_id)])[0]
        torch.testing.assert_close(again.features(image_id).tokens, direct.tokens)


def test_another_version_of_a_picture_makes_another_cache(lvlm: Lvlm, encoded: EncodedSamples, tmp_path: Path) -> None:
    class Changed(World):
        def version(self, image_id: str) -> str:
            return "2" if image_id == "5" else ""

    other = EncodedSamples(lvlm, Changed(), encoded.folder.parent, encoded.signals)
    assert other.folder != encoded.folder
    assert EncodedSamples(lvlm, World(), encoded.folder.parent, encoded.signals).folder == encoded.folder


def test_other_signals_or_another_split_make_another_cache(lvlm: Lvlm, encoded: EncodedSamples) -> None:
    class Train(World):
        split = "train"

    assert EncodedSamples(lvlm, World(), encoded.folder.parent).folder != encoded.folder
    assert EncodedSamples(lvlm, Train(), encoded.folder.parent, encoded.signals).folder != encoded.folder


def test_what_every_token_gives_is_computed_once(
    lvlm: Lvlm, encoded: EncodedSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, accuracy = encoded.unpruned, encoded.accuracy_unpruned
    again = EncodedSamples(lvlm, encoded.source, encoded.folder.parent, encoded.signals)
    for name in ("score", "accuracy"):
        monkeypatch.setattr(again, name, None)
    assert torch.equal(again.unpruned.log_prob, scores.log_prob)
    assert torch.equal(again.unpruned.correct, scores.correct)
    assert again.unpruned.correct.dtype == torch.bool
    assert torch.equal(again.accuracy_unpruned, accuracy)
    others = World()
    others.samples = [replace(sample, answers=("two",), box=None) for sample in others.samples]
    asked = EncodedSamples(lvlm, others, encoded.folder.parent, encoded.signals)
    assert asked.folder == encoded.folder
    assert not torch.equal(asked.unpruned.log_prob, scores.log_prob)
    assert not torch.equal(asked.accuracy_unpruned, accuracy)


def test_another_template_makes_other_unpruned_scores(lvlm: Lvlm, tmp_path: Path) -> None:
    before = EncodedSamples(lvlm, World(), tmp_path)
    _ = before.unpruned
    template, lvlm.processor.chat_template = (
        lvlm.processor.chat_template,
        lvlm.processor.chat_template.replace("[end]", "now"),
    )
    try:
        after = EncodedSamples(lvlm, World(), tmp_path)
        _ = after.unpruned
    finally:
        lvlm.processor.chat_template = template
    assert after.folder == before.folder
    assert len(list(after.folder.glob("scores-*"))) == 2


def test_a_question_that_shows_a_picture_is_refused_before_any_is_encoded(lvlm: Lvlm, tmp_path: Path) -> None:
    world = World(1)
    world.samples = [*world.samples[:-1], replace(world.samples[-1], question="<image> what is it ?")]
    with pytest.raises(
        ValueError, match=r"the question '<image> what is it \?' contains '<image>', which is a picture"
    ):
        EncodedSamples(lvlm, world, tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_version_of_the_package_scores_anew(
    lvlm: Lvlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1", "2", "2"):
        monkeypatch.setattr(tprl, "__version__", version)
        encoded = EncodedSamples(lvlm, World(1), tmp_path)
        _ = encoded.unpruned
    assert len(list(encoded.folder.glob("scores-*"))) == 2


def test_another_processor_makes_another_cache(lvlm: Lvlm, encoded: EncodedSamples) -> None:
    images = lvlm.processor.image_processor
    mean, images.image_mean = images.image_mean, [0.0, 0.0, 0.0]
    try:
        other = EncodedSamples(lvlm, encoded.source, encoded.folder.parent, encoded.signals)
    finally:
        images.image_mean = mean
    assert other.folder != encoded.folder


@pytest.mark.parametrize(
    ("holder", "settings"),
    [
        ("model.config", {"vision_feature_layer": -2}),
        ("processor", {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}),  # as many tokens
    ],
)
def test_other_tokens_of_the_same_weights_make_another_cache(
    lvlm: Lvlm, encoded: EncodedSamples, monkeypatch: pytest.MonkeyPatch, holder: str, settings: dict[str, Any]
) -> None:
    for name, value in settings.items():
        monkeypatch.setattr(attrgetter(holder)(lvlm), name, value)
    other = EncodedSamples(lvlm, encoded.source, encoded.folder.parent, encoded.signals)
    assert other.folder != encoded.folder


def test_other_weights_or_another_dtype_make_another_cache(lvlm: Lvlm, encoded: EncodedSamples) -> None:
    def folder() -> Path:
        return EncodedSamples(lvlm, encoded.source, encoded.folder.parent, encoded.signals).folder

    with torch.no_grad():
        weight = next(lvlm.model.parameters()).view(-1)[:1]
        before = weight.clone()
        weight += 1
        changed = folder()
        weight.copy_(before)
    assert changed != encoded.folder
    assert folder() == encoded.folder
    halved = Lvlm(copy.deepcopy(lvlm.model).bfloat16().float(), lvlm.processor)
    rounded = EncodedSamples(halved, encoded.source, encoded.folder.parent, encoded.signals).folder
    halved.model.bfloat16()
    assert EncodedSamples(halved, encoded.source, encoded.folder.parent, encoded.signals).folder != rounded


def test_a_digest_sees_other_weights_of_the_same_sum(lvlm: Lvlm) -> None:
    other, digests = Lvlm(copy.deepcopy(lvlm.model)), set()
    for two in ([0.5, 0.25], [1.5, -0.75], [-0.5, 0.25]):
        with torch.no_grad():
            next(other.model.parameters()).view(-1)[:2] = torch.tensor(two)
        digests.add(weights_digest(other))
    assert len(digests) == 3


def test_an_answer_in_other_letters_is_right_too(lvlm: Lvlm, encoded: EncodedSamples) -> None:
    class Loud(World):
        def __init__(self) -> None:
            super().__init__()
            self.samples = [
                replace(s, answers=(s.answers[0].upper() + "!",)) if s.box is None and len(s.answers) == 1 else s
                for s in self.samples
            ]

    loud = EncodedSamples(lvlm, Loud(), encoded.folder.parent, encoded.signals)
    visual = encoded.visual(range(24))
    keep = visual.mask & (torch.arange(16) % 3 > 0)
    wanted = encoded.accuracy(range(24), visual.tokens, keep)
    one = torch.tensor([s.box is None and len(s.answers) == 1 for s in encoded.samples])
    assert 0 < wanted[one].sum() < one.sum()
    assert not loud.score(range(24), visual.tokens, keep).correct[one].any()  # a pass alone does not tell
    assert torch.equal(loud.accuracy(range(24), visual.tokens, keep), wanted)
