//! Attack 70: what comes with the dependencies. `deny.toml` says the same to cargo-deny, which also knows advisories.

use std::collections::BTreeSet;
use std::process::Command;

use flashlm_tests::root;
use serde_json::Value;

/// The strings of a list in `deny.toml`.
fn list(text: &str, key: &str) -> BTreeSet<String> {
    let rest = text.split(&format!("\n{key} = [")).nth(1).unwrap_or_else(|| panic!("no {key} in deny.toml"));
    let items = rest.split(']').next().unwrap().split('"').skip(1).step_by(2);
    items.map(str::to_owned).collect()
}

/// Whether an SPDX expression can be satisfied by what is allowed.
fn is_allowed(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let expression = expression.replace('/', " OR ").replace(['(', ')'], " ");
    // Precise enough for what is there: every part of an AND has to be allowed, one of an OR.
    expression.split(" AND ").all(|all| all.split(" OR ").any(|one| allowed.contains(one.trim())))
}

#[test]
fn a70_licences_and_sources() {
    let deny = std::fs::read_to_string(root().join("deny.toml")).unwrap();
    let (allowed, banned) = (list(&deny, "allow"), list(&deny, "deny"));
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into()));
    cargo.current_dir(root()).args(["metadata", "--locked", "--offline", "--format-version", "1"]);
    // What is compiled here; crates for other systems need not even be downloaded.
    cargo.args(["--filter-platform", "x86_64-unknown-linux-gnu"]);
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100);
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let licence = package["license"].as_str().unwrap_or("none");
        assert!(is_allowed(licence, &allowed), "{name} is under {licence}: see deny.toml");
        assert!(!banned.contains(name), "{name} is banned in deny.toml");
        match package["source"].as_str() {
            None => assert!(name.starts_with("flashlm"), "{name} comes from a path"),
            Some(source) => assert_eq!(source, "registry+https://github.com/rust-lang/crates.io-index", "{name}"),
        }
    }
    assert!(is_allowed("MIT OR Apache-2.0", &allowed) && !is_allowed("GPL-3.0-only", &allowed));
    assert!(!is_allowed("MIT AND GPL-3.0-only", &allowed));
}
