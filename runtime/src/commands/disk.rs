//! `flashlm disk`: how fast a disk serves random and sequential reads, measured once and kept.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use flashlm::budget::human_bytes;
use flashlm_formats::publish::{create_directory, publish_bytes};
use flashlm_io::{DiskProfile, MeasureProgress, Measurement, cache_dir, measure_profile};
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
    /// Seconds to measure for; writing a scratch file comes before that
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Size of the scratch file, if one is needed, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u64).range(64..=65536))]
    scratch: u64,
    /// Keep the profile even if the disk was busy with something else meanwhile
    #[arg(long)]
    anyway: bool,
    /// Print the profile as JSON
    #[arg(long)]
    json: bool,
}

/// More than this share of a disk's work for others, and what was measured is no property of the disk.
const FOREIGN_MOST: f64 = 0.05;

pub(crate) fn run(args: &DiskArgs) -> Result<ExitCode> {
    let bar = ProgressBar::new(1);
    let style = |template| ProgressStyle::with_template(template).map(|style| style.progress_chars("=> "));
    let (writing, measuring) = (style("writing [{bar:30}] {percent} %")?, style("measuring [{bar:30}] {eta} left")?);
    let mut is_writing = false;
    let measured = measure_profile(
        &args.path,
        args.scratch << 20,
        Duration::from_secs(args.seconds),
        &mut |progress| match progress {
            MeasureProgress::Writing { done, total } => {
                if !is_writing {
                    eprintln!(
                        "writing a scratch file of {} below {} (--scratch makes it smaller); it is removed afterwards",
                        human_bytes(total),
                        args.path.display()
                    );
                    bar.set_style(writing.clone());
                    is_writing = true;
                }
                bar.set_length(total);
                bar.set_position(done);
            }
            MeasureProgress::Measuring { done, total } => {
                if done == 0 {
                    bar.set_style(measuring.clone());
                    bar.reset();
                }
                bar.set_length(total as u64);
                bar.set_position(done as u64);
            }
        },
    );
    bar.finish_and_clear();
    let Measurement { profile, foreign } = measured?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&profile)?);
    } else {
        print(&profile);
        println!("{}", verdict(&profile));
    }
    if let Some(share) = foreign.filter(|share| *share > FOREIGN_MOST && !args.anyway) {
        bail!(
            "{:.0} % of what the disk read and wrote meanwhile was for others, so this says little of the disk and is not kept: repeat \
             it when the disk is quiet, or keep it with --anyway",
            100.0 * share
        );
    }
    let dir = cache_dir().context("no directory to keep the profile in; set FLASHLM_CACHE_DIR")?;
    let kept = DiskProfile::path_in(&dir, &profile.device);
    create_directory(&dir)
        .and_then(|()| publish_bytes(&kept, &profile.to_json()))
        .with_context(|| format!("cannot keep the profile in {}", kept.display()))?;
    eprintln!("kept in {}", kept.display());
    Ok(ExitCode::SUCCESS)
}

/// Bytes of a read that brings a neuron of a common size.
const NEURON_BYTES: u64 = 16 << 10;
/// Rates of such reads from which on a disk is good for them, and below which it is slow.
const GOOD: f64 = 400e6;
const SLOW: f64 = 100e6;

/// What the disk is good for.
fn verdict(profile: &DiskProfile) -> String {
    let neurons = profile.random.iter().filter(|rate| rate.read_bytes == NEURON_BYTES);
    let scattered = neurons.map(|rate| rate.bytes_per_s()).fold(0.0, f64::max);
    let of_sequential = 100.0 * scattered / profile.sequential_bytes_per_s;
    let word = match scattered {
        rate if rate >= GOOD => "good",
        rate if rate < SLOW => "slow",
        _ => "fair",
    };
    let advice = match word {
        "slow" => "\nA budget that keeps most of the active neurons in memory gains most here.",
        _ => "",
    };
    format!(
        "{word} for neurons that are read one by one: {}/s in reads of {} KiB,\n{of_sequential:.0} % of the rate of one long read{advice}",
        human_bytes(scattered as u64),
        NEURON_BYTES >> 10
    )
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

#[cfg(test)]
mod tests {
    use super::*;
    use flashlm_io::{PROFILE_VERSION, RandomRate};

    #[test]
    fn disks_are_called_what_they_are() {
        let disk = |scattered: f64| DiskProfile {
            version: PROFILE_VERSION,
            device: "x".into(),
            mode: "direct".into(),
            engine: "io_uring".into(),
            sequential_bytes_per_s: 2e9,
            random: vec![RandomRate {
                read_bytes: NEURON_BYTES,
                depth: 64,
                reads_per_s: scattered / NEURON_BYTES as f64,
            }],
        };
        assert!(
            verdict(&disk(1e9)).starts_with("good for neurons") && verdict(&disk(1e9)).contains("50 % of the rate")
        );
        assert!(verdict(&disk(2e8)).starts_with("fair") && !verdict(&disk(2e8)).contains("budget"));
        assert!(verdict(&disk(5e7)).starts_with("slow") && verdict(&disk(5e7)).contains("budget"));
    }
}
