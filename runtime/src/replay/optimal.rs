//! Belady's optimum for tokens that need many groups at once.

use std::collections::BTreeSet;

use flashlm_formats::ids::GroupId;

use super::wanted::WantedSets;

/// A use beyond the last token.
const NEVER: u32 = u32::MAX;

/// Calls `each(token, missed)` for every token, with a cache of `slots` slots that knows the future.
pub(super) fn for_each_miss(sets: &WantedSets<GroupId>, slots: u32, mut each: impl FnMut(usize, &[GroupId])) {
    // Next use of every request, found from the back.
    let mut next_of = vec![NEVER; sets.layer_size() as usize];
    let mut next = Vec::with_capacity(sets.requests());
    for token in (0..sets.tokens()).rev() {
        for &group in sets.token(token).iter().rev() {
            next.push(next_of[group.index()]);
            next_of[group.index()] = token as u32;
        }
    }
    // What is cached, by next use; `next_of` now says the next use of what is.
    let mut cached: BTreeSet<(u32, GroupId)> = BTreeSet::new();
    let mut missing = Vec::new();
    for (token, wanted) in sets.iter().enumerate() {
        missing.clear();
        for &group in wanted {
            if !cached.remove(&(token as u32, group)) {
                missing.push(group);
            }
        }
        each(token, &missing);
        for &group in wanted {
            let at = next.pop().unwrap_or(NEVER);
            if at != NEVER {
                cached.insert((at, group));
            }
        }
        while cached.len() > slots as usize {
            cached.pop_last();
        }
    }
}
