//! What both programs do with their command lines before and after `clap`: numbers that look like options, messages that say what is
//! expected, and the other program's command where it is obviously meant.

use std::ffi::OsString;
use std::num::{IntErrorKind, NonZeroUsize, ParseFloatError, ParseIntError};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory, FromArgMatches};

use crate::console;

/// For the end of each program's help.
pub const EXIT_CODES: &str =
    "Exit codes: 0 success, 1 failure, 2 invalid command line; 130, 143 and 129 if ended by Ctrl-C, SIGTERM or SIGHUP.";

/// The program beside this one.
pub struct Other {
    /// Its name.
    pub name: &'static str,
    /// Its commands.
    pub commands: &'static [&'static str],
}

/// The commands of `flashlm`.
pub const FLASHLM: Other = Other { name: "flashlm", commands: &["run", "logits", "plan", "doctor", "bench", "disk"] };

/// The commands of `flashlm-prep`.
pub const FLASHLM_PREP: Other = Other {
    name: "flashlm-prep",
    commands: &[
        "prepare",
        "assess",
        "convert",
        "inspect",
        "families",
        "verify",
        "pack",
        "evaluate",
        "thresholds",
        "record",
        "analyze",
        "order",
        "train",
        "import-order",
        "import-predictors",
        "synthesize",
        "replay",
        "report",
    ],
};

/// Becomes the other program where its command was typed: `flashlm prepare ..` is `flashlm-prep prepare ..`, `flashlm help prepare`
/// its help. Returns where there is nothing to hand over.
///
/// # Errors
/// The exit code, where the other program cannot be run; what to do is said.
pub fn hand_over(other: &Other) -> Result<(), ExitCode> {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let word = |at: usize| arguments.get(at).and_then(|argument: &OsString| argument.to_str());
    let command = if word(0) == Some("help") { word(1) } else { word(0) };
    let Some(command) = command.filter(|command| other.commands.contains(command)) else { return Ok(()) };
    let error = std::process::Command::new(program(other)).args(&arguments).exec();
    console::note_line(format_args!(
        "flashlm: `{command}` is done by {}, which cannot be run: {error}; install it beside this program, or where PATH names it",
        other.name
    ));
    Err(ExitCode::FAILURE)
}

/// Where the other program is: beside this one, else wherever PATH has it.
pub fn program(other: &Other) -> PathBuf {
    let beside = std::env::current_exe().ok().map(|this| this.with_file_name(other.name));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| other.name.into())
}

/// The program's arguments; or, where there is nothing to do but to say something, the exit code after that.
///
/// # Errors
/// The exit code.
pub fn parse<C: CommandFactory + FromArgMatches>(other: &Other) -> Result<C, ExitCode> {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let mut command = accepting_negative_numbers(C::command());
    let matches = command.try_get_matches_from_mut(&arguments);
    matches.and_then(|mut matches| C::from_arg_matches_mut(&mut matches)).map_err(|error| {
        let error = explained(error, &mut command, &arguments, other);
        let code = ExitCode::from(error.exit_code() as u8);
        // Colours are the terminal's, but what was typed may have come from a file's name.
        let is_plain = arguments.iter().all(|argument| !argument.to_string_lossy().contains(char::is_control));
        if is_plain {
            _ = error.print();
        } else {
            console::note(format_args!("{}", error.render()));
        }
        code
    })
}

/// A number with a minus is a value, for its option to refuse, and no unknown option.
fn accepting_negative_numbers(command: Command) -> Command {
    let takes_value = |arg: &clap::Arg| !arg.is_positional() && arg.get_action().takes_values();
    let command = command.mut_args(|arg| if takes_value(&arg) { arg.allow_negative_numbers(true) } else { arg });
    command.mut_subcommands(accepting_negative_numbers)
}

/// The error in words that help more, where there are any.
fn explained(error: clap::Error, command: &mut Command, arguments: &[OsString], other: &Other) -> clap::Error {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    match error.kind() {
        ErrorKind::InvalidSubcommand => {
            let Some(word) = text(ContextKind::InvalidSubcommand) else { return error };
            let advice = if other.commands.contains(&word.as_str()) {
                let rest = arguments.iter().skip(1).map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" ");
                format!("`{word}` is a command of {}: {} {rest}", other.name, other.name)
            } else if word.ends_with(".flashlm") || std::path::Path::new(&word).exists() {
                format!("`{word}` is no command; to run a bundle: flashlm run {word}")
            } else {
                return error;
            };
            command.error(ErrorKind::InvalidSubcommand, advice)
        }
        ErrorKind::ValueValidation => {
            let reason = std::error::Error::source(&error).and_then(|source| {
                let whole = source.downcast_ref::<ParseIntError>().map(|e| of_whole_number(e.kind()));
                whole.or_else(|| source.is::<ParseFloatError>().then_some("expected a number, such as 0.5"))
            });
            let (Some(reason), Some(value)) = (reason, text(ContextKind::InvalidValue)) else { return error };
            let argument = text(ContextKind::InvalidArg).unwrap_or_default();
            let reason = if value.starts_with('-') { "it cannot be below zero" } else { reason };
            let message = format!("invalid value '{value}' for '{argument}': {reason}");
            used_command(command, arguments).error(ErrorKind::ValueValidation, message)
        }
        _ => error,
    }
}

/// The subcommand that the arguments name, for its usage line.
fn used_command<'a>(command: &'a mut Command, arguments: &[OsString]) -> &'a mut Command {
    let name = arguments.get(1).and_then(|name| name.to_str()).unwrap_or_default();
    if command.find_subcommand(name).is_none() {
        return command;
    }
    command.find_subcommand_mut(name).expect("it was found a line above")
}

fn of_whole_number(kind: &IntErrorKind) -> &'static str {
    match kind {
        IntErrorKind::Zero => "it must be at least 1",
        IntErrorKind::PosOverflow => "it is larger than any number that can be meant",
        IntErrorKind::NegOverflow => "it cannot be below zero",
        _ => "expected an integer, such as 20",
    }
}

/// Threads for each processor that may be asked for, and how many always may be.
const THREADS_PER_PROCESSOR: usize = 4;
const THREADS_MAX_LEAST: usize = 64;

/// Reads a number of threads that this machine can be asked for.
///
/// # Errors
/// A sentence for the command line.
pub fn thread_count(text: &str) -> Result<NonZeroUsize, String> {
    let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let most = (THREADS_PER_PROCESSOR * processors).max(THREADS_MAX_LEAST);
    let wrong = |what: &str| {
        format!("{what}; this machine has {processors} processors, and one thread for each is most useful")
    };
    match text.parse::<NonZeroUsize>() {
        Ok(count) if count.get() <= most => Ok(count),
        Ok(_) => Err(wrong(&format!("it must be at most {most}"))),
        Err(error) => Err(wrong(of_whole_number(error.kind()))),
    }
}

#[cfg(test)]
mod tests {
    use clap::{Parser, Subcommand};

    use super::*;

    #[derive(Debug, Parser)]
    #[command(name = "flashlm-prep")]
    struct Cli {
        #[command(subcommand)]
        command: Sub,
    }

    #[derive(Debug, Subcommand)]
    enum Sub {
        Order {
            #[arg(long, value_name = "N")]
            tokens: Option<usize>,
            #[arg(long, value_name = "SHARE")]
            share: Option<f64>,
            #[arg(long, value_parser = thread_count)]
            threads: Option<NonZeroUsize>,
        },
    }

    fn said(arguments: &[&str]) -> String {
        let arguments: Vec<OsString> = ["flashlm-prep"].iter().chain(arguments).map(OsString::from).collect();
        let mut command = accepting_negative_numbers(Cli::command());
        let matches = command.try_get_matches_from_mut(&arguments);
        let error = matches.and_then(|mut m| Cli::from_arg_matches_mut(&mut m)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        explained(error, &mut command, &arguments, &FLASHLM).render().to_string()
    }

    #[test]
    fn numbers_that_cannot_be_meant_are_told_in_words() {
        for (arguments, words) in [
            (&["order", "--tokens", "-5"][..], "'-5' for '--tokens <N>': it cannot be below zero"),
            (&["order", "--tokens", "five"], "expected an integer"),
            (&["order", "--tokens", "99999999999999999999999"], "larger than any number"),
            (&["order", "--share", "half"], "expected a number, such as 0.5"),
            (&["order", "--threads", "0"], "it must be at least 1; this machine has"),
            (&["order", "--threads", "-1"], "expected an integer"),
            (&["order", "--threads", "100000"], "it must be at most"),
        ] {
            let said = said(arguments);
            assert!(said.contains(words) && said.contains("--help"), "{arguments:?}: {said}");
        }
        let arguments = ["flashlm-prep", "order", "--share", "-0.5"];
        let matches = accepting_negative_numbers(Cli::command()).try_get_matches_from(arguments).unwrap();
        assert!(matches!(Cli::from_arg_matches(&matches).unwrap().command, Sub::Order { share: Some(-0.5), .. }));
    }

    #[test]
    fn the_other_programs_command_is_named() {
        assert!(said(&["run", "m.flashlm", "-n", "3"]).contains("flashlm run m.flashlm -n 3"));
        assert!(said(&["m.flashlm"]).contains("flashlm run m.flashlm"));
        assert!(said(&["frobnicate"]).contains("unrecognized subcommand"));
    }
}
