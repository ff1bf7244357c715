//! The arguments with which every command opens a bundle, and the loading itself with progress.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use flashlm::Result as RuntimeResult;
use flashlm::budget::{Budget, human_bytes};
use flashlm::cache::PolicyKind;
use flashlm::forward::kv::KvDtype;
use flashlm::load::Notice;
use flashlm::options::{FfnChoice, LoadOptions};
use flashlm::plan::MemoryPlan;
use flashlm::speculate::Speculate;
use flashlm_formats::bundle::Bundle;
use flashlm_io::{DirectIo, EngineChoice};
use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use super::values::{self, Disk};

/// How to open a bundle.
#[derive(Args)]
pub(crate) struct ModelArgs {
    /// The bundle, made by `flashlm-prep`; or a model of the hub, org/name[@revision], that was prepared without `-o`
    #[arg(value_name = "BUNDLE")]
    pub(crate) bundle: PathBuf,
    /// Memory for the whole process: 50% (of the model), 4GiB, 6.7GB [default: what the machine and its memory cgroups leave, less a reserve]
    #[arg(long, value_name = "AMOUNT", allow_hyphen_values = true)]
    pub(crate) memory: Option<Budget>,
    /// Where the feed-forward weights come from; the text is the same, except for the two baselines [default: resident if it fits, else flash if the bundle has
    /// predictors, else streamed]
    #[arg(long, value_enum, value_name = "WHERE")]
    ffn: Option<FfnArg>,
    /// Compute every neuron, not only those that the bundle's predictors choose; gives the text of the model without predictors
    #[arg(long)]
    exact: bool,
    /// The option that --exact replaced.
    #[arg(long, hide = true, value_parser = no_predictor)]
    predictor: Option<String>,
    /// Do not prefetch what a layer will probably need
    #[arg(long)]
    no_look_ahead: bool,
    /// Which neurons stay in memory: window:TOKENS, lru, lfu:TOKENS, s3-fifo or w-tinylfu [default: for each layer what
    /// suited it when the bundle was prepared, else lfu:64]
    #[arg(long, value_name = "POLICY")]
    policy: Option<PolicyKind>,
    /// Precision of the KV cache: f16, f32, or int8 (bytes with a scale for each head of each token, about half of f16) [default: f16; f32 if the bundle says that its model's keys or values may be too large for f16]
    #[arg(long, value_name = "DTYPE")]
    kv: Option<KvDtype>,
    /// Threads that compute [default: all processors]
    #[arg(long, value_name = "N", value_parser = flashlm::command_line::thread_count)]
    threads: Option<NonZeroUsize>,
    /// Whether reads must, may or must not bypass the page cache
    #[arg(long, value_name = "WHEN", default_value = "optional", value_parser = values::direct_io())]
    direct: DirectIo,
    /// How reads are issued
    #[arg(long, value_name = "ENGINE", default_value = "auto", value_parser = values::engine())]
    engine: EngineChoice,
    /// Plan reads for the disk of this profile, as `flashlm disk` keeps it, or with `none` for a typical disk [default: the
    /// profile kept for the bundle's disk, if there is one]
    #[arg(long, value_name = "FILE|none")]
    disk: Option<Disk>,
    /// Trust what is read while decoding, without verifying it against the bundle's checksums
    #[arg(long)]
    no_verify: bool,
}

/// Who guesses, and how much.
#[derive(Args)]
pub(crate) struct GuessArgs {
    /// Guess tokens and verify them together with the one before: as many as pay by what steps are measured to take (auto), none
    /// (off), or so many in each step; the text is the same
    #[arg(long, value_name = "auto|off|N", default_value = "auto")]
    pub(crate) speculate: Speculate,
    /// A smaller bundle with the same tokenizer that guesses; without, only what the text said before is guessed. It is kept in memory,
    /// and counts towards --memory
    #[arg(long, value_name = "BUNDLE")]
    pub(crate) draft: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum FfnArg {
    /// All in memory
    Resident,
    /// Read completely for every token
    Streamed,
    /// Predicted neurons, read from flash if they are not cached
    Flash,
    /// Baseline: every neuron computed, and attention read for every token as well
    Naive,
    /// Baseline: every neuron computed, as many layers pinned in memory as fit, the others read for every token
    Hybrid,
}

fn no_predictor(_: &str) -> Result<String, String> {
    Err("there is no --predictor any more: the bundle's predictors choose unless --exact is given".into())
}

impl ModelArgs {
    /// How to load the model for `context` tokens.
    pub(crate) fn options(&self, bundle: &Bundle, context: usize) -> Result<LoadOptions> {
        let defaults = LoadOptions::new(context);
        Ok(LoadOptions {
            budget: self.memory.map(|budget| budget.bytes(bundle.manifest().model_bytes)),
            ffn: self.ffn.map(|ffn| match ffn {
                FfnArg::Resident => FfnChoice::Resident,
                FfnArg::Streamed => FfnChoice::Streamed,
                FfnArg::Flash => FfnChoice::Flash,
                FfnArg::Naive => FfnChoice::Naive,
                FfnArg::Hybrid => FfnChoice::Hybrid,
            }),
            predict: !self.exact,
            look_ahead: !self.no_look_ahead,
            policy: self.policy,
            kv: self.kv,
            threads: self.threads.unwrap_or(defaults.threads),
            direct: self.direct,
            engines: self.engine.into(),
            reads: self.disk.as_ref().map(Disk::reads).transpose()?,
            verify: !self.no_verify,
            ..defaults
        })
    }
}

/// Loads something, showing progress on a terminal.
pub(crate) fn with_progress<T>(load: impl FnOnce(&mut dyn FnMut(u64, u64)) -> RuntimeResult<T>) -> Result<T> {
    let bar = ProgressBar::new(0); // hidden when standard error is not a terminal
    bar.set_style(
        ProgressStyle::with_template("loading [{bar:30}] {size}")?
            .with_key("size", |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                let [done, all, rate] =
                    [state.pos(), state.len().unwrap_or(0), state.per_sec() as u64].map(human_bytes);
                // What cannot be written is not shown.
                _ = write!(out, "{done} of {all}, {rate}/s");
            })
            .progress_chars("=> "),
    );
    let loaded = load(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    Ok(loaded?)
}

/// Says what was chosen: all of it if asked, else what is important.
pub(crate) fn say_chosen(plan: &MemoryPlan, notices: &[Notice], verbose: bool) {
    if verbose {
        eprint!("memory plan for {} tokens of context:\n{}", plan.context, plan.table());
        eprintln!(
            "  `process` counts the pages of the program's file that are used; the system may show more, \
            which it can drop at any time"
        );
    }
    for notice in notices.iter().filter(|n| verbose || n.important) {
        eprintln!("{}", notice.text);
    }
}
