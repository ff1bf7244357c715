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
    println!("A configuration is a small random checkpoint of the kind: logits within 1e-4 of the reference");
    println!("and the same greedy tokens, from memory, streamed, and from flash.");
    println!();
    println!("relu, relu2 and fatrelu leave most neurons exactly zero: such models run fast from flash.");
    println!("gelu and silu leave none: what may be left out of them costs quality, and a 4-bit version that");
    println!("fits in memory is faster. `flashlm-prep assess CHECKPOINT` says which kind a model is, and more.");
    Ok(ExitCode::SUCCESS)
}
