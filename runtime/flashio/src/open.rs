//! How an engine is chosen and put together.

use std::sync::Arc;

use crate::faults::FaultyTransport;
use crate::queue::QueuedEngine;
use crate::threads::ThreadTransport;
use crate::transport::Transport;
use crate::{DirectFile, EngineChoice, EngineOptions, IoError, ReadEngine, Slots};

/// Opens an engine over a file with the usual options.
pub fn open_engine(
    choice: EngineChoice,
    file: Arc<DirectFile>,
    slots: Slots,
    depth: usize,
) -> Result<Box<dyn ReadEngine>, IoError> {
    open_engine_with(choice, file, slots, &EngineOptions { depth, ..EngineOptions::default() })
}

/// Opens an engine over a file.
pub fn open_engine_with(
    choice: EngineChoice,
    file: Arc<DirectFile>,
    slots: Slots,
    options: &EngineOptions,
) -> Result<Box<dyn ReadEngine>, IoError> {
    let (mut transport, note) = open_transport(choice, &file, options)?;
    if let Some(plan) = options.faults {
        let unit = file.alignment().file_unit() as usize;
        transport = Box::new(FaultyTransport::new(transport, plan, unit, options.depth.max(1)));
    }
    Ok(Box::new(QueuedEngine::new(transport, note, file, slots, options)?))
}

/// Whether an engine of this choice reads with threads of its own on this machine.
pub fn reads_with_threads(choice: EngineChoice) -> bool {
    match choice {
        EngineChoice::Threads => true,
        EngineChoice::IoUring => false,
        #[cfg(target_os = "linux")]
        EngineChoice::Auto => !crate::uring::is_there(),
        #[cfg(not(target_os = "linux"))]
        EngineChoice::Auto => true,
    }
}

/// The transport and, where it is not the first choice, why.
fn open_transport(
    choice: EngineChoice,
    file: &Arc<DirectFile>,
    options: &EngineOptions,
) -> Result<(Box<dyn Transport>, String), IoError> {
    let threads = || ThreadTransport::new(Arc::clone(file), options.threads, options.depth);
    match choice {
        EngineChoice::Threads => Ok((Box::new(threads()?), String::new())),
        EngineChoice::IoUring => Ok((open_uring(file, options)?, String::new())),
        EngineChoice::Auto => match open_uring(file, options) {
            Ok(transport) => Ok((transport, String::new())),
            Err(error) => Ok((Box::new(threads()?), format!("{error}"))),
        },
    }
}

#[cfg(target_os = "linux")]
fn open_uring(file: &Arc<DirectFile>, options: &EngineOptions) -> Result<Box<dyn Transport>, IoError> {
    Ok(Box::new(crate::uring::UringTransport::new(Arc::clone(file), options.depth)?))
}

#[cfg(not(target_os = "linux"))]
fn open_uring(_: &Arc<DirectFile>, _: &EngineOptions) -> Result<Box<dyn Transport>, IoError> {
    Err(IoError::Engine {
        engine: "io_uring",
        operation: "start",
        source: std::io::Error::from(std::io::ErrorKind::Unsupported),
    })
}
