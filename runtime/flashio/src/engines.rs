//! How an engine is chosen and put together.

use std::sync::Arc;
use std::time::Duration;

use crate::faults::FaultyTransport;
use crate::queue::QueuedEngine;
use crate::threads::ThreadTransport;
use crate::transport::Transport;
use crate::{DirectFile, EngineChoice, FaultPlan, IoError, ReadEngine, Slots};

/// Most reader threads of an engine.
const THREADS_MAX: usize = 32;

/// Reader threads of an engine with this many requests at the device.
fn threads_for(depth: usize) -> usize {
    depth.clamp(1, THREADS_MAX)
}

/// Opens engines, all in the same way. Whoever opens some for others is handed this, and knows nothing of what it is set to.
#[derive(Debug, Clone, Copy)]
pub struct Engines {
    choice: EngineChoice,
    deadline: Duration,
    pieces_per_read_max: usize,
    faults: Option<FaultPlan>,
}

impl Default for Engines {
    fn default() -> Self {
        Self { choice: EngineChoice::Auto, deadline: Duration::from_secs(30), pieces_per_read_max: 256, faults: None }
    }
}

impl From<EngineChoice> for Engines {
    fn from(choice: EngineChoice) -> Self {
        Self { choice, ..Self::default() }
    }
}

impl Engines {
    /// Requests at the device at once that keep any disk busy.
    pub const DEPTH: usize = 128;

    /// How long a read may take before it counts as stalled; 30 s without it. One that the system starts no thread for is made by
    /// the thread that waits, however long it takes.
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Most pieces in one device read; longer requests are continued.
    pub fn with_pieces_per_read_max(self, pieces_per_read_max: usize) -> Self {
        Self { pieces_per_read_max, ..self }
    }

    /// What shall go wrong on purpose, for tests.
    pub fn with_faults(self, faults: FaultPlan) -> Self {
        Self { faults: Some(faults), ..self }
    }

    /// Opens an engine over a file, with this many requests at the device at once.
    pub fn open(&self, file: Arc<DirectFile>, slots: Slots, depth: usize) -> Result<Box<dyn ReadEngine>, IoError> {
        let (mut transport, note) = self.open_transport(&file, depth)?;
        if let Some(plan) = self.faults {
            let unit = file.alignment().file_unit() as usize;
            transport = Box::new(FaultyTransport::new(transport, plan, unit, depth.max(1)));
        }
        let (deadline, pieces) = (self.deadline, self.pieces_per_read_max);
        Ok(Box::new(QueuedEngine::new(transport, note, file, slots, depth, deadline, pieces)?))
    }

    /// Threads of its own that an engine with this many requests at the device reads with on this machine; none with io_uring.
    pub fn threads(&self, depth: usize) -> usize {
        let reads_with_threads = match self.choice {
            EngineChoice::Threads => true,
            EngineChoice::IoUring => false,
            #[cfg(target_os = "linux")]
            EngineChoice::Auto => !crate::uring::is_there(),
            #[cfg(not(target_os = "linux"))]
            EngineChoice::Auto => true,
        };
        if reads_with_threads { threads_for(depth) } else { 0 }
    }

    /// The transport and, where it is not the first choice, why.
    fn open_transport(&self, file: &Arc<DirectFile>, depth: usize) -> Result<(Box<dyn Transport>, String), IoError> {
        let threads = || ThreadTransport::new(Arc::clone(file), threads_for(depth), depth);
        match self.choice {
            EngineChoice::Threads => Ok((Box::new(threads()?), String::new())),
            EngineChoice::IoUring => Ok((open_uring(file, depth)?, String::new())),
            EngineChoice::Auto => match open_uring(file, depth) {
                Ok(transport) => Ok((transport, String::new())),
                Err(error) => Ok((Box::new(threads()?), format!("{error}"))),
            },
        }
    }
}

#[cfg(target_os = "linux")]
fn open_uring(file: &Arc<DirectFile>, depth: usize) -> Result<Box<dyn Transport>, IoError> {
    Ok(Box::new(crate::uring::UringTransport::new(Arc::clone(file), depth)?))
}

#[cfg(not(target_os = "linux"))]
fn open_uring(_: &Arc<DirectFile>, _: usize) -> Result<Box<dyn Transport>, IoError> {
    Err(IoError::Engine {
        engine: "io_uring",
        operation: "start",
        source: std::io::Error::from(std::io::ErrorKind::Unsupported),
    })
}
