#!/usr/bin/env python3
"""Recomputes what `analyze`, `order`, `train` and `report` say of a recording, from the files and with numpy alone.

    python3 recompute.py RECORDING analyze=FILE.json order=DIR train=DIR printed=TRAIN.txt report=DIR ..

FILE.json is the output of `analyze --json`, TRAIN.txt what the `train` before it printed, report=DIR what `report --data` wrote
with the last orders and predictors named before. Every number in there must be one that is recomputed here. Exits with 1 where
one differs.
"""
import json
import re
import sys
from pathlib import Path

import numpy as np

from measures import (DEFAULT_POLICY, REQUEST_BYTES, Recorded, compare, compared, counted, files, gap_bytes, replay, reuse, sets_of,
                      share, wrong)
from charts import report

def activity(active, spans):
    tokens, neurons = active.shape
    uses = np.sort(active.sum(axis=0))[::-1]
    ranks = [max(-(-neurons * p // 100), 1) for p in (1, 5, 10, 20, 50)]
    return {"neurons": neurons, "tokens": tokens, "active_fraction": active.mean(),
            "active_p99": np.sort(active.sum(axis=1))[tokens * 99 // 100], "never_active": (uses == 0).sum(),
            "hottest_share": [share(uses[:rank].sum(), uses.sum()) for rank in ranks],
            "rate_at_rank": [uses[rank - 1] / tokens for rank in ranks], "windows": reuse(active, spans, 8)}


def pairs(active):
    """Every neuron's strongest partner, -1 where it has none; uses; and the report on both."""
    tokens, neurons = active.shape
    step = max(-(-int((active.sum(axis=1).astype(int) ** 2).sum()) // (1_000_000 * neurons)), 1)
    counted = active[::step].astype(np.float32)
    together = counted.T @ counted
    uses = together.diagonal().copy()
    np.fill_diagonal(together, 0)
    partner = np.where(together.max(axis=1) > 0, together.argmax(axis=1), -1)
    own = np.flatnonzero(partner >= 0)
    strongest = np.mean(together[own, partner[own]] / uses[own].astype(float)) if len(own) else 0
    rate = np.mean(uses[partner[own]].astype(float) / len(counted)) if len(own) else 0
    return partner, uses, {"token_step": step, "strongest_partner": strongest, "strongest_partner_rate": rate}


def partner_copies(active, partner, uses, window=4):
    """Records stored with a copy of the closest partner's, read rarest first, with a window of tokens cached."""
    tokens, neurons = active.shape
    followers = np.bincount(partner[partner >= 0], minlength=neurons)
    by_heat = np.lexsort((np.arange(neurons), -uses))
    rank = np.argsort(by_heat)
    last, copies_of = np.full(neurons, -window - 1), np.zeros(neurons, int)
    missed = reads = copies = wanted = useful = with_partner = 0
    for token in range(tokens):
        here = active[token]
        own = np.flatnonzero(here)
        with_partner += (here[partner[own]] & (partner[own] >= 0)).sum()
        missing = own[last[own] + window < token]
        fetched = set()
        for neuron in missing[np.argsort(-rank[missing])]:
            if neuron in fetched:
                continue
            fetched.add(neuron)
            reads += 1
            other = partner[neuron]
            if other >= 0:
                copies, copies_of[other] = copies + 1, copies_of[other] + 1
                wanted += here[other]
                useful += here[other] and last[other] + window < token and other not in fetched
                fetched.add(other)
        missed += len(missing)
        last[own] = token
    return {"with_partner": (partner >= 0).sum(), "partners": (followers > 0).sum(), "most_popular_of": followers.max(),
            "hottest_share": share(followers[by_heat[:-(-neurons // 100)]].sum(), (partner >= 0).sum()),
            "partner_active": share(with_partner, active.sum()), "copies_wanted": share(wanted, copies),
            "copies_useful": share(useful, copies), "most_read_copy_per_token": copies_of.max() / tokens,
            "reads_factor": share(reads, missed), "bytes_factor": share(2 * reads, missed)}


def analyze(recorded, said):
    layers = []
    for entry in said["layers"]:
        active = recorded.fired[entry["layer"]]
        partner, uses, report = pairs(active)
        sets, neurons = sets_of(active)
        warm_up, caches = len(sets) // 20, []
        needed = sum(map(len, sets[warm_up:]))
        for cache in entry["caches"]:
            slots = neurons * cache["percent_of_layer"] // 100
            missed = sum(map(len, replay(sets, neurons, cache["policy"], slots)[warm_up:]))
            caches.append(cache | {"missed_per_token": missed / (len(sets) - warm_up), "hit_rate": 1 - share(missed, needed)})
        layers.append({"layer": entry["layer"], "activity": activity(active, recorded.sequences()), "pairs": report,
                       "partners": partner_copies(active, partner, uses), "caches": caches})
    compare("analyze", said, {"recording": recorded.info["id"], "tokens": recorded.count, "layers": layers})


def policy(active):
    """The half-life that a layer's cache gets: the best of a few over three sizes, where it misses 1 % less than the default."""
    sets, neurons = sets_of(active[-4096:])
    warm_up = len(sets) // 2
    needed = sum(map(len, sets[warm_up:]))

    def missed(name):
        of_size = lambda size: sum(map(len, replay(sets, neurons, name, neurons * size // 1000)[warm_up:]))
        return sum(share(of_size(size), max(needed, 1)) for size in (100, 250, 500))
    found = {name: missed(name) for name in (f"lfu:{half_life}" for half_life in (4, 8, 16, 32, 128, 256, 1024))}
    best = min(found, key=found.get)
    return best if found[best] < 0.99 * missed(DEFAULT_POLICY) else DEFAULT_POLICY


def order(recorded, directory):
    said = json.loads((directory / "orders.json").read_text())
    training, held_out = np.flatnonzero(~recorded.held_out), np.flatnonzero(recorded.held_out)
    warm_up = min(512, len(training))
    judged = np.concatenate([training[len(training) - warm_up:], held_out])
    group_bytes, gap = said["group_bytes"], gap_bytes(said)
    tokens, adjacent = len(held_out), (group_bytes, 0, 1 << 62)

    def figures(result):
        missed, reads, groups, runs = result
        return {"reads_per_token": reads / tokens, "bytes_per_token": groups * group_bytes / tokens,
                "mean_run_groups": share(missed, runs), "mean_read_groups": share(groups, reads)}

    layers = []
    for layer in said["layers"]:
        fired, scores = recorded.fired[layer["layer"]], []
        neurons = fired.shape[1]
        stored = files.file(directory / layer["file"])["order"]
        orders = {"identity": np.arange(neurons), layer["chosen"]: stored}
        if layer["chosen"] == "frequency":
            compare("frequency", stored.tolist(), np.argsort(-fired[training].sum(axis=0), kind="stable").tolist())
        for score in layer["strategies"]:
            sets, groups = sets_of(fired[judged], orders[score["strategy"]], said["records_per_group"])
            needed = sum(map(len, sets[warm_up:]))
            cache = (layer["policy"], said["slots"], warm_up)
            missed = counted(sets, groups, *cache, adjacent)
            planned = counted(sets, groups, *cache, (group_bytes, gap, REQUEST_BYTES))
            cost = (planned[1] * said["request_ns"] + planned[2] * group_bytes * said["byte_ns"]) / 1e6
            scores.append({"strategy": score["strategy"], "hit_rate": 1 - share(planned[0], needed),
                           "wanted": figures(counted(sets, groups, "window:0", 0, warm_up, adjacent)),
                           "missed": figures(missed), "planned": figures(planned), "predicted_ms_per_token": cost / tokens})
        layers.append(layer | {"strategies": scores})
        if said["policy"] != "by layer":
            layers[-1]["policy"] = said["policy"]
        elif fired.mean() < 0.02:
            # Slow in Python: of layers that want little.
            layers[-1]["policy"] = policy(fired[training])
    whole = {"recording": recorded.info["id"], "scored_on": recorded.info["id"], "scored_tokens": tokens, "layers": layers}
    compare("order", said, said | whole)
    return said, directory


def points(recorded, directory, stored):
    """The points of a predictor at the thresholds that its report names, and the one that is chosen: that of the file."""
    number = stored["layer"]
    layer, held_out = recorded.layers[number], recorded.held_out
    fired = recorded.fired[number]
    energy = np.zeros(fired.shape)
    energy[fired] = layer["magnitudes"].astype(float)
    energy = (energy * layer["down_norms"])[held_out]
    fired = fired[held_out]
    path = directory / f"predictor-{number:03}.safetensors"
    tensors = files.file(path)
    scores = files.scores(tensors, layer["inputs"][held_out], fired.shape[1])

    def point(threshold):
        chosen = scores > threshold - stored["held_out"]["threshold"]
        hits = (chosen & fired).sum()
        return {"threshold": threshold, "false_negative_rate": 1 - share(hits, fired.sum(), 1.0),
                "false_positive_rate": share((chosen & ~fired).sum(), (~fired).sum()), "predicted_fraction": chosen.mean(),
                "active_fraction": fired.mean(), "over_fetch": share(chosen.sum(), fired.sum()),
                "energy_recall": share(energy[chosen].sum(), energy.sum(), 1.0), "precision": share(hits, chosen.sum(), 1.0)}
    header = int(np.fromfile(path, "<u8", 1)[0])
    return point, path.stat().st_size - 8 - header, len(tensors["bias"])


def point_near(point, said):
    """The point at a threshold. A score within rounding of it may fall on either side, and with it the same score of the same input:
    that of every sequence's first token."""
    off = lambda found: sum(abs(found[key] - said[key]) for key in ("false_negative_rate", "false_positive_rate"))
    return min((point(said["threshold"] + by) for by in (0, 5e-4, -5e-4)), key=off) | {"threshold": said["threshold"]}


def train(recorded, directory):
    said = json.loads((directory / "predictors.json").read_text())
    layers, model = [], recorded.info["model"]
    for stored in said["layers"]:
        point, size, rows = points(recorded, directory, stored)
        curves = [curve | {"points": [point_near(point, p) for p in curve["points"]]} if curve["dtype"] == stored["dtype"]
                  else curve for curve in stored["curves"]]
        found = stored | {"held_out": point_near(point, stored["held_out"]), "curves": curves, "bytes": size}
        if stored.get("rows") is not None:
            found["rows"] = rows
        layers.append(found)
    compare("train", said["layers"], layers, 1e-3)
    return layers


def printed(layers, text):
    """The table that `train` prints, to its digits."""
    rows = [re.findall(r"[\d.]+", line) for line in text.splitlines() if re.match(r" +\d+ +\S+ +\d+ +[\d.]+%", line)]
    compare("layers printed", len(rows), len(layers))
    figure = lambda layer: [100 * layer["held_out"][key] for key in ("false_negative_rate", "false_positive_rate")] + \
        [layer["held_out"]["over_fetch"], 100 * (1 - layer["held_out"]["energy_recall"])]
    for row, layer in zip(rows, layers):
        compare(f"printed layer {layer['layer']}", [float(n) for n in row[-5:-1]], figure(layer), 1.1e-2)
    means = [float(n) for n in re.findall(r"[\d.]+", text[text.index("mean: misses"):])[:5]]
    mean = lambda of: 100 * float(np.mean([of(layer["held_out"]) for layer in layers]))
    bytes_ = [sum(layer[key] for layer in layers) for key in ("bytes", "ffn_bytes")]
    found = [mean(lambda p: p["false_negative_rate"]), mean(lambda p: p["false_positive_rate"]),
             mean(lambda p: p["predicted_fraction"]), mean(lambda p: 1 - p["energy_recall"]), 100 * bytes_[0] / bytes_[1]]
    compare("printed means", means, found, 1.1e-2)


def main(recording, arguments):
    recorded, orders, predictors = Recorded(Path(recording)), None, None
    for what, path in (argument.split("=", 1) for argument in arguments):
        path, before = Path(path), len(compared)
        if what == "analyze":
            analyze(recorded, json.loads(path.read_text()))
        elif what == "order":
            orders = order(recorded, path)
        elif what == "train":
            predictors = train(recorded, path)
        elif what == "printed":
            printed(predictors, path.read_text())
        elif what == "report":
            report(recorded, path, *orders, predictors)
        print(f"{what}: {len(compared) - before} numbers recomputed")
    print(f"{len(compared)} numbers, {len(wrong)} of them differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
