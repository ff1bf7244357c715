"""Neuron caches and the read planner once more, from docs/ordering.md and the papers it names, to check replays with.

A replay is `replay(sets, groups, policy, slots)`: what each token is missing, for `sets` as lists of ascending group numbers.
Lists of cached groups are dicts: the group given up next comes first.
"""
import struct
from math import exp, log

import numpy as np


class Recency:
    """Least recently used; with a window, unused groups go after so many tokens."""
    def __init__(self, groups, slots, window=None):
        self.used_at, self.window = {}, window

    def begin(self, token):
        self.token = token
        if self.window is not None:
            old = [g for g, at in self.used_at.items() if at + self.window < token]
            for group in old:
                del self.used_at[group]
            return old
        return []

    def used(self, group):
        self.used_at.pop(group, None)
        self.used_at[group] = self.token

    placed = used

    def missed(self, group):
        pass

    def victim(self, group):
        oldest = next(iter(self.used_at), None)
        if oldest is None or self.used_at[oldest] == self.token:
            return None
        del self.used_at[oldest]
        return oldest


class Lfu:
    """Least frequently used, a use losing half of its weight in `half_life` tokens. Scores are eighths of an octave."""
    DEPTH = 64

    def __init__(self, groups, slots, half_life=64):
        self.half_life, self.base, self.token = half_life, 0, 0
        left, fading = 1.0, []
        for _ in range(16 * half_life):
            fading.append(left)
            left *= exp(-log(2) / half_life)
        self.fading = np.array(fading, np.float32)
        self.count, self.last = np.zeros(groups, np.float32), [0] * groups
        headroom = 8 * (half_life.bit_length() - 1 + 3)
        self.top = (self.DEPTH + headroom + 1 + 63) // 64 * 64 - 1
        self.lists, self.list_of, self.held, self.held_by = {}, {}, [], {}

    def one(self, token):
        return token * 8 // self.half_life

    @staticmethod
    def steps(count):
        return (struct.unpack("<I", struct.pack("<f", count))[0] >> 20) - 127 * 8

    def faded(self, group):
        age = self.token - self.last[group]
        return self.count[group] * self.fading[age] if age < len(self.fading) else np.float32(0)

    def score(self, group):
        count = self.count[group]
        return 0 if count == 0 else self.one(self.last[group]) + self.steps(count)

    def begin(self, token):
        self.token = token
        base = max(self.base, self.one(token) - self.DEPTH)
        # What is below the least score that is told apart joins it, and goes before it.
        low = sorted(score for score in self.lists if score < base)
        if low:
            poured = {group: None for score in low for group in self.lists.pop(score)}
            poured.update(self.lists.get(base, {}))
            self.lists[base] = poured
            self.list_of.update(dict.fromkeys(poured, base))
        self.base = base
        for group in self.held:
            self.file(group)
        self.held = []
        return []

    def clamped(self, group):
        return min(max(self.score(group), self.base), self.base + self.top)

    def file(self, group):
        score = self.clamped(group)
        self.lists.setdefault(score, {})[group] = None
        self.list_of[group] = score

    def placed(self, group):
        self.held_by[group] = self.token
        self.file(group)

    def missed(self, group):
        self.count[group] = self.faded(group) + np.float32(1)
        self.last[group] = self.token

    def used(self, group):
        """A use only raises the score: it is filed anew when it is looked at as a victim."""
        self.missed(group)
        self.held_by[group] = self.token

    def victim(self, group):
        while True:
            least = min((score for score, of in self.lists.items() if of), default=None)
            if least is None or self.score(group) < least:
                return None
            looked_at = next(iter(self.lists[least]))
            del self.lists[least][looked_at], self.list_of[looked_at]
            if self.held_by[looked_at] == self.token:
                self.held.append(looked_at)
            elif self.clamped(looked_at) > least:
                self.file(looked_at)
            else:
                return looked_at


class S3Fifo:
    SMALL, MAIN = 0, 1

    def __init__(self, groups, slots):
        self.queues, self.aside = ({}, {}), {}
        self.uses, self.home, self.held, self.left = {}, {}, {}, {}
        self.small_max = max(slots // 10, 1)
        self.memory, self.departures = max(slots - self.small_max, 0), 0

    def begin(self, token):
        self.token = token
        for group in self.aside:
            self.queues[self.home[group]][group] = None
        self.aside = {}
        return []

    def used(self, group):
        self.uses[group] = min(self.uses[group] + 1, 3)
        self.held[group] = self.token

    def missed(self, group):
        pass

    def placed(self, group):
        remembered = group in self.left and self.departures - self.left[group] < self.memory
        self.home[group] = self.MAIN if remembered else self.SMALL
        self.uses[group], self.held[group] = 0, self.token
        self.queues[self.home[group]][group] = None

    def victim(self, newcomer):
        small, main = self.queues
        while small or main:
            queue = small if len(small) >= self.small_max or not main else main
            queue = queue or small or main
            group = next(iter(queue))
            del queue[group]
            promoted = self.home[group] == self.SMALL and self.uses[group] > 1
            if self.held[group] == self.token:
                self.home[group] = self.MAIN if promoted else self.home[group]
                self.aside[group] = None
            elif promoted:
                self.uses[group], self.home[group] = 0, self.MAIN
                main[group] = None
            elif self.home[group] == self.MAIN and self.uses[group] > 0:
                self.uses[group] -= 1
                main[group] = None
            else:
                if self.home[group] == self.SMALL:
                    self.departures += 1
                    self.left[group] = self.departures
                return group
        return None


class WTinyLfu:
    WINDOW, PROBATION, PROTECTED = 0, 1, 2

    def __init__(self, groups, slots):
        self.segments, self.segment, self.used_at = ({}, {}, {}), {}, {}
        self.window_max = max(slots // 100, 1)
        self.protected_max = max(slots - self.window_max, 0) * 4 // 5
        self.count = np.zeros(groups, np.uint8)
        self.sample = self.until_halved = max(10 * slots, groups)

    def begin(self, token):
        self.token = token
        return []

    def missed(self, group):
        self.count[group] = min(self.count[group] + 1, 15)
        self.until_halved -= 1
        if self.until_halved == 0:
            self.count //= 2
            self.until_halved = self.sample

    def move(self, group, segment):
        if group in self.segment:
            del self.segments[self.segment[group]][group]
        self.segment[group] = segment
        self.segments[segment][group] = None

    def leave(self, group):
        del self.segments[self.segment.pop(group)][group]
        return group

    def used(self, group):
        self.missed(group)
        self.used_at[group] = self.token
        segment = self.segment[group]
        if segment == self.WINDOW or self.protected_max == 0:
            self.move(group, segment)
            return
        self.move(group, self.PROTECTED)
        if len(self.segments[self.PROTECTED]) > self.protected_max:
            self.move(next(iter(self.segments[self.PROTECTED])), self.PROBATION)

    def last(self, segment):
        group = next(iter(self.segments[segment]), None)
        return None if group is None or self.used_at[group] == self.token else group

    def victim(self, newcomer):
        resident = self.last(self.PROBATION)
        resident = self.last(self.PROTECTED) if resident is None else resident
        candidate = self.last(self.WINDOW)
        if resident is None:
            return None if candidate is None else self.leave(candidate)
        if len(self.segments[self.WINDOW]) >= self.window_max:
            if candidate is not None and self.count[candidate] <= self.count[resident]:
                return self.leave(candidate)
            if candidate is None and self.count[newcomer] <= self.count[resident]:
                return None
        return self.leave(resident)

    def placed(self, group):
        self.used_at[group] = self.token
        self.move(group, self.WINDOW)
        if len(self.segments[self.WINDOW]) > self.window_max:
            self.move(next(iter(self.segments[self.WINDOW])), self.PROBATION)


def policy_of(name):
    kind, _, number = name.partition(":")
    made = {"lru": Recency, "window": Recency, "lfu": Lfu, "s3-fifo": S3Fifo, "w-tinylfu": WTinyLfu}[kind]
    return lambda groups, slots: made(groups, slots, *([int(number)] if number else []))


def optimal(sets, slots):
    """What Belady's optimum misses."""
    following, last = [], {}
    for token in range(len(sets) - 1, -1, -1):
        following.append([last.get(group) for group in sets[token]])
        last.update(dict.fromkeys(sets[token], token))
    cached, missed = {}, []
    for wanted, next_uses in zip(sets, reversed(following)):
        missed.append([group for group in wanted if cached.pop(group, None) is None])
        cached.update({group: at for group, at in zip(wanted, next_uses) if at is not None})
        if len(cached) > slots:
            cached = dict(sorted(cached.items(), key=lambda item: (item[1], item[0]))[:slots])
    return missed


def replay(sets, groups, policy, slots):
    """What each token misses."""
    if policy == "optimum":
        return optimal(sets, slots)
    policy, cached, missed = policy_of(policy)(groups, slots), set(), []
    for token, wanted in enumerate(sets):
        cached.difference_update(policy.begin(token + 1))
        missing = []
        for group in wanted:
            if group in cached:
                policy.used(group)
            else:
                policy.missed(group)
                missing.append(group)
        for group in missing:
            if len(cached) >= slots:
                given_up = policy.victim(group)
                if given_up is None:
                    continue
                cached.remove(given_up)
            cached.add(group)
            policy.placed(group)
        missed.append(missing)
    return missed


def plan(missing, group_bytes, gap_bytes, request_bytes):
    """Requests as (first, groups): the cheapest, where one costs as much as `gap_bytes` bytes and has at most `request_bytes`."""
    runs, most = [], max(request_bytes // group_bytes, 1)
    for group in missing:
        if runs and (group - runs[-1][-1] - 1) <= gap_bytes // group_bytes:
            runs[-1].append(group)
        else:
            runs.append([group])
    requests = []
    for run in runs:
        span = lambda start, end: run[end - 1] - run[start] + 1
        if span(0, len(run)) <= most:
            requests.append((run[0], span(0, len(run))))
            continue
        # Of the first `end` groups the cost, the number of requests, and these.
        best = [(0, 0, [])]
        for end in range(1, len(run) + 1):
            ways = [(best[start][0] + gap_bytes + span(start, end) * group_bytes, best[start][1] + 1, start)
                    for start in range(end) if span(start, end) <= most]
            cost, count, start = min(ways)
            best.append((cost, count, best[start][2] + [(run[start], span(start, end))]))
        requests += best[-1][2]
    return requests
