"""Load results in an environment without `surgery`; transformers_versions.py runs this as a process.

    python opened_results.py FOLDER FOUND.json

FOLDER has folders of results, each with expected.pt: tokens, logits, prompt (how many tokens are in the first of two
forwards; 0: one forward alone) and generated. FOUND.json gets, by name, the largest difference of a logit as a share
of the logits' spread, `OTHER_TOKENS` if other tokens are generated, or the error's text.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

OTHER_TOKENS = 9.0
NEW = 8  # tokens that are generated


def generated(model, tokens: torch.Tensor, beams: int) -> torch.Tensor:
    """Tokens after prompts of unequal length, greedily or by beam search."""
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    lengths = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    with torch.no_grad():
        made = model.generate(
            input_ids=tokens, attention_mask=mask, do_sample=False, num_beams=beams, pad_token_id=0, **lengths
        )
    return made[:, tokens.shape[1] :]


def difference(folder: Path) -> float:
    """How far a result's logits are from the expected ones."""
    from transformers import AutoModelForCausalLM

    expected = torch.load(folder / "expected.pt")
    code = not folder.name.endswith("-native")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=code, dtype=torch.float32).eval()
    tokens, logits = expected["tokens"], expected["logits"]
    with torch.no_grad():
        found = [model(tokens).logits]
        if prompt := expected["prompt"]:
            first = model(tokens[:, :prompt], use_cache=True)
            rest = model(tokens[:, prompt:], past_key_values=first.past_key_values).logits
            found.append(torch.cat([first.logits, rest], 1))
    largest = max(float((each - logits).abs().max() / logits.std()) for each in found)
    same = all(torch.equal(generated(model, tokens, beams), wanted) for beams, wanted in expected["generated"].items())
    return largest if same else max(largest, OTHER_TOKENS)


def main() -> None:
    import transformers

    assert importlib.util.find_spec("surgery") is None
    transformers.logging.set_verbosity_error()
    found: dict[str, float | str] = {}
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        try:
            found[folder.name] = difference(folder)
        except Exception as error:  # whatever a version raises is its answer
            found[folder.name] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
