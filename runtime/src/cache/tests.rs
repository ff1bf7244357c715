//! One test for all policies: whatever they decide, the cache must do what a cache does.

use std::collections::{BTreeSet, HashMap};

use super::*;
use proptest::prelude::*;

const GROUPS: u32 = 60;

fn kinds() -> Vec<PolicyKind> {
    let mut kinds = PolicyKind::ALL.to_vec();
    kinds.extend([
        PolicyKind::Window(0),
        PolicyKind::Window(1),
        PolicyKind::Lfu { half_life: 1 },
        PolicyKind::Lfu { half_life: 1000 },
    ]);
    kinds
}

/// What a token does, in this order.
#[derive(Clone, Debug)]
struct Step {
    prefetched: BTreeSet<GroupId>,
    wanted: BTreeSet<GroupId>,
    failed: Option<GroupId>,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Skewed: a third of the requests fall on six groups.
    let group = || prop_oneof![1 => 0u32..6, 2 => 0u32..GROUPS].prop_map(GroupId);
    let set = move |n| proptest::collection::btree_set(group(), 0..n);
    let step = (set(6), set(20), proptest::option::weighted(0.1, (0..GROUPS).prop_map(GroupId)));
    proptest::collection::vec(step.prop_map(|(prefetched, wanted, failed)| Step { prefetched, wanted, failed }), 0..60)
}

/// What the cache says, and what must be true of it.
struct Model {
    slots: u32,
    group_in: HashMap<SlotId, GroupId>,
    transient: HashMap<GroupId, u32>,
    held: BTreeSet<GroupId>,
}

impl Model {
    fn put(&mut self, group: GroupId, place: Placement) {
        match place {
            Placement::Kept(slot) => {
                assert!(slot.0 < self.slots, "slot {slot} of {}", self.slots);
                if let Some(old) = self.group_in.insert(slot, group) {
                    assert!(!self.held.contains(&old), "group {old} was given up while in use");
                }
                let twice = self.group_in.values().filter(|&&g| g == group).count();
                assert_eq!(twice, 1, "group {group} is in {twice} slots");
            }
            Placement::Transient(index) => {
                assert_eq!(index as usize, self.transient.len(), "transient places count up");
                self.transient.insert(group, index);
            }
        }
        self.held.insert(group);
    }

    fn place(&self, group: GroupId) -> Option<Placement> {
        let kept = self.group_in.iter().find(|&(_, &g)| g == group).map(|(&s, _)| Placement::Kept(s));
        kept.or(self.transient.get(&group).map(|&i| Placement::Transient(i)))
    }
}

fn run(kind: PolicyKind, slots: u32, steps: &[Step]) -> CacheCounters {
    let mut cache = LayerCache::new(GROUPS, slots, kind).with_prefetch_transients(3);
    let mut model = Model { slots, group_in: HashMap::new(), transient: HashMap::new(), held: BTreeSet::new() };
    let mut expected = CacheCounters::default();
    for step in steps {
        cache.begin();
        expected.tokens += 1;
        model.held.clear();
        model.transient.clear();
        // Expiry is the policy's own affair: the model learns of it, but nothing may appear or move.
        model.group_in.retain(|&slot, &mut group| match cache.peek(group) {
            None => false,
            place => {
                assert_eq!(place, Some(Placement::Kept(slot)), "group {group} moved");
                true
            }
        });
        assert_eq!(cache.occupied() as usize, model.group_in.len());

        let mut ahead = BTreeSet::new();
        for &group in &step.prefetched {
            match cache.prefetch(group) {
                Prefetch::Present(place) => {
                    assert_eq!(Some(place), model.place(group));
                    model.held.insert(group);
                }
                Prefetch::Read(place) => {
                    assert_eq!(model.place(group), None);
                    model.put(group, place);
                    ahead.insert(group);
                    expected.prefetches += 1;
                    expected.transients += matches!(place, Placement::Transient(_)) as u64;
                }
                Prefetch::Refused => assert_eq!(model.transient.len(), 3),
            }
        }
        let mut missing = Vec::new();
        for &group in &step.wanted {
            let place = cache.lookup(group);
            assert_eq!(place, model.place(group), "{kind}: group {group}");
            match place {
                None => {
                    missing.push(group);
                    expected.misses += 1;
                }
                Some(_) if ahead.contains(&group) => expected.prefetch_hits += 1,
                Some(_) => expected.hits += 1,
            }
            if place.is_some() {
                model.held.insert(group);
            }
        }
        for group in missing {
            let place = cache.admit(group);
            expected.transients += matches!(place, Placement::Transient(_)) as u64;
            model.put(group, place);
        }
        assert!(model.group_in.len() <= slots as usize);
        for group in (0..GROUPS).map(GroupId) {
            assert_eq!(cache.peek(group), model.place(group), "{kind}: group {group}");
        }
        if let Some(group) = step.failed {
            cache.forget(group);
            model.group_in.retain(|_, &mut g| g != group);
            model.transient.remove(&group).map(|index| model.transient.insert(GroupId(GROUPS + index), index));
            assert_eq!(cache.peek(group), None);
        }
    }
    let counters = cache.counters();
    assert_eq!(CacheCounters { evictions: 0, ..counters }, expected, "{kind}");
    counters
}

proptest! {
    #[test]
    fn every_policy_is_a_cache(steps in steps(), slots in prop_oneof![Just(0u32), Just(1), 2u32..20, 20u32..80]) {
        for kind in kinds() {
            run(kind, slots, &steps);
        }
    }

    #[test]
    fn the_window_keeps_what_the_last_tokens_used(steps in steps(), k in 0u32..6) {
        let mut cache = LayerCache::new(GROUPS, GROUPS, PolicyKind::Window(k));
        for at in 0..steps.len() {
            cache.begin();
            let recent: BTreeSet<GroupId> =
                steps[at.saturating_sub(k as usize)..at].iter().flat_map(|s| s.wanted.iter().copied()).collect();
            for &group in &steps[at].wanted {
                prop_assert_eq!(cache.lookup(group).is_some(), recent.contains(&group));
            }
            for &group in steps[at].wanted.difference(&recent) {
                cache.admit(group);
            }
        }
    }

    #[test]
    fn lru_keeps_the_most_recent(steps in steps(), slots in 20u32..40) {
        let mut cache = LayerCache::new(GROUPS, slots, PolicyKind::Lru);
        let mut recent: Vec<GroupId> = Vec::new();
        for step in &steps {
            cache.begin();
            let hits: Vec<GroupId> = step.wanted.iter().copied().filter(|g| recent.contains(g)).collect();
            let misses: Vec<GroupId> = step.wanted.iter().copied().filter(|g| !recent.contains(g)).collect();
            for &group in &step.wanted {
                prop_assert_eq!(cache.lookup(group).is_some(), hits.contains(&group));
            }
            for &group in hits.iter().chain(&misses) {
                recent.retain(|&g| g != group);
                recent.insert(0, group);
            }
            recent.truncate(slots as usize);
            for &group in &misses {
                prop_assert!(matches!(cache.admit(group), Placement::Kept(_)));
            }
        }
    }
}

#[test]
fn nothing_is_evicted_while_there_is_room() {
    for kind in PolicyKind::ALL.into_iter().filter(|k| !matches!(k, PolicyKind::Window(_))) {
        let mut cache = LayerCache::new(GROUPS, GROUPS, kind);
        for token in 0..200u32 {
            cache.begin();
            for group in (0..GROUPS).filter(|g| (g * 7 + token) % 5 == 0).map(GroupId) {
                if cache.lookup(group).is_none() {
                    assert!(matches!(cache.admit(group), Placement::Kept(_)), "{kind}");
                }
            }
        }
        assert_eq!(cache.counters().misses, GROUPS as u64, "{kind}: every group is read once");
        assert_eq!(cache.counters().evictions, 0, "{kind}");
    }
}

/// Groups fire with probabilities of a steep power law: who counts uses must beat who does not.
#[test]
fn frequency_pays_on_a_skewed_layer() {
    let mut state = 7u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as f64 / (1u64 << 31) as f64
    };
    let mut uses = |g: &u32| random() < (1.0 / (1.0 + f64::from(*g) / 20.0)).min(0.9);
    let tokens: Vec<Vec<GroupId>> = (0..3000).map(|_| (0..1000).filter(&mut uses).map(GroupId).collect()).collect();
    let misses = |kind| {
        let mut cache = LayerCache::new(1000, 200, kind);
        let (mut hits, mut missing) = (Vec::new(), Vec::new());
        for wanted in &tokens {
            cache.begin();
            cache.lookup_all(wanted, &mut hits, &mut missing);
            for &group in &missing {
                cache.admit(group);
            }
        }
        cache.counters().misses as f64
    };
    let lru = misses(PolicyKind::Lru);
    for kind in [PolicyKind::Lfu { half_life: 64 }, PolicyKind::S3Fifo, PolicyKind::WTinyLfu] {
        let ratio = misses(kind) / lru;
        assert!(ratio < 0.97, "{kind} misses {ratio:.3} of what LRU does");
    }
}
