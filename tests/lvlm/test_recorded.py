"""Methods inside the language model as demonstrators: what they keep is what they would keep while answering."""

import pytest
import torch
from torch import Tensor

from evaluate.world import World, tiny_lvlm
from tprl.demonstrations import nested_masks
from tprl.lvlm.cache import EncodedSamples
from tprl.lvlm.in_model import dropping
from tprl.lvlm.recorded import Recorded
from tprl.selectors import IN_MODEL
from tprl.selectors.stages import InModel


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EncodedSamples:
    return EncodedSamples(tiny_lvlm(), World(), tmp_path_factory.mktemp("cache"))


def alone(data: EncodedSamples, method: InModel, index: int, held: Tensor, budget: int) -> Tensor:
    """Of one sample and its held tokens, by a prompt without the answer, put together here."""
    decoder, before = data.lvlm.model.get_decoder(), data.lvlm.prompts.ids("?")[0][:-1]
    tokens, block = data.features(data.samples[index].image_id).tokens, data.block(index)
    places = held.nonzero()[:, 0]
    ids = torch.tensor([before + [0] * len(places) + block.ids[: block.answer_start]])
    embeds = decoder.get_input_embeddings()(ids)
    picture = slice(len(before), len(before) + len(places))
    embeds[0, picture] = tokens[places]
    behind = torch.arange(ids.shape[1] - picture.stop) + len(before) + len(held)
    positions = torch.cat([torch.arange(len(before)), len(before) + places, behind])[None]
    visual = torch.zeros_like(ids, dtype=torch.bool)
    visual[0, picture] = True
    last, budgets = torch.tensor([ids.shape[1] - 1]), torch.tensor([budget])
    causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with torch.no_grad(), dropping(decoder, method, visual=visual, last=last, budgets=budgets) as dropped:
        decoder(inputs_embeds=embeds, position_ids=positions, attention_mask=causal, use_cache=False)
    kept = torch.zeros_like(held)
    kept[places] = dropped.kept[-1][0, picture]
    return kept


@pytest.mark.parametrize("name", IN_MODEL)
def test_each_step_is_what_each_sample_alone_would_keep(data: EncodedSamples, name: str) -> None:
    indices = [13, 0, 7, 22, 5, 1, 2, 3, 10, 11]  # more than go through the model at once
    visual = data.visual(indices)
    masks = nested_masks(Recorded(IN_MODEL[name](), data, indices), visual, [9, 4, 1])
    assert masks.sum(-1).tolist() == [[9] * 10, [4] * 10, [1] * 10]
    held = visual.mask
    for budget, mask in zip([9, 4, 1], masks, strict=True):
        for row, index in enumerate(indices):
            assert torch.equal(mask[row], alone(data, IN_MODEL[name](), index, held[row], budget))
        assert len({tuple(row.tolist()) for row in mask}) > 1
        held = mask
