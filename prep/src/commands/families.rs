//! `flashlm-prep families`: which models can be prepared, and how that was verified.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flashlm_formats::checkpoint::{FAMILY_INFOS, FamilyInfo};

/// Arguments of `flashlm-prep families`.
#[derive(Args)]
#[command(after_help = "`flashlm-prep inspect CHECKPOINT` says which of them a checkpoint is.")]
pub(crate) struct FamiliesArgs {
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &FamiliesArgs) -> Result<ExitCode> {
    if args.json {
        super::print_json(&FAMILY_INFOS)?;
        return Ok(ExitCode::SUCCESS);
    }
    for FamilyInfo { name, model_types, checkpoints, covers, verified, references } in FAMILY_INFOS {
        println!("{name}");
        println!("  model_type   {}", model_types.join(", "));
        println!("  checkpoints  {checkpoints}");
        println!("  covers       {covers}");
        println!("  verified     {verified} ({references} configurations)");
    }
    println!();
    println!(
        "A reference is a small random checkpoint of the kind: logits within 1e-4 and the same greedy tokens, from memory, streamed,"
    );
    println!(
        "and from flash. relu, relu2 and fatrelu leave neurons exactly zero; gelu and silu do not: for such models `prepare` measures"
    );
    println!("what may be left out for a given loss.");
    Ok(ExitCode::SUCCESS)
}
