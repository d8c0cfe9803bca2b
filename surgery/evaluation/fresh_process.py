"""Load checkpoints with stock Transformers in a separate process, as on another user's machine, and print the results.

The file is run (`python -P fresh_process.py`), never imported by the package. It reads a JSON list of jobs from stdin
and writes one line of JSON for each job. A job is {"folder": ..., "tokens": [[...]], "generate": n, "logits": file or
null} with optional keys:
- "steps": n reads the last n tokens one by one too, from the cache. The answer then says how far their logits are from
  those of the whole text, as a share of their spread ("step_difference").
- "device" and "dtype" say where the model runs and in which dtype; default: the CPU, and that of the weights.
- "trust": true loads a surgical checkpoint with trust_remote_code, which runs the code in its folder. It is set only
  if that code is this package's own, byte for byte.
- "package": FOLDER imports the `surgery` in FOLDER, registers it, and loads with it. Without this key, the job fails
  if `surgery` was imported.
If stock Transformers has no class for a model, the answer is {"no_class": reason}.
"""

import json
import os
import sys

HEADS = ("HeadModel", "HeadsModel")  # GPT2LMHeadModel, GPT2DoubleHeadsModel


def load_in_this_process(job: dict) -> dict:
    """Load the model of a job, run it and generate. The result becomes one JSON object."""
    import torch
    import transformers

    if job.get("package"):
        sys.path.append(job["package"])
        import surgery

        surgery.register()
    folder, options = job["folder"], {"local_files_only": True, "trust_remote_code": bool(job.get("trust"))}
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        model_type = json.load(file).get("model_type")
    if model_type not in transformers.CONFIG_MAPPING and model_type != "surgery":
        return {"no_class": f"Transformers has no class for model_type {model_type!r}"}
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    headless = [name for name in config.architectures or [] if name.endswith("Model") and not name.endswith(HEADS)]
    if headless:
        return {"no_class": f"{headless[0]} has no output head, so it is no language model"}
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = transformers.AutoModelForCausalLM
    if config.get_text_config() is not config and not any("CausalLM" in c for c in config.architectures or []):
        auto = transformers.AutoModelForImageTextToText
    elif config.model_type not in names and not job.get("trust"):
        return {"no_class": f"Transformers has no causal language model for model_type {model_type!r}"}
    options["use_safetensors"] = True  # never a pickle
    dtype = job.get("dtype", "auto")
    model, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    model.eval()
    if not getattr(model, "is_quantized", False):
        model.to(job.get("device", "cpu"))
    tokens = torch.tensor(job["tokens"]).to(model.device)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        generated = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=job["generate"], do_sample=False
        )
        steps = {"step_difference": step_difference(model, tokens, logits, job["steps"])} if job.get("steps") else {}
    if job.get("logits"):
        torch.save(logits.float().cpu(), job["logits"])
    return {
        "class": type(model).__name__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
        "finite": bool(logits.isfinite().all()),
        "generated": generated[0, tokens.shape[1] :].tolist(),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        **steps,
        **launched_kernels(),
    }


def step_difference(model, tokens, logits, steps: int) -> float:
    """How far the logits of the last tokens, read one by one, are from `logits`, as a share of their spread."""
    import torch

    length = tokens.shape[1]
    read = model(input_ids=tokens[:, : length - steps], use_cache=True)
    name = "cache" if hasattr(read, "cache") else "past_key_values"
    past = {name: getattr(read, name)}
    each = [model(input_ids=tokens[:, at : at + 1], **past).logits for at in range(length - steps, length)]
    whole = logits[:, length - steps :].float()
    return float((torch.cat(each, 1).float() - whole).abs().max() / whole.std())


def launched_kernels() -> dict:
    """The Triton kernels that the last job launched, name -> number, and the errors of those that could not be."""
    found, faults = {}, []
    for name, module in [*sys.modules.items()]:
        if name.rpartition(".")[2] == "surgery_triton":  # the package's, or a checkpoint's copy
            for kernel, number in module.LAUNCHES.items():
                found[kernel] = found.get(kernel, 0) + number
            faults += module.failed()
            module.LAUNCHES.clear()
    return {"kernels": found, "kernel_faults": faults}


def main() -> None:
    """Answer every job on stdin with a line of JSON; a job that raises is answered with {"error": text}."""
    for job in json.load(sys.stdin):  # stdin is read to its end, so that a later question cannot wait for an answer
        try:
            result = load_in_this_process(job)
            if "surgery" in sys.modules and not job.get("package"):
                result["error"] = "the package surgery was imported"
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
