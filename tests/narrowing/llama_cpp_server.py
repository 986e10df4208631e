"""Runs a GGUF file in llama.cpp: `llama_cpp_server.py FILE TOKEN_IDS N_TOKENS N_PROBS` prints what it predicts as JSON.

A process of its own: llama.cpp writes its log to standard error, and a file that it cannot load may end the process.
"""

import json
import sys

import xllamacpp

path, tokens, n_tokens, n_probs = sys.argv[1:]
parameters = xllamacpp.CommonParams()
parameters.model.path = path
parameters.n_ctx = 64
parameters.n_parallel = 1
parameters.warmup = False
parameters.cpuparams.n_threads = 1
# float32 throughout: flash attention and the default cache round to float16.
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(parameters)
answer = server.handle_completions(
    {
        "prompt": json.loads(tokens),
        "n_predict": int(n_tokens),
        "n_probs": int(n_probs),
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
)
steps = (answer if isinstance(answer, dict) else json.loads(answer))["choices"][0]["logprobs"]["content"]
print(json.dumps([[step["id"], {p["id"]: p["logprob"] for p in step["top_logprobs"]}] for step in steps]))
