//! `flashlm`: runs a bundle inside a memory budget.

mod commands;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use commands::named::{bundle_file, bundle_or_offer};
use flashlm::command_line::{self, EXIT_CODES, FLASHLM_PREP};
use flashlm::error::sentence;
use flashlm::terminal::printable_line;
use flashlm::{console, manual, signals};

#[derive(Parser)]
#[command(
    name = "flashlm",
    version,
    about = "Run a language model that does not fit in memory",
    after_help = help_of_both(),
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
    /// Measure how fast a run is here, and what bounds it; with --ladder what each optimisation gains
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
    /// Write manual pages into a directory, such as ~/.local/share/man/man1
    Man {
        /// Where to write them
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
}

/// The commands of the other program, which work here, too, and the exit codes.
fn help_of_both() -> String {
    let (name, commands) = (FLASHLM_PREP.name, FLASHLM_PREP.commands.join(", "));
    format!("Commands of {name}, which `flashlm` hands over to it: {commands}.\n\n{EXIT_CODES}")
}

/// The command with files in place of models that are named: prepared earlier, or, for a run by a person, now.
fn with_bundles(mut command: Command) -> anyhow::Result<Command> {
    let bundles: Vec<&mut PathBuf> = match &mut command {
        Command::Run(args) => {
            args.model.bundle = bundle_or_offer(&args.model.bundle)?;
            args.guesses.draft.iter_mut().collect()
        }
        Command::Plan(args) => std::iter::once(&mut args.model.bundle).chain(&mut args.guesses.draft).collect(),
        Command::Logits(args) => vec![&mut args.model.bundle],
        Command::Doctor(args) => args.bundle.iter_mut().collect(),
        Command::Bench(args) => vec![&mut args.bundle],
        Command::BenchStep(_) | Command::Disk(_) | Command::Completions { .. } | Command::Man { .. } => vec![],
    };
    for bundle in bundles {
        *bundle = bundle_file(bundle)?;
    }
    Ok(command)
}

fn main() -> ExitCode {
    flashlm::guard::silence_guarded_panics();
    if let Err(code) = command_line::hand_over(&FLASHLM_PREP) {
        return code;
    }
    if let Err(error) = signals::outlive_file_size_limits() {
        eprintln!("flashlm: cannot watch for signals: {error}");
        return ExitCode::FAILURE;
    }
    let cli = match command_line::parse::<Cli>(&FLASHLM_PREP) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let result = with_bundles(cli.command).and_then(|command| match command {
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
        Command::Man { dir } => {
            let written = manual::write(Cli::command(), &FLASHLM_PREP, &dir).map_err(Into::into);
            written.map(|count| {
                console::print_line(format_args!("{count} manual pages in {}", printable_line(&dir.to_string_lossy())));
                ExitCode::SUCCESS
            })
        }
    });
    result.unwrap_or_else(|error| {
        // A reader that went away (`flashlm run .. | head`) is not a failure of ours.
        if commands::is_broken_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        eprintln!("flashlm: {}", sentence(error.as_ref()));
        ExitCode::FAILURE
    })
}
