#!/usr/bin/env python3
"""Give a trained OPT or Falcon checkpoint another activation function and continue training it for a while.

    python3 finetune_activation.py CHECKPOINT --activation gelu --text FILE.. -o DIR [--steps N] [--seed N]

Needs torch, transformers, safetensors and tokenizers. Documents in a text are separated by a line <|endoftext|>; the last tenth of
them is held out, and the loss on it is printed before and after. This is how the GELU model of docs/measurements/thresholds.md was made.
Seeded; on another machine or with other threads the weights differ in their last bits.
"""
import argparse
import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

SEQUENCE, BATCH = 256, 8


def documents(paths):
    text = "\n".join(Path(path).read_text() for path in paths)
    return [d.strip("\n") for d in text.split("<|endoftext|>") if d.strip("\n")]


def sequences(tokenizer, docs, first):
    ids = [i for doc in docs for i in [first] + tokenizer.encode(doc, add_special_tokens=False).ids]
    return torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).reshape(-1, SEQUENCE)


@torch.no_grad()
def perplexity(model, held_out):
    model.eval()
    losses = [model(input_ids=rows, labels=rows).loss.item() for rows in held_out[:64].split(BATCH)]
    model.train()
    return torch.tensor(losses).mean().exp().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--activation", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    # The directory is copied, and its configuration changed: the weights are read under the new activation.
    shutil.copytree(args.checkpoint, args.output, dirs_exist_ok=True, copy_function=shutil.copyfile)
    config = json.loads((args.output / "config.json").read_text())
    key = "activation" if "activation" in config else "activation_function"
    config[key] = args.activation
    (args.output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    tokenizer = Tokenizer.from_file(str(args.output / "tokenizer.json"))
    docs = documents(args.text)
    cut = max(1, len(docs) // 10)
    first = config.get("bos_token_id", 2)
    train, held_out = (sequences(tokenizer, part, first) for part in (docs[:-cut], docs[-cut:]))
    model = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    print(f"{train.numel()} tokens to train on, {held_out.numel()} held out; perplexity {perplexity(model, held_out):.3f} before", flush=True)

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)],
                                  lr=args.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 20, max(0.03, 1 - s / args.steps)))
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(args.steps):
        rows = train[torch.randint(len(train), (BATCH,), generator=generator)]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, held-out perplexity {perplexity(model, held_out):.3f}", flush=True)
    # Only the weights are new: the files beside them, as published, stay as they are.
    half = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float16)
    half.load_state_dict({name: tensor.half() for name, tensor in model.state_dict().items()})
    half.save_pretrained(args.output / "half")
    (args.output / "half/model.safetensors").replace(args.output / "model.safetensors")
    shutil.rmtree(args.output / "half")


if __name__ == "__main__":
    main()
