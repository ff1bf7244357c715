//! From an opened bundle to a model that can be fed: memory plan, resident section, FFN source.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use flashlm_formats::bundle::{Bundle, Extent as BundleExtent, Section, SectionInfo};
use flashlm_io::{
    AlignedMemory, DirectFile, DirectIo, DiskProfile, EngineChoice, EngineOptions, Extent, FaultPlan, Mode,
    SequentialReader, StreamOptions, device_key, profile_dir,
};
use flashlm_kernels::Threads;

use xxhash_rust::xxh3::Xxh3;

use crate::cache::PolicyKind;
use crate::error::{Result, RuntimeError};
use crate::ffn::checks::GroupChecks;
use crate::ffn::flash::{ArenaPlan, FlashFfn, FlashOptions, ReadCut};
use crate::ffn::resident::ResidentFfn;
use crate::ffn::streamed::{Pinned, StreamedFfn, StreamedParts};
use crate::memory;
use crate::model::ffn::{FfnSource, Records};
use crate::model::forward::Forward;
use crate::model::kv_cache::KvDtype;
use crate::model::weights::{BytesRange, ModelWeights, SharedBytes, TensorBytes, TensorSource};
use crate::plan::{MemoryPlan, PlanItem, SectionBytes};
use crate::planner::ReadCost;
use crate::predictor::LayerPredictors;

/// A disk of which nothing is known: 16 KiB at 0.75 GB/s, 64 KiB at 1.5 GB/s.
const USUAL_REQUEST_NS: f64 = 14_500.0;
const USUAL_BYTE_NS: f64 = 0.445;

/// Where the FFN is to come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FfnChoice {
    /// All neurons in memory.
    Resident,
    /// All neurons read for every token.
    Streamed,
    /// Predicted neurons read where they are not cached.
    Flash,
    /// The published baseline: the whole model read for every token, attention too.
    Naive,
    /// The published baseline: as many layers' neurons pinned as fit, the others read for every token.
    Hybrid,
}

/// How to open a bundle.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Tokens the KV cache holds.
    pub context: usize,
    /// Bytes for the whole process; `None` takes what the machine or the memory cgroup has.
    pub budget: Option<u64>,
    /// Where the FFN comes from; `None` takes `Flash` where the bundle has predictors, else `Resident` where it fits.
    pub ffn: Option<FfnChoice>,
    /// Compute what the bundle's predictors choose, or, with `false`, every neuron. For `Flash` only.
    pub predict: bool,
    /// Read ahead what a layer will probably want. For `Flash` only.
    pub look_ahead: bool,
    /// Which groups of neurons stay in memory. For `Flash` only.
    pub policy: PolicyKind,
    /// How reads are cut. For `Flash` only.
    pub cut: ReadCut,
    /// What reading costs; `None` takes the profile kept for the disk, or a usual one. For `Flash` only.
    pub read_cost: Option<ReadCost>,
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
    /// How long a read may take before the run ends with an error.
    pub deadline: Duration,
    /// What shall go wrong with reads on purpose, for tests.
    pub faults: Option<FaultPlan>,
}

impl LoadOptions {
    /// Room for `context` tokens; everything else as the `flashlm` command has it when it is not told.
    pub fn new(context: usize) -> Self {
        Self {
            context,
            budget: None,
            ffn: None,
            predict: true,
            look_ahead: true,
            policy: PolicyKind::DEFAULT,
            cut: ReadCut::default(),
            read_cost: None,
            kv: KvDtype::F16,
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            direct: DirectIo::Optional,
            engine: EngineChoice::Auto,
            verify: true,
            deadline: EngineOptions::default().deadline,
            faults: None,
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
    let Planned { choice, plan, arena, pinned } = plan(bundle, options)?;

    let file = Arc::new(DirectFile::open(bundle.path(), options.direct)?);
    let threads = Threads::new(options.threads)
        .map_err(|source| RuntimeError::Threads { threads: options.threads.get(), source })?;
    if (file.identity().device, file.identity().inode, file.identity().size) != bundle.identity() {
        return Err(RuntimeError::Replaced { path: bundle.path().to_path_buf() });
    }
    let LoadOptions { engine, deadline, faults, .. } = *options;
    let stream = StreamOptions { engine, deadline, faults, ..StreamOptions::default() };
    let mut reader = SequentialReader::new(Arc::clone(&file), stream)?;

    let resident = bundle.resident();
    let layers_loaded = if choice == FfnChoice::Resident { spec.layers } else { pinned };
    let total = resident.extent.bytes + (layers_loaded * bundle.layout().layer_bytes()) as u64;

    let mut notices = Vec::new();
    if file.mode() == Mode::Buffered {
        notices.push(Notice {
            important: options.direct != DirectIo::Disabled,
            text: format!("reads go through the page cache: {}", file.reason()),
        });
    }
    let mut load_layers = |reader: &mut SequentialReader| -> Result<ResidentFfn> {
        let progress = &mut |done| progress(done, total);
        let records = read_flash(bundle, layers_loaded, &threads, reader, progress)?;
        Ok(ResidentFfn::new(spec.ffn, Records::of(bundle), records))
    };
    let ffn: Box<dyn FfnSource> = match choice {
        FfnChoice::Resident => Box::new(load_layers(&mut reader)?),
        FfnChoice::Streamed | FfnChoice::Naive | FfnChoice::Hybrid => {
            let mut parts = StreamedParts { resident_too: choice == FfnChoice::Naive, ..StreamedParts::default() };
            if pinned > 0 {
                parts.pinned = Some(Pinned { layers: pinned, source: load_layers(&mut reader)? });
                notices.push(Notice { important: false, text: format!("{pinned} layers pinned") });
            }
            let source = StreamedFfn::new(bundle, Arc::clone(&file), stream, options.verify, parts)?;
            notices.push(Notice { important: false, text: format!("FFN streamed from flash: {}", source.engine()) });
            Box::new(source)
        }
        FfnChoice::Flash => {
            let predictors = load_predictors(bundle, options, &mut reader)?;
            if predictors.is_none() {
                let text = "no predictor: every neuron is computed".to_owned();
                notices.push(Notice { important: options.predict, text });
            }
            let (cost, known) = read_cost(bundle, options);
            notices.push(Notice { important: false, text: known });
            let flash = FlashOptions {
                arena: arena.expect("planned with this choice"),
                policy: options.policy,
                cost,
                engine,
                deadline,
                faults,
                verify: options.verify,
                look_ahead: options.look_ahead,
                cut: options.cut,
            };
            let source = FlashFfn::new(bundle, Arc::clone(&file), predictors, &flash)?;
            notices.push(Notice { important: false, text: format!("FFN from flash: {}", source.engine()) });
            Box::new(source)
        }
    };
    // Last: the memory for neurons is taken from the system meanwhile.
    let before = (layers_loaded * bundle.layout().layer_bytes()) as u64;
    let progress = &mut |done| progress(before + done, total);
    let memory = read_section(bundle, &mut reader, resident, "resident section", progress)?;
    let weights = ModelWeights::load(spec, &mut BundleTensors { bundle, memory: Arc::new(memory) })?;
    notices.push(Notice {
        important: false,
        text: format!("{} threads, {}", threads.count(), flashlm_kernels::instruction_set()),
    });
    let forward = Forward::new(spec.clone(), weights, ffn, threads, options.context, options.kv)?;
    Ok(Loaded { forward, plan, notices })
}

fn load_predictors(
    bundle: &Bundle,
    options: &LoadOptions,
    reader: &mut SequentialReader,
) -> Result<Option<Vec<LayerPredictors>>> {
    let (Some(section), Some(info), true) = (bundle.predictors(), &bundle.manifest().predictors, options.predict)
    else {
        return Ok(None);
    };
    let blob: SharedBytes = Arc::new(read_section(bundle, reader, section, "predictors section", &mut |_| ())?);
    LayerPredictors::load_all(&blob, info, bundle.spec()).map(Some)
}

/// What reading costs, and where that is known from.
pub fn read_cost(bundle: &Bundle, options: &LoadOptions) -> (ReadCost, String) {
    if let Some(cost) = options.read_cost {
        return (cost, "reads planned with a given cost".into());
    }
    let device = device_key(bundle.path());
    let profile = profile_dir().and_then(|dir| DiskProfile::load(&dir, &device));
    let fitted = profile.and_then(|profile| {
        let best =
            |bytes| profile.random.iter().filter(|r| r.read_bytes == bytes).map(|r| r.bytes_per_s()).reduce(f64::max);
        let mut points: Vec<(u64, f64)> =
            profile.random.iter().map(|r| r.read_bytes).filter_map(|b| Some((b, best(b)?))).collect();
        points.dedup();
        ReadCost::fit(&points).ok()
    });
    match fitted {
        Some(cost) => (cost, format!("reads planned with the kept profile of {device}")),
        None => (
            ReadCost::new(USUAL_REQUEST_NS, USUAL_BYTE_NS).expect("a possible cost"),
            format!("reads planned for a usual disk; `flashlm disk {}` measures yours", bundle.path().display()),
        ),
    }
}

/// What was chosen for a run, and the memory it takes.
pub struct Planned {
    /// Where the FFN comes from.
    pub choice: FfnChoice,
    /// The memory.
    pub plan: MemoryPlan,
    /// How the memory for neurons is divided, for [`FfnChoice::Flash`].
    pub arena: Option<ArenaPlan>,
    /// Layers whose neurons stay in memory, for [`FfnChoice::Hybrid`].
    pub pinned: usize,
}

/// The FFN source and its memory plan: what was asked for, else the first that fits.
///
/// # Errors
/// `BudgetTooSmall` with the smallest budget that any of them works in.
pub fn plan(bundle: &Bundle, options: &LoadOptions) -> Result<Planned> {
    let budget = options.budget.or_else(memory::available);
    let choices = match options.ffn {
        Some(choice) => vec![choice],
        None if bundle.predictors().is_some() => vec![FfnChoice::Flash, FfnChoice::Resident, FfnChoice::Streamed],
        None => vec![FfnChoice::Resident, FfnChoice::Streamed],
    };
    // What the error names: on a small model the buffers of a streamed FFN can be more than all of a resident one.
    let mut smallest: Option<MemoryPlan> = None;
    for choice in choices {
        let planned = plan_choice(bundle, options, choice, budget);
        if budget.is_none_or(|budget| planned.plan.total() <= budget) {
            return Ok(planned);
        }
        if smallest.as_ref().is_none_or(|smallest| planned.plan.total() < smallest.total()) {
            smallest = Some(planned.plan);
        }
    }
    let plan = smallest.expect("there is at least one choice");
    plan.check(budget.unwrap_or(0))?;
    unreachable!("a plan within the budget was returned")
}

/// The plan with this source: within the budget, or the smallest there is.
fn plan_choice(bundle: &Bundle, options: &LoadOptions, choice: FfnChoice, budget: Option<u64>) -> Planned {
    let item = |name, bytes| PlanItem { name, bytes };
    let sections = SectionBytes {
        resident: bundle.resident().extent.bytes,
        index: bundle.section(Section::Index).map_or(0, |s| s.extent.bytes),
        tokenizer: bundle.tokenizer().len() as u64,
    };
    let whole =
        |ffn, items: &[PlanItem]| MemoryPlan::new(bundle.spec(), options.context, options.kv, sections, (ffn, items));
    match choice {
        FfnChoice::Resident => {
            let bytes = bundle.spec().layers as u64 * bundle.layout().layer_bytes() as u64;
            Planned { choice, plan: whole("resident", &[item("FFN", bytes)]), arena: None, pinned: 0 }
        }
        FfnChoice::Streamed | FfnChoice::Naive | FfnChoice::Hybrid => {
            let buffers = item("FFN buffers", StreamedFfn::bytes(bundle.layout()));
            let layer = bundle.layout().layer_bytes() as u64;
            let pinned = match (choice, budget) {
                (FfnChoice::Hybrid, Some(budget)) => {
                    let left = budget.saturating_sub(whole("", std::slice::from_ref(&buffers)).total());
                    ((left / layer) as usize).min(bundle.spec().layers)
                }
                (FfnChoice::Hybrid, None) => bundle.spec().layers,
                _ => 0,
            };
            let plan = whole("streamed", &[buffers, item("pinned layers", pinned as u64 * layer)]);
            Planned { choice, plan, arena: None, pinned }
        }
        FfnChoice::Flash => {
            let predictors = bundle.predictors().filter(|_| options.predict).map_or(0, |s| {
                // Their vectors are kept as numbers, beside the blob.
                s.extent.bytes + 12 * (bundle.spec().ffn.size * bundle.spec().layers) as u64
            });
            let slot = slot_bytes(bundle, options);
            let items = |arena: &ArenaPlan| {
                let kept: u64 = arena.slots.iter().map(|s| u64::from(*s)).sum();
                [
                    item("predictors", predictors),
                    item("neuron cache", kept * slot),
                    item("transient neurons", 2 * u64::from(arena.transient) * slot),
                    item("neuron tables", FlashFfn::working_bytes(bundle.layout(), bundle.spec().layers, arena)),
                ]
            };
            let plan_of = |arena: &ArenaPlan| whole("flash", &items(arena));
            let (cost, _) = read_cost(bundle, options);
            let arena =
                ArenaPlan::within(bundle, &cost, |arena| budget.is_none_or(|budget| plan_of(arena).total() <= budget));
            Planned { choice, plan: plan_of(&arena), arena: Some(arena), pinned: 0 }
        }
    }
}

/// Bytes that a slot takes: a group, and what the disk's alignment adds.
fn slot_bytes(bundle: &Bundle, options: &LoadOptions) -> u64 {
    let group = bundle.layout().group_bytes();
    let unit = DirectFile::open(bundle.path(), options.direct).map_or(512, |file| {
        let alignment = file.alignment();
        alignment.memory.max(alignment.length).max(64)
    });
    group.next_multiple_of(unit) as u64
}

/// Reads a section whole, checking its checksum.
fn read_section(
    bundle: &Bundle,
    reader: &mut SequentialReader,
    section: SectionInfo,
    name: &str,
    progress: &mut dyn FnMut(u64),
) -> Result<AlignedMemory> {
    let mut memory = AlignedMemory::new(section.extent.bytes as usize)?;
    memory.populate();
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
        let (path, part) = (bundle.path().to_path_buf(), name.to_owned());
        return Err(RuntimeError::Checksum { path, part, expected, found });
    }
    Ok(memory)
}

/// Reads the groups of the first layers, checking each group's checksum.
fn read_flash(
    bundle: &Bundle,
    layers: usize,
    threads: &Threads,
    reader: &mut SequentialReader,
    progress: &mut dyn FnMut(u64),
) -> Result<AlignedMemory> {
    let checks = GroupChecks::new(bundle);
    let mut memory = AlignedMemory::new(bundle.layout().layer_bytes() * layers)?;
    memory.populate();
    let mut at = 0;
    for layer in 0..layers {
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

impl BundleTensors<'_> {
    fn part(&self, extent: BundleExtent) -> BytesRange {
        let start = (extent.offset - self.bundle.resident().extent.offset) as usize;
        BytesRange::new(self.memory.clone(), start..start + extent.bytes as usize)
    }
}

impl TensorSource for BundleTensors<'_> {
    fn tensor(&mut self, name: &str) -> Result<TensorBytes> {
        let entry = self.bundle.resident_tensor(name).ok_or_else(|| RuntimeError::MissingTensor(name.into()))?;
        let (data, scales) = (self.part(entry.extent), entry.scales.map(|scales| self.part(scales)));
        Ok(TensorBytes { format: entry.format, shape: entry.shape.clone(), data, scales })
    }

    fn ffn_scales(&mut self, layer: usize) -> Result<Option<BytesRange>> {
        Ok(self.bundle.ffn_scales(layer).map(|scales| self.part(scales)))
    }
}
