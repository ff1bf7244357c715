#!/usr/bin/env python3
"""Reads what flashlm writes, with numpy alone: recordings, predictors, storage orders and bundles.

    python3 flashlm_read.py PATH..

prints a summary of each path: a recording, what `train` or `order` wrote, or a bundle. Where a recording comes before
predictors, these are judged on the tokens that it holds out, as `train` judges them.

The formats: docs/recording-format.md, docs/predictors.md, docs/ordering.md, docs/bundle-format.md. Checksums are not checked.
"""
import json
import struct
import sys
from pathlib import Path

import numpy as np

TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1", "I8": "i1"}
SECTIONS = ["manifest", "tokenizer", "resident", "predictors", "index", "flash"]


def safetensors(data):
    """The tensors of a safetensors file by name; bf16 becomes f32."""
    (length,) = struct.unpack_from("<Q", data)
    tensors = json.loads(bytes(data[8:8 + length]))
    tensors.pop("__metadata__", None)
    for name, entry in tensors.items():
        (start, end), kind = entry["data_offsets"], np.dtype(TYPES[entry["dtype"]])
        values = np.frombuffer(data, kind, (end - start) // kind.itemsize, 8 + length + start)
        if entry["dtype"] == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def file(path):
    return safetensors(np.memmap(path, np.uint8, "r"))


def int4(half_bytes, scales, columns):
    """Integers of four bits, in blocks of 16 bytes with 32 elements, times a scale for each group of 64."""
    blocks = half_bytes.reshape(len(half_bytes), -1, 16)
    values = np.concatenate([blocks & 15, blocks >> 4], axis=2).reshape(len(half_bytes), -1)[:, :columns]
    return ((values ^ 8).astype(np.float32) - 8) * np.repeat(scales, 64, axis=1)[:, :columns]


def scores(tensors, inputs, neurons, prefix=""):
    """Scores [tokens, neurons] of a predictor for inputs [tokens, hidden]; a neuron is predicted where its score is above zero."""
    def matrix(name, columns):
        values, scale = tensors[prefix + name], tensors.get(f"{prefix}{name}_scale")
        if values.dtype == np.uint8:
            return int4(values, scale, columns)
        return values.astype(np.float32) * (1 if scale is None else scale[:, None])

    x = inputs.astype(np.float32)
    if prefix + "encoder" in tensors:
        x = x @ matrix("encoder", x.shape[1]).T
        x = np.maximum(x, 0) if prefix + "encoder_relu" in tensors else x
    of_rows = x @ matrix("decoder", x.shape[1]).T + tensors[prefix + "bias"]
    found = np.full((len(x), neurons), -np.inf, np.float32)
    found[:, tensors.get(prefix + "rows", np.arange(neurons))] = of_rows
    return found


def active(layer):
    """Which neurons fired, [tokens, neurons], of a recording's layer."""
    return np.unpackbits(layer["activity"], axis=1, count=len(layer["active_count"]), bitorder="little").astype(bool)


def recording(path):
    """recording.json, the tokens, which of them are held out, and the layers by number (read when they are used)."""
    info, tokens = json.loads((path / "recording.json").read_text()), file(path / "tokens.safetensors")
    held_out = np.isin(tokens["documents"], tokens.get("held_out", []))
    return info, tokens, held_out, {int(p.stem[6:]): file(p) for p in sorted(path.glob("layer-*.safetensors"))}


def rates(chosen, fired):
    """Missed / active and false alarms / inactive."""
    return (fired & ~chosen).sum() / max(fired.sum(), 1), (chosen & ~fired).sum() / max((~fired).sum(), 1)


def bundle(path):
    """Manifest, sections by name, storage order of each layer, and where each layer's groups begin."""
    data = np.memmap(path, np.uint8, "r")
    entries = np.frombuffer(data, "<u8", 18, 24).reshape(6, 3)
    sections = {name: data[int(at):int(at + length)] for name, (at, length, _) in zip(SECTIONS, entries)}
    layers, neurons, groups, _ = struct.unpack_from("<4I", sections["index"])
    bases, orders, at = [], [], 16
    for _ in range(layers):
        bases += struct.unpack_from("<Q", sections["index"], at)
        orders.append(np.frombuffer(sections["index"], "<u4", neurons, at + 8))
        at += 8 + (4 * neurons + 7) // 8 * 8 + 8 * groups
    return json.loads(bytes(sections["manifest"])), sections, orders, bases


def record(path, layer, position):
    """The rows of the neuron at a position of a layer's storage order: [gate,] up, down. Not of quantised records."""
    manifest, _, _, bases = bundle(path)
    ffn, hidden = manifest["ffn"], manifest["model"]["hidden_size"]
    group, within = divmod(position, ffn["records_per_group"])
    at = bases[layer] + group * ffn["group_bytes"] + within * ffn["record_bytes"]
    kind = np.dtype(TYPES[ffn["dtype"].upper()])
    values = np.memmap(path, kind, "r", at, ffn["record_bytes"] // kind.itemsize)
    return ((values.astype("<u4") << 16).view("<f4") if ffn["dtype"] == "bf16" else values).reshape(-1, hidden)


def main(paths):
    recorded = None
    for path in map(Path, paths):
        print(path)
        if path.is_file():
            manifest, sections, orders, _ = bundle(path)
            model, ffn = manifest["model"], manifest["ffn"]
            print(f"  bundle of {model['family']}: {len(orders)} layers of {len(orders[0])} neurons, {ffn['dtype']}, "
                  f"{ffn['order']} order, {len(safetensors(sections['resident']))} resident tensors")
            for layer, order in enumerate(orders):
                length = "" if "/" in ffn["dtype"] else \
                    f", down vector of the first {np.linalg.norm(record(path, layer, 0)[-1].astype(float)):.4f} long"
                print(f"  layer {layer}: order {' '.join(map(str, order[:4]))} ..{length}")
        elif (path / "recording.json").exists():
            recorded = recording(path)
            info, _, held_out, layers = recorded
            print(f"  recording of {info['model']['family']}: {info['tokens']} tokens, {held_out.sum()} held out")
            for number, layer in layers.items():
                print(f"  layer {number}: {100 * active(layer).mean():.3f} % active")
        elif (path / "predictors.json").exists():
            for stored in json.loads((path / "predictors.json").read_text())["layers"]:
                number, judged = stored["layer"], ""
                if recorded and number in recorded[3]:
                    _, _, held_out, layers = recorded
                    fired = active(layers[number])[held_out]
                    tensors = file(path / f"predictor-{number:03}.safetensors")
                    chosen = scores(tensors, layers[number]["inputs"][held_out], fired.shape[1]) > 0
                    judged = ": misses {:.3f} %, false alarms {:.3f} %".format(*(100 * r for r in rates(chosen, fired)))
                print(f"  layer {number}: rank {stored['rank']}, {stored['dtype']}{judged}")
        else:
            for at in sorted(path.glob("layer-*.order.safetensors")):
                order = file(at)["order"]
                whole = "every neuron once" if (np.sort(order) == np.arange(len(order))).all() else "not a permutation"
                print(f"  layer {int(at.stem[6:9])}: order {' '.join(map(str, order[:4]))} .., {whole}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
