//! Rules about the project itself: who imports whom, where `unsafe` stands, what the README promises.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use flashlm_formats::checkpoint::FAMILY_INFOS;
use flashlm_tests::imports::Imports;
use flashlm_tests::root;

/// Crates that `name` links on this machine, near and far, or those it names itself.
fn dependencies(name: &str, only_own: bool) -> BTreeSet<String> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into()));
    cargo.current_dir(root()).args(["tree", "--locked", "--offline", "--edges", "normal", "--prefix", "none"]);
    cargo.args(["--format", "{p}", "--package", name, "--depth", if only_own { "1" } else { "1000" }]);
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    let names = lines.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    names.map(str::to_owned).collect()
}

#[test]
fn crates_import_downwards_only() {
    for (name, may_import) in [
        ("flashlm-kernels", &[][..]),
        ("flashlm-io", &[]),
        ("flashlm-formats", &[]),
        ("flashlm", &["flashlm-kernels", "flashlm-io", "flashlm-formats"]),
        ("flashlm-prep", &["flashlm", "flashlm-kernels", "flashlm-io", "flashlm-formats"]),
    ] {
        let mut own = dependencies(name, true);
        own.retain(|d| d.starts_with("flashlm"));
        assert!(own.iter().all(|d| may_import.contains(&d.as_str())), "{name} imports {own:?}");
    }
    let runtime = dependencies("flashlm", false);
    for heavy in
        ["linfa", "linfa-reduction", "ndarray", "plotters", "gemm", "zip", "memmap2", "ureq", "rustls", "hf-hub"]
    {
        assert!(!runtime.contains(heavy), "the runtime links {heavy}");
    }
    assert!(runtime.contains("tokenizers"), "the tree was walked");
    // The line editor is the command's.
    assert!(runtime.contains("rustyline") && !dependencies("flashlm-prep", false).contains("rustyline"));
    assert!(dependencies("flashlm-prep", false).contains("linfa"), "the tree was walked");
}

/// Circles among modules that are side by side.
#[test]
fn modules_import_each_other_in_no_circle() {
    let mut circles = Vec::new();
    for (src, name) in [
        ("runtime/kernels/src", "flashlm_kernels"),
        ("runtime/flashio/src", "flashlm_io"),
        ("formats/src", "flashlm_formats"),
        ("runtime/src", "flashlm"),
        ("prep/src", "flashlm_prep"),
    ] {
        let imports = Imports::read(&root().join(src), name);
        assert!(imports.all().len() > 10, "{name} was read");
        circles.extend(imports.circles());
    }
    assert!(circles.is_empty(), "move what is shared to a module that both may import:\n{}", circles.join("\n"));
}

/// The floors of the runtime, from the ground up: a module imports from its own floor and from those below.
#[test]
fn the_runtime_imports_downwards_only() {
    const FLOORS: &[&[&str]] = &[
        &[
            "budget",
            "buffers",
            "chat",
            "command_line",
            "console",
            "disk_cost",
            "error",
            "guard",
            "memory",
            "sampler",
            "signals",
            "tensors",
            "terminal",
            "text",
            "threads",
            "tokenizer_limits",
        ],
        &["cache", "planner", "replay", "reuse"],
        &["neurons"],
        &["forward"],
        &["engine"],
        &["speculate"],
        &["options", "tables"],
        &["plan"],
        &["load"],
        &["generate", "session"],
        &["commands"],
    ];
    let floor = |module: &[String]| {
        let floor = FLOORS.iter().position(|floor| floor.contains(&module[0].as_str()));
        floor.unwrap_or_else(|| panic!("{} stands on no floor", module[0]))
    };
    let imports = Imports::read(&root().join("runtime/src"), "flashlm").all();
    let inside = imports.iter().filter(|(user, of)| !user.is_empty() && !of.is_empty());
    let mut upwards = inside.clone().filter(|(user, of)| floor(user) < floor(of)).peekable();
    assert!(upwards.peek().is_none(), "{:?}", upwards.collect::<Vec<_>>());
    assert!(inside.count() > 200, "the runtime was read");
}

fn rust_files(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn unsafe_code_stands_in_its_few_places() {
    let mut files = Vec::new();
    for dir in ["formats/src", "runtime/src", "prep/src", "tests/src"] {
        rust_files(&root().join(dir), &mut files);
    }
    assert!(files.len() > 40);
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let is_used =
            ["unsafe {", "unsafe fn", "unsafe impl", "allow(unsafe_code"].iter().any(|word| text.contains(word));
        assert!(!is_used || file.ends_with("formats/src/mapping.rs"), "unsafe in {}", file.display());
    }
}

/// The README's table is what `flashlm-prep families` says.
#[test]
fn the_readme_lists_the_families() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let mut lines = readme.lines().skip_while(|line| !line.starts_with("| family |")).skip(1);
    assert!(lines.next().is_some_and(|line| line.starts_with("|---")), "the README has no table of families");
    let listed: Vec<&str> = lines.take_while(|line| line.starts_with('|')).collect();
    let rows = FAMILY_INFOS.iter().map(|info| {
        let (types, count) = (info.model_types.join(", "), info.references);
        format!(
            "| {} | {types} | {} | {} | {} ({count} configurations) |",
            info.name, info.checkpoints, info.covers, info.verified
        )
    });
    assert_eq!(listed, rows.collect::<Vec<_>>());
}

#[test]
fn the_readme_begins_with_two_commands() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let commands: Vec<&str> = readme.lines().filter_map(|line| line.strip_prefix("    $ ")).collect();
    let [first, second, ..] = &commands[..] else { panic!("{commands:?}") };
    for word in ["cargo build", "flashlm-prep", "flashlm run"] {
        assert!(first.contains(word), "no {word} in {first}");
    }
    assert!(second.starts_with("cargo test"), "{second}");
    assert!(root().join(".ci/run").is_file());
}

/// Preparing is a library: its command parses and prints, and nothing else knows of the command line.
#[test]
fn only_the_commands_of_prep_know_the_command_line() {
    let mut files = Vec::new();
    rust_files(&root().join("prep/src"), &mut files);
    let (commands, library): (Vec<_>, Vec<_>) = files
        .into_iter()
        .partition(|file| file.ends_with("prep/src/main.rs") || file.starts_with(root().join("prep/src/commands")));
    assert!(library.len() > 60 && commands.len() > 15, "{} and {}", library.len(), commands.len());
    for word in ["clap", "indicatif", "anyhow", "commands::", "println!"] {
        // Programs in documentation may print.
        let says = |file: &&PathBuf| {
            let text = fs::read_to_string(file).unwrap();
            text.lines().any(|line| !line.trim_start().starts_with("//") && line.contains(word))
        };
        assert!(commands.iter().any(|file| says(&file)), "no command has {word:?}");
        assert_eq!(library.iter().find(says), None, "{word:?} in the library");
    }
}
