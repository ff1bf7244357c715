//! What recorded tokens want of a layer, in neurons and in groups.

use flashlm_formats::ids::{GroupId, Id, NeuronId, Position};

/// For each token in turn the groups (or neurons, by either of their numbers) that it wants, ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedSets<T> {
    layer_size: u32,
    ends: Vec<usize>,
    wanted: Vec<T>,
}

impl<T: Id> WantedSets<T> {
    /// No tokens yet, of a layer with this many groups (or neurons).
    pub fn new(layer_size: u32) -> Self {
        WantedSets { layer_size, ends: Vec::new(), wanted: Vec::new() }
    }

    /// Appends what a token wants.
    ///
    /// # Panics
    /// When they do not ascend, or one is not of the layer.
    pub fn push(&mut self, wanted: impl IntoIterator<Item = T>) {
        let start = self.wanted.len();
        self.wanted.extend(wanted);
        let added = &self.wanted[start..];
        assert!(added.is_sorted_by(|a, b| a < b), "what is wanted must ascend");
        let last = added.last().map(|last| last.number());
        assert!(last.is_none_or(|last| last < self.layer_size), "{last:?} of {}", self.layer_size);
        self.ends.push(self.wanted.len());
    }

    /// Number of groups (or neurons) of the layer.
    pub fn layer_size(&self) -> u32 {
        self.layer_size
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.ends.len()
    }

    /// Number of all that is wanted, over all tokens.
    pub fn requests(&self) -> usize {
        self.wanted.len()
    }

    /// What a token wants.
    pub fn token(&self, token: usize) -> &[T] {
        let start = if token == 0 { 0 } else { self.ends[token - 1] };
        &self.wanted[start..self.ends[token]]
    }

    /// All tokens in turn.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[T]> {
        (0..self.tokens()).map(|t| self.token(t))
    }

    /// What is left behind the first `tokens`.
    #[must_use]
    pub fn after(&self, tokens: usize) -> Self {
        let mut sets = WantedSets::new(self.layer_size);
        self.iter().skip(tokens).for_each(|wanted| sets.push(wanted.iter().copied()));
        sets
    }

    /// The same tokens, wanting what theirs becomes by `to`, of a layer of another size.
    fn mapped<U: Id>(&self, layer_size: u32, to: impl Fn(T) -> U) -> WantedSets<U> {
        let mut sets = WantedSets {
            layer_size,
            ends: Vec::with_capacity(self.ends.len()),
            wanted: Vec::with_capacity(self.wanted.len()),
        };
        let mut token = Vec::new();
        for wanted in self.iter() {
            token.clear();
            token.extend(wanted.iter().map(|&wanted| to(wanted)));
            token.sort_unstable();
            token.dedup();
            sets.wanted.extend_from_slice(&token);
            sets.ends.push(sets.wanted.len());
        }
        sets
    }
}

impl WantedSets<NeuronId> {
    /// The same tokens where neuron `n` is stored at `position[n]`.
    pub fn placed(&self, position: &[Position]) -> WantedSets<Position> {
        self.mapped(self.layer_size, |neuron| position[neuron.index()])
    }

    /// The same tokens where neuron `n` is stored at `position[n]`, and `records` neighbours make a group. A group is wanted when one
    /// of its neurons is.
    pub fn stored(&self, position: &[Position], records: u32) -> WantedSets<GroupId> {
        let records = records.max(1);
        self.mapped(self.layer_size.div_ceil(records), |neuron| position[neuron.index()].group(records))
    }

    /// The same tokens where every neuron is a group by itself, in the checkpoint's order.
    pub fn alone(&self) -> WantedSets<GroupId> {
        self.mapped(self.layer_size, |neuron| GroupId(neuron.0))
    }
}

impl WantedSets<Position> {
    /// The same tokens where `records` neighbours make a group. A group is wanted when one of its neurons is.
    pub fn grouped(&self, records: u32) -> WantedSets<GroupId> {
        let records = records.max(1);
        self.mapped(self.layer_size.div_ceil(records), |position| position.group(records))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets<T: Id>(tokens: &[&[u32]]) -> WantedSets<T> {
        let mut sets = WantedSets::new(100);
        tokens.iter().for_each(|t| sets.push(t.iter().copied().map(T::new)));
        sets
    }

    #[test]
    fn regrouping_follows_the_order() {
        let neurons: WantedSets<NeuronId> = sets(&[&[0, 1, 99], &[50]]);
        let reversed: Vec<Position> = (0..100).rev().map(Position).collect();
        let stored = neurons.stored(&reversed, 3);
        assert_eq!(stored.layer_size(), 34);
        assert_eq!(stored.iter().collect::<Vec<_>>(), [&[0, 32, 33].map(GroupId)[..], &[GroupId(16)]]);
        let placed = neurons.placed(&reversed);
        assert_eq!(placed, sets(&[&[0, 98, 99], &[49]]));
        assert_eq!(placed.grouped(3), stored);
        assert_eq!(neurons.alone(), sets(&[&[0, 1, 99], &[50]]));
        assert_eq!((neurons.after(1), neurons.after(9).tokens()), (sets(&[&[50]]), 0));
    }
}
