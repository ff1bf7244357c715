//! `flashlm-prep`: makes a bundle of a checkpoint.

mod commands;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};
use flashlm::command_line::{self, EXIT_CODES, FLASHLM};
use flashlm::error::sentence;
use flashlm::terminal::printable_line;
use flashlm::{console, manual, signals};

#[derive(Parser)]
#[command(
    name = "flashlm-prep",
    version,
    about = "Prepare a checkpoint for flashlm",
    after_help = EXIT_CODES,
    max_term_width = 110
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Do everything: record, train, order and pack
    Prepare(commands::prepare::PrepareArgs),
    /// Say whether preparing a model pays: how sparse it is, how fast it would be here, and what preparing takes
    Assess(commands::assess::AssessArgs),
    /// Write a bundle without predictors, neurons in the checkpoint's order
    Convert(commands::convert::ConvertArgs),
    /// Show what a checkpoint or a bundle is, and how large its parts are
    Inspect(commands::inspect::InspectArgs),
    /// List the models that can be prepared, and how each was verified
    Families(commands::families::FamiliesArgs),
    /// Check every checksum of a bundle
    Verify(commands::verify::VerifyArgs),
    /// Write a bundle with predictors and storage orders
    Pack(commands::pack::PackArgs),
    /// Compare a bundle with its checkpoint on a text
    Evaluate(commands::evaluate::EvaluateArgs),
    /// Measure which neurons can be left out of a model whose neurons are never exactly zero
    Thresholds(commands::thresholds::ThresholdsArgs),
    /// Record which neurons fire on a text
    Record(commands::record::RecordArgs),
    /// Show which neurons fire, how often, and together with which others
    Analyze(commands::analyze::AnalyzeArgs),
    /// Choose the storage order of each layer's neurons
    Order(commands::order::OrderArgs),
    /// Train predictors of the active neurons, on a recording
    Train(commands::train::TrainArgs),
    /// Import storage orders that another program made
    ImportOrder(commands::import_order::ImportOrderArgs),
    /// Import predictors that Deja Vu or PowerInfer trained
    ImportPredictors(commands::import_predictors::ImportArgs),
    /// Write a random-weight checkpoint of a published geometry, for measuring
    Synthesize(commands::synthesize::SynthesizeArgs),
    /// Replay the neurons that recorded tokens need through cache policies
    Replay(commands::replay::ReplayArgs),
    /// Show a recording, its predictors and its orders on one HTML page
    Report(commands::report::ReportArgs),
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

fn main() -> ExitCode {
    flashlm::guard::silence_guarded_panics();
    if let Err(error) = signals::outlive_file_size_limits() {
        eprintln!("flashlm-prep: cannot watch for signals: {error}");
        return ExitCode::FAILURE;
    }
    let cli = match command_line::parse::<Cli>(&FLASHLM) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    allow_open_files();
    let goes_on = matches!(cli.command, Command::Prepare(_) | Command::Record(_));
    let result = commands::interrupt::watch(goes_on).and_then(|()| run(cli.command));
    result.unwrap_or_else(|error| {
        if commands::is_broken_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        eprintln!("flashlm-prep: {}", sentence(error.as_ref()));
        ExitCode::FAILURE
    })
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Prepare(args) => commands::prepare::run(&args),
        Command::Assess(args) => commands::assess::run(&args),
        Command::Convert(args) => commands::convert::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Families(args) => commands::families::run(&args),
        Command::Verify(args) => commands::verify::run(&args),
        Command::Pack(args) => commands::pack::run(&args),
        Command::Evaluate(args) => commands::evaluate::run(&args),
        Command::Thresholds(args) => commands::thresholds::run(&args),
        Command::Record(args) => commands::record::run(&args),
        Command::Analyze(args) => commands::analyze::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Order(args) => commands::order::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Train(args) => commands::train::run(&args),
        Command::ImportOrder(args) => commands::import_order::run(&args).map(|()| ExitCode::SUCCESS),
        Command::ImportPredictors(args) => commands::import_predictors::run(&args),
        Command::Synthesize(args) => commands::synthesize::run(&args),
        Command::Replay(args) => commands::replay::run(&args),
        Command::Report(args) => commands::report::run(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "flashlm-prep", &mut script);
            std::io::stdout().write_all(&script).map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
        Command::Man { dir } => {
            let count = manual::write(Cli::command(), &FLASHLM, &dir)?;
            console::print_line(format_args!("{count} manual pages in {}", printable_line(&dir.to_string_lossy())));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// A checkpoint may come in more files than a process usually has open; the system lets a process ask for more. Where it does
/// not, opening the files says so.
fn allow_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}
