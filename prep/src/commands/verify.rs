//! `flashlm-prep verify`: reads all of a bundle and names every damaged place.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flashlm::budget::human_bytes;
use flashlm_formats::bundle::verify;
use serde_json::json;

use super::{Stage, counted};

/// Arguments of `flashlm-prep verify`.
#[derive(Args)]
#[command(after_help = "Example:\n  flashlm-prep verify model.flashlm\n\n\
    Exits with 1 if anything is damaged, or the file continues after the bundle's end.")]
pub(crate) struct VerifyArgs {
    /// The bundle
    #[arg(value_name = "BUNDLE")]
    bundle: PathBuf,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &VerifyArgs) -> Result<ExitCode> {
    let stage = Stage::bytes("verifying");
    let report = verify(&args.bundle, &mut |done, total| stage.set(done, total))?;
    drop(stage);
    let damages: Vec<String> = report.damages.iter().map(ToString::to_string).collect();
    if args.json {
        println!(
            "{}",
            json!({
                "ok": report.is_whole(), "damages": damages, "checked_bytes": report.checked_bytes,
                "unused_bytes": report.unused_bytes, "trailing_bytes": report.trailing_bytes
            })
        );
    } else if report.is_whole() {
        println!("{}: {} checked, no damage", args.bundle.display(), human_bytes(report.checked_bytes));
    } else {
        damages.iter().for_each(|damage| println!("{damage}"));
        if report.trailing_bytes > 0 {
            let end = report.checked_bytes + report.unused_bytes;
            let (trailing, path) = (counted(report.trailing_bytes as usize, "byte"), args.bundle.display());
            println!("after the end: the bundle ends at byte {end}, followed by {trailing} that belong to nothing");
            eprintln!(
                "something was appended to the bundle, or a replacement of its predictors was interrupted: `truncate -s {end} {path}` \
                 cuts it off"
            );
        }
        if !damages.is_empty() {
            let (places, are) = (counted(damages.len(), "place"), if damages.len() == 1 { "is" } else { "are" });
            eprintln!("{places} {are} damaged; copy the bundle again or rebuild it");
        }
    }
    Ok(if report.is_whole() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
