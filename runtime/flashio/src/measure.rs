//! Measures a disk through the same engines and the same direct I/O that the reading itself uses.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use crate::{
    Alignment, DirectFile, DirectIo, DiskProfile, Engines, Extent, IoError, PROFILE_VERSION, RandomRate, ReadBatch,
    ReadEngine, ScratchFile, SequentialReader, Slots, StreamOptions, device_key, moved_bytes,
};

/// Read sizes of a profile, in bytes.
pub const PROFILE_READ_BYTES: [u64; 7] = [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10];
/// Depths of a profile.
pub const PROFILE_DEPTHS: [u32; 5] = [1, 8, 32, 64, 128];
/// Smaller files would be measured out of the disk's own cache.
const PROFILED_FILE_BYTES_MIN: u64 = 256 << 20;

/// Where random reads begin.
#[derive(Debug, Clone, Copy)]
pub struct RandomPattern {
    /// Bytes of a read.
    pub read_bytes: u32,
    /// Offsets are `shift` plus multiples of `step`.
    pub step: u64,
    /// See `step`.
    pub shift: u64,
    /// Same seed, same offsets.
    pub seed: u64,
}

/// Reads per second of a pattern over a file, with a read in each of the engine's slots always in flight.
pub fn random_read_rate(
    engine: &mut dyn ReadEngine,
    file: &DirectFile,
    pattern: RandomPattern,
    span: Duration,
) -> Result<f64, IoError> {
    let room = file.len().saturating_sub(pattern.shift + u64::from(pattern.read_bytes));
    let places = room / pattern.step.max(1) + 1;
    let mut random = SplitMix64::seed_from_u64(pattern.seed);
    let mut offset = || pattern.shift + random.next_u64() % places * pattern.step;
    let (mut batch, mut done) = (ReadBatch::new(), Vec::new());
    for slot in 0..engine.slots().count() as u32 {
        batch.read(u64::from(slot), offset(), slot, pattern.read_bytes);
    }
    let start = Instant::now();
    engine.submit(&batch)?;
    let mut reads = 0u64;
    // At least one read, so that a disk that others keep busy gives a low rate and not zero.
    while start.elapsed() < span || reads == 0 {
        done.clear();
        engine.wait(1, &mut done)?;
        batch.clear();
        for completion in done.drain(..) {
            completion.result?;
            batch.read(completion.tag, offset(), completion.tag as u32, pattern.read_bytes);
            reads += 1;
        }
        engine.submit(&batch)?;
    }
    let rate = reads as f64 / start.elapsed().as_secs_f64();
    done.clear();
    engine.wait(usize::MAX, &mut done)?;
    Ok(rate)
}

/// Bytes per second of one long read from a random place on, for at most `span`.
pub fn sequential_read_rate(
    file: &Arc<DirectFile>,
    options: StreamOptions,
    span: Duration,
    seed: u64,
) -> Result<f64, IoError> {
    let mut reader = SequentialReader::new(Arc::clone(file), options)?;
    let half = file.len() / 2;
    let from = SplitMix64::seed_from_u64(seed).next_u64() % half.max(1) / 4096 * 4096;
    let start = Instant::now();
    reader.restart(&[Extent { offset: from, length: file.len() - from }, Extent { offset: 0, length: from }])?;
    let mut bytes = 0;
    while let Some(chunk) = reader.next()? {
        bytes += chunk.bytes.len();
        if start.elapsed() >= span {
            break;
        }
    }
    Ok(bytes as f64 / start.elapsed().as_secs_f64())
}

/// Bytes per second that a long direct read of this file reaches, measured for about a second.
pub fn sequential_bandwidth(path: &Path) -> Result<f64, IoError> {
    let file = Arc::new(DirectFile::open(path, DirectIo::Optional)?);
    sequential_read_rate(&file, StreamOptions::default(), Duration::from_secs(1), 1)
}

/// How far a measurement is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MeasureProgress {
    /// The scratch file has this many of its bytes.
    Writing {
        /// Bytes written.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// Rates are measured.
    Measuring {
        /// Steps finished.
        done: usize,
        /// Steps in all.
        total: usize,
    },
}

/// What was measured, and how far it can be believed.
#[derive(Debug, Clone, PartialEq)]
pub struct Measurement {
    /// The rates.
    pub profile: DiskProfile,
    /// The share of the bytes that the disk read and wrote meanwhile which was not this measurement's, where the system tells.
    pub foreign: Option<f64>,
}

/// Measures the disk below `path` within about `budget`: a large file there, or a folder, in which a scratch file
/// of `scratch_bytes` is written first (not counted in the budget) and removed afterwards.
pub fn measure_profile(
    path: &Path,
    scratch_bytes: u64,
    budget: Duration,
    progress: &mut dyn FnMut(MeasureProgress),
) -> Result<Measurement, IoError> {
    let length = std::fs::metadata(path).map(|m| if m.is_file() { m.len() } else { 0 });
    let length = length.map_err(|source| IoError::Open { path: path.to_path_buf(), source })?;
    let scratch = if length >= PROFILED_FILE_BYTES_MIN {
        None
    } else {
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
        let total = scratch_bytes.max(16 << 20);
        let written = &mut |done| progress(MeasureProgress::Writing { done, total });
        Some(ScratchFile::create(folder, total, written)?)
    };
    let path = scratch.as_ref().map_or(path, |scratch| scratch.path());
    let file = Arc::new(DirectFile::open(path, DirectIo::Optional)?);

    let cells = PROFILE_READ_BYTES.len() * PROFILE_DEPTHS.len();
    // The sequential read counts as five cells: it is the figure that everything is compared with.
    let slice = budget / (cells as u32 + 5);
    let total = cells + 1;
    let before = moved_bytes(path);
    progress(MeasureProgress::Measuring { done: 0, total });
    let sequential_bytes_per_s = sequential_read_rate(&file, StreamOptions::default(), slice * 5, 1)?;
    let mut random = Vec::with_capacity(cells);
    let mut engine_name = "";
    for read_bytes in PROFILE_READ_BYTES {
        for depth in PROFILE_DEPTHS {
            progress(MeasureProgress::Measuring { done: random.len() + 1, total });
            // Offsets at 4 KiB also where the file asks for nothing (buffered).
            let alignment = Alignment { memory: file.alignment().memory.max(4096), ..file.alignment() };
            let slots = Slots::new(depth as usize, read_bytes as usize, alignment)?;
            let mut engine = Engines::default().open(Arc::clone(&file), slots, depth as usize)?;
            engine_name = engine.name();
            let seed = read_bytes + u64::from(depth);
            let pattern = RandomPattern { read_bytes: read_bytes as u32, step: 4096, shift: 0, seed };
            let reads_per_s = random_read_rate(&mut *engine, &file, pattern, slice)?;
            random.push(RandomRate { read_bytes, depth, reads_per_s });
        }
    }
    let moved = moved_bytes(path).zip(before).map(|(after, before)| after.saturating_sub(before) as f64);
    progress(MeasureProgress::Measuring { done: total, total });
    let of_random: f64 = random.iter().map(|rate| rate.bytes_per_s() * slice.as_secs_f64()).sum();
    let own = sequential_bytes_per_s * 5.0 * slice.as_secs_f64() + of_random;
    Ok(Measurement {
        profile: DiskProfile {
            version: PROFILE_VERSION,
            device: device_key(path),
            mode: file.mode().to_string(),
            engine: engine_name.into(),
            sequential_bytes_per_s,
            random,
        },
        foreign: moved.map(|moved| if moved > 0.0 { (1.0 - own / moved).max(0.0) } else { 0.0 }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_measured_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let budget = Duration::from_millis(200);
        let (mut steps, mut written) = (Vec::new(), 0);
        let measured = measure_profile(folder.path(), 16 << 20, budget, &mut |progress| match progress {
            MeasureProgress::Writing { done, .. } => written = done,
            MeasureProgress::Measuring { done, .. } => steps.push(done),
        });
        let Measurement { profile, foreign } = measured.unwrap();
        assert!(foreign.is_none_or(|share| (0.0..=1.0).contains(&share)), "{foreign:?}");
        assert_eq!(written, 16 << 20);
        assert!(profile.is_sound(), "{profile:?}");
        assert_eq!(profile.random.len(), 35);
        assert_eq!(steps, (0..=36).collect::<Vec<_>>());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
