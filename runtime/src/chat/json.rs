//! Values as text: as Python's `json.dumps` writes them, and as its `print` does.

use std::fmt::Write;

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

/// Deepest nesting of lists and dictionaries that is written.
const DEPTH_MAX: usize = 100;
/// Bytes of text that a unit of fuel pays for.
const BYTES_OF_FUEL: u64 = 64;

/// How values are written.
#[derive(Clone, Copy)]
pub(super) enum Style<'a> {
    /// As `repr`.
    Python,
    /// As `json.dumps`.
    Json {
        /// Whether everything but ASCII is written as escapes.
        ascii: bool,
        /// Each item on its own line, so many spaces deeper.
        indent: Option<usize>,
        /// What follows an item.
        item: &'a str,
        /// What follows a key.
        key: &'a str,
        /// Whether keys are sorted.
        sorted: bool,
    },
}

/// `value` in a style. Each value within it is paid with fuel of `state`: a list that holds the same list twice, and so on, has few
/// lists and much text.
///
/// # Errors
/// What has no such form; no fuel left.
pub(super) fn written(state: &State<'_, '_>, value: &Value, style: Style<'_>) -> Result<String, Error> {
    let mut out = String::new();
    write(&mut out, state, value, style, 0)?;
    Ok(out)
}

fn write(out: &mut String, state: &State<'_, '_>, value: &Value, style: Style<'_>, depth: usize) -> Result<(), Error> {
    state.consume_fuel(1 + value.as_str().map_or(0, str::len) as u64 / BYTES_OF_FUEL)?;
    let wrong = |what: String| Error::new(ErrorKind::InvalidOperation, what);
    if depth > DEPTH_MAX {
        return Err(wrong("lists and dictionaries are nested too deeply".into()));
    }
    let is_json = matches!(style, Style::Json { .. });
    match value.kind() {
        ValueKind::Undefined if is_json => return Err(wrong("something undefined is not JSON serializable".into())),
        ValueKind::Undefined => {}
        ValueKind::None => out.push_str(if is_json { "null" } else { "None" }),
        ValueKind::Bool => out.push_str(match (is_json, value.is_true()) {
            (true, true) => "true",
            (true, false) => "false",
            (false, true) => "True",
            (false, false) => "False",
        }),
        ValueKind::Number if value.is_integer() => _ = write!(out, "{value}"),
        ValueKind::Number => out.push_str(&float(f64::try_from(value.clone())?)),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            match style {
                Style::Python => quoted(out, text),
                Style::Json { ascii, .. } => escaped(out, text, ascii),
            }
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if let Style::Json { sorted: true, .. } = style {
                keys.sort();
            }
            items(out, style, depth, ["{", "}"], keys.into_iter(), &mut |out, key| {
                match style {
                    Style::Python => write(out, state, &key, style, depth + 1)?,
                    Style::Json { ascii, .. } => {
                        let text =
                            key.as_str().map_or_else(|| written(state, &key, style), |text| Ok(text.to_owned()))?;
                        escaped(out, &text, ascii);
                    }
                }
                out.push_str(if let Style::Json { key, .. } = style { key } else { ": " });
                write(out, state, &value.get_item(&key)?, style, depth + 1)
            })?;
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let brackets = if value.is_tuple() && !is_json { ["(", ")"] } else { ["[", "]"] };
            items(out, style, depth, brackets, value.try_iter()?, &mut |out, item| {
                write(out, state, &item, style, depth + 1)
            })?;
        }
        _ if is_json => return Err(wrong(format!("{} is not JSON serializable", value.kind()))),
        _ => _ = write!(out, "{value}"),
    }
    Ok(())
}

fn items(
    out: &mut String,
    style: Style<'_>,
    depth: usize,
    [open, close]: [&str; 2],
    all: impl Iterator<Item = Value>,
    each: &mut dyn FnMut(&mut String, Value) -> Result<(), Error>,
) -> Result<(), Error> {
    let (separator, indent) = match style {
        Style::Python => (", ", None),
        Style::Json { item, indent, .. } => (item, indent),
    };
    let line = |out: &mut String, depth: usize| {
        if let Some(spaces) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', spaces * depth));
        }
    };
    out.push_str(open);
    let mut count = 0;
    for item in all {
        if count > 0 {
            out.push_str(separator);
        }
        line(out, depth + 1);
        each(out, item)?;
        count += 1;
    }
    if count > 0 {
        line(out, depth);
    }
    if open == "(" && count == 1 {
        out.push(',');
    }
    out.push_str(close);
    Ok(())
}

/// A string as JSON.
fn escaped(out: &mut String, text: &str, ascii: bool) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            other if u32::from(other) < 0x20 || (ascii && !other.is_ascii()) => {
                let mut units = [0; 2];
                other.encode_utf16(&mut units).iter().for_each(|unit| _ = write!(out, "\\u{unit:04x}"));
            }
            other => out.push(other),
        }
    }
    out.push('"');
}

/// A string as Python writes it within a list.
fn quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            other if other == quote => out.extend(['\\', other]),
            other if u32::from(other) < 0x20 || other == '\u{7f}' => _ = write!(out, "\\x{:02x}", u32::from(other)),
            other => out.push(other),
        }
    }
    out.push(quote);
}

/// A number as Python's `repr` writes it: the shortest digits that mean it.
fn float(number: f64) -> String {
    if !number.is_finite() {
        let name = if number.is_nan() { "NaN" } else { "Infinity" };
        return format!("{}{name}", if number < 0.0 { "-" } else { "" });
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').expect("it has an exponent");
    match exponent.parse::<i32>().expect("a whole number") {
        exponent if (-4..16).contains(&exponent) => format!("{number:?}").replace("e0", ""),
        exponent => format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_python() {
        for (number, text) in [
            (0.0, "0.0"),
            (-1.5, "-1.5"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e-5, "1.25e-05"),
            (0.0001, "0.0001"),
            (1e100, "1e+100"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(float(number), text);
        }
    }

    #[test]
    fn what_nests_without_end_is_refused() {
        let mut deep = Value::from(1);
        for _ in 0..1000 {
            deep = Value::from(vec![deep]);
        }
        let environment = minijinja::Environment::new();
        assert!(written(&environment.empty_state(), &deep, Style::Python).is_err());
    }
}
