//! The environment that transformers gives a chat template: Jinja as Python runs it.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};

use super::json::{Style, written};

/// Deepest nesting of calls and loops.
const RECURSION_MAX: usize = 200;
/// Spaces before a line, at most: what a template asks for is written for every line.
const INDENT_MAX: usize = 64;

/// Marks errors that the template itself raised.
#[derive(Debug)]
struct Raised;

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the template refuses")
    }
}

impl std::error::Error for Raised {}

/// Whether the template raised this.
pub(super) fn is_raised(error: &Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<Raised>())
}

/// An environment without templates.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("only whitespace is changed"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_recursion_limit(RECURSION_MAX);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, state, value| {
        let text = text(state, value)?;
        out.write_str(&text).map_err(|_| Error::new(ErrorKind::WriteFailure, "cannot write"))
    });
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |state: &State, value: &Value| text(state, value));
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable)
    });
    environment.add_test("iterable", |value: &Value| {
        let kind = value.kind();
        kind == ValueKind::Undefined
            || matches!(kind, ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable)
    });
    environment.add_function("raise_exception", |message: String| {
        Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, message).with_source(Raised))
    });
    environment
}

/// A value as Python prints it.
fn text(state: &State, value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(String::new()),
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_owned()),
        _ => written(state, value, Style::Python),
    }
}

/// `json.dumps`, as transformers calls it.
fn tojson(state: &State, value: &Value, positional: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let argument = |at: usize, name: &str| -> Result<Option<Value>, Error> {
        Ok(named.get::<Option<Value>>(name)?.or_else(|| positional.get(at).cloned()).filter(|value| !value.is_none()))
    };
    let flag = |at: usize, name: &str| argument(at, name).map(|value| value.is_some_and(|value| value.is_true()));
    let ascii = flag(0, "ensure_ascii")?;
    let indent = argument(1, "indent")?
        .map(|indent| {
            let spaces = indent.as_usize().filter(|spaces| *spaces <= INDENT_MAX);
            spaces.ok_or_else(|| {
                Error::new(ErrorKind::InvalidOperation, format!("an indent is a number up to {INDENT_MAX}"))
            })
        })
        .transpose()?;
    let separators = argument(2, "separators")?
        .map(|pair| -> Result<_, Error> {
            Ok((text(state, &pair.get_item_by_index(0)?)?, text(state, &pair.get_item_by_index(1)?)?))
        })
        .transpose()?;
    let sorted = flag(3, "sort_keys")?;
    named.assert_all_used()?;
    let default = if indent.is_some() { "," } else { ", " };
    let (item, key) = separators.unwrap_or_else(|| (default.into(), ": ".into()));
    written(state, value, Style::Json { ascii, indent, item: &item, key: &key, sorted })
}

/// A template without the tags `generation` and `endgeneration`, which mark what models are trained on: they leave no trace in the
/// text, but their lines are trimmed like those of other tags.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let inner = tag.trim_start_matches(['-', '+']);
        let signs = tag.len() - inner.len();
        let word = inner.trim_start();
        let spaces = inner.len() - word.len();
        let replaced = [("endgeneration", "endif"), ("generation", "if true")].into_iter().find(|(name, _)| {
            let after = word.strip_prefix(name).map(|rest| rest.trim_start().trim_start_matches(['-', '+']));
            after.is_some_and(|after| after.starts_with("%}"))
        });
        rest = match replaced {
            Some((name, other)) => {
                out.push_str(&tag[..signs + spaces]);
                out.push_str(other);
                &word[name.len()..]
            }
            None => tag,
        };
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(template: &str) -> Result<String, Error> {
        environment().render_str(template, ())
    }

    #[test]
    fn values_are_printed_as_in_python() {
        for (expression, text) in [
            ("true", "True"),
            ("none", "None"),
            ("missing", ""),
            ("1.0", "1.0"),
            ("[1, 'a', none, 1.5]", "[1, 'a', None, 1.5]"),
            ("{'k': \"it's\", 2: [true]}", "{'k': \"it's\", 2: [True]}"),
            ("'é' | string", "é"),
            ("[none] | string", "[None]"),
            ("'a' is sequence", "True"),
            ("none is iterable", "False"),
            ("{} is iterable", "True"),
            ("[1, 2, 3][::-1]", "[3, 2, 1]"),
            ("' a '.strip() + 'b'.upper()", "aB"),
            ("'a-b-c'.split('-')[-1]", "c"),
        ] {
            assert_eq!(rendered(&format!("{{{{ {expression} }}}}")).unwrap(), text, "{expression}");
        }
    }

    #[test]
    fn json_is_written_as_transformers_writes_it() {
        for (expression, text) in [
            ("{'b': 1, 'a': [1, 2.0, none]} | tojson", r#"{"b": 1, "a": [1, 2.0, null]}"#),
            ("{'b': 1, 'a': 2} | tojson(sort_keys=true)", r#"{"a": 2, "b": 1}"#),
            (
                "{'b': [1], 'a': {}, 'c': []} | tojson(indent=2)",
                "{\n  \"b\": [\n    1\n  ],\n  \"a\": {},\n  \"c\": []\n}",
            ),
            ("[1, {'a': 2}] | tojson(separators=(',', ':'))", r#"[1,{"a":2}]"#),
            (r#"'<&"\n\u00e9' | tojson"#, "\"<&\\\"\\né\""),
            (r#"'\u00e9\U0001f600' | tojson(ensure_ascii=true)"#, r#""\u00e9\ud83d\ude00""#),
        ] {
            let expression = expression.replace("\\U0001f600", "\u{1f600}");
            assert_eq!(rendered(&format!("{{{{ {expression} }}}}")).unwrap(), text, "{expression}");
        }
        assert!(rendered("{{ 1 | tojson(indent=100000000) }}").is_err());
    }

    #[test]
    fn what_a_template_raises_is_its_own_word() {
        let error = rendered("{{ raise_exception('only two') }}").unwrap_err();
        assert!(is_raised(&error) && error.detail() == Some("only two"));
        assert!(!is_raised(&rendered("{{ 1 / 'a' }}").unwrap_err()));
    }

    #[test]
    fn generation_tags_trim_like_others() {
        let with = |open: &str, close: &str| format!("a\n  {open}\nb\n  {close}\nc");
        for (open, close) in
            [("{% generation %}", "{% endgeneration %}"), ("{%- generation -%}", "{%-endgeneration-%}")]
        {
            let without = without_generation_tags(&with(open, close));
            assert!(!without.contains("generation"), "{without}");
            let twin = with(&open.replace("generation", "if 1"), &close.replace("endgeneration", "endif"));
            assert_eq!(rendered(&without).unwrap(), rendered(&twin).unwrap());
        }
        for other in
            ["{% set generation = 1 %}", "{{ add_generation_prompt }}", "{% generations %}", "{%", "{% generation"]
        {
            assert_eq!(without_generation_tags(other), other);
        }
    }
}
