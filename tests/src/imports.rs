//! Which modules of a crate import which: read from its sources, for the rules about floors and circles.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// A module by the names that lead to it from the crate's root.
type Module = Vec<String>;

/// The modules of one crate, and who imports whom. Tests import what they like: what is built for them only is not read.
pub struct Imports {
    name: String,
    sources: BTreeMap<Module, String>,
    /// Where the names that a module imports are defined.
    names: BTreeMap<Module, BTreeMap<String, Vec<String>>>,
}

impl Imports {
    /// Reads the crate `name` (as Rust code names it) whose `lib.rs`, and `main.rs` if there is one, lie in `src`.
    pub fn read(src: &Path, name: &str) -> Self {
        let mut imports = Self { name: name.to_owned(), sources: BTreeMap::new(), names: BTreeMap::new() };
        for root in ["lib.rs", "main.rs"] {
            if src.join(root).is_file() {
                imports.read_module(&src.join(root), src, &Vec::new());
            }
        }
        let modules: Vec<Module> = imports.sources.keys().cloned().collect();
        for module in modules {
            let names = imports.names_in(&module);
            imports.names.insert(module, names);
        }
        imports
    }

    /// Reads `file`, which is `module`, and below `dir` the modules that it declares.
    fn read_module(&mut self, file: &Path, dir: &Path, module: &Module) {
        let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let text = without_tests_and_comments(&text);
        for line in text.lines() {
            let line = line.trim_start();
            let declared = line.strip_prefix("mod ").or_else(|| line.split_once(" mod ").map(|(_, name)| name));
            let is_public = line.starts_with("mod ") || line.starts_with("pub");
            let Some(child) = declared.filter(|_| is_public).and_then(|rest| rest.strip_suffix(';')) else { continue };
            let (flat, nested) = (dir.join(format!("{child}.rs")), dir.join(child).join("mod.rs"));
            let path = [module.as_slice(), &[child.to_owned()]].concat();
            self.read_module(if flat.is_file() { &flat } else { &nested }, &dir.join(child), &path);
        }
        // `lib.rs` and `main.rs` are both the root.
        self.sources.entry(module.clone()).or_default().push_str(&text);
    }

    /// What the module's `use` declarations bring into its scope, by its full path.
    fn names_in(&self, module: &Module) -> BTreeMap<String, Vec<String>> {
        let text = &self.sources[module];
        let mut names = BTreeMap::new();
        for (at, _) in text.match_indices("use ").filter(|(at, _)| is_word_start(text, *at)) {
            for (path, alias) in tree(&text[at + "use ".len()..]) {
                let Some(last) = alias.or_else(|| path.last().cloned()) else { continue };
                if let Some(full) = self.absolute(module, &path) {
                    names.insert(last, full);
                }
            }
        }
        names
    }

    /// A path as written in `module`, from the crate's root; `None` for what is not of this crate.
    fn absolute(&self, module: &Module, path: &[String]) -> Option<Vec<String>> {
        let first = path.first()?;
        let mut base = match first.as_str() {
            "crate" => Vec::new(),
            "self" | "super" => module.clone(),
            name if name == self.name => Vec::new(),
            name => {
                let child = [module.as_slice(), &[name.to_owned()]].concat();
                return self.sources.contains_key(&child).then(|| [module.as_slice(), path].concat());
            }
        };
        let ups = path.iter().take_while(|part| *part == "super").count();
        base.truncate(base.len().checked_sub(ups)?);
        base.extend_from_slice(&path[ups.max(1)..]);
        Some(base)
    }

    /// The module that `user` means by this full path. A name that a module above `user` merely passes on is followed home.
    fn module_of(&self, user: &Module, path: &[String], steps: usize) -> Module {
        let mut module = Module::new();
        for (at, part) in path.iter().enumerate() {
            let child = [module.as_slice(), std::slice::from_ref(part)].concat();
            if self.sources.contains_key(&child) {
                module = child;
                continue;
            }
            let home = self.names.get(&module).and_then(|names| names.get(part));
            if let Some(home) = home.filter(|_| user.starts_with(&module) && steps > 0) {
                return self.module_of(user, &[home.as_slice(), &path[at + 1..]].concat(), steps - 1);
            }
            break;
        }
        module
    }

    /// Each import of this crate's own names: who, of whom.
    pub fn all(&self) -> BTreeSet<(Module, Module)> {
        let mut all = BTreeSet::new();
        for (user, text) in &self.sources {
            for start in ["crate", "super", "self", &self.name] {
                let written = format!("{start}::");
                for (at, _) in text.match_indices(&written).filter(|(at, _)| is_path_start(text, *at)) {
                    for (path, _) in tree(&text[at..]) {
                        if let Some(full) = self.absolute(user, &path) {
                            all.insert((user.clone(), self.module_of(user, &full, 8)));
                        }
                    }
                }
            }
        }
        all.retain(|(user, of)| user != of);
        all
    }

    /// Circles among modules of one parent: each as the ways round, `a -> b -> a`, with the parent's name before it.
    pub fn circles(&self) -> Vec<String> {
        let mut levels: BTreeMap<Module, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
        for (user, of) in self.all() {
            let shared = user.iter().zip(&of).take_while(|(a, b)| a == b).count();
            if let (Some(from), Some(to)) = (user.get(shared), of.get(shared)) {
                let level = levels.entry(user[..shared].to_vec()).or_default();
                level.entry(from.clone()).or_default().insert(to.clone());
            }
        }
        let mut circles = Vec::new();
        for (parent, arrows) in &levels {
            let mut named = BTreeSet::new();
            for start in arrows.keys() {
                if let Some(way) = shortest_way_round(arrows, start).filter(|_| !named.contains(start)) {
                    let place = [std::slice::from_ref(&self.name), parent].concat().join("::");
                    circles.push(format!("{place}: {}", way.join(" -> ")));
                    named.extend(way);
                }
            }
        }
        circles
    }
}

/// The shortest way along the arrows from `start` back to it.
fn shortest_way_round(arrows: &BTreeMap<String, BTreeSet<String>>, start: &String) -> Option<Vec<String>> {
    let mut ways = vec![vec![start.clone()]];
    let mut seen = BTreeSet::new();
    while !ways.is_empty() {
        let mut longer = Vec::new();
        for way in ways {
            for next in arrows.get(way.last()?).into_iter().flatten() {
                let on = [way.as_slice(), std::slice::from_ref(next)].concat();
                if next == start {
                    return Some(on);
                }
                if seen.insert(next.clone()) {
                    longer.push(on);
                }
            }
        }
        ways = longer;
    }
    None
}

/// The source without comments and without what `#[cfg(test)]` is written before.
fn without_tests_and_comments(text: &str) -> String {
    let mut kept = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() == "#[cfg(test)]" {
            // One item: up to its semicolon, or to the brace that closes it, which stands below its first letter.
            let Some(item) = lines.next() else { break };
            let indent = item.len() - item.trim_start().len();
            let close = format!("{}}}", &item[..indent]);
            if !item.ends_with(';') && !item.ends_with('}') {
                lines.by_ref().find(|line| *line == close);
            }
            continue;
        }
        kept.push_str(line.split("//").next().unwrap_or_default());
        kept.push('\n');
    }
    kept
}

fn is_word_start(text: &str, at: usize) -> bool {
    !text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_')
}

fn is_path_start(text: &str, at: usize) -> bool {
    is_word_start(text, at) && !text[..at].ends_with("::")
}

/// The paths of a tree as `use` has it, and the names given by `as`: of `a::{b, c as d}` these are `a::b`, and `a::c` named `d`.
fn tree(text: &str) -> Vec<(Vec<String>, Option<String>)> {
    fn branch(rest: &mut &str, before: &[String], found: &mut Vec<(Vec<String>, Option<String>)>) {
        let mut path = before.to_vec();
        loop {
            *rest = rest.trim_start();
            if let Some(inside) = rest.strip_prefix('{') {
                *rest = inside;
                while !rest.trim_start().starts_with('}') && !rest.is_empty() {
                    branch(rest, &path, found);
                    *rest = rest.trim_start();
                    *rest = rest.strip_prefix(',').unwrap_or(rest);
                }
                *rest = rest.trim_start().strip_prefix('}').unwrap_or(rest);
                return;
            }
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_' && c != '*').unwrap_or(rest.len());
            let (part, after) = rest.split_at(end);
            if part.is_empty() {
                // Not a tree that Rust knows: what is left of it is ignored, a letter at a time.
                *rest = rest.get(1..).unwrap_or_default();
                break;
            }
            // `a::{self}` is `a`.
            if part != "self" || path.is_empty() {
                path.push(part.to_owned());
            }
            *rest = after;
            match after.strip_prefix("::") {
                Some(after) => *rest = after,
                None => break,
            }
        }
        let mut alias = None;
        if let Some(named) = rest.trim_start().strip_prefix("as ") {
            let end = named.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(named.len());
            alias = Some(named[..end].to_owned());
            *rest = &named[end..];
        }
        found.push((path, alias));
    }
    let mut found = Vec::new();
    branch(&mut { text }, &[], &mut found);
    found
}
