"""Run a GGUF file in llama.cpp, as a process: `python -P llama_cpp_server.py ANSWERS.json`.

The file is run, never imported by the package. It reads one JSON object from stdin, {"file": ..., "prompt": [ids],
"generate": n, "best": k, "text": ..., "pieces": [ids], "threads": n}. It writes {"generated": [ids], "best": [[[id,
log-probability or null], ...], ...], "text_tokens": [ids]} to ANSWERS.json. The cache holds float32, and flash
attention is off: llama.cpp's default cache of float16 changes log-probabilities by up to 0.1.
"""

import json
import math
import sys
import urllib.request

import xllamacpp


def settings(job: dict) -> xllamacpp.CommonParams:
    """The engine's settings: one request at a time, in float32, on the CPU."""
    params = xllamacpp.CommonParams()
    params.model.path = job["file"]
    params.n_ctx = len(job["prompt"]) + job["generate"] + 8
    params.n_parallel = 1
    params.cpuparams.n_threads = job["threads"]
    params.n_gpu_layers = 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    return params


def tokenize(server: xllamacpp.Server, text: str) -> list[int]:
    """The tokens of a text, without special tokens at its begin. The server listens on this machine alone."""
    body = json.dumps({"content": text, "add_special": False}).encode()
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize", data=body, headers={"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        return json.load(answer)["tokens"]


def log_probability(value) -> float | None:
    """A log-probability; None for NaN. llama.cpp gives the lowest float32 where the probability underflows."""
    return None if value is None or math.isnan(value) else max(value, -1e9)


def answer(job: dict) -> dict:
    """Generate greedily. End tokens and pieces of characters are not chosen, which changes no log-probability.

    The server gives no log-probabilities for tokens after which its text ends within a character.
    """
    server = xllamacpp.Server(settings(job))
    request = {"prompt": job["prompt"], "n_predict": job["generate"], "n_probs": job["best"]}
    request |= {"temperature": 0, "ignore_eos": True, "logit_bias": [[token, False] for token in job["pieces"]]}
    result = server.handle_completions(request | {"cache_prompt": False})
    result = json.loads(result) if isinstance(result, str) else result
    if "choices" not in result:
        raise RuntimeError(f"llama.cpp answered {json.dumps(result)[:300]}")
    content = result["choices"][0]["logprobs"]["content"]
    return {
        "generated": [token["id"] for token in content],
        "best": [[[top["id"], log_probability(top["logprob"])] for top in token["top_logprobs"]] for token in content],
        "text_tokens": tokenize(server, job["text"]),
    }


if __name__ == "__main__":
    answers = answer(json.load(sys.stdin))
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(answers, file)
