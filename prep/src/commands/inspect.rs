//! `flashlm-prep inspect`: what a checkpoint or a bundle is, and how large its parts are.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flashlm::budget::human_bytes;
use flashlm_formats::bundle::{
    Bundle, FlashLayout, LayerSparsity, LayoutOptions, PredictorDType, PredictorInfo, Provenance, SourceFile,
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
        predictor_bytes: u64,
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
    let is_checkpoint = args.path.is_dir() || (!is_bundle && source::model_name(&args.path).is_some());
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
            predictor_bytes: bundle.predictors().map_or(0, |section| section.extent.bytes),
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
        "{kind}: {}, {} layers of {} neurons, hidden size {}",
        spec.family,
        spec.layers.len(),
        spec.ffn().size,
        spec.hidden_size
    );
    println!(
        "  {} heads ({} for keys and values), vocabulary {}, context {}",
        spec.attention().heads,
        spec.attention().kv_heads,
        spec.vocab_size,
        spec.max_positions
    );
    let row =
        |name: &str, value: &str, more: &str| println!("{}", format!("  {name:<11} {value:>12}  {more}").trim_end());
    row("model", &human_bytes(*model_bytes), "");
    let formats = if resident_formats.is_plain() { String::new() } else { format!(", {resident_formats}") };
    let parts = format!("({:.0} %) embeddings, attention, norms{formats}", share(*resident_bytes));
    row("resident", &human_bytes(*resident_bytes), &parts);
    let padded =
        format!("({:.0} %) feed-forward neurons, {dtype}, {:.1} % padding", share(flash_bytes), 100.0 * padding);
    row("flash", &human_bytes(flash_bytes), &padded);
    let (records, alignment) = (layout.records_per_group(), layout.alignment());
    let group = format!("of a neuron; {records} to a read of {} bytes, aligned to {alignment}", layout.group_bytes());
    row("record", &format!("{} bytes", layout.record_bytes()), &group);
    let activation = spec.ffn().activation.to_string();
    match (gain::dense_by_nature(spec), more) {
        (Some(dense), _) => {
            row("activation", &activation, "");
            println!("  note: {dense}; `thresholds` measures what this one needs");
        }
        (None, More::Checkpoint { .. }) => {
            row("activation", &activation, "can leave most neurons exactly zero; `assess` tries how many");
        }
        (None, More::Bundle { .. }) => row("activation", &activation, ""),
    }
    if let More::Bundle { order, predictors, predictor_bytes, sparsity, provenance, .. } = more {
        row(
            "order",
            order,
            if *order == "identity" { "as in the checkpoint" } else { "of the neurons, chosen by layer" },
        );
        match predictors {
            Some(predictors) => row("predictors", &human_bytes(*predictor_bytes), &predictors_in_words(predictors)),
            None => row("predictors", "none", "every neuron is read for every token"),
        }
        show_sparsity(*sparsity, &row);
        let Provenance { tool, tool_version, source_format, .. } = provenance;
        row("made by", tool, &format!("{tool_version} from {source_format}"));
    }
    for note in notes {
        println!("  note: {note}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Which forms predictors have, over all layers.
fn predictors_in_words(predictors: &PredictorInfo) -> String {
    let projections = predictors.layers.iter().filter(|layer| layer.dtype == PredictorDType::Int4).count();
    let ranks = || predictors.layers.iter().filter(|layer| layer.dtype != PredictorDType::Int4).map(|layer| layer.rank);
    let mut words = Vec::new();
    if projections > 0 {
        words.push(format!("{projections} projections in 4 bits"));
    }
    if let (Some(least), Some(most)) = (ranks().min(), ranks().max()) {
        let range = if least == most { least.to_string() } else { format!("{least} to {most}") };
        words.push(format!("{} of rank {range}", ranks().count()));
    }
    words.join(", ")
}

/// What was measured of the layers on held-out text.
fn show_sparsity(sparsity: Option<&[LayerSparsity]>, row: &dyn Fn(&str, &str, &str)) {
    let Some(layers) = sparsity.filter(|layers| !layers.is_empty()) else { return };
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let active: Vec<f64> = layers.iter().map(|layer| f64::from(layer.active)).collect();
    let (least, most) = active.iter().fold((1.0, 0.0), |(least, most): (f64, f64), a| (least.min(*a), most.max(*a)));
    let mean = gain::active(layers);
    row(
        "active",
        &percent(mean),
        &format!("of the neurons for a token; by layer {} to {}", percent(least), percent(most)),
    );
    let Some(admitted) = gain::admitted(layers) else { return };
    row("admitted", &percent(admitted), "by predictors, on text held out of their training");
    let missed: Option<Vec<f64>> = layers.iter().map(|layer| layer.missed.map(f64::from)).collect();
    if let Some(missed) = missed {
        let mean = missed.iter().sum::<f64>() / missed.len() as f64;
        row("missed", &percent(mean), "of the active neurons, likewise; `evaluate` says what that costs");
    }
    if admitted > gain::POINTLESS {
        println!("  note: with so many, a bundle without predictors is faster: `flashlm-prep convert` makes one");
    }
}
