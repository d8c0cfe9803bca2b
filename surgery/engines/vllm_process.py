"""Run a folder in vLLM, as a process of vLLM's environment: `python -P vllm_process.py ANSWERS.json`.

The file is run, never imported by the package. It reads one JSON object from stdin, {"file": folder, "code": whether
the folder's own config class may run, "operations": vLLM's setting custom_ops, "prompt": [ids], "generate": n, "best":
k, "text": ..., "threads": n, "cache_bytes": bytes of all tokens' keys and values}. It writes {"generated": [ids],
"best": [[[id, log-probability or null], ...], ...], "text_tokens": [ids], "cache_bytes": bytes of one token in the
engine's cache} to ANSWERS.json. Weights and cache are float32.
"""

import json
import math
import os
import sys

SPARE = 1.25  # times the bytes of the tokens: the cache is given out in blocks


def cache_gib(job: dict) -> int:
    """The engine's cache in GiB."""
    return max(1, math.ceil(SPARE * job["cache_bytes"] / (1 << 30)))


def answer(job: dict) -> dict:
    """Generate greedily. End tokens are ignored, which changes what is chosen and no log-probability."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=job["file"],
        trust_remote_code=job["code"],
        dtype="float32",
        max_model_len=len(job["prompt"]) + job["generate"],
        max_num_seqs=1,
        kv_cache_memory_bytes=cache_gib(job) << 30,
        max_logprobs=job["best"],
        logprobs_mode="raw_logprobs",
        enforce_eager=True,
        disable_log_stats=True,
        compilation_config={"custom_ops": job["operations"]},
    )
    greedily = SamplingParams(
        temperature=0, max_tokens=job["generate"], logprobs=job["best"], ignore_eos=True, detokenize=False
    )
    (result,) = engine.generate({"prompt_token_ids": job["prompt"]}, greedily, use_tqdm=False)
    made = result.outputs[0]
    rows = [sorted(((i, one.logprob) for i, one in row.items()), key=lambda pair: -pair[1]) for row in made.logprobs]
    text = engine.get_tokenizer()(job["text"], add_special_tokens=False, verbose=False)["input_ids"]
    cache = engine.llm_engine.vllm_config.cache_config
    return {
        "generated": list(made.token_ids),
        "best": [[[i, None if math.isnan(value) else max(value, -1e9)] for i, value in row] for row in rows],
        "text_tokens": list(text),
        "cache_bytes": round((cache_gib(job) << 30) / (cache.num_gpu_blocks * cache.block_size)),
    }


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": str(asked["threads"]),
    }
    answers = answer(asked)
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(answers, file)
