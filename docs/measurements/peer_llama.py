"""llama.cpp beside flashlm: converts a GGUF, and times a prompt and tokens one by one with its own library.

    pip install llama-cpp-python        # builds llama.cpp for the machine at hand
    python peer_llama.py convert MODEL.gguf f16|q8_0|q4_0 OUT.gguf
    python peer_llama.py time MODEL.gguf [--prompt 128] [--tokens 64] [--threads 2] [--mmap]

Ids are seeded random ones, as `flashlm bench` takes without --text; every token is fed from that list, never the model's own
choice, so both programs compute the same sequence. Prints one JSON object.
"""

import argparse
import ctypes
import json
import random
import statistics
import time

import llama_cpp as llama

FTYPES = {"f16": 1, "q8_0": 7, "q4_0": 2}


def convert(args):
    params = llama.llama_model_quantize_default_params()
    params.ftype = FTYPES[args.kind]
    params.allow_requantize = True
    code = llama.llama_model_quantize(args.model.encode(), args.out.encode(), ctypes.byref(params))
    if code != 0:
        raise SystemExit(f"llama_model_quantize: {code}")


def batch_of(ids, first):
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i] = token, first + i
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.logits[i] = int(i + 1 == len(ids))
    return batch


def measure(args):
    llama.llama_backend_init()
    model_params = llama.llama_model_default_params()
    model_params.use_mmap = args.mmap
    model_params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(args.model.encode(), model_params)
    context_params = llama.llama_context_default_params()
    context_params.n_ctx = args.prompt + args.tokens + 8
    context_params.n_batch = context_params.n_ubatch = max(args.prompt, 1)
    context_params.n_threads = context_params.n_threads_batch = args.threads
    context = llama.llama_init_from_model(model, context_params)
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    draw = random.Random(1)
    ids = [draw.randrange(vocab) for _ in range(args.prompt + args.tokens)]

    def decode(part, first):
        batch = batch_of(part, first)
        begin = time.perf_counter()
        code = llama.llama_decode(context, batch)
        # The logits are there when they can be read.
        llama.llama_get_logits_ith(context, -1)[0]
        took = time.perf_counter() - begin
        llama.llama_batch_free(batch)
        if code != 0:
            raise SystemExit(f"llama_decode: {code}")
        return 1e3 * took

    decode(ids[: args.prompt], 0)
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    prompt = decode(ids[: args.prompt], 0)
    times = [decode([ids[at]], at) for at in range(args.prompt, args.prompt + args.tokens)][1:]
    times.sort()
    print(json.dumps({
        "version": llama.__version__,
        "model": args.model,
        "prompt_ms": prompt,
        "ms_per_token": statistics.median(times),
        "p99": times[int(0.99 * len(times))],
    }))


parser = argparse.ArgumentParser()
commands = parser.add_subparsers(required=True)
one = commands.add_parser("convert")
one.add_argument("model")
one.add_argument("kind", choices=FTYPES)
one.add_argument("out")
one.set_defaults(run=convert)
one = commands.add_parser("time")
one.add_argument("model")
one.add_argument("--prompt", type=int, default=128)
one.add_argument("--tokens", type=int, default=64)
one.add_argument("--threads", type=int, default=2)
one.add_argument("--mmap", action="store_true")
one.set_defaults(run=measure)
arguments = parser.parse_args()
arguments.run(arguments)
