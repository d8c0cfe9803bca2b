"""Which of the base's other files come along."""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from surgery.io.output_folder import BASE_CARD

# What is taken from the base's folder besides weights, config and card. The rest stays behind and is listed:
# other weight formats, adapters, caches, training states.
CARRIED = (
    "tokenizer*.json", "tokenizer.model*", "*.tiktoken", "tiktoken.model", "vocab.json", "vocab.txt", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "spiece.model", "sentencepiece*.model", "sentencepiece*.bpe",
    "*preprocessor_config.json", "processor_config.json", "chat_template.*", "chat_templates/*",
    "additional_chat_templates/*",
    "generation_config.json",
    "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "*.py",
    "*.png", "*.jpg", "*.jpeg", "*.webp", "*.gif", "*.svg",
)  # fmt: skip
REWRITTEN = {BASE_CARD, "config.json", "README.md", "surgery.json"}
# Of a base that is surgical already: OUT has this version's.
RUNTIME = ("modeling_surgery.py", "surgery_*.py", "block_sparse_prefill.py")


def carry_files(base: Path, folder: Path, weights: set[str]) -> list[str]:
    """Copy the base's other files by the allow list, links as the files they point to.

    Args:
        weights: files of the base that were converted, the index among them if it was read.

    Returns:
        The names left behind.
    """
    left, carried = [], [pattern.lower() for pattern in CARRIED]
    for path in sorted(p for p in base.rglob("*") if p.is_file()):
        name = path.relative_to(base).as_posix()
        if any(part.startswith(".") for part in path.relative_to(base).parts) or name in REWRITTEN:
            continue
        if any(fnmatchcase(name, pattern) for pattern in RUNTIME):
            continue
        if any(fnmatchcase(name.lower(), pattern) for pattern in carried if "/" in pattern or "/" not in name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        elif name not in weights:
            left.append(name)
    card = next((base / name for name in (BASE_CARD, "README.md") if (base / name).is_file()), None)
    if card:
        shutil.copyfile(card, folder / BASE_CARD)
    return left
