#!/usr/bin/env python3
"""Record FFN inputs and activity of a Hugging Face model with PyTorch hooks, in the format of docs/recording-format.md.

    python3 record_with_transformers.py CHECKPOINT --text FILE.. -o DIR [--tokens N] [--sequence-tokens N] [--layers A..B]

Needs torch, transformers, safetensors and numpy. Knows OPT and Falcon; the model runs in float32. The files are those
that `flashlm-prep record` writes, so that either recorder can feed `flashlm-prep train`. Hidden layers are found by
module name: an FFN is a module with an up projection (`fc1`, `dense_h_to_4h`) whose output goes through a ReLU.
All chosen layers are held in memory: for a large model record a few layers at a time with --layers.
"""
import argparse
import hashlib
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save
from tokenizers import Tokenizer

UP_PROJECTIONS = {"fc1": "fc2", "dense_h_to_4h": "dense_4h_to_h"}
DOCUMENT_MARK = "<|endoftext|>"
F16_MAX = 65504.0


def model_spec(config):
    """The architecture, with a number of layers that are all alike (see "Architecture" in docs/bundle-format.md)."""
    if config["model_type"] == "opt":
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        bias = config.get("enable_bias", True)
        pre_norm = config.get("do_layer_norm_before", True)
        affine = config.get("layer_norm_elementwise_affine", True)
        activation = config.get("activation_function", "relu")
        spec = dict(
            family="opt", vocab_size=config["vocab_size"], hidden_size=hidden,
            embed_size=config.get("word_embed_proj_dim") or hidden, layers=config["num_hidden_layers"],
            max_positions=config["max_position_embeddings"],
            norm=dict(kind="layer_norm", eps=1e-5, weight=affine, bias=affine),
            positions={"learned": {"offset": 2}},
            attention=dict(heads=heads, kv_heads=heads, head_dim=hidden // heads, qkv_bias=bias, out_bias=bias, qk_norm=False),
            block="pre_norm" if pre_norm else "post_norm",
            ffn=dict(size=config["ffn_dim"], activation=activation, gated=False, up_bias=bias, down_bias=bias),
            final_norm=pre_norm and not config.get("_remove_final_layer_norm", False),
            tied_head=config.get("tie_word_embeddings", True), head_bias=False,
            bos=config.get("bos_token_id", 2), eos=[config.get("eos_token_id", 2)])
    elif config["model_type"] in ("falcon", "RefinedWebModel", "RefinedWeb"):
        hidden = config["hidden_size"]
        heads = config.get("num_attention_heads") or config.get("n_head")
        new = config.get("new_decoder_architecture", False)
        parallel = new or config.get("parallel_attn", True)
        if new:
            kv_heads = config.get("num_kv_heads") or config.get("n_head_kv") or heads
        else:
            kv_heads = 1 if config.get("multi_query", True) else heads
        norms = config.get("num_ln_in_parallel_attn") or 2
        block = ("parallel_two_norms" if new and norms == 2 else "parallel_one_norm") if parallel else "pre_norm"
        bias = config.get("bias", False)
        activation = config.get("activation", "gelu")
        theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000.0
        positions = "alibi" if config.get("alibi") else {
            "rotary": {"dims": hidden // heads, "theta": theta, "scaling": None}}
        spec = dict(
            family="falcon", vocab_size=config["vocab_size"], hidden_size=hidden, embed_size=hidden,
            layers=config.get("num_hidden_layers") or config.get("n_layer"),
            max_positions=config.get("max_position_embeddings", 2048),
            norm=dict(kind="layer_norm", eps=config.get("layer_norm_epsilon", 1e-5), weight=True, bias=True),
            positions=positions,
            attention=dict(heads=heads, kv_heads=kv_heads, head_dim=hidden // heads, qkv_bias=bias, out_bias=bias, qk_norm=False),
            block=block,
            ffn=dict(size=config.get("ffn_hidden_size") or 4 * hidden, activation=activation, gated=False, up_bias=bias, down_bias=bias),
            final_norm=True, tied_head=config.get("tie_word_embeddings", True), head_bias=False,
            bos=None, eos=[config.get("eos_token_id", 11)])
    else:
        raise SystemExit(f"model_type {config['model_type']!r}: this script knows opt and falcon")
    if spec["ffn"]["activation"] != "relu":
        raise SystemExit(f"activation {spec['ffn']['activation']!r} is never exactly zero; there is no activity to record")
    return spec


def sequences_of(files, tokenizer, spec, sequence_tokens, budget, seed):
    """Documents (chosen by the seed when there are more than the budget asks for), each after the separator, cut into sequences.

    Returns token ids, start offsets of the sequences with the total at the end, and the document of each token.
    """
    documents = []
    for file in files:
        documents += [d for d in Path(file).read_text().split(f"\n{DOCUMENT_MARK}\n") if d]
    if seed is not None:
        random.Random(seed).shuffle(documents)
    separator = spec["bos"] if spec["bos"] is not None else spec["eos"][0]
    stream, owner = [], []
    for number, text in enumerate(documents):
        ids = [separator] + tokenizer.encode(text, add_special_tokens=False).ids
        stream += ids
        owner += [number] * len(ids)
        if len(stream) >= budget:
            break
    stream, owner = stream[:budget], owner[:budget]
    lead = [] if spec["bos"] is None else [spec["bos"]]
    chunk = sequence_tokens - len(lead)
    tokens, document_of, starts = [], [], []
    for at in range(0, len(stream), chunk):
        starts.append(len(tokens))
        tokens += lead + stream[at:at + chunk]
        document_of += owner[at:at + 1] * len(lead) + owner[at:at + chunk]
    starts.append(len(tokens))
    return np.array(tokens, np.uint32), np.array(starts, np.uint32), np.array(document_of, np.uint32)


class Layer:
    """What is recorded about one FFN."""

    def __init__(self, up, down):
        self.inputs, self.activity, self.magnitudes = [], [], []
        self.down_norms = down.weight.detach().double().norm(dim=0).float().numpy()
        size = up.weight.shape[0]
        self.count, self.sum, self.max = np.zeros(size, np.uint32), np.zeros(size, np.float64), np.zeros(size, np.float32)
        up.register_forward_hook(self.see)

    def see(self, _module, args, output):
        rows = args[0].detach().reshape(-1, args[0].shape[-1])
        activation = output.detach().reshape(-1, output.shape[-1]).relu().numpy()
        active = activation != 0
        self.inputs.append(rows.clamp(-F16_MAX, F16_MAX).to(torch.float16).numpy())
        self.activity.append(np.packbits(active, axis=1, bitorder="little"))
        self.magnitudes.append(np.minimum(activation[active], F16_MAX).astype(np.float16))
        self.count += active.sum(0, dtype=np.uint32)
        self.sum += activation.sum(0, dtype=np.float64)
        self.max = np.maximum(self.max, activation.max(0))

    def tensors(self):
        return {
            "inputs": np.concatenate(self.inputs), "activity": np.concatenate(self.activity),
            "magnitudes": np.concatenate(self.magnitudes), "active_count": self.count,
            "magnitude_mean": (self.sum / np.maximum(self.count, 1)).astype(np.float32),
            "magnitude_max": self.max, "down_norms": self.down_norms,
        }


def publish(path, data):
    """Write a file whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    temporary.rename(path)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--text", nargs="+", required=True, help=f"text files; documents are separated by lines that are exactly {DOCUMENT_MARK}")
    p.add_argument("-o", "--output", type=Path, required=True)
    p.add_argument("--tokens", type=int, default=20000, help="token budget, without the id that begins each sequence [20000]")
    p.add_argument("--sequence-tokens", type=int, help="longest sequence [the model's, at most 2048]")
    p.add_argument("--seed", type=int, help="shuffle the documents first [keep the order]")
    p.add_argument("--layers", help="record only layers A..B (B excluded)")
    a = p.parse_args()
    raw = json.loads((a.checkpoint / "config.json").read_text())
    spec = model_spec(raw)
    tokenizer = Tokenizer.from_file(str(a.checkpoint / "tokenizer.json"))
    length = a.sequence_tokens or min(spec["max_positions"], 2048)
    tokens, starts, documents = sequences_of(a.text, tokenizer, spec, length, a.tokens, a.seed)

    text_hash, weight_hash = hashlib.sha256(), hashlib.sha256((a.checkpoint / "config.json").read_bytes())
    for f in a.text:
        text_hash.update(Path(f).read_bytes())
    for f in sorted(a.checkpoint.glob("*.safetensors")) + sorted(a.checkpoint.glob("*.bin")):
        weight_hash.update(f.read_bytes())
    header = dict(
        format="flashlm-recording", version=1, id="", model=spec, tokens=len(tokens), sequences=len(starts) - 1,
        documents=len(np.unique(documents)), sequence_tokens=length, seed=a.seed,
        checkpoint="sha256:" + weight_hash.hexdigest(), text="sha256:" + text_hash.hexdigest(),
        recorder=f"transformers {transformers.__version__}, torch {torch.__version__}, float32")
    header["id"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode() + tokens.tobytes()).hexdigest()[:32]

    model = transformers.AutoModelForCausalLM.from_pretrained(a.checkpoint, dtype=torch.float32).eval()
    first, last = (int(x) for x in a.layers.split("..")) if a.layers else (0, spec["layers"])
    layers, modules = {}, dict(model.named_modules())
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if leaf in UP_PROJECTIONS:
            number = int(next(part for part in name.split(".") if part.isdigit()))
            if first <= number < last:
                layers[number] = Layer(module, modules[f"{parent}.{UP_PROJECTIONS[leaf]}"])
    with torch.no_grad():
        base = getattr(model, model.base_model_prefix)  # without the head
        for i in range(len(starts) - 1):
            base(input_ids=torch.from_numpy(tokens[starts[i]:starts[i + 1]].astype(np.int64))[None], use_cache=False)
            if sys.stderr.isatty():
                print(f"\rsequence {i + 1} of {len(starts) - 1}", end="", flush=True, file=sys.stderr)

    a.output.mkdir(parents=True, exist_ok=True)
    publish(a.output / "tokens.safetensors", save({"tokens": tokens, "sequences": starts, "documents": documents},
                                                  {"format": "flashlm-recording-tokens", "version": "1", "recording": header["id"]}))
    publish(a.output / "recording.json", (json.dumps(header, indent=2) + "\n").encode())
    for number, layer in sorted(layers.items()):
        t = layer.tensors()
        publish(a.output / f"layer-{number:03d}.safetensors",
                save(t, {"format": "flashlm-recording-layer", "version": "1", "recording": header["id"], "layer": str(number)}))
        active = t["active_count"].sum() / (len(tokens) * spec["ffn"]["size"])
        print(f"layer {number}: {100 * active:.2f} % active, {(t['active_count'] == 0).sum()} of {spec['ffn']['size']} neurons never")


if __name__ == "__main__":
    main()
