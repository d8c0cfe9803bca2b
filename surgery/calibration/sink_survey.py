"""The attention sinks of a model by name: text, tokenizer and model for `sink_map`."""

from __future__ import annotations

from surgery.calibration.sinks import SinkMap, sink_map
from surgery.data.text import BUILTIN, begin_of_text, fitting_length, load_text, windows


def survey_sinks(
    name: str, *, text=BUILTIN, samples: int = 8, length: int = 512, progress=None
) -> tuple[SinkMap, dict]:
    """Load a model and find its sinks.

    Args:
        name: a folder, `smollm2-135m` or a Hub id.
        text: see `load_text`; of the built-in text the calibration part.
        samples, length: pieces of text, and tokens in each (cut to the model's positions).
        progress: called with done, total and a label.

    Returns:
        What was found, and facts for people: model, text, and `bos`: the token, and whether the tokenizer adds it.

    Raises:
        SurgeryError: the model or the text cannot be read or measured.
    """
    from surgery.io.hub import resolve
    from surgery.io.loading import load_model, read_tokenizer
    from surgery.machine.transformers_logging import quiet_transformers

    source, text = resolve(name), load_text(text, part="calibration")
    with quiet_transformers():
        model, tokenizer = load_model(source.path), read_tokenizer(source.path)
    pieces = windows(text, tokenizer, fitting_length(model, length), samples)
    found = sink_map(model, pieces, tokenizer=tokenizer, progress=progress)
    bos = {"token": tokenizer.bos_token, "added": bool(begin_of_text(tokenizer))}
    return found, {"model": source.name, "text": text.title, "sha256": text.sha256[:12], "bos": bos}
