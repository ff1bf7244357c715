//! From an opened bundle to a model that can be fed: memory plan, resident section, FFN source.

use std::num::NonZeroUsize;
use std::sync::Arc;

use flashlm_formats::bundle::Bundle;
use flashlm_io::{AlignedMemory, DirectFile, DirectIo, EngineChoice, Extent, Mode, SequentialReader, StreamOptions};
use flashlm_kernels::Threads;

use xxhash_rust::xxh3::Xxh3;

use crate::error::{Result, RuntimeError};
use crate::ffn::checks::GroupChecks;
use crate::ffn::resident::ResidentFfn;
use crate::ffn::streamed::StreamedFfn;
use crate::memory;
use crate::model::ffn::FfnSource;
use crate::model::forward::Forward;
use crate::model::kv_cache::KvDtype;
use crate::model::weights::{ModelWeights, SharedBytes, TensorBytes, TensorSource};
use crate::plan::MemoryPlan;

/// Where the FFN is to come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FfnChoice {
    /// All neurons in memory.
    Resident,
    /// All neurons read for every token.
    Streamed,
}

/// How to open a bundle.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Tokens the KV cache holds.
    pub context: usize,
    /// Bytes for the whole process; `None` takes what the machine or the memory cgroup has.
    pub budget: Option<u64>,
    /// Where the FFN comes from; `None` takes `Resident` where it fits.
    pub ffn: Option<FfnChoice>,
    /// Precision of the KV cache.
    pub kv: KvDtype,
    /// Threads that compute.
    pub threads: NonZeroUsize,
    /// Whether reads bypass the page cache.
    pub direct: DirectIo,
    /// How reads are issued.
    pub engine: EngineChoice,
    /// Hold what is read while decoding against its checksums. What is read while loading always is.
    pub verify: bool,
}

impl LoadOptions {
    /// Room for `context` tokens; everything else as the `flashlm` command has it when it is not told.
    pub fn new(context: usize) -> Self {
        Self {
            context,
            budget: None,
            ffn: None,
            kv: KvDtype::F16,
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            direct: DirectIo::Optional,
            engine: EngineChoice::Auto,
            verify: true,
        }
    }
}

/// Something the user should or could know.
#[derive(Clone, Debug)]
pub struct Notice {
    /// A slow path, or another surprise: shown without being asked for.
    pub important: bool,
    /// The sentence.
    pub text: String,
}

/// A model ready to be fed.
pub struct Loaded {
    /// The model.
    pub forward: Forward,
    /// The memory it takes.
    pub plan: MemoryPlan,
    /// What was chosen.
    pub notices: Vec<Notice>,
}

/// Loads a bundle; `progress` is told bytes read and bytes in all.
pub fn load(bundle: &Bundle, options: &LoadOptions, progress: &mut dyn FnMut(u64, u64)) -> Result<Loaded> {
    let spec = bundle.spec();
    let budget = options.budget.or_else(memory::available);
    let (choice, plan) = choose(bundle, options, budget)?;

    let file = Arc::new(DirectFile::open(bundle.path(), options.direct)?);
    let threads = Threads::new(options.threads)
        .map_err(|source| RuntimeError::Threads { threads: options.threads.get(), source })?;
    let stream = StreamOptions { engine: options.engine, ..StreamOptions::default() };
    let mut reader = SequentialReader::new(Arc::clone(&file), stream)?;

    let resident = bundle.resident().extent.bytes;
    let flash_bytes = if choice == FfnChoice::Resident { bundle.flash().bytes } else { 0 };
    let total = resident + flash_bytes;
    let memory = read_resident(bundle, &mut reader, &mut |done| progress(done, total))?;
    let weights = ModelWeights::load(spec, &mut BundleTensors { bundle, memory: Arc::new(memory) })?;

    let mut notices = Vec::new();
    if file.mode() == Mode::Buffered {
        notices.push(Notice {
            important: options.direct != DirectIo::Disabled,
            text: format!("reads go through the page cache: {}", file.reason()),
        });
    }
    let manifest = bundle.manifest();
    let ffn: Box<dyn FfnSource> = match choice {
        FfnChoice::Resident => {
            let records = read_flash(bundle, &threads, &mut reader, &mut |done| progress(resident + done, total))?;
            Box::new(ResidentFfn::new(spec.ffn, manifest.ffn.dtype, *bundle.layout(), records))
        }
        FfnChoice::Streamed => {
            let source = StreamedFfn::new(bundle, Arc::clone(&file), options.engine, options.verify)?;
            notices.push(Notice { important: false, text: format!("FFN streamed from flash: {}", source.engine()) });
            Box::new(source)
        }
    };
    notices.push(Notice {
        important: false,
        text: format!("{} threads, {}", threads.count(), flashlm_kernels::instruction_set()),
    });
    let forward = Forward::new(spec.clone(), weights, ffn, threads, options.context, options.kv)?;
    Ok(Loaded { forward, plan, notices })
}

/// The FFN source, and its memory plan: what was asked for, else the first that fits.
fn choose(bundle: &Bundle, options: &LoadOptions, budget: Option<u64>) -> Result<(FfnChoice, MemoryPlan)> {
    let fits = |plan: &MemoryPlan| budget.is_none_or(|budget| plan.total() <= budget);
    let choices = match options.ffn {
        Some(choice) => vec![choice],
        None => vec![FfnChoice::Resident, FfnChoice::Streamed],
    };
    // What the error names: on a small model the buffers of a streamed FFN can be more than all of a resident one.
    let mut smallest: Option<MemoryPlan> = None;
    for choice in choices {
        let plan = plan(bundle, options, choice);
        if fits(&plan) {
            return Ok((choice, plan));
        }
        if smallest.as_ref().is_none_or(|smallest| plan.total() < smallest.total()) {
            smallest = Some(plan);
        }
    }
    let plan = smallest.expect("there is at least one choice");
    plan.check(budget.unwrap_or(0))?;
    unreachable!("a plan within the budget was returned")
}

/// The memory that a run with these options takes.
pub fn plan(bundle: &Bundle, options: &LoadOptions, choice: FfnChoice) -> MemoryPlan {
    let ffn = match choice {
        FfnChoice::Resident => ("resident", bundle.flash().bytes),
        FfnChoice::Streamed => ("streamed", StreamedFfn::bytes(bundle.layout())),
    };
    MemoryPlan::new(
        bundle.spec(),
        options.context,
        options.kv,
        bundle.resident().extent.bytes,
        bundle.tokenizer().len() as u64,
        ffn,
    )
}

/// Reads the resident section, checking its checksum.
fn read_resident(
    bundle: &Bundle,
    reader: &mut SequentialReader,
    progress: &mut dyn FnMut(u64),
) -> Result<AlignedMemory> {
    let section = bundle.resident();
    let mut memory = AlignedMemory::new(section.extent.bytes as usize)?;
    let mut hasher = Xxh3::new();
    let mut at = 0;
    reader.restart(&[Extent { offset: section.extent.offset, length: section.extent.bytes }])?;
    while let Some(chunk) = reader.next()? {
        memory.as_mut_slice()[at..at + chunk.bytes.len()].copy_from_slice(chunk.bytes);
        hasher.update(chunk.bytes);
        at += chunk.bytes.len();
        progress(at as u64);
    }
    let (expected, found) = (section.checksum, hasher.digest());
    if expected != found {
        let (path, part) = (bundle.path().to_path_buf(), "resident section".into());
        return Err(RuntimeError::Checksum { path, part, expected, found });
    }
    Ok(memory)
}

/// Reads the groups of all layers, checking each group's checksum.
fn read_flash(
    bundle: &Bundle,
    threads: &Threads,
    reader: &mut SequentialReader,
    progress: &mut dyn FnMut(u64),
) -> Result<AlignedMemory> {
    let checks = GroupChecks::new(bundle);
    let mut memory = AlignedMemory::new(bundle.layout().layer_bytes() * bundle.spec().layers)?;
    let mut at = 0;
    for layer in 0..bundle.spec().layers {
        let extent = bundle.layer(layer);
        reader.restart(&[Extent { offset: extent.offset, length: extent.bytes }])?;
        let start = at;
        while let Some(chunk) = reader.next()? {
            memory.as_mut_slice()[at..at + chunk.bytes.len()].copy_from_slice(chunk.bytes);
            at += chunk.bytes.len();
            progress(at as u64);
        }
        checks.neighbours(threads, layer, 0, &memory.as_slice()[start..at])?;
    }
    Ok(memory)
}

struct BundleTensors<'a> {
    bundle: &'a Bundle,
    memory: Arc<AlignedMemory>,
}

impl TensorSource for BundleTensors<'_> {
    fn tensor(&mut self, name: &str) -> Result<TensorBytes> {
        let entry = self.bundle.resident_tensor(name).ok_or_else(|| RuntimeError::MissingTensor(name.into()))?;
        let start = (entry.extent.offset - self.bundle.resident().extent.offset) as usize;
        let range = start..start + entry.extent.bytes as usize;
        let bytes: SharedBytes = self.memory.clone();
        Ok(TensorBytes { dtype: entry.dtype, shape: entry.shape.clone(), bytes, range })
    }
}
