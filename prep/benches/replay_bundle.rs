//! What every cache policy would read for recorded sequences, over all layers of a bundle, with the slots that a budget gives
//! each layer; and Belady's optimum, which knows the future.
//!
//! `cargo bench -p flashlm-prep --bench replay_bundle -- BUNDLE RECORDING PREDICTORS MEMORY_BYTES [SEQUENCES]`
//!
//! Each sequence begins with empty caches, as `flashlm bench` does: a prompt of 128 tokens fills them, the tokens after it are
//! counted.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use flashlm::cache::PolicyKind;
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::plan::plan;
use flashlm::planner::PlanLimits;
use flashlm::replay::{ReplayCounts, ReplayOptions, WantedSets, replay, replay_optimal};
use flashlm_formats::bundle::Bundle;
use flashlm_formats::ids::GroupId;
use flashlm_formats::recording::Recording;
use flashlm_prep::demand::wanted_sets;
use rayon::prelude::*;

const PROMPT: usize = 128;
const COUNTED: usize = 256;
/// Tokens of the prompt that fill the cache before the first counted one.
const FILLED_BY: [usize; 3] = [32, 64, PROMPT];

fn main() -> Result<()> {
    // Cargo adds a word of its own to what programs that measure are given.
    let args: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    ensure!(args.len() >= 4, "BUNDLE RECORDING PREDICTORS MEMORY_BYTES [SEQUENCES]");
    let bundle = Bundle::open(Path::new(&args[0]))?;
    let recording = Recording::open(Path::new(&args[1]))?;
    let predictors = Path::new(&args[2]);
    let sequences: usize = args.get(4).map_or(Ok(3), |n| n.parse()).context("SEQUENCES")?;

    let layout = bundle.layout();
    ensure!(layout.records_per_group() == 1, "groups of several neurons: the orders would have to be known");
    let budget = Some(args[3].parse().context("MEMORY_BYTES")?);
    let options = LoadOptions { budget, ffn: Some(FfnChoice::Flash), ..LoadOptions::new(384) };
    let slots = plan(&bundle, &options)?.arena.context("the budget has no neuron cache")?.slots;
    let limits = PlanLimits::adjacent_only(layout.group_bytes() as u64);

    let mut parts: Vec<Range<usize>> = Vec::new();
    let mut start = 0;
    for document in recording.documents().chunk_by(|a, b| a == b) {
        if document.len() >= PROMPT + COUNTED && parts.len() < sequences {
            parts.push(start..start + PROMPT + COUNTED);
        }
        start += document.len();
    }
    ensure!(!parts.is_empty(), "no sequence of {} tokens is recorded", PROMPT + COUNTED);
    println!("{} sequences, {:.1} % of the groups cached", parts.len(), {
        100.0 * slots.iter().map(|s| f64::from(*s)).sum::<f64>() / (layout.groups() * slots.len()) as f64
    });

    let layers: Vec<usize> = (0..slots.len()).collect();
    let wanted: Vec<Vec<WantedSets<GroupId>>> = layers
        .iter()
        .map(|&layer| {
            let mut recorded = recording.layer(layer)?;
            let mut one = |part| {
                let part = std::slice::from_ref(part);
                Ok(wanted_sets(&mut recorded, part, usize::MAX, Some((predictors, layer)))?.alone())
            };
            parts.iter().map(&mut one).collect()
        })
        .collect::<Result<_>>()?;

    let policies = ["window:4", "lru", "lfu:16", "lfu:64", "lfu:256", "s3-fifo", "w-tinylfu"];
    for filled_by in FILLED_BY {
        println!("the last {filled_by} tokens of the prompt fill the caches:");
        let each = |policy: Option<PolicyKind>| {
            let total = layers
                .par_iter()
                .map(|&layer| {
                    let mut sum = ReplayCounts::default();
                    for sets in &wanted[layer] {
                        let mut cut = WantedSets::new(sets.layer_size());
                        sets.iter().skip(PROMPT - filled_by).for_each(|token| cut.push(token.iter().copied()));
                        let options =
                            |policy| ReplayOptions { policy, slots: slots[layer], limits, warm_up: filled_by };
                        sum += match policy {
                            Some(policy) => replay(&cut, &options(policy)),
                            None => replay_optimal(&cut, &options(PolicyKind::Lru)),
                        };
                    }
                    sum
                })
                .reduce(ReplayCounts::default, |mut a, b| {
                    a += b;
                    a
                });
            // Sums keep the tokens of one sequence.
            let megabytes = total.bytes as f64 / (COUNTED * parts.len()) as f64 / 1e6;
            (megabytes, 100.0 * total.hit_rate())
        };
        let (optimum, hits) = each(None);
        println!("    {:10} {optimum:7.1} MB/token  hits {hits:.1} %", "Belady");
        for name in policies {
            let (megabytes, hits) = each(Some(name.parse()?));
            println!("    {name:10} {megabytes:7.1} MB/token  hits {hits:.1} %  {:.2} x Belady", megabytes / optimum);
        }
    }
    Ok(())
}
