//! Manual pages, one for a program and one for each of its commands, made from what `clap` knows of them.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};
use flashlm_formats::destination::{Destination, DestinationError, FileKind, MANUAL_MARK};

use crate::command_line::{EXIT_CODES, Other};

/// Writes the pages of a program into a directory, in place of those of an earlier version. Returns how many.
///
/// # Errors
/// What prevents writing one of them.
pub fn write(program: Command, other: &Other, dir: &Path) -> Result<usize, DestinationError> {
    fs::create_dir_all(dir).map_err(|source| DestinationError::Io { path: dir.to_owned(), source })?;
    let pages = pages(program, other);
    let places = pages.iter().map(|(name, _)| Destination::take(&dir.join(name), FileKind::Manual, &[]));
    let places: Vec<Destination> = places.collect::<Result<_, _>>()?;
    for (place, (_, page)) in places.into_iter().zip(&pages) {
        place.publish_bytes(page.as_bytes())?;
    }
    Ok(pages.len())
}

/// The pages, each with the name of its file.
fn pages(program: Command, other: &Other) -> Vec<(PathBuf, String)> {
    let mut program = program.disable_help_subcommand(true);
    program.build();
    let name = program.get_name().to_owned();
    let version = format!("{name} {}", program.get_version().unwrap_or_default());
    let commands: Vec<Command> = program.get_subcommands().filter(|command| !command.is_hide_set()).cloned().collect();
    let of_commands = commands.into_iter().map(|command| page(command, &version, &[&name]));
    let first = [page(program.clone(), &version, &[other.name])];
    first.into_iter().chain(of_commands).collect()
}

/// The page of one command, which refers to others.
fn page(mut command: Command, version: &str, others: &[&str]) -> (PathBuf, String) {
    let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let title = command.get_display_name().unwrap_or(command.get_name()).to_uppercase();
    // Help's line: options in detail have a section of their own.
    let usage = command.render_usage().to_string().trim_start_matches("Usage:").trim().to_owned();
    let man = Man::new(command.override_usage(usage).after_help(None));
    // A date that is empty would be left out, and what stands behind it taken for the date.
    let man = man.title(title).date(" ").source(version).manual("flashlm manual");
    let mut page = format!("{MANUAL_MARK}\n").into_bytes();
    man.render(&mut page).expect("memory can be written to");
    let mut page = String::from_utf8(page).expect("help is text");
    page += &after_options(&after, others).to_roff();
    (man.get_filename().into(), page)
}

/// What help says behind the options: examples stay as they are, sentences become paragraphs.
fn after_options(help: &str, others: &[&str]) -> Roff {
    let mut roff = Roff::new();
    let blocks = help.split("\n\n").filter(|block| !block.trim().is_empty());
    let (examples, notes): (Vec<&str>, Vec<&str>) = blocks.partition(|block| block.starts_with("Example"));
    for block in notes {
        roff.control("SH", [if block == EXIT_CODES { "EXIT STATUS" } else { "NOTES" }]);
        for (nth, line) in block.lines().enumerate() {
            if nth > 0 {
                roff.control("PP", []);
            }
            roff.text([roman(line.trim())]);
        }
    }
    for block in examples {
        roff.control("SH", ["EXAMPLES"]);
        roff.control("nf", []);
        for line in block.lines().filter(|line| !["Example:", "Examples:"].contains(line)) {
            roff.text([roman(line.trim())]);
        }
        roff.control("fi", []);
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman(others.iter().map(|name| format!("{name}(1)")).collect::<Vec<_>>().join(", "))]);
    roff
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command_line::FLASHLM_PREP;
    use clap::Arg;

    fn program() -> Command {
        let run = Command::new("run")
            .about("Generate text")
            .arg(Arg::new("memory").long("memory").help("How much"))
            .after_help("Examples:\n  flashlm run a -n 3\n  'quoted' .dotted\n\nOne thing.\nAnother thing.");
        let hidden = Command::new("bench-step").hide(true);
        Command::new("flashlm").version("1.2.3").after_help(EXIT_CODES).subcommands([run, hidden])
    }

    #[test]
    fn each_command_that_help_lists_has_a_page() {
        let pages = pages(program(), &FLASHLM_PREP);
        let names: Vec<&str> = pages.iter().map(|(name, _)| name.to_str().unwrap()).collect();
        assert_eq!(names, ["flashlm.1", "flashlm-run.1"]);
        assert!(pages[0].1.contains("flashlm\\-run(1)") && pages[0].1.contains("flashlm\\-prep(1)"), "{}", pages[0].1);
        assert!(pages[0].1.contains("EXIT STATUS") && pages[0].1.contains("SIGTERM"), "{}", pages[0].1);
        let run = &pages[1].1;
        assert!(run.starts_with(MANUAL_MARK) && run.contains(".TH FLASHLM-RUN 1 \" \" \"flashlm 1.2.3\" \""), "{run}");
        assert!(run.contains(".SH SYNOPSIS\n\\fBflashlm run\\fR [OPTIONS]\n"), "{run}");
        for part in
            ["\\-\\-memory", "\n.nf\nflashlm run a \\-n 3\n\\&'quoted' .dotted\n.fi", "One thing.\n.PP\nAnother"]
        {
            assert!(run.contains(part), "{part} in {run}");
        }
        assert!(!run.contains("EXTRA") && !run.contains("Examples:"), "{run}");
    }

    #[test]
    fn pages_replace_pages_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("made/for/them");
        for _ in 0..2 {
            assert_eq!(write(program(), &FLASHLM_PREP, &dir).unwrap(), 2);
        }
        fs::write(dir.join("flashlm.1"), MANUAL_MARK).unwrap();
        fs::write(dir.join("flashlm-run.1"), ".TH mine").unwrap();
        let error = write(program(), &FLASHLM_PREP, &dir).unwrap_err();
        assert!(
            matches!(&error, DestinationError::Stranger { path, .. } if path.ends_with("flashlm-run.1")),
            "{error}"
        );
        assert_eq!(fs::read_to_string(dir.join("flashlm-run.1")).unwrap(), ".TH mine");
        assert_eq!(
            fs::read_to_string(dir.join("flashlm.1")).unwrap(),
            MANUAL_MARK,
            "refused before anything is written"
        );
    }
}
