//! `flashlm`: runs a bundle inside a memory budget.

mod commands;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use flashlm::command_line::{self, EXIT_CODES, FLASHLM_PREP};
use flashlm::error::sentence;
use flashlm::signals;

#[derive(Parser)]
#[command(
    name = "flashlm",
    version,
    about = "Run a language model that does not fit in memory",
    after_help = EXIT_CODES,
    max_term_width = 110
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Generate text from a bundle
    Run(Box<commands::run::RunArgs>),
    /// Write the logits at every position of a sequence
    Logits(commands::logits::LogitsArgs),
    /// Show the memory that a run would take
    Plan(commands::plan::PlanArgs),
    /// Show what this machine can do, and what is missing
    Doctor(commands::doctor::DoctorArgs),
    /// Measure what each optimisation gains: naive, hybrid, predictor, .. up to everything together
    Bench(commands::bench::BenchArgs),
    #[command(hide = true)]
    BenchStep(commands::bench::StepArgs),
    /// Measure how fast a disk serves reads, and keep the profile
    Disk(commands::disk::DiskArgs),
    /// Print a shell completion script
    Completions {
        /// The shell to complete for
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    flashlm::guard::silence_guarded_panics();
    if let Err(error) = signals::outlive_file_size_limits() {
        eprintln!("flashlm: cannot watch for signals: {error}");
        return ExitCode::FAILURE;
    }
    let cli = match command_line::parse::<Cli>(&FLASHLM_PREP) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let result = match cli.command {
        Command::Run(args) => commands::run::run(*args),
        Command::Logits(args) => commands::logits::run(args),
        Command::Plan(args) => commands::plan::run(&args),
        Command::Doctor(args) => commands::doctor::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::BenchStep(args) => commands::bench::run_step(&args),
        Command::Disk(args) => commands::disk::run(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "flashlm", &mut script);
            std::io::stdout().write_all(&script).map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
    };
    result.unwrap_or_else(|error| {
        // A reader that went away (`flashlm run .. | head`) is not a failure of ours.
        if commands::is_broken_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        eprintln!("flashlm: {}", sentence(error.as_ref()));
        ExitCode::FAILURE
    })
}
