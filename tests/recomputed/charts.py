"""The numbers behind the charts of `report --data`, recomputed."""
import csv

import numpy as np

from measures import DEFAULT_POLICY, REQUEST_BYTES, compare, counted, files, gap_bytes, reuse, sets_of

WINDOWS = 8
CURVE_POINTS = 160
CACHE_PERCENT = [0, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100]


def table(directory, name):
    """The rows of a chart's CSV."""
    with open(directory / f"{name}.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    value = lambda cell: cell == "true" if cell in ("true", "false") else cell
    number = lambda cell: float(cell) if cell[:1].isdigit() else value(cell)
    return [[number(cell) for cell in row] for row in rows]


def lines(of_name):
    """Rows of a chart with lines: name, x, y, whether it is marked."""
    return [[name, float(x), float(y), marked] for name, points in of_name for x, y, marked in points]


def matrix(active, bins=128):
    """How often a neuron of one bin and another one of another fire together."""
    bins = min(bins, active.shape[1])
    neurons = active.shape[1]
    bin_of = np.arange(neurons) * bins // neurons
    active = active[::max(-(-len(active) // 4096), 1)]
    counts = np.zeros((len(active), bins))
    for at in range(bins):
        counts[:, at] = active[:, bin_of == at].sum(axis=1)
    pairs = counts.T @ counts - np.diag(counts.sum(axis=0))
    sizes = np.bincount(bin_of, minlength=bins)
    possible = len(active) * (np.outer(sizes, sizes) - np.diag(sizes))
    starts = [int(np.argmax(bin_of == at)) for at in range(bins)]
    shares = np.divide(pairs, possible, out=np.zeros_like(pairs), where=possible > 0)
    return [[float(starts[r]), float(starts[c]), shares[r, c]] for r in range(bins) for c in range(bins)]


def run_shares(active):
    """Share of the active neurons in runs of 1, 2, .. neighbours or more."""
    edges = np.diff(np.pad(active.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    lengths = np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]
    return np.bincount(lengths)


def report(recorded, directory, orders, orders_directory, predictors):
    layers = sorted(recorded.layers)
    names = [f"layer {layer}" for layer in layers]
    fired = [recorded.fired[layer] for layer in layers]
    spans = recorded.sequences(only_held_out=True)
    sampled = [np.concatenate([active[a:b] for a, b in spans]) for active in fired]
    compare("sparsity", table(directory, "sparsity"), [[float(l), 100 * a.mean()] for l, a in zip(layers, fired)])

    def frequency(active):
        rates = np.sort(active.mean(axis=0))[::-1]
        ranks = [at * (len(rates) - 1) // (CURVE_POINTS - 1) for at in range(CURVE_POINTS)]
        return [(100 * rank / len(rates), 100 * rates[rank], False) for rank in ranks if rates[rank] > 0]
    compare("frequency", table(directory, "frequency"), lines((n, frequency(a)) for n, a in zip(names, fired)))

    lengths = np.cumsum([0] + [b - a for a, b in spans])
    windows = [reuse(active, list(zip(lengths[:-1], lengths[1:])), WINDOWS) for active in sampled]
    for chart, key in (("reuse-new", "new_fraction"), ("reuse-union", "union_fraction")):
        found = lines((n, [(w["tokens"], 100 * w[key], False) for w in of]) for n, of in zip(names, windows))
        compare(chart, table(directory, chart), found)

    chosen = [files.file(orders_directory / f"layer-{layer:03}.order.safetensors")["order"] for layer in layers]
    uses = [active.sum(axis=0) for active in fired]
    stored = {"identity": [np.arange(len(u)) for u in uses], "frequency": [np.argsort(-u, kind="stable") for u in uses],
              "chosen": chosen}
    middle = len(layers) // 2
    for chart, name in (("coactivation-before", "identity"), ("coactivation-after", "chosen")):
        compare(chart, table(directory, chart), matrix(sampled[middle][:, stored[name][middle]]))

    runs = table(directory, "runs")
    longest = int(max(row[1] for row in runs))
    found = []
    for name, of_layers in stored.items():
        counts = [run_shares(active[:, order]) for active, order in zip(sampled, of_layers)]
        pooled = sum(np.pad(c, (0, max(map(len, counts)) - len(c))) for c in counts)
        neurons = pooled * np.arange(len(pooled))
        found.append((name, [(k, 100 * neurons[k:].sum() / neurons.sum(), False) for k in range(1, longest + 1)]))
    compare("runs", runs, lines(found))

    group_bytes, gap = orders["group_bytes"], gap_bytes(orders)
    found = []
    for name, of_layers in stored.items():
        points = []
        for percent in CACHE_PERCENT:
            ms, size = 0, 0
            for active, order in zip(sampled, of_layers):
                sets, groups = sets_of(active, order, orders["records_per_group"])
                slots, warm_up = groups * percent // 100, len(sets) // 2
                result = counted(sets, groups, DEFAULT_POLICY, slots, warm_up, (group_bytes, gap, REQUEST_BYTES))
                time = result[1] * orders["request_ns"] + result[2] * group_bytes * orders["byte_ns"]
                ms, size = ms + time / 1e6 / (len(sets) - warm_up), size + slots * group_bytes
            points.append((size / 1e6, ms, False))
        found.append((name, points))
    compare("budget", table(directory, "budget"), lines(found))

    def curve(layer, x, y):
        of_type = [c for c in layer["curves"] if c["dtype"] == layer["dtype"]][0]["points"]
        of = lambda p: (100 * x(p), 100 * y(p))
        drawn = sorted((of(p) for p in of_type), key=lambda p: p[0])
        return [(*p, False) for p in drawn] + [(*of(layer["held_out"]), True)]
    misses, alarms = (lambda p: p["false_negative_rate"]), (lambda p: p["false_positive_rate"])
    of_layers = [(f"layer {layer['layer']}", layer) for layer in predictors]
    for chart, x, y in (("predictor-recall", lambda p: p["predicted_fraction"], lambda p: 1 - misses(p)),
                        ("predictor-errors", alarms, misses)):
        compare(chart, table(directory, chart), lines((n, curve(layer, x, y)) for n, layer in of_layers), 2e-2)
