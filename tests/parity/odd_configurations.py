#!/usr/bin/env python3
"""Odd configurations of every family: random miniatures, and their logits in flashlm against those of transformers.

    python odd_configurations.py SCRATCH --bin target/release [--table parity.md] [--keep DIR] [NAME ..]

(needs torch, transformers 5, safetensors). Each miniature is written to SCRATCH/NAME as a checkpoint, converted with
`flashlm-prep convert`, and asked with `flashlm logits --kv f32` for prompts of 1, 7, 33 and 130 ids; the reference is
transformers' forward pass in float32 from the same stored weights, with SDPA attention (the eager path applies Falcon's ALiBi
twice). Where a prompt is longer than a sliding window or the positions, transformers' answer is not compared: flashlm must
refuse, with the limit in its words. --table writes a table in Markdown; --keep copies checkpoint and reference (of 33 ids, or
of 7 where 33 are too many) to a directory, for tests/fixtures/odd.

A configuration is what stands in config.json; `_stored` is the type of the stored weights, `_rename` renames tensors in the
file, `_limit` is the longest prompt that flashlm may take.
"""
import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

PROMPTS = [1, 7, 33, 130]

OPT = dict(model_type="opt", vocab_size=97, hidden_size=52, num_hidden_layers=2, num_attention_heads=4, ffn_dim=75,
           max_position_embeddings=160)
FALCON = dict(model_type="falcon", vocab_size=101, hidden_size=60, num_hidden_layers=2, num_attention_heads=6,
              max_position_embeddings=256, activation="relu")
GROUPED = dict(FALCON, new_decoder_architecture=True, num_kv_heads=3)
LLAMA = dict(model_type="llama", vocab_size=103, hidden_size=42, intermediate_size=59, num_hidden_layers=2, num_attention_heads=3,
             max_position_embeddings=256)
MISTRAL = dict(model_type="mistral", vocab_size=103, hidden_size=48, intermediate_size=61, num_hidden_layers=2,
               num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256)
QWEN = dict(MISTRAL, model_type="qwen2", num_hidden_layers=3)
PERSIMMON = dict(model_type="persimmon", vocab_size=107, hidden_size=60, intermediate_size=77, num_hidden_layers=2,
                 num_attention_heads=3, max_position_embeddings=256)
PHI = dict(model_type="phi", vocab_size=109, hidden_size=60, intermediate_size=83, num_hidden_layers=2, num_attention_heads=5,
           max_position_embeddings=256)
NEOX = dict(model_type="gpt_neox", vocab_size=113, hidden_size=72, intermediate_size=67, num_hidden_layers=2,
            num_attention_heads=3, max_position_embeddings=256)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


def linear(factor, **more):
    return dict(rope_type="linear", factor=factor, **more)


CONFIGURATIONS = {
    "opt-13-wide-heads": OPT,
    "opt-one-head": dict(OPT, num_attention_heads=1, hidden_size=33, num_hidden_layers=1),
    "opt-widths-of-one": dict(OPT, num_attention_heads=26, ffn_dim=7, activation_function="gelu"),
    "opt-projection-in-pre-norm": dict(OPT, word_embed_proj_dim=20, _stored="float32"),
    "opt-projection-wider-than-model": dict(OPT, word_embed_proj_dim=90),
    "opt-post-norm": dict(OPT, do_layer_norm_before=False, activation_function="silu"),
    "opt-post-norm-projection-untied": dict(OPT, do_layer_norm_before=False, word_embed_proj_dim=31, tie_word_embeddings=False),
    "opt-no-bias-affine": dict(OPT, enable_bias=False, _stored="bfloat16"),
    "opt-bias-no-affine": dict(OPT, layer_norm_elementwise_affine=False, activation_function="gelu_new"),
    "opt-post-norm-no-affine-no-bias": dict(OPT, do_layer_norm_before=False, enable_bias=False, layer_norm_elementwise_affine=False),
    "opt-no-final-norm-untied": dict(OPT, _remove_final_layer_norm=True, tie_word_embeddings=False, activation_function="relu2"),
    "opt-positions-end-at-40": dict(OPT, max_position_embeddings=40, _limit=40),
    "opt-behind-module": dict(OPT, _rename=[("^", "module.")]),
    "falcon-multi-query-bias": dict(FALCON, bias=True, activation="gelu"),
    "falcon-one-group": dict(GROUPED, num_kv_heads=1),
    "falcon-groups-of-two": GROUPED,
    "falcon-groups-of-one": dict(GROUPED, num_kv_heads=6, activation="silu", bias=True),
    "falcon-kv-heads-unsaid": {**{k: v for k, v in GROUPED.items() if k != "num_kv_heads"}, "_stored": "float32"},
    "falcon-grouped-one-norm-untied": dict(GROUPED, num_ln_in_parallel_attn=1, tie_word_embeddings=False),
    "falcon-alibi-6-parallel": dict(FALCON, alibi=True),
    "falcon-alibi-grouped": dict(GROUPED, alibi=True, bias=True),
    "falcon-alibi-sequential-per-head": dict(FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True, num_attention_heads=5),
    "falcon-sequential-rotary": dict(FALCON, parallel_attn=False),
    "falcon-per-head-sequential": dict(FALCON, multi_query=False, parallel_attn=False, ffn_hidden_size=49),
    "falcon-linear-rope": dict(FALCON, rope_scaling=dict(type="linear", factor=3.0)),
    "falcon-llama3-top-original": dict(GROUPED, rope_scaling=dict(LLAMA3, original_max_position_embeddings=200), original_max_position_embeddings=32, num_hidden_layers=1),
    "falcon-theta-in-parameters": dict(FALCON, rope_theta=77.0, rope_parameters=dict(rope_type="default", rope_theta=123456.0)),
    "falcon-residual-key-ignored": dict(FALCON, apply_residual_connection_post_layernorm=True, n_head=2, n_layer=9),
    "falcon-epsilon-0": dict(FALCON, layer_norm_epsilon=0.0),
    "llama-three-heads": LLAMA,
    "llama-head-dim-6": dict(LLAMA, head_dim=6, _stored="float32"),
    "llama-head-dim-20-one-key-head": dict(LLAMA, head_dim=20, num_key_value_heads=1),
    "llama-head-dim-2": dict(LLAMA, head_dim=2, hidden_act="relu"),
    "llama-all-biases-tied": dict(LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, hidden_act="gelu"),
    "llama-attention-bias": dict(LLAMA, attention_bias=True, hidden_act="relu2", num_hidden_layers=1),
    "llama-epsilon-0": dict(LLAMA, rms_norm_eps=0.0),
    "llama-epsilon-large": dict(LLAMA, rms_norm_eps=0.5, hidden_act="gelu_pytorch_tanh"),
    "llama-linear-rope": dict(LLAMA, rope_scaling=dict(type="linear", factor=2.5)),
    "llama-linear-rope-5": dict(LLAMA, rope_parameters=linear(1.5, rope_theta=500.0), rope_theta=3.0),
    "llama-llama3-top-original": dict(LLAMA, rope_parameters=dict(LLAMA3, original_max_position_embeddings=128), original_max_position_embeddings=24, num_hidden_layers=1),
    "llama-llama3-original-unsaid": dict(LLAMA, rope_scaling=LLAMA3, head_dim=16),
    "llama-llama3-crossed-factors": dict(LLAMA, rope_scaling=dict(LLAMA3, low_freq_factor=4.0, high_freq_factor=1.5, original_max_position_embeddings=40), head_dim=16),
    "llama-both-rope-objects": dict(LLAMA, rope_scaling=linear(4.0), rope_parameters=dict(rope_type="default", rope_theta=9.0)),
    "llama-dynamic-rope": dict(LLAMA, rope_scaling=dict(type="dynamic", factor=2.0)),
    "llama-partial-without-effect": dict(LLAMA, partial_rotary_factor=0.5),
    "llama-window-without-effect": dict(LLAMA, sliding_window=16, use_sliding_window=True),
    "llama-behind-base-model-model": dict(LLAMA, _rename=[("^", "base_model.model.")]),
    "llama-head-called-embed-out": dict(LLAMA, _rename=[("^lm_head", "embed_out")]),
    "mistral-window-16": dict(MISTRAL, sliding_window=16, _limit=16),
    "mistral-window-64-head-dim": dict(MISTRAL, sliding_window=64, head_dim=10, _limit=64),
    "mistral-window-200": dict(MISTRAL, sliding_window=200, hidden_act="relu"),
    "mistral-no-window": dict(MISTRAL, sliding_window=None, tie_word_embeddings=True),
    "mistral-window-unsaid": dict(MISTRAL, num_key_value_heads=3, _stored="float32"),
    "mistral-switch-ignored": dict(MISTRAL, sliding_window=16, use_sliding_window=False, max_window_layers=0, _limit=16, num_hidden_layers=1),
    "mistral-biases-ignored": dict(MISTRAL, sliding_window=None, attention_bias=True, mlp_bias=True),
    "qwen2-window-off": dict(QWEN, sliding_window=16, use_sliding_window=False, max_window_layers=0),
    "qwen2-no-layer-slides": dict(QWEN, sliding_window=16, use_sliding_window=True, max_window_layers=3),
    "qwen2-last-layer-slides": dict(QWEN, sliding_window=16, use_sliding_window=True, max_window_layers=2, _limit=16),
    "qwen2-layer-types-slide": dict(QWEN, sliding_window=48, use_sliding_window=True, layer_types=["sliding_attention", "full_attention", "full_attention"], _limit=48),
    "qwen2-layer-types-full": dict(QWEN, sliding_window=16, use_sliding_window=True, max_window_layers=0, layer_types=["full_attention"] * 3),
    "qwen2-biases-ignored": dict(QWEN, attention_bias=False, mlp_bias=True, tie_word_embeddings=True, hidden_act="relu"),
    "qwen2-head-dim-llama3": dict(QWEN, head_dim=12, rope_scaling=dict(LLAMA3, original_max_position_embeddings=64), _stored="float32"),
    "persimmon-theta-unsaid": dict(PERSIMMON, num_hidden_layers=1),
    "persimmon-without-norms-quarter": dict(PERSIMMON, qk_layernorm=False, partial_rotary_factor=0.2, hidden_act="relu"),
    "persimmon-whole-heads": dict(PERSIMMON, partial_rotary_factor=1.0, hidden_act="gelu", tie_word_embeddings=True),
    "persimmon-linear-rope": dict(PERSIMMON, rope_scaling=linear(2.0), rope_theta=25000.0),
    "persimmon-share-in-parameters": dict(PERSIMMON, partial_rotary_factor=0.9, rope_parameters=dict(rope_type="default", partial_rotary_factor=0.3)),
    "persimmon-llama3": dict(PERSIMMON, rope_scaling=LLAMA3, original_max_position_embeddings=50, layer_norm_eps=0.0, _stored="float32"),
    "phi-plain": PHI,
    "phi-head-dim-20": dict(PHI, head_dim=20, hidden_act="relu", num_hidden_layers=1),
    "phi-one-key-head": dict(PHI, num_key_value_heads=1, partial_rotary_factor=0.34),
    "phi-norms": dict(PHI, qk_layernorm=True, partial_rotary_factor=1.0, _stored="float32"),
    "phi-tied": dict(PHI, tie_word_embeddings=True, hidden_act="silu", layer_norm_eps=0.1),
    "phi-linear-rope": dict(PHI, rope_scaling=linear(4.0), rope_theta=321.0),
    "phi-foreign-keys": dict(PHI, attention_bias=False, rotary_dim=2, mlp_bias=False, sliding_window=16),
    "neox-quarter": NEOX,
    "neox-head-dim-widens-the-rotated-part": dict(NEOX, head_dim=48, num_hidden_layers=1),
    "neox-head-dim-narrows-it": dict(NEOX, head_dim=16, rotary_pct=0.5),
    "neox-whole-heads-sequential": dict(NEOX, rotary_pct=1.0, use_parallel_residual=False, hidden_act="gelu_fast"),
    "neox-without-attention-biases": dict(NEOX, attention_bias=False, rotary_pct=0.5, rotary_emb_base=200, _stored="float32"),
    "neox-tied-linear": dict(NEOX, tie_word_embeddings=True, rope_scaling=linear(2.0), rope_theta=3.0, hidden_act="relu"),
    "neox-theta-in-parameters": dict(NEOX, rotary_pct=0.9, rope_parameters=dict(rope_type="default", rope_theta=50.0, partial_rotary_factor=0.5)),
    "neox-head-called-lm-head": dict(NEOX, _rename=[("^embed_out", "lm_head")]),
    "neox-llama3-top-original": dict(NEOX, rotary_pct=1.0, rope_scaling=LLAMA3, original_max_position_embeddings=20),
}
TOKENIZER = dict(version="1.0", truncation=None, padding=None, added_tokens=[], normalizer=None, pre_tokenizer=None,
                 post_processor=None, decoder=None, model=dict(type="WordLevel", vocab={"a": 0, "b": 1, "c": 2}, unk_token="a"))


def make(name, given, scratch):
    """Write the checkpoint and give transformers' model of the stored weights."""
    ours = {key: given[key] for key in given if key.startswith("_") and key != "_remove_final_layer_norm"}
    config = {key: given[key] for key in given if key not in ours} | dict(bos_token_id=1, eos_token_id=2)
    torch.manual_seed(sum(name.encode()))
    # transformers changes the objects that it is given.
    made = CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="sdpa").eval()
    stored = getattr(torch, ours.get("_stored", "float16"))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and key.endswith("weight")
            parameter.normal_(1.0 if is_norm else 0.0, 0.2)
            parameter.copy_(parameter.to(stored).float())
    directory = scratch / name
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    tensors = {key: value.to(stored) for key, value in load_file(directory / "model.safetensors").items()}
    for pattern, new in ours.get("_rename", []):
        tensors = {re.sub(pattern, new, key): value for key, value in tensors.items()}
    for file in directory.iterdir():
        file.unlink()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return model, ours


@torch.no_grad()
def compare(name, given, scratch, bins):
    model, ours = make(name, given, scratch)
    directory, bundle, out = scratch / name, scratch / "model.flashlm", scratch / "out.safetensors"
    bundle.unlink(missing_ok=True)
    made = subprocess.run([bins / "flashlm-prep", "convert", directory, "-o", bundle], capture_output=True, text=True)
    if made.returncode:
        return [f"not converted: {made.stderr.strip()}"], None, []
    row, faults, kept = [], [], None
    for length in PROMPTS:
        ids = torch.randint(0, given["vocab_size"], (length,), generator=torch.Generator().manual_seed(length))
        out.unlink(missing_ok=True)
        command = [bins / "flashlm", "logits", bundle, "--kv", "f32", "--ids", ",".join(map(str, ids.tolist())), "-o", out]
        asked = subprocess.run(command, capture_output=True, text=True)
        limit = ours.get("_limit", 1 << 30)
        if length > limit:
            said = str(limit) in asked.stderr and asked.returncode != 0 and not out.exists()
            row.append("refused" if said else "NOT refused")
            faults += [] if said else [f"{length} ids: not refused by name: {asked.stderr.strip()[:200]}"]
            continue
        if asked.returncode:
            row.append("failed")
            faults.append(f"{length} ids: {asked.stderr.strip()[:300]}")
            continue
        expected = model(ids[None], use_cache=False).logits[0]
        difference = (load_file(out)["logits"] - expected).abs().max().item()
        row.append(f"{difference:.1e}")
        if not difference < 1e-4:
            faults.append(f"{length} ids: logits differ by {difference}, the largest is {expected.abs().max().item()}")
        if length <= 33:
            kept = dict(ids=ids, logits=expected.contiguous())
    return faults, kept, row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    args.scratch.mkdir(parents=True, exist_ok=True)
    lines, bad = [], 0
    for name in args.names or CONFIGURATIONS:
        faults, kept, row = compare(name, CONFIGURATIONS[name], args.scratch, args.bin.resolve())
        print(name, *row, *faults, sep="  ", flush=True)
        lines.append(f"| {name} | {' | '.join(row)} |")
        bad += bool(faults)
        if args.keep and kept:
            target = args.keep / name
            target.mkdir(parents=True, exist_ok=True)
            for file in ("config.json", "model.safetensors"):
                shutil.copy(args.scratch / name / file, target / file)
            save_file(kept, target / "golden.safetensors")
    print(f"{len(lines)} configurations, {bad} with faults; torch {torch.__version__}, transformers {transformers.__version__}")
    if args.table:
        head = ["| configuration | " + " | ".join(f"{n} ids" for n in PROMPTS) + " |", "|---" * (1 + len(PROMPTS)) + "|"]
        args.table.write_text("\n".join(head + lines) + "\n")
    sys.exit(1 if bad else 0)


main()
