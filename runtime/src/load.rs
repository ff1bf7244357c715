//! From an opened bundle to a model that can be fed: memory plan, resident section, FFN source.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use flashlm_formats::bundle::{Bundle, Extent as BundleExtent, PredictorInfo, Section, SectionInfo};
use flashlm_formats::model::ModelSpec;
use flashlm_io::{
    AlignedMemory, DirectFile, DirectIo, DiskProfile, EngineChoice, EngineOptions, Extent, FaultPlan, Mode,
    SequentialReader, StreamOptions, device_key, profile_dir,
};
use flashlm_kernels::Threads;

use xxhash_rust::xxh3::Xxh3;

use crate::budget::human_bytes;
use crate::cache::PolicyKind;
use crate::error::{Result, RuntimeError};
use crate::ffn::checks::GroupChecks;
use crate::ffn::flash::{ArenaPlan, FlashFfn, FlashOptions, ReadCut};
use crate::ffn::predicted::PredictedFfn;
use crate::ffn::resident::ResidentFfn;
use crate::ffn::streamed::{Pinned, StreamedFfn, StreamedParts};
use crate::memory;
use crate::model::ffn::{FfnSource, Records, Selection};
use crate::model::forward::{Forward, PIECE_TOKENS};
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
    /// All neurons in memory, read once.
    Resident,
    /// All neurons read for every token.
    Streamed,
    /// Predicted neurons read where they are not cached.
    Flash,
    /// The published baseline: the whole model read for every token, attention too, and every neuron computed.
    Naive,
    /// The published baseline: as many layers' neurons pinned as fit, the others read for every token, and every neuron computed.
    Hybrid,
}

impl FfnChoice {
    /// Whether predictors have a say in what is computed: not in the baselines, which are what others do without.
    pub fn obeys_predictors(self) -> bool {
        !matches!(self, FfnChoice::Naive | FfnChoice::Hybrid)
    }

    /// Its name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            FfnChoice::Resident => "resident",
            FfnChoice::Streamed => "streamed",
            FfnChoice::Flash => "flash",
            FfnChoice::Naive => "naive",
            FfnChoice::Hybrid => "hybrid",
        }
    }
}

/// How to open a bundle.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Tokens the KV cache holds.
    pub context: usize,
    /// Bytes for the whole process; `None` takes what the machine or the memory cgroup has.
    pub budget: Option<u64>,
    /// Where the FFN comes from; `None` takes `Resident` where it fits, else `Flash` where predictors choose, else `Streamed`.
    /// The text is the same.
    pub ffn: Option<FfnChoice>,
    /// Compute what the bundle's predictors choose, where it has any, or, with `false`, every neuron: another text. The baselines
    /// compute every neuron.
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
    let Planned { choice, plan, arena, pinned, fallback, .. } = plan(bundle, options)?;

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

    let mut notices: Vec<Notice> = fallback.map(|text| Notice { important: true, text }).into_iter().collect();
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
    let predictors = match predictors_of(bundle, options, choice) {
        Some((section, info)) => Some(load_predictors(bundle, section, info, &mut reader)?),
        None => None,
    };
    let ffn: Box<dyn FfnSource> = match choice {
        FfnChoice::Resident => {
            notices.push(Notice { important: false, text: "all neurons in memory".into() });
            obeying(predictors, load_layers(&mut reader)?, spec)
        }
        FfnChoice::Streamed | FfnChoice::Naive | FfnChoice::Hybrid => {
            let mut parts = StreamedParts { resident_too: choice == FfnChoice::Naive, ..StreamedParts::default() };
            if pinned > 0 {
                parts.pinned = Some(Pinned { layers: pinned, source: load_layers(&mut reader)? });
                notices.push(Notice { important: false, text: format!("{pinned} layers pinned") });
            }
            let source = StreamedFfn::new(bundle, Arc::clone(&file), stream, options.verify, parts)?;
            notices.push(Notice { important: false, text: format!("FFN streamed from flash: {}", source.engine()) });
            obeying(predictors, source, spec)
        }
        FfnChoice::Flash => {
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

/// The section of the predictors that decide what `choice` computes, if any do.
fn predictors_of<'a>(
    bundle: &'a Bundle,
    options: &LoadOptions,
    choice: FfnChoice,
) -> Option<(SectionInfo, &'a PredictorInfo)> {
    let decide = options.predict && choice.obeys_predictors();
    bundle.predictors().zip(bundle.manifest().predictors.as_ref()).filter(|_| decide)
}

fn load_predictors(
    bundle: &Bundle,
    section: SectionInfo,
    info: &PredictorInfo,
    reader: &mut SequentialReader,
) -> Result<Vec<LayerPredictors>> {
    let blob: SharedBytes = Arc::new(read_section(bundle, reader, section, "predictors section", &mut |_| ())?);
    LayerPredictors::load_all(&blob, info, bundle.spec())
}

/// A source that has all neurons, and computes those that the predictors choose.
fn obeying(
    predictors: Option<Vec<LayerPredictors>>,
    source: impl FfnSource + 'static,
    spec: &ModelSpec,
) -> Box<dyn FfnSource> {
    match predictors {
        Some(predictors) => {
            let own = predictors.into_iter().map(|layer| layer.own).collect();
            Box::new(PredictedFfn::new(source, Some(own), spec.ffn.size))
        }
        None => Box::new(source),
    }
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
    /// Whether predictors choose what is computed; every neuron is where they do not.
    pub predicted: bool,
    /// Why it is a slow way, where the budget left no better one.
    pub fallback: Option<String>,
}

/// The FFN source and its memory plan: what was asked for, else the first that fits.
///
/// # Errors
/// `BudgetTooSmall` with the smallest budget that any of them works in.
pub fn plan(bundle: &Bundle, options: &LoadOptions) -> Result<Planned> {
    let budget = options.budget.or_else(memory::available);
    let predicted = bundle.predictors().is_some() && options.predict;
    let choices = match options.ffn {
        Some(choice) => vec![choice],
        None if predicted => vec![FfnChoice::Resident, FfnChoice::Flash, FfnChoice::Streamed],
        None => vec![FfnChoice::Resident, FfnChoice::Streamed],
    };
    let mut refused: Vec<Planned> = Vec::new();
    for choice in choices {
        let mut planned = plan_choice(bundle, options, choice, budget);
        if budget.is_none_or(|budget| planned.plan.total() <= budget) {
            if let (FfnChoice::Streamed, Some(better)) = (choice, refused.last()) {
                planned.fallback = Some(fallback(better, budget.unwrap_or(u64::MAX), predicted));
            }
            return Ok(planned);
        }
        refused.push(planned);
    }
    // What the error names: on a small model the buffers of a streamed FFN can be more than all of a resident one.
    let smallest = refused.into_iter().map(|planned| planned.plan).min_by_key(MemoryPlan::total);
    let plan = smallest.expect("there is at least one choice");
    plan.check(budget.unwrap_or(0))?;
    unreachable!("a plan within the budget was returned")
}

/// What is said where neurons are read for every token though nobody asked for that; `better` is the way that did not fit.
fn fallback(better: &Planned, budget: u64, predicted: bool) -> String {
    let what = if predicted { "a neuron cache does" } else { "all neurons do" };
    let (budget, needed) = (human_bytes(budget), better.plan.total());
    format!(
        "{what} not fit in {budget}: all neurons are read for every token; --memory {needed} is enough to avoid that"
    )
}

/// The plan with this source: within the budget, or the smallest there is.
fn plan_choice(bundle: &Bundle, options: &LoadOptions, choice: FfnChoice, budget: Option<u64>) -> Planned {
    let item = |name, bytes| PlanItem { name, bytes };
    let sections = SectionBytes {
        resident: bundle.resident().extent.bytes,
        index: bundle.section(Section::Index).map_or(0, |s| s.extent.bytes),
        tokenizer: bundle.tokenizer().len() as u64,
    };
    let spec = bundle.spec();
    let predictors = predictors_of(bundle, options, choice).map_or(0, |(section, info)| {
        // Their vectors are kept as numbers, beside the blob; and what they choose for the tokens of a piece.
        section.extent.bytes
            + LayerPredictors::vector_bytes(info, spec)
            + Selection::bytes(PIECE_TOKENS.min(options.context), spec.ffn.size)
    });
    let whole = |items: &[PlanItem]| {
        let items = [&[item("predictors", predictors)], items].concat();
        MemoryPlan::new(spec, options.context, options.kv, sections, (choice.name(), &items))
    };
    let predicted = predictors > 0;
    let planned = |plan, arena, pinned| Planned { choice, plan, arena, pinned, predicted, fallback: None };
    match choice {
        FfnChoice::Resident => {
            let bytes = spec.layers as u64 * bundle.layout().layer_bytes() as u64;
            planned(whole(&[item("FFN", bytes)]), None, 0)
        }
        FfnChoice::Streamed | FfnChoice::Naive | FfnChoice::Hybrid => {
            let buffers = item("FFN buffers", StreamedFfn::bytes(bundle.layout()));
            let layer = bundle.layout().layer_bytes() as u64;
            let pinned = match (choice, budget) {
                (FfnChoice::Hybrid, Some(budget)) => {
                    let left = budget.saturating_sub(whole(std::slice::from_ref(&buffers)).total());
                    ((left / layer) as usize).min(spec.layers)
                }
                (FfnChoice::Hybrid, None) => spec.layers,
                _ => 0,
            };
            planned(whole(&[buffers, item("pinned layers", pinned as u64 * layer)]), None, pinned)
        }
        FfnChoice::Flash => {
            let slot = slot_bytes(bundle, options);
            let items = |arena: &ArenaPlan| {
                let kept: u64 = arena.slots.iter().map(|s| u64::from(*s)).sum();
                [
                    item("neuron cache", kept * slot),
                    item("transient neurons", 2 * u64::from(arena.transient) * slot),
                    item("neuron tables", FlashFfn::working_bytes(bundle.layout(), spec.layers, arena)),
                ]
            };
            let plan_of = |arena: &ArenaPlan| whole(&items(arena));
            let (cost, _) = read_cost(bundle, options);
            let arena =
                ArenaPlan::within(bundle, &cost, |arena| budget.is_none_or(|budget| plan_of(arena).total() <= budget));
            planned(plan_of(&arena), Some(arena), 0)
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
