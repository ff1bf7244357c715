//! What can be asked of the program, not of the model, in a conversation: lines that begin with a slash.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use clap::ValueEnum;
use flashlm::{Sampling, WhenFull};

use crate::commands::values::{non_negative, positive, share};

/// What `/help` says.
pub(super) const HELP: &str = "\
/clear             forget everything said
/system [TEXT]     show or set what the model is told before the conversation
/set [NAME VALUE]  show or set temperature, top-k, top-p, repetition-penalty, seed, tokens, when-full
/stats             what the last turn cost
/save FILE         keep the conversation, with its keys and values
/load FILE         go on with one that was kept
/quit              leave, as Ctrl-D does
//TEXT             text that begins with a slash
Ctrl-C ends an answer, or gives up a line; a second one while an answer is made ends the program. Arrows edit and go back to
earlier lines; what is pasted is one turn, however many lines it has.";

/// Something asked of the program.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Order {
    Help,
    Clear,
    Stats,
    Quit,
    System(Option<String>),
    Save(PathBuf),
    Load(PathBuf),
    Set(Option<(String, String)>),
}

impl Order {
    /// What a line asks for; `None` where it is text for the model.
    pub(super) fn of(line: &str) -> Option<Result<Self>> {
        let order = line.strip_prefix('/').filter(|rest| !rest.starts_with('/'))?;
        // What was pasted is text.
        if line.trim_end().contains('\n') {
            return None;
        }
        let (word, rest) = order.split_once(char::is_whitespace).unwrap_or((order, ""));
        let rest = Some(rest.trim()).filter(|rest| !rest.is_empty());
        let file = || rest.map(PathBuf::from).ok_or_else(|| anyhow!("/{word} needs the name of a file"));
        Some(match word {
            "help" | "?" => Ok(Self::Help),
            "clear" => Ok(Self::Clear),
            "stats" => Ok(Self::Stats),
            "quit" | "exit" | "bye" => Ok(Self::Quit),
            "system" => Ok(Self::System(rest.map(str::to_owned))),
            "save" => file().map(Self::Save),
            "load" => file().map(Self::Load),
            "set" => match rest.map(|rest| rest.split_once(char::is_whitespace)) {
                None => Ok(Self::Set(None)),
                Some(Some((name, value))) => Ok(Self::Set(Some((name.to_owned(), value.trim().to_owned())))),
                Some(None) => Err(anyhow!("/set needs a name and a value, such as /set temperature 0.7")),
            },
            _ => Err(anyhow!("there is no /{word}; /help lists what there is, and // begins text with a slash")),
        })
    }
}

/// What a conversation does where its context is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum WhenFullArg {
    /// Forget the oldest turns
    #[default]
    Shift,
    /// Let the model sum up the oldest turns, which takes a while
    Summarise,
    /// Cut the answer short
    Stop,
}

impl From<WhenFullArg> for WhenFull {
    fn from(arg: WhenFullArg) -> Self {
        match arg {
            WhenFullArg::Shift => Self::Shift,
            WhenFullArg::Summarise => Self::Summarise,
            WhenFullArg::Stop => Self::Stop,
        }
    }
}

/// What can be set while a conversation goes on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) sampling: Sampling,
    /// Whether the seed was given, and not drawn.
    pub(super) has_seed: bool,
    /// Tokens of an answer, at most.
    pub(super) tokens: Option<usize>,
    pub(super) when_full: WhenFullArg,
}

impl Settings {
    /// How tokens are chosen.
    pub(super) fn sampling(&self) -> Sampling {
        self.sampling
    }

    /// Sets one of them; tells whether that changes how tokens are chosen.
    pub(super) fn set(&mut self, name: &str, value: &str) -> Result<bool> {
        let number = |value: &str| value.parse().map_err(|_| anyhow!("give a whole number, such as 40"));
        let in_words = |wrong: String| anyhow!(wrong);
        match name {
            "temperature" => self.sampling.temperature = non_negative(value).map_err(in_words)?,
            "top-k" => self.sampling.top_k = number(value)?,
            "top-p" => self.sampling.top_p = share(value).map_err(in_words)?,
            "repetition-penalty" => self.sampling.repetition_penalty = positive(value).map_err(in_words)?,
            "seed" => {
                self.sampling.seed = value.parse().map_err(|_| anyhow!("give a whole number, such as 7"))?;
                self.has_seed = true;
            }
            "tokens" => {
                self.tokens = if value == "all" { None } else { Some(number(value)?) };
                return Ok(false);
            }
            "when-full" => {
                self.when_full =
                    WhenFullArg::from_str(value, false).map_err(|_| anyhow!("give shift, summarise or stop"))?;
                return Ok(false);
            }
            _ => bail!(
                "there is no {name} to set; there are temperature, top-k, top-p, repetition-penalty, seed, tokens and when-full"
            ),
        }
        if self.sampling.temperature > 0.0 && !self.has_seed {
            self.sampling.seed = super::drawn_seed();
            self.has_seed = true;
        }
        Ok(true)
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Sampling { temperature, top_k, top_p, repetition_penalty, seed } = self.sampling;
        write!(f, "temperature {temperature}, top-k {top_k}, top-p {top_p}, repetition-penalty {repetition_penalty}")?;
        if temperature > 0.0 {
            write!(f, ", seed {seed}")?;
        }
        let when_full = self.when_full.to_possible_value();
        let when_full = when_full.as_ref().map_or("", |value| value.get_name());
        match self.tokens {
            Some(tokens) => write!(f, ", tokens {tokens}, when-full {when_full}"),
            None => write!(f, ", tokens all, when-full {when_full}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_begin_with_a_slash_are_orders() {
        let order = |line: &str| Order::of(line).map(|order| order.map_err(|error| error.to_string()));
        assert_eq!(order("hello"), None);
        assert_eq!(order("//etc"), None, "text with a slash");
        assert_eq!(order("/clear\nand more"), None, "pasted");
        assert_eq!(order("/clear "), Some(Ok(Order::Clear)));
        assert_eq!(order("/system  Be terse. "), Some(Ok(Order::System(Some("Be terse.".into())))));
        assert_eq!(order("/save a b.kv"), Some(Ok(Order::Save("a b.kv".into()))));
        assert_eq!(order("/set top-k 5"), Some(Ok(Order::Set(Some(("top-k".into(), "5".into()))))));
        for (line, says) in
            [("/save", "name of a file"), ("/set top-k", "a name and a value"), ("/etc/passwd", "no /etc/passwd")]
        {
            assert!(order(line).unwrap().unwrap_err().contains(says), "{line}");
        }
    }

    #[test]
    fn settings_are_checked() {
        let when_full = WhenFullArg::Shift;
        let mut settings = Settings { sampling: Sampling::default(), has_seed: false, tokens: None, when_full };
        for (name, value) in [
            ("temperature", "-1"),
            ("top-p", "2"),
            ("seed", "x"),
            ("tokens", "many"),
            ("colour", "red"),
            ("when-full", "x"),
        ] {
            assert!(settings.set(name, value).is_err(), "{name}");
        }
        assert!(settings.set("temperature", "0.7").unwrap() && settings.has_seed, "a seed is drawn");
        assert!(!settings.set("tokens", "40").unwrap());
        assert!(!settings.set("when-full", "stop").unwrap());
        assert!(
            settings.to_string().contains("temperature 0.7")
                && settings.to_string().ends_with("tokens 40, when-full stop")
        );
    }
}
