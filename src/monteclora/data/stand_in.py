"""A tokenizer in the place of one that is not available: it cuts texts into about as many tokens, and learns nothing.

Words are cut into pieces of at most six letters, which makes 1.3 tokens of an English word on average, as the
tokenizers of the models in :mod:`monteclora.data.published` do; numbers into three digits, and everything else into
characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["stand_in_tokenizer"]

_PIECES = r" ?\p{L}{1,6}| ?\p{N}{1,3}|\s+| ?[^\s\p{L}\p{N}]"
_PAD, _BEGIN, _END, _UNKNOWN, _TURN, _TURN_END = "<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"


def stand_in_tokenizer(
    texts: Iterable[Any], config: PretrainedConfig, *, positions: int | None, chats: bool
) -> PreTrainedTokenizerBase:
    """A tokenizer for a model that is known by its configuration.

    Args:
        texts: what it will be given, or anything that holds them; pieces of others are counted, and cannot be written.
        config: of the model: an encoder's rows begin and end with a token, those of a decoder begin with one.
        positions: most tokens of a row; None for no limit.
        chats: whether it has a chat template.
    """
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    special = [_PAD, _BEGIN, _END, _UNKNOWN, _TURN, _TURN_END]
    splitter = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    vocabulary = dict.fromkeys(special)
    for text in chain(("\n", "system", "user", "assistant"), _texts(texts)):
        vocabulary.update(dict.fromkeys(piece for piece, _ in splitter.pre_tokenize_str(text)))
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    inner = Tokenizer(models.WordLevel(ids, unk_token=_UNKNOWN))
    inner.pre_tokenizer = splitter
    inner.decoder = decoders.Fuse()
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    single, pair = (
        (f"{_BEGIN} $A {_END}", f"{_BEGIN} $A {_END} {_END} $B {_END}") if encoder else (f"{_BEGIN} $A", None)
    )
    inner.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, ids[token]) for token in (_BEGIN, _END)]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=_PAD,
        bos_token=_BEGIN,
        eos_token=_TURN_END if chats else _END,
        unk_token=_UNKNOWN,
        additional_special_tokens=[_TURN, _TURN_END],
        **({} if positions is None else {"model_max_length": positions}),
    )
    if chats:
        from monteclora.data.chat import CHATML, use_template

        use_template(made, CHATML)
    found: PreTrainedTokenizerBase = made
    return found


def _texts(value: Any) -> Iterator[str]:
    """Every text in rows, lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(value.values())
    elif isinstance(value, Iterable):
        for each in value:
            yield from _texts(each)
