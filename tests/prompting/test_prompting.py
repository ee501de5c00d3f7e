"""Likelihoods against the plainest way to have them: one answer at a time, unpadded, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_texts
from tiny_text import tiny_language_tokenizer, tiny_llama, tiny_t5
from transformers import GPT2Config, GPT2LMHeadModel

from orthomerge.errors import TaskError
from orthomerge.evaluation.text import TextEvaluator
from orthomerge.models import loading
from orthomerge.prompting import IGNORED, Wording, generate, log_likelihoods
from orthomerge.statistics import collect_statistics
from orthomerge.tasks import Prompt, Row, get_task, prompt_of

TASK = get_task("sentiment")
PROMPT = prompt_of(
    TASK, {"prompt": "Is this fresh?\n{text}\nAnswer:", "answers": ["not very fresh", "yes"]}
)
WORDS = prompt_of(TASK, {"prompt": "{text} so", "answers": ["no", "yes"]})
ROWS = [Row(text, None, i % 2) for i, text in enumerate(make_texts(9))]


def tiny_gpt2(vocabulary):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2, n_positions=128, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def model_of(kind):
    tokenizer = tiny_language_tokenizer(seq2seq=kind == "t5")
    make = {"llama": tiny_llama, "t5": tiny_t5, "gpt2": tiny_gpt2}[kind]
    return make(len(tokenizer)), tokenizer


def one_by_one(model, tokenizer, asked, answer, seq2seq):
    """log p(answer | prompt) by one pass without padding, written out for this alone."""
    if seq2seq:
        ids = tokenizer(asked, return_tensors="pt").input_ids
        target = tokenizer(answer, add_special_tokens=True).input_ids[:-1]
        start = model.config.decoder_start_token_id
        decoder = torch.tensor([[start, *target[:-1]]])
        logits = model(input_ids=ids, decoder_input_ids=decoder).logits[0]
        first = 0
    else:
        prompt = tokenizer(asked).input_ids
        whole = tokenizer(f"{asked} {answer}").input_ids
        target = whole[len(prompt) :]
        logits = model(input_ids=torch.tensor([whole])).logits[0]
        first = len(prompt) - 1
    logs = logits.log_softmax(dim=-1)
    return sum(float(logs[first + i, token]) for i, token in enumerate(target)), len(target)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("prompt", [PROMPT, WORDS], ids=["words", "tokens"])
def test_batched_likelihoods_are_those_of_one_answer_at_a_time(kind, prompt):
    model, tokenizer = model_of(kind)
    model = model.double()
    found = TextEvaluator(model, tokenizer, batch_size=4).likelihoods(ROWS, prompt)
    with torch.no_grad():
        for i, row in enumerate(ROWS):
            for label, said in enumerate(prompt.answers):
                wanted, length = one_by_one(
                    model, tokenizer, prompt.ask(row.text), said, kind == "t5"
                )
                # Some versions of T5 round a part of the attention to float32 whatever is asked.
                assert found.sums[i, label] == pytest.approx(wanted, abs=1e-6)
                assert found.lengths[i, label] == length
                assert found.normalised[i, label] == pytest.approx(wanted / length, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_shared_prompt_gives_what_an_answer_alone_gives(kind):
    model, tokenizer = model_of(kind)
    wording = Wording.of(PROMPT, tokenizer, model.double().config)
    asked = [wording.encode((r.text, r.pair), PROMPT.answers) for r in ROWS]
    shared, apart = (wording.likelihood_batch(asked, share=share) for share in (True, False))
    with torch.no_grad():
        a, b = log_likelihoods(model, shared), log_likelihoods(model, apart)
    assert torch.allclose(a, b, atol=1e-9)
    passes = "input_ids" if kind == "llama" else "decoder_input_ids"
    assert len(apart.inputs[passes]) == 2 * len(ROWS)
    single = Wording.of(WORDS, tokenizer, model.config)
    one = single.likelihood_batch([single.encode(("red", None), WORDS.answers)])
    if kind == "llama":  # " yes" and " no" are a token each: one pass weighs both
        assert one.lengths.tolist() == [[1, 1]]
        assert len(one.inputs[passes]) == 1


def test_loss_is_taken_of_the_answer_and_its_end_alone():
    model, tokenizer = model_of("llama")
    wording = Wording.of(WORDS, tokenizer, model.config)
    (example,) = wording.examples([Row("red king", None, 1)])
    asked = tokenizer("red king so").input_ids
    assert example["input_ids"][: len(asked)] == asked
    assert example["labels"][: len(asked)] == [IGNORED] * len(asked)
    assert tokenizer.decode(example["labels"][len(asked) :]) == " yes</s>"
    batch = wording.collate([example, *wording.examples([Row("red", None, 0)])])
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_answers_written_in_a_batch_are_those_written_alone(kind):
    model, tokenizer = model_of(kind)
    wording = Wording.of(PROMPT, tokenizer, model.double().config)
    prompts = [wording.encode((r.text, None), []).prompt for r in ROWS]
    together = generate(model, wording, prompts)
    assert together == [generate(model, wording, [p])[0] for p in prompts]
    assert max(map(len, together)) <= wording.longest + 1
    drawn = [generate(model, wording, prompts, seed=s) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_long_text_is_cut_and_the_instruction_is_kept():
    _, tokenizer = model_of("llama")
    wording = Wording(PROMPT, tokenizer, max_length=30)
    asked = wording.ask(" ".join(make_texts(20)))
    assert asked.startswith("Is this fresh?\n") and asked.endswith("\nAnswer:")
    assert len(tokenizer(asked).input_ids) <= 30
    with pytest.raises(TaskError, match="no room for a text in 8 tokens"):
        Wording(PROMPT, tokenizer, max_length=8).ask("red")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_statistics_of_prompts_need_no_label_and_see_the_answers(kind):
    """Equal to collecting over each prompt with its answer alone; padding is not counted."""
    model, tokenizer = model_of(kind)
    backbone = model.model if kind == "llama" else model
    target = ["q_proj"] if kind == "llama" else ["q"]
    wording = Wording.of(PROMPT, tokenizer, model.config)
    texts = [(r.text, None) for r in ROWS]
    together = collect_statistics(backbone, wording.batches(texts, batch_size=4), target)
    alone = collect_statistics(backbone, wording.batches(texts, batch_size=1), target)
    bare = collect_statistics(backbone, wording.batches(texts, answers=False), target)
    for name, moment in together.moments.items():
        assert torch.allclose(moment.matrix, alone.moments[name].matrix, rtol=1e-4, atol=1e-6)
        assert moment.count == alone.moments[name].count
        if "encoder" not in name:
            assert moment.count > bare.moments[name].count


CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} : {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant : {% endif %}"
)


@pytest.fixture
def chatting():
    tokenizer = copy.deepcopy(tiny_language_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_a_chat_is_the_tokenizers_own_template_and_the_answer_is_the_assistants(chatting):
    prompt = prompt_of(TASK, "Is it good? {text}", chat=True)
    model = tiny_llama(len(chatting))
    wording = Wording.of(prompt, chatting, model.config)
    asked = prompt.ask("a good film")
    (example,) = wording.examples([Row("a good film", None, 1)])
    whole = chatting.apply_chat_template(
        [{"role": "user", "content": asked}, {"role": "assistant", "content": prompt.answers[1]}],
        tokenize=False,
    )
    assert example["input_ids"] == chatting(whole, add_special_tokens=False)["input_ids"]
    begun = chatting.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
    )
    told = [token for token, label in zip(example["input_ids"], example["labels"], strict=True)
            if label != IGNORED]  # fmt: skip
    assert begun + prompt.answers[1] + "</s>" == whole
    assert chatting.decode(told).strip() == prompt.answers[1] + "</s>"
    # The same prompt without the template is another one, and its own record.
    plain = prompt_of(TASK, "Is it good? {text}")
    assert plain.fingerprint != prompt.fingerprint
    assert Prompt.of(prompt.record()) == prompt and Prompt.of(plain.record()) == plain


def test_long_texts_in_a_chat_are_cut_and_the_template_stays(chatting, caplog):
    prompt = prompt_of(TASK, "Is it good? {text}", chat=True)
    wording = Wording.of(prompt, chatting, tiny_llama(len(chatting)).config, 40)
    loading._said.clear()
    with caplog.at_level("WARNING", logger="orthomerge"):
        long, short = wording.examples([Row("war " * 99, None, 1), Row("war", None, 0)])
    begun = chatting.decode(long["input_ids"])
    assert begun.startswith("<s>user : Is it good? war war") and "</s><s>assistant : " in begun
    assert len(long["input_ids"]) <= 40 + 4 and len(short["input_ids"]) < 40
    assert "1 of 2 prompts are longer than 40 tokens and were cut (--max-length)." in caplog.text


def test_a_chat_needs_a_template(chatting):
    prompt = prompt_of(TASK, "{text}", chat=True)
    with pytest.raises(TaskError, match="no chat template"):
        Wording.of(prompt, tiny_language_tokenizer(), tiny_llama(10).config)
    with pytest.raises(TaskError, match="no chat template"):
        Wording.of(prompt, chatting, tiny_t5(10).config)
