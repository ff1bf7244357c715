//! `flashlm doctor`: what this machine can do for a run, and what is missing.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use flashlm::budget::human_bytes;
use flashlm::disk_cost::kept_profile;
use flashlm::memory;
use flashlm::options::LoadOptions;
use flashlm::terminal::printable_line;
use flashlm_formats::bundle::Bundle;
use flashlm_io::{DirectFile, DirectIo, Engines, Mode, Slots};
use serde_json::{Value, json};

/// Arguments of `flashlm doctor`.
#[derive(Args)]
#[command(after_help = "Examples:\n  flashlm doctor\n  flashlm doctor model.flashlm --json")]
pub(crate) struct DoctorArgs {
    /// A bundle, whose disk is examined too
    #[arg(value_name = "BUNDLE")]
    pub(crate) bundle: Option<PathBuf>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let (room, limit) = (memory::room(), memory::cgroup_limit());
    let mut report = json!({
        "instruction_set": flashlm_kernels::instruction_set().to_string(),
        "processors": LoadOptions::new(1).threads.get(),
        "memory_available_bytes": room.as_ref().map(|room| room.bytes),
        "memory_bound": room.as_ref().map(|room| room.bound.to_string()),
        "memory_default_bytes": memory::available(),
        "memory_cgroup_limit_bytes": limit.as_ref().map(|(limit, _)| *limit),
        "memory_cgroup": limit.as_ref().map(|(_, cgroup)| cgroup.display().to_string()),
    });
    let mut advice = Vec::new();
    if let Some(path) = &args.bundle {
        let bundle = Bundle::open(path)?;
        disk(path, &mut report, &mut advice)?;
        model(&bundle, &mut report, &mut advice);
    }
    if args.json {
        report["advice"] = advice.into();
        println!("{report:#}");
        return Ok(ExitCode::SUCCESS);
    }
    for (title, names) in SECTIONS {
        let there = names.iter().filter_map(|name| Some((*name, report.get(*name)?)));
        let lines: Vec<String> =
            there.map(|(name, value)| format!("  {:<26} {}", words(name), shown(name, value))).collect();
        if !lines.is_empty() {
            println!("{title}");
            lines.iter().for_each(|line| println!("{}", printable_line(line)));
        }
    }
    advice.iter().for_each(|line| println!("- {}", printable_line(line)));
    Ok(ExitCode::SUCCESS)
}

/// What is reported, in the order in which people look for it.
const SECTIONS: [(&str, &[&str]); 3] = [
    (
        "This machine",
        &[
            "processors",
            "instruction_set",
            "memory_available_bytes",
            "memory_bound",
            "memory_cgroup",
            "memory_cgroup_limit_bytes",
            "memory_default_bytes",
        ],
    ),
    ("The disk", &["disk", "direct_io", "reader", "disk_sequential_bytes_per_s", "disk_best_random_bytes_per_s"]),
    (
        "The model",
        &["model_bytes", "resident_weights_bytes", "predictors_bytes", "flash_section_bytes", "active_neurons_percent"],
    ),
];

/// The name of a figure for people: without its unit, and its section.
fn words(name: &str) -> String {
    let name = match name {
        "memory_default_bytes" => "memory a run may take",
        "flash_section_bytes" => "neurons on flash",
        "active_neurons_percent" => "active neurons",
        name => name.trim_end_matches("_bytes").trim_end_matches("_bytes_per_s"),
    };
    name.replace('_', " ").trim_start_matches("disk ").to_owned()
}

fn shown(name: &str, value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::String(text) => text.clone(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.to_owned(),
        value if name.ends_with("_bytes") => human_bytes(value.as_u64().unwrap_or(0)),
        value if name.ends_with("_bytes_per_s") => {
            format!("{}/s", human_bytes(value.as_f64().unwrap_or(0.0) as u64))
        }
        value if name.ends_with("_percent") => format!("{value} %"),
        value => value.to_string(),
    }
}

/// How the bundle's disk can be read.
fn disk(path: &Path, report: &mut Value, advice: &mut Vec<String>) -> Result<()> {
    let file = Arc::new(DirectFile::open(path, DirectIo::Optional)?);
    report["direct_io"] = (file.mode() == Mode::Direct).into();
    if file.mode() == Mode::Buffered {
        advice.push(format!("reads go through the page cache, which counts as memory: {}", file.reason()));
    }
    // As a run opens it, but for a single slot.
    let slots = Slots::new(1, 4096, file.alignment())?;
    let engine = Engines::default().open(Arc::clone(&file), slots, Engines::DEPTH)?;
    report["reader"] = engine.description().into();
    if engine.name() != "io_uring" {
        advice.push("reads are made by threads; io_uring would cost less".into());
    }
    let (device, profile) = kept_profile(path);
    report["disk"] = device.into();
    match profile {
        Some(profile) => {
            let best = profile.random.iter().map(|rate| rate.bytes_per_s()).fold(0.0, f64::max);
            report["disk_sequential_bytes_per_s"] = profile.sequential_bytes_per_s.into();
            report["disk_best_random_bytes_per_s"] = best.into();
        }
        None => advice.push(format!("this disk was never measured: run `flashlm disk {}`", path.display())),
    }
    Ok(())
}

/// What to expect of the bundle.
fn model(bundle: &Bundle, report: &mut Value, advice: &mut Vec<String>) {
    let resident = bundle.resident().extent.bytes;
    report["model_bytes"] = bundle.manifest().model_bytes.into();
    report["resident_weights_bytes"] = resident.into();
    report["predictors_bytes"] = bundle.predictors().map_or(0, |section| section.extent.bytes).into();
    report["flash_section_bytes"] = bundle.flash().bytes.into();
    if bundle.predictors().is_none() {
        advice.push(
            "the bundle has no predictors: every neuron is read for every token; `flashlm-prep prepare` makes them"
                .into(),
        );
    }
    if let Some(sparsity) = &bundle.manifest().sparsity {
        let active = sparsity.iter().map(|layer| f64::from(layer.active)).sum::<f64>() / sparsity.len().max(1) as f64;
        report["active_neurons_percent"] = json!((active * 1e4).round() / 100.0);
        if active > 0.3 {
            advice.push(format!(
                "{:.0} % of the neurons are active: the model is not sparse enough to gain much",
                active * 100.0
            ));
        }
    }
    if let Some(available) = memory::available() {
        if available > bundle.manifest().model_bytes {
            advice.push("the whole model fits in the available memory".into());
        } else if available < resident {
            advice.push("the available memory does not even hold the resident weights".into());
        }
    }
}
