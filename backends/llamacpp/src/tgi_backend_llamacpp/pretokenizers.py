"""How byte-level vocabularies cut text before merging: the names in GGUF files, and tokenizer.json's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Step: TypeAlias = "str | None"
"""A pattern to split at, or None: each digit by itself."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(suffix: str, digits: str) -> str:
    """Words that begin with capitals or end in small letters are cut where the case changes."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return rf"{lead}{_UPPER}*{_LOWER}+{suffix}|{lead}{_UPPER}+{_LOWER}*{suffix}|{digits}|{_CASED_REST}"


_LLAMA3 = (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",)
_QWEN2 = (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_FAMILIES: tuple[tuple[tuple[Step, ...], tuple[str, ...]], ...] = (
    (
        _LLAMA3,
        (
            "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx",
            "smaug-bpe", "chatglm-bpe", "glm4", "glm5",
        ),
    ),
    (
        _QWEN2,
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "hunyuan", "solar-open", "megrez", "grok-2"),
    ),
    (
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+",),
        ("qwen35",),
    ),
    (
        (_GPT2,),
        (
            "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0", "mellum",
            "modern-bert", "exaone4",
        ),
    ),
    ((None, _GPT2), ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2")),
    (_DEEPSEEK3, ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4")),
    ((_cased(rf"{_CONTRACTIONS}?", r"\p{N}{1,3}"),), ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2")),
    ((_cased("", r"\p{N}"),), ("tekken",)),
)  # fmt: skip
STEPS: Mapping[str, tuple[Step, ...]] = {name: steps for steps, names in _FAMILIES for name in names}
"""A GGUF's `tokenizer.ggml.pre` -> the cuts that it stands for, in order."""
WHOLE_WORDS = frozenset(
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
)
"""Those under which a word that is a token is taken as it is, whatever the merges say; their prompts begin with BOS."""


def describe(name: str) -> dict[str, Any]:
    """The pre-tokenizer `name` as tokenizer.json describes it. Raises KeyError."""
    parts: list[dict[str, Any]] = [
        {"type": "Digits", "individual_digits": True} if step is None else _split(step) for step in STEPS[name]
    ]
    parts.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    return {"type": "Sequence", "pretokenizers": parts}


def recognise(described: Mapping[str, Any] | None) -> str | None:
    """The GGUF name of what tokenizer.json describes; None if it is none of ours."""
    steps = _steps(described)
    return next((name for name, known in STEPS.items() if list(known) == steps), None)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _steps(described: Mapping[str, Any] | None) -> list[Step] | None:
    """The cuts of a pre-tokenizer that ends in bytes; None for anything else."""
    if described is None:
        return None
    parts = described["pretokenizers"] if described["type"] == "Sequence" else [described]
    steps: list[Step] = []
    for part in parts:
        match part:
            case {"type": "Digits", "individual_digits": True}:
                steps.append(None)
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
                steps.append(pattern)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                if part.get("use_regex", True):
                    steps.append(_GPT2)
                return steps if part is parts[-1] else None
            case _:
                return None
    return None
