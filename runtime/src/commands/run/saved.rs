//! The session that a run goes on with and saves.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flashlm::budget::{counted, human_bytes};
use flashlm::{Conversation, ModelOptions, Session};
use flashlm_formats::destination::{Destination, FileKind, There, check_file};

use super::RunArgs;

/// A file for this run alone, from before the model is loaded until the session is saved.
pub(super) struct SavedIn<'a> {
    path: &'a Path,
    /// Whether a session is there.
    is_there: bool,
    destination: Destination,
}

impl<'a> SavedIn<'a> {
    /// Takes the file, and looks whether what is in it can be gone on with.
    pub(super) fn take(path: &'a Path, args: &RunArgs, options: &ModelOptions) -> Result<Self> {
        let draft = args.guesses.draft.clone();
        let inputs: Vec<PathBuf> =
            [args.model.bundle.clone()].into_iter().chain(draft).chain(args.prompt_file.clone()).collect();
        let is_there = check_file(path, FileKind::Session, &inputs)? == There::Own;
        if is_there {
            options.check_session(path)?;
        }
        Ok(Self { path, is_there, destination: Destination::take(path, FileKind::Session, &inputs)? })
    }

    /// Begins with what the file has of a prompt; gives how many of its tokens.
    pub(super) fn resume(&self, session: &mut Session<'_>, prompt: &[u32]) -> Result<usize> {
        if !self.is_there {
            return Ok(0);
        }
        let had = session.resume(self.path, prompt)?;
        eprintln!("{} of {} of the prompt are in {}", had, counted(prompt.len(), "token"), self.path.display());
        Ok(had)
    }

    /// Goes on after all that the file has.
    pub(super) fn restore(&self, conversation: &mut Conversation<'_>) -> Result<()> {
        if self.is_there { load(self.path, conversation) } else { Ok(()) }
    }

    /// Saves the session in place of what the file has.
    pub(super) fn save(self, mut conversation: Conversation<'_>) -> Result<()> {
        save(self.path, self.destination, &mut conversation)
    }
}

/// Goes on with what a file has.
pub(super) fn load(path: &Path, conversation: &mut Conversation<'_>) -> Result<()> {
    let was_chat = conversation.is_chat();
    let had = conversation.restore(path)?;
    eprintln!("this goes on after {} of {}", counted(had, "token"), path.display());
    if was_chat && !conversation.is_chat() {
        eprintln!(
            "note: it was saved without a chat template and goes on as text; begin another file for a conversation"
        );
    }
    Ok(())
}

/// Saves a conversation in a file that may be there, if a session is in it.
pub(super) fn save_in(path: &Path, conversation: &mut Conversation<'_>, args: &RunArgs) -> Result<()> {
    let inputs: Vec<PathBuf> = [args.model.bundle.clone()].into_iter().chain(args.guesses.draft.clone()).collect();
    let destination = Destination::take(path, FileKind::Session, &inputs)?;
    save(path, destination, conversation)
}

fn save(path: &Path, destination: Destination, conversation: &mut Conversation<'_>) -> Result<()> {
    let path = path.display();
    let bytes = conversation.save(destination).with_context(|| format!("cannot save the session in {path}"))?;
    eprintln!("saved {} in {path}: {}", counted(conversation.session().len(), "token"), human_bytes(bytes));
    Ok(())
}
