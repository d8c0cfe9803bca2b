"""retrieval: how often a head attends most to the token that the model writes next, while it repeats a passkey.

Source: Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574, and its
released code (`retrieval_head_detection.py`). At a step that writes token y, a head copies if the key that it attends
to most lies in the needle and is the token y. Its score for a needle is the number of such steps, as a share of the
needle's tokens; its score is the mean over the needles. A needle that the model fails is left out: the released code
asks for a ROUGE-1 recall above 50%. Here a needle is one passkey, and it counts if the model writes more than half of
its tokens. If the model fails all of them, there is no score.

Where ours differs: the steps are teacher-forced. They are the answer's rows in one prefill that contains the answer.
As long as the model is right, a decoding step has the same attention. After a wrong token the released code goes on
from this token, and here the true one is read. Its needles are three sentences in 1,000 to 50,000 tokens at ten
depths. Here they are passkeys of random words in the sequences of the other scorers.

The method finds only the heads that copy. Most heads score 0, and so do the heads in lower layers on which the copying
heads depend.
"""

from __future__ import annotations

import torch

from surgery.calibration.attention_hook import answer_logits, hook_attention
from surgery.calibration.head_scores import HeadScores
from surgery.data.passkeys import calibration
from surgery.data.text import BUILTIN
from surgery.errors import UnsupportedModelError
from surgery.machine.progress import begin
from surgery.operations.base import Count, Length, Seed
from surgery.runtime.surgery_attention import surgery_attention

ANSWERED = 0.5  # a passkey counts if the model writes more than this share of its tokens
NOWHERE = -1  # in place of a token: the strongest attention lies outside the passkey


def retrieval(
    model,
    tokenizer,
    *,
    sinks: int,
    window: int,
    samples: Count = 8,
    length: Length = 1024,
    keys: Count = 4,
    seed: Seed = 0,
    text=BUILTIN,
    per: str = "kv_heads",
    progress=None,
) -> HeadScores:
    """The share of a passkey's tokens at whose source a head's strongest attention points, as the model writes them.

    The origin has the number of `passkeys`, how many of them were `left_out`, and of all `steps` the share that was
    `answered` by the right token.

    Args: as for `far_mass`.

    Raises:
        SurgeryError: the model fails every passkey.
    """
    settings = {"samples": samples, "length": length, "keys": keys, "seed": seed}
    sequences, origin = calibration(model, tokenizer, text, sinks=sinks, window=window, **settings)
    looked_at: dict[int, torch.Tensor] = {}  # layer -> tokens [heads, r]

    def attention(module, query, key, value, mask, **kwargs):
        weights = hook.weights(module, query, key, sequence.rows, **kwargs)
        looked_at[module.layer_idx] = strongest_tokens(weights, sequence).cpu()
        return surgery_attention(module, query, key, value, mask, **kwargs)

    answered = steps = passkeys = kept = 0
    with hook_attention(model, attention) as hook, torch.no_grad():
        totals = [torch.zeros(layer.heads, dtype=torch.float64) for layer in hook.anatomy.layers]
        begin(progress, "measuring heads", samples)
        for index, sequence in enumerate(sequences):
            written = answer_logits(model, sequence).argmax(-1).cpu()
            right = written == sequence.ids[sequence.rows + 1]
            for rows in rows_of_passkeys(sequence):
                passkeys += 1
                if right[rows].double().mean() > ANSWERED:
                    kept += 1
                    for layer, tokens in looked_at.items():
                        totals[layer] += (tokens[:, rows] == written[rows]).double().mean(-1)
            answered, steps = answered + int(right.sum()), steps + len(right)
            if progress:
                progress(index + 1, samples, "measuring heads")
        if not kept:
            raise _fails(passkeys, answered / steps)
        table = hook.table([total / kept for total in totals], per)
    origin |= {"steps": steps, "answered": round(answered / steps, 4)}
    return HeadScores("retrieval", table, origin | {"passkeys": passkeys, "left_out": passkeys - kept}, per)


def rows_of_passkeys(sequence) -> list[slice]:
    """For each passkey of a `Recall`, its slice of `sequence.rows`."""
    rows, begin = [], 0
    for first, end in sequence.answers:
        rows.append(slice(begin, begin + end - first))
        begin += end - first
    return rows


def strongest_tokens(weights: torch.Tensor, sequence) -> torch.Tensor:
    """The tokens to which the heads attend most, where these lie in the passkey that the row repeats.

    Args:
        weights: [1, heads, r, n], attention weights of the queries at `sequence.rows`.
        sequence: a `Recall` with r rows and n tokens.

    Returns:
        Tokens, long [heads, r]; `NOWHERE` where the strongest attention lies outside the passkey.
    """
    ids, spans = (tensor.to(weights.device) for tensor in (sequence.ids, sequence.row_spans))
    best = weights[0].argmax(-1)
    inside = (best >= spans[:, 0]) & (best < spans[:, 1])
    return ids[best].where(inside, NOWHERE)


def _fails(passkeys: int, answered: float) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"retrieval cannot score this model: it repeats none of {passkeys} passkeys "
        f"({answered:.0%} of their tokens are right), so no head is seen to copy",
        fix="shorter sequences (--length; calibration_length in a recipe), or a method that needs no right answers, "
        "such as far-mass",
    )
