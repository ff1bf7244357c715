//! Turn by turn on a terminal. An error in one turn is reported, and does not end the conversation.

use anyhow::Result;
use flashlm::budget::counted;
use flashlm::error::sentence;
use flashlm::text::ReadTextError;
use flashlm::{Conversation, Error, Finish, Progress, Report, signals};

use super::RunArgs;
use super::figures::figures;
use super::lines::Lines;
use super::orders::{Order, Settings, WhenFullArg};
use super::prompt::{as_typed, say_notices};
use super::saved::{load, save_in};
use super::session::{Printer, advice};
use super::typed::Typed;

/// Asks and answers until the user has had enough.
pub(super) fn converse(conversation: &mut Conversation<'_>, args: &RunArgs, settings: Settings) -> Result<()> {
    let what = if conversation.is_chat() { "Type a message." } else { "Type text for the model to continue." };
    eprintln!("{what} /help lists what else there is. Ctrl-C ends a turn, Ctrl-D the conversation.");
    let mut talk = Talk { conversation, args, settings, last: None };
    let mut lines = Lines::open(!args.no_history)?;
    loop {
        match lines.read("> ")? {
            Typed::End => return Ok(()),
            #[cfg(feature = "editor")]
            Typed::Interrupted => eprintln!("nothing was sent; Ctrl-D or /quit leaves"),
            Typed::Line(line) => match text(&line) {
                Err(error) => eprintln!("what was typed cannot be used: {error}"),
                Ok(text) => match Order::of(&text) {
                    Some(Ok(Order::Quit)) => return Ok(()),
                    Some(Ok(order)) => talk.obey(order),
                    Some(Err(wrong)) => eprintln!("{wrong}"),
                    // Text that begins with a slash has two.
                    None => talk.say(text.strip_prefix("//").map_or(text.clone(), |rest| format!("/{rest}")))?,
                },
            },
        }
        signals::forget_interrupt();
        if signals::asked().is_some() {
            return Ok(());
        }
    }
}

/// A line as text.
fn text(line: &[u8]) -> Result<String, ReadTextError> {
    let text = std::str::from_utf8(line).map_err(|wrong| ReadTextError::NotUtf8 { at: wrong.valid_up_to() })?;
    Ok(as_typed(text.to_owned()))
}

struct Talk<'a, 'm> {
    conversation: &'a mut Conversation<'m>,
    args: &'a RunArgs,
    settings: Settings,
    /// What the last turn cost.
    last: Option<Report>,
}

impl Talk<'_, '_> {
    /// One turn. An error is only that of standard output.
    fn say(&mut self, text: String) -> Result<()> {
        if text.trim().is_empty() && (self.conversation.is_chat() || text.is_empty()) {
            return Ok(());
        }
        let is_first = self.conversation.session().is_empty();
        if let (true, false) = (is_first, self.conversation.is_chat()) {
            let tokenizer = self.conversation.session().model().tokenizer();
            if let Ok(ids) = tokenizer.encode(&text) {
                say_notices(tokenizer, &ids);
            }
        }
        let mut printer = Printer::new(false);
        let context = counted(self.conversation.session().context(), "token");
        let mut has_begun = false;
        let answered = self.conversation.ask(&text, &mut |progress| {
            let note = match progress {
                Progress::Token(token) => {
                    has_begun = true;
                    return printer.token(token);
                }
                Progress::Summary => String::new(),
                Progress::Summarising(turns) => format!("summing up {}", counted(turns, "turn")),
                Progress::Dropped(turns) => {
                    let how = if self.settings.when_full == WhenFullArg::Summarise { "summed up" } else { "forgotten" };
                    format!("the context of {context} is full: {} {how}", were(turns, "turn"))
                }
                Progress::Shortened(tokens) => {
                    format!("the context of {context} is full: {} forgotten", were(tokens, "token"))
                }
            };
            if !note.is_empty() {
                eprintln!("{}[{note}]", if has_begun { "\n" } else { "" });
            }
            match signals::asked().is_some() {
                true => std::ops::ControlFlow::Break(()),
                false => std::ops::ControlFlow::Continue(()),
            }
        });
        printer.end(answered.is_ok() && self.settings.tokens != Some(0))?;
        match answered {
            Ok(report) => self.tell(report),
            Err(Error::EmptyPrompt) => {}
            Err(Error::ContextFull { wanted, .. }) => eprintln!(
                "{} do not fit the context of {context}; say less, or {}",
                counted(wanted, "token"),
                advice(self.conversation.session())
            ),
            Err(error) => eprintln!("{}", sentence(&error)),
        }
        Ok(())
    }

    fn tell(&mut self, report: Report) {
        if report.tokens == 0 && report.finish == Finish::Eos {
            eprintln!("the model ended its text at once, so there is nothing to show");
        }
        let limit = self.settings.tokens.unwrap_or(usize::MAX);
        if report.tokens < limit && report.finish == Finish::Length {
            let session = self.conversation.session();
            eprintln!("cut short: the context of {} is full; {}", counted(session.context(), "token"), advice(session));
        }
        if self.args.verbose {
            eprintln!("{}", figures(&report, self.conversation.session()));
        }
        self.last = Some(report);
    }

    fn obey(&mut self, order: Order) {
        if let Err(error) = self.try_to_obey(order) {
            eprintln!("{}", sentence(error.as_ref()));
        }
    }

    fn try_to_obey(&mut self, order: Order) -> Result<()> {
        let conversation = &mut *self.conversation;
        match order {
            Order::Quit => {}
            Order::Help => eprintln!("{}", super::orders::HELP),
            Order::Clear => {
                conversation.clear();
                self.last = None;
                eprintln!("everything said is forgotten");
            }
            Order::System(None) => match conversation.system() {
                Some(system) => eprintln!("{system}"),
                None => eprintln!("the model is told nothing before the conversation"),
            },
            Order::System(Some(system)) => {
                conversation.set_system(Some(system))?;
                eprintln!("the model will be told so from the next turn on");
            }
            Order::Stats => match &self.last {
                Some(report) => eprintln!("{}", figures(report, conversation.session())),
                None => eprintln!("nothing was answered yet"),
            },
            Order::Save(path) => save_in(&path, conversation, self.args)?,
            Order::Load(path) => load(&path, conversation)?,
            Order::Set(None) => eprintln!("{}", self.settings),
            Order::Set(Some((name, value))) => {
                if self.settings.set(&name, &value)? {
                    conversation.session().set_sampling(self.settings.sampling());
                }
                conversation.session().set_max_tokens(self.settings.tokens);
                conversation.set_when_full(self.settings.when_full.into());
                eprintln!("{}", self.settings);
            }
        }
        Ok(())
    }
}

fn were(count: usize, what: &str) -> String {
    match count {
        1 => format!("the oldest {what} was"),
        _ => format!("the oldest {} were", counted(count, what)),
    }
}
