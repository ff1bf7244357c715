//! A chat template, and what it makes of messages.

use std::borrow::Cow;
use std::time::SystemTime;

use flashlm_formats::chat::Chat;
use jiff::tz::TimeZone;
use minijinja::value::{Value, ValueKind};
use minijinja::{Environment, ErrorKind};

use super::marks::Marks;
use super::{clock, python};
use crate::error::{Result, RuntimeError};
use crate::guard::guarded;
use crate::text::Tokenizer;

/// Fuel of any rendering: so many instructions, or 64 times as many bytes.
const FUEL: u64 = 1_000_000;
/// Fuel for each message, and for each byte of them.
const FUEL_OF_A_MESSAGE: u64 = 2_000;
const FUEL_OF_A_BYTE: u64 = 16;

/// The name of the template within its environment.
const NAME: &str = "chat template";

/// A message of a conversation: who says what, and whatever else a template may look at.
#[derive(Clone, Debug, PartialEq)]
pub struct Message(Value);

impl Message {
    /// What somebody says.
    pub fn new(role: &str, content: &str) -> Self {
        Self(Value::from_pairs([("role", Value::from(role)), ("content", Value::from(content))]))
    }

    /// What the model is told before the conversation.
    pub fn system(content: &str) -> Self {
        Self::new("system", content)
    }

    /// What the user says.
    pub fn user(content: &str) -> Self {
        Self::new("user", content)
    }

    /// What the model says.
    pub fn assistant(content: &str) -> Self {
        Self::new("assistant", content)
    }

    /// Messages as chat clients write them: a JSON array of objects. What is null is left out, as in transformers.
    ///
    /// # Errors
    /// `Chat`, with what is wrong with it.
    pub fn list_from_json(json: &str) -> Result<Vec<Self>> {
        let all: Vec<Value> = serde_json::from_str(json).map_err(|e| RuntimeError::Chat(e.to_string()))?;
        all.into_iter()
            .map(|message| {
                if message.kind() != ValueKind::Map {
                    return Err(RuntimeError::Chat("a message is no JSON object".into()));
                }
                let keys: Vec<Value> = message.try_iter().map_err(broken)?.collect();
                let pairs = keys.into_iter().filter_map(|key| {
                    let value = message.get_item(&key).ok()?;
                    (!value.is_none()).then_some((key, value))
                });
                Ok(Self(Value::from_pairs(pairs)))
            })
            .collect()
    }

    /// Who says it.
    pub fn role(&self) -> Option<String> {
        self.text("role")
    }

    /// What is said, where it is text.
    pub fn content(&self) -> Option<String> {
        self.text("content")
    }

    fn text(&self, key: &str) -> Option<String> {
        self.0.get_attr(key).ok()?.as_str().map(str::to_owned)
    }
}

/// Tools that a model may call, as a template sees them.
#[derive(Clone, Debug)]
pub struct Tools(Value);

impl Tools {
    /// From a JSON array.
    ///
    /// # Errors
    /// `Chat`, with what is wrong with it.
    pub fn from_json(json: &str) -> Result<Self> {
        let all: Vec<Value> = serde_json::from_str(json).map_err(|e| RuntimeError::Chat(e.to_string()))?;
        Ok(Self(Value::from(all)))
    }
}

/// What a template made of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    text: String,
    /// Stands where somebody spelled a special token, so that it is none.
    mark: Option<char>,
}

impl Rendered {
    /// The text, as transformers renders it.
    pub fn text(&self) -> Cow<'_, str> {
        match self.mark {
            Some(mark) => Cow::Owned(self.text.replace(mark, "")),
            None => Cow::Borrowed(&self.text),
        }
    }

    /// What follows `begin`, if the text begins so.
    pub fn after(&self, begin: &str) -> Option<Self> {
        let mut rest = self.text.as_str();
        for expected in begin.chars() {
            rest = self.mark.map_or(rest, |mark| rest.trim_start_matches(mark));
            rest = rest.strip_prefix(expected)?;
        }
        Some(Self { text: rest.to_owned(), mark: self.mark })
    }

    /// Whether it begins with a special token, so that what comes before has no part in its ids.
    pub fn begins_anew(&self, tokenizer: &Tokenizer) -> bool {
        tokenizer.begins_with_special(&self.text)
    }

    /// Its token ids: special tokens are those of the template alone.
    ///
    /// # Errors
    /// `Tokenizer`.
    pub fn ids(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        match self.mark {
            Some(mark) => tokenizer.encode_marked(&self.text, mark),
            None => tokenizer.encode_bare(&self.text),
        }
    }
}

/// A template that is ready to be used.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Special tokens, by the names that the template knows.
    specials: Vec<(String, String)>,
    marks: Marks,
    /// The token that ends what somebody says, where it is known.
    ends: Vec<u32>,
    knows_system: bool,
}

impl ChatTemplate {
    /// The template that `chat` has for conversations, with tools or without; `None` if it has none.
    ///
    /// # Errors
    /// `ChatTemplate`, with what is wrong with it.
    pub fn of(chat: &Chat, tools: bool, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let specials = chat.special_tokens.iter().map(|(name, token)| (name.clone(), token.clone())).collect();
        chat.template(tools).map(|source| Self::new(source, specials, tokenizer)).transpose()
    }

    /// A template from its text, with the texts of special tokens such as `bos_token`.
    ///
    /// # Errors
    /// `ChatTemplate`, with what is wrong with it.
    pub fn new(source: &str, specials: Vec<(String, String)>, tokenizer: &Tokenizer) -> Result<Self> {
        let mut environment = python::environment();
        let source_of_engine = python::without_generation_tags(source);
        guarded(|| environment.add_template_owned(NAME, source_of_engine))
            .map_err(RuntimeError::ChatTemplate)?
            .map_err(|error| RuntimeError::ChatTemplate(sentence(&error)))?;
        let eos = specials.iter().find(|(name, _)| name == "eos_token");
        let ends = eos.and_then(|(_, token)| tokenizer.id_of(token)).into_iter().collect();
        let mut template =
            Self { environment, specials, marks: Marks::new(source, tokenizer), ends, knows_system: true };
        template.knows_system = template.writes_system_messages(tokenizer);
        Ok(template)
    }

    /// Whether what a system message says is written, or else the template cannot be used with a plain message either.
    fn writes_system_messages(&self, tokenizer: &Tokenizer) -> bool {
        const TOLD: &str = "Spx7kq";
        let written = |messages: &[Message]| self.render(tokenizer, messages, None, true);
        let user = Message::user("a");
        let with = written(&[Message::system(TOLD), user.clone()]);
        with.is_ok_and(|written| written.text.contains(TOLD)) || written(&[user]).is_err()
    }

    /// Whether the template knows system messages. Where it does not, [`opening`](Self::opening) puts what they would say in front of
    /// what the user says first.
    pub fn knows_system(&self) -> bool {
        self.knows_system
    }

    /// The messages that begin a conversation: what the model is told before, if anything, and what the user says.
    pub fn opening(&self, system: Option<&str>, user: &str) -> Vec<Message> {
        match system {
            None => vec![Message::user(user)],
            Some(system) if self.knows_system => vec![Message::system(system), Message::user(user)],
            Some(system) => vec![Message::user(&format!("{system}\n\n{user}"))],
        }
    }

    /// Ids with which the model ends what it says, besides those of the model itself.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// The text of a conversation; with `answers`, up to where the model's next answer begins.
    ///
    /// # Errors
    /// `Chat`, with what the template has against it, or where it takes more than a conversation of this length may.
    pub fn render(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        tools: Option<&Tools>,
        answers: bool,
    ) -> Result<Rendered> {
        self.render_at(tokenizer, messages, tools, answers, SystemTime::now())
    }

    /// The same at a given time, which some templates tell the model.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_at(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        tools: Option<&Tools>,
        answers: bool,
        now: SystemTime,
    ) -> Result<Rendered> {
        let messages: Vec<Value> = messages.iter().map(|message| message.0.clone()).collect();
        let tools = tools.map_or(Value::from(()), |tools| tools.0.clone());
        let inputs = Value::from(vec![Value::from(messages.clone()), tools]);
        let marked = self.marks.marked(&inputs, tokenizer)?;
        let of_inputs = |at: usize| marked.value.get_item_by_index(at).map_err(broken);
        let context = [
            ("messages", of_inputs(0)?),
            ("tools", of_inputs(1)?),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(answers)),
            (
                "strftime_now",
                Value::from_function(move |format: &str| clock::formatted(now, TimeZone::system(), format)),
            ),
        ];
        let context = context.into_iter().map(|(name, value)| (name.to_owned(), value));
        let specials = self.specials.iter().map(|(name, token)| (name.clone(), Value::from(token.as_str())));
        let context = Value::from_pairs(specials.chain(context));
        let mut environment = self.environment.clone();
        let of_messages = FUEL_OF_A_MESSAGE.saturating_mul(messages.len() as u64);
        environment.set_fuel(Some(FUEL + of_messages + FUEL_OF_A_BYTE.saturating_mul(marked.bytes as u64)));
        let text = guarded(|| environment.get_template(NAME)?.render(context)).map_err(RuntimeError::Chat)?;
        let text = text.map_err(|error| match error.kind() {
            ErrorKind::OutOfFuel => {
                RuntimeError::Chat("it takes more time or memory than a conversation of this length may".into())
            }
            _ => broken(error),
        })?;
        Ok(Rendered { text, mark: marked.mark })
    }
}

fn broken(error: minijinja::Error) -> RuntimeError {
    RuntimeError::Chat(sentence(&error))
}

/// An error of the template engine in one line: the template's own words where it raised it.
fn sentence(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match (python::is_raised(error), error.line()) {
        (false, Some(line)) => format!("{what} (line {line})"),
        _ => what,
    }
}
