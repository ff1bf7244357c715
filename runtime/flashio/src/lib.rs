//! Reading a file from flash with direct I/O: aligned memory, slots that reads land in, two reader engines,
//! a sequential reader, and a measured profile of the disk.
//!
//! This crate knows offsets, lengths and buffers. It does not know what the bytes mean: no tensors, no bundles,
//! no cache policy, and it does not decide which reads to merge; the caller plans, this crate carries out.
//!
//! | need | start at |
//! |---|---|
//! | open a file without filling the page cache | [`DirectFile`] |
//! | many scattered reads into fixed places | [`Engines`], [`ReadBatch`], [`Slots`] |
//! | what the disk can do, and what reads will cost | [`measure_profile`], [`DiskProfile`] |
//! | a long extent, in order, as fast as the disk gives it | [`SequentialReader`], [`read_extent_into`] |

mod engine;
mod engines;
mod error;
mod faults;
mod file;
mod measure;
mod memory;
mod profile;
mod profile_store;
mod queue;
mod request;
mod scratch;
mod slots;
mod stream;
mod threads;
mod transport;
#[cfg(target_os = "linux")]
mod uring;

pub use engine::{Completion, Counters, EngineChoice, ReadEngine};
pub use engines::Engines;
pub use error::IoError;
pub use faults::FaultPlan;
pub use file::{Alignment, DirectFile, DirectIo, FileIdentity, Mode};
pub use measure::{
    MeasureProgress, Measurement, PROFILE_DEPTHS, PROFILE_READ_BYTES, RandomPattern, measure_profile, random_read_rate,
    sequential_bandwidth, sequential_read_rate,
};
pub use memory::AlignedMemory;
pub use profile::{DiskProfile, PROFILE_VERSION, RandomRate};
use profile_store::moved_bytes;
pub use profile_store::{CACHE_DIR_VARIABLE, cache_dir, device_key};
pub use request::{Piece, ReadBatch};
pub use scratch::ScratchFile;
pub use slots::{SlotState, Slots};
pub use stream::{Chunk, Extent, SequentialReader, StreamOptions, read_extent_into};
