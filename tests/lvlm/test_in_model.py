"""Pruning inside a decoder against the untouched decoder.

The reference is the untouched decoder whose layers from the cut on are given a mask, built here, that hides the dropped
tokens; what is dropped is chosen here from the attention that the eager decoder returns.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, DynamicCache, Gemma2Config, LlamaConfig, LlamaModel, StaticCache

from tprl.lvlm.in_model import dropping, resumed
from tprl.lvlm.layer_view import LayerView as DecoderView
from tprl.lvlm.packing import Block, make_prefix, pack
from tprl.selectors.in_model import Dart, FastV, PyramidDrop, SparseVLM
from tprl.selectors.stages import LayerView
from tprl.types import Selection

FAR, LAYERS = 1e-2, 4


def decoder(attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> LlamaModel:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, attn_implementation=attention,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with torch.no_grad():
        yield


class Batch:
    """Three rows of text, visual tokens and text; the second is padded in front, the third behind."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        random = torch.Generator().manual_seed(1)
        self.embeds = torch.randn(3, 16, 32, generator=random).to(dtype)
        self.real, self.visual = torch.ones(3, 16).bool(), torch.zeros(3, 16).bool()
        self.real[1, :3], self.real[2, 12:] = False, False
        for row, (start, stop) in enumerate([(2, 10), (4, 9), (3, 9)]):
            self.visual[row, start:stop] = True
        self.last = torch.tensor([15, 15, 11])
        self.positions = (self.real.cumsum(1) - 1).clamp(min=0)
        causal = torch.ones(16, 16).tril().bool()
        self.mask = ((causal & self.real[:, None]) | torch.eye(16).bool())[:, None]

    def inputs(self, mask: Tensor | None = None) -> dict[str, Any]:
        mask = self.mask if mask is None else mask
        return {"inputs_embeds": self.embeds, "position_ids": self.positions, "attention_mask": mask}


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def chosen(model: LlamaModel, batch: Batch, layer: int, budgets: list[int]) -> Tensor:
    """The visual tokens that the last prompt token attends to most, by the eager decoder's own attention."""
    eager = decoder("eager", batch.embeds.dtype)
    eager.load_state_dict(model.state_dict())
    outputs = eager(**batch.inputs(additive(batch.mask, batch.embeds.dtype)), output_attentions=True)
    keep = torch.zeros_like(batch.visual)
    for row, (last, budget) in enumerate(zip(batch.last.tolist(), budgets, strict=True)):
        scores = outputs.attentions[layer - 1][row, :, last].mean(0)
        places = batch.visual[row].nonzero()[:, 0].tolist()
        best = sorted(places, key=lambda place: -scores[place].item())[:budget]
        keep[row, best] = True
    return keep


@contextmanager
def hiding(model: LlamaModel, layer: int, hidden: Tensor) -> Iterator[None]:
    """The layers from ``layer`` on cannot see the columns ``hidden (B, L)``, each token apart from itself."""

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        grown = torch.nn.functional.pad(hidden, (0, mask.shape[-1] - hidden.shape[1]))
        unseen = grown[:, None, None]
        if mask.shape[-2] == mask.shape[-1]:
            unseen = unseen & ~torch.eye(mask.shape[-1]).bool()
        low = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask.masked_fill(unseen, low)}

    hooks = [module.register_forward_pre_hook(hide, with_kwargs=True) for module in model.layers[layer:]]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize(("attention", "dtype", "close"), [
    ("sdpa", torch.float64, 1e-10), ("eager", torch.float32, 1e-4),
])  # fmt: skip
def test_fastv_equals_the_decoder_that_hides_what_is_dropped(
    layer: int, attention: str, dtype: torch.dtype, close: float
) -> None:
    model, batch = decoder(attention, dtype), Batch(dtype)
    inputs = batch.inputs() if attention == "sdpa" else batch.inputs(additive(batch.mask, dtype))
    budgets = [3, 2, 4]
    with dropping(model, FastV(layer), visual=batch.visual, last=batch.last, budgets=torch.tensor(budgets)) as dropped:
        hidden = model(**inputs).last_hidden_state
    keep = chosen(model, batch, layer, budgets)
    assert torch.equal(dropped.kept[0], keep)
    gone = batch.visual & ~keep
    with hiding(model, layer, gone):
        expected = model(**inputs).last_hidden_state
    held = batch.real & ~gone
    assert (hidden[held] - expected[held]).abs().max() < close
    assert not hidden[gone].any()
    assert (hidden[held] - model(**inputs).last_hidden_state[held]).abs().max() > FAR
    with hiding(model, layer - 1, gone):
        assert (hidden[held] - model(**inputs).last_hidden_state[held]).abs().max() > FAR
    others = batch.visual & keep.roll(1, 1)
    with hiding(model, layer, batch.visual & ~others):
        assert (hidden[held] - model(**inputs).last_hidden_state[held]).abs().max() > FAR


def test_layers_see_as_few_tokens_as_they_should() -> None:
    model, batch = decoder(), Batch()
    lengths: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1])) for layer in model.layers
    ]
    with dropping(model, FastV(2), visual=batch.visual, last=batch.last, budgets=torch.tensor([2, 2, 2])):
        model(**batch.inputs())
    for hook in hooks:
        hook.remove()
    assert lengths == [16, 16, 13, 13]  # the second row has 5 visual tokens and loses the fewest, 3
    assert FastV(2).layer_counts(4, 8, 2) == [8, 8, 2, 2]


def test_keeping_all_changes_nothing_and_nothing_stays_behind() -> None:
    model, batch = decoder(), Batch()
    plain = model(**batch.inputs()).last_hidden_state
    for budgets in ([8, 5, 6], [0, 0, 0]):
        with dropping(model, FastV(1), visual=batch.visual, last=batch.last, budgets=torch.tensor(budgets)) as dropped:
            hidden = model(**batch.inputs()).last_hidden_state
        assert dropped.kept[0].sum(1).tolist() == budgets
        if any(budgets):
            assert (hidden - plain).abs().max() < 1e-12
    assert torch.equal(model(**batch.inputs()).last_hidden_state, plain)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_ragged_batch_equals_each_row_alone_whatever_its_mask() -> None:
    """Alone a row needs no mask at all, and decides as it did in the batch."""
    model, batch = decoder(), Batch()
    budgets = torch.tensor([3, 2, 4])
    with dropping(model, FastV(2), visual=batch.visual, last=batch.last, budgets=budgets) as together:
        hidden = model(**batch.inputs()).last_hidden_state
    for row in range(3):
        real = batch.real[row]
        visual, last = batch.visual[row, real][None], real.sum()[None] - 1
        with dropping(model, FastV(2), visual=visual, last=last, budgets=budgets[row : row + 1]) as alone:
            single = model(inputs_embeds=batch.embeds[row, real][None]).last_hidden_state[0]
        assert torch.equal(alone.kept[0][0], together.kept[0][row, real])
        assert (single - hidden[row, real]).abs().max() < 1e-10


def test_ragged_budgets_without_a_mask() -> None:
    model, batch = decoder(), Batch()
    visual = batch.visual[:1].repeat(2, 1)
    embeds, last = batch.embeds[:1].repeat(2, 1, 1), torch.tensor([15, 15])
    with dropping(model, FastV(2), visual=visual, last=last, budgets=torch.tensor([2, 5])):
        hidden = model(inputs_embeds=embeds).last_hidden_state
    for row, budget in enumerate([2, 5]):
        with dropping(model, FastV(2), visual=visual[:1], last=last[:1], budgets=torch.tensor([budget])):
            alone = model(inputs_embeds=embeds[:1]).last_hidden_state
        assert (alone[0] - hidden[row]).abs().max() < 1e-10


def test_decoding_on_the_cache_equals_the_hiding_decoder() -> None:
    """Two steps of one token and one of three, rows padded and budgets ragged; the same without a cache."""
    model, batch = decoder(), Batch()
    left = torch.tensor([0, 1])
    real, visual, last = batch.real[left], batch.visual[left], batch.last[left]
    embeds, budgets = batch.embeds[left], torch.tensor([3, 1])
    new = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)).double()
    cache, steps = DynamicCache(), []
    with dropping(model, FastV(2), visual=visual, last=last, budgets=budgets) as dropped:
        model(inputs_embeds=embeds, position_ids=batch.positions[left], attention_mask=real, past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [16, 16, 12, 12]
    at = 0
    with resumed(model, dropped):
        for size in (1, 1, 3):
            mask = torch.nn.functional.pad(real, (0, at + size), value=True)
            positions = batch.positions[left, -1:] + 1 + torch.arange(at, at + size)
            outputs = model(
                inputs_embeds=new[:, at : at + size], position_ids=positions, attention_mask=mask, past_key_values=cache
            )
            steps.append(outputs.last_hidden_state)
            at += size
    mask = torch.nn.functional.pad(real, (0, 5), value=True)
    positions = torch.cat([batch.positions[left], batch.positions[left, -1:] + 1 + torch.arange(5)], 1)
    causal = (torch.ones(21, 21).tril().bool() & mask[:, None]) | torch.eye(21).bool()
    whole = {
        "inputs_embeds": torch.cat([embeds, new], 1), "position_ids": positions, "attention_mask": causal[:, None],
    }  # fmt: skip
    with hiding(model, 2, visual & ~dropped.kept[0]):
        expected = model(**whole).last_hidden_state[:, 16:]
    assert (torch.cat(steps, 1) - expected).abs().max() < 1e-10
    assert (torch.cat(steps, 1) - model(**whole).last_hidden_state[:, 16:]).abs().max() > FAR
    with dropping(model, FastV(2), visual=visual, last=last, budgets=budgets):
        uncached = model(**whole).last_hidden_state[:, 16:]
    assert (uncached - expected).abs().max() < 1e-10


def test_a_packed_batch_decides_by_the_question_not_by_the_answer() -> None:
    """As ``AnswerScorer`` lays out its passes: a question a row, its answer behind it."""
    model = decoder()
    random = torch.Generator().manual_seed(3)
    rows = [[Block([7, 8, 9, 4, 5], 3)], [Block([6, 3, 2], 2)]]
    packed = pack(make_prefix([[1, 2, 99]] * 2, 99, [[9]] * 2), torch.ones(2, 9).bool(), rows)
    visual, last = packed.visual, packed.start - 1 + torch.tensor([3, 2])
    tokens = torch.randn(2, 9, 32, generator=random).double()
    table = model.get_input_embeddings()
    kept, hidden = [], []
    for answer in (4, 30):
        ids = packed.ids.clone()
        ids[0, last[0] + 1] = answer
        embeds = table(ids)
        embeds[visual] = tokens.flatten(0, 1)
        with dropping(model, FastV(2), visual=visual, last=last, budgets=torch.tensor([3, 3])) as dropped:
            outputs = model(inputs_embeds=embeds, position_ids=packed.positions[0], attention_mask=packed.mask)
        kept.append(dropped.kept[0])
        hidden.append(outputs.last_hidden_state)
    assert torch.equal(*kept)
    assert kept[0].sum(1).tolist() == [3, 3]
    assert torch.equal(hidden[0][0, : last[0] + 1], hidden[1][0, : last[0] + 1])
    assert not torch.equal(hidden[0][0, last[0] + 1], hidden[1][0, last[0] + 1])
    for row, (block,) in enumerate(rows):
        end = int(packed.start[row]) + len(block.ids)
        single = torch.cat([table(torch.tensor([1, 2])), tokens[row], table(torch.tensor(block.ids))])[None]
        with dropping(model, FastV(2), visual=visual[row : row + 1, :end], last=last[row : row + 1],
                      budgets=torch.tensor([3])) as alone:  # fmt: skip
            expected = model(inputs_embeds=single).last_hidden_state[0]
        assert torch.equal(alone.kept[0][0], kept[0][row, :end])
        assert (hidden[0][row, :end] - expected).abs().max() < 1e-10


def test_pyramiddrop_cuts_again_and_again() -> None:
    """Each stage chooses by the layer ahead, which still sees what the stage before left; a step on the cache too."""
    model, batch, method = decoder(), Batch(), PyramidDrop()
    eager = decoder("eager")
    eager.load_state_dict(model.state_dict())
    budgets, cache = torch.tensor([2, 1, 3]), DynamicCache()
    new = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(4)).double()
    with dropping(model, method, visual=batch.visual, last=batch.last, budgets=budgets) as dropped:
        hidden = model(**batch.inputs(), past_key_values=cache).last_hidden_state
        mask = torch.nn.functional.pad(batch.real, (0, 1), value=True)[:, None, None]
        step = model(
            inputs_embeds=new, position_ids=batch.positions[:, -1:] + 1, attention_mask=mask, past_key_values=cache
        ).last_hidden_state
    counts = [count.tolist() for count in method.stage_budgets(LAYERS, batch.visual.sum(1), budgets)]
    assert [kept.sum(1).tolist() for kept in dropped.kept] == counts
    assert counts == [[5, 3, 5], [3, 2, 4], [2, 1, 3]]
    with ExitStack() as hidings:
        held = batch.visual
        for stage, kept, count in zip(method.stages(LAYERS), dropped.kept, counts, strict=True):
            weights = eager(**batch.inputs(additive(batch.mask, torch.float64)), output_attentions=True).attentions
            for row, last in enumerate(batch.last.tolist()):
                places = held[row].nonzero()[:, 0]
                best = weights[stage.watch][row, :, last].mean(0)[places].topk(count[row]).indices
                assert kept[row].nonzero()[:, 0].tolist() == places[best].sort().values.tolist()
            for each in (model, eager):
                hidings.enter_context(hiding(each, stage.drop, batch.visual & ~kept))
            held = kept
        whole = model(**batch.inputs(), past_key_values=(uncut := DynamicCache())).last_hidden_state
        expected = model(
            inputs_embeds=new, position_ids=batch.positions[:, -1:] + 1, attention_mask=mask, past_key_values=uncut
        ).last_hidden_state
    shown = batch.real & ~(batch.visual & ~held)
    assert (hidden[shown] - whole[shown]).abs().max() < 1e-10
    assert (step - expected).abs().max() < 1e-10
    assert (hidden[shown] - model(**batch.inputs()).last_hidden_state[shown]).abs().max() > FAR


def test_what_a_method_says_of_other_tokens_has_no_meaning() -> None:
    model, batch, budgets = decoder(), Batch(), torch.tensor([2, 1, 3])

    class Loud(PyramidDrop):
        def select(self, stage: int, view: LayerView, budget: Tensor) -> Selection:
            return Selection(super().select(stage, view, budget).keep_mask | ~view.visual)

    outcomes = []
    for method in (PyramidDrop(), Loud()):
        with dropping(model, method, visual=batch.visual, last=batch.last, budgets=budgets) as dropped:
            outcomes.append((model(**batch.inputs()).last_hidden_state, dropped.kept))
    (quiet, kept), (loud, same) = outcomes
    assert torch.equal(quiet, loud)
    assert all(torch.equal(one, other) for one, other in zip(kept, same, strict=True))


def test_dart_is_shown_a_layers_keys_and_its_normed_output() -> None:
    model, batch, views = decoder(), Batch(), []
    torch.nn.init.uniform_(model.norm.weight)

    class Watched(Dart):
        def select(self, stage: int, view: LayerView, budget: Tensor) -> Selection:
            views.append(view)
            return super().select(stage, view, budget)

    cache, entered = DynamicCache(), []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: entered.append(args[0])) for layer in model.layers[1:3]
    ]
    model(**batch.inputs(), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    with dropping(model, Watched(2), visual=batch.visual, last=batch.last, budgets=torch.tensor([5, 2, 3])) as dropped:
        model(**batch.inputs())
    (view,) = views
    assert dropped.kept[0].sum(1).tolist() == [5, 2, 3]
    assert torch.equal(view.hidden, entered[0])
    assert (view.normed() - model.norm(entered[1])).abs().max() < 1e-12
    assert (view.keys() - cache.layers[1].keys.transpose(1, 2).flatten(2)).abs().max() < 1e-5
    assert torch.equal(view.visual, batch.visual)
    before = torch.arange(16) <= batch.last[:, None]
    assert torch.equal(view.text, batch.real & ~batch.visual & before)


def test_sparsevlm_sees_what_entered_the_decoder_and_puts_clusters_into_it() -> None:
    """With budgets 2, 1 and 3 the later stages are shown what is left of the same embeddings; a cluster of the first
    stage enters its layer in the place of its centre, and a ragged batch equals each row alone."""
    model, batch, views = decoder(), Batch(), []

    class Watched(SparseVLM):
        def select(self, stage: int, view: LayerView, budget: Tensor) -> Selection:
            views.append((view, selection := super().select(stage, view, budget)))
            return selection

    budgets, entering = torch.tensor([2, 1, 3]), {}
    spy = model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: entering.update(hidden=kwargs["hidden_states"]), with_kwargs=True
    )
    with dropping(model, Watched(), visual=batch.visual, last=batch.last, budgets=budgets) as dropped:
        together = model(**batch.inputs()).last_hidden_state
    spy.remove()
    assert [kept.sum(1).tolist() for kept in dropped.kept][-1] == [2, 1, 3]
    view, selection = views[0]
    assert torch.equal(view.entered, batch.embeds)
    assert selection.tokens is not None
    changed = (selection.tokens != view.hidden).any(2)
    assert bool(changed.any())
    assert not bool((changed & ~selection.keep_mask).any())
    assert bool(dropped.kept[0][changed].all())
    held = dropped.kept[0] | ~batch.visual
    longest = int(held.sum(1).argmax())  # the row that is not filled up
    expected = model.layers[1].input_layernorm(selection.tokens[longest, held[longest]])
    assert torch.equal(entering["hidden"][longest], expected)
    for (later, _), kept in zip(views[1:], dropped.kept, strict=False):
        held = kept | ~batch.visual
        longest = int(held.sum(1).argmax())
        assert torch.equal(later.entered[longest], batch.embeds[longest, held[longest]])
    for row in range(3):
        real = batch.real[row]
        with dropping(
            model, SparseVLM(), visual=batch.visual[row : row + 1], last=batch.last[row : row + 1],
            budgets=budgets[row : row + 1],
        ):  # fmt: skip
            inputs = {name: value[row : row + 1] for name, value in batch.inputs().items()}
            alone = model(**inputs).last_hidden_state[0]
        assert (together[row, real] - alone[real]).abs().max() < 1e-6


SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": 0,
}  # fmt: skip


def test_the_attention_of_gemma2_is_capped() -> None:
    config = Gemma2Config(
        **SMALL, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, attn_implementation="eager"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, embeds = AutoModel.from_config(config).eval(), torch.randn(1, 9, 32)
    model.layers[1].self_attn.q_proj.weight.mul_(30)
    seen: list[Tensor] = []

    def look(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        none, last = torch.zeros(1, 9).bool(), torch.tensor([8])
        rotary, mask = kwargs["position_embeddings"], kwargs["attention_mask"]
        view = DecoderView(layer, args[0], args[0], none, last, rotary, mask)
        seen.append(view.attention(torch.arange(9)[None]))

    model.layers[1].register_forward_pre_hook(look, with_kwargs=True)
    weights = model(inputs_embeds=embeds, output_attentions=True).attentions[1].mean(1)
    torch.testing.assert_close(seen[0], weights)


@pytest.mark.parametrize(("kind", "fault"), [
    ("phi3", "'phi3' cannot be looked into, .*: a layer has no self_attn.q_proj, a layer has no self_attn.k_proj$"),
    ("phi", "it has no norm"),
    ("olmo2", "a layer has no input_layernorm"),
    ("gpt_oss", "its attention has sinks"),
    ("olmo", "its queries and keys are clipped"),
    ("hunyuan_v1_dense", "its queries are normalised behind their rotation"),
    ("cohere", "its rotary embedding is not Llama's"),
    ("glm", "its rotary embedding is not Llama's"),
    ("stablelm", "its rotary embedding is not Llama's"),
    ("smollm3", "its rotary embedding is not Llama's"),
])  # fmt: skip
def test_a_decoder_that_is_not_read_as_llama_is_refused(kind: str, fault: str) -> None:
    """StableLM turns a part of every head, SmolLM3 nothing in some layers."""
    more = {
        "gpt_oss": {"num_local_experts": 2, "head_dim": 8},
        "glm": {"head_dim": 8},
        "olmo": {"clip_qkv": 8.0},
        "hunyuan_v1_dense": {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "smollm3": {"no_rope_layers": [1, 0]},
    }
    model, batch = AutoModel.from_config(AutoConfig.for_model(kind, **SMALL, **more.get(kind, {}))), Batch()
    budgets = torch.tensor([1, 1, 1])
    with (
        pytest.raises(ValueError, match=fault),
        dropping(model, FastV(1), visual=batch.visual, last=batch.last, budgets=budgets),
    ):
        pass


def test_what_is_refused() -> None:
    model, batch = decoder(), Batch()
    given = {"visual": batch.visual, "last": batch.last}
    for budgets in ([9, 1, 1], [-1, 1, 1], [1, 1]):
        with (
            pytest.raises(ValueError, match=r"between 0 and the number of visual tokens \[8, 5, 6\]"),
            dropping(model, FastV(), **given, budgets=torch.tensor(budgets)),
        ):
            pass
    budgets = torch.tensor([1, 1, 1])
    with (
        pytest.raises(ValueError, match="decoder of 4 layers; 1 to 3"),
        dropping(model, FastV(4), **given, budgets=budgets),
    ):
        pass
    with pytest.raises(ValueError, match="layer 0 is not allowed"):
        FastV(0)
    with pytest.raises(ValueError, match="budget 9 is not allowed; 0 to the picture's 8"):
        FastV().layer_counts(4, 8, 9)
    with (
        dropping(model, FastV(), **given, budgets=budgets),
        pytest.raises(ValueError, match="got StaticCache"),
    ):
        model(**batch.inputs(), past_key_values=StaticCache(model.config, max_cache_len=20))
    model.set_attn_implementation("flex_attention")
    with (
        pytest.raises(ValueError, match="'flex_attention' is not allowed"),
        dropping(model, FastV(), **given, budgets=budgets),
    ):
        pass
