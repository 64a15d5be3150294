"""Tokenizer: byte-level BPE trained on the curriculum, with digits one by one."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import curriculum
from lessons.rendering import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, PLAIN_ADDED_TOKENS, SPECIAL_TOKENS


def train_tokenizer(vocab_size: int, conversations: int = 40_000, seed: int = 90_210) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=added,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = (text for talk in islice(curriculum.conversations(seed), conversations) for text, _ in talk.segments())
    tokenizer.train_from_iterator(_without_added(texts, added), trainer)
    # Tool tags must stay visible in decoded text, so they are added tokens but not special ones.
    plain = json.loads(tokenizer.to_str())
    for token in plain["added_tokens"]:
        token["special"] = token["content"] in SPECIAL_TOKENS
    return Tokenizer.from_str(json.dumps(plain))


def _without_added(texts: Iterable[str], added: list[str]) -> Iterator[str]:
    for text in texts:
        for token in added:
            text = text.replace(token, "")
        yield text


def export_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "padding_side": "left",
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {"eos_token": END_OF_TURN, "pad_token": END_OF_TEXT}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
