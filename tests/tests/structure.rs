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
            "kept",
            "error",
            "guard",
            "manual",
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

#[test]
fn pages_ask_for_the_rust_that_cargo_asks_for() {
    let read = |name: &str| fs::read_to_string(root().join(name)).unwrap();
    let manifest = read("Cargo.toml");
    let value =
        |key: &str| manifest.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(" = ")).unwrap().trim_matches('"');
    let (rust, version) = (value("rust-version"), value("version"));
    for page in ["README.md", "docs/install.md"] {
        assert!(read(page).contains(&format!("{rust} or newer")), "{page}: {rust}");
    }
    assert!(read("docs/install.md").contains(&format!("flashlm-{version}-x86_64")), "{version}");
}

/// The table in the docs is what `flashlm-prep families` says.
#[test]
fn the_docs_list_the_families() {
    let table = fs::read_to_string(root().join("docs/families.md")).unwrap();
    let mut lines = table.lines().skip_while(|line| !line.starts_with("| family |")).skip(1);
    assert!(lines.next().is_some_and(|line| line.starts_with("|---")), "there is no table of families");
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

/// Lines of the README's blocks of commands.
fn pasted(readme: &str) -> Vec<&str> {
    let mut is_inside = false;
    let inside = |line: &&str| {
        if line.starts_with("```") {
            is_inside = *line == "```sh";
            return false;
        }
        is_inside
    };
    readme.lines().filter(inside).collect()
}

#[test]
fn the_readme_begins_with_two_commands_and_all_can_be_pasted() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let commands = pasted(&readme);
    let [first, second, ..] = &commands[..] else { panic!("{commands:?}") };
    assert!(first.starts_with("cargo run") && first.contains("first_story"), "{first}");
    assert!(second.starts_with("cargo test"), "{second}");
    assert!(root().join(".ci/run").is_file());
    for command in &commands {
        assert!(!command.starts_with("$ ") && command.len() <= 80, "{command}");
    }
    // What is named there exists.
    let prep = flashlm::command_line::FLASHLM_PREP.commands;
    let runtime = flashlm::command_line::FLASHLM.commands;
    let words = commands.iter().filter_map(|command| command.strip_prefix("flashlm ")?.split(' ').next());
    let unknown: Vec<&str> = words.filter(|word| !prep.contains(word) && !runtime.contains(word)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

/// What the README says in figures is what was measured.
#[test]
fn the_readmes_headline_is_what_its_link_shows() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let kept = fs::read_to_string(root().join("docs/measurements/side-by-side.json")).unwrap();
    let kept: serde_json::Value = serde_json::from_str(&kept).unwrap();
    let rows = kept["rows"].as_array().unwrap();
    let ms = |system: &str, weights: &str, memory: f64| {
        let row = rows.iter().find(|r| r["system"] == system && r["weights"] == weights && r["memory_gb"] == memory);
        row.unwrap_or_else(|| panic!("{system} {weights}"))["ms"].as_f64().unwrap()
    };
    let seconds = |ms: f64| format!("{:.2} s", ms / 1e3);
    let (f16, int8) = (ms("flashlm", "f16", 6.66), ms("flashlm", "f16 neurons, int8 attention", 6.66));
    let paged = ms("llama.cpp", "f16, paged by the system", 6.9);
    assert!(readme.contains(&format!("a token takes {}", seconds(f16))), "{f16}");
    assert!(readme.contains(&format!("8 bits it takes {}", seconds(int8))), "{int8}");
    assert!(readme.contains(&format!("for {:.1} s", paged / 1e3)), "{paged}");
    let rate = |ms: f64| if ms > 100.0 { format!("{:.1}", 1e3 / ms) } else { format!("{:.0}", 1e3 / ms) };
    for (memory, ms) in
        [("2.0 GB", ms("flashlm", "int4", 2.0)), ("3.3 GB", ms("flashlm", "int4", 3.3)), ("6.7 GB", f16)]
    {
        let row = readme.lines().filter(|line| line.starts_with(&format!("| {memory} |")));
        assert!(row.clone().any(|line| line.contains(&format!("| {} |", rate(ms)))), "{memory}: {}", rate(ms));
    }
}

/// Links in the documents lead somewhere.
#[test]
fn links_lead_to_files() {
    let mut documents: Vec<PathBuf> = vec!["README.md".into(), "ARCHITECTURE.md".into(), "CONTRIBUTING.md".into()];
    for dir in ["docs", "docs/measurements"] {
        let files = fs::read_dir(root().join(dir)).unwrap().map(|entry| entry.unwrap().path());
        documents.extend(files.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
    }
    for document in documents {
        let document = root().join(document);
        let text = fs::read_to_string(&document).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            let is_elsewhere = link.is_empty() || link.contains("://");
            let target = document.parent().unwrap().join(link);
            assert!(is_elsewhere || target.exists(), "{}: {link}", document.display());
        }
    }
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
