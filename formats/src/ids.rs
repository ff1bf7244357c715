//! Numbers of different things, as different types: what counts neurons does not index groups.
//!
//! A neuron has two numbers. Its [`NeuronId`] is its row in the checkpoint; its [`Position`] is its place in the storage order, by which
//! everything in a bundle goes. A storage order is the list of ids by position.
//!
//! ```compile_fail
//! use flashlm_formats::ids::{GroupId, Position};
//!
//! let group: GroupId = Position(7);
//! ```

/// What has a number: lists of ids of any kind are handled alike.
pub trait Id: Copy + Ord + Send + Sync {
    /// The one with this number.
    fn new(number: u32) -> Self;

    /// Its number.
    fn number(self) -> u32;

    /// Its number, as an index.
    fn index(self) -> usize {
        self.number() as usize
    }
}

/// Makes a type of ids: a number that adds up with nothing but a count of its own kind.
#[macro_export]
macro_rules! id {
    ($(#[$doc:meta])* $visibility:vis $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        $visibility struct $name($visibility u32);

        impl $name {
            /// Its number, as an index.
            #[inline]
            $visibility const fn index(self) -> usize {
                self.0 as usize
            }

            /// The one that is `count` further on.
            #[inline]
            $visibility const fn after(self, count: u32) -> Self {
                Self(self.0 + count)
            }
        }

        impl $crate::ids::Id for $name {
            #[inline]
            fn new(number: u32) -> Self {
                Self(number)
            }

            #[inline]
            fn number(self) -> u32 {
                self.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// A neuron of a layer: its row in the checkpoint.
    pub NeuronId
}

id! {
    /// A neuron of a layer: its place in the storage order.
    pub Position
}

id! {
    /// A group of a layer: neurons that are read and cached together.
    pub GroupId
}

impl Position {
    /// The group that holds the neuron, where each holds `records`.
    #[inline]
    pub const fn group(self, records: u32) -> GroupId {
        GroupId(self.0 / records)
    }
}
