//! Which source of neurons a run uses, and how the budget is divided: the first that fits, and what is left goes where it saves most.
//!
//! Nothing chosen here changes the text. A budget is met by smaller scratch for prompts, then by a smaller neuron cache, then by
//! leaving rows of the vocabulary's matrices on flash, then by reading every neuron for every token.

use flashlm_formats::bundle::Bundle;
use flashlm_io::{Alignment, DirectFile, Engines, Slots, StreamOptions};

use super::expectation::Expectation;
use super::planned::Planned;
use super::{Base, MemoryPlan, PlanItem};
use crate::budget::human_bytes;
use crate::disk_cost::{DRAM_BYTE_NS, ReadCost};
use crate::engine::{PIECE_TOKENS, SCRATCH_TOKENS_MIN, check_context};
use crate::error::Result;
use crate::memory;
use crate::neurons::flash::{ArenaPlan, FlashFfn};
use crate::neurons::predicted;
use crate::neurons::predictor::LayerPredictors;
use crate::neurons::streamed::{CHUNKS, CHUNKS_MIN, StreamedFfn};
use crate::options::{FfnChoice, LoadOptions};
use crate::speculate::Speculate;
use crate::tables::TablePlan;

/// Scratch for prompts takes at most this part of a budget, if it can.
const SCRATCH_SHARE: u64 = 16;

/// Rows for guesses take at most this part of a budget, if their number is free.
const GUESSES_SHARE: u64 = 64;

/// What a disk is supposed to ask for where the bundle cannot be opened for reading.
const USUAL_ALIGNMENT: Alignment = Alignment { offset: 512, memory: 512, length: 512 };

/// The FFN source and its memory plan: what was asked for, else the first that fits.
///
/// # Errors
/// `BudgetTooSmall` with the smallest budget that any of them works in; `ContextOutOfRange`.
pub fn plan(bundle: &Bundle, options: &LoadOptions) -> Result<Planned> {
    plan_reading(DirectFile::open(bundle.path(), options.direct).as_ref().ok(), bundle, options)
}

/// The same for a bundle that is read through `file`, if it can be opened: why not is said when it is read.
pub(crate) fn plan_reading(file: Option<&DirectFile>, bundle: &Bundle, options: &LoadOptions) -> Result<Planned> {
    check_context(bundle.spec(), options.context)?;
    let budget = options.budget.or_else(memory::available).unwrap_or(u64::MAX);
    let disk = Disk::new(file, bundle, options);
    let with_rows = |batch: usize| LoadOptions { batch: options.batch.max(batch), ..options.clone() };
    if options.speculate != Speculate::Auto {
        return plan_rows(bundle, &with_rows(options.speculate.rows()), &disk, budget);
    }
    let without = plan_rows(bundle, options, &disk, budget)?;
    // Guesses are worth a little memory, and nothing else.
    let least = |options: &LoadOptions| {
        let case = Case::new(bundle, options, &disk, without.choice, budget);
        case.of(SCRATCH_TOKENS_MIN, without.tables, Parts::Least).plan.total()
    };
    let mut rows = options.speculate.rows();
    while rows > options.batch.max(1) {
        let options = with_rows(rows);
        let with = plan_rows(bundle, &options, &disk, budget);
        let is_same = |with: &Planned| {
            with.choice == without.choice
                && with.tables == without.tables
                && with.scratch_tokens == without.scratch_tokens
                && with.pinned == without.pinned
        };
        match with {
            Ok(with) if is_same(&with) && least(&options) - least(&with_rows(1)) <= budget / GUESSES_SHARE => {
                return Ok(with);
            }
            _ => rows /= 2,
        }
    }
    Ok(without)
}

/// The plan for so many rows at a time.
fn plan_rows(bundle: &Bundle, options: &LoadOptions, disk: &Disk, budget: u64) -> Result<Planned> {
    let predicted = bundle.predictors().is_some() && options.predict;
    let choices = match options.ffn {
        Some(choice) => vec![choice],
        None if predicted => vec![FfnChoice::Resident, FfnChoice::Flash, FfnChoice::Streamed],
        None => vec![FfnChoice::Resident, FfnChoice::Streamed],
    };
    let spec_layers = bundle.spec().layers.len();
    let mut refused: Vec<MemoryPlan> = Vec::new();
    for (number, &choice) in choices.iter().enumerate() {
        let case = Case::new(bundle, options, disk, choice, budget);
        let mut planned = case.best();
        if planned.plan.total() > budget {
            refused.push(planned.plan);
            continue;
        }
        if options.ffn.is_none() && choice == FfnChoice::Flash {
            let streamed = Case::new(bundle, options, disk, FfnChoice::Streamed, budget).best();
            if streamed.plan.total() <= budget && costs_less(bundle, options, &streamed, &planned) {
                planned = streamed;
            }
        }
        let mut reasons = Vec::new();
        if let (FfnChoice::Streamed, Some(better)) = (choice, refused.last()) {
            let what = if predicted { "a neuron cache does" } else { "all neurons do" };
            let read = match planned.pinned {
                0 => "all neurons are read for every token".to_owned(),
                pinned => {
                    format!("those of {} of {} layers are read for every token", spec_layers - pinned, spec_layers)
                }
            };
            let (budget, way_out) = (human_bytes(budget), avoided_with(better.total()));
            reasons.push(format!("{what} not fit in {budget}: {read}; {way_out}"));
        }
        let whole = TablePlan::whole(bundle.spec());
        if planned.tables != whole {
            let mut needed = case.of(SCRATCH_TOKENS_MIN, whole, Parts::Least).plan.total();
            // With so much a better source of neurons may fit, and leave less for the vocabulary.
            for &better in choices[..number].iter().rev() {
                let case = Case::new(bundle, options, disk, better, needed);
                if case.best().plan.total() <= needed {
                    needed = needed.max(case.of(SCRATCH_TOKENS_MIN, whole, Parts::Least).plan.total());
                }
            }
            reasons.push(planned.tables.describe(bundle.spec(), budget, &avoided_with(needed)));
        }
        planned.fallback = (!reasons.is_empty()).then(|| reasons.join("; "));
        return Ok(planned);
    }
    // What the error names: on a small model the buffers of a streamed FFN can be more than all of a resident one.
    let plan = refused.into_iter().min_by_key(MemoryPlan::total).expect("there is at least one choice");
    plan.check(budget)?;
    unreachable!("a plan within the budget was returned")
}

/// Whether a token is expected to take less time with `one` than with `other`: half way between what is read beside computing and what
/// is read before.
fn costs_less(bundle: &Bundle, options: &LoadOptions, one: &Planned, other: &Planned) -> bool {
    let ms = |planned: &Planned| {
        let (least, most) = Expectation::new(bundle, planned, options.context)?.ms_per_token(1e9 / DRAM_BYTE_NS);
        Some((least + most) / 2.0)
    };
    ms(one).zip(ms(other)).is_some_and(|(one, other)| one < other)
}

/// The words about the budget that avoids a slow source.
fn avoided_with(needed: u64) -> String {
    if memory::available().is_some_and(|available| needed > available) {
        format!("avoiding that takes {needed} bytes, more than may be used here")
    } else {
        format!("--memory {needed} is enough to avoid that")
    }
}

/// How much optional memory is taken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Parts {
    /// As little as works.
    Least,
    /// As much as fits.
    Most,
}

/// How the bundle's disk is read, and what that costs.
struct Disk {
    /// Bytes of a slot, and whether every read goes through a buffer of its own.
    slot: u64,
    bounces: bool,
    readers: usize,
    cost: (ReadCost, String),
}

impl Disk {
    fn new(file: Option<&DirectFile>, bundle: &Bundle, options: &LoadOptions) -> Self {
        let (layout, alignment) = (bundle.layout(), file.map_or(USUAL_ALIGNMENT, |file| file.alignment()));
        let threads = |depth| options.engines.threads(depth);
        let slot = Slots::stride_for(layout.group_bytes(), alignment).unwrap_or(usize::MAX);
        Self {
            slot: slot as u64,
            bounces: !(layout.alignment() as u64).is_multiple_of(alignment.file_unit()),
            // Of the reader that loads, and of the source.
            readers: threads(StreamOptions::default().chunks) + threads(Engines::DEPTH),
            cost: options.disk_cost(bundle),
        }
    }
}

/// One source of neurons, with what does not depend on how the budget is divided.
struct Case<'a> {
    bundle: &'a Bundle,
    options: &'a LoadOptions,
    disk: &'a Disk,
    choice: FfnChoice,
    budget: u64,
    predictors: u64,
}

impl<'a> Case<'a> {
    fn new(bundle: &'a Bundle, options: &'a LoadOptions, disk: &'a Disk, choice: FfnChoice, budget: u64) -> Self {
        let predictors = options.predictors(bundle, choice).map_or(0, |(section, info)| {
            // Their vectors are kept as numbers, beside the blob.
            section.extent.bytes + LayerPredictors::vector_bytes(info, bundle.spec(), options.batch)
        });
        Self { bundle, options, disk, choice, budget, predictors }
    }

    /// The best plan within the budget, or the smallest there is.
    fn best(&self) -> Planned {
        let spec = self.bundle.spec();
        let mut smallest: Option<Planned> = None;
        for tables in TablePlan::choices(spec, matches!(self.choice, FfnChoice::Flash | FfnChoice::Streamed)) {
            let mut tokens = PIECE_TOKENS;
            while tokens >= SCRATCH_TOKENS_MIN {
                let is_least = tokens == SCRATCH_TOKENS_MIN;
                if is_least || self.base(tokens, tables).working_bytes() <= self.budget / SCRATCH_SHARE {
                    let least = self.of(tokens, tables, Parts::Least);
                    if least.plan.total() <= self.budget {
                        return match tables.is_cut(spec) {
                            true => self.of(tokens, self.head_rows(tokens, tables), Parts::Least),
                            false => self.of(tokens, tables, Parts::Most),
                        };
                    }
                    // Buffers for what is left on flash can be more than all of a small vocabulary.
                    if smallest.as_ref().is_none_or(|smallest| least.plan.total() < smallest.plan.total()) {
                        smallest = Some(least);
                    }
                }
                tokens /= 2;
            }
        }
        smallest.expect("the smallest scratch is always tried")
    }

    /// As many rows of the head as fit: every one of them is used for every token, which is more than a neuron can say.
    fn head_rows(&self, tokens: usize, tables: TablePlan) -> TablePlan {
        let spec = self.bundle.spec();
        let fits = |rows| self.of(tokens, tables.with_head(spec, rows), Parts::Least).plan.total() <= self.budget;
        tables.with_head(spec, largest(spec.vocab_size as u64 - 1, |rows| fits(rows as usize)) as usize)
    }

    fn base(&self, scratch_tokens: usize, tables: TablePlan) -> Base<'a> {
        Base {
            bundle: self.bundle,
            room: self.options.room(self.bundle, scratch_tokens),
            threads: self.options.threads.get(),
            readers: self.disk.readers,
            left_out: tables.left_out(self.bundle),
            draft: self.options.draft_bytes,
        }
    }

    /// The plan with this division.
    fn of(&self, scratch_tokens: usize, tables: TablePlan, parts: Parts) -> Planned {
        let item = |name, bytes| PlanItem { name, bytes };
        let (spec, layout, choice) = (self.bundle.spec(), self.bundle.layout(), self.choice);
        let base = self.base(scratch_tokens, tables);
        let pieces = scratch_tokens.min(self.options.context);
        let chosen = match self.predictors {
            0 => 0,
            // Has its own room for scores.
            _ if choice == FfnChoice::Flash => predicted::selection_bytes(spec.ffn().size, pieces),
            _ => predicted::bytes(spec.ffn().size, pieces, self.options.batch),
        };
        let common = [item("predictors", self.predictors + chosen), item("vocabulary", tables.bytes(self.bundle))];
        let whole = |items: &[PlanItem]| base.plan(choice.name(), &[&common, items].concat());
        let fits = |items: &[PlanItem]| whole(items).total() <= self.budget;
        let planned = |plan, arena, pinned, chunks| Planned {
            choice,
            plan,
            arena,
            pinned,
            chunks,
            kv: self.options.kv(self.bundle),
            scratch_tokens,
            batch: self.options.batch,
            tables,
            loading_bytes: base.loading_bytes(),
            predicted: self.predictors > 0,
            cost: self.disk.cost.clone(),
            fallback: None,
        };
        let layer = layout.layer_bytes() as u64;
        let buffers = |chunks| item("FFN buffers", StreamedFfn::bytes(layout, chunks));
        match choice {
            FfnChoice::Resident => planned(whole(&[item("FFN", spec.layers.len() as u64 * layer)]), None, 0, 0),
            FfnChoice::Naive => planned(whole(&[buffers(CHUNKS)]), None, 0, CHUNKS),
            FfnChoice::Streamed | FfnChoice::Hybrid => {
                let items = |chunks, pinned: u64| [buffers(chunks), item("pinned layers", pinned * layer)];
                let chunks = match choice {
                    FfnChoice::Hybrid => CHUNKS,
                    _ if parts == Parts::Least => CHUNKS_MIN,
                    _ => (CHUNKS_MIN..=CHUNKS).rev().find(|chunks| fits(&items(*chunks, 0))).unwrap_or(CHUNKS_MIN),
                };
                // Asked for by name, it reads every neuron for every token.
                let pins = parts == Parts::Most && (choice == FfnChoice::Hybrid || self.options.ffn.is_none());
                let most = if pins { spec.layers.len() as u64 } else { 0 };
                let pinned = largest(most, |pinned| fits(&items(chunks, pinned)));
                planned(whole(&items(chunks, pinned)), None, pinned as usize, chunks)
            }
            FfnChoice::Flash => {
                let policies = self.options.policies(self.bundle);
                let items = |arena: &ArenaPlan| {
                    let kept: u64 = arena.slots.iter().map(|s| u64::from(*s)).sum();
                    let tables =
                        FlashFfn::working_bytes(layout, arena, &policies, self.options.batch, self.disk.bounces);
                    [
                        item("neuron cache", kept * self.disk.slot),
                        item("transient neurons", 2 * u64::from(arena.transient) * self.disk.slot),
                        item("neuron tables", tables),
                    ]
                };
                let fits = |arena: &ArenaPlan| parts == Parts::Most && fits(&items(arena));
                let arena = ArenaPlan::within(self.bundle, &self.disk.cost.0, fits);
                planned(whole(&items(&arena)), Some(arena), 0, 0)
            }
        }
    }
}

/// The largest number up to `most` that fits, where all smaller ones do; 0 if none does.
fn largest(most: u64, fits: impl Fn(u64) -> bool) -> u64 {
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_that_fits_is_found() {
        for most in 0..40 {
            for limit in 0..45 {
                assert_eq!(largest(most, |n| n <= limit), most.min(limit));
            }
        }
    }
}
