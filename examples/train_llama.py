#!/usr/bin/env python3
"""Train a small Llama (gated FFN, grouped queries) from random weights on texts, for a given time.

    python3 train_llama.py --tokenizer CHECKPOINT --text FILE.. --held-out FILE -o DIR [--activation silu] [--minutes 25]

Needs torch, transformers, safetensors and tokenizers. The tokenizer's files are taken from another checkpoint. Documents in a text are
separated by a line <|endoftext|>; each file given to --text has the same share of the training, however long it is. This is how the
models of docs/measurements/gated.md were made. As it stops by processor time, no two runs give the same weights.
"""
import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

SEQUENCE, BATCH, LEARNING_RATE = 256, 8, 2e-3
WARM_UP, DECAY_FROM = 0.02, 0.6  # shares of the time


def rows(tokenizer, path, first, limit):
    """The documents of a file, one after another, cut into sequences of ids."""
    text = Path(path).read_text()[:limit]
    docs = [d.strip("\n") for d in text.split("<|endoftext|>") if d.strip("\n")]
    ids = [i for e in tokenizer.encode_batch(docs, add_special_tokens=False) for i in [first] + e.ids]
    return torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).reshape(-1, SEQUENCE)


@torch.no_grad()
def perplexity(model, held_out):
    losses = [model(input_ids=part, labels=part).loss.item() for part in held_out[:48].split(BATCH)]
    return torch.tensor(losses).mean().exp().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--activation", default="silu")
    parser.add_argument("--hidden", type=int, default=192, help="a multiple of 64")
    parser.add_argument("--ffn", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=25, help="processor minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    published = json.loads((args.tokenizer / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    first = published["bos_token_id"]
    parts = [rows(tokenizer, path, first, 8_000_000) for path in args.text]
    held_out = rows(tokenizer, args.held_out, first, 1_000_000)
    print(f"{[p.numel() for p in parts]} tokens to train on, {held_out.numel()} held out", flush=True)

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=published["vocab_size"], hidden_size=args.hidden, intermediate_size=args.ffn, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32, num_key_value_heads=2, hidden_act=args.activation, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=first, eos_token_id=published["eos_token_id"]))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)],
                                  lr=LEARNING_RATE, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(args.seed)
    begin, step = time.process_time(), 0
    while (share := (time.process_time() - begin) / (60 * args.minutes)) < 1:
        rate = min(1, (share + 1e-3) / WARM_UP, max(0.03, (1 - share) / (1 - DECAY_FROM)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        which = torch.arange(BATCH) % len(parts)
        batch = torch.stack([parts[w][torch.randint(len(parts[w]), (1,), generator=generator)[0]] for w in which])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {100 * share:.0f} %: loss {loss.item():.3f}, held-out perplexity {perplexity(model, held_out):.3f}", flush=True)
    print(f"{step} steps of {BATCH} x {SEQUENCE} tokens; held-out perplexity {perplexity(model, held_out):.3f}")

    model.half().save_pretrained(args.output)
    for name in ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]:
        if (args.tokenizer / name).exists():
            shutil.copyfile(args.tokenizer / name, args.output / name)


if __name__ == "__main__":
    main()
