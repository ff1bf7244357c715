//! Bundles by the name of a model of the hub: found where `flashlm-prep prepare` keeps them, or made there after asking.

use std::io::{BufRead, IsTerminal, stderr, stdin};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use flashlm::command_line::{FLASHLM_PREP, program};
use flashlm::kept::kept_bundle;
use flashlm::signals;
use flashlm_formats::model_name::ModelName;
use rustix::process::{Pid, Signal, kill_process};

/// How often it is looked whether the other program has ended.
const WAIT_STEP: Duration = Duration::from_millis(50);

/// The file that an argument names. A file wins over a model of the same name.
pub(crate) fn bundle_file(given: &Path) -> Result<PathBuf> {
    let Some(name) = model_name(given) else { return Ok(given.to_owned()) };
    match kept_bundle(&name) {
        Some(kept) if is_there(&kept) => {
            eprintln!("{name} is prepared: {}", kept.display());
            Ok(kept)
        }
        _ => bail!(
            "there is no bundle {name}; if it is a model of the hub, `flashlm-prep prepare {name}` makes one and keeps it under that name"
        ),
    }
}

/// The same where a person may be asked: a model that is not prepared is, if that is wanted.
pub(crate) fn bundle_or_offer(given: &Path) -> Result<PathBuf> {
    let offered = model_name(given).and_then(|name| Some((kept_bundle(&name)?, name)));
    match offered {
        Some((kept, name)) if !is_there(&kept) && stdin().is_terminal() && stderr().is_terminal() => {
            offer(&name)?;
            bundle_file(given)
        }
        _ => bundle_file(given),
    }
}

/// Whether there is a bundle, or something that stands for one: an empty file counts as none.
fn is_there(kept: &Path) -> bool {
    kept.metadata().is_ok_and(|there| !there.is_file() || there.len() > 0)
}

/// The model of the hub that an argument names, if it is no file here.
fn model_name(given: &Path) -> Option<ModelName> {
    let is_bundle = given.extension().is_some_and(|extension| extension == "flashlm");
    if is_bundle || given.exists() {
        return None;
    }
    given.to_str().and_then(ModelName::parse)
}

/// Says what preparing takes, asks, and does it.
fn offer(name: &ModelName) -> Result<()> {
    eprintln!("{name} is not prepared on this machine. Asking the hub what that would take ..");
    let name = name.to_string();
    prep(&["assess", "--quick", &name])?;
    eprint!("Prepare it now? It goes on where it stopped if it is interrupted. [y/N] ");
    // Nothing is lost if Ctrl-C is the answer.
    super::watch_signals()?;
    signals::end_at_once(true);
    let mut answer = String::new();
    stdin().lock().read_line(&mut answer).context("cannot read the answer")?;
    if !matches!(answer.trim().to_lowercase().as_str(), "y" | "yes") {
        bail!("{name} is not prepared; `flashlm-prep prepare {name}` does it at any time");
    }
    prep(&["prepare", &name])
}

/// Runs the other program on this terminal.
fn prep(arguments: &[&str]) -> Result<()> {
    let said = || format!("cannot run {}, which prepares models; install it beside flashlm", FLASHLM_PREP.name);
    super::watch_signals()?;
    signals::end_at_once(false);
    let mut child =
        Command::new(program(&FLASHLM_PREP)).args(arguments).stdin(Stdio::null()).spawn().with_context(said)?;
    let mut is_told = false;
    let status = loop {
        if let Some(status) = child.try_wait().with_context(said)? {
            break status;
        }
        // Ctrl-C reaches both programs, what was sent to this one alone does not.
        if signals::asked().is_some() && !is_told {
            is_told = true;
            _ = kill_process(Pid::from_child(&child), Signal::TERM);
        }
        std::thread::sleep(WAIT_STEP);
    };
    if let Some(code) = signals::asked() {
        std::process::exit(code.into());
    }
    // It said why.
    if !status.success() {
        bail!("`{} {}` did not succeed", FLASHLM_PREP.name, arguments.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub_are_told_from_files() {
        for name in ["facebook/opt-1.3b", "org/name@main", "a/b_c.d-e"] {
            assert!(model_name(Path::new(name)).is_some(), "{name}");
        }
        for file in
            ["model.flashlm", "./model", "dir/model.flashlm", "/a/b", "a/b/c", "../a", "a/", "opt-1.3b", "src/lib.rs"]
        {
            assert!(model_name(Path::new(file)).is_none(), "{file}");
        }
    }
}
