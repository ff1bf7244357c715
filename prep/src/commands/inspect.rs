//! `flashlm-prep inspect`: what a checkpoint or a bundle is, and how large its parts are.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flashlm::budget::human_bytes;
use flashlm_formats::bundle::{
    Bundle, FlashLayout, LayerSparsity, LayoutOptions, PredictorInfo, Provenance, SourceFile,
};
use flashlm_formats::model::ModelSpec;
use flashlm_formats::weight_format::{ResidentFormats, WeightFormat};
use flashlm_prep::gain;
use serde::Serialize;

use super::{print_json, source};

/// Arguments of `flashlm-prep inspect`.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  flashlm-prep inspect /models/opt-6.7b\n  flashlm-prep inspect facebook/opt-125m\n  flashlm-prep inspect model.flashlm --json"
)]
pub(crate) struct InspectArgs {
    /// A checkpoint's directory, a model on the Hub (org/name[@revision], which is downloaded), or a bundle
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

struct Facts<'a> {
    kind: String,
    spec: &'a ModelSpec,
    model_bytes: u64,
    resident_bytes: u64,
    resident_formats: ResidentFormats,
    dtype: WeightFormat,
    layout: FlashLayout,
    notes: Vec<String>,
    more: More<'a>,
}

/// What a checkpoint and a bundle do not have in common, for the JSON object. Written as it is: as a tree of JSON values a
/// manifest would take many times its length.
#[derive(Serialize)]
#[serde(untagged)]
enum More<'a> {
    Checkpoint {
        files: Vec<SourceFile>,
        unused_tensors: &'a [String],
    },
    Bundle {
        file_bytes: u64,
        order: &'a str,
        predictors: Option<&'a PredictorInfo>,
        sparsity: Option<&'a [LayerSparsity]>,
        provenance: &'a Provenance,
    },
}

#[derive(Serialize)]
struct Report<'a> {
    kind: &'a str,
    model: &'a ModelSpec,
    model_bytes: u64,
    resident_bytes: u64,
    resident_dtype: Option<WeightFormat>,
    embedding_dtype: Option<WeightFormat>,
    flash_bytes: u64,
    ffn_dtype: WeightFormat,
    record_bytes: usize,
    records_per_group: usize,
    group_bytes: usize,
    alignment: usize,
    padding_share: f64,
    notes: &'a [String],
    #[serde(flatten)]
    more: &'a More<'a>,
}

pub(crate) fn run(args: &InspectArgs) -> Result<ExitCode> {
    let is_bundle = args.path.is_file() || args.path.extension().is_some_and(|extension| extension == "flashlm");
    let is_checkpoint = args.path.is_dir() || (!is_bundle && source::is_model_name(&args.path));
    if is_checkpoint { checkpoint(&args.path, args.json) } else { bundle(&args.path, args.json) }
}

fn checkpoint(path: &Path, json: bool) -> Result<ExitCode> {
    let checkpoint = source::open(path)?;
    let spec = checkpoint.spec();
    let dtype = checkpoint.ffn_dtype().into();
    let resident = spec.resident_tensors().into_iter().map(|t| {
        let info = checkpoint.resident(&t.name)?;
        Ok(info.shape.iter().product::<usize>() as u64 * info.dtype.bytes() as u64)
    });
    let files = checkpoint.files().into_iter().map(|f| SourceFile { name: f.name, bytes: f.bytes }).collect();
    let facts = Facts {
        kind: format!("checkpoint ({})", checkpoint.format()),
        spec,
        model_bytes: checkpoint.model_bytes(),
        resident_bytes: resident.sum::<Result<u64>>()?,
        resident_formats: ResidentFormats::default(),
        dtype,
        layout: FlashLayout::new(spec, dtype, LayoutOptions::default())?,
        notes: checkpoint.notes().iter().map(ToString::to_string).collect(),
        more: More::Checkpoint { files, unused_tensors: checkpoint.unused() },
    };
    show(&facts, json)
}

fn bundle(path: &Path, json: bool) -> Result<ExitCode> {
    let bundle = Bundle::open(path)?;
    let manifest = bundle.manifest();
    let facts = Facts {
        kind: "bundle".into(),
        spec: bundle.spec(),
        model_bytes: manifest.model_bytes,
        resident_bytes: bundle
            .resident_tensors()
            .iter()
            .map(|t| t.extent.bytes + t.scales.map_or(0, |s| s.bytes))
            .sum::<u64>()
            + (0..bundle.spec().layers.len()).filter_map(|l| bundle.ffn_scales(l)).map(|s| s.bytes).sum::<u64>(),
        resident_formats: manifest.resident,
        dtype: manifest.ffn.dtype,
        layout: *bundle.layout(),
        notes: vec![],
        more: More::Bundle {
            file_bytes: bundle.file_bytes(),
            order: &manifest.ffn.order,
            predictors: manifest.predictors.as_ref(),
            sparsity: manifest.sparsity.as_deref(),
            provenance: &manifest.provenance,
        },
    };
    show(&facts, json)
}

fn show(facts: &Facts<'_>, json: bool) -> Result<ExitCode> {
    let Facts { kind, spec, model_bytes, resident_bytes, resident_formats, dtype, layout, notes, more } = facts;
    let flash_bytes = layout.layer_stride() as u64 * spec.layers.len() as u64;
    let padding = layout.layer_padding_bytes() as f64 / layout.layer_stride() as f64;
    if json {
        let report = Report {
            kind,
            model: spec,
            model_bytes: *model_bytes,
            resident_bytes: *resident_bytes,
            resident_dtype: resident_formats.matrices,
            embedding_dtype: resident_formats.embedding,
            flash_bytes,
            ffn_dtype: *dtype,
            record_bytes: layout.record_bytes(),
            records_per_group: layout.records_per_group(),
            group_bytes: layout.group_bytes(),
            alignment: layout.alignment(),
            padding_share: padding,
            notes,
            more,
        };
        print_json(&report)?;
        return Ok(ExitCode::SUCCESS);
    }
    let share = |bytes: u64| 100.0 * bytes as f64 / *model_bytes as f64;
    println!(
        "{kind}: {}, {} layers of {} x {} neurons, {} heads ({} for keys and values), vocabulary {}, context {}",
        spec.family,
        spec.layers.len(),
        spec.hidden_size,
        spec.ffn().size,
        spec.attention().heads,
        spec.attention().kv_heads,
        spec.vocab_size,
        spec.max_positions
    );
    println!("  model             {:>12}", human_bytes(*model_bytes));
    println!(
        "  resident          {:>12}  ({:.0} %): embeddings, attention, norms{}",
        human_bytes(*resident_bytes),
        share(*resident_bytes),
        if resident_formats.is_plain() { String::new() } else { format!(", {resident_formats}") }
    );
    println!(
        "  flash             {:>12}  ({:.0} %): feed-forward neurons, {dtype}, {:.1} % padding",
        human_bytes(flash_bytes),
        share(flash_bytes),
        100.0 * padding
    );
    println!(
        "  a neuron record   {:>12}  {} to a group of {} bytes, aligned to {}",
        layout.record_bytes(),
        layout.records_per_group(),
        layout.group_bytes(),
        layout.alignment()
    );
    let activation = spec.ffn().activation;
    if let Some(dense) = gain::dense_by_nature(spec) {
        println!("  activation        {activation}");
        println!("  note: {dense}; `thresholds` measures what this one needs");
    } else {
        println!("  activation        {activation}: most neurons can be exactly zero; `record` measures how many are");
    }
    let admitted = match more {
        More::Bundle { sparsity: Some(layers), .. } => gain::admitted(layers),
        _ => None,
    };
    if let Some(admitted) = admitted {
        println!(
            "  predictors        {:>12.1} % of the neurons admitted, on text held out of their training",
            100.0 * admitted
        );
        if admitted > gain::POINTLESS {
            println!("  note: with so many, a bundle without predictors is faster: `flashlm-prep convert` makes one");
        }
    }
    for note in notes {
        println!("  note: {note}");
    }
    Ok(ExitCode::SUCCESS)
}
