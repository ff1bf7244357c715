//! `flashlm disk`: how fast a disk serves random and sequential reads, measured once and kept.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use flashlm::budget::human_bytes;
use flashlm_formats::publish::{create_directory, publish_bytes};
use flashlm_io::{DiskProfile, measure_profile, profile_dir};
use indicatif::{ProgressBar, ProgressStyle};

/// Arguments of `flashlm disk`.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  flashlm disk model.flashlm\n  flashlm disk /mnt/ssd --seconds 60 --json > ssd.json\n\n\
    The profile is kept for its device, and used to plan reads and to predict speed."
)]
pub(crate) struct DiskArgs {
    /// A large file on the disk, such as a bundle, or a directory (a scratch file is written there, and removed)
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Seconds to measure for
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Size of the scratch file, if one is needed, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u64).range(64..=65536))]
    scratch: u64,
    /// Print the profile as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &DiskArgs) -> Result<ExitCode> {
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("measuring [{bar:30}] {pos}/{len}, {eta} left")?.progress_chars("=> "));
    let profile = measure_profile(&args.path, args.scratch << 20, Duration::from_secs(args.seconds), &mut |progress| {
        bar.set_length(progress.total as u64);
        bar.set_position(progress.done as u64);
    });
    bar.finish_and_clear();
    let profile = profile?;
    let dir = profile_dir().context("no directory to keep the profile in; set FLASHLM_CACHE_DIR")?;
    let kept = DiskProfile::path_in(&dir, &profile.device);
    create_directory(&dir)
        .and_then(|()| publish_bytes(&kept, &profile.to_json()))
        .with_context(|| format!("cannot keep the profile in {}", kept.display()))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&profile)?);
    } else {
        print(&profile);
    }
    eprintln!("kept in {}", kept.display());
    Ok(ExitCode::SUCCESS)
}

fn print(profile: &DiskProfile) {
    println!("{} ({} reads, {})", profile.device, profile.mode, profile.engine);
    println!("  sequential {:>10}/s", human_bytes(profile.sequential_bytes_per_s as u64));
    let mut depths: Vec<u32> = profile.random.iter().map(|r| r.depth).collect();
    depths.sort_unstable();
    depths.dedup();
    let header: String = depths.iter().map(|d| format!("{:>18}", format!("{d} in flight"))).collect();
    println!("  random reads{header}");
    let mut sizes: Vec<u64> = profile.random.iter().map(|r| r.read_bytes).collect();
    sizes.dedup();
    for size in sizes {
        let cell = |depth: &u32| {
            let rate = profile.random.iter().find(|r| r.read_bytes == size && r.depth == *depth);
            rate.map_or(String::new(), |r| format!("{}/s", human_bytes(r.bytes_per_s() as u64)))
        };
        let row: String = depths.iter().map(|d| format!("{:>18}", cell(d))).collect();
        println!("  {:>8} KiB{row}", size / 1024);
    }
}
