"""What the programs beside this one share: comparing, recordings, what tokens need and what replays of it read."""
import sys
from itertools import groupby
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import flashlm_read as files
from caches import plan, replay

DEFAULT_POLICY = "lfu:64"
REQUEST_BYTES = 1 << 20
compared, wrong = [], []


def compare(what, said, found, tolerance=1e-9):
    """All that is said must be found, and the same."""
    if isinstance(said, dict):
        missing = set(said) - set(found)
        if missing:
            sys.exit(f"{what}: {sorted(missing)} are not recomputed")
        for key in said:
            compare(f"{what}.{key}", said[key], found[key], tolerance)
    elif isinstance(said, list):
        if len(said) != len(found):
            sys.exit(f"{what}: {len(said)} entries, recomputed {len(found)}")
        for at, (a, b) in enumerate(zip(said, found)):
            compare(f"{what}[{at}]", a, b, tolerance)
    else:
        compared.append(what)
        same = said == found
        if not same and all(isinstance(value, (int, float, np.number)) for value in (said, found)):
            same = abs(said - found) <= tolerance * max(1, abs(found))
        if not same:
            wrong.append(what)
            print(f"{what}: {said}, recomputed {found}")


def gap_bytes(orders):
    """The longest gap that is read through: its bytes pass through memory, too, at 20 GB/s."""
    return int(orders["request_ns"] / (orders["byte_ns"] + 0.05))


def share(part, whole, empty=0.0):
    return part / whole if whole else empty


class Recorded:
    """A recording, with the tokens to train on and those held out."""
    def __init__(self, path):
        self.info, tokens, self.held_out, self.layers = files.recording(path)
        self.starts, self.count = tokens["sequences"].astype(int), len(tokens["tokens"])
        self.fired = {number: files.active(layer) for number, layer in self.layers.items()}
        self.neurons = self.info["model"]["layers"][0]["feed_forward"]["dense"]["size"]

    def sequences(self, only_held_out=False):
        spans = list(zip(self.starts[:-1], self.starts[1:]))
        return [(a, b) for a, b in spans if not only_held_out or self.held_out[a:b].all()]


def sets_of(active, order=None, records=1):
    """The groups that each token needs, with neurons in an order."""
    if order is not None:
        active = active[:, order]
    padded = np.pad(active, ((0, 0), (0, -active.shape[1] % records)))
    groups = padded.reshape(len(active), -1, records).any(axis=2)
    return [np.flatnonzero(row).tolist() for row in groups], groups.shape[1]


def reuse(active, spans, most):
    """What windows of 1, 2, .. tokens do; none reaches over the start of a sequence."""
    windows = []
    for k in range(1, most + 1):
        tokens = wanted = new = unions = count = 0
        for start, end in spans:
            part = active[start:end]
            union = np.array([part[t:t + k].any(axis=0) for t in range(len(part) - k + 1)])
            unions, count = unions + union.sum(), count + len(union)
            later = part[k:]
            tokens, wanted = tokens + len(later), wanted + later.sum()
            new += (later & ~union[:len(later)]).sum() if len(later) else 0
        neurons = active.shape[1]
        windows.append({"tokens": k, "new_fraction": share(new, wanted), "union_fraction": share(unions, count * neurons),
                        "read_fraction": share(new, tokens * neurons)})
    return windows


def counted(sets, groups, policy, slots, warm_up, limits):
    """Replays and plans: missed, reads, groups read and runs after a warm-up."""
    missed = replay(sets, groups, policy, slots)[warm_up:]
    requests = [plan(of_token, *limits) for of_token in missed]
    runs = sum(1 for m in missed for _ in groupby(enumerate(m), lambda pair: pair[1] - pair[0]))
    return sum(map(len, missed)), sum(map(len, requests)), sum(n for r in requests for _, n in r), runs
