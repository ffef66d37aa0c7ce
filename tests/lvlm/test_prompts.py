"""Prompts of real processors, by chat templates of several kinds."""

import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lvlm.test_model import lvlm
from tprl.evaluate.latency import question_inputs
from tprl.lvlm.model import Lvlm


def test_prompts_are_split_at_the_picture() -> None:
    model, _ = lvlm()
    assert model.prompts.ids("what is it ?") == ([1, 4, 60], [7, 8, 9, 10, 6, 13, 5])
    assert model.prompts.ids("what is it ?", "a cat") == ([1, 4, 60], [7, 8, 9, 10, 6, 13, 5, 11, 12, 6])
    assert model.prompts.template_ids == frozenset({1, 4, 5, 6, 13})


def like_llava_15() -> Lvlm:
    """LLaVA-1.5's layout, whose template ends no turn, and a tokenizer that tells words behind a blank from others and
    sees one at the start of every text, as Llama's does."""
    model, _ = lvlm()
    words = ["<pad>", "<s>", "</s>", "<unk>", "\n", "\u2581", "\u2581USER:", "\u2581ASSISTANT:", "what", "\u2581what"]
    words += ["\u2581is", "\u2581it", "\u2581a", "\u2581cat", "\u2581</", "\u2581end>"]
    vocabulary = {word: number for number, word in enumerate(words)} | {"<image>": 60}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = Sequence([Prepend("\u2581"), Replace(" ", "\u2581")])
    backend.pre_tokenizer = Split(Regex("\n|\u2581[^\u2581\n]*|[^\u2581\n]+"), "isolated")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model.processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    model.processor.chat_template = (
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    return model


def test_an_answer_ends_where_its_template_says_nothing() -> None:
    """By the end of the sequence, which LLaVA-1.5 learnt to say; the words are those that its prompts have."""
    model = like_llava_15()
    prompt, answer = [5, 4, 8, 10, 11, 7], [12, 13, 2]  # "what" behind a line break, " a" behind the prompt
    assert model.prompts.ids("what is it") == ([1, 6, 5, 60], prompt)
    assert model.prompts.ids("what is it", "a cat") == ([1, 6, 5, 60], prompt + answer)
    assert model.prompts.end_id == 2
    query, mask = model.question_embeds(["what is it"])
    assert mask.tolist() == [[True] * 3]
    assert torch.equal(query[0], model.model.get_input_embeddings().weight[[8, 10, 11]])


def test_a_beginning_that_the_template_writes_is_not_added_once_more() -> None:
    """The tokenizer begins what it is given by <s>, too."""
    bare, begun = like_llava_15(), like_llava_15()
    begun.processor.chat_template = "<s>" + bare.processor.chat_template
    for answer in (None, "a cat"):
        assert begun.prompts.ids("what is it", answer) == bare.prompts.ids("what is it", answer)
    image = Image.new("RGB", (24, 24))
    assert question_inputs(begun, image, "what is it")["input_ids"].tolist()[0].count(1) == 1


def test_an_answer_does_not_melt_into_the_prompt() -> None:
    """Where no blank stands between, "ASSISTANT:a" would be a word that nobody knows."""
    model = like_llava_15()
    model.processor.chat_template = model.processor.chat_template.replace("': '", "':'")
    (_, prompt), (_, answered) = (model.prompts.ids("what is it", answer) for answer in (None, "a cat"))
    assert prompt[-1] == 7
    assert answered == [*prompt, 12, 13, 2]


@pytest.mark.parametrize(("closing", "end"), [("", 2), ("</ end>", 2), ("is", 10)])
def test_an_answer_ends_by_one_token(closing: str, end: int) -> None:
    """Not by one that a template spells in several, as LLaVA-NeXT's for Mistral does."""
    model = like_llava_15()
    model.processor.chat_template += "{% if not add_generation_prompt %}{{ '" + closing + "' }}{% endif %}"
    assert model.prompts.ids("what is it", "a cat")[1][-3:] == [12, 13, end]
    assert model.prompts.end_id == end


def test_an_answer_that_would_change_the_prompt_is_apart_from_it() -> None:
    model, _ = lvlm()
    model.processor.chat_template = model.processor.chat_template.replace("[assistant] ", "[assistant]")
    _, prompt = model.prompts.ids("what")
    _, whole = model.prompts.ids("what", "is")
    assert whole == [*prompt, 8, 6]


def test_prompts_of_gemma_wrap_the_picture() -> None:
    model, _ = lvlm("gemma3")
    assert model.prompts.ids("what") == ([1, 4, 52, 50, 60], [51, 52, 7, 6, 13, 5])


def test_a_question_shows_no_picture_by_its_visual_tokens_either() -> None:
    model, _ = lvlm("gemma3")
    token = model.processor.tokenizer.convert_ids_to_tokens(model.model.config.image_token_id)
    assert token != model.prompts.placeholder
    with pytest.raises(ValueError, match=f"the question 'what {token}' contains '{token}'"):
        model.prompts.check(f"what {token}")


def test_prompts_that_cannot_be_split() -> None:
    model, _ = lvlm()
    with pytest.raises(ValueError, match="the question '<image> what' contains '<image>'"):
        model.prompts.ids("<image> what")
    model.processor.chat_template = "{{ '<image> <image>' }}"
    with pytest.raises(ValueError, match="2 pictures instead of 1"):
        model.prompts.ids("what")
    model.processor.chat_template = "{{ '<image> ' + messages | length | string }}"
    with pytest.raises(ValueError, match="rewrites the prompt"):
        model.prompts.ids("what", "cat")
