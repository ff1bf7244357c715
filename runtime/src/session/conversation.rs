//! A conversation: who said what, and a context that never is its end.
//!
//! With a chat template every turn is the whole conversation as the template writes it, of which the session computes what it has not
//! yet. Without one, a turn goes on with the text. Where the context is full, the oldest turns make room: they are forgotten, or the
//! model sums them up. What is left is then computed again, from half a context or less, so that this happens seldom.

use std::ops::ControlFlow;
use std::path::Path;

use flashlm_formats::destination::Destination;
use serde::{Deserialize, Serialize};

use super::generation::Token;
use super::session::Session;
use crate::chat::{ChatTemplate, Message, Rendered};
use crate::error::{Result, RuntimeError};
use crate::generate::{Finish, Generation as Report};

/// Share of the context that must be left for an answer, unless a turn may have fewer tokens.
const ANSWER_SHARE: usize = 4;
/// Tokens of a summary, at most, and the share of the context that it may take.
const SUMMARY_TOKENS: usize = 200;
const SUMMARY_SHARE: usize = 8;
/// What the model is asked for a summary with.
const SUMMARISE: &str =
    "Sum up the following conversation in a few sentences. Keep names, numbers and what was agreed.";
/// What the model is told of what was summed up.
const SUMMED_UP: &str = "Earlier in this conversation:";

/// What happens where a context is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// The oldest turns are forgotten.
    #[default]
    Shift,
    /// The model sums them up; without a chat template they are forgotten.
    Summarise,
    /// Nothing is: a turn that does not fit is an error, an answer that does not is cut short.
    Stop,
}

/// What is told of a turn while it is made.
#[derive(Debug)]
pub enum Progress<'a> {
    /// A token of the answer.
    Token(&'a Token),
    /// So many of the oldest turns are being summed up, which takes a while.
    Summarising(usize),
    /// A token of a summary.
    Summary,
    /// So many of the oldest turns are forgotten or summed up now.
    Dropped(usize),
    /// Without turns to forget: so many of the oldest tokens.
    Shortened(usize),
}

/// Is told of a turn, and says whether it is to go on.
type Each<'a> = &'a mut dyn FnMut(Progress<'_>) -> ControlFlow<()>;

/// What one side said, and what the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Turn {
    user: String,
    answer: String,
}

/// What is said so far, as it is kept in a saved session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    system: Option<String>,
    /// Of the turns before these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    summary: Option<String>,
    turns: Vec<Turn>,
    /// The text of all that the session has, as far as it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    written: Option<String>,
}

/// What is to be said, and its text where a template wrote it.
struct Written {
    ids: Vec<u32>,
    text: Option<String>,
}

/// A session that is talked to.
pub struct Conversation<'m> {
    session: Session<'m>,
    template: Option<ChatTemplate>,
    said: Said,
    when_full: WhenFull,
}

impl<'m> Conversation<'m> {
    /// A conversation on a session, written by a template, or by none: then it is a text that goes on.
    pub fn new(session: Session<'m>, template: Option<ChatTemplate>) -> Self {
        Self { session, template, said: Said::default(), when_full: WhenFull::default() }
    }

    /// What happens where the context is full; by default the oldest turns are forgotten.
    pub fn when_full(mut self, when_full: WhenFull) -> Self {
        self.when_full = when_full;
        self
    }

    /// The same from now on.
    pub fn set_when_full(&mut self, when_full: WhenFull) {
        self.when_full = when_full;
    }

    /// What was said in a turn that this conversation had no part in.
    pub fn after(mut self, user: &str, answer: &str) -> Self {
        self.said.turns.push(Turn { user: user.to_owned(), answer: answer.to_owned() });
        self
    }

    /// The session.
    pub fn session(&mut self) -> &mut Session<'m> {
        &mut self.session
    }

    /// Whether a chat template writes the turns.
    pub fn is_chat(&self) -> bool {
        self.template.is_some()
    }

    /// Turns so far that are not forgotten.
    pub fn turns(&self) -> usize {
        self.said.turns.len()
    }

    /// What the model is told before the conversation.
    pub fn system(&self) -> Option<&str> {
        self.said.system.as_deref()
    }

    /// Tells the model something before the conversation, instead of what it was told.
    ///
    /// # Errors
    /// `NoChatTemplate`: a text that goes on has no place for it.
    pub fn set_system(&mut self, system: Option<String>) -> Result<()> {
        if self.template.is_none() && system.is_some() {
            return Err(RuntimeError::NoChatTemplate);
        }
        self.said.system = system.filter(|system| !system.is_empty());
        Ok(())
    }

    /// Forgets what was said, but not what the model is told before.
    pub fn clear(&mut self) {
        self.said = Said { system: self.said.system.take(), ..Said::default() };
        self.session.clear();
    }

    /// Says `text` and lets the model answer. Where that fails before the first token of the answer, nothing has been said.
    ///
    /// # Errors
    /// `EmptyPrompt`, `Chat`, `Tokenizer`, `ContextFull`, and whatever may go wrong while computing.
    pub fn ask(&mut self, text: &str, each: Each<'_>) -> Result<Report> {
        let (before, limit) = (self.said.clone(), self.session.limit());
        let answered = match self.template {
            Some(_) => {
                self.said.turns.push(Turn { user: text.to_owned(), answer: String::new() });
                self.pieces(&mut |conversation, answered, each| conversation.fitting_turns(answered, each), each)
            }
            None => {
                let tokenizer = self.session.model().tokenizer();
                let is_first = self.session.is_empty();
                let new = if is_first { tokenizer.encode(text)? } else { tokenizer.encode_bare(text)? };
                if new.is_empty() || is_first && tokenizer.encode_bare(text)?.is_empty() {
                    return Err(RuntimeError::EmptyPrompt);
                }
                let ids = [self.session.ids(), &new].concat();
                self.pieces(
                    &mut |conversation, answered, each| conversation.fitting_text(&ids, new.len(), answered, each),
                    each,
                )
            }
        };
        self.session.set_max_tokens(limit);
        if answered.is_err() {
            // The session has more, and will forget what the next turn has not.
            self.said = before;
        }
        answered
    }

    /// An answer, in as many pieces as the context takes. `fitting` gives the ids before the next one, after those of the answer so
    /// far, with as much room made as can be.
    fn pieces(
        &mut self,
        fitting: &mut dyn FnMut(&mut Self, &[u32], Each<'_>) -> Result<Written>,
        each: Each<'_>,
    ) -> Result<Report> {
        let limit = self.session.limit();
        let mut answered = Vec::new();
        let mut whole: Option<Report> = None;
        loop {
            let Written { ids, text } = fitting(self, &answered, each)?;
            if let Some(report) = whole.as_ref().filter(|_| ids.len() > self.session.context()) {
                return Ok(report.clone());
            }
            let (report, held_back) = self.piece(&ids, text, each)?;
            answered.extend_from_slice(&self.session.ids()[ids.len()..]);
            let report = whole.take().map_or(report.clone(), |before| before.and(report));
            let is_full = report.finish == Finish::Length && limit.is_none_or(|limit| report.tokens < limit);
            // An open character goes on in the next piece; what may be the beginning of a stop string would be lost.
            if !is_full || self.when_full == WhenFull::Stop || held_back.is_some() && self.session.has_stop_strings() {
                if let Some(token) = held_back {
                    self.take(&token, each);
                }
                return Ok(report);
            }
            self.session.set_max_tokens(limit.map(|limit| limit - report.tokens));
            whole = Some(report);
        }
    }

    /// What follows `ids`, until something ends it; with the text that only the end let out.
    fn piece(&mut self, ids: &[u32], text: Option<String>, each: Each<'_>) -> Result<(Report, Option<Token>)> {
        let Self { session, template, said, .. } = self;
        let mut generation = session.answer(template.as_ref(), ids, text)?;
        let mut held_back = None;
        while let Some(token) = generation.next() {
            let token = token?;
            if token.id.is_none() {
                held_back = Some(token);
                continue;
            }
            if let Some(turn) = said.turns.last_mut() {
                turn.answer += &token.text;
            }
            if each(Progress::Token(&token)).is_break() {
                generation.stop();
            }
        }
        Ok((generation.report().clone(), held_back))
    }

    fn take(&mut self, token: &Token, each: Each<'_>) {
        if let Some(turn) = self.said.turns.last_mut() {
            turn.answer += &token.text;
        }
        _ = each(Progress::Token(token));
    }

    /// Tokens that are to be left for what is still to be answered.
    fn wanted(&self) -> usize {
        let share = (self.session.context() / ANSWER_SHARE).max(1);
        self.session.limit().map_or(share, |limit| limit.clamp(1, share))
    }

    fn is_full(&self, ids: usize) -> bool {
        self.when_full != WhenFull::Stop && ids + self.wanted() > self.session.context()
    }

    /// The turns as the template writes them, and the answer so far. Where that fills the context, the oldest turns are forgotten.
    fn fitting_turns(&mut self, answered: &[u32], each: Each<'_>) -> Result<Written> {
        let written = self.written_before(answered)?;
        if !self.is_full(written.ids.len()) {
            return Ok(written);
        }
        let (most, mut dropped) = (self.session.context() / 2, 0);
        let mut count = written.ids.len();
        while count > most && dropped + 1 < self.said.turns.len() {
            dropped += 1;
            let ids = self.rendered(&self.messages(dropped))?.ids(self.session.model().tokenizer())?;
            count = ids.len() + answered.len();
        }
        if dropped == 0 || count > self.session.context() {
            // What does not fit all by itself makes nobody forget anything.
            return Ok(written);
        }
        let forgotten: Vec<Turn> = self.said.turns.drain(..dropped).collect();
        if self.when_full == WhenFull::Summarise {
            self.said.summary = self.summary(&forgotten, each)?;
        }
        _ = each(Progress::Dropped(dropped));
        let written = self.written_before(answered)?;
        if written.ids.len() > self.session.context() && self.said.summary.take().is_some() {
            return self.written_before(answered);
        }
        Ok(written)
    }

    /// What is said up to where the last turn's answer begins, and that answer so far.
    fn written_before(&self, answered: &[u32]) -> Result<Written> {
        let rendered = self.rendered(&self.messages(0))?;
        let ids = [self.session.ids_of(&rendered)?, answered.to_vec()].concat();
        let answer = self.said.turns.last().map_or("", |turn| &turn.answer);
        Ok(Written { ids, text: Some(rendered.text().into_owned() + answer) })
    }

    /// A text that goes on, of which the last `new` ids must stay, and the answer so far. Where that fills the context, the oldest of
    /// it is forgotten, but for what begins every text.
    fn fitting_text(&self, ids: &[u32], new: usize, answered: &[u32], each: Each<'_>) -> Result<Written> {
        let ids = [ids, answered].concat();
        if !self.is_full(ids.len()) {
            return Ok(Written { ids, text: None });
        }
        let first = self.session.model().tokenizer().first_ids();
        let first = if ids.starts_with(first) { first } else { &[] };
        // Of an answer that has come so far, its end will do.
        let least = if answered.is_empty() { new } else { 0 };
        let kept = (self.session.context() / 2).saturating_sub(first.len()).max(least).max(1);
        let dropped = (ids.len() - first.len()).saturating_sub(kept);
        if dropped == 0 {
            return Ok(Written { ids, text: None });
        }
        _ = each(Progress::Shortened(dropped));
        Ok(Written { ids: [first, &ids[first.len() + dropped..]].concat(), text: None })
    }

    /// What the model says of turns that are about to be forgotten; nothing where it says nothing.
    fn summary(&mut self, turns: &[Turn], each: Each<'_>) -> Result<Option<String>> {
        _ = each(Progress::Summarising(turns.len()));
        let context = self.session.context();
        let tokens = (context / SUMMARY_SHARE).clamp(1, SUMMARY_TOKENS);
        let mut text: String = self.said.summary.iter().map(|summary| format!("{SUMMED_UP} {summary}\n")).collect();
        turns.iter().for_each(|turn| text += &format!("User: {}\nAssistant: {}\n", turn.user, turn.answer));
        let ids = loop {
            let rendered = self.rendered(&[Message::user(&format!("{SUMMARISE}\n\n{text}"))])?;
            let ids = rendered.ids(self.session.model().tokenizer())?;
            if ids.len() + tokens <= context {
                break ids;
            }
            // The older half is summed up by nobody.
            let half = (text.len() / 2..text.len()).find(|at| text.is_char_boundary(*at));
            match half.filter(|half| *half > 0) {
                Some(half) => text = text.split_off(half),
                None => return Ok(self.said.summary.clone()),
            }
        };
        let limit = self.session.limit();
        self.session.set_max_tokens(Some(tokens));
        let mut summary = String::new();
        let mut generation = self.session.answer(self.template.as_ref(), &ids, None)?;
        while let Some(token) = generation.next() {
            summary += &token?.text;
            if each(Progress::Summary).is_break() {
                generation.stop();
            }
        }
        drop(generation);
        self.session.set_max_tokens(limit);
        Ok(Some(summary.trim().to_owned()).filter(|summary| !summary.is_empty()))
    }

    /// What is said without the first turns, up to where the last one's answer begins.
    fn messages(&self, without: usize) -> Vec<Message> {
        let said = &self.said;
        let summary = said.summary.as_ref().map(|summary| format!("{SUMMED_UP} {summary}"));
        let before: Vec<String> = said.system.iter().cloned().chain(summary).collect();
        let before = Some(before.join("\n\n")).filter(|before| !before.is_empty());
        let turns = &said.turns[without..];
        let first = turns.first().map_or("", |turn| &turn.user);
        let mut messages =
            self.template.as_ref().map_or_else(Vec::new, |template| template.opening(before.as_deref(), first));
        for pair in turns.windows(2) {
            messages.push(Message::assistant(&pair[0].answer));
            messages.push(Message::user(&pair[1].user));
        }
        messages
    }

    fn rendered(&self, messages: &[Message]) -> Result<Rendered> {
        let template = self.template.as_ref().ok_or(RuntimeError::NoChatTemplate)?;
        template.render(self.session.model().tokenizer(), messages, None, true)
    }

    /// Writes the conversation with its keys and values; gives the bytes of these.
    ///
    /// # Errors
    /// What the destination has against it.
    pub fn save(&mut self, destination: Destination) -> Result<u64> {
        let said = Said { written: self.session.written.clone(), ..self.said.clone() };
        let said = self.template.is_some().then(|| serde_json::to_string(&said).expect("texts have a JSON form"));
        self.session.set_conversation(said);
        self.session.save(destination)
    }

    /// Goes on with a saved conversation instead of this one; gives the tokens that it has. A text that was saved without a chat
    /// template goes on without one.
    ///
    /// # Errors
    /// As [`Session::restore`]; then nothing has been said.
    pub fn restore(&mut self, path: &Path) -> Result<usize> {
        let had = self.session.restore(path)?;
        let damaged = |error: serde_json::Error| RuntimeError::Chat(format!("{}: {error}", path.display()));
        match self.session.conversation().map(serde_json::from_str) {
            Some(said) if self.template.is_some() => {
                self.said = said.map_err(damaged)?;
                self.session.written = self.said.written.take();
            }
            Some(_) => {
                self.clear();
                return Err(RuntimeError::SavedByTemplate { path: path.to_owned() });
            }
            None if had > 0 => (self.template, self.said) = (None, Said::default()),
            _ => self.said = Said::default(),
        }
        Ok(had)
    }
}
