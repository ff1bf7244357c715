//! What a cache delegates to its policy.

use std::fmt;

use flashlm_formats::ids::GroupId;

use super::slot::SlotId;

/// What to keep and what to give up: the decisions of a [`LayerCache`](super::LayerCache).
///
/// Every call takes constant time, on average over the calls, and allocates nothing. A policy must not offer a slot that
/// the current token placed, used or held; tokens count from 1.
pub trait Policy: fmt::Debug + Send {
    /// A token begins; slots of earlier tokens may be given up again.
    fn begin(&mut self, token: u64);

    /// A slot whose group is to be forgotten although nobody needs the room. Asked after `begin` until there is none.
    fn expire(&mut self) -> Option<SlotId> {
        None
    }

    /// The token uses the group in this slot.
    fn used(&mut self, slot: SlotId, group: GroupId);

    /// The token wants a group that is in no slot.
    fn missed(&mut self, group: GroupId);

    /// The token may use the slot later: it must not be given up now.
    fn hold(&mut self, slot: SlotId);

    /// A slot to give up for `group`, or `None` when there is none worth it. The policy forgets the slot it offers.
    fn victim(&mut self, group: GroupId) -> Option<SlotId>;

    /// The group now lives in this slot, which was free or a victim; the token holds it.
    fn placed(&mut self, slot: SlotId, group: GroupId);

    /// The slot is free again.
    fn removed(&mut self, slot: SlotId);
}
