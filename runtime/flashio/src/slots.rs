//! An arena of equal slots that reads land in, with a state for each.
//!
//! A slot in flight belongs to the engine: it can be seen only once its read has completed. The engine owns the
//! arena and changes states through `&mut`, so a borrowed slot cannot be submitted again while it is looked at.

#![expect(unsafe_code, reason = "hands out parts of memory that the kernel writes to")]

use std::sync::Arc;

use crate::{AlignedMemory, Alignment, IoError};

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum SlotState {
    /// Nothing: never read into, or its read failed.
    Empty,
    /// A read owns it.
    InFlight,
    /// The bytes of a completed read.
    Ready,
}

/// `count` slots of `slot_bytes` bytes each, in one mapping.
#[derive(Debug)]
pub struct Slots {
    memory: Arc<AlignedMemory>,
    slot_bytes: usize,
    stride: usize,
    states: Vec<SlotState>,
    filled: Vec<u32>,
    /// Marks slots named by the batch being checked; all false between calls.
    claimed: Vec<bool>,
}

impl Slots {
    /// Bytes from one slot to the next, where slots have `slot_bytes`; `None` if that is more than can be.
    pub fn stride_for(slot_bytes: usize, alignment: Alignment) -> Option<usize> {
        slot_bytes.max(1).checked_next_multiple_of(alignment.memory.max(alignment.length).max(64))
    }

    /// An arena whose slots begin at multiples of what `alignment` asks of memory and lengths.
    pub fn new(count: usize, slot_bytes: usize, alignment: Alignment) -> Result<Self, IoError> {
        let too_large = || IoError::ArenaTooLarge { count, slot_bytes };
        let stride = Self::stride_for(slot_bytes, alignment).ok_or_else(too_large)?;
        if u32::try_from(count).is_err() || u32::try_from(stride).is_err() {
            return Err(too_large());
        }
        let mut memory = AlignedMemory::new(stride.checked_mul(count).ok_or_else(too_large)?)?;
        memory.populate();
        Ok(Self {
            memory: Arc::new(memory),
            slot_bytes,
            stride,
            states: vec![SlotState::Empty; count],
            filled: vec![0; count],
            claimed: vec![false; count],
        })
    }

    /// Number of slots.
    pub fn count(&self) -> usize {
        self.states.len()
    }

    /// Capacity of a slot in bytes.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Bytes of memory that the arena maps.
    pub fn arena_bytes(&self) -> usize {
        self.memory.len()
    }

    /// State of a slot, `None` outside the arena.
    pub fn state(&self, slot: u32) -> Option<SlotState> {
        self.states.get(slot as usize).copied()
    }

    /// The bytes last read into a slot, or `None` while it is not ready.
    #[inline]
    pub fn slot(&self, slot: u32) -> Option<&[u8]> {
        let index = slot as usize;
        if *self.states.get(index)? != SlotState::Ready {
            return None;
        }
        // SAFETY: `index < count` and `filled <= slot_bytes <= stride`, so the range lies inside the mapping. The
        // slot is ready: no read is in flight for it, and starting one needs `&mut` on the engine that owns `self`.
        Some(unsafe {
            std::slice::from_raw_parts(self.memory.as_ptr().add(index * self.stride), self.filled[index] as usize)
        })
    }

    /// The bytes of `count` slots from `first` on, in one piece, or `None` unless all of them are ready, full and side by side.
    pub fn contiguous(&self, first: u32, count: usize) -> Option<&[u8]> {
        let first = first as usize;
        let range = first..first.checked_add(count)?;
        let ready = self.states.get(range.clone())?.iter().all(|state| *state == SlotState::Ready);
        let full = self.filled[range].iter().all(|bytes| *bytes as usize == self.stride);
        // SAFETY: the slots exist, so the range lies inside the mapping. All are ready: no read is in flight for any of
        // them, and starting one needs `&mut` on the engine that owns `self`.
        (ready && full).then(|| unsafe {
            std::slice::from_raw_parts(self.memory.as_ptr().add(first * self.stride), count * self.stride)
        })
    }

    /// Copies the bytes of one slot into another, which then is ready. False, and nothing done, unless the first is ready
    /// and the second is not in flight.
    pub fn copy(&mut self, from: u32, to: u32) -> bool {
        let free = matches!(self.state(to), Some(SlotState::Empty | SlotState::Ready));
        let Some(bytes) = self.slot(from).map(<[u8]>::len).filter(|_| free && from != to) else { return false };
        // SAFETY: both slots exist and are not in flight; they are different, so their `bytes <= stride` bytes do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.slot_ptr(from), self.slot_ptr(to), bytes) };
        self.complete_read(to, Some(bytes as u32));
        true
    }

    pub(crate) fn memory(&self) -> &Arc<AlignedMemory> {
        &self.memory
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Where a slot begins. The caller must own the slot's read to write there.
    pub(crate) fn slot_ptr(&self, slot: u32) -> *mut u8 {
        assert!((slot as usize) < self.states.len(), "slot numbers are checked on submit");
        // SAFETY: the slot exists, so its start lies inside the mapping.
        unsafe { self.memory.as_ptr().add(slot as usize * self.stride) }
    }

    /// Names a slot in the batch being checked.
    pub(crate) fn claim(&mut self, slot: u32, bytes: u32) -> Result<(), IoError> {
        let index = slot as usize;
        if index >= self.states.len() {
            return Err(IoError::SlotOutOfRange { slot, count: self.states.len() });
        }
        if bytes == 0 || bytes as usize > self.slot_bytes {
            return Err(IoError::PieceLength { slot, bytes, slot_bytes: self.slot_bytes });
        }
        if self.states[index] == SlotState::InFlight || self.claimed[index] {
            return Err(IoError::SlotInFlight { slot });
        }
        self.claimed[index] = true;
        Ok(())
    }

    /// Takes back a claim.
    pub(crate) fn unclaim(&mut self, slot: u32) {
        if let Some(claimed) = self.claimed.get_mut(slot as usize) {
            *claimed = false;
        }
    }

    /// Turns a claim into a read in flight.
    pub(crate) fn begin_read(&mut self, slot: u32) {
        self.claimed[slot as usize] = false;
        self.states[slot as usize] = SlotState::InFlight;
    }

    /// Ends the read of a slot: ready with `Some(bytes)`, empty with `None`.
    pub(crate) fn complete_read(&mut self, slot: u32, bytes: Option<u32>) {
        let index = slot as usize;
        self.filled[index] = bytes.unwrap_or(0);
        self.states[index] = if bytes.is_some() { SlotState::Ready } else { SlotState::Empty };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALIGNMENT: Alignment = Alignment { offset: 512, memory: 512, length: 512 };

    #[test]
    fn only_ready_slots_can_be_seen() {
        let mut slots = Slots::new(3, 1000, ALIGNMENT).unwrap();
        assert_eq!(slots.stride(), 1024);
        assert_eq!(slots.slot(1), None);
        slots.claim(1, 1000).unwrap();
        slots.begin_read(1);
        assert_eq!(slots.state(1), Some(SlotState::InFlight));
        assert_eq!(slots.slot(1), None);
        assert!(matches!(slots.claim(1, 1000), Err(IoError::SlotInFlight { slot: 1 })));
        slots.complete_read(1, Some(700));
        assert_eq!(slots.slot(1).unwrap().len(), 700);
        slots.claim(1, 5).unwrap();
        slots.begin_read(1);
        slots.complete_read(1, None);
        assert_eq!(slots.slot(1), None);
        assert_eq!(slots.slot(3), None);
    }

    #[test]
    fn copies_and_neighbours_need_finished_reads() {
        let mut slots = Slots::new(4, 512, ALIGNMENT).unwrap();
        for slot in [0, 1] {
            slots.claim(slot, 512).unwrap();
            slots.begin_read(slot);
        }
        assert!(!slots.copy(0, 2), "in flight");
        slots.complete_read(0, Some(512));
        assert_eq!(slots.contiguous(0, 2), None);
        assert!(!slots.copy(0, 1), "the target is in flight");
        slots.complete_read(1, Some(512));
        assert_eq!(slots.contiguous(0, 2).unwrap().len(), 1024);
        assert!(slots.copy(1, 3) && !slots.copy(1, 1) && !slots.copy(1, 4) && !slots.copy(2, 1));
        assert_eq!(slots.slot(3).unwrap(), slots.slot(1).unwrap());
        assert_eq!(slots.contiguous(2, 2), None);
        assert_eq!(slots.contiguous(3, 2), None);
    }

    #[test]
    fn claims_check_range_length_and_doubles() {
        let mut slots = Slots::new(2, 1000, ALIGNMENT).unwrap();
        assert!(matches!(slots.claim(2, 10), Err(IoError::SlotOutOfRange { slot: 2, count: 2 })));
        assert!(matches!(slots.claim(0, 0), Err(IoError::PieceLength { .. })));
        assert!(matches!(slots.claim(0, 1001), Err(IoError::PieceLength { .. })));
        slots.claim(0, 1000).unwrap();
        assert!(matches!(slots.claim(0, 1000), Err(IoError::SlotInFlight { slot: 0 })));
        slots.unclaim(0);
        slots.claim(0, 1000).unwrap();
    }

    #[test]
    fn arenas_too_large_are_a_typed_error() {
        assert!(matches!(Slots::new(usize::MAX, 4096, ALIGNMENT), Err(IoError::ArenaTooLarge { .. })));
        assert!(matches!(Slots::new(2, usize::MAX, ALIGNMENT), Err(IoError::ArenaTooLarge { .. })));
    }
}
