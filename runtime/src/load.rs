//! From an opened bundle to a model that can be fed: memory plan, resident section, FFN source.

use std::sync::Arc;

use flashlm_formats::bundle::{Bundle, Extent as BundleExtent, PredictorInfo, SectionInfo, TensorEntry};
use flashlm_formats::ids::GroupId;
use flashlm_io::{AlignedMemory, DirectFile, DirectIo, Extent, Mode, SequentialReader, StreamOptions};
use flashlm_kernels::Threads;

use xxhash_rust::xxh3::Xxh3;

use crate::budget::human_bytes;
use crate::engine::{Executor, Forward};
use crate::error::{Result, RuntimeError};
use crate::forward::tables::TableSource;
use crate::forward::weights::ModelWeights;
use crate::memory;
use crate::neurons::checks::GroupChecks;
use crate::neurons::flash::{FlashFfn, FlashOptions};
use crate::neurons::params::NeuronParams;
use crate::neurons::predicted::PredictedFfn;
use crate::neurons::predictor::LayerPredictors;
use crate::neurons::records::Records;
use crate::neurons::resident::ResidentFfn;
use crate::neurons::source::FfnSource;
use crate::neurons::streamed::{Pinned, StreamedFfn, StreamedParts};
use crate::options::{FfnChoice, LoadOptions};
use crate::plan::{MemoryPlan, Planned, plan_reading};
use crate::planner::ReadPlan;
use crate::tables::{Cut, TablePlan, TablesOnFlash};
use crate::tensors::{BytesRange, SharedBytes, TensorBytes, TensorSource};
use crate::threads;

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
    load_on(None, bundle, options, progress)
}

/// As [`load`], on threads that another model uses as well; without, they are started.
pub(crate) fn load_on(
    threads: Option<Arc<Threads>>,
    bundle: &Bundle,
    options: &LoadOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Loaded> {
    let spec = bundle.spec();
    options.budget.map_or(Ok(()), memory::check_budget)?;
    let opened = DirectFile::open(bundle.path(), options.direct);
    let planned = plan_reading(opened.as_ref().ok(), bundle, options)?;
    let Planned { choice, plan, arena, pinned, chunks, scratch_tokens, batch, .. } = planned;
    let Planned { tables, loading_bytes, cost, fallback, .. } = planned;
    let options = &LoadOptions { batch, ..options.clone() };

    let file = Arc::new(opened?);
    let threads = threads.map_or_else(|| threads::start(options.threads).map(Arc::new), Ok)?;
    if (file.identity().device, file.identity().inode, file.identity().size) != bundle.identity() {
        return Err(RuntimeError::Replaced { path: bundle.path().to_path_buf() });
    }
    let engines = options.engines;
    let usual = StreamOptions::default();
    let chunk_bytes = (loading_bytes as usize / usual.chunks).min(usual.chunk_bytes);
    let stream = StreamOptions { chunk_bytes, engines, ..usual };
    let mut reader = SequentialReader::new(Arc::clone(&file), stream)?;

    let resident = bundle.resident();
    let layers_loaded = if choice == FfnChoice::Resident { spec.layers.len() } else { pinned };
    let total = resident.extent.bytes + (layers_loaded * bundle.layout().layer_bytes()) as u64;

    let mut notices: Vec<Notice> = fallback.map(|text| Notice { important: true, text }).into_iter().collect();
    if let (Some(budget), Some(room)) = (options.budget, memory::room())
        && plan.total() > room.bytes
    {
        let (budget, left) = (human_bytes(budget), human_bytes(room.bytes));
        let text = format!(
            "the memory budget is {budget}, but only {left} are left ({}): the system may end this run",
            room.bound
        );
        notices.push(Notice { important: true, text });
    }
    if file.mode() == Mode::Buffered {
        notices.push(Notice {
            important: options.direct != DirectIo::Disabled,
            text: format!("reads go through the page cache: {}", file.reason()),
        });
    }
    let mut load_layers = |reader: &mut SequentialReader| -> Result<AlignedMemory> {
        let progress = &mut |done| progress(done, total);
        read_flash(bundle, layers_loaded, &threads, reader, progress)
    };
    let predictors = match options.predictors(bundle, choice) {
        Some((section, info)) => Some(load_predictors(bundle, section, info, &mut reader)?),
        None => None,
    };
    // What belongs to the neurons is in the resident section, which comes last.
    let finish: Box<dyn FnOnce(Vec<NeuronParams>) -> Box<dyn FfnSource>> = match choice {
        FfnChoice::Resident => {
            notices.push(Notice { important: false, text: "all neurons in memory".into() });
            let (ffn, records, data) = (*spec.ffn(), Records::of(bundle), load_layers(&mut reader)?);
            Box::new(move |params| obeying(predictors, ResidentFfn::new(ffn, records, data, params), (ffn.size, batch)))
        }
        FfnChoice::Streamed | FfnChoice::Naive | FfnChoice::Hybrid => {
            let mut parts = StreamedParts { resident_too: choice == FfnChoice::Naive, pinned: None, chunks };
            if pinned > 0 {
                parts.pinned = Some(Pinned { layers: pinned, data: load_layers(&mut reader)? });
                notices.push(Notice { important: false, text: format!("{pinned} layers pinned") });
            }
            let source = StreamedFfn::new(bundle, Arc::clone(&file), stream, options.verify, parts)?;
            notices.push(Notice { important: false, text: format!("FFN streamed from flash: {}", source.engine()) });
            let neurons = spec.ffn().size;
            Box::new(move |params| obeying(predictors, source.with_params(params), (neurons, batch)))
        }
        FfnChoice::Flash => {
            if predictors.is_none() {
                let text = "no predictor: every neuron is computed".to_owned();
                notices.push(Notice { important: options.predict, text });
            }
            let (cost, known) = cost;
            notices.push(Notice { important: false, text: format!("reads are planned for {known}") });
            let flash = FlashOptions {
                arena: arena.expect("planned with this choice"),
                policies: options.policies(bundle),
                reads: options.reads.unwrap_or(ReadPlan::Observed(cost)),
                engines,
                verify: options.verify,
                look_ahead: options.look_ahead,
                batch: options.batch,
            };
            let source = FlashFfn::new(bundle, Arc::clone(&file), predictors, &flash)?;
            notices.push(Notice { important: false, text: format!("FFN from flash: {}", source.engine()) });
            Box::new(move |params| Box::new(source.with_params(params)))
        }
    };
    // Last: the memory for neurons is taken from the system meanwhile.
    let before = (layers_loaded * bundle.layout().layer_bytes()) as u64;
    let progress = &mut |done| progress(before + done, total);
    let mut cuts = Cut::of(bundle, &tables);
    let memory = read_section(bundle, &mut reader, resident, "resident section", &mut cuts, progress)?;
    // Gone before anything that comes now is touched.
    drop(reader);
    let mut tensors = BundleTensors { bundle, tables, left_out: places(&cuts), memory: Arc::new(memory) };
    let weights = ModelWeights::load(spec, &mut tensors)?;
    let ffn = finish(NeuronParams::load_all(spec, &mut tensors)?);
    let on_flash: Option<Box<dyn TableSource>> = if cuts.is_empty() {
        None
    } else {
        let scales = |tensor: &TensorEntry| tensor.scales.map(|scales| tensors.part(scales));
        Some(Box::new(TablesOnFlash::new(bundle, &file, stream, options.verify, &tables, cuts, scales)?))
    };
    notices.push(Notice {
        important: false,
        text: format!("{} threads, {}", threads.count(), flashlm_kernels::instruction_set()),
    });
    if options.kv.is_none() && bundle.manifest().wide_kv {
        let text = "keys and values are kept in f32: this model's may be larger than f16 holds".to_owned();
        notices.push(Notice { important: false, text });
    }
    let room = options.room(bundle, scratch_tokens);
    let executor = Executor::new(spec.clone(), weights, ffn, threads, room)?.with_tables(on_flash);
    Ok(Loaded { forward: Forward::new(executor)?, plan, notices })
}

fn load_predictors(
    bundle: &Bundle,
    section: SectionInfo,
    info: &PredictorInfo,
    reader: &mut SequentialReader,
) -> Result<Vec<LayerPredictors>> {
    let blob: SharedBytes =
        Arc::new(read_section(bundle, reader, section, "predictors section", &mut [], &mut |_| ())?);
    LayerPredictors::load_all(&blob, info, bundle.spec())
}

/// A source that has all neurons, and computes those that the predictors choose.
fn obeying(
    predictors: Option<Vec<LayerPredictors>>,
    source: impl FfnSource + 'static,
    (neurons, batch): (usize, usize),
) -> Box<dyn FfnSource> {
    match predictors {
        Some(predictors) => {
            let own = predictors.into_iter().map(|layer| layer.own).collect();
            Box::new(PredictedFfn::new(source, Some(own), neurons, batch))
        }
        None => Box::new(source),
    }
}

/// Reads a section, checking its checksum; what is cut is not kept, but the checksums of its rows.
fn read_section(
    bundle: &Bundle,
    reader: &mut SequentialReader,
    section: SectionInfo,
    name: &str,
    cuts: &mut [Cut],
    progress: &mut dyn FnMut(u64),
) -> Result<AlignedMemory> {
    let left_out: u64 = cuts.iter().map(|cut| cut.bytes).sum();
    let mut memory = AlignedMemory::new((section.extent.bytes - left_out) as usize)?;
    memory.populate();
    let mut hasher = Xxh3::new();
    let mut at = 0;
    let mut kept = 0;
    reader.restart(&[Extent { offset: section.extent.offset, length: section.extent.bytes }])?;
    while let Some(chunk) = reader.next()? {
        hasher.update(chunk.bytes);
        let mut rest = chunk.bytes;
        while !rest.is_empty() {
            // What is left of this chunk before the next cut begins or the one here ends.
            let cut = cuts.iter_mut().find(|cut| at < cut.start + cut.bytes);
            let (inside, until) = match &cut {
                Some(cut) if at >= cut.start => (true, cut.start + cut.bytes),
                Some(cut) => (false, cut.start),
                None => (false, u64::MAX),
            };
            let (part, more) = rest.split_at(rest.len().min((until - at).min(usize::MAX as u64) as usize));
            match cut {
                Some(cut) if inside => cut.pass(part),
                _ => {
                    memory.as_mut_slice()[kept..kept + part.len()].copy_from_slice(part);
                    kept += part.len();
                }
            }
            at += part.len() as u64;
            rest = more;
        }
        progress(at);
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
        checks.contiguous(threads, layer, GroupId(0), &memory.as_slice()[start..at])?;
    }
    Ok(memory)
}

struct BundleTensors<'a> {
    bundle: &'a Bundle,
    tables: TablePlan,
    /// Where the parts that are left on flash begin in the section, and how long they are.
    left_out: Vec<(u64, u64)>,
    memory: Arc<AlignedMemory>,
}

fn places(cuts: &[Cut]) -> Vec<(u64, u64)> {
    cuts.iter().map(|cut| (cut.start, cut.bytes)).collect()
}

impl BundleTensors<'_> {
    fn part(&self, extent: BundleExtent) -> BytesRange {
        let start = extent.offset - self.bundle.resident().extent.offset;
        let before: u64 = self.left_out.iter().filter(|(cut, _)| *cut < start).map(|(_, bytes)| bytes).sum();
        let start = (start - before) as usize;
        BytesRange::new(self.memory.clone(), start..start + extent.bytes as usize)
    }
}

impl TensorSource for BundleTensors<'_> {
    fn tensor(&mut self, name: &str) -> Result<TensorBytes> {
        let entry = self.bundle.resident_tensor(name).ok_or_else(|| RuntimeError::MissingTensor(name.into()))?;
        let kept = self.rows_kept(name).map(|rows| rows as u64 * entry.extent.bytes / entry.shape[0] as u64);
        let extent = BundleExtent { bytes: kept.unwrap_or(entry.extent.bytes), ..entry.extent };
        let (data, scales) = (self.part(extent), entry.scales.map(|scales| self.part(scales)));
        Ok(TensorBytes { format: entry.format, shape: entry.shape.clone(), data, scales })
    }

    fn rows_kept(&self, name: &str) -> Option<usize> {
        self.tables.cut(self.bundle).into_iter().find(|(tensor, _)| tensor.name == name).map(|(_, rows)| rows)
    }

    fn ffn_scales(&mut self, layer: usize) -> Result<Option<BytesRange>> {
        Ok(self.bundle.ffn_scales(layer).map(|scales| self.part(scales)))
    }
}
