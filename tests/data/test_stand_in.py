import pytest

from monteclora.data.published import published_config
from monteclora.data.stand_in import stand_in_tokenizer

TEXT = "The committee's recommendation of 12,345 pages wasn't read by anyone; nevertheless it was adopted."


def made(name="FacebookAI/roberta-base", texts=(TEXT,), **options):
    return stand_in_tokenizer(texts, published_config(name), **{"positions": 512, "chats": False, **options})


def test_words_are_cut_about_as_tokenizers_cut_them():
    """RoBERTa's own has 22 tokens for this sentence, without those at its ends."""
    ids = made()(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) == pytest.approx(22, abs=7)
    assert made().decode(ids) == TEXT


def test_rows_of_encoders_end_with_a_token_and_those_of_decoders_do_not():
    encoder, decoder = made(), made("huggyllama/llama-7b")
    count = len(encoder(TEXT, add_special_tokens=False)["input_ids"])
    assert len(encoder(TEXT)["input_ids"]) == count + 2
    assert len(encoder(TEXT, TEXT)["input_ids"]) == 2 * count + 4
    ids = decoder(TEXT)["input_ids"]
    assert len(ids) == count + 1
    assert ids[0] == decoder.bos_token_id
    assert encoder.model_max_length == 512
    assert made(positions=None).model_max_length > 1e9


def test_texts_are_found_in_rows_and_conversations():
    rows = [{"prompt": "apples", "label": 1}, {"messages": [{"role": "user", "content": "bananas"}]}]
    tokenizer = made(texts=rows)
    assert tokenizer.decode(tokenizer("bananas apples", add_special_tokens=False)["input_ids"]).startswith("bananas")
    assert len(tokenizer("unseen", add_special_tokens=False)["input_ids"]) == 1


def test_a_chat_model_has_a_template():
    tokenizer = made(texts=["What is it?", "Nothing."], chats=True)
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Nothing."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.count(tokenizer.eos_token) == 2
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
